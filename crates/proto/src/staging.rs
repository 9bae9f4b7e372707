//! The staged lane: reads for GPU memory that sockets and NICs cannot write.
//!
//! A staged lane wraps any lane. The inner lane reads into slots of a pinned [`Ring`] in host memory; once the bytes have
//! landed, a [`Copier`] moves them to their place. A read is done when its copy is finished, and an attempt is quiet when
//! the inner lane is quiet and none of its copies is running (promise *quiet*: a copy cannot be cancelled). Does no I/O and
//! reads no clock: the wrapper of a real lane sleeps, and calls [`Staged::wedge`] in time.

mod attempt;
mod batch;
mod copier;
mod ring;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use crate::{
    Attempt, Cause, FenceKind, FenceSlot, Grant, Lane, LaneCaps, LaneEvent, Read,
    sabotage::{Bug, planted},
};

use self::{
    attempt::{AttemptState, Job},
    batch::{Batches, Verdict},
};
pub use self::{
    copier::{Copier, Finished, StagedCopy},
    ring::Ring,
};

/// Start of each read in a slot, in bytes: the alignment of the widest load of a copy kernel.
const ALIGN: u64 = 16;

/// A lane that reads through a ring.
pub struct Staged<L, C> {
    inner: L,
    copier: C,
    ring: Arc<Ring>,
    bound: Duration,
    /// The owner posts the fences of the inner lane.
    fenced_by_owner: bool,
    attempts: BTreeMap<Attempt, AttemptState>,
    batches: Batches,
    /// Batches that have landed, in order, for the copier.
    landed: VecDeque<usize>,
    jobs: VecDeque<Job>,
    /// Slots that this lane holds.
    held: usize,
    /// Takes no reads any more: killed, down, wedged, or its copier failed.
    closed: bool,
    killed: bool,
    down: bool,
    wedged: bool,
    copier_failed: bool,
    /// Events of calls other than `poll`.
    pending: Vec<LaneEvent>,
    /// Scratch space, so that a call allocates nothing.
    events: Vec<LaneEvent>,
    reads: Vec<Read>,
    spare: Vec<Vec<u32>>,
}

impl<L: Lane, C: Copier> Staged<L, C> {
    /// Wraps `inner`, whose local memory is the memory of `ring` as segment 0. `bound` is the longest time that copies may
    /// take; see [`Staged::wedge`].
    pub fn new(inner: L, copier: C, ring: Arc<Ring>, bound: Duration) -> Self {
        Self {
            fenced_by_owner: inner.caps().fence == FenceKind::Posted,
            inner,
            copier,
            ring,
            bound,
            attempts: BTreeMap::new(),
            batches: Batches::default(),
            landed: VecDeque::new(),
            jobs: VecDeque::new(),
            held: 0,
            closed: false,
            killed: false,
            down: false,
            wedged: false,
            copier_failed: false,
            pending: Vec::new(),
            events: Vec::new(),
            reads: Vec::new(),
            spare: Vec::new(),
        }
    }

    /// Fails an attempt whose reads do not fit local memory.
    pub fn refuse(&mut self, a: Attempt) {
        self.fail_later(a, Cause::BadOffer);
    }

    /// The inner lane, to arm it.
    pub fn inner_mut(&mut self) -> &mut L {
        &mut self.inner
    }

    /// The copier, to arm it.
    pub fn copier_mut(&mut self) -> &mut C {
        &mut self.copier
    }

