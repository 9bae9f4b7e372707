//! Offers and pulls that come after the work of a stream, and an engine that is not disturbed.

use std::time::Duration;

use cudarc::driver::{result, sys};
use kvferry::{BlockId, Cause, GroupId, OfferError, OfferGroup, OfferSpec, PullError, Ready};

use crate::{
    alone::{alone, on_standin},
    pair::{BLOCKS, Engine, Pair, on_gpu, on_host, pull, wait_until},
};

/// The blocks of these numbers, at the positions of the same numbers.
fn blocks(numbers: std::ops::Range<u32>) -> Vec<OfferGroup> {
    let blocks = numbers.clone().map(|b| Some(BlockId(b))).collect();
    vec![OfferGroup { group: GroupId(0), first_position: numbers.start, blocks }]
}

#[test]
fn an_offer_after_a_stream_is_readable_once_its_work_is_done() {
    let standin = on_standin!("order::an_offer_after_a_stream_is_readable_once_its_work_is_done");
    let (engine, pair) = (Engine::new(), Pair::new(on_gpu(), on_host()));
    pair.fill(1);
    standin.hang(true);
    engine.work();
    let offer = pair.offer(Ready::After(engine.stream()));
    pair.consumer.pull(pull(&offer)).unwrap();
    wait_until("the consumer asks for it", || pair.producer.sessions() == 1);
    // The claim is answered that the blocks are not filled.
    assert!(pair.consumer.wait(Duration::from_millis(200)).is_err());
    assert_eq!(standin.counts().device_to_host, 0, "nothing was read");
    standin.hang(false);
    let end = pair.ended();
    assert!(end.outcome.complete() && pair.arrived(1), "{:?}", end.outcome);
}

#[test]
fn a_growth_after_a_stream_is_readable_once_its_work_and_that_of_the_growths_before_it_is_done() {
    let standin = on_standin!(
        "order::a_growth_after_a_stream_is_readable_once_its_work_and_that_of_the_growths_before_it_is_done"
    );
    let (engine, pair) = (Engine::new(), Pair::new(on_gpu(), on_gpu()));
    pair.fill(1);
    let half = u64::from(BLOCKS) * 8;
    let offer = pair.producer.open(OfferSpec::new(2 * half, vec![])).unwrap();
    let pulled = pair.consumer.pull(pull(&offer)).unwrap();
    standin.hang(true);
    engine.work();
    pair.producer.grow(offer.id, blocks(0..BLOCKS / 2), half, Ready::After(engine.stream())).unwrap();
    pair.producer.grow(offer.id, blocks(BLOCKS / 2..BLOCKS), 2 * half, Ready::Now).unwrap();
    pair.producer.finish(offer.id, 2 * half).unwrap();
    wait_until("the claim is held", || pair.producer.live().1 == 1);
    assert!(pair.consumer.wait(Duration::from_millis(200)).is_err());
    assert_eq!(pair.consumer.loaded_prefix(pulled), Some(0));
    assert_eq!(standin.counts().device_to_host, 0, "nothing was read");
    standin.hang(false);
    let end = pair.ended();
    assert!(end.outcome.complete() && pair.arrived(1), "{:?}", end.outcome);
}

#[test]
fn work_that_fails_before_a_growth_revokes_the_offer_and_what_was_computed_before_it_stays() {
    let standin =
        on_standin!("order::work_that_fails_before_a_growth_revokes_the_offer_and_what_was_computed_before_it_stays");
    const LAUNCH_FAILED: i32 = 719;
    let (engine, pair) = (Engine::new(), Pair::new(on_gpu(), on_host()));
    let half = u64::from(BLOCKS) * 8;
    let offer = pair.producer.open(OfferSpec::new(2 * half, vec![])).unwrap();
    let pulled = pair.consumer.pull(pull(&offer)).unwrap();
    pair.producer.grow(offer.id, blocks(0..BLOCKS / 2), half, Ready::Now).unwrap();
    wait_until("half is loaded", || pair.consumer.loaded_prefix(pulled) == Some(half));
    standin.hang(true);
    engine.work();
    pair.producer.grow(offer.id, blocks(BLOCKS / 2..BLOCKS), 2 * half, Ready::After(engine.stream())).unwrap();
    standin.raise(0, LAUNCH_FAILED, 0);
    standin.hang(false);
    let end = pair.ended();
    assert_eq!((end.outcome.loaded(), end.outcome.cause()), (u64::from(BLOCKS) / 2, Some(Cause::Revoked)));
    let after = pair.producer.grow(offer.id, vec![], 2 * half, Ready::Now);
    assert!(matches!(after, Err(OfferError::Ended { .. })), "{after:?}");
}

