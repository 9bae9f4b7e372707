//! The consumer's end of the local lane between host memory: it copies queued reads, a bounded number of bytes in each poll.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    time::Duration,
};

use kvferry_proto::{
    Attempt, Cause, FenceKind, FenceSlot, Grant, Lane, LaneCaps, LaneEvent, LaneKind, PoolLayout, Read,
};

use super::{
    owner::Owner,
    source::{QueuedRead, Source},
};
use crate::{lane::WakingLane, memory::Memory};

/// Most queued reads: the batch of one `process_vm_readv`.
const WINDOW_READS: usize = 1024;
/// Queued bytes above which no read is accepted: two polls' worth, so that a poll never runs out of work.
const WINDOW_BYTES: u64 = 4 << 20;
/// Bytes that one poll copies, in a few hundred microseconds, so that stops, other lanes and fences get their turn.
const POLL_BYTES: usize = 2 << 20;
/// Most queued fences; one poll reads all of them.
const WINDOW_FENCES: usize = 64;

/// A lane to a process on this host.
#[derive(Debug)]
pub(crate) struct LocalLane {
    owner: Owner,
    source: Source,
    remote: Arc<PoolLayout>,
    memory: Memory,
    attempts: Vec<AttemptState>,
    /// Reads to copy, in the order in which they were posted.
    queue: VecDeque<QueuedRead>,
    /// Bytes in `queue`.
    queued: u64,
    fences: VecDeque<(Attempt, FenceSlot)>,
    /// Events of calls other than `poll`.
    pending: Vec<LaneEvent>,
    /// Set once the lane is down.
    down: Option<Cause>,
    /// The owner of the lane has slept, so the peer may have ended unnoticed.
    slept: bool,
}

#[derive(Debug)]
struct AttemptState {
    attempt: Attempt,
    failed: bool,
}

impl LocalLane {
    /// `source` fits `remote`, which has been checked.
    pub(super) fn new(owner: Owner, source: Source, remote: Arc<PoolLayout>, memory: Memory) -> Self {
        Self {
            owner,
            source,
            remote,
            memory,
            attempts: Vec::new(),
            queue: VecDeque::with_capacity(WINDOW_READS),
            queued: 0,
            fences: VecDeque::with_capacity(WINDOW_FENCES),
            pending: Vec::new(),
            down: None,
            slept: true,
        }
    }

    /// Whether the peer's pool is mapped here, so that a copy takes no system call.
    #[cfg(test)]
    pub(crate) fn mapped(&self) -> bool {
        matches!(self.source, Source::Mapped { .. })
    }

    #[cfg(test)]
    pub(super) fn owner(&self) -> &Owner {
        &self.owner
    }

    fn is_open(&self, a: Attempt) -> bool {
        self.attempts.iter().any(|t| t.attempt == a && !t.failed)
    }

    /// Whether both ends of the read lie in their segments.
    fn fits(&self, r: &Read) -> bool {
        let segment = self.remote.segments.get(usize::from(r.src_segment));
        let there = segment.is_some_and(|&has| r.src_offset.checked_add(r.len).is_some_and(|end| end <= has));
        r.len > 0 && there && self.memory.at(r.dst_segment, r.dst_offset, r.len).is_ok()
    }

    /// Drops an attempt's queued work. No copy runs between two calls, so the attempt is quiet afterwards.
    fn forget(&mut self, a: Attempt) {
        self.queue.retain(|c| c.attempt != a);
        self.queued = self.queue.iter().map(|c| c.len).sum();
        self.fences.retain(|f| f.0 != a);
    }

    fn fail(&mut self, a: Attempt, cause: Cause) {
        self.forget(a);
        if let Some(t) = self.attempts.iter_mut().find(|t| t.attempt == a && !t.failed) {
            t.failed = true;
            self.pending.push(LaneEvent::Failed { attempt: a, cause });
        }
    }

    fn go_down(&mut self, cause: Cause) {
        if self.down.is_some() {
            return;
        }
        self.down = Some(cause);
        self.queue.clear();
        self.queued = 0;
        self.fences.clear();
        let open = self.attempts.iter().filter(|t| !t.failed);
        self.pending.extend(open.map(|t| LaneEvent::Failed { attempt: t.attempt, cause }));
        self.pending.push(LaneEvent::Down { cause });
        self.pending.extend(self.attempts.drain(..).map(|t| LaneEvent::Quiet { attempt: t.attempt }));
    }

    /// A system call on the peer's memory failed: a copy for attempt `a`, or a read of fence words (`None`).
    fn broke(&mut self, error: &io::Error, a: Option<Attempt>) {
        if error.raw_os_error() == Some(libc::ESRCH) {
            return self.go_down(Cause::PeerDown);
        }
        if let Some(cause) = self.owner.ended() {
            return self.go_down(cause);
        }
        match (error.raw_os_error(), a) {
            // These pages are unmapped on one side; another attempt may read other blocks.
            (Some(libc::EFAULT | libc::ENOMEM), Some(a)) => self.fail(a, Cause::LaneFailed),
            _ => {
                tracing::warn!(%error, "the local lane can no longer read the peer's memory");
                self.go_down(Cause::LaneFailed);
            }
        }
    }

