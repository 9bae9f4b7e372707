//! Streams: queues of operations that run later, in order, each on the thread of its stream.
//!
//! An operation reads its sources when it runs. So a source that is reused early, or a missing wait, shows as wrong
//! bytes. Streams run at the same time, except that the default stream waits for blocking streams and they for it.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::abi::{Out, api};
use crate::capture::{self, Capture};
use crate::context::current;
use crate::control::{knobs, tally};
use crate::device::{Device, driver};
use crate::error::{Error, Result};
use crate::settings::settings;
use crate::space::fresh_id;

pub(crate) const GREATEST_PRIORITY: i32 = -5;

/// A point in a stream: complete when every operation up to it has run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Position {
    stream: usize,
    number: u64,
    device: i32,
}

pub(crate) enum Work {
    /// A copy, a memset or a kernel.
    Data(Box<dyn FnOnce() -> Result + Send>),
    /// The record of an event.
    Record,
    /// The wait for an event.
    Wait(Position),
}

struct Operation {
    number: u64,
    submitted: Instant,
    after: Vec<Position>,
    work: Work,
}

struct Queue {
    device: &'static Device,
    blocking: bool,
    priority: i32,
    /// Destroyed by its owner; the rest still runs.
    closed: bool,
    has_thread: bool,
    submitted: u64,
    completed: u64,
    last_start: Instant,
    operations: VecDeque<Operation>,
    capture: Option<Arc<Capture>>,
}

struct State {
    queues: HashMap<usize, Queue>,
    hang: bool,
    hang_calls: bool,
    /// Data operations that may start before the devices hang.
    hang_after: Option<u64>,
}

static STATE: LazyLock<Mutex<State>> = LazyLock::new(|| {
    let hang_after = settings().as_ref().ok().and_then(|s| s.hang_after);
    Mutex::new(State { queues: HashMap::new(), hang: false, hang_calls: false, hang_after })
});

/// Something changed: an operation ended, one was queued, or a test turned a knob.
static CHANGE: Condvar = Condvar::new();

/// Takes the lock first: a waiter that has checked its condition, and does not wait yet, must not miss this.
pub(crate) fn wake() {
    let _state = STATE.lock();
    CHANGE.notify_all();
}

/// Hangs, or releases all operations. A release cancels a hang that was planned and has not begun.
pub(crate) fn hang(on: bool) {
    let mut state = STATE.lock();
    state.hang = on;
    if !on {
        state.hang_after = None;
    }
    CHANGE.notify_all();
}

pub(crate) fn hang_calls(on: bool) {
    STATE.lock().hang_calls = on;
    CHANGE.notify_all();
}

impl Queue {
    fn new(device: &'static Device, blocking: bool, priority: i32) -> Queue {
        Queue {
            device,
            blocking,
            priority,
            closed: false,
            has_thread: false,
            submitted: 0,
            completed: 0,
            last_start: Instant::now(),
            operations: VecDeque::new(),
            capture: None,
        }
    }
}

impl State {
    fn done(&self, position: Position) -> bool {
        self.queues.get(&position.stream).is_none_or(|q| q.completed >= position.number)
    }

    fn open(&mut self, stream: usize) -> Result<&mut Queue> {
        self.queues.get_mut(&stream).filter(|q| !q.closed).ok_or(Error::INVALID_HANDLE)
    }

    fn tail(&self, stream: usize) -> Option<Position> {
        let queue = self.queues.get(&stream)?;
        Some(Position { stream, number: queue.submitted, device: queue.device.ordinal })
    }

    fn tails(&self, of: impl Fn(&Queue) -> bool) -> Vec<Position> {
        self.queues.iter().filter(|(_, q)| of(q)).filter_map(|(&stream, _)| self.tail(stream)).collect()
    }
}

/// The default stream of a device.
fn default_of(device: &Device) -> usize {
    0x100 + device.ordinal as usize
}

/// The queue that a caller's stream handle means; null and `CU_STREAM_LEGACY` are the default stream.
fn named(device: &'static Device, handle: usize) -> Result<usize> {
    match handle {
        0 | 1 => {
            let id = default_of(device);
            STATE.lock().queues.entry(id).or_insert_with(|| Queue::new(device, true, 0));
            Ok(id)
        }
        2 => Err(Error::NOT_SUPPORTED),
        id if id < 0x1000 => Err(Error::INVALID_HANDLE),
        id => STATE.lock().open(id).map(|_| id),
    }
}

/// The device of a stream handle.
pub(crate) fn device_of(handle: usize) -> Result<&'static Device> {
    let device = current()?;
    let id = named(device, handle)?;
    STATE.lock().open(id).map(|q| q.device)
}

