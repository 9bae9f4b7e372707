//! Calls of the driver that fail or hang while the context stays as it is.

use std::{ffi::CStr, time::Duration};

use kvferry::{Cause, Config, CopyMethod, GpuError, Memory, PullId, Ready, WaitError};
use kvferry_cuda_standin::Control;
use kvferry_testkit::rig::SOON;

use crate::{
    alone::{alone, on_standin},
    metrics::value,
    pair::{Pair, on_gpu, on_host, pull, pull_block, wait_until},
};

const INVALID_VALUE: i32 = 1;
const OUT_OF_MEMORY: i32 = 2;
const INVALID_HANDLE: i32 = 400;
const LAUNCH_FAILED: i32 = 719;
const SYSTEM_NOT_READY: i32 = 802;

/// From host memory to the GPU. Copies have all the time that they need.
fn patient() -> Pair {
    let mut config = Config::default();
    config.gpu.copy_bound = Duration::from_secs(10);
    config.gpu.copy = CopyMethod::Copies;
    let pair = Pair::with(on_host(), on_gpu(), config);
    pair.fill(1);
    pair
}

/// Cancels a pull whose copies run.
fn cancel(pair: &Pair, id: PullId) {
    pair.consumer.cancel(id);
    assert!(pair.consumer.wait(Duration::from_millis(200)).is_err(), "its copies may still write its blocks");
    wait_until("it has decided", || pair.consumer.decided(id).is_some());
}

/// A pull of one job, whose copies run when the call of this function fails, which tells when they end.
fn copies_without_an_end(standin: Control, symbol: &CStr) {
    let pair = Pair::new(on_host(), on_gpu());
    pair.fill(1);
    let offer = pair.offer(Ready::Now);
    standin.hang(true);
    standin.fail_calls(symbol, INVALID_HANDLE, 0, 1);
    let id = pair.consumer.pull(pull_block(&offer, 0)).unwrap();
    wait_until("the call has failed", || value("unusable") == 1.0);
    pair.consumer.cancel(id);
    assert_eq!(pair.consumer.wait(SOON), Err(WaitError::Wedged { pull: id }), "its copies may still write its blocks");
    standin.hang(false);
}

#[test]
fn copies_whose_event_cannot_be_recorded_withhold_their_blocks() {
    let standin = on_standin!("errors::copies_whose_event_cannot_be_recorded_withhold_their_blocks");
    copies_without_an_end(standin, c"cuEventRecord");
}

#[test]
fn copies_whose_event_cannot_be_looked_at_withhold_their_blocks() {
    let standin = on_standin!("errors::copies_whose_event_cannot_be_looked_at_withhold_their_blocks");
    copies_without_an_end(standin, c"cuEventQuery");
}

#[test]
fn a_job_with_a_refused_copy_ends_when_the_copies_before_it_end() {
    let standin = on_standin!("errors::a_job_with_a_refused_copy_ends_when_the_copies_before_it_end");
    let pair = patient();
    let offer = pair.offer(Ready::Now);
    standin.hang(true);
    standin.fail_calls(c"cuMemcpyHtoDAsync_v2", INVALID_VALUE, 1, 1);
    let before = standin.counts().host_to_device;
    let id = pair.consumer.pull(pull_block(&offer, 0)).unwrap();
    wait_until("a copy is refused", || standin.caught(c"cuMemcpyHtoDAsync_v2") == 1);
    assert_eq!(standin.counts().host_to_device, before + 1);
    cancel(&pair, id);
    standin.hang(false);
    assert_eq!((pair.ended().outcome.cause(), pair.consumer.blocks_held()), (Some(Cause::Cancelled), 0));
    // The error was this copy's alone.
    pair.consumer.pull(pull(&pair.offer(Ready::Now))).unwrap();
    assert!(pair.ended().outcome.complete() && pair.arrived(1));
}

