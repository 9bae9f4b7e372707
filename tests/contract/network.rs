//! The same promises over a wire that is cut, slow or lossy. The producer is at its far end.

use std::time::Duration;

use kvferry::{Cause, Config, LaneKind};
use kvferry_testkit::{
    rig::{Producer, SOON, Spec, assert_loaded_is_exact, consumer, ended, pull_all, throttled, wait_until_loaded},
    wire::{Conditions, Counts, Direction, Wire},
};

fn wire() -> Wire {
    Wire::new(0x6B76).expect("a wire")
}

/// A producer process at the far end.
fn producer(wire: &Wire, spec: &Spec) -> Producer {
    let listen = format!("{}:0", wire.far());
    wire.at_far(|| Producer::start(&Spec { listen, ..spec.clone() }))
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn a_pull_over_a_link_that_is_cut_decides_by_the_deadline_and_the_link_heals_without_a_restart() {
    let wire = wire();
    let spec = Spec { blocks: 512, ..Spec::default() };
    let mut producer = producer(&wire, &spec);
    let consumer = consumer(&spec, throttled("throttle=64M"));
    let offer = producer.offer_all();
    let deadline = Duration::from_secs(2);
    let pull = consumer.pull(pull_all(&offer, LaneKind::Tcp, deadline)).unwrap();
    wait_until_loaded(&consumer, pull, 0.4);
    wire.cut();
    let end = ended(&consumer);
    assert!(end.outcome.times.decided.unwrap() <= deadline + Duration::from_millis(250), "{:?}", end.outcome.times);
    assert_eq!(end.outcome.cause(), Some(Cause::Deadline));
    assert!(end.outcome.loaded() >= 512 * 4 / 10 - 16, "the blocks that arrived are kept: {:?}", end.outcome);
    assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
    wire.mend();
    // Both processes live on: the session returns, the release arrives, and the next pull is complete.
    assert_eq!(producer.freed(offer.id).0, "Released");
    let offer = producer.offer_all();
    consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    let end = ended(&consumer);
    assert!(end.outcome.complete(), "{:?}", end.outcome);
    assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn a_pull_from_a_peer_behind_a_cut_link_decides_by_the_deadline() {
    let wire = wire();
    let spec = Spec::default();
    let mut producer = producer(&wire, &spec);
    let consumer = consumer(&spec, Config::default());
    let offer = producer.offer_all();
    wire.cut();
    let deadline = Duration::from_millis(700);
    consumer.pull(pull_all(&offer, LaneKind::Tcp, deadline)).unwrap();
    let end = ended(&consumer);
    assert!(end.outcome.times.decided.unwrap() <= deadline + Duration::from_millis(250));
    assert_eq!((end.outcome.loaded(), end.outcome.cause()), (0, Some(Cause::Deadline)));
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn a_lossy_and_slow_link_is_byte_exact() {
    let delay = Duration::from_millis(2);
    let data = exact_under(Conditions { loss: 0.01, delay, jitter: delay / 2, reorder: 0.01, ..Conditions::default() });
    assert!(data.lost > 0 && data.reordered > 0, "{data:?}");
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn a_link_that_reorders_and_duplicates_is_byte_exact() {
    let data = exact_under(Conditions { reorder: 0.05, duplicate: 0.01, ..Conditions::default() });
    assert!(data.reordered > 0 && data.duplicated > 0, "{data:?}");
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn words_that_change_places_on_a_link_are_read_again_where_data_is_checksummed() {
    let spec = Spec { checksum: true, ..Spec::default() };
    // 4 MiB are about 3,000 packets in 16 chunks.
    let data = exact_with(&spec, Conditions { swap: 0.001, ..Conditions::default() });
    assert!(data.swapped > 0, "{data:?}");
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn a_link_that_changes_every_packet_ends_the_pull_as_corrupt_and_loads_nothing_wrong() {
    let wire = wire();
    let spec = Spec { blocks: 64, checksum: true, ..Spec::default() };
    let mut producer = producer(&wire, &spec);
    let consumer = consumer(&spec, Config::default());
    let offer = producer.offer_all();
    wire.set_one(Direction::ToNear, Conditions { swap: 1.0, ..Conditions::default() });
    consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    let end = ended(&consumer);
    assert_eq!(end.outcome.cause(), Some(Cause::Corrupt), "{:?}", end.outcome);
    assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
    wire.set(Conditions::default());
    let offer = producer.offer_all();
    consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    let end = ended(&consumer);
    assert!(end.outcome.complete(), "{:?}", end.outcome);
    assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
}

/// Checks three pulls of all blocks over a wire with these conditions. Returns the counts of the data's direction.
fn exact_under(conditions: Conditions) -> Counts {
    exact_with(&Spec::default(), conditions)
}

fn exact_with(spec: &Spec, conditions: Conditions) -> Counts {
    let wire = wire();
    wire.set(conditions);
    // 4 MiB: with cubic congestion control, the lossy wire carries 2.6 MB/s.
    let spec = Spec { blocks: 64, ..spec.clone() };
    let mut producer = producer(&wire, &spec);
    let consumer = consumer(&spec, Config::default());
    for _ in 0..3 {
        let offer = producer.offer_all();
        consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
        let end = ended(&consumer);
        assert!(end.outcome.complete(), "{:?}", end.outcome);
        assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
        assert_eq!(producer.freed(offer.id).0, "Released");
    }
    wire.counts(Direction::ToNear)
}