/// The capture that the stream is part of.
pub(crate) fn capture_of(handle: usize) -> Result<Option<Arc<Capture>>> {
    let id = named(current()?, handle)?;
    STATE.lock().open(id).map(|q| q.capture.clone())
}

/// Makes the stream part of a capture.
pub(crate) fn join_capture(handle: usize, capture: &Arc<Capture>) -> Result {
    let id = named(current()?, handle)?;
    STATE.lock().open(id)?.capture = Some(capture.clone());
    Ok(())
}

/// Releases all streams of a capture.
pub(crate) fn leave_capture(capture: &Arc<Capture>) {
    for queue in STATE.lock().queues.values_mut() {
        if queue.capture.as_ref().is_some_and(|c| Arc::ptr_eq(c, capture)) {
            queue.capture = None;
        }
    }
}

/// Queues an operation. In a captured stream it becomes part of the graph instead, which never runs.
pub(crate) fn submit(handle: usize, work: Work) -> Result<Position> {
    let device = current()?;
    let id = named(device, handle)?;
    if id == default_of(device) {
        capture::unsafe_call()?;
    }
    let mut state = STATE.lock();
    while state.hang_calls {
        CHANGE.wait(&mut state);
    }
    let queue = state.open(id)?;
    queue.device.healthy()?;
    if let Some(capture) = &queue.capture {
        capture.check()?;
        return Ok(Position { stream: id, number: 0, device: queue.device.ordinal });
    }
    let (blocking, owner) = (queue.blocking, queue.device);
    let after = if id == default_of(device) {
        state.tails(|q| q.blocking && q.device.ordinal == device.ordinal)
    } else if blocking {
        state.tail(default_of(owner)).into_iter().collect()
    } else {
        Vec::new()
    };
    let queue = state.open(id)?;
    let number = queue.submitted + 1;
    let after = after.into_iter().filter(|p| p.stream != id).collect();
    queue.operations.push_back(Operation { number, submitted: Instant::now(), after, work });
    queue.submitted = number;
    if !queue.has_thread {
        let spawned = std::thread::Builder::new().name("standin-stream".into()).spawn(move || run(id, owner));
        spawned.map_err(|_| Error::OUT_OF_MEMORY)?;
        queue.has_thread = true;
    }
    CHANGE.notify_all();
    Ok(Position { stream: id, number, device: owner.ordinal })
}

/// The thread of a stream. It ends when the stream is destroyed and empty.
fn run(id: usize, device: &'static Device) {
    let mut state = STATE.lock();
    loop {
        let Some(queue) = state.queues.get_mut(&id) else { return };
        if device.healthy().is_err() {
            let dropped = std::mem::take(&mut queue.operations);
            MutexGuard::unlocked(&mut state, || drop(dropped));
        }
        let Some(queue) = state.queues.get_mut(&id) else { return };
        let Some(next) = queue.operations.front() else {
            if queue.closed {
                state.queues.remove(&id);
                CHANGE.notify_all();
                return;
            }
            CHANGE.wait(&mut state);
            continue;
        };
        let start = next.submitted.max(queue.last_start) + knobs().delay();
        if start > Instant::now() {
            CHANGE.wait_until(&mut state, start);
            continue;
        }
        let Some(next) = state.queues.get(&id).and_then(|q| q.operations.front()) else { continue };
        let awaited = next.after.iter().copied().chain(if let Work::Wait(p) = next.work { Some(p) } else { None });
        let open: Vec<Position> = awaited.filter(|&p| !state.done(p)).collect();
        if state.hang || !open.is_empty() {
            // A position of a context that failed never completes.
            let failed = open.iter().find_map(|p| driver().ok()?.device(p.device).ok()?.healthy().err());
            match failed {
                Some(error) => {
                    device.fail(error);
                    CHANGE.notify_all();
                }
                None => CHANGE.wait(&mut state),
            }
            continue;
        }
        if matches!(next.work, Work::Data(_)) && !may_start(&mut state, device) {
            continue;
        }
        let Some(queue) = state.queues.get_mut(&id) else { return };
        queue.last_start = Instant::now();
        let Some(operation) = queue.operations.pop_front() else { continue };
        if let Work::Data(work) = operation.work {
            let result = MutexGuard::unlocked(&mut state, || catch_unwind(AssertUnwindSafe(work)));
            if let Err(error) = result.unwrap_or(Err(Error::LAUNCH_FAILED)) {
                device.fail(error);
            }
        }
        if let Some(queue) = state.queues.get_mut(&id) {
            queue.completed = queue.completed.max(operation.number);
        }
        CHANGE.notify_all();
    }
}

