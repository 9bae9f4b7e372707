//! A minimal prefill engine: fills blocks, offers them, and waits until it gets them back.
//!
//! `cargo run --example producer -- 127.0.0.1:7400` prints an offer as one line of JSON, which the consumer example reads:
//! `cargo run --example producer -- 127.0.0.1:7400 | cargo run --example consumer`.

use std::time::Duration;

use kvferry::{BlockId, GroupId, Model, OfferGroup, OfferSpec, PoolLayout, Producer, Ready};

/// Both sides must have the same model. An engine fills this from its model's configuration.
fn model() -> Model {
    Model {
        name: "example".into(),
        dtype: "uint8".into(),
        scales: String::new(),
        weights: String::new(),
        attention: "HND".into(),
        block_tokens: 16,
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let listen = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:0".into());
    // 64 blocks of 16 tokens, in 4 layers of 4096 bytes per block. kvferry allocates the memory; an engine passes its own.
    let layout = PoolLayout::uniform(64, 4, 4096, 16);
    let producer = Producer::builder("prefill-0".parse()?, model(), layout.clone()).listen(listen).build()?;

    // "Prefill": the KV of 40 tokens is in blocks 7, 3 and 9, so the last block is partial.
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

    // An engine checks once per step for offers that consumers have released or that have expired.
    loop {
        if let Some(freed) = producer.wait_freed(Duration::from_secs(1)) {
            eprintln!("blocks {blocks:?} are free again: {:?}", freed.why);
            return Ok(());
        }
    }
}
