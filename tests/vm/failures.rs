//! Bad days, one for each way that verbs fail. Whatever happens, the pull is decided by its deadline, ends when nothing can
//! be written any more, and what is loaded is exact; and the next pull works.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use kvferry::{
    block::{BlockId, GroupId},
    consumer::{Ended, Pull},
    error::Cause,
    lane::LaneKind,
    offer::Offer,
    plan::LocalBlocks,
};
use rustix::process::Signal;

use crate::{
    rig::{Producer, SOON, Say, assert_loaded_is_exact, consumer, ended, pull_all, wait_until_loaded},
    wires::{all_up, came_in, config, ends, ip, objects, run, settled, spec, tc, wires},
};

/// Emulated CPUs may look at the clock late.
const SLACK: Duration = Duration::from_secs(2);

/// A pull of 16 MiB at a pace that leaves time to break it, broken when a third is there.
fn broken(
    deadline: Duration,
    rails: usize,
    hurt: impl FnOnce(&mut Producer),
    heal: impl FnOnce(&mut Producer),
) -> (Ended, Duration) {
    broken_at(0.3, deadline, rails, hurt, heal)
}

/// The same, broken when this share of it is there.
fn broken_at(
    share: f64,
    deadline: Duration,
    rails: usize,
    hurt: impl FnOnce(&mut Producer),
    heal: impl FnOnce(&mut Producer),
) -> (Ended, Duration) {
    all_up();
    let before = objects();
    let spec = spec(rails, 256, 1, 64 << 10);
    let (mut producer, consumer) = ends(rails, &spec, Some("8M"));
    let offer = producer.offer_all();
    let started = Instant::now();
    let pull = consumer.pull(pull_all(&offer, LaneKind::Verbs, deadline)).unwrap();
    wait_until_loaded(&consumer, pull, share);
    hurt(&mut producer);
    let at = started.elapsed();
    let end = consumer.wait(deadline + SOON).expect("it ends");
    let t = end.outcome.times;
    println!(
        "hurt at {at:?}: decided {:?}, ended {:?}, {} of 256 loaded, {:?}",
        t.decided.unwrap(),
        t.ended.unwrap(),
        end.outcome.loaded(),
        end.outcome.cause()
    );
    assert!(t.decided.unwrap() <= deadline + SLACK);
    assert!(t.ended.unwrap() >= t.decided.unwrap());
    assert!(end.outcome.lanes.iter().all(|l| *l == LaneKind::Verbs), "{:?}", end.outcome.lanes);
    assert!(end.outcome.loaded() >= 256 / 4, "what was there stays there");
    assert_eq!(assert_loaded_is_exact(&end, &consumer, &spec, producer.seed), end.outcome.loaded());
    // What is said to be quiet stays as it is, whatever still goes on below.
    heal(&mut producer);
    all_up();
    assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
    // The next pull, by the same consumer, from a healthy peer.
    let mut other = Producer::start(&spec);
    let offer = other.offer_all();
    consumer.pull(pull_all(&offer, LaneKind::Verbs, SOON)).unwrap();
    let next = ended(&consumer);
    assert!(next.outcome.complete(), "the next pull: {:?}", next.outcome.cause());
    assert_loaded_is_exact(&next, &consumer, &spec, other.seed);
    drop(consumer);
    producer.kill();
    other.kill();
    settled(before);
    (end, at)
}

const DEADLINE: Duration = Duration::from_secs(8);

#[test]
fn a_killed_peer() {
    if wires(1) {
        let (end, _) = broken(DEADLINE, 1, |p| p.kill(), |_| ());
        assert!(end.outcome.invalid() > 0);
    }
}

#[test]
fn a_stopped_peer_is_read_on_and_its_data_stays_valid_while_the_fence_holds() {
    if wires(1) {
        let (end, _) = broken(DEADLINE, 1, |p| p.signal(Signal::STOP), |p| p.signal(Signal::CONT));
        assert!(end.outcome.complete(), "{:?}", end.outcome.cause());
    }
}

#[test]
fn the_own_link_down_and_up_again() {
    if wires(1) {
        let (end, _) = broken(DEADLINE, 1, |_| ip("link set a1 down"), |_| ip("link set a1 up"));
        assert!(end.outcome.invalid() > 0);
    }
}