    /// Whether [`Lane::poll`] has events at once: the owner must not sleep.
    pub fn has_events(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Whether landed data waits for room in the copier: the owner must poll again when there may be some.
    pub fn waits_for_room(&self) -> bool {
        !self.landed.is_empty()
    }

    /// Whether copies are submitted and not finished.
    pub fn copies_outstanding(&self) -> bool {
        !self.jobs.is_empty()
    }

    /// Gives up waiting for copies. Call it when half of [`LaneCaps::quiet_bound`] has passed since [`Lane::kill`] and
    /// [`Staged::copies_outstanding`]. The next poll reports `Wedged`, unless this lane is wedged already, and its slots are
    /// lost. If the copies finish after all, `Quiet` of their attempts still follows.
    pub fn wedge(&mut self) {
        if self.jobs.is_empty() {
            return;
        }
        if !self.killed {
            self.kill();
        }
        self.lose_slots();
        if !std::mem::replace(&mut self.wedged, true) {
            self.pending.push(LaneEvent::Wedged);
        }
    }

    /// Writes the reads that fit into the ring to `self.reads`, with their places in it. None is longer than a slot.
    fn place(&mut self, i: usize, reads: &[Read]) {
        let slot_bytes = self.ring.slot_bytes();
        self.reads.clear();
        let Some(b) = self.batches.get_mut(i) else { return };
        for r in reads {
            let mut at = b.used.next_multiple_of(ALIGN);
            if b.slots.is_empty() || at + r.len > slot_bytes {
                let Some(slot) = self.ring.take(self.held) else { break };
                self.held += 1;
                b.slots.push(slot);
                at = 0;
            }
            b.used = at + r.len;
            let dst_offset = b.slots.last().map_or(0, |s| u64::from(*s)) * slot_bytes + at;
            b.push(r, dst_offset);
            let chunk = if self.fenced_by_owner { r.chunk } else { i as u32 };
            self.reads.push(Read { dst_segment: 0, dst_offset, chunk, ..*r });
        }
    }

    /// Takes back the places of reads that the inner lane refused: those after the first `taken`.
    fn take_back(&mut self, i: usize, taken: usize) {
        let slot_bytes = self.ring.slot_bytes();
        let Some(b) = self.batches.get_mut(i) else { return };
        b.copies.truncate(b.copies.len() - (self.reads.len() - taken));
        // A batch without copies holds no slot: its slots go with its jobs.
        let last = b.copies.last();
        let keep = last.and_then(|c| b.slots.iter().position(|s| u64::from(*s) == c.ring_offset / slot_bytes));
        let keep = keep.map_or(0, |at| at + 1);
        b.used = last.map_or(0, |c| c.ring_offset % slot_bytes + c.len);
        let mut refused = self.spare.pop().unwrap_or_default();
        refused.extend(b.slots.drain(keep..));
        self.free(refused);
    }

    /// Frees slots of this lane.
    fn free(&mut self, mut slots: Vec<u32>) {
        self.held -= slots.len();
        self.ring.give_back(&mut slots);
        self.spare.push(slots);
    }

    /// Gives up all slots of this lane: they may be written or read indefinitely.
    fn lose_slots(&mut self) {
        self.ring.lose(std::mem::take(&mut self.held));
        self.batches.all().for_each(|b| b.slots.clear());
        self.jobs.iter_mut().for_each(|j| j.slots.clear());
        self.attempts.values_mut().for_each(|t| t.kept.clear());
    }

    /// Takes no reads any more, and submits no job.
    fn close(&mut self) {
        self.closed = true;
        self.attempts.values_mut().for_each(|t| t.closed = true);
    }

    fn fail(&mut self, a: Attempt, cause: Cause, out: &mut Vec<LaneEvent>) {
        if let Some(t) = self.attempts.get_mut(&a) {
            t.closed = true;
            if !std::mem::replace(&mut t.failed, true) {
                out.push(LaneEvent::Failed { attempt: a, cause });
            }
        }
    }

    /// Fails an attempt in a call other than `poll`.
    fn fail_later(&mut self, a: Attempt, cause: Cause) {
        let mut pending = std::mem::take(&mut self.pending);
        self.fail(a, cause, &mut pending);
        self.pending = pending;
    }

    fn go_down(&mut self, cause: Cause, out: &mut Vec<LaneEvent>) {
        self.closed = true;
        if !std::mem::replace(&mut self.down, true) {
            out.push(LaneEvent::Down { cause });
        }
    }

    /// Handles an event of the inner lane.
    fn pass(&mut self, event: LaneEvent, out: &mut Vec<LaneEvent>) {
        match event {
            LaneEvent::Down { cause } => return self.go_down(cause, out),
            LaneEvent::Wedged => {
                self.close();
                self.lose_slots();
                if !std::mem::replace(&mut self.wedged, true) {
                    out.push(LaneEvent::Wedged);
                }
                return;
            }
            _ => {}
        }
        if !event.attempt().is_some_and(|a| self.attempts.contains_key(&a)) {
            return;
        }
        match event {
            LaneEvent::Done { attempt, chunk, reads } => self.read(attempt, chunk, reads, out),
            LaneEvent::Failed { attempt, cause } => self.fail(attempt, cause, out),
            LaneEvent::Quiet { attempt } => self.inner_quiet(attempt, out),
            // Posted after the chunk's last `Done`, so all its jobs are finished.
            e @ (LaneEvent::Fence { .. } | LaneEvent::Again { .. }) if self.fenced_by_owner => out.push(e),
            LaneEvent::Fence { attempt, chunk, word } => self.fenced(attempt, chunk, Verdict::Word(word), out),
            LaneEvent::Again { attempt, chunk } => self.fenced(attempt, chunk, Verdict::Again, out),
            LaneEvent::Down { .. } | LaneEvent::Wedged => {}
        }
    }

    /// The batch that the inner lane knows as a chunk with this number.
    fn batch_of(&mut self, a: Attempt, chunk: u32) -> Option<usize> {
        if self.fenced_by_owner {
            return self.batches.of_chunk(a, chunk);
        }
        let i = chunk as usize;
        self.batches.get_mut(i).is_some_and(|b| b.attempt == a).then_some(i)
    }

    /// Reads have landed in the ring.
    fn read(&mut self, attempt: Attempt, chunk: u32, reads: u32, out: &mut Vec<LaneEvent>) {
        let i = self.batch_of(attempt, chunk);
        let Some((i, b)) = i.and_then(|i| Some((i, self.batches.get_mut(i)?))) else {
            // The batch is over: every read of it was counted.
            return self.fail(attempt, Cause::LaneFailed, out);
        };
        if b.dropped {
            return;
        }
        b.landed += reads as usize;
        if b.landed > b.copies.len() {
            // The lane's count cannot be trusted, so neither can the slots' contents.
            b.landed = 0;
            return self.fail(attempt, Cause::LaneFailed, out);
        }
        if planted(Bug::DoneBeforeCopied) {
            out.push(LaneEvent::Done { attempt, chunk: b.chunk, reads });
        }
        // Only when all have landed: completions are counted, and come in any order.
        if b.is_landed() && !std::mem::replace(&mut b.queued, true) {
            self.landed.push_back(i);
        }
        self.submit();
    }

    /// Submits landed batches while the copier has room.
    fn submit(&mut self) {
        while let Some(&i) = self.landed.front() {
            let Some(b) = self.batches.get_mut(i) else {
                self.landed.pop_front();
                continue;
            };
            let t = self.attempts.get_mut(&b.attempt).filter(|t| !t.closed);
            // More reads may have joined the batch since.
            if let Some(t) = t.filter(|_| b.is_landed()) {
                let Some(ticket) = self.copier.submit(&b.copies) else { return };
                let mut slots = self.spare.pop().unwrap_or_default();
                slots.append(&mut b.slots);
                self.jobs.push_back(Job { ticket, attempt: b.attempt, batch: i, reads: b.copies.len() as u32, slots });
                t.jobs += 1;
                b.jobs += 1;
                b.copies.clear();
                (b.landed, b.used) = (0, 0);
            }
            b.queued = false;
            self.landed.pop_front();
            if planted(Bug::SlotReusedEarly)
                && let Some(slots) = self.jobs.back_mut().map(|j| std::mem::take(&mut j.slots))
            {
                self.free(slots);
            }
        }
    }

    /// Collects finished jobs.
    fn collect(&mut self, out: &mut Vec<LaneEvent>) {
        if self.copier_failed {
            return;
        }
        let finished = self.copier.finished();
        while self.jobs.front().is_some_and(|j| j.ticket <= finished.up_to)
            && let Some(job) = self.jobs.pop_front()
        {
            self.job_ended(job, true, out);
        }
        if !finished.failed {
            return;
        }
        self.copier_failed = true;
        while let Some(job) = self.jobs.pop_front() {
            self.job_ended(job, planted(Bug::FailedCopyCounts), out);
        }
        let all: Vec<_> = self.attempts.keys().copied().collect();
        all.into_iter().for_each(|a| self.fail(a, Cause::LaneFailed, out));
        self.go_down(Cause::LaneFailed, out);
        if !self.killed {
            self.kill();
        }
    }

    /// A job is finished, or it was abandoned and not `copied`: nothing of it is written any more.
    fn job_ended(&mut self, job: Job, copied: bool, out: &mut Vec<LaneEvent>) {
        let Job { attempt, batch, reads, mut slots, .. } = job;
        if let Some(t) = self.attempts.get_mut(&attempt) {
            t.jobs -= 1;
            if t.closed && !t.inner_quiet {
                t.kept.append(&mut slots);
            }
            if let Some(b) = self.batches.get_mut(batch) {
                b.jobs -= 1;
                b.dropped |= !copied;
                if copied && !planted(Bug::DoneBeforeCopied) {
                    out.push(LaneEvent::Done { attempt, chunk: b.chunk, reads });
                }
            }
        }
        self.free(slots);
        self.settle_batch(attempt, batch, out);
        self.settle_attempt(attempt, out);
    }

    /// The inner lane has read the fence of a batch, or takes the batch back.
    fn fenced(&mut self, a: Attempt, chunk: u32, verdict: Verdict, out: &mut Vec<LaneEvent>) {
        if let Some(i) = self.batch_of(a, chunk) {
            if let Some(b) = self.batches.get_mut(i) {
                b.verdict = Some(verdict);
            }
            self.settle_batch(a, i, out);
        }
    }

    /// Ends a batch that is over. After the chunk's last one, reports the chunk's fence, or that it must be read again.
    fn settle_batch(&mut self, attempt: Attempt, i: usize, out: &mut Vec<LaneEvent>) {
        let by_owner = self.fenced_by_owner;
        let Some(b) = self.batches.get_mut(i).filter(|b| b.attempt == attempt && b.is_over(by_owner)) else { return };
        let chunk = b.chunk;
        let nonce = self.attempts.get(&attempt).map_or(0, |t| t.nonce);
        let Some(verdict) = self.batches.end(i, nonce).filter(|_| !by_owner) else { return };
        out.push(match verdict {
            Verdict::Word(word) => LaneEvent::Fence { attempt, chunk, word },
            // Unverified data was copied like any other: its owner reads the chunk again only after all its `Done`s.
            Verdict::Again => LaneEvent::Again { attempt, chunk },
        });
    }

    /// The inner lane writes no slot of the attempt any more.
    fn inner_quiet(&mut self, a: Attempt, out: &mut Vec<LaneEvent>) {
        let Some(t) = self.attempts.get_mut(&a) else { return };
        (t.closed, t.inner_quiet) = (true, true);
        let mut slots = self.spare.pop().unwrap_or_default();
        slots.append(&mut t.kept);
        for b in self.batches.of(a) {
            slots.append(&mut b.slots);
            b.dropped |= !b.copies.is_empty();
            b.copies.clear();
            b.landed = 0;
        }
        self.free(slots);
        self.settle_attempt(a, out);
    }

    /// Reports an attempt that is quiet.
    fn settle_attempt(&mut self, attempt: Attempt, out: &mut Vec<LaneEvent>) {
        let Some(t) = self.attempts.get(&attempt) else { return };
        if t.inner_quiet && (t.jobs == 0 || planted(Bug::QuietBeforeCopied)) {
            self.attempts.remove(&attempt);
            self.batches.forget(attempt);
            out.push(LaneEvent::Quiet { attempt });
        }
    }
}

impl<L: Lane, C: Copier> Lane for Staged<L, C> {
    fn caps(&self) -> LaneCaps {
        let inner = self.inner.caps();
        LaneCaps {
            max_read: inner.max_read.min(self.ring.slot_bytes()),
            quiet_bound: inner.quiet_bound.saturating_add(self.bound),
            ..inner
        }
    }

