//! In the steady state no read allocates: a pull of four times as many blocks makes hardly more allocations.

use std::time::Duration;

use kvferry::{BlockId, Consumer, GroupId, LaneKind, OfferGroup, OfferSpec, PoolLayout, Producer, Pull, Ready};
use kvferry_testkit::{
    counting::{Counting, allocations},
    rig::{local, model},
};

#[global_allocator]
static COUNTING: Counting = Counting;

const BLOCKS: u32 = 16384;

/// Both ends of a pull are in this process, so allocations of both are counted.
fn allocations_of_a_pull(producer: &Producer, consumer: &Consumer, lane: LaneKind, blocks: u32) -> u64 {
    let scattered = |i: u32| Some(BlockId(i.wrapping_mul(7919) % BLOCKS));
    let groups =
        vec![OfferGroup { group: GroupId(0), first_position: 0, blocks: (0..blocks).map(scattered).collect() }];
    let spec = OfferSpec::new(u64::from(blocks) * 16, groups);
    let offer = producer.offer(spec, Ready::Now).expect("an offer");
    let pull = Pull::new(offer, local(0..blocks)).lanes(vec![lane]).deadline(Duration::from_secs(20));
    let before = allocations();
    consumer.pull(pull).expect("a pull");
    let ended = consumer.wait(Duration::from_secs(40)).expect("it ends");
    let counted = allocations() - before;
    assert!(ended.outcome.complete(), "{:?}", ended.outcome);
    counted
}

#[test]
fn planning_and_carrying_out_a_read_does_not_allocate() {
    let model = model("m", "uint8");
    let layout = PoolLayout::uniform(BLOCKS, 2, 512, 16);
    let producer =
        Producer::builder("prefill".parse().unwrap(), model.clone(), layout.clone()).build().expect("a producer");
    for lane in [LaneKind::Local, LaneKind::Tcp] {
        let consumer =
            Consumer::builder("decode".parse().unwrap(), model.clone(), layout.clone()).build().expect("a consumer");
        // The first pulls grow buffers and open connections.
        for _ in 0..3 {
            allocations_of_a_pull(&producer, &consumer, lane, BLOCKS);
        }
        let few = allocations_of_a_pull(&producer, &consumer, lane, BLOCKS / 4);
        let many = allocations_of_a_pull(&producer, &consumer, lane, BLOCKS);
        let more_reads = u64::from(BLOCKS / 4 * 3) * 2;
        let more = many.saturating_sub(few);
        // A pull allocates once, and for each of its chunks (at most 128 here), but not for a read.
        assert!(more < more_reads / 20, "{lane}: {few} allocations for a quarter of the reads, {many} for all of them");
    }
}