#[test]
fn the_peers_link_down_and_up_again() {
    if wires(1) {
        let (end, _) = broken(DEADLINE, 1, |_| ip("link set b1 down"), |_| ip("link set b1 up"));
        assert!(end.outcome.invalid() > 0);
    }
}

#[test]
fn every_packet_lost() {
    if wires(1) {
        let hurt = |_: &mut Producer| tc("qdisc add dev a1 root netem loss 100%");
        let (end, _) = broken(DEADLINE, 1, hurt, |_| tc("qdisc del dev a1 root"));
        assert!(end.outcome.invalid() > 0);
    }
}

#[test]
fn a_blip_that_swallows_completions() {
    if wires(1) {
        let blip = |_: &mut Producer| {
            ip("link set b1 down");
            std::thread::sleep(Duration::from_millis(300));
            ip("link set b1 up");
        };
        let (end, _) = broken(Duration::from_secs(15), 1, blip, |_| ());
        assert!(end.outcome.complete(), "there was time to try again: {:?}", end.outcome.cause());
    }
}

/// soft-RoCE takes a device away only once nobody has it open any more, and says nothing to those who have: the removal
/// waits for them. So the pull goes on, and what is to be seen is that a consumer that goes lets go of the device.
#[test]
fn the_own_device_removed_in_the_middle_of_a_pull_is_let_go_of() {
    if !wires(2) {
        return;
    }
    all_up();
    let before = objects();
    let spec = spec(1, 256, 1, 64 << 10);
    let (mut producer, consumer) = ends(1, &spec, Some("8M"));
    let offer = producer.offer_all();
    let pull = consumer.pull(pull_all(&offer, LaneKind::Verbs, DEADLINE)).unwrap();
    wait_until_loaded(&consumer, pull, 0.3);
    let mut removal = Command::new("rdma").args(["link", "del", "rxa1"]).spawn().unwrap();
    let end = consumer.wait(DEADLINE + SOON).expect("it ends");
    assert!(end.outcome.times.decided.unwrap() <= DEADLINE + SLACK);
    assert_eq!(assert_loaded_is_exact(&end, &consumer, &spec, producer.seed), end.outcome.loaded());
    drop(consumer);
    let until = Instant::now() + SOON;
    while removal.try_wait().unwrap().is_none() {
        assert!(Instant::now() < until, "the device is still held: {:?}", objects());
        std::thread::yield_now();
    }
    run("rdma", "link add rxa1 type rxe netdev a1");
    all_up();
    let consumer = crate::rig::consumer(&spec, config(1, None));
    let offer = producer.offer_all();
    consumer.pull(pull_all(&offer, LaneKind::Verbs, SOON)).unwrap();
    let next = ended(&consumer);
    assert!(next.outcome.complete(), "the next pull: {:?}", next.outcome.cause());
    assert_loaded_is_exact(&next, &consumer, &spec, producer.seed);
    drop(consumer);
    producer.kill();
    settled(before);
}

#[test]
fn an_offer_that_is_revoked_in_the_middle_is_fresh_or_invalid() {
    if !wires(1) {
        return;
    }
    let spec = spec(1, 256, 1, 64 << 10);
    let (mut producer, consumer) = ends(1, &spec, Some("8M"));
    for _ in 0..3 {
        let offer = producer.offer_all();
        let pull = consumer.pull(pull_all(&offer, LaneKind::Verbs, SOON)).unwrap();
        wait_until_loaded(&consumer, pull, 0.2);
        // Its blocks are overwritten at once.
        producer.say(&Say::Revoke(offer.id));
        let end = ended(&consumer);
        assert!(matches!(end.outcome.cause(), Some(Cause::Stale | Cause::Revoked)), "{:?}", end.outcome.cause());
        // The pattern of what was loaded is the one from before.
        assert_eq!(assert_loaded_is_exact(&end, &consumer, &spec, producer.seed), end.outcome.loaded());
        drop(producer);
        producer = Producer::start(&spec);
    }
}

/// Two seconds are the bound; an emulated machine on a loaded host gets two more.
fn done_soon(what: &str, took: Duration) {
    println!("failed over and done {took:?} after the {what}");
    assert!(took < Duration::from_secs(4), "{took:?} after the {what}");
}

