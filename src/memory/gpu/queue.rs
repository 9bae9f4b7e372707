//! Copies and flushes that one lane or server submits to a GPU's thread, and the news of their end.
//!
//! A ticket is the number of a job. The jobs of one queue finish in order, so one number tells which are finished.

use std::{
    any::Any,
    fmt, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::{Context, error::GpuError, handle::Gpu};
use crate::{config::CopyMethod, memory::Memory};

/// Most jobs of one queue that are not finished. A lane that has more to copy waits for its own jobs, and the GPU's thread
/// gets a bounded queue from each lane.
const MOST_JOBS: u64 = 256;

/// The kind of memory at both ends of a job's copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From host memory to the GPU.
    ToGpu,
    /// From the GPU to host memory.
    ToHost,
    /// Inside the GPU, or from another GPU's memory that is mapped here.
    Between,
}

/// One range to copy. Both ends were checked against their memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(super) src: u64,
    pub(super) dst: u64,
    pub(super) len: u64,
}

impl Piece {
    /// `len` bytes from one memory's `(segment, offset)` to another's. Fails when either does not have them.
    pub(crate) fn new(src: (&Memory, u16, u64), dst: (&Memory, u16, u64), len: u64) -> io::Result<Self> {
        Ok(Self { src: src.0.address(src.1, src.2, len)?, dst: dst.0.address(dst.1, dst.2, len)?, len })
    }

    /// `len` bytes at an address of a mapping that the caller has checked them against.
    pub(super) fn from_mapped(src: u64, dst: (&Memory, u16, u64), len: u64) -> io::Result<Self> {
        Ok(Self { src, dst: dst.0.address(dst.1, dst.2, len)?, len })
    }
}

/// Owns memory that a job touches.
pub(crate) type Keep = Arc<dyn Any + Send + Sync>;

/// Work for a GPU's thread.
pub(super) enum Order {
    /// Copy, in this order, all or nothing counted.
    Copy(CopyOrder),
    /// Make earlier writes of NICs visible.
    Flush(Ticket),
    /// Call `then` when the event has completed, or with the error that keeps it from completing.
    After { event: usize, stream: usize, then: Then },
    /// No handle is left: end when everything is done.
    End,
}

/// Calls that set something up or take it down, for the GPU's set-up thread.
pub(super) type Setup = Box<dyn FnOnce(&Context) + Send>;

/// Called on the GPU's thread when an event is over; it must not block.
pub(super) type Then = Box<dyn FnOnce(Result<(), GpuError>) + Send>;

/// One job of copies.
pub(super) struct CopyOrder {
    pub direction: Direction,
    pub pieces: Vec<Piece>,
    pub method: CopyMethod,
    pub ticket: Ticket,
    pub submitted: Instant,
}

/// The place to report a job's end to. Reports it when dropped, so that no job stays open whatever happens to it.
pub(super) struct Ticket {
    progress: Arc<Progress>,
    number: u64,
    /// What the job touches stays alive until its end.
    _keep: Keep,
}

impl Ticket {
    /// The job failed. Nothing of it is written any more.
    pub(super) fn fail(self) {
        // The jobs of a queue end in order, so the first one that fails has the lowest number.
        let _ = self.progress.failed.compare_exchange(0, self.number, Ordering::AcqRel, Ordering::Acquire);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.progress.finished.fetch_max(self.number, Ordering::AcqRel);
        if self.progress.asleep.swap(false, Ordering::SeqCst) {
            // The counter cannot overflow: it is written once per sleep.
            let _ = rustix::io::write(&self.progress.wake, &1u64.to_ne_bytes());
        }
    }
}

#[derive(Debug)]
struct Progress {
    /// Jobs that have ended.
    finished: AtomicU64,
    /// The first job that failed; 0: none.
    failed: AtomicU64,
    /// The owner sleeps, or is about to.
    asleep: AtomicBool,
    wake: OwnedFd,
}

/// One lane's or server's way to a GPU's thread. Has one owner thread.
pub(crate) struct CopyQueue {
    gpu: Gpu,
    method: CopyMethod,
    progress: Arc<Progress>,
    submitted: u64,
    /// The number of finished jobs that the owner has seen.
    seen: u64,
}

