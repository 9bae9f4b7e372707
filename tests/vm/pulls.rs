//! Pulls without failures, over good and bad wires.

use std::time::Duration;

use kvferry::{BlockId, GroupId, LaneKind, LocalBlocks, Pull};
use kvferry_testkit::{
    counting::allocations,
    rdma::{Loss, Unordered, config, ends, need_wires, objects, settled, spec, status},
    rig::{Producer, assert_loaded_is_exact, consumer, ended, pull_all},
};

/// Emulated CPUs are slow; no test here is about speed.
const LONG: Duration = Duration::from_secs(100);

fn exact(rails: usize, blocks: u32, regions: u32, block_size: u64) {
    let before = objects();
    let spec = spec(rails, blocks, regions, block_size);
    let (mut producer, consumer) = ends(rails, &spec, None);
    let offer = producer.offer_all();
    consumer.pull(pull_all(&offer, LaneKind::Verbs, LONG)).unwrap();
    let end = consumer.wait(LONG).expect("it ends");
    assert!(end.outcome.complete(), "{:?} {:?}", end.outcome.cause(), end.outcome.times);
    assert!(end.outcome.lanes.iter().all(|l| *l == LaneKind::Verbs), "{:?}", end.outcome.lanes);
    assert_eq!(assert_loaded_is_exact(&end, &consumer, &spec, producer.seed), u64::from(blocks));
    let took = end.outcome.times.data.unwrap();
    let bytes = u64::from(blocks) * spec.block_bytes();
    println!(
        "{rails} rails, {block_size} byte blocks: {} MiB in {took:?}, {:.1} MB/s",
        bytes >> 20,
        bytes as f64 / took.as_secs_f64() / 1e6
    );
    drop(consumer);
    producer.kill();
    settled(before);
}

/// Pulls 64 MiB in each size of block, over one rail and over two. That is 64 windows and 16,000 packets or more.
fn exact_in_every_size() {
    for rails in [1, 2] {
        for size in [4 << 10, 64 << 10, 1 << 20] {
            exact(rails, ((64u64 << 20) / size) as u32, 1, size);
        }
    }
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn scattered_blocks_of_every_size_are_exact_over_one_and_two_rails() {
    need_wires(2);
    exact_in_every_size();
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn blocks_in_several_regions_are_exact() {
    need_wires(2);
    exact(1, 256, 4, 64 << 10);
    exact(2, 256, 4, 64 << 10);
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn a_read_takes_no_allocation() {
    need_wires(1);
    let spec = spec(1, 16384, 1, 1 << 10);
    let (mut producer, consumer) = ends(1, &spec, None);
    // The producer is a process of its own, and posts nothing.
    let mut allocations_of = |blocks: u32| {
        let offer = producer.offer_all();
        let wanted = LocalBlocks {
            group: GroupId(0),
            first_position: 0,
            blocks: (0..blocks).map(|b| Some(BlockId(b))).collect(),
        };
        let pull = Pull::new(offer, vec![wanted]).lanes(vec![LaneKind::Verbs]).deadline(LONG);
        let before = allocations();
        consumer.pull(pull).unwrap();
        let end = ended(&consumer);
        let counted = allocations() - before;
        assert!(end.outcome.complete(), "{:?}", end.outcome.cause());
        counted
    };
    // Buffers grow to their final size, and connections are made.
    for _ in 0..3 {
        allocations_of(16384);
    }
    let (few, many) = (allocations_of(4096), allocations_of(16384));
    println!("{few} allocations for 4096 reads, {many} for 16384");
    assert!(many.saturating_sub(few) < (16384 - 4096) / 100, "{few} for 4096 reads, {many} for 16384");
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn one_lost_packet_in_a_hundred_costs_time_and_no_block() {
    need_wires(2);
    let _lossy = ["a1", "b1", "a2", "b2"].map(|end| Loss::on(end, 1));
    exact_in_every_size();
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn packets_that_overtake_each_other_cost_time_and_no_block() {
    need_wires(2);
    let _unordered = Unordered::on(2);
    for _ in 0..5 {
        exact(2, 256, 1, 64 << 10);
        exact(2, 8192, 1, 4 << 10);
    }
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn pulls_from_a_peer_that_restarts_succeed_and_nothing_accumulates() {
    need_wires(1);
    let spec = spec(1, 64, 1, 16 << 10);
    let before = objects();
    let consumer = consumer(&spec, config(1, None));
    let mut with_consumer = None;
    let (mut addr, mut resident) = (None, 0);
    for round in 0..20 {
        let listen = addr.clone().unwrap_or_else(|| spec.listen.clone());
        let spec = kvferry_testkit::rig::Spec { listen, ..spec.clone() };
        let mut producer = Producer::start(&spec);
        addr = Some(producer.addr.clone());
        let offer = producer.offer_all();
        consumer.pull(pull_all(&offer, LaneKind::Verbs, LONG)).unwrap();
        let end = consumer.wait(LONG).expect("it ends");
        assert!(end.outcome.complete(), "round {round}: {:?}", end.outcome.cause());
        assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
        // Killed during another pull.
        let offer = producer.offer_all();
        consumer.pull(pull_all(&offer, LaneKind::Verbs, Duration::from_secs(4))).unwrap();
        producer.kill();
        let end = ended(&consumer);
        assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
        let now = objects();
        match with_consumer {
            None => with_consumer = Some(now),
            Some(first) => {
                assert!(now.qp <= first.qp + 2 && now.mr <= first.mr + 1, "round {round}: {now:?}, {first:?}");
                assert!(now.pinned <= first.pinned + 64, "round {round}: {now:?}, {first:?}");
            }
        }
        match round {
            4 => resident = status("VmRSS"),
            19 => assert!(status("VmRSS") < resident + 4096, "{resident} KiB after 5 rounds, now {}", status("VmRSS")),
            _ => {}
        }
    }
    drop(consumer);
    settled(before);
}
