//! An offer that grows is pulled while its prefill runs, and holds every promise meanwhile.

use std::time::{Duration, Instant};

use kvferry::{Cause, Config, Consumer, LaneKind, Offer, OfferId, Pull, PullId, Token};
use kvferry_testkit::rig::{
    Producer, SOON, Say, Spec, all_of, assert_loaded_is_exact, consumer, deadline, ended, pull_all, really, throttled,
};
use rustix::process::Signal;

use crate::proxy::Proxy;

const BLOCKS: u32 = 64;

fn spec() -> Spec {
    Spec { blocks: 256, ..Spec::default() }
}

fn blocks() -> Vec<u32> {
    (0..BLOCKS).map(|i| i * 7 % BLOCKS).collect()
}

/// Waits until the pull has loaded this many blocks from the prompt's start.
fn wait_for_prefix(consumer: &Consumer, pull: PullId, blocks: u64) {
    let until = Instant::now() + SOON;
    loop {
        let prefix = consumer.loaded_prefix(pull).unwrap_or_else(|| panic!("it ended: {:?}", ended(consumer).outcome));
        assert!(prefix <= blocks * 16, "{prefix} tokens are loaded, and {} are computed", blocks * 16);
        if prefix == blocks * 16 {
            return;
        }
        assert!(Instant::now() < until, "{prefix} tokens of {} after {SOON:?}", blocks * 16);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A pull of an open offer of which half is computed and loaded.
fn half_loaded(producer: &mut Producer, consumer: &Consumer, lane: LaneKind) -> (Offer, PullId) {
    let offer = producer.open(&blocks());
    let pull = consumer.pull(pull_all(&offer, lane, SOON)).unwrap();
    producer.grow(offer.id, 32);
    wait_for_prefix(consumer, pull, 32);
    (offer, pull)
}

fn assert_half_is_loaded(producer: &Producer, consumer: &Consumer, cause: Cause) {
    let end = ended(consumer);
    assert_eq!((end.outcome.loaded(), end.outcome.invalid()), (32, 32), "{:?}", end.outcome);
    assert_eq!(end.outcome.cause(), Some(cause));
    assert_eq!(assert_loaded_is_exact(&end, consumer, &producer.spec, producer.seed), 32);
}

#[test]
fn blocks_are_loaded_as_they_are_computed_over_each_lane() {
    for lane in [LaneKind::Local, LaneKind::Tcp] {
        let spec = spec();
        let mut producer = Producer::start(&spec);
        let consumer = consumer(&spec, Config::default());
        let offer = producer.open(&blocks());
        let pull = consumer.pull(pull_all(&offer, lane, SOON)).unwrap();
        for computed in [5, 6, 30, 62] {
            producer.grow(offer.id, computed);
            // Chunks that are too small wait for the next ones: at most a sixteenth of the pull.
            let until = Instant::now() + SOON;
            while consumer.loaded_prefix(pull).expect("it runs") + 4 * 16 < computed as u64 * 16 {
                assert!(Instant::now() < until, "{:?} of {computed} blocks", consumer.progress(pull));
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        producer.say(&Say::Finish(offer.id));
        let end = ended(&consumer);
        assert!(end.outcome.complete(), "{lane}: {:?}", end.outcome);
        assert_eq!(end.outcome.retries, 0);
        assert_eq!(end.outcome.lanes, [really(lane)], "one attempt reads all of it");
        assert_eq!(assert_loaded_is_exact(&end, &consumer, &spec, producer.seed), u64::from(BLOCKS));
        assert_eq!(producer.freed(offer.id).0, "Released");
    }
}

#[test]
fn a_prefill_that_dies_leaves_what_was_computed() {
    for lane in [LaneKind::Local, LaneKind::Tcp] {
        let mut producer = Producer::start(&spec());
        let consumer = consumer(&spec(), Config::default());
        half_loaded(&mut producer, &consumer, lane);
        producer.kill();
        assert_half_is_loaded(&producer, &consumer, Cause::PeerDown);
    }
}

#[test]
fn a_revoked_prefill_leaves_what_was_computed_and_its_blocks_are_reused_at_once() {
    for lane in [LaneKind::Local, LaneKind::Tcp] {
        let mut producer = Producer::start(&spec());
        let consumer = consumer(&spec(), Config::default());
        let (offer, _) = half_loaded(&mut producer, &consumer, lane);
        producer.say(&Say::Revoke(offer.id));
        assert_half_is_loaded(&producer, &consumer, Cause::Revoked);
        assert_eq!(producer.freed(offer.id).0, "Revoked");
        // A growth of an offer that has ended changes nothing.
        producer.grow(offer.id, 48);
        assert_eq!(producer.count().0, 0);
    }
}

#[test]
fn a_prefill_that_does_not_go_on_ends_the_pull_as_stalled() {
    let mut producer = Producer::start(&spec());
    let mut config = Config::default();
    config.pull.stalled = Duration::from_millis(300);
    let consumer = consumer(&spec(), config);
    let (offer, _) = half_loaded(&mut producer, &consumer, LaneKind::Tcp);
    assert_half_is_loaded(&producer, &consumer, Cause::Stalled);
    // The consumer has released it: the prefill hears that nothing reads it.
    assert_eq!(producer.freed(offer.id).0, "Released");
}

#[test]
fn a_stopped_prefill_ends_the_pull_long_before_it_counts_as_stalled() {
    let mut producer = Producer::start(&spec());
    let mut config = Config::default();
    config.pull.stalled = Duration::from_secs(600);
    let consumer = consumer(&spec(), config);
    half_loaded(&mut producer, &consumer, LaneKind::Tcp);
    producer.signal(Signal::STOP);
    assert_half_is_loaded(&producer, &consumer, Cause::PeerDown);
}

/// A name like that of an open offer of this producer, which has not entered it.
fn minted(producer: &mut Producer, transfer: &str) -> Offer {
    let like = producer.open(&[0]);
    producer.say(&Say::Revoke(like.id));
    let mut name =
        Offer::new(OfferId::of_transfer(transfer), like.engine, like.incarnation, like.ranks, u64::from(BLOCKS) * 16);
    name.token = Token::of_transfer(transfer);
    name
}

#[test]
fn a_claim_waits_for_an_offer_that_is_opened_later() {
    let spec = Spec { early_grace_ms: 100, ..spec() };
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, Config::default());
    let name = minted(&mut producer, "transfer-1");
    let positions = kvferry_testkit::rig::local(0..BLOCKS);
    let pull = Pull::new(name.clone(), positions).lanes(vec![really(LaneKind::Tcp)]).deadline(SOON);
    let pull = consumer.pull(pull.awaited()).unwrap();
    // Longer than the grace of a claim that does not wait.
    assert!(consumer.wait(Duration::from_millis(500)).is_err(), "the claim waits");
    producer.say(&Say::Open { name: Some(name.clone()), blocks: blocks(), filled: false });
    producer.offered().unwrap();
    producer.grow(name.id, 16);
    wait_for_prefix(&consumer, pull, 16);
    producer.say(&Say::Finish(name.id));
    let end = ended(&consumer);
    assert!(end.outcome.complete(), "{:?}", end.outcome);
    assert_eq!(assert_loaded_is_exact(&end, &consumer, &spec, producer.seed), u64::from(BLOCKS));
}

#[test]
fn a_claim_waits_no_longer_than_its_bound_and_ends_with_a_revoked_name() {
    let mut producer = Producer::start(&spec());
    let mut config = Config::default();
    config.pull.queued = Duration::from_millis(300);
    let patient = consumer(&spec(), Config::default());
    let consumer = consumer(&spec(), config);
    let name = minted(&mut producer, "transfer-2");
    let pull = || Pull::new(name.clone(), kvferry_testkit::rig::local(0..BLOCKS)).deadline(SOON).awaited();
    consumer.pull(pull()).unwrap();
    let end = ended(&consumer);
    assert_eq!((end.outcome.loaded(), end.outcome.cause()), (0, Some(Cause::Stalled)));
    let name = minted(&mut producer, "transfer-3");
    let pull = Pull::new(name.clone(), kvferry_testkit::rig::local(0..BLOCKS)).deadline(SOON).awaited();
    patient.pull(pull).unwrap();
    producer.say(&Say::Revoke(name.id));
    let end = ended(&patient);
    assert_eq!((end.outcome.loaded(), end.outcome.cause()), (0, Some(Cause::Revoked)));
}

#[test]
fn several_consumers_read_one_offer_while_it_grows() {
    let spec = spec();
    let mut producer = Producer::start(&spec);
    let consumers: Vec<_> = (0..2)
        .map(|i| {
            let spec = Spec { engine: format!("decode-{i}"), ..spec.clone() };
            consumer(&spec, Config::default())
        })
        .collect();
    let offer = producer.open(&blocks());
    let pulls: Vec<_> = consumers.iter().map(|c| c.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap()).collect();
    producer.grow(offer.id, 32);
    for (consumer, pull) in consumers.iter().zip(&pulls) {
        wait_for_prefix(consumer, *pull, 32);
    }
    producer.say(&Say::Finish(offer.id));
    for consumer in &consumers {
        let end = ended(consumer);
        assert!(end.outcome.complete(), "{:?}", end.outcome);
        assert_eq!(assert_loaded_is_exact(&end, consumer, &spec, producer.seed), u64::from(BLOCKS));
    }
    assert_eq!(producer.freed(offer.id).0, "Released");
}

#[test]
fn what_an_offer_has_grown_by_while_its_session_was_broken_is_read_when_it_is_back() {
    let spec = spec();
    let mut producer = Producer::start(&spec);
    let proxy = Proxy::new(&producer.addr);
    let consumer = consumer(&spec, Config::default());
    let mut offer = producer.open(&blocks());
    offer.ranks[0].addr = proxy.addr.clone();
    let pull = consumer.pull(pull_all(&offer, LaneKind::Local, SOON)).unwrap();
    producer.grow(offer.id, 16);
    wait_for_prefix(&consumer, pull, 16);
    proxy.forget();
    producer.grow(offer.id, 32);
    producer.grow(offer.id, 48);
    wait_for_prefix(&consumer, pull, 48);
    producer.say(&Say::Finish(offer.id));
    let end = ended(&consumer);
    assert!(end.outcome.complete(), "{:?}", end.outcome);
    assert_eq!(assert_loaded_is_exact(&end, &consumer, &spec, producer.seed), u64::from(BLOCKS));
}

#[test]
fn a_lane_that_fails_while_the_offer_grows_is_replaced_and_nothing_loaded_is_read_again() {
    let spec = spec();
    let mut producer = Producer::start(&spec);
    let fault = format!("down@{},lanes=1", 20 * spec.block_bytes());
    let consumer = consumer(&spec, throttled(&fault));
    let offer = producer.open(&blocks());
    let pull = consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    for computed in [16, 32, 48] {
        producer.grow(offer.id, computed);
        wait_for_prefix(&consumer, pull, computed as u64);
    }
    producer.say(&Say::Finish(offer.id));
    let end = ended(&consumer);
    assert!(end.outcome.complete(), "{:?}", end.outcome);
    assert_eq!(end.outcome.retries, 1);
    assert_eq!(assert_loaded_is_exact(&end, &consumer, &spec, producer.seed), u64::from(BLOCKS));
}

#[test]
fn a_name_with_another_token_count_loads_nothing_of_an_open_offer() {
    let mut producer = Producer::start(&spec());
    let consumer = consumer(&spec(), Config::default());
    let mut offer = producer.open(&blocks());
    producer.grow(offer.id, 32);
    let wanted = all_of(&offer);
    offer.tokens -= 1;
    consumer.pull(Pull::new(offer, wanted).deadline(deadline(LaneKind::Tcp, SOON))).unwrap();
    let end = ended(&consumer);
    assert_eq!((end.outcome.loaded(), end.outcome.cause()), (0, Some(Cause::BadOffer)));
}
