//! The consumer's end of the local lane between GPU memory: copies out of the owner's memory, which is mapped here, made by
//! the driver.
//!
//! Owns the mapping, and the list of jobs at the GPU's thread. Makes no driver call itself (promise *timely*). A copy cannot
//! be cancelled, so an attempt is quiet only when all its jobs are finished, and a lane whose jobs do not finish is wedged
//! (promise *quiet*). The fence word is read when a chunk's last job is finished, and then the owner's pidfd is checked, as
//! between host memory (promise *fresh*).
//!
//! A mapping keeps a dead owner's memory allocated, and a replacement could not start. So the lane gives it up when it goes
//! down, also while it is idle; the jobs keep it until they are finished.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use kvferry_proto::{Attempt, Cause, FenceKind, Grant, Lane, LaneCaps, LaneEvent, LaneKind, Read};
use rustix::{
    event::epoll,
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime},
};

use super::{owner::Owner, source::WordTable};
use crate::{
    lane::WakingLane,
    memory::{
        Memory,
        gpu::{CopyQueue, Direction, Imported, Piece, stats},
    },
};

/// Bytes in flight above which no read is accepted. The owner of the lane takes some 50 us to wake and post again, in which
/// a GPU copies about as much inside its memory; over PCIe 4 it takes 3 ms, a hundredth of the default copy bound.
const WINDOW: u64 = 64 << 20;
/// Longest read: the window is exceeded by less than this.
const MAX_READ: u64 = 8 << 20;
/// Most jobs in flight. The GPU's thread takes 256 from one lane.
const MOST_JOBS: usize = 128;
/// Most copies of a job: one list of the copy kernel.
const MOST_PIECES: usize = 4096;
/// What [`Lane::stop`] may take beside the copies: two turns of the owner, with a wide margin for a busy machine.
const MARGIN: Duration = Duration::from_millis(5);

/// The memory at both ends. Every job keeps it.
struct Ends {
    imported: Imported,
    memory: Memory,
}

impl Ends {
    /// Appends the copies of a read. Fails when either end does not have all of it.
    fn pieces(&self, r: &Read, into: &mut Vec<Piece>) -> io::Result<()> {
        if r.len == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.memory.address(r.dst_segment, r.dst_offset, r.len)?;
        let (src, dst) = ((r.src_segment, r.src_offset), (&self.memory, r.dst_segment, r.dst_offset));
        self.imported.pieces(src, dst, r.len, into)
    }
}

/// Reads of one chunk that were submitted together.
#[derive(Debug)]
struct Job {
    /// Its number in the queue.
    number: u64,
    attempt: Attempt,
    chunk: u32,
    reads: u32,
    bytes: u64,
    /// The chunk's last read is among them. Jobs finish in order, so all of the chunk's reads are done with it.
    last: bool,
}

#[derive(Debug)]
struct AttemptState {
    attempt: Attempt,
    /// Word in the owner's fence table.
    slot: u32,
    /// Jobs that are not finished.
    jobs: usize,
    failed: bool,
    stopped: Option<Instant>,
}

impl AttemptState {
    fn is_open(&self) -> bool {
        !self.failed && self.stopped.is_none()
    }
}

/// A lane to a process on this host, between GPU memory.
pub(crate) struct GpuLane {
    owner: Owner,
    table: WordTable,
    /// `None` once the lane is down.
    ends: Option<Arc<Ends>>,
    queue: CopyQueue,
    copy_bound: Duration,
    attempts: Vec<AttemptState>,
    /// Not finished, in the order in which they were submitted.
    jobs: VecDeque<Job>,
    /// Bytes in `jobs`.
    bytes: u64,
    /// Attempt, chunk and slot of fences whose word is to be read: scratch space of a poll.
    due: Vec<(Attempt, u32, u32)>,
    words: Vec<u64>,
    /// Events of calls other than `poll`.
    pending: Vec<LaneEvent>,
    down: Option<Cause>,
    /// When a lane that is down is wedged unless its jobs are finished.
    wedged_at: Option<Instant>,
    wedged: bool,
    wake: Wake,
}

impl GpuLane {
    /// A lane out of `imported` into `memory`, copying through `queue`, which is the GPU's of `memory`.
    pub(super) fn new(
        owner: Owner,
        table: WordTable,
        (imported, memory): (Imported, Memory),
        queue: CopyQueue,
        copy_bound: Duration,
    ) -> io::Result<Self> {
        let wake = Wake::new(&owner, &queue)?;
        Ok(Self {
            owner,
            table,
            ends: Some(Arc::new(Ends { imported, memory })),
            queue,
            copy_bound,
            attempts: Vec::new(),
            jobs: VecDeque::with_capacity(MOST_JOBS),
            bytes: 0,
            due: Vec::with_capacity(MOST_JOBS),
            words: Vec::with_capacity(MOST_JOBS),
            pending: Vec::new(),
            down: None,
            wedged_at: None,
            wedged: false,
            wake,
        })
    }