#[test]
fn one_of_two_rails_cut_costs_nothing_but_time() {
    if wires(2) {
        let long = Duration::from_secs(30);
        let (end, at) = broken_at(0.5, long, 2, |_| ip("link set a1 down"), |_| ip("link set a1 up"));
        assert!(end.outcome.complete(), "{:?}", end.outcome.cause());
        done_soon("cut", end.outcome.times.data.unwrap() - at);
        let hurt = |_: &mut Producer| tc("qdisc add dev b2 root netem loss 100%");
        let (end, at) = broken_at(0.5, long, 2, hurt, |_| tc("qdisc del dev b2 root"));
        assert!(end.outcome.complete(), "{:?}", end.outcome.cause());
        done_soon("loss", end.outcome.times.data.unwrap() - at);
    }
}

/// Pulls everything, and says how many bytes came in over each of the near ends meanwhile.
fn pull_over(consumer: &kvferry::consumer::Consumer, producer: &mut Producer) -> [u64; 2] {
    let before = ["a1", "a2"].map(came_in);
    let offer = producer.offer_all();
    consumer.pull(pull_all(&offer, LaneKind::Verbs, SOON)).unwrap();
    let end = ended(consumer);
    assert!(end.outcome.complete(), "{:?}", end.outcome.cause());
    let after = ["a1", "a2"].map(came_in);
    [after[0] - before[0], after[1] - before[1]]
}

#[test]
fn a_rail_that_was_lost_is_read_over_again_once_it_works() {
    if !wires(2) {
        return;
    }
    all_up();
    let before = objects();
    let spec = spec(2, 64, 1, 64 << 10);
    let (mut producer, consumer) = ends(2, &spec, None);
    let share = u64::from(spec.blocks) * spec.block_bytes() / 5;
    // One end of each side: the reader hears of its own links at once, and of the peer's by what fails.
    for (end, wire) in [("a1", 0), ("b2", 1)] {
        let over = pull_over(&consumer, &mut producer);
        assert!(over.iter().all(|n| *n > share), "both rails are read over: {over:?}");
        ip(&format!("link set {end} down"));
        let over = pull_over(&consumer, &mut producer);
        assert!(over[wire] < share, "{end} is down: {over:?}");
        ip(&format!("link set {end} up"));
        all_up();
        let up = Instant::now();
        let mut pulls = 0;
        while pull_over(&consumer, &mut producer)[wire] <= share {
            pulls += 1;
            assert!(up.elapsed() < SOON, "{end} is not read over again");
        }
        println!("{end} is read over again after {:?} and {pulls} pulls", up.elapsed());
    }
    drop(consumer);
    producer.kill();
    settled(before);
}

#[test]
fn a_producer_whose_port_is_down_at_its_start_serves_it_once_it_is_up() {
    if !wires(1) {
        return;
    }
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

#[test]
fn both_rails_cut_leave_the_prefix() {
    if wires(2) {
        let cut = |_: &mut Producer| {
            ip("link set a1 down");
            ip("link set b2 down");
        };
        let mend = |_: &mut Producer| {
            ip("link set a1 up");
            ip("link set b2 up");
        };
        let (end, _) = broken(DEADLINE, 2, cut, mend);
        let g = &end.outcome.groups[0];
        // Blocks are read in the order of the prompt: what a scheduler can use is not much less than what is there.
        let prefix = (0..256).take_while(|b| g.loaded.contains(*b)).count() as u64;
        println!("a prefix of {prefix}, of {} loaded", end.outcome.loaded());
        assert!(end.outcome.invalid() > 0 && prefix >= end.outcome.loaded() / 2, "{:?}", g.loaded);
    }
}

#[test]
fn a_peer_that_fails_leaves_other_peers_pulls_alone() {
    if !wires(1) {
        return;
    }
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
fn a_peer_that_fails_leaves_the_same_consumers_pull_from_another_one_alone() {
    if !wires(1) {
        return;
    }
    let spec = spec(1, 128, 1, 64 << 10);
    let (mut one, mut two) = (Producer::start(&spec), Producer::start(&spec));
    let consumer = consumer(&spec, config(1, Some("4M")));
    let offers = [one.offer_all(), two.offer_all()];
    // Each into its own half.
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
    let of = |pull| ends.iter().find(|e| e.pull == pull).expect("each ends once");
    assert!(!of(bad).outcome.complete());
    let outcome = &of(good).outcome;
    assert!(outcome.complete() && outcome.retries == 0, "{:?}, {} retries", outcome.cause(), outcome.retries);
    assert_loaded_is_exact(of(good), &consumer, &spec, two.seed);
}
