//! A prefill engine in small: fills blocks, offers them, and uses them again when they come back.
//!
//! `cargo run --example producer -- 127.0.0.1:7400` prints an offer, one line of JSON, for the consumer example to read:
//! `cargo run --example producer -- 127.0.0.1:7400 | cargo run --example consumer`.

use std::time::Duration;

use kvferry::{BlockId, GroupId, Model, OfferGroup, OfferSpec, PoolLayout, Producer, Ready};

/// What both sides must agree on; an engine takes it from its model's configuration.
fn model() -> Model {
    Model {
        name: "example".into(),
        dtype: "uint8".into(),
        scales: String::new(),
        attention: "HND".into(),
        block_tokens: 16,
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let listen = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:0".into());
    // 64 blocks of 16 tokens, in 4 layers of 4096 bytes a block. kvferry allocates the memory; an engine passes its own.
    let layout = PoolLayout::uniform(64, 4, 4096, 16);
    let producer = Producer::builder("prefill-0".parse()?, model(), layout.clone()).listen(listen).build()?;

    // "Prefill": this request's KV went into blocks 7, 3 and 9; 40 tokens, so the last block is partial.
    let blocks = [7, 3, 9];
    for (position, block) in blocks.iter().enumerate() {
        for region in &layout.groups[0].regions {
            let bytes = vec![position as u8 + 1; region.block_bytes as usize];
            producer.memory().write_from(region.segment, region.block_offset(*block), &bytes)?;
        }
    }
    let offered = blocks.iter().map(|b| Some(BlockId(*b))).collect();
    let groups = vec![OfferGroup { group: GroupId(0), first_position: 0, blocks: offered }];
    let offer = producer.offer(OfferSpec::new(40, groups).request("request-1"), Ready::Now)?;
    println!("{}", offer.to_json());

    // The engine's loop: once a step it takes back what consumers have released, or what no consumer came for.
    loop {
        if let Some(freed) = producer.wait_freed(Duration::from_secs(1)) {
            eprintln!("blocks {blocks:?} are free again: {:?}", freed.why);
            return Ok(());
        }
    }
}
