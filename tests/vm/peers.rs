//! Peers that fail, and pulls from other peers meanwhile.

use kvferry::{BlockId, Cause, GroupId, LaneKind, LocalBlocks, Offer, Pull};
use kvferry_testkit::{
    rdma::{Slow, config, ends, need_wires, spec},
    rig::{
        Belongings, Heard, Producer, SOON, Say, assert_loaded_is_exact, consumer, ended, pull_all, wait_until_loaded,
    },
};
use rustix::process::Signal;

use crate::mishap::Mishap;

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn a_killed_peer() {
    need_wires(1);
    let mut all = Vec::new();
    for _ in 0..3 {
        let (end, _, reasons) = Mishap::over(1).run(|p| p.kill(), |_| ());
        assert!(end.outcome.invalid() > 0);
        all.extend(reasons);
    }
    println!("reasons for which lanes to killed peers went down: {all:?}");
    assert_a_dead_peers_reasons(&all);
}

/// The control connection may tell of a death before the lane does, so no reason at all is right too. The kernel decides
/// which object of a dying process it destroys first; soft-RoCE begins with the newest, a queue pair.
fn assert_a_dead_peers_reasons(reasons: &[String]) {
    let known = |w: &String| w.contains("status 12") || w.contains("status 10");
    assert!(reasons.iter().all(known), "retries exceeded, or a remote access error: {reasons:?}");
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn a_killed_peer_whose_memory_goes_before_its_queue_pairs() {
    need_wires(1);
    let hurt = |p: &mut Producer| {
        assert_eq!(take(p, Belongings::Regions), 2, "the pool and the fence table");
        p.kill();
    };
    let (end, _, reasons) = Mishap::over(1).run(hurt, |_| ());
    assert!(end.outcome.invalid() > 0);
    assert_a_dead_peers_reasons(&reasons);
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn a_stopped_peer_is_read_on_and_its_data_stays_valid_while_the_fence_holds() {
    need_wires(1);
    let (end, ..) = Mishap::over(1).run(|p| p.signal(Signal::STOP), |p| p.signal(Signal::CONT));
    assert!(end.outcome.complete(), "{:?}", end.outcome.cause());
}

/// Destroys objects of a producer without its knowledge, and returns how many.
fn take(p: &mut Producer, objects: Belongings) -> usize {
    p.say(&Say::Take(objects));
    p.wait_for("the destroyed objects", |h| if let Heard::Taken(n) = h { Some(*n) } else { None })
}

/// A device has its own references to pinned pages: their content is read, and is valid while the fence holds.
#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn a_peer_that_unmaps_its_pool_is_read_on() {
    need_wires(1);
    let (end, ..) = Mishap::over(1).run(|p| assert_eq!(take(p, Belongings::Pool), 1), |_| ());
    assert!(end.outcome.complete(), "{:?}", end.outcome.cause());
    assert_eq!(end.outcome.retries, 0, "it is not even noticed");
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn a_peer_whose_queue_pairs_are_destroyed_is_read_over_new_ones() {
    need_wires(1);
    let hurt =
        |p: &mut Producer| assert_eq!(take(p, Belongings::QueuePairs), 2, "the queue pairs of the consumer's lane");
    let (end, _, reasons) = Mishap::over(1).run(hurt, |_| ());
    assert!(end.outcome.complete() && end.outcome.retries > 0, "{:?}", end.outcome.cause());
    assert!(reasons[0].contains("status 12"), "retries exceeded: {reasons:?}");
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn a_peer_whose_memory_is_deregistered_fails_the_pull_by_its_deadline() {
    need_wires(1);
    let hurt = |p: &mut Producer| assert_eq!(take(p, Belongings::Regions), 2, "the pool and the fence table");
    let (end, _, reasons) = Mishap::over(1).run(hurt, |_| ());
    // New queue pairs do not help: the peer does not know, and sends the same keys.
    assert!(end.outcome.invalid() > 0 && end.outcome.retries > 0);
    assert!(!reasons.is_empty() && reasons.iter().all(|r| r.contains("status 10")), "remote access error: {reasons:?}");
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn blocks_of_an_offer_that_is_revoked_during_a_pull_are_fresh_or_invalid() {
    need_wires(1);
    // When the blocks are overwritten, the answers of a full window are on the wire.
    let slow = Slow::on(1);
    let spec = spec(1, 512, 1, 64 << 10);
    let (mut producer, consumer) = ends(1, &spec, None);
    for _ in 0..3 {
        let offer = producer.offer_all();
        let pull = consumer.pull(pull_all(&offer, LaneKind::Verbs, SOON)).unwrap();
        wait_until_loaded(&consumer, pull, 0.2);
        slow.in_flight();
        // The producer overwrites its blocks at once.
        producer.say(&Say::Revoke(offer.id));
        let end = ended(&consumer);
        assert!(matches!(end.outcome.cause(), Some(Cause::Stale | Cause::Revoked)), "{:?}", end.outcome.cause());
        // Loaded blocks have the pattern from before.
        assert_eq!(assert_loaded_is_exact(&end, &consumer, &spec, producer.seed), end.outcome.loaded());
        drop(producer);
        producer = Producer::start(&spec);
    }
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn a_peer_that_fails_leaves_other_peers_pulls_alone() {
    need_wires(1);
    let spec = spec(1, 128, 1, 64 << 10);
    let (mut one, mut two) = (Producer::start(&spec), Producer::start(&spec));
    let consumers = [consumer(&spec, config(1, Some("4M"))), consumer(&spec, config(1, Some("4M")))];
    let offers = [one.offer_all(), two.offer_all()];
    let mut pulls = Vec::new();
    for (c, o) in consumers.iter().zip(&offers) {
        pulls.push(c.pull(pull_all(o, LaneKind::Verbs, SOON)).unwrap());
    }
    wait_until_loaded(&consumers[0], pulls[0], 0.2);
    one.kill();
    let bad = ended(&consumers[0]);
    let good = ended(&consumers[1]);
    assert!(!bad.outcome.complete());
    assert!(good.outcome.complete(), "{:?}", good.outcome.cause());
    assert_loaded_is_exact(&good, &consumers[1], &spec, two.seed);
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn a_peer_that_fails_leaves_the_same_consumers_pull_from_another_one_alone() {
    need_wires(1);
    let spec = spec(1, 128, 1, 64 << 10);
    let (mut one, mut two) = (Producer::start(&spec), Producer::start(&spec));
    let consumer = consumer(&spec, config(1, Some("4M")));
    let offers = [one.offer_all(), two.offer_all()];
    // Each pull into its own half.
    let half = |o: &Offer, half: std::ops::Range<u32>| {
        let first_position = half.start;
        let blocks = half.map(|b| Some(BlockId(b))).collect();
        let wanted = LocalBlocks { group: GroupId(0), first_position, blocks };
        Pull::new(o.clone(), vec![wanted]).lanes(vec![LaneKind::Verbs]).deadline(SOON)
    };
    let bad = consumer.pull(half(&offers[0], 0..64)).unwrap();
    let good = consumer.pull(half(&offers[1], 64..128)).unwrap();
    wait_until_loaded(&consumer, bad, 0.2);
    one.kill();
    let ends = [ended(&consumer), ended(&consumer)];
    let of = |pull| ends.iter().find(|e| e.pull == pull).expect("each pull ends once");
    assert!(!of(bad).outcome.complete());
    let outcome = &of(good).outcome;
    assert!(outcome.complete() && outcome.retries == 0, "{:?}, {} retries", outcome.cause(), outcome.retries);
    assert_loaded_is_exact(of(good), &consumer, &spec, two.seed);
}
