//! Several rails: failing over, and coming back.

use std::time::{Duration, Instant};

use kvferry::{Consumer, LaneKind};
use kvferry_testkit::{
    rdma::{Slow, all_up, came_in, ends, ip, need_wires, objects, settled, spec, tc},
    rig::{Producer, SOON, ended, pull_all},
};

use crate::mishap::{DEADLINE, Mishap, When};

/// Two seconds are promised. An emulated machine on a loaded host gets two more before the test fails.
fn complete_soon(event: &str, took: Duration) {
    println!("failed over and complete {took:?} after the {event}; 2 s are promised");
    assert!(took < Duration::from_secs(4), "{took:?} after the {event}");
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn one_of_two_rails_cut_costs_nothing_but_time() {
    need_wires(2);
    // The rest takes the other rail a second and a half.
    let half_loaded =
        || Mishap { mib: 48, ..Mishap::over(2) }.deadline(Duration::from_secs(30)).when(When::Loaded(0.5));
    let (end, at, _) = half_loaded().run(|_| ip("link set a1 down"), |_| ip("link set a1 up"));
    assert!(end.outcome.complete(), "{:?}", end.outcome.cause());
    complete_soon("cut", end.outcome.times.data.unwrap().saturating_sub(at));
    let hurt = |_: &mut Producer| tc("qdisc change dev b2 root netem loss 100%");
    let heal = |_: &mut Producer| tc(&format!("qdisc change dev b2 root netem loss 0% {}", Slow::DELAY));
    let (end, at, _) = half_loaded().run(hurt, heal);
    assert!(end.outcome.complete(), "{:?}", end.outcome.cause());
    complete_soon("loss", end.outcome.times.data.unwrap().saturating_sub(at));
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn both_rails_cut_leave_the_prefix() {
    need_wires(2);
    let cut = |_: &mut Producer| {
        ip("link set a1 down");
        ip("link set b2 down");
    };
    let mend = |_: &mut Producer| {
        ip("link set a1 up");
        ip("link set b2 up");
    };
    let mishap = Mishap::over(2);
    let (end, ..) = mishap.run(cut, mend);
    let g = &end.outcome.groups[0];
    // Blocks are read in the order of the prompt: the usable prefix is not much shorter than all loaded blocks.
    let prefix = (0..mishap.blocks()).take_while(|b| g.loaded.contains(*b)).count() as u64;
    println!("a prefix of {prefix}, of {} loaded", end.outcome.loaded());
    assert!(end.outcome.invalid() > 0 && prefix >= end.outcome.loaded() / 2, "{:?}", g.loaded);
}

/// Pulls everything, and returns the bytes that arrived at each of the near ends meanwhile.
fn pull_over(consumer: &Consumer, producer: &mut Producer) -> [u64; 2] {
    let before = ["a1", "a2"].map(came_in);
    let offer = producer.offer_all();
    consumer.pull(pull_all(&offer, LaneKind::Verbs, SOON)).unwrap();
    let end = ended(consumer);
    assert!(end.outcome.complete(), "{:?}", end.outcome.cause());
    let after = ["a1", "a2"].map(came_in);
    [after[0] - before[0], after[1] - before[1]]
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn a_lost_rail_is_used_again_once_it_works() {
    need_wires(2);
    all_up();
    let before = objects();
    let spec = spec(2, 64, 1, 64 << 10);
    let (mut producer, consumer) = ends(2, &spec, None);
    let share = u64::from(spec.blocks) * spec.block_bytes() / 5;
    // One end of each side: the reader gets events of its own links, and notices the peer's by failed reads.
    for (end, wire) in [("a1", 0), ("b2", 1)] {
        let over = pull_over(&consumer, &mut producer);
        assert!(over.iter().all(|n| *n > share), "both rails are used: {over:?}");
        ip(&format!("link set {end} down"));
        let over = pull_over(&consumer, &mut producer);
        assert!(over[wire] < share, "{end} is down: {over:?}");
        ip(&format!("link set {end} up"));
        all_up();
        let up = Instant::now();
        let mut pulls = 0;
        while pull_over(&consumer, &mut producer)[wire] <= share {
            pulls += 1;
            assert!(up.elapsed() < SOON, "{end} is not used again");
        }
        println!("{end} is used again after {:?} and {pulls} pulls", up.elapsed());
    }
    drop(consumer);
    producer.kill();
    settled(before);
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn a_producer_uses_a_port_that_was_down_at_its_start_once_it_is_up() {
    need_wires(1);
    all_up();
    let spec = spec(1, 64, 1, 64 << 10);
    ip("link set b1 down");
    let (mut producer, consumer) = ends(1, &spec, None);
    let offer = producer.offer_all();
    consumer.pull(pull_all(&offer, LaneKind::Verbs, DEADLINE)).unwrap();
    let end = ended(&consumer);
    assert_eq!(end.outcome.loaded(), 0);
    ip("link set b1 up");
    all_up();
    pull_over(&consumer, &mut producer);
}
