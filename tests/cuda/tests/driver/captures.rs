use crate::rig::*;
use sys::CUstreamCaptureMode_enum as Mode;

fn on_another_thread(body: impl FnOnce() + Send + 'static) {
    let mut context = std::ptr::null_mut();
    cu!(cuCtxGetCurrent(&mut context));
    let context = context as usize;
    let thread = std::thread::spawn(move || {
        cu!(cuCtxSetCurrent(context as sys::CUcontext));
        body();
    });
    thread.join().expect("no panic");
}

#[test]
fn an_event_query_of_another_thread_breaks_a_capture() {
    alone("captures::an_event_query_of_another_thread_breaks_a_capture", "", || {
        let control = begin();
        let (stream, event) = (stream(), event() as usize);
        let mut graph = std::ptr::null_mut();
        cu!(cuStreamBeginCapture_v2(stream, Mode::CU_STREAM_CAPTURE_MODE_GLOBAL));
        on_another_thread(move || cu!(cuEventQuery(event as sys::CUevent) => 900));
        let address_of = &raw mut graph;
        cu!(cuStreamEndCapture(stream, address_of) => 901);
        assert!(graph.is_null());
        assert_eq!(control.counts().invalidated_captures, 1);
    });
}

#[test]
fn a_relaxed_thread_does_not_break_a_capture() {
    alone("captures::a_relaxed_thread_does_not_break_a_capture", "", || {
        let control = begin();
        let (stream, event, address) = (stream(), event() as usize, alloc(8));
        let mut graph = std::ptr::null_mut();
        cu!(cuStreamBeginCapture_v2(stream, Mode::CU_STREAM_CAPTURE_MODE_GLOBAL));
        on_another_thread(move || {
            let mut mode = Mode::CU_STREAM_CAPTURE_MODE_RELAXED;
            cu!(cuThreadExchangeStreamCaptureMode(&mut mode));
            assert_eq!(mode, Mode::CU_STREAM_CAPTURE_MODE_GLOBAL);
            let other = crate::rig::stream();
            cu!(cuEventRecord(event as sys::CUevent, other));
            cu!(cuEventSynchronize(event as sys::CUevent));
            cu!(cuEventQuery(event as sys::CUevent));
        });
        cu!(cuMemsetD8Async(address, 1, 8, stream));
        cu!(cuStreamEndCapture(stream, &mut graph));
        cu!(cuGraphDestroy(graph));
        assert_eq!(control.counts().invalidated_captures, 0);
        assert_eq!(download(address, 8), [0xCD; 8], "a captured operation does not run");
    });
}

#[test]
fn an_event_joins_a_capture_and_its_query_breaks_it() {
    alone("captures::an_event_joins_a_capture_and_its_query_breaks_it", "", || {
        begin();
        let (one, two, event, outside) = (stream(), stream(), event(), event());
        cu!(cuEventRecord(outside, two));
        cu!(cuStreamSynchronize(two));
        let mut mode = Mode::CU_STREAM_CAPTURE_MODE_RELAXED;
        cu!(cuThreadExchangeStreamCaptureMode(&mut mode));
        let mut graph = std::ptr::null_mut();
        cu!(cuStreamBeginCapture_v2(one, Mode::CU_STREAM_CAPTURE_MODE_RELAXED));
        cu!(cuEventRecord(event, one));
        cu!(cuStreamWaitEvent(two, event, 0));
        let mut status = sys::CUstreamCaptureStatus_enum::CU_STREAM_CAPTURE_STATUS_NONE;
        cu!(cuStreamIsCapturing(two, &mut status));
        assert_eq!(status, sys::CUstreamCaptureStatus_enum::CU_STREAM_CAPTURE_STATUS_ACTIVE);
        cu!(cuEventQuery(event) => 907);
        cu!(cuStreamEndCapture(one, &mut graph) => 901);
        cu!(cuStreamBeginCapture_v2(one, Mode::CU_STREAM_CAPTURE_MODE_RELAXED));
        cu!(cuStreamWaitEvent(one, outside, 0) => 905);
        cu!(cuStreamEndCapture(one, &mut graph) => 901);
    });
}
