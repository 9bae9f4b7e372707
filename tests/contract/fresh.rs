//! Bytes that were read under an expired, revoked or reused offer, or from an earlier incarnation of the peer, are never
//! loaded.

use std::time::Duration;

use kvferry::{Cause, Config, LaneKind};
use kvferry_testkit::rig::{
    Producer, SOON, Say, Spec, assert_loaded_is_exact, consumer, ended, pull_all, throttled, wait_until_loaded,
};

#[test]
fn an_offer_revoked_in_mid_read_with_its_blocks_reused_at_once_loads_nothing_stale() {
    for (lane, engine_memory) in [(LaneKind::Tcp, false), (LaneKind::Local, false), (LaneKind::Local, true)] {
        let spec = Spec { engine_memory, ..Spec::default() };
        let mut producer = Producer::start(&spec);
        let consumer = consumer(&spec, throttled("throttle=32M"));
        let offer = producer.offer_all();
        let pull = consumer.pull(pull_all(&offer, lane, SOON)).unwrap();
        wait_until_loaded(&consumer, pull, 0.3);
        producer.say(&Say::Revoke(offer.id));
        let end = ended(&consumer);
        assert!(end.outcome.loaded() > 0 && end.outcome.invalid() > 0, "{lane}: {:?}", end.outcome);
        assert!(
            matches!(end.outcome.cause(), Some(Cause::Revoked | Cause::Stale)),
            "{lane}: {:?}",
            end.outcome.cause()
        );
        assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
        assert_eq!(producer.freed(offer.id).0, "Revoked");
    }
}

#[test]
fn a_lease_that_expires_in_mid_read_with_its_blocks_reused_at_once_loads_nothing_stale() {
    for lane in [LaneKind::Tcp, LaneKind::Local] {
        // The hard cap ends the offer although its claim is renewed.
        let spec = Spec { claimed_ms: 1000, hard_cap_ms: 1000, ..Spec::default() };
        let mut producer = Producer::start(&spec);
        producer.say(&Say::ReuseAtOnce);
        let consumer = consumer(&spec, throttled("throttle=8M"));
        let offer = producer.offer_all();
        consumer.pull(pull_all(&offer, lane, SOON)).unwrap();
        let end = ended(&consumer);
        assert!(end.outcome.invalid() > 0, "{lane}: {:?}", end.outcome);
        assert!(
            matches!(end.outcome.cause(), Some(Cause::Expired | Cause::Stale)),
            "{lane}: {:?}",
            end.outcome.cause()
        );
        assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
        assert_eq!(producer.freed(offer.id).0, "HardCap");
    }
}

#[test]
fn an_offer_of_an_earlier_incarnation_is_never_read() {
    let spec = Spec::default();
    let mut first = Producer::start(&spec);
    let old = first.offer_all();
    let listen = first.addr.clone();
    first.kill();
    let mut second = Producer::start(&Spec { listen, ..spec.clone() });
    assert_ne!(first.incarnation, second.incarnation);
    let consumer = consumer(&spec, Config::default());
    consumer.pull(pull_all(&old, LaneKind::Tcp, SOON)).unwrap();
    let end = ended(&consumer);
    assert_eq!((end.outcome.loaded(), end.outcome.cause()), (0, Some(Cause::PeerRestarted)));
    // Offers of the new incarnation are valid.
    let new = second.offer_all();
    consumer.pull(pull_all(&new, LaneKind::Tcp, SOON)).unwrap();
    let end = ended(&consumer);
    assert!(end.outcome.complete(), "{:?}", end.outcome);
    assert_loaded_is_exact(&end, &consumer, &spec, second.seed);
}

#[test]
fn a_chunk_whose_fence_reads_another_word_is_not_loaded() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    for lane in [LaneKind::Tcp, LaneKind::Local] {
        let consumer = consumer(&spec, throttled("stale@0"));
        let offer = producer.offer_all();
        consumer.pull(pull_all(&offer, lane, Duration::from_secs(10))).unwrap();
        let end = ended(&consumer);
        assert_eq!((end.outcome.loaded(), end.outcome.cause()), (0, Some(Cause::Stale)), "{lane}");
    }
}
