//! The two threads of one GPU. They make every CUDA call of this process's kvferry, except that an engine's own thread records
//! the event of a stream. The second one, [`set_up`], makes the calls that set something up or take it down: a driver that is
//! slow in one of them delays no copy, and no pull is wedged for it.
//!
//! The first one, [`run`], owns the context, the streams and the jobs. When a call or an event reports an error that makes the
//! context unusable, it begins nothing more, and ends each job when its event is over.

use std::{
    collections::{HashMap, VecDeque},
    num::NonZeroU64,
    panic::AssertUnwindSafe,
    rc::Rc,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender},
    },
    time::{Duration, Instant},
};

use cudarc::driver::sys::CUevent;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{
    context::{self, Context},
    error::GpuError,
    handle::{GpuInfo, State},
    library::{NOT_READY, is_fatal},
    pipe::Pipes,
    queue::{Direction, Order, Setup, Then},
    stats,
};
use crate::mailbox::Mailbox;

/// How long the thread looks for the end of a job without a pause, since the last job began or ended. A copy of a chunk takes
/// 20 to 200 us over PCIe 5; a sleep costs 50 us.
const SPIN: Duration = Duration::from_micros(200);
/// The pause between two looks for the end of a job after that.
const PAUSE: Duration = Duration::from_micros(50);
/// The pause between two looks at an engine's events, which may take as long as a prefill.
const EVENT_PAUSE: Duration = Duration::from_micros(200);

/// An engine's event to wait for.
struct Watched {
    event: CUevent,
    then: Then,
}

struct Thread {
    context: Rc<Context>,
    state: Arc<State>,
    orders: Mailbox<Order>,
    /// Received orders.
    inbox: VecDeque<Order>,
    pipes: Pipes,
    /// By stream, in the order in which they were recorded: the events of a stream complete in that order.
    watched: HashMap<usize, VecDeque<Watched>>,
    /// When the events are looked at again.
    look_at: Instant,
    ending: bool,
}

/// The thread's function. Tells `opened` whether it could open the GPU.
pub(super) fn run(
    ordinal: u32,
    orders: Mailbox<Order>,
    state: Arc<State>,
    opened: &SyncSender<Result<GpuInfo, GpuError>>,
) {
    // Otherwise the kernel lengthens each pause by 50 us.
    let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1_000));
    let (mut thread, info) = match Thread::open(ordinal, orders, state) {
        Ok(opened) => opened,
        Err(e) => return drop(opened.send(Err(e))),
    };
    tracing::info!(gpu = ordinal, name = info.name, uuid = info.uuid_text(), "GPU opened");
    let _ = opened.send(Ok(info));
    // A panic must not leave its jobs open: their pulls could not end. Copies in flight go on, so those stay open.
    while std::panic::catch_unwind(AssertUnwindSafe(|| thread.run())).is_err() {
        thread.pipes.abandon();
        thread.become_unusable(GpuError::Os { what: "the GPU's thread", error: "it has panicked".into() });
    }
}

/// The function of the set-up thread: ends with the last handle. Tells `opened` whether it could open the GPU.
pub(super) fn set_up(ordinal: u32, calls: &Receiver<Setup>, opened: &SyncSender<Result<(), GpuError>>) {
    let context = match Context::open(ordinal) {
        Ok(context) => context,
        Err(e) => return drop(opened.send(Err(e))),
    };
    let _ = opened.send(Ok(()));
    for call in calls {
        // After a panic, its caller finds its channel closed.
        let _ = std::panic::catch_unwind(AssertUnwindSafe(|| call(&context)));
    }
}

impl Thread {
    fn open(ordinal: u32, orders: Mailbox<Order>, state: Arc<State>) -> Result<(Self, GpuInfo), GpuError> {
        let context = Rc::new(Context::open(ordinal)?);
        let mut info = context::describe(context.lib, ordinal)?;
        let pipes = Pipes::new(&context)?;
        info.kernel = pipes.no_kernel();
        let (inbox, watched, look_at) = (VecDeque::new(), HashMap::new(), Instant::now());
        let ending = false;
        Ok((Self { context, state, orders, inbox, pipes, watched, look_at, ending }, info))
    }

