//! The producer gets its blocks back: released by the consumer, or revoked when the lease ends.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use kvferry::{Cause, Config, LaneKind, Offer, OfferId, Pull};
use kvferry_testkit::rig::{
    Heard, Producer, SOON, Say, Spec, all_of, assert_loaded_is_exact, consumer, ended, local, pull_all, throttled,
    wait_until_loaded,
};

/// The environment variable that makes this binary a consumer.
const CONSUMER: &str = "KVFERRY_TEST_CONSUMER";

/// Does the work of a consumer if this process was started as one: claims an offer, and reads it too slowly to finish.
pub(crate) fn play_consumer() {
    let Ok(text) = std::env::var(CONSUMER) else { return };
    let (spec, offer): (Spec, Offer) = serde_json::from_str(&text).expect("a spec and an offer");
    let consumer = consumer(&spec, throttled("throttle=64K"));
    consumer.pull(pull_all(&offer, LaneKind::Tcp, Duration::from_secs(600))).expect("a pull");
    let _ = consumer.wait(Duration::from_secs(600));
}

#[test]
fn blocks_of_a_killed_consumer_come_back_when_the_lease_ends_and_not_before() {
    let lease = Duration::from_millis(2500);
    let spec = Spec { claimed_ms: lease.as_millis() as u64, ..Spec::default() };
    let mut producer = Producer::start(&spec);
    let offer = producer.offer_all();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "role", "--ignored", "--nocapture", "--test-threads=1"])
        .env(CONSUMER, serde_json::to_string(&(&spec, &offer)).unwrap())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let until = Instant::now() + SOON;
    while producer.count().1 == 0 {
        assert!(Instant::now() < until, "the consumer did not claim the offer");
    }
    // Renewals keep it beyond its first lease.
    let freed = |h: &Heard| matches!(h, Heard::Freed { .. });
    assert!(producer.silent_for(lease + Duration::from_millis(500), freed), "a live consumer's claim expired");
    child.kill().unwrap();
    child.wait().unwrap();
    let killed = Instant::now();
    let (why, _) = producer.freed(offer.id);
    let held = killed.elapsed();
    assert_eq!(why, "Expired");
    // The last renewal was at most a heartbeat (500 ms) before the kill; on a loaded machine it may have been late.
    assert!(held >= lease - Duration::from_millis(1200), "freed {held:?} after the kill, with a lease of {lease:?}");
    assert!(held <= lease + Duration::from_secs(2), "freed {held:?} after the kill, with a lease of {lease:?}");
    assert_eq!(producer.count().0, 0);
}

#[test]
fn an_unclaimed_offer_is_revoked() {
    let spec = Spec { unclaimed_ms: 300, ..Spec::default() };
    let mut producer = Producer::start(&spec);
    let offer = producer.offer_all();
    assert_eq!(producer.freed(offer.id).0, "Expired");
    // A later claim is told the reason.
    let consumer = consumer(&spec, Config::default());
    consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    assert_eq!(ended(&consumer).outcome.cause(), Some(Cause::Expired));
}

#[test]
fn an_offer_released_without_a_pull_comes_back_at_once() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, Config::default());
    let offer = producer.offer_all();
    consumer.release(&offer).unwrap();
    assert_eq!(producer.freed(offer.id).0, "Released");
    consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    assert_eq!(ended(&consumer).outcome.cause(), Some(Cause::Released));
}

#[test]
fn an_offer_that_is_held_outlives_its_lease_and_is_loaded() {
    let (unclaimed, claimed) = (Duration::from_millis(1500), Duration::from_millis(2500));
    let spec =
        Spec { unclaimed_ms: unclaimed.as_millis() as u64, claimed_ms: claimed.as_millis() as u64, ..Spec::default() };
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, Config::default());
    let (pulled, refused) = (producer.offer(&[1, 2]), producer.offer(&[3]));
    consumer.hold(&pulled).unwrap();
    consumer.hold(&refused).unwrap();
    // The request waits in the engine's queue for longer than either lease.
    let freed = |h: &Heard| matches!(h, Heard::Freed { .. });
    assert!(producer.silent_for(unclaimed + claimed, freed), "a held offer expired");
    consumer.pull(pull_all(&pulled, LaneKind::Tcp, SOON)).unwrap();
    let ended = ended(&consumer);
    assert!(ended.outcome.complete(), "{:?}", ended.outcome);
    assert_eq!(producer.freed(pulled.id).0, "Released");
    consumer.release(&refused).unwrap();
    assert_eq!(producer.freed(refused.id).0, "Released");
    assert_eq!(producer.count(), (0, 0, 1), "no claim is left");
}

