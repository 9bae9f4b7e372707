//! The producer's blocks come back: released by the consumer, or revoked at the end of the lease.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use kvferry::{Cause, Config, LaneKind, Offer, OfferId, Pull};
use kvferry_testkit::rig::{
    CONSUMER, Heard, Producer, SOON, Say, Spec, all_of, assert_loaded_is_exact, consumer, ended, outlasting, pull_all,
    throttled, wait_until_loaded,
};

#[test]
fn blocks_of_a_killed_consumer_come_back_at_the_leases_end_and_not_before() {
    let lease = Duration::from_millis(2500);
    let spec = Spec { claimed_ms: lease.as_millis() as u64, ..Spec::default() };
    let mut producer = Producer::start(&spec);
    let offer = producer.offer_all();
    // A consumer in a process of its own, that has claimed and reads slowly.
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "role", "--ignored", "--nocapture", "--test-threads=1"])
        .env(CONSUMER, serde_json::to_string(&(&spec, &offer)).unwrap())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let until = Instant::now() + SOON;
    while producer.count().1 == 0 {
        assert!(Instant::now() < until, "the consumer never claimed");
    }
    // Renewals keep it past its first lease.
    let renewed_until = Instant::now() + lease + Duration::from_millis(500);
    while Instant::now() < renewed_until {
        assert!(producer.silent(|h| matches!(h, Heard::Freed { .. })), "a live consumer's claim ran out");
        std::thread::sleep(Duration::from_millis(50));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let killed = Instant::now();
    let (why, _) = producer.freed(offer.id);
    let held = killed.elapsed();
    assert_eq!(why, "Expired");
    // The last renewal was at most a heartbeat (500 ms) before the kill, and a loaded machine may be late with it.
    assert!(held >= lease - Duration::from_millis(1200), "freed {held:?} after the kill, with a lease of {lease:?}");
    assert!(held <= lease + Duration::from_secs(2), "freed {held:?} after the kill, with a lease of {lease:?}");
    assert_eq!(producer.count().0, 0);
}

#[test]
fn an_offer_that_nobody_comes_for_is_revoked() {
    let spec = Spec { unclaimed_ms: 300, ..Spec::default() };
    let mut producer = Producer::start(&spec);
    let offer = producer.offer_all();
    assert_eq!(producer.freed(offer.id).0, "Expired");
    // And who comes too late hears why.
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
    consumer.release(&offer);
    assert_eq!(producer.freed(offer.id).0, "Released");
    consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    assert_eq!(ended(&consumer).outcome.cause(), Some(Cause::Released));
}

#[test]
fn a_pull_releases_whether_it_loaded_or_failed_or_was_cancelled() {
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

/// An offer's name that was minted before the worker heard of the request.
fn early_name(producer: &mut Producer, blocks: &[u32]) -> (Offer, OfferId) {
    // The name has the same shape as any; only its id is not in the books yet.
    let mut offer = producer.offer(blocks);
    producer.say(&Say::Revoke(offer.id));
    producer.freed(offer.id);
    offer.id = OfferId::random();
    (offer.clone(), offer.id)
}

#[test]
fn an_offer_pulled_before_the_producer_knows_it_waits_for_it() {
    let spec = Spec::default();
    let mut producer = Producer::start(&Spec { early_grace_ms: 15_000, ..spec.clone() });
    let consumer = consumer(&spec, Config::default());
    // Block 0 was overwritten when the first name was revoked; the early one names others.
    let (mut offer, id) = early_name(&mut producer, &[0]);
    offer.groups[0].blocks = vec![Some(kvferry::BlockId(5)), Some(kvferry::BlockId(6))];
    consumer.pull(Pull::new(offer.clone(), all_of(&offer)).deadline(SOON)).unwrap();
    let until = Instant::now() + SOON;
    while producer.count().2 == 0 {
        assert!(Instant::now() < until, "no session was opened");
    }
    assert!(consumer.poll().is_none());
    producer.say(&Say::Offer { blocks: vec![5, 6], ready: false, id: Some(id) });
    producer.offered().unwrap();
    assert!(consumer.poll().is_none(), "not before its blocks are filled");
    producer.say(&Say::Ready(id));
    let end = ended(&consumer);
    assert!(end.outcome.complete(), "{:?}", end.outcome);
    assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
}

#[test]
fn a_name_that_never_gets_an_offer_is_unknown_after_the_grace() {
    let spec = Spec { early_grace_ms: 300, ..Spec::default() };
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, Config::default());
    let (offer, _) = early_name(&mut producer, &[0]);
    consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    assert_eq!(ended(&consumer).outcome.cause(), Some(Cause::Unknown));
}