/// Applies the planned failures before a data operation starts.
fn may_start(state: &mut State, device: &Device) -> bool {
    match &mut state.hang_after {
        Some(0) => {
            state.hang_after = None;
            state.hang = true;
            return false;
        }
        Some(left) => *left -= 1,
        None => {}
    }
    if device.starts().is_err() {
        CHANGE.notify_all();
        return false;
    }
    tally().operations.fetch_add(1, Relaxed);
    true
}

impl Position {
    /// Whether it is complete; the sticky error of its context comes first.
    pub(crate) fn query(self) -> Result {
        let done = STATE.lock().done(self);
        // After the look at the queue: an operation that failed has set the error before it completed.
        driver()?.device(self.device)?.healthy()?;
        if done { Ok(()) } else { Err(Error::NOT_READY) }
    }

    pub(crate) fn wait(self) -> Result {
        let device = driver()?.device(self.device)?;
        let mut state = STATE.lock();
        loop {
            device.healthy()?;
            if state.done(self) {
                return Ok(());
            }
            CHANGE.wait(&mut state);
        }
    }
}

pub(crate) fn wait_for_all(device: &Device) -> Result {
    let tails = STATE.lock().tails(|q| q.device.ordinal == device.ordinal);
    tails.into_iter().try_for_each(Position::wait)
}

/// Destroys the streams of a context with what is left in them.
pub(crate) fn destroy_all(device: &Device) {
    let mut dropped = Vec::new();
    let mut state = STATE.lock();
    for (&id, queue) in state.queues.iter_mut().filter(|(_, q)| q.device.ordinal == device.ordinal) {
        dropped.extend(queue.operations.drain(..));
        queue.completed = queue.submitted;
        queue.capture = None;
        if id != default_of(device) && !queue.closed {
            queue.closed = true;
            tally().streams.fetch_sub(1, Relaxed);
        }
    }
    state.queues.retain(|_, q| q.has_thread || !q.closed);
    CHANGE.notify_all();
    drop(state);
}

fn tail_of(handle: usize) -> Result<Position> {
    let id = named(current()?, handle)?;
    STATE.lock().tail(id).ok_or(Error::INVALID_HANDLE)
}

fn create(flags: u32, priority: i32) -> Result<usize> {
    if flags > 1 {
        return Err(Error::INVALID_VALUE);
    }
    let id = fresh_id() as usize;
    let queue = Queue::new(current()?, flags == 0, priority.clamp(GREATEST_PRIORITY, 0));
    STATE.lock().queues.insert(id, queue);
    tally().streams.fetch_add(1, Relaxed);
    Ok(id)
}

/// Fails for a stream in capture, whoever asks, and invalidates the capture.
fn not_captured(handle: usize) -> Result {
    match capture_of(handle)? {
        Some(capture) => {
            capture.invalidate();
            Err(Error::STREAM_CAPTURE_UNSUPPORTED)
        }
        None => Ok(()),
    }
}

api! {
    InContext fn cuStreamCreate(stream: Out<usize>, flags: u32) {
        stream.put(create(flags, 0)?)
    }

    InContext fn cuStreamCreateWithPriority(stream: Out<usize>, flags: u32, priority: i32) {
        stream.put(create(flags, priority)?)
    }

    InContext fn cuStreamDestroy_v2(stream: usize) {
        if stream < 0x1000 {
            return Err(Error::INVALID_HANDLE);
        }
        let mut state = STATE.lock();
        let queue = state.open(stream)?;
        queue.closed = true;
        if !queue.has_thread {
            state.queues.remove(&stream);
        }
        tally().streams.fetch_sub(1, Relaxed);
        CHANGE.notify_all();
        Ok(())
    }

    NotInCapture fn cuStreamQuery(stream: usize) {
        not_captured(stream)?;
        tail_of(stream)?.query()
    }

    NotInCapture fn cuStreamSynchronize(stream: usize) {
        not_captured(stream)?;
        tail_of(stream)?.wait()
    }

    InContext fn cuStreamGetPriority(stream: usize, priority: Out<i32>) {
        let id = named(current()?, stream)?;
        let value = STATE.lock().open(id)?.priority;
        priority.put(value)
    }

    InContext fn cuStreamGetFlags(stream: usize, flags: Out<u32>) {
        let id = named(current()?, stream)?;
        let blocking = STATE.lock().open(id)?.blocking;
        flags.put((!blocking).into())
    }

    InContext fn cuStreamGetCtx(stream: usize, context: Out<usize>) {
        context.put(device_of(stream)?.context())
    }
}