    fn open(&mut self, a: Attempt) -> Option<&mut AttemptState> {
        self.attempts.iter_mut().find(|t| t.attempt == a && t.is_open())
    }

    fn fail(&mut self, a: Attempt, cause: Cause) {
        if let Some(t) = self.open(a) {
            t.failed = true;
            self.pending.push(LaneEvent::Failed { attempt: a, cause });
        }
    }

    /// Gives up the mapping, fails every attempt, and reports those quiet that have no job in flight.
    fn go_down(&mut self, cause: Cause) {
        if self.down.is_some() {
            return;
        }
        self.down = Some(cause);
        self.ends = None;
        self.due.clear();
        self.wake.forget_owner(&self.owner);
        let open = self.attempts.iter().filter(|t| t.is_open());
        self.pending.extend(open.map(|t| LaneEvent::Failed { attempt: t.attempt, cause }));
        self.pending.push(LaneEvent::Down { cause });
        // The bound counts from the first stop: the pull has waited for a part of it already.
        let since = self.attempts.iter().filter(|t| t.jobs > 0).filter_map(|t| t.stopped).min();
        self.wedged_at = since.unwrap_or_else(Instant::now).checked_add(self.copy_bound);
        let pending = &mut self.pending;
        self.attempts.retain(|t| {
            if t.jobs == 0 {
                pending.push(LaneEvent::Quiet { attempt: t.attempt });
            }
            t.jobs > 0
        });
    }

    /// A job failed, or the GPU became unusable: nothing can be copied any more.
    fn broke(&mut self) {
        if self.down.is_none() {
            tracing::warn!("the GPU cannot copy the peer's memory: the local lane ends");
            self.go_down(Cause::LaneFailed);
        }
    }

    /// Takes finished jobs off the list.
    fn reap(&mut self, out: &mut Vec<LaneEvent>) {
        let (in_place, failed) = self.queue.finished();
        self.take_off(in_place, out);
        if failed {
            self.broke();
            // The other jobs have ended too.
            self.take_off(u64::MAX, out);
        }
    }

    /// Takes the jobs up to this number off the list. Unless the lane is down, their bytes are in place.
    fn take_off(&mut self, up_to: u64, out: &mut Vec<LaneEvent>) {
        while self.jobs.front().is_some_and(|job| job.number <= up_to)
            && let Some(job) = self.jobs.pop_front()
        {
            self.bytes -= job.bytes;
            let Some(i) = self.attempts.iter().position(|t| t.attempt == job.attempt) else { continue };
            let t = &mut self.attempts[i];
            t.jobs -= 1;
            if t.is_open() && self.down.is_none() {
                stats::landed(stats::Landing::Ipc, job.bytes);
                let (a, k, n) = (job.attempt, job.chunk, job.reads);
                match out.last_mut() {
                    Some(LaneEvent::Done { attempt, chunk, reads }) if *attempt == a && *chunk == k => *reads += n,
                    _ => out.push(LaneEvent::Done { attempt: a, chunk: k, reads: n }),
                }
                if job.last {
                    self.due.push((a, k, t.slot));
                }
            } else if t.jobs == 0 && (t.stopped.is_some() || self.down.is_some()) {
                self.attempts.swap_remove(i);
                self.pending.push(LaneEvent::Quiet { attempt: job.attempt });
            }
        }
    }

    /// Reads the words of all due fences, and then checks that their owner is alive.
    fn check_fences(&mut self, out: &mut Vec<LaneEvent>) {
        if !self.due.is_empty() {
            self.words.clear();
            self.words.resize(self.due.len(), 0);
            self.table.load(self.due.iter().map(|d| d.2), &mut self.words);
        }
        // After the words: a process that is alive now was alive when they were read.
        if let Some(cause) = self.owner.ended() {
            return self.go_down(cause);
        }
        let fences = self.due.drain(..).zip(&self.words);
        out.extend(fences.map(|((attempt, chunk, _), &word)| LaneEvent::Fence { attempt, chunk, word }));
    }

    /// After this the lane reports nothing more.
    fn check_wedged(&mut self) {
        if self.jobs.is_empty() || self.wedged_at.is_none_or(|t| Instant::now() < t) {
            return;
        }
        self.wedged = true;
        self.wake.forget_all(&self.queue);
        let (jobs, bytes) = (self.jobs.len(), self.bytes);
        tracing::error!(jobs, bytes, bound = ?self.copy_bound, "copies of GPU memory do not end: see dmesg for Xid errors");
        self.pending.push(LaneEvent::Wedged);
    }
}

