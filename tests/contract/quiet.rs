//! A pull ends only when nothing can write its local blocks any more, and only then is the engine told.

use std::time::{Duration, Instant};

use kvferry::{Cause, Config, Consumer, LaneKind, PullError, WaitError};
use kvferry_testkit::rig::{
    Producer, SOON, Spec, consumer, deadline, ended, killable, pull_all, throttled, wait_until_loaded,
};

const MARK: u8 = 0xA5;

/// Writes all blocks, as an engine does that gets them back.
fn reuse_all(consumer: &Consumer, spec: &Spec) {
    let mark = vec![MARK; spec.block_size as usize];
    for r in &spec.layout().groups[0].regions {
        for b in 0..spec.blocks {
            consumer.memory().write_from(r.segment, r.block_offset(b), &mark).unwrap();
        }
    }
}

fn assert_untouched(consumer: &Consumer, spec: &Spec) {
    let mut found = vec![0; spec.block_size as usize];
    for r in &spec.layout().groups[0].regions {
        for b in 0..spec.blocks {
            consumer.memory().read_into(r.segment, r.block_offset(b), &mut found).unwrap();
            assert!(found.iter().all(|x| *x == MARK), "block {b} was written after its pull had ended");
        }
    }
}

#[test]
fn blocks_of_a_cancelled_pull_are_never_written_after_its_end() {
    for lane in [LaneKind::Tcp, LaneKind::Local] {
        let spec = Spec { blocks: 512, ..Spec::default() };
        let mut producer = Producer::start(&spec);
        let consumer = consumer(&spec, killable());
        for _ in 0..5 {
            let offer = producer.offer_all();
            let pull = consumer.pull(pull_all(&offer, lane, SOON)).unwrap();
            wait_until_loaded(&consumer, pull, 0.2);
            consumer.cancel(pull);
            let end = ended(&consumer);
            assert_eq!(end.outcome.cause(), Some(Cause::Cancelled));
            reuse_all(&consumer, &spec);
            // The producer has received the release, so all that it sent before has arrived or is discarded.
            assert_eq!(producer.freed(offer.id).0, "Released");
            assert_untouched(&consumer, &spec);
        }
        assert_eq!(consumer.blocks_held(), 0);
    }
}

#[test]
fn a_block_belongs_to_one_pull_until_that_pull_has_ended() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, throttled("throttle=8M"));
    let (one, two) = (producer.offer_all(), producer.offer_all());
    let pull = consumer.pull(pull_all(&one, LaneKind::Tcp, SOON)).unwrap();
    assert!(matches!(consumer.pull(pull_all(&two, LaneKind::Tcp, SOON)), Err(PullError::BlockBusy { .. })));
    consumer.cancel(pull);
    ended(&consumer);
    let again = consumer.pull(pull_all(&two, LaneKind::Tcp, SOON)).unwrap();
    consumer.cancel(again);
    ended(&consumer);
}

#[test]
fn a_lane_that_does_not_drain_is_killed_before_the_pull_ends() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, throttled("silent@4M,noquiet"));
    let offer = producer.offer_all();
    consumer.pull(pull_all(&offer, LaneKind::Tcp, Duration::from_millis(500))).unwrap();
    let end = ended(&consumer);
    assert_eq!(end.outcome.cause(), Some(Cause::Deadline));
    assert_eq!((consumer.blocks_held(), consumer.wedged()), (0, 0));
    assert_eq!(consumer.decided(end.pull), None, "`Ended` has the sets now");
}

#[test]
fn a_wedged_lane_withholds_its_blocks_and_the_producer_gets_its_own_back() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, throttled("silent@4M,wedge,lanes=1"));
    let offer = producer.offer_all();
    let pull =
        consumer.pull(pull_all(&offer, LaneKind::Tcp, deadline(LaneKind::Tcp, Duration::from_millis(500)))).unwrap();
    assert!(consumer.decided(pull).is_none());
    let began = Instant::now();
    assert_eq!(consumer.wait(SOON), Err(WaitError::Wedged { pull }), "a wedged pull does not end");
    assert!(began.elapsed() < SOON / 2, "the time-out was not sat out: {:?}", began.elapsed());
    assert_eq!(consumer.wedged(), 1);
    assert!(consumer.poll().is_none());
    let decided = consumer.decided(pull).expect("it has decided");
    assert_eq!(decided.loaded() + decided.invalid(), u64::from(spec.blocks));
    assert!(decided.invalid() > 0 && decided.times.ended.is_none(), "{decided:?}");
    assert_eq!(consumer.blocks_held(), spec.blocks as usize);
    assert!(consumer.progress(pull).is_some());
    let other = producer.offer_all();
    assert!(matches!(consumer.pull(pull_all(&other, LaneKind::Tcp, SOON)), Err(PullError::BlockBusy { .. })));
    // The producer is not affected: it got its blocks back when the pull decided.
    assert_eq!(producer.freed(offer.id).0, "Released");
}

#[test]
fn a_data_thread_that_panics_withholds_its_blocks_and_refuses_pulls() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, throttled("panic@4M"));
    let (offer, other) = (producer.offer_all(), producer.offer_all());
    let (_, end) = consumer.pull_async(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    assert!(end.blocking_recv().is_err(), "the pull never ends");
    assert_eq!(consumer.wait(SOON), Err(WaitError::Died), "no other pull ends");
    assert_eq!((consumer.wedged(), consumer.is_alive()), (1, false));
    assert_eq!(consumer.blocks_held(), spec.blocks as usize, "they may still be written");
    // Neither the next pull nor the producer waits indefinitely.
    assert_eq!(consumer.pull(pull_all(&other, LaneKind::Tcp, SOON)), Err(PullError::Died));
    assert_eq!((consumer.blocks_held(), consumer.pulls()), (spec.blocks as usize, 1));
    producer.freed(offer.id);
    assert!(consumer.poll().is_none());
}

#[test]
fn every_waiter_hears_at_once_that_the_data_thread_panicked() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, throttled("panic@4M"));
    let offer = producer.offer_all();
    std::thread::scope(|scope| {
        let waiters: Vec<_> = (0..3).map(|_| scope.spawn(|| consumer.wait(SOON))).collect();
        let began = Instant::now();
        let pull = consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
        for waiter in waiters {
            assert_eq!(waiter.join().unwrap(), Err(WaitError::Died));
        }
        assert!(began.elapsed() < SOON / 2, "they did not sit out their time-out: {:?}", began.elapsed());
        assert_eq!(consumer.decided(pull), None, "it had not decided");
    });
}

#[test]
fn a_wait_ends_with_the_consumer() {
    let spec = Spec::default();
    let consumer = consumer(&spec, Config::default());
    std::thread::scope(|scope| {
        let began = Instant::now();
        let waiter = scope.spawn(|| consumer.wait(SOON));
        consumer.shutdown();
        assert_eq!(waiter.join().unwrap(), Err(WaitError::Shutdown));
        assert!(began.elapsed() < SOON / 2, "the time-out was not sat out: {:?}", began.elapsed());
    });
}
