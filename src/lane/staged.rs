//! The lane into GPU memory that sockets and NICs cannot write: any lane, into a pinned ring in host memory, and copies from
//! there into the pool.
//!
//! [`Staged`] decides what is copied when, and what counts; the simulation runs it too. This file gives it the GPU's queue, a
//! clock for the end of copies, and a descriptor to sleep on.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use kvferry_proto::{
    Attempt, FenceSlot, Grant, Lane, LaneCaps, LaneEvent, Read,
    staging::{Copier, Finished, Ring, Staged, StagedCopy},
};
use rustix::{
    event::epoll,
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime},
};

use super::WakingLane;
use crate::memory::gpu::{Direction, PinnedRing, RingQueue, stats};

/// Wraps a lane that reads into [`PinnedRing::memory`].
pub(crate) fn stage(ring: &PinnedRing, inner: Box<dyn WakingLane>) -> io::Result<StagedLane> {
    let copier = RingCopier { copies: ring.queue(Direction::ToGpu)?, sizes: VecDeque::new() };
    StagedLane::new(inner, copier, ring.slots().clone(), ring.config().copy_bound)
}

/// Copies from the ring into the pool.
struct RingCopier {
    copies: RingQueue,
    /// Number and bytes of each job that is not finished.
    sizes: VecDeque<(u64, u64)>,
}

impl Copier for RingCopier {
    fn submit(&mut self, copies: &[StagedCopy]) -> Option<u64> {
        let piece = |c: &StagedCopy| self.copies.piece(c.ring_offset, (c.segment, c.offset), c.len).ok();
        // Every copy was checked when its read was posted.
        let pieces = copies.iter().filter_map(piece).collect();
        let number = self.copies.submit(pieces)?;
        self.sizes.push_back((number, copies.iter().map(|c| c.len).sum()));
        Some(number)
    }

    fn finished(&mut self) -> Finished {
        let (up_to, failed) = self.copies.queue.finished();
        while let Some(&(number, bytes)) = self.sizes.front()
            && number <= up_to
        {
            self.sizes.pop_front();
            stats::landed(stats::Landing::Ring, bytes);
        }
        Finished { up_to, failed }
    }
}

/// A lane through the ring.
pub(crate) struct StagedLane {
    staged: Staged<Box<dyn WakingLane>, RingCopier>,
    /// The inner lane's descriptor, the queue's and the timer, in one.
    epoll: OwnedFd,
    timer: OwnedFd,
    /// The inner lane's descriptor, while it is in the set.
    watched: Option<OwnedFd>,
    /// When copies that are still running are given up.
    give_up: Option<Instant>,
}

impl StagedLane {
    fn new(inner: Box<dyn WakingLane>, copier: RingCopier, ring: Arc<Ring>, bound: Duration) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &timer, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        epoll::add(&epoll, copier.copies.queue.fd(), epoll::EventData::new_u64(1), epoll::EventFlags::IN)?;
        let staged = Staged::new(inner, copier, ring, bound);
        Ok(Self { staged, epoll, timer, watched: None, give_up: None })
    }
}

impl Lane for StagedLane {
    fn caps(&self) -> LaneCaps {
        self.staged.caps()
    }

    fn degraded(&self) -> bool {
        self.staged.degraded()
    }

    fn begin(&mut self, a: Attempt, grant: Grant) {
        self.staged.begin(a, grant);
    }

    fn post(&mut self, a: Attempt, reads: &[Read]) -> usize {
        let pool = &self.staged.copier_mut().copies.pool;
        let fits = |r: &Read| pool.address(r.dst_segment, r.dst_offset, r.len).is_ok();
        // The inner lane checks its own end, which is the ring.
        if !reads.iter().all(fits) {
            self.staged.refuse(a);
            return reads.len();
        }
        self.staged.post(a, reads)
    }

    fn post_fence(&mut self, a: Attempt, f: FenceSlot) -> bool {
        self.staged.post_fence(a, f)
    }

    fn stop(&mut self, a: Attempt) {
        self.staged.stop(a);
    }

    fn kill(&mut self) {
        self.give_up.get_or_insert_with(|| Instant::now() + self.staged.caps().quiet_bound / 2);
        self.staged.kill();
    }

    fn poll(&mut self, out: &mut Vec<LaneEvent>) {
        self.staged.poll(out);
        if self.give_up.is_some_and(|t| t <= Instant::now()) && self.staged.copies_outstanding() {
            // Once: the queue's descriptor tells if they end after all.
            self.give_up = Some(Instant::now() + Duration::from_secs(86_400));
            self.staged.wedge();
            self.staged.poll(out);
        }
        // Fails while the timer has not run out.
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
    }
}

impl WakingLane for StagedLane {
    fn arm(&mut self) -> io::Result<Option<BorrowedFd<'_>>> {
        let outstanding = self.staged.copies_outstanding();
        if self.staged.has_events() || (self.staged.waits_for_room() && !outstanding) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let inner = self.staged.inner_mut().arm()?;
        let idle = inner.is_none() && !outstanding;
        match (inner, &self.watched) {
            (Some(fd), None) => {
                // A descriptor of its own for the same file: the lane's may be closed when it is to be removed.
                let fd = rustix::io::fcntl_dupfd_cloexec(fd, 0)?;
                epoll::add(&self.epoll, &fd, epoll::EventData::new_u64(2), epoll::EventFlags::IN)?;
                self.watched = Some(fd);
            }
            // A lane that is down stays readable: its owner would not sleep while copies are running.
            (None, Some(fd)) => {
                epoll::delete(&self.epoll, fd)?;
                self.watched = None;
            }
            _ => {}
        }
        if outstanding && !self.staged.copier_mut().copies.queue.about_to_sleep() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if let Some(at) = self.give_up.filter(|_| outstanding) {
            // Zero would turn the timer off.
            let left = at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
            let value = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
            timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        }
        Ok((!idle).then(|| self.epoll.as_fd()))
    }
}
