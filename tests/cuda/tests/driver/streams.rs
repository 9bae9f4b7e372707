use std::time::Duration;

use crate::rig::*;

#[test]
fn a_copy_reads_its_source_when_it_runs() {
    alone("streams::a_copy_reads_its_source_when_it_runs", "", || {
        let control = begin();
        let (address, stream, event) = (alloc(8), stream(), event());
        let mut source = [1_u8; 8];
        control.hang(true);
        cu!(cuMemcpyHtoDAsync_v2(address, source.as_ptr().cast(), 8, stream));
        cu!(cuEventRecord(event, stream));
        cu!(cuEventQuery(event) => 600);
        cu!(cuStreamQuery(stream) => 600);
        unsafe { source.as_mut_ptr().cast::<[u8; 8]>().write_volatile([2; 8]) };
        control.hang(false);
        cu!(cuEventSynchronize(event));
        cu!(cuEventQuery(event));
        cu!(cuStreamQuery(stream));
        assert_eq!(download(address, 8), [2; 8]);
    });
}

#[test]
fn an_event_counts_its_last_record_and_a_wait_the_one_before_it() {
    alone("streams::an_event_counts_its_last_record_and_a_wait_the_one_before_it", "", || {
        let control = begin();
        let (address, one, two, event) = (alloc(16), stream(), stream(), event());
        cu!(cuEventQuery(event));
        control.hang(true);
        let (first, second) = ([1_u8; 8], [0_u8; 8]);
        cu!(cuMemcpyHtoDAsync_v2(address, first.as_ptr().cast(), 8, one));
        cu!(cuEventRecord(event, one));
        cu!(cuStreamWaitEvent(two, event, 0));
        cu!(cuMemcpyDtoHAsync_v2(second.as_ptr() as *mut _, address, 8, two));
        // The new record lies behind stream two: a wait for it would never end.
        cu!(cuEventRecord(event, two));
        cu!(cuEventQuery(event) => 600);
        control.hang(false);
        cu!(cuEventSynchronize(event));
        assert_eq!(unsafe { (&raw const second).read_volatile() }, [1; 8]);
    });
}

#[test]
fn operations_of_a_stream_start_a_delay_apart_and_others_pass_them() {
    alone("streams::operations_of_a_stream_start_a_delay_apart_and_others_pass_them", "", || {
        let control = begin();
        let (address, slow, fast) = (alloc(16), stream(), stream());
        control.set_delay(Duration::from_secs(3600));
        cu!(cuMemsetD8Async(address, 1, 8, slow));
        cu!(cuStreamQuery(slow) => 600);
        cu!(cuMemsetD8Async(address + 8, 2, 8, fast));
        control.set_delay(Duration::from_millis(2));
        let began = std::time::Instant::now();
        cu!(cuMemsetD8Async(address, 3, 8, slow));
        cu!(cuStreamSynchronize(slow));
        cu!(cuStreamSynchronize(fast));
        assert!(began.elapsed() >= Duration::from_millis(2));
        assert_eq!(download(address, 9), [3, 3, 3, 3, 3, 3, 3, 3, 2]);
    });
}

#[test]
fn the_default_stream_waits_for_blocking_streams() {
    alone("streams::the_default_stream_waits_for_blocking_streams", "", || {
        let control = begin();
        let mut blocking = std::ptr::null_mut();
        cu!(cuStreamCreate(&mut blocking, 0));
        let address = alloc(8);
        control.hang(true);
        cu!(cuMemsetD8Async(address, 1, 8, blocking));
        cu!(cuMemsetD8Async(address, 2, 8, std::ptr::null_mut()));
        cu!(cuMemsetD8Async(address + 4, 3, 4, blocking));
        control.hang(false);
        cu!(cuStreamSynchronize(blocking));
        assert_eq!(download(address, 8), [2, 2, 2, 2, 3, 3, 3, 3]);
    });
}

#[test]
fn a_destroyed_stream_finishes_and_freeing_waits() {
    alone("streams::a_destroyed_stream_finishes_and_freeing_waits", "delay=2ms", || {
        let control = begin();
        let (address, source, stream) = (alloc(8), [7_u8; 8], stream());
        let target = [0_u8; 8];
        cu!(cuMemcpyHtoDAsync_v2(address, source.as_ptr().cast(), 8, stream));
        cu!(cuMemcpyDtoHAsync_v2(target.as_ptr() as *mut _, address, 8, stream));
        cu!(cuStreamDestroy_v2(stream));
        cu!(cuStreamQuery(stream) => 400);
        cu!(cuMemFree_v2(address));
        assert_eq!(unsafe { (&raw const target).read_volatile() }, [7; 8]);
        assert_eq!(control.counts().streams, 0);
    });
}

