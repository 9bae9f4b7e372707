//! Stream captures, and the calls of other threads that break them.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed, Ordering::SeqCst};
use std::thread::ThreadId;

use parking_lot::Mutex;

use crate::abi::{Out, api};
use crate::control::tally;
use crate::error::{Error, Result};
use crate::space::fresh_id;
use crate::stream;

const GLOBAL: u32 = 0;
const RELAXED: u32 = 2;

/// The values of `CUstreamCaptureStatus`.
const STATUS_NONE: u32 = 0;
const STATUS_ACTIVE: u32 = 1;
const STATUS_INVALIDATED: u32 = 2;

pub(crate) struct Capture {
    id: u64,
    /// The stream that it began in, and must end in.
    origin: usize,
    mode: u32,
    thread: ThreadId,
    invalidated: AtomicBool,
}

/// Captures that have begun and not ended.
static ACTIVE: Mutex<Vec<Arc<Capture>>> = Mutex::new(Vec::new());

/// Graphs that captures made. They hold nothing.
static GRAPHS: Mutex<Vec<usize>> = Mutex::new(Vec::new());

thread_local! {
    static MODE: Cell<u32> = const { Cell::new(GLOBAL) };
}

impl Capture {
    pub(crate) fn check(&self) -> Result {
        if self.invalidated.load(SeqCst) { Err(Error::STREAM_CAPTURE_INVALIDATED) } else { Ok(()) }
    }

    pub(crate) fn invalidate(&self) {
        let active = ACTIVE.lock().iter().any(|c| c.id == self.id);
        if active && !self.invalidated.swap(true, SeqCst) {
            tally().invalidated_captures.fetch_add(1, Relaxed);
        }
    }

    /// Whether a call of this thread that could break a capture is forbidden during this one.
    fn forbids(&self, thread_mode: u32) -> bool {
        let own = self.thread == std::thread::current().id();
        match thread_mode {
            RELAXED => false,
            GLOBAL => self.mode == GLOBAL || (own && self.mode != RELAXED),
            _ => own && self.mode != RELAXED,
        }
    }
}

/// Notes a call that is unsafe during captures: it fails, and invalidates the captures that forbid it.
pub(crate) fn unsafe_call() -> Result {
    let forbidding: Vec<_> = {
        let mode = MODE.get();
        ACTIVE.lock().iter().filter(|c| c.forbids(mode)).cloned().collect()
    };
    forbidding.iter().for_each(|c| c.invalidate());
    if forbidding.is_empty() { Ok(()) } else { Err(Error::STREAM_CAPTURE_UNSUPPORTED) }
}

fn begin(origin: usize, mode: u32) -> Result {
    if mode > RELAXED {
        return Err(Error::INVALID_VALUE);
    }
    if origin < 0x1000 {
        return Err(Error::STREAM_CAPTURE_UNSUPPORTED);
    }
    if stream::capture_of(origin)?.is_some() {
        return Err(Error::ILLEGAL_STATE);
    }
    let thread = std::thread::current().id();
    let capture = Arc::new(Capture { id: fresh_id(), origin, mode, thread, invalidated: AtomicBool::new(false) });
    stream::join_capture(origin, &capture)?;
    ACTIVE.lock().push(capture);
    Ok(())
}

fn end(origin: usize) -> Result<usize> {
    let capture = stream::capture_of(origin)?.ok_or(Error::ILLEGAL_STATE)?;
    if capture.origin != origin {
        return Err(Error::STREAM_CAPTURE_UNMATCHED);
    }
    if capture.mode != RELAXED && capture.thread != std::thread::current().id() {
        return Err(Error::STREAM_CAPTURE_WRONG_THREAD);
    }
    stream::leave_capture(&capture);
    ACTIVE.lock().retain(|c| c.id != capture.id);
    capture.check()?;
    let graph = fresh_id() as usize;
    GRAPHS.lock().push(graph);
    Ok(graph)
}

fn status(stream: usize) -> Result<u32> {
    Ok(match stream::capture_of(stream)? {
        None => STATUS_NONE,
        Some(capture) if capture.check().is_ok() => STATUS_ACTIVE,
        Some(_) => STATUS_INVALIDATED,
    })
}

api! {
    InContext fn cuStreamBeginCapture_v2(stream: usize, mode: u32) {
        begin(stream, mode)
    }

    InContext fn cuStreamEndCapture(stream: usize, graph: Out<usize>) {
        graph.put(0)?;
        graph.put(end(stream)?)
    }

    InContext fn cuStreamIsCapturing(stream: usize, status_out: Out<u32>) {
        status_out.put(status(stream)?)
    }

    AfterInit fn cuGraphDestroy(graph: usize) {
        let mut graphs = GRAPHS.lock();
        let at = graphs.iter().position(|&g| g == graph).ok_or(Error::INVALID_VALUE)?;
        graphs.swap_remove(at);
        Ok(())
    }

    AfterInit fn cuThreadExchangeStreamCaptureMode(mode: Out<u32>) {
        let new = mode.read()?;
        if new > RELAXED {
            return Err(Error::INVALID_VALUE);
        }
        mode.put(MODE.replace(new))
    }
}
