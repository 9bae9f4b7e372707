//! A minimal decode engine: reads an offer from standard input, pulls it, and prints which blocks arrived.

use std::time::Duration;

use kvferry::{BlockId, Consumer, GroupId, LocalBlocks, Model, Offer, PoolLayout, Pull};

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
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    let offer = Offer::from_json(&line)?;

    let layout = PoolLayout::uniform(128, 4, 4096, 16);
    let consumer = Consumer::builder("decode-0".parse()?, model(), layout.clone()).build()?;

    // Position 0 is a local prefix hit. Positions 1 and 2 are pulled into local blocks 50 and 20.
    let wanted = [(1, 50), (2, 20)];
    let blocks = LocalBlocks {
        group: GroupId(0),
        first_position: 1,
        blocks: wanted.iter().map(|(_, block)| Some(BlockId(*block))).collect(),
    };
    consumer.pull(Pull::new(offer, vec![blocks]).deadline(Duration::from_secs(5)))?;

    // An engine would call `poll` once per step; this example has nothing else to do.
    let ended = consumer.wait(Duration::from_secs(10))?;
    let outcome = &ended.outcome;
    println!(
        "loaded {} invalid {} over {:?} in {:?}",
        outcome.loaded(),
        outcome.invalid(),
        outcome.lanes.last(),
        outcome.times.ended.unwrap_or_default()
    );
    for g in &outcome.groups {
        for (cause, positions) in &g.causes {
            println!("positions {positions:?} must be computed here ({cause})");
        }
        for position in g.loaded.iter() {
            let region = &layout.groups[0].regions[0];
            let local = wanted.iter().find(|(p, _)| *p == position).map_or(0, |(_, block)| *block);
            let mut byte = [0];
            consumer.memory().read_into(region.segment, region.block_offset(local), &mut byte)?;
            println!("position {position} is in local block {local}; its first byte is {}", byte[0]);
        }
    }
    Ok(())
}