    fn run(&mut self) {
        let mut moved_at = Instant::now();
        loop {
            self.orders.take(&mut self.inbox);
            let mut moved = !self.inbox.is_empty();
            while let Some(order) = self.inbox.pop_front() {
                self.carry_out(order);
            }
            let (advanced, fatal) = self.pipes.advance(&self.context);
            moved |= advanced;
            if let Some(error) = fatal {
                self.become_unusable(error);
                moved = true;
            }
            moved |= self.look();
            if self.ending && self.pipes.is_idle() && self.watched.is_empty() {
                return;
            }
            if moved {
                moved_at = Instant::now();
            } else {
                self.rest(moved_at.elapsed());
            }
        }
    }

    fn carry_out(&mut self, order: Order) {
        match order {
            Order::Copy(job) => self.pipes.add(job),
            Order::Flush(ticket) if self.state.unusable.get().is_some() => ticket.fail(),
            Order::Flush(ticket) => match self.flush() {
                Ok(()) => drop(ticket),
                Err(e) => {
                    tracing::error!(gpu = self.context.ordinal, error = %e, "cannot flush the writes of NICs");
                    ticket.fail();
                }
            },
            Order::After { event, stream, then } => {
                let watched = Watched { event: event as CUevent, then };
                self.watched.entry(stream).or_default().push_back(watched);
                self.look_at = Instant::now();
            }
            Order::End => self.ending = true,
        }
    }

    fn flush(&self) -> Result<(), GpuError> {
        /// CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX and CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER.
        const CURRENT_CONTEXT: u32 = 0;
        const TO_OWNER: u32 = 100;
        let lib = self.context.lib;
        let Some(flush) = lib.cuFlushGPUDirectRDMAWrites else {
            return Err(GpuError::MissingSymbol { symbol: "cuFlushGPUDirectRDMAWrites" });
        };
        // SAFETY: the context is current.
        lib.check("cuFlushGPUDirectRDMAWrites", unsafe { flush(CURRENT_CONTEXT, TO_OWNER) })
    }

    /// Looks at the oldest event of each stream. Returns whether one was over.
    fn look(&mut self) -> bool {
        if self.watched.is_empty() || Instant::now() < self.look_at {
            return false;
        }
        let mut over = Vec::new();
        let lib = self.context.lib;
        let mut failed = None;
        for queue in self.watched.values_mut() {
            while let Some(first) = queue.front() {
                // SAFETY: the event exists until it is destroyed below.
                let code = unsafe { (lib.cuEventQuery)(first.event) };
                if code == NOT_READY {
                    break;
                }
                let result = lib.check("cuEventQuery", code);
                let Some(first) = queue.pop_front() else { break };
                // SAFETY: the event is ours, and nothing refers to it any more.
                let _ = unsafe { (lib.cuEventDestroy_v2)(first.event) };
                // An event may have become part of a graph capture, which concerns this event only.
                failed = failed.or_else(|| result.as_ref().err().filter(|e| is_fatal(e)).cloned());
                over.push((first.then, result));
            }
        }
        self.watched.retain(|_, queue| !queue.is_empty());
        self.look_at = Instant::now() + EVENT_PAUSE;
        let moved = !over.is_empty();
        for (then, result) in over {
            then(result);
        }
        if let Some(e) = failed {
            self.become_unusable(e);
        }
        moved
    }

    /// The driver begins nothing more in this context. Jobs in flight end when their events are over.
    fn become_unusable(&mut self, error: GpuError) {
        if self.state.unusable.set(error.clone()).is_ok() {
            stats::unusable(self.context.ordinal);
            tracing::error!(gpu = self.context.ordinal, %error, "the GPU is unusable in this process: restart it");
        }
        self.pipes.stop();
        for watched in std::mem::take(&mut self.watched).into_values().flatten() {
            (watched.then)(Err(error.clone()));
        }
    }

    /// Sleeps until there is an order, or for a pause if there is something to look at.
    fn rest(&mut self, idle: Duration) {
        let timeout = match (self.pipes.is_idle(), self.watched.is_empty()) {
            (true, true) => None,
            (false, _) if idle < SPIN => return std::thread::yield_now(),
            (false, _) => Some(PAUSE),
            (true, false) => Some(self.look_at.saturating_duration_since(Instant::now())),
        };
        if self.orders.about_to_sleep() {
            let timeout = timeout.map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: t.subsec_nanos().into() });
            // An error means a signal: the caller's loop looks again.
            let _ = poll(&mut [PollFd::new(&self.orders.fd(), PollFlags::IN)], timeout.as_ref());
        }
        self.orders.awake();
    }
}

/// All directions, as an index of pipes.
pub(super) const DIRECTIONS: [Direction; 3] = [Direction::ToGpu, Direction::ToHost, Direction::Between];