#[test]
fn an_offer_held_by_a_consumer_that_shuts_down_is_released() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, Config::default());
    let offer = producer.offer_all();
    consumer.hold(&offer).unwrap();
    let until = Instant::now() + SOON;
    while producer.count().1 == 0 {
        assert!(Instant::now() < until, "the consumer did not claim the offer");
    }
    drop(consumer);
    assert_eq!(producer.freed(offer.id).0, "Released");
}

#[test]
fn what_a_mismatched_consumer_refuses_is_freed_long_before_its_lease_ends() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let other = consumer(&Spec { dtype: "bfloat16".into(), ..spec.clone() }, Config::default());
    let offer = producer.offer_all();
    other.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    assert_eq!(ended(&other).outcome.cause(), Some(Cause::Refused));
    assert_eq!(producer.freed(offer.id).0, "Released");
    let unpulled = producer.offer_all();
    other.release(&unpulled).unwrap();
    assert_eq!(producer.freed(unpulled.id).0, "Released");
}

#[test]
fn a_loaded_a_cancelled_and_a_failed_pull_all_release_their_offer() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, throttled("throttle=16M"));
    let (loaded, cancelled, late) = (producer.offer(&[1, 2]), producer.offer_all(), producer.offer_all());
    consumer.pull(pull_all(&loaded, LaneKind::Tcp, SOON)).unwrap();
    assert!(ended(&consumer).outcome.complete());
    let pull = consumer.pull(pull_all(&cancelled, LaneKind::Tcp, SOON)).unwrap();
    consumer.cancel(pull);
    ended(&consumer);
    consumer.pull(pull_all(&late, LaneKind::Tcp, Duration::from_millis(400))).unwrap();
    assert_eq!(ended(&consumer).outcome.cause(), Some(Cause::Deadline));
    for offer in [loaded, cancelled, late] {
        assert_eq!(producer.freed(offer.id).0, "Released");
    }
    assert_eq!(producer.count().0, 0);
}

/// A name whose offer the producer does not have yet, and its id.
fn early_name(producer: &mut Producer, blocks: &[u32]) -> (Offer, OfferId) {
    // A normal name, but with an id that the producer does not know.
    let mut offer = producer.offer(blocks);
    producer.say(&Say::Revoke(offer.id));
    producer.freed(offer.id);
    offer.id = OfferId::random();
    let id = offer.id;
    (offer, id)
}

#[test]
fn a_pull_of_an_offer_that_the_producer_does_not_know_yet_waits_for_it() {
    let spec = Spec::default();
    let mut producer = Producer::start(&Spec { early_grace_ms: 15_000, ..spec.clone() });
    let consumer = consumer(&spec, Config::default());
    // Block 0 was overwritten when the first offer was revoked, so the early name has other blocks.
    let (mut offer, id) = early_name(&mut producer, &[0]);
    offer.tokens = 32;
    consumer.pull(Pull::new(offer.clone(), all_of(&offer)).deadline(SOON)).unwrap();
    let until = Instant::now() + SOON;
    while producer.count().2 == 0 {
        assert!(Instant::now() < until, "no session was opened");
    }
    assert!(consumer.poll().is_none());
    producer.say(&Say::Enter { name: offer.clone(), blocks: vec![5, 6], ready: false });
    producer.offered().unwrap();
    assert!(consumer.poll().is_none(), "its blocks are not filled yet");
    producer.say(&Say::Ready(id));
    let end = ended(&consumer);
    assert!(end.outcome.complete(), "{:?}", end.outcome);
    assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
}

#[test]
fn a_name_without_an_offer_is_unknown_after_the_grace_period() {
    let spec = Spec { early_grace_ms: 300, ..Spec::default() };
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, Config::default());
    let (offer, _) = early_name(&mut producer, &[0]);
    consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    assert_eq!(ended(&consumer).outcome.cause(), Some(Cause::Unknown));
}