impl Lane for GpuLane {
    fn caps(&self) -> LaneCaps {
        LaneCaps {
            kind: LaneKind::Local,
            max_read: MAX_READ,
            quiet_bound: self.copy_bound.saturating_add(MARGIN),
            fence: FenceKind::Own,
        }
    }

    fn begin(&mut self, a: Attempt, grant: Grant) {
        if let Some(cause) = self.down {
            self.pending.extend([LaneEvent::Failed { attempt: a, cause }, LaneEvent::Quiet { attempt: a }]);
        } else if !self.attempts.iter().any(|t| t.attempt == a) {
            let (slot, stopped) = (grant.slot, None);
            self.attempts.push(AttemptState { attempt: a, slot, jobs: 0, failed: false, stopped });
        }
    }

    fn post(&mut self, a: Attempt, reads: &[Read]) -> usize {
        let open = self.open(a).is_some();
        let Some(ends) = self.ends.clone().filter(|_| open) else { return reads.len() };
        if self.jobs.len() >= MOST_JOBS || self.bytes >= WINDOW {
            return 0;
        }
        let mut pieces = Vec::with_capacity(reads.len().min(MOST_PIECES));
        let (mut taken, mut bytes) = (0, 0);
        for r in reads {
            if self.bytes + bytes >= WINDOW || pieces.len() >= MOST_PIECES {
                break;
            }
            if ends.pieces(r, &mut pieces).is_err() {
                self.fail(a, Cause::BadOffer);
                return reads.len();
            }
            taken += 1;
            bytes += r.len;
        }
        let Some(chunk) = reads.first().map(|r| r.chunk) else { return 0 };
        match self.queue.submit(Direction::Between, pieces, ends) {
            Some(number) => {
                let (last, reads) = (taken == reads.len(), taken as u32);
                self.jobs.push_back(Job { number, attempt: a, chunk, reads, bytes, last });
                self.bytes += bytes;
                if let Some(t) = self.open(a) {
                    t.jobs += 1;
                }
                taken
            }
            None if self.queue.finished().1 => {
                self.broke();
                reads.len()
            }
            None => 0,
        }
    }

    fn stop(&mut self, a: Attempt) {
        let Some(i) = self.attempts.iter().position(|t| t.attempt == a) else { return };
        if self.attempts[i].jobs == 0 {
            self.attempts.swap_remove(i);
            self.pending.push(LaneEvent::Quiet { attempt: a });
        } else {
            self.attempts[i].stopped.get_or_insert_with(Instant::now);
        }
    }

    fn kill(&mut self) {
        self.go_down(Cause::LaneFailed);
    }

    fn poll(&mut self, out: &mut Vec<LaneEvent>) {
        out.append(&mut self.pending);
        if self.wedged {
            return;
        }
        self.wake.woken();
        self.reap(out);
        if self.down.is_none() {
            self.check_fences(out);
        } else {
            self.check_wedged();
        }
        out.append(&mut self.pending);
    }
}

impl WakingLane for GpuLane {
    fn arm(&mut self) -> io::Result<Option<BorrowedFd<'_>>> {
        if !self.pending.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if self.wedged || (self.down.is_some() && self.jobs.is_empty()) {
            return Ok(None);
        }
        if !self.jobs.is_empty() && !self.queue.about_to_sleep() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.wake.wake_at(self.wedged_at)?;
        Ok(Some(self.wake.all.as_fd()))
    }
}

/// The descriptor that the lane's owner sleeps on: readable when the process at the other end has ended, when jobs have
/// finished, and when the time has come at which the lane is wedged.
struct Wake {
    all: OwnedFd,
    timer: OwnedFd,
    set: Option<Instant>,
}

impl Wake {
    fn new(owner: &Owner, queue: &CopyQueue) -> io::Result<Self> {
        let all = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        for fd in [owner.either.as_fd(), queue.fd(), timer.as_fd()] {
            epoll::add(&all, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        }
        Ok(Self { all, timer, set: None })
    }

    /// An owner that has ended stays readable.
    fn forget_owner(&self, owner: &Owner) {
        // It was added in `new`, and is removed once.
        let _ = epoll::delete(&self.all, &owner.either);
    }

    fn forget_all(&self, queue: &CopyQueue) {
        // As above.
        let _ = epoll::delete(&self.all, queue.fd());
        let _ = epoll::delete(&self.all, &self.timer);
    }

    fn wake_at(&mut self, when: Option<Instant>) -> io::Result<()> {
        let Some(when) = when.filter(|_| self.set.is_none()) else { return Ok(()) };
        // Zero would turn the timer off.
        let left = when.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let it_value = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        self.set = Some(when);
        Ok(())
    }

    fn woken(&mut self) {
        if self.set.take_if(|t| *t <= Instant::now()).is_some() {
            // Fails if the timer has not run out yet.
            let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        }
    }
}