    fn degraded(&self) -> bool {
        self.inner.degraded()
    }

    fn begin(&mut self, a: Attempt, grant: Grant) {
        if self.attempts.contains_key(&a) {
            return;
        }
        if self.closed || self.ring.is_unusable() {
            self.pending.push(LaneEvent::Failed { attempt: a, cause: Cause::LaneFailed });
            self.pending.push(LaneEvent::Quiet { attempt: a });
            return;
        }
        self.attempts.insert(a, AttemptState::new(grant));
        self.inner.begin(a, grant);
    }

    fn post(&mut self, a: Attempt, reads: &[Read]) -> usize {
        let Some(t) = self.attempts.get(&a).filter(|t| !t.closed && !self.closed) else { return 0 };
        let Some(chunk) = reads.first().map(|r| r.chunk) else { return 0 };
        let (nonce, by_owner) = (t.nonce, self.fenced_by_owner);
        if self.ring.is_unusable() {
            self.fail_later(a, Cause::LaneFailed);
            return 0;
        }
        let slot_bytes = self.ring.slot_bytes();
        if reads.iter().any(|r| r.len > slot_bytes) {
            // Longer than `max_read`.
            self.fail_later(a, Cause::BadOffer);
            return 0;
        }
        let open = self.batches.open(a, chunk);
        let i = open.unwrap_or_else(|| self.batches.begin(a, chunk));
        self.place(i, reads);
        let offered = self.reads.len();
        let taken = if offered == 0 { 0 } else { self.inner.post(a, &self.reads).min(offered) };
        self.take_back(i, taken);
        if taken == 0 {
            if open.is_none() {
                self.batches.discard(i);
            }
            return 0;
        }
        let complete = taken == reads.len();
        self.batches.accepted(i, open.is_none(), complete, nonce);
        if let Some(b) = self.batches.get_mut(i) {
            // An inner lane with its own fences posts the fence after the last read that it was offered.
            b.sealed = if by_owner { complete } else { taken == offered };
        }
        taken
    }

    fn post_fence(&mut self, a: Attempt, f: FenceSlot) -> bool {
        let open = self.attempts.get(&a).is_some_and(|t| !t.closed);
        !open || self.inner.post_fence(a, f)
    }

    fn stop(&mut self, a: Attempt) {
        if let Some(t) = self.attempts.get_mut(&a) {
            t.closed = true;
            self.inner.stop(a);
        }
    }

    fn kill(&mut self) {
        self.killed = true;
        self.close();
        self.inner.kill();
    }

    fn poll(&mut self, out: &mut Vec<LaneEvent>) {
        out.append(&mut self.pending);
        let mut events = std::mem::take(&mut self.events);
        self.inner.poll(&mut events);
        for event in events.drain(..) {
            self.pass(event, out);
        }
        self.events = events;
        self.collect(out);
        self.submit();
    }
}

impl<L, C> Drop for Staged<L, C> {
    fn drop(&mut self) {
        // Slots are held only while reads or copies may still use them.
        self.ring.lose(self.held);
    }
}