#[test]
fn a_numbered_name_that_the_engine_passes_over_is_unknown_at_once_and_a_later_one_is_waited_for() {
    let spec = Spec { early_grace_ms: SOON.as_millis() as u64, ..Spec::default() };
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, Config::default());
    let numbered = |producer: &mut Producer, n| {
        let (mut offer, _) = early_name(producer, &[0]);
        (offer.number, offer.tokens) = (n, 32);
        offer
    };
    let [passed, other, entered, later] = [1, 2, 3, 4].map(|n| numbered(&mut producer, n));
    // The engine's scheduler gave away four names, and the rank enters the third.
    let wanted = |offer: &Offer, first| Pull::new(offer.clone(), local(first..first + 2)).deadline(SOON);
    let early = consumer.pull(wanted(&passed, 0)).unwrap();
    consumer.pull(wanted(&later, 2)).unwrap();
    producer.say(&Say::Enter { name: entered.clone(), blocks: vec![5, 6], ready: true });
    producer.offered().unwrap();
    let began = Instant::now();
    let end = ended(&consumer);
    assert_eq!((end.pull, end.outcome.cause()), (early, Some(Cause::Unknown)));
    // The next pull of such a name does not wait at all.
    let again = consumer.pull(wanted(&other, 4)).unwrap();
    let end = ended(&consumer);
    assert_eq!((end.pull, end.outcome.cause()), (again, Some(Cause::Unknown)));
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    producer.say(&Say::Enter { name: later, blocks: vec![7, 8], ready: true });
    producer.offered().unwrap();
    let end = ended(&consumer);
    assert!(end.outcome.complete(), "{:?}", end.outcome);
    assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
}

#[test]
fn an_offer_with_several_consumers_serves_all_and_is_freed_once() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let (one, two) = (consumer(&spec, Config::default()), consumer(&spec, Config::default()));
    let three = consumer(&spec, Config::default());
    let offer = producer.offer_all();
    // Each claims before the first one releases.
    for c in [&one, &two, &three] {
        c.hold(&offer).unwrap();
    }
    let until = Instant::now() + SOON;
    while producer.count().1 < 3 {
        assert!(Instant::now() < until, "the consumers did not claim the offer");
    }
    three.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    for c in [&one, &two] {
        c.pull(pull_all(&offer, LaneKind::Local, SOON)).unwrap();
        let end = ended(c);
        assert!(end.outcome.complete(), "{:?}", end.outcome);
        assert_loaded_is_exact(&end, c, &spec, producer.seed);
    }
    assert!(ended(&three).outcome.complete());
    assert_eq!(producer.freed(offer.id).0, "Released");
    // The answer comes after everything that the producer said before it.
    producer.count();
    assert!(producer.silent_for(Duration::ZERO, |h| matches!(h, Heard::Freed { .. })), "freed a second time");
}

#[test]
fn a_thousand_sessions_are_held_while_in_use_and_closed_when_idle() {
    // One producer listens on every loopback address. To the consumer each address is another peer.
    let listen = "0.0.0.0:0".into();
    let spec = Spec { listen, blocks: 8, regions: 1, sessions_per_peer: Some(2000), ..Spec::default() };
    let mut producer = Producer::start(&spec);
    let port = producer.addr.rsplit(':').next().unwrap().to_owned();
    let mut config = Config::default();
    config.session.idle = Duration::from_secs(8);
    let consumer = consumer(&spec, config);
    let peers = 1000;
    for i in 0..peers {
        let mut offer = producer.offer(&[i % 8]);
        offer.ranks[0].addr = format!("127.1.{}.{}:{port}", i / 250, i % 250 + 1);
        consumer.pull(Pull::new(offer, local([i % 8])).lanes(vec![LaneKind::Tcp]).deadline(SOON)).unwrap();
        let end = ended(&consumer);
        assert!(end.outcome.complete(), "peer {i}: {:?}", end.outcome);
    }
    let held = producer.count().2;
    assert!(held > 500, "{held} sessions; their peers were in use a few seconds ago");
    let until = Instant::now() + SOON * 2;
    while producer.count().2 > 0 {
        assert!(Instant::now() < until, "{} sessions are still open", producer.count().2);
    }
    // A peer whose session was closed is connected again.
    let offer = producer.offer(&[3]);
    consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    assert!(ended(&consumer).outcome.complete());
}

#[test]
fn a_consumer_that_shuts_down_in_mid_pull_releases_its_offers() {
    let spec = Spec { claimed_ms: 600_000, ..Spec::default() };
    let mut producer = Producer::start(&spec);
    for _ in 0..5 {
        let consumer = consumer(&spec, throttled("throttle=16M"));
        let offer = producer.offer_all();
        let pull = consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
        wait_until_loaded(&consumer, pull, 0.05);
        drop(consumer);
        // Its lease would last ten minutes.
        assert_eq!(producer.freed(offer.id).0, "Released");
    }
}