#[test]
fn jobs_in_flight_end_with_their_events_though_the_gpu_is_unusable() {
    let standin = on_standin!("errors::jobs_in_flight_end_with_their_events_though_the_gpu_is_unusable");
    let pair = patient();
    let offer = pair.offer(Ready::Now);
    standin.hang(true);
    let before = standin.counts().host_to_device;
    let first = pair.consumer.pull(pull_block(&offer, 0)).unwrap();
    wait_until("its copies are queued", || standin.counts().host_to_device == before + 4);
    // The error of another call, after which the driver runs nothing more: the copies have begun before.
    standin.fail_calls(c"cuEventCreate", LAUNCH_FAILED, 0, 1);
    let second = pair.consumer.pull(pull_block(&offer, 1)).unwrap();
    wait_until("the GPU is unusable", || value("unusable") == 1.0);
    cancel(&pair, first);
    cancel(&pair, second);
    standin.hang(false);
    for _ in 0..2 {
        assert_eq!(pair.ended().outcome.cause(), Some(Cause::Cancelled));
    }
    assert_eq!((pair.consumer.wedged(), pair.consumer.blocks_held()), (0, 0));
}

#[test]
fn a_lack_of_events_delays_a_copy_and_fails_nothing() {
    let standin = on_standin!("errors::a_lack_of_events_delays_a_copy_and_fails_nothing");
    let pair = patient();
    let offer = pair.offer(Ready::Now);
    standin.hang(true);
    let before = standin.counts().host_to_device;
    pair.consumer.pull(pull_block(&offer, 0)).unwrap();
    wait_until("its copies are queued", || standin.counts().host_to_device == before + 4);
    standin.fail_calls(c"cuEventCreate", OUT_OF_MEMORY, 0, u64::MAX);
    pair.consumer.pull(pull_block(&offer, 1)).unwrap();
    wait_until("there is no event", || standin.caught(c"cuEventCreate") > 0);
    standin.hang(false);
    for _ in 0..2 {
        let end = pair.ended();
        assert!(end.outcome.complete(), "{:?}", end.outcome);
    }
    assert_eq!(value("unusable"), 0.0);
}

#[test]
fn a_driver_that_could_not_start_is_asked_again() {
    let standin = on_standin!("errors::a_driver_that_could_not_start_is_asked_again");
    standin.fail_calls(c"cuInit", SYSTEM_NOT_READY, 0, 1);
    let error = Memory::alloc_gpu(0, &[4096]).unwrap_err();
    assert!(matches!(error, GpuError::Call { call: "cuInit", code: 802, .. }), "{error}");
    assert!(Memory::alloc_gpu(0, &[4096]).is_ok());
}

#[test]
fn calls_that_set_up_or_take_down_delay_no_pull() {
    let standin = on_standin!("errors::calls_that_set_up_or_take_down_delay_no_pull");
    let pair = patient();
    let dropped = on_gpu();
    type Call = Box<dyn FnOnce() + Send>;
    let calls: [(&CStr, Call); 3] = [
        (c"cuMemCreate", Box::new(|| drop(on_gpu()))),
        (c"cuMemHostRegister_v2", Box::new(|| drop(Pair::new(on_host(), on_gpu())))),
        (c"cuMemUnmap", Box::new(move || drop(dropped))),
    ];
    for (symbol, call) in calls {
        standin.block_calls(symbol, true);
        let caller = std::thread::spawn(call);
        wait_until("the call blocks", || standin.caught(symbol) > 0);
        pair.consumer.pull(pull(&pair.offer(Ready::Now))).unwrap();
        assert!(pair.ended().outcome.complete(), "while {symbol:?} blocks");
        // One that is cancelled ends as soon as its copies have ended.
        standin.hang(true);
        let before = standin.counts().host_to_device;
        let id = pair.consumer.pull(pull_block(&pair.offer(Ready::Now), 0)).unwrap();
        wait_until("copies are queued", || standin.counts().host_to_device > before);
        cancel(&pair, id);
        standin.hang(false);
        assert_eq!(pair.ended().outcome.cause(), Some(Cause::Cancelled), "while {symbol:?} blocks");
        standin.block_calls(symbol, false);
        caller.join().unwrap();
    }
    assert_eq!((pair.consumer.wedged(), pair.consumer.blocks_held()), (0, 0));
}