#[test]
fn an_offer_handed_to_two_consumers_serves_both_and_comes_back_once() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let (one, two) = (consumer(&spec, Config::default()), consumer(&spec, Config::default()));
    let three = consumer(&spec, outlasting());
    let offer = producer.offer_all();
    // The slow one claims first, and holds the offer while the others come and go.
    let pull = three.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    wait_until_loaded(&three, pull, 0.05);
    for c in [&one, &two] {
        c.pull(pull_all(&offer, LaneKind::Local, SOON)).unwrap();
        let end = ended(c);
        assert!(end.outcome.complete(), "{:?}", end.outcome);
        assert_loaded_is_exact(&end, c, &spec, producer.seed);
    }
    assert!(ended(&three).outcome.complete());
    assert_eq!(producer.freed(offer.id).0, "Released");
    producer.count();
    assert!(producer.silent(|h| matches!(h, Heard::Freed { .. })), "freed a second time");
}

#[test]
fn a_thousand_sessions_are_held_while_used_and_dropped_when_long_unused() {
    use kvferry::{BlockId, GroupId, LocalBlocks};
    // One producer on every loopback address: to the consumer each address is a peer of its own.
    let spec = Spec { listen: "0.0.0.0:0".into(), blocks: 8, regions: 1, ..Spec::default() };
    let mut producer = Producer::start(&spec);
    let port = producer.addr.rsplit(':').next().unwrap().to_owned();
    let mut config = Config::default();
    config.session.idle = Duration::from_secs(8);
    let consumer = consumer(&spec, config);
    let peers = 1000;
    for i in 0..peers {
        let mut offer = producer.offer(&[i % 8]);
        offer.ranks[0].addr = format!("127.1.{}.{}:{port}", i / 250, i % 250 + 1);
        let blocks = LocalBlocks { group: GroupId(0), first_position: 0, blocks: vec![Some(BlockId(i % 8))] };
        consumer.pull(Pull::new(offer, vec![blocks]).lanes(vec![LaneKind::Tcp]).deadline(SOON)).unwrap();
        let end = ended(&consumer);
        assert!(end.outcome.complete(), "peer {i}: {:?}", end.outcome);
    }
    let held = producer.count().2;
    assert!(held > 500, "{held} sessions of peers that were used in the last seconds");
    let until = Instant::now() + SOON * 2;
    while producer.count().2 > 0 {
        assert!(Instant::now() < until, "{} sessions are still open", producer.count().2);
        std::thread::sleep(Duration::from_millis(20));
    }
    // A peer whose session was dropped is dialled again.
    let offer = producer.offer(&[3]);
    consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    assert!(ended(&consumer).outcome.complete());
}

#[test]
fn a_consumer_that_leaves_in_mid_pull_releases_as_it_goes() {
    let spec = Spec { claimed_ms: 600_000, ..Spec::default() };
    let mut producer = Producer::start(&spec);
    for _ in 0..5 {
        let consumer = consumer(&spec, throttled("throttle=16M"));
        let offer = producer.offer_all();
        let pull = consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
        wait_until_loaded(&consumer, pull, 0.05);
        drop(consumer);
        // Long before its lease of ten minutes.
        assert_eq!(producer.freed(offer.id).0, "Released");
    }
}