#[test]
fn a_pull_after_a_stream_writes_nothing_before_its_work_is_done() {
    let standin = on_standin!("order::a_pull_after_a_stream_writes_nothing_before_its_work_is_done");
    let (engine, pair) = (Engine::new(), Pair::new(on_host(), on_gpu()));
    pair.fill(2);
    let offer = pair.offer(Ready::Now);
    standin.hang(true);
    engine.work();
    pair.consumer.pull(pull(&offer).after(engine.stream())).unwrap();
    wait_until("the claim is held", || pair.producer.live().1 == 1);
    assert!(pair.consumer.wait(Duration::from_millis(200)).is_err());
    assert_eq!(standin.counts().host_to_device, 0, "nothing was written, and nothing is queued");
    standin.hang(false);
    let end = pair.ended();
    assert!(end.outcome.complete() && pair.arrived(2), "{:?}", end.outcome);
}

#[test]
fn streams_do_not_wait_for_each_other() {
    alone!("order::streams_do_not_wait_for_each_other");
    let (engine, other, pair) = (Engine::new(), Engine::new(), Pair::new(on_gpu(), on_gpu()));
    pair.fill(3);
    for round in 0..20 {
        engine.work();
        other.work();
        let streams = [engine.stream(), other.stream()];
        let offer = pair.offer(Ready::After(streams[round % 2]));
        pair.consumer.pull(pull(&offer).after(streams[(round + 1) % 2])).unwrap();
        assert!(pair.ended().outcome.complete());
    }
    assert!(pair.arrived(3));
}

#[test]
fn a_stream_needs_a_pool_on_its_gpu() {
    alone!("order::a_stream_needs_a_pool_on_its_gpu");
    let (engine, pair) = (Engine::new(), Pair::new(on_host(), on_host()));
    let refused = pair.producer.offer(OfferSpec::new(0, vec![]), Ready::After(engine.stream()));
    assert!(matches!(&refused, Err(OfferError::Stream { why }) if why.contains("host memory")), "{refused:?}");
    let refused = pair.consumer.pull(pull(&pair.offer(Ready::Now)).after(engine.stream()));
    assert!(matches!(&refused, Err(PullError::Stream { why }) if why.contains("host memory")), "{refused:?}");
    assert_eq!((pair.consumer.pulls(), pair.consumer.blocks_held()), (0, 0));
}

#[test]
fn a_capture_beside_pulls_stays_valid_and_its_stream_is_refused() {
    alone!("order::a_capture_beside_pulls_stays_valid_and_its_stream_is_refused");
    let (engine, pair) = (Engine::new(), Pair::new(on_gpu(), on_gpu()));
    pair.fill(4);
    let global = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
    unsafe { result::stream::begin_capture(engine.stream, global).unwrap() };
    engine.work();
    let refused = pair.producer.offer(OfferSpec::new(0, vec![]), Ready::After(engine.stream()));
    assert!(matches!(&refused, Err(OfferError::Stream { why }) if why.contains("capturing")), "{refused:?}");
    for _ in 0..5 {
        // Another thread of the engine goes on meanwhile, with streams of its own.
        let offer = std::thread::scope(|s| {
            s.spawn(|| {
                let other = Engine::attached();
                pair.offer(Ready::After(other.stream()))
            })
            .join()
            .unwrap()
        });
        pair.consumer.pull(pull(&offer)).unwrap();
        assert!(pair.ended().outcome.complete());
    }
    let graph = unsafe { result::stream::end_capture(engine.stream) };
    assert!(graph.is_ok(), "a call of kvferry has invalidated the capture: {graph:?}");
    assert!(pair.arrived(4));
}

#[test]
fn idle_ranks_make_no_call_of_the_driver() {
    let standin = on_standin!("order::idle_ranks_make_no_call_of_the_driver");
    let pair = Pair::new(on_gpu(), on_gpu());
    pair.fill(5);
    let offer = pair.offer(Ready::Now);
    pair.consumer.pull(pull(&offer)).unwrap();
    assert!(pair.ended().outcome.complete());
    wait_until("the producer has its blocks back", || pair.producer.live() == (0, 0));
    // A thread that looked for the end of copies looks no more.
    let mut calls = standin.counts().calls;
    wait_until("the calls have stopped", || {
        std::thread::sleep(Duration::from_millis(20));
        calls == std::mem::replace(&mut calls, standin.counts().calls)
    });
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(standin.counts().calls, calls);
}