impl CopyQueue {
    /// A queue for copies by this method, in one direction, or for flushes.
    pub(crate) fn new(gpu: &Gpu, method: CopyMethod) -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (finished, failed, asleep) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
        let progress = Arc::new(Progress { finished, failed, asleep, wake });
        Ok(Self { gpu: gpu.clone(), method, progress, submitted: 0, seen: 0 })
    }

    fn has_failed(&self) -> bool {
        self.progress.failed.load(Ordering::Acquire) != 0 || self.gpu.check().is_err()
    }

    fn ticket(&mut self, keep: Keep) -> Option<Ticket> {
        if self.submitted - self.progress.finished.load(Ordering::Acquire) >= MOST_JOBS || self.has_failed() {
            return None;
        }
        self.submitted += 1;
        Some(Ticket { progress: self.progress.clone(), number: self.submitted, _keep: keep })
    }

    /// Submits a job; returns its number. `keep` owns the memory at both ends, and lives until the job has ended. `None`: the
    /// queue is full, or the GPU unusable (see [`CopyQueue::finished`]).
    pub(crate) fn submit(&mut self, direction: Direction, pieces: Vec<Piece>, keep: Keep) -> Option<u64> {
        let ticket = self.ticket(keep)?;
        let (method, submitted) = (self.method, Instant::now());
        self.gpu.send(Order::Copy(CopyOrder { direction, pieces, method, ticket, submitted }));
        Some(self.submitted)
    }

    /// Submits a flush of NICs' writes; returns its number. `None` as for [`CopyQueue::submit`].
    pub(crate) fn flush(&mut self) -> Option<u64> {
        let ticket = self.ticket(Arc::new(()))?;
        self.gpu.send(Order::Flush(ticket));
        Some(self.submitted)
    }

    /// The number of jobs whose bytes are in place, and whether the queue has failed: a job failed or the GPU is unusable, and
    /// no job writes any more. Jobs after that number are then abandoned. Clears the descriptor.
    pub(crate) fn finished(&mut self) -> (u64, bool) {
        let mut count = [0; 8];
        // Fails if nothing was written.
        let _ = rustix::io::read(&self.progress.wake, &mut count);
        self.seen = self.progress.finished.load(Ordering::Acquire);
        // After the number: a job that failed is then told with it.
        match self.progress.failed.load(Ordering::Acquire) {
            0 => (self.seen, self.seen == self.submitted && self.gpu.check().is_err()),
            first => (self.seen.min(first - 1), self.seen == self.submitted),
        }
    }

    /// Number of jobs that the owner has not seen finished.
    pub(crate) fn outstanding(&self) -> u64 {
        self.submitted - self.seen
    }

    /// The owner is about to sleep on [`CopyQueue::fd`]. `false`: there is news, so it must not.
    pub(crate) fn about_to_sleep(&self) -> bool {
        self.progress.asleep.store(true, Ordering::SeqCst);
        if self.progress.finished.load(Ordering::SeqCst) == self.seen {
            return true;
        }
        self.progress.asleep.store(false, Ordering::SeqCst);
        false
    }

    /// Waits until every job is finished, for `timeout` at most. `false`: one is not.
    pub(crate) fn wait(&mut self, timeout: Duration) -> bool {
        let until = Instant::now() + timeout;
        loop {
            self.finished();
            let left = until.saturating_duration_since(Instant::now());
            if self.outstanding() == 0 || left.is_zero() {
                return self.outstanding() == 0;
            }
            if self.about_to_sleep() {
                let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
                // An error means a signal: the loop looks again.
                let _ = poll(&mut [PollFd::new(&self.progress.wake, PollFlags::IN)], Some(&left));
            }
        }
    }

    /// Readable when a job has finished while the owner slept.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.progress.wake.as_fd()
    }
}

impl fmt::Debug for CopyQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CopyQueue")
            .field("submitted", &self.submitted)
            .field("seen", &self.seen)
            .finish_non_exhaustive()
    }
}
