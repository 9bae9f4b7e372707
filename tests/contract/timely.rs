//! Every pull decides by its deadline, whatever the network does.

use std::time::{Duration, Instant};

use kvferry::{Cause, Config, LaneKind};
use kvferry_testkit::rig::{
    Producer, SOON, Spec, assert_loaded_is_exact, consumer, deadline, ended, killable, pull_all, really, throttled,
    wait_until_loaded,
};
use rustix::process::Signal;

/// A loaded machine may be this late.
const SLACK: Duration = Duration::from_millis(250);

#[test]
fn a_pull_from_a_killed_producer_decides_within_100_ms_and_keeps_the_prefix() {
    for lane in [LaneKind::Tcp, LaneKind::Local] {
        let spec = Spec { blocks: 512, ..Spec::default() };
        let mut producer = Producer::start(&spec);
        let consumer = consumer(&spec, killable());
        let offer = producer.offer_all();
        let started = Instant::now();
        let pull = consumer.pull(pull_all(&offer, lane, SOON)).unwrap();
        wait_until_loaded(&consumer, pull, 0.5);
        producer.signal(Signal::KILL);
        let killed = started.elapsed();
        let end = ended(&consumer);
        let decided = end.outcome.times.decided.unwrap();
        assert!(
            decided <= killed + Duration::from_millis(100) + SLACK,
            "{lane}: killed at {killed:?}, decided at {decided:?}"
        );
        let g = &end.outcome.groups[0];
        // With several queue pairs a chunk may arrive before its predecessor.
        let gaps = if really(lane) == LaneKind::Verbs { 2 } else { 0 };
        assert!(g.loaded.ranges().len() <= 1 + gaps, "{lane}: a prefix: {:?}", g.loaded);
        let [first, last] = g.loaded.ranges()[0];
        assert!(first == 0 && last >= 229, "{lane}: {:?}", g.loaded);
        assert_eq!(g.loaded.len() + g.invalid.len(), 512);
        assert_eq!(assert_loaded_is_exact(&end, &consumer, &spec, producer.seed), g.loaded.len());
        let cause = end.outcome.cause();
        assert!(matches!(cause, Some(Cause::PeerDown | Cause::Unreachable | Cause::LaneFailed)), "{lane}: {cause:?}");
    }
}

#[test]
fn a_pull_from_a_stopped_producer_decides_by_the_deadline() {
    let spec = Spec { blocks: 512, ..Spec::default() };
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, throttled("throttle=64M"));
    let offer = producer.offer_all();
    let deadline = deadline(LaneKind::Tcp, Duration::from_secs(2));
    let pull = consumer.pull(pull_all(&offer, LaneKind::Tcp, deadline)).unwrap();
    wait_until_loaded(&consumer, pull, 0.3);
    producer.signal(Signal::STOP);
    let end = ended(&consumer);
    producer.signal(Signal::CONT);
    assert!(end.outcome.times.decided.unwrap() <= deadline + SLACK, "{:?}", end.outcome.times);
    // Over verbs the device still serves the memory of a stopped process, so the pull may complete.
    if really(LaneKind::Tcp) != LaneKind::Verbs || !end.outcome.complete() {
        assert_eq!(end.outcome.cause(), Some(Cause::Deadline));
    }
    assert!(end.outcome.loaded() >= 512 * 3 / 10 - 16, "the blocks that arrived are kept: {:?}", end.outcome);
    assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
}

#[test]
fn a_pull_from_a_producer_that_stops_before_the_handshake_decides_by_the_deadline() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, Config::default());
    let offer = producer.offer_all();
    producer.signal(Signal::STOP);
    let deadline = Duration::from_millis(700);
    consumer.pull(pull_all(&offer, LaneKind::Tcp, deadline)).unwrap();
    let end = ended(&consumer);
    producer.signal(Signal::CONT);
    assert!(end.outcome.times.decided.unwrap() <= deadline + SLACK);
    assert_eq!((end.outcome.loaded(), end.outcome.cause()), (0, Some(Cause::Deadline)));
}

#[test]
fn a_deadline_shorter_than_the_transfer_keeps_the_blocks_that_arrived() {
    for lane in [LaneKind::Tcp, LaneKind::Local] {
        let spec = Spec { blocks: 512, ..Spec::default() };
        let mut producer = Producer::start(&spec);
        let verbs = really(lane) == LaneKind::Verbs;
        let consumer = consumer(&spec, throttled(if verbs { "throttle=8M" } else { "throttle=32M" }));
        let offer = producer.offer_all();
        // 32 MiB take a second at this throttle (four over verbs), so only a part arrives.
        let deadline = deadline(lane, Duration::from_millis(600));
        consumer.pull(pull_all(&offer, lane, deadline)).unwrap();
        let end = ended(&consumer);
        assert!(end.outcome.times.decided.unwrap() <= deadline + SLACK, "{lane}: {:?}", end.outcome.times);
        assert!(end.outcome.loaded() > 0 && end.outcome.invalid() > 0, "{lane}: {:?}", end.outcome);
        assert_eq!(end.outcome.cause(), Some(Cause::Deadline));
        assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
    }
}

#[test]
fn a_pull_over_a_lane_that_never_reports_decides_by_the_deadline() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, throttled("silent@4M"));
    let offer = producer.offer_all();
    let deadline = Duration::from_millis(800);
    consumer.pull(pull_all(&offer, LaneKind::Tcp, deadline)).unwrap();
    let end = ended(&consumer);
    assert!(end.outcome.times.decided.unwrap() <= deadline + SLACK);
    assert_eq!(end.outcome.cause(), Some(Cause::Deadline));
    assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
}