#[test]
fn a_batch_with_another_order_than_stream_reads_early() {
    alone("streams::a_batch_with_another_order_than_stream_reads_early", "", || {
        let control = begin();
        let (address, stream) = (alloc(64), stream());
        for (order, expected) in [(1, 2), (3, 1)] {
            let mut source = [1_u8; 16];
            let mut attributes: sys::CUmemcpyAttributes = unsafe { std::mem::zeroed() };
            attributes.srcAccessOrder = match order {
                1 => sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
                _ => sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_ANY,
            };
            let mut to = [address, address + 32];
            let mut from = [source.as_ptr() as u64; 2];
            let (mut sizes, mut starts, mut failed) = ([16_usize, 8], [0_usize], 0_usize);
            let mut batch = |to: &mut [u64; 2]| unsafe {
                let (sizes, starts) = (sizes.as_mut_ptr(), starts.as_mut_ptr());
                let (to, from) = (to.as_mut_ptr(), from.as_mut_ptr());
                let result =
                    sys::cuMemcpyBatchAsync(to, from, sizes, 2, &mut attributes, starts, 1, &mut failed, stream);
                (code(result), failed)
            };
            assert_eq!(batch(&mut [address, address + 60]), (1, 1));
            control.hang(true);
            assert_eq!(batch(&mut to), (0, usize::MAX));
            unsafe { source.as_mut_ptr().cast::<[u8; 16]>().write_volatile([2; 16]) };
            control.hang(false);
            cu!(cuStreamSynchronize(stream));
            assert_eq!(download(address, 16), [expected; 16]);
            assert_eq!(download(address + 32, 9)[7..], [expected, 0xCD]);
        }
    });
}

#[test]
fn submitting_calls_hang_until_released() {
    alone("streams::submitting_calls_hang_until_released", "", || {
        let control = begin();
        let (address, stream) = (alloc(8), stream() as usize);
        control.hang_calls(true);
        let mut context = std::ptr::null_mut();
        cu!(cuCtxGetCurrent(&mut context));
        let context = context as usize;
        let (started, start) = std::sync::mpsc::channel();
        let submitter = std::thread::spawn(move || {
            cu!(cuCtxSetCurrent(context as sys::CUcontext));
            started.send(()).expect("a receiver");
            cu!(cuMemsetD8Async(address, 1, 8, stream as sys::CUstream));
        });
        start.recv().expect("the thread");
        cu!(cuStreamQuery(stream as sys::CUstream));
        assert_eq!(control.counts().memsets, 0);
        control.hang_calls(false);
        submitter.join().expect("no panic");
        assert_eq!(control.counts().memsets, 1);
    });
}

#[test]
fn a_planned_error_is_sticky() {
    alone("streams::a_planned_error_is_sticky", "", || {
        let control = begin();
        let (address, stream, before, after) = (alloc(8), stream(), event(), event());
        control.raise(0, 719, 1);
        cu!(cuMemsetD8Async(address, 1, 8, stream));
        cu!(cuEventRecord(before, stream));
        cu!(cuEventSynchronize(before));
        cu!(cuMemsetD8Async(address, 2, 8, stream));
        let _ = unsafe { sys::cuEventRecord(after, stream) };
        cu!(cuEventSynchronize(after) => 719);
        cu!(cuEventQuery(before) => 719);
        cu!(cuStreamSynchronize(stream) => 719);
        cu!(cuMemAlloc_v2(&mut 0, 8) => 719);
        cu!(cuMemFree_v2(address) => 719);
        let mut bytes = [0; 8];
        control.read(address, &mut bytes).expect("mapped");
        assert_eq!(bytes, [1; 8]);
    });
}

#[test]
fn failures_come_from_the_environment_too() {
    alone("streams::failures_come_from_the_environment_too", "hang_after=1,sticky_after=1,sticky=700", || {
        let control = begin();
        let (address, stream, event) = (alloc(8), stream(), event());
        cu!(cuMemsetD8Async(address, 1, 8, stream));
        cu!(cuStreamSynchronize(stream));
        cu!(cuMemsetD8Async(address, 2, 8, stream));
        cu!(cuEventRecord(event, stream));
        cu!(cuEventQuery(event) => 600);
        assert_eq!(control.counts().operations, 1);
        control.hang(false);
        cu!(cuEventSynchronize(event) => 700);
    });
}
