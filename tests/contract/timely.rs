//! Every pull decides by its deadline, whatever the network does.

use std::time::{Duration, Instant};

use kvferry::{Cause, Config, LaneKind};
use kvferry_testkit::rig::{
    Heard, Producer, SOON, Say, Spec, assert_loaded_is_exact, consumer, deadline, ended, killable, pull_all, really,
    throttled, wait_until_loaded,
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

/// From the stop of a peer that owes an answer to the decision, at most.
const PATIENCE: Duration = Duration::from_secs(3);

#[test]
fn a_producer_that_stops_before_the_grant_costs_no_more_than_patience() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, Config::default());
    let (first, second) = (producer.offer_all(), producer.offer_all());
    consumer.pull(pull_all(&first, LaneKind::Tcp, SOON)).unwrap();
    assert!(ended(&consumer).outcome.complete(), "the session is up");
    producer.signal(Signal::STOP);
    consumer.pull(pull_all(&second, LaneKind::Tcp, SOON)).unwrap();
    let end = ended(&consumer);
    producer.signal(Signal::CONT);
    assert!(end.outcome.times.decided.unwrap() <= PATIENCE, "{:?}", end.outcome.times);
    assert_eq!((end.outcome.loaded(), end.outcome.cause()), (0, Some(Cause::PeerDown)));
    // It lives on, and serves the next pull.
    assert_eq!(producer.freed(second.id).0, "Released");
    let third = producer.offer_all();
    consumer.pull(pull_all(&third, LaneKind::Tcp, SOON)).unwrap();
    let end = ended(&consumer);
    assert!(end.outcome.complete(), "{:?}", end.outcome);
    assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
}

#[test]
fn a_producer_that_stops_while_a_claim_waits_costs_no_more_than_patience() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, Config::default());
    producer.say(&Say::Offer { blocks: vec![1, 2, 3], ready: false });
    let offer = producer.offered().unwrap();
    consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    let began = Instant::now();
    // Until then it is answered that its blocks are not filled.
    assert!(producer.silent_for(PATIENCE, |h| matches!(h, Heard::Freed { .. })));
    assert!(consumer.poll().is_none(), "a peer that answers is waited for");
    let stopped = began.elapsed();
    producer.signal(Signal::STOP);
    let end = ended(&consumer);
    producer.signal(Signal::CONT);
    let decided = end.outcome.times.decided.unwrap();
    assert!(decided <= stopped + PATIENCE + SLACK, "stopped at {stopped:?}, decided at {decided:?}");
    assert_eq!(end.outcome.cause(), Some(Cause::PeerDown));
}

#[test]
fn a_producer_that_stops_before_the_handshake_costs_no_more_than_patience() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, Config::default());
    let offer = producer.offer_all();
    producer.signal(Signal::STOP);
    consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    let end = ended(&consumer);
    producer.signal(Signal::CONT);
    assert!(end.outcome.times.decided.unwrap() <= PATIENCE, "{:?}", end.outcome.times);
    assert_eq!((end.outcome.cause(), end.outcome.loaded()), (Some(Cause::Unreachable), 0));
}

#[test]
fn a_producer_that_stops_in_mid_pull_costs_its_patience_unless_data_still_moves() {
    let spec = Spec { blocks: 512, ..Spec::default() };
    // 32 MiB take four seconds: twice the patience.
    let mut pools = vec![];
    if really(LaneKind::Local) == LaneKind::Local {
        pools.push((LaneKind::Local, true));
    }
    if really(LaneKind::Tcp) == LaneKind::Tcp {
        pools.push((LaneKind::Tcp, false));
    }
    for (lane, moves) in pools {
        let mut producer = Producer::start(&spec);
        let consumer = consumer(&spec, throttled("throttle=8M"));
        let offer = producer.offer_all();
        let began = Instant::now();
        let pull = consumer.pull(pull_all(&offer, lane, SOON)).unwrap();
        wait_until_loaded(&consumer, pull, 0.1);
        let stopped = began.elapsed();
        producer.signal(Signal::STOP);
        let end = ended(&consumer);
        producer.signal(Signal::CONT);
        assert_eq!(end.outcome.complete(), moves, "{lane}: {:?}", end.outcome);
        if !moves {
            // The next heartbeat, the silence, and a second look.
            let decided = end.outcome.times.decided.unwrap();
            assert!(decided <= stopped + PATIENCE + SLACK, "stopped at {stopped:?}, decided at {decided:?}");
            assert_eq!(end.outcome.cause(), Some(Cause::PeerDown));
            assert!(end.outcome.loaded() > 0, "the blocks that arrived are kept");
        }
        assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
    }
}

#[test]
fn a_long_patience_waits_for_a_producer_that_pauses() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let mut config = Config::default();
    config.pull.patience = SOON;
    let consumer = consumer(&spec, config);
    let (first, second) = (producer.offer_all(), producer.offer_all());
    consumer.pull(pull_all(&first, LaneKind::Tcp, SOON)).unwrap();
    ended(&consumer);
    producer.signal(Signal::STOP);
    consumer.pull(pull_all(&second, LaneKind::Tcp, SOON)).unwrap();
    assert!(consumer.wait(PATIENCE).is_err());
    producer.signal(Signal::CONT);
    assert!(ended(&consumer).outcome.complete());
}