    /// Reads the words of all queued fences, and then checks that their owner is alive.
    fn check_fences(&mut self, out: &mut Vec<LaneEvent>) {
        let mut words = [0; WINDOW_FENCES];
        let words = &mut words[..self.fences.len()];
        if let Err(e) = self.source.words(self.fences.iter().map(|f| f.1.slot), words) {
            return self.broke(&e, None);
        }
        // After the words: a process that is alive now was alive when they were read.
        if let Some(cause) = self.owner.ended() {
            return self.go_down(cause);
        }
        let fences = self.fences.drain(..).zip(words);
        out.extend(fences.map(|((attempt, f), word)| LaneEvent::Fence { attempt, chunk: f.chunk, word: *word }));
    }

    /// Removes `bytes` copied bytes from the front of the queue.
    fn advance(&mut self, bytes: usize, out: &mut Vec<LaneEvent>) {
        let mut bytes = bytes as u64;
        while let Some(c) = self.queue.front_mut() {
            let n = c.len.min(bytes);
            bytes -= n;
            self.queued -= n;
            c.len -= n;
            c.src_offset += n;
            c.dst_offset += n;
            if c.len > 0 {
                break;
            }
            let (a, k) = (c.attempt, c.chunk);
            self.queue.pop_front();
            match out.last_mut() {
                Some(LaneEvent::Done { attempt, chunk, reads }) if *attempt == a && *chunk == k => *reads += 1,
                _ => out.push(LaneEvent::Done { attempt: a, chunk: k, reads: 1 }),
            }
        }
    }
}

impl Lane for LocalLane {
    fn caps(&self) -> LaneCaps {
        LaneCaps {
            kind: LaneKind::Local,
            // Not a hard limit: a poll can stop in the middle of a read.
            max_read: 1 << 30,
            // One poll's copy, with a wide margin for a busy machine.
            quiet_bound: Duration::from_millis(5),
            fence: FenceKind::Posted,
        }
    }

    fn begin(&mut self, a: Attempt, _: Grant) {
        if let Some(cause) = self.down {
            self.pending.extend([LaneEvent::Failed { attempt: a, cause }, LaneEvent::Quiet { attempt: a }]);
        } else if !self.attempts.iter().any(|t| t.attempt == a) {
            self.attempts.push(AttemptState { attempt: a, failed: false });
        }
    }

    fn post(&mut self, a: Attempt, reads: &[Read]) -> usize {
        if !self.is_open(a) {
            return reads.len();
        }
        for (i, r) in reads.iter().enumerate() {
            if self.queue.len() >= WINDOW_READS || self.queued >= WINDOW_BYTES {
                return i;
            }
            if !self.fits(r) {
                self.fail(a, Cause::BadOffer);
                return reads.len();
            }
            self.queued += r.len;
            self.queue.push_back(QueuedRead {
                attempt: a,
                chunk: r.chunk,
                src_segment: r.src_segment,
                dst_segment: r.dst_segment,
                src_offset: r.src_offset,
                dst_offset: r.dst_offset,
                len: r.len,
            });
        }
        reads.len()
    }

    fn post_fence(&mut self, a: Attempt, f: FenceSlot) -> bool {
        if self.fences.len() >= WINDOW_FENCES {
            return false;
        }
        if self.is_open(a) {
            self.fences.push_back((a, f));
        }
        true
    }

    fn stop(&mut self, a: Attempt) {
        if let Some(i) = self.attempts.iter().position(|t| t.attempt == a) {
            self.attempts.swap_remove(i);
            self.forget(a);
            self.pending.push(LaneEvent::Quiet { attempt: a });
        }
    }

    fn kill(&mut self) {
        self.go_down(Cause::LaneFailed);
    }

    fn poll(&mut self, out: &mut Vec<LaneEvent>) {
        out.append(&mut self.pending);
        if self.down.is_some() {
            return;
        }
        if !self.fences.is_empty() {
            self.check_fences(out);
        } else if (std::mem::take(&mut self.slept) || self.queue.is_empty())
            // An idle lane is polled only when its descriptor woke the owner, and it would wake the owner again.
            && let Some(cause) = self.owner.ended()
        {
            self.go_down(cause);
        }
        let mut budget = POLL_BYTES;
        while let Some(front) = self.queue.front()
            && budget > 0
        {
            let a = front.attempt;
            match self.source.copy(&self.queue, &self.memory, budget) {
                Ok(0) => self.broke(&io::Error::from_raw_os_error(libc::EFAULT), Some(a)),
                Ok(n) => {
                    budget -= n;
                    self.advance(n, out);
                }
                Err(e) => self.broke(&e, Some(a)),
            }
        }
        out.append(&mut self.pending);
    }
}

impl WakingLane for LocalLane {
    fn arm(&mut self) -> io::Result<Option<BorrowedFd<'_>>> {
        if !(self.pending.is_empty() && self.queue.is_empty() && self.fences.is_empty()) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if self.down.is_some() {
            return Ok(None);
        }
        self.slept = true;
        Ok(Some(self.owner.either.as_fd()))
    }
}
