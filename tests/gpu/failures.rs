//! A GPU that hangs, or whose context is poisoned.

use std::time::{Duration, Instant};

use kvferry::{Cause, Config, PullError, Ready, WaitError};
use kvferry_testkit::rig::SOON;

use crate::{
    alone::{alone, on_standin},
    pair::{Engine, Pair, on_gpu, on_host, pull, wait_until},
};

#[test]
fn a_pull_decides_by_its_deadline_while_the_gpu_hangs_and_its_blocks_are_withheld() {
    let name = "failures::a_pull_decides_by_its_deadline_while_the_gpu_hangs_and_its_blocks_are_withheld";
    let standin = on_standin!(name);
    let pair = Pair::new(on_host(), on_gpu());
    pair.fill(1);
    let offer = pair.offer(Ready::Now);
    standin.hang(true);
    let deadline = Duration::from_millis(800);
    let began = Instant::now();
    let id = pair.consumer.pull(pull(&offer).deadline(deadline)).unwrap();
    assert_eq!(pair.consumer.wait(SOON), Err(WaitError::Wedged { pull: id }), "its copies may still write its blocks");
    let decided = pair.consumer.decided(id).expect("it has decided");
    assert!(decided.times.decided.unwrap() <= deadline + Duration::from_millis(200), "{:?}", decided.times);
    assert!(began.elapsed() < SOON / 2);
    assert_eq!((decided.loaded(), pair.consumer.wedged()), (0, 1));
    assert!(pair.consumer.blocks_held() > 0);
    // The producer is not affected.
    assert!(pair.producer.wait_freed(SOON).is_some());
}

#[test]
fn a_driver_that_blocks_delays_no_decision() {
    let standin = on_standin!("failures::a_driver_that_blocks_delays_no_decision");
    let pair = Pair::new(on_host(), on_gpu());
    pair.fill(1);
    let offer = pair.offer(Ready::Now);
    standin.hang_calls(true);
    let deadline = Duration::from_millis(800);
    let id = pair.consumer.pull(pull(&offer).deadline(deadline)).unwrap();
    assert_eq!(pair.consumer.wait(SOON), Err(WaitError::Wedged { pull: id }));
    let times = pair.consumer.decided(id).unwrap().times;
    assert!(times.decided.unwrap() <= deadline + Duration::from_millis(200), "{times:?}");
    standin.hang_calls(false);
}

#[test]
fn a_pull_ends_when_its_copies_end_after_all() {
    let standin = on_standin!("failures::a_pull_ends_when_its_copies_end_after_all");
    let mut config = Config::default();
    config.gpu.copy_bound = Duration::from_secs(10);
    let pair = Pair::with(on_host(), on_gpu(), config);
    pair.fill(2);
    let offer = pair.offer(Ready::Now);
    standin.hang(true);
    let id = pair.consumer.pull(pull(&offer)).unwrap();
    wait_until("copies are queued", || standin.counts().host_to_device > 0);
    pair.consumer.cancel(id);
    wait_until("it has decided", || pair.consumer.decided(id).is_some());
    assert!(pair.consumer.wait(Duration::from_millis(200)).is_err(), "its copies may still write its blocks");
    standin.hang(false);
    let end = pair.ended();
    assert_eq!((end.outcome.cause(), pair.consumer.blocks_held()), (Some(Cause::Cancelled), 0));
    // Nothing was lost.
    pair.consumer.pull(pull(&pair.offer(Ready::Now))).unwrap();
    assert!(pair.ended().outcome.complete() && pair.arrived(2));
}

#[test]
fn a_poisoned_context_of_the_consumer_ends_its_pulls_and_nothing_panics() {
    let standin = on_standin!("failures::a_poisoned_context_of_the_consumer_ends_its_pulls_and_nothing_panics");
    const ILLEGAL_ADDRESS: i32 = 700;
    let (engine, pair) = (Engine::new(), Pair::new(on_host(), on_gpu()));
    pair.fill(3);
    let offer = pair.offer(Ready::Now);
    standin.raise(0, ILLEGAL_ADDRESS, 3);
    pair.consumer.pull(pull(&offer)).unwrap();
    let end = pair.ended();
    assert!(!end.outcome.complete() && end.outcome.cause().is_some(), "{:?}", end.outcome);
    assert_eq!((pair.consumer.wedged(), pair.consumer.blocks_held()), (0, 0), "a dead context writes nothing");
    // The next pull says why, at once.
    let next = pair.consumer.pull(pull(&pair.offer(Ready::Now)).after(engine.stream()));
    assert!(matches!(&next, Err(PullError::Stream { why }) if why.contains("unusable")), "{next:?}");
    let began = Instant::now();
    pair.consumer.pull(pull(&pair.offer(Ready::Now))).unwrap();
    let end = pair.ended();
    assert_eq!(end.outcome.loaded(), 0);
    assert!(began.elapsed() < SOON / 2, "it did not wait for its deadline: {:?}", began.elapsed());
}

#[test]
fn work_that_fails_before_an_offer_revokes_it_and_before_a_pull_cancels_it() {
    let standin = on_standin!("failures::work_that_fails_before_an_offer_revokes_it_and_before_a_pull_cancels_it");
    const LAUNCH_FAILED: i32 = 719;
    let (engine, pair) = (Engine::new(), Pair::new(on_gpu(), on_gpu()));
    standin.hang(true);
    engine.work();
    let now = pair.offer(Ready::Now);
    pair.consumer.pull(pull(&now).after(engine.stream())).unwrap();
    let later = pair.offer(Ready::After(engine.stream()));
    wait_until("the claim is held", || pair.producer.live() == (2, 1));
    standin.raise(0, LAUNCH_FAILED, 0);
    standin.hang(false);
    let end = pair.ended();
    assert_eq!((end.outcome.loaded(), end.outcome.cause()), (0, Some(Cause::GpuFailed)));
    let freed = loop {
        let freed = pair.producer.wait_freed(SOON).expect("both offers end");
        if freed.offer == later.id {
            break freed;
        }
    };
    assert_eq!(format!("{:?}", freed.why), "Revoked");
}

#[test]
fn a_gpu_without_memory_for_the_kernels_buffer_copies_in_batches() {
    let standin = on_standin!("failures::a_gpu_without_memory_for_the_kernels_buffer_copies_in_batches");
    let pair = Pair::new(on_host(), on_gpu());
    pair.fill(4);
    standin.fail_allocations(100);
    pair.consumer.pull(pull(&pair.offer(Ready::Now))).unwrap();
    assert!(pair.ended().outcome.complete() && pair.arrived(4));
    assert_eq!((standin.counts().launches, standin.counts().batches > 0), (0, true));
}
