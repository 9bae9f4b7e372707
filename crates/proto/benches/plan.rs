//! Planning: nanoseconds and allocations a read. `cargo bench --bench plan`.
//!
//! The contract's bound is 20 ns a read, and no allocation a read once the buffer has grown. Best of several rounds, since
//! a noisy machine only ever makes it slower.

use std::{hint::black_box, time::Instant};

use counting::allocations;
use kvferry_proto::{BlockId, ChunkSize, GroupId, LocalBlocks, OfferGroup, Plan, PoolLayout, Shard, Source};
use kvferry_testkit::counting;

#[global_allocator]
static COUNTING: counting::Counting = counting::Counting;

fn offer(blocks: Vec<u32>) -> [OfferGroup; 1] {
    let blocks = blocks.into_iter().map(|b| Some(BlockId(b))).collect();
    [OfferGroup { group: GroupId(0), first_position: 0, blocks }]
}

fn main() {
    println!("{:<34} {:>9} {:>9} {:>12} {:>14}", "shape", "reads", "ns/read", "ns/block", "allocs/read");
    for (name, blocks, regions, scattered) in [
        ("4096 scattered blocks, 1 region", 4096u32, 1, true),
        ("4096 scattered blocks, 32 regions", 4096, 32, true),
        ("65536 scattered blocks, 1 region", 65536, 1, true),
        ("4096 consecutive blocks, 32 regions", 4096, 32, false),
    ] {
        let layout = PoolLayout::uniform(blocks, regions, 4096, 16);
        let ids = (0..blocks).map(|i| if scattered { i.wrapping_mul(7919) % blocks } else { i }).collect();
        let shard = Shard::whole(8, regions);
        let side = Source { layout: &layout, shard: &shard };
        let wanted = vec![LocalBlocks {
            group: GroupId(0),
            first_position: 0,
            blocks: (0..blocks).map(|b| Some(BlockId(b))).collect(),
        }];
        let plan = Plan::new(&offer(ids), &[side], side, &wanted, ChunkSize::default(), 1 << 20).expect("a good plan");
        let mut reads = Vec::new();
        let (mut best, mut count, mut made) = (f64::MAX, 0, 0);
        for _ in 0..20 {
            let before = allocations();
            let start = Instant::now();
            count = 0;
            for chunk in 0..plan.chunks().len() {
                reads.clear();
                plan.reads(chunk as u32, 0, 1 << 30, &mut reads);
                count += black_box(&reads).len();
            }
            best = best.min(start.elapsed().as_nanos() as f64);
            made = allocations() - before;
        }
        println!(
            "{name:<34} {count:>9} {:>9.1} {:>12.1} {:>14.4}",
            best / count as f64,
            best / f64::from(blocks),
            made as f64 / count as f64
        );
    }
}
