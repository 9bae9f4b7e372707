//! One source rank of a pull: which of its parts of the chunks are read, fenced and good, and the attempt that reads them.
//!
//! Owns the order of reads and fences, and the count of reads in flight. Never decides the pull: [`super::pull`] does.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::{
    Attempt, Cause, FenceKind, FenceSlot, Grant, LaneCaps, LaneKind, Plan, Read, fence,
    retry::Backoff,
    sabotage::{Bug, planted},
};

/// A chunk's part from one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Waiting,
    /// Reads not done yet.
    Reading(u32),
    /// All reads are done; the fence must be posted.
    Unfenced,
    /// The fence's word is not here yet.
    Fencing,
    Good,
}

/// An attempt that is not quiet.
#[derive(Debug)]
pub(super) struct Live {
    pub attempt: Attempt,
    pub caps: LaneCaps,
    /// When it was told to stop.
    pub stopped: Option<Instant>,
    pub killed: bool,
    /// Its first failure.
    pub why: Option<Cause>,
}

/// More completions came than reads were posted: the lane's count cannot be trusted.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooManyDone;

/// The result of a fence.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fenced {
    Good,
    Stale,
    /// No fence of this chunk was posted.
    NotPosted,
}

/// How many attempts a source made, and when it may make the next.
#[derive(Debug)]
struct Tries {
    /// Attempts and lane requests that failed.
    failed: u32,
    backoff: Backoff,
    retry_at: Option<Instant>,
}

#[derive(Debug)]
pub(super) struct Source {
    pub grant: Option<Grant>,
    pub live: Option<Live>,
    /// A lane was asked for, and the answer is not here.
    pub asked: bool,
    /// Attempts that were begun in time.
    pub attempts: u32,
    /// Kinds of lanes that failed this pull.
    pub failed: Vec<LaneKind>,
    /// Since when its peer is known to be silent.
    pub silent: Option<Instant>,
    /// When it moved last: a read or a fence completed, or its claim was granted.
    pub moved: Instant,
    tries: Tries,
    parts: Vec<Part>,
    /// Parts that are good.
    pub good: usize,
    /// The chunk whose reads are in `reads`, from `posted` on not yet posted.
    cursor: usize,
    /// No chunk before this one is waiting.
    low: usize,
    reads: Vec<Read>,
    posted: usize,
    /// Chunks whose fence must be posted.
    unfenced: VecDeque<u32>,
}

impl Source {
    /// A source without a grant. `wait` is the wait before its third attempt.
    pub(crate) fn new(now: Instant, wait: Duration) -> Self {
        Self {
            grant: None,
            live: None,
            asked: false,
            attempts: 0,
            failed: Vec::new(),
            silent: None,
            moved: now,
            tries: Tries { failed: 0, backoff: Backoff::new(wait, wait.saturating_mul(1 << 10)), retry_at: None },
            parts: Vec::new(),
            good: 0,
            cursor: 0,
            low: 0,
            reads: Vec::new(),
            posted: 0,
            unfenced: VecDeque::new(),
        }
    }

    /// The plan is known, or has more chunks than before.
    pub(crate) fn planned(&mut self, plan: &Plan, number: usize) {
        let (old, all) = (self.parts.len(), plan.chunks().len());
        let served = self.good == old;
        self.parts.resize(all, Part::Waiting);
        for chunk in (old..all).filter(|&chunk| !plan.has_part(chunk as u32, number)) {
            self.set_good(chunk);
        }
        if all > old && served {
            // The lanes have served everything so far: earlier failures no longer count.
            self.tries.failed = 0;
            self.failed.clear();
        }
    }

    /// Whether its attempt has nothing to do until the plan has more chunks.
    pub(crate) fn rests(&self) -> bool {
        self.posting().is_some() && self.good == self.parts.len()
    }

    /// Whether this source's part of a chunk is good.
    pub(crate) fn is_good(&self, chunk: usize) -> bool {
        self.parts.get(chunk) == Some(&Part::Good)
    }

    fn set_good(&mut self, chunk: usize) {
        self.parts[chunk] = Part::Good;
        self.good += 1;
    }

    /// The attempt that may still post.
    fn posting(&self) -> Option<&Live> {
        self.live.as_ref().filter(|l| l.stopped.is_none())
    }

    /// The next reads to post, all of one chunk, up to its last.
    pub(crate) fn next_reads(&mut self, plan: &Plan, number: usize) -> Option<(Attempt, &[Read])> {
        self.grant?;
        let live = self.posting()?;
        let (attempt, max_read) = (live.attempt, live.caps.max_read);
        while self.posted == self.reads.len() {
            // The next chunk that is still waiting.
            let next = self.parts[self.low..].iter().position(|p| *p == Part::Waiting)? + self.low;
            self.cursor = next;
            self.low = next + 1;
            self.reads.clear();
            self.posted = 0;
            plan.reads(next as u32, number, max_read, &mut self.reads);
            self.parts[next] = Part::Reading(self.reads.len() as u32);
        }
        Some((attempt, &self.reads[self.posted..]))
    }

    /// The lane took the first `reads` of the offered reads.
    pub(crate) fn accepted(&mut self, reads: usize) {
        self.posted = (self.posted + reads).min(self.reads.len());
        if planted(Bug::FenceBeforeData)
            && self.posted == self.reads.len()
            && self.live.as_ref().is_some_and(|l| l.caps.fence == FenceKind::Posted)
        {
            self.unfenced.push_back(self.cursor as u32);
        }
    }

    /// The next fence to post.
    pub(crate) fn next_fence(&self) -> Option<(Attempt, FenceSlot)> {
        let live = self.posting()?;
        let chunk = *self.unfenced.front()?;
        Some((live.attempt, FenceSlot { chunk, slot: self.grant?.slot }))
    }

    /// The fence of [`Source::next_fence`] was posted.
    pub(crate) fn fence_posted(&mut self) {
        if let Some(chunk) = self.unfenced.pop_front()
            && let Some(part) = self.parts.get_mut(chunk as usize)
            && *part == Part::Unfenced
        {
            *part = Part::Fencing;
        }
    }

    /// Reads of a chunk are done.
    pub(crate) fn done(&mut self, chunk: u32, reads: u32) -> Result<(), TooManyDone> {
        let Some(Part::Reading(left)) = self.parts.get_mut(chunk as usize) else { return Ok(()) };
        *left = left.checked_sub(reads).ok_or(TooManyDone)?;
        if *left > 0 {
            return Ok(());
        }
        let posted = self.live.as_ref().is_some_and(|l| l.caps.fence == FenceKind::Posted);
        if planted(Bug::FenceSkipped) {
            self.set_good(chunk as usize);
        } else if posted && !planted(Bug::FenceBeforeData) {
            // Only after all of the chunk's data has arrived: reads may execute in any order (promise 2).
            self.parts[chunk as usize] = Part::Unfenced;
            self.unfenced.push_back(chunk);
        } else {
            self.parts[chunk as usize] = Part::Fencing;
        }
        Ok(())
    }

    /// A chunk's fence read `word`.
    pub(crate) fn fenced(&mut self, chunk: u32, word: u64) -> Fenced {
        match self.parts.get(chunk as usize) {
            Some(Part::Fencing) => {}
            Some(Part::Reading(_)) if planted(Bug::FenceBeforeData) => {}
            _ => return Fenced::NotPosted,
        }
        if self.grant.is_some_and(|g| fence::holds(g.nonce, word)) {
            self.set_good(chunk as usize);
            Fenced::Good
        } else {
            Fenced::Stale
        }
    }

    /// The lane takes a chunk back as unverified: reads it again. All its reads are done, so none is in flight.
    pub(crate) fn again(&mut self, chunk: u32) {
        let chunk = chunk as usize;
        if self.parts.get(chunk) != Some(&Part::Fencing) {
            return;
        }
        if planted(Bug::UnverifiedLoaded) {
            return self.set_good(chunk);
        }
        self.parts[chunk] = Part::Waiting;
        self.low = self.low.min(chunk);
    }

    /// A lane was connected for a new attempt. `counts` is false for one that came after the decision.
    pub(crate) fn begin(&mut self, attempt: Attempt, caps: LaneCaps, counts: bool) {
        self.asked = false;
        self.live = Some(Live { attempt, caps, stopped: None, killed: false, why: None });
        self.attempts += u32::from(counts);
    }

    /// The attempt failed. Returns it if it must be stopped.
    pub(crate) fn fail(&mut self, now: Instant, cause: Cause) -> Option<Attempt> {
        self.live.as_mut()?.why.get_or_insert(cause);
        self.stop(now)
    }

    /// Stops the attempt. Returns it if it was not stopping already.
    pub(crate) fn stop(&mut self, now: Instant) -> Option<Attempt> {
        let live = self.live.as_mut().filter(|l| l.stopped.is_none())?;
        live.stopped = Some(now);
        Some(live.attempt)
    }

    /// The attempt is quiet. Returns the cause of its failure.
    pub(crate) fn quiet(&mut self) -> Option<Cause> {
        let live = self.live.take()?;
        if !self.failed.contains(&live.caps.kind) {
            self.failed.push(live.caps.kind);
        }
        Some(live.why.unwrap_or(Cause::LaneFailed))
    }

    /// Kills the attempt once it has been stopping for half of its lane's bound: the teardown stages need the other half.
    pub(crate) fn kill(&mut self, now: Instant) -> Option<Attempt> {
        if self.kill_at()? > now {
            return None;
        }
        let live = self.live.as_mut()?;
        live.killed = true;
        Some(live.attempt)
    }

    /// When a stopping attempt is killed.
    pub(crate) fn kill_at(&self) -> Option<Instant> {
        let live = self.live.as_ref().filter(|l| !l.killed)?;
        Some(live.stopped? + live.caps.quiet_bound / 2)
    }

    /// Makes all parts that are not good wait again.
    pub(crate) fn reread(&mut self) {
        for p in &mut self.parts {
            if *p != Part::Good {
                *p = Part::Waiting;
            }
        }
        (self.cursor, self.low) = (0, 0);
        self.reads.clear();
        self.posted = 0;
        self.unfenced.clear();
    }

    /// An attempt or a lane request failed. Returns the number of failures, and waits before the next attempt.
    pub(crate) fn back_off(&mut self, now: Instant) -> u32 {
        let tries = &mut self.tries;
        tries.failed += 1;
        // The second attempt comes at once: a broken lane says nothing about the next one.
        if tries.failed >= 2 {
            tries.retry_at = Some(tries.backoff.wait_from(now));
        }
        tries.failed
    }

    /// Whether a back-off is over, or there is none.
    pub(crate) fn may_retry(&mut self, now: Instant) -> bool {
        self.tries.retry_at.take_if(|t| *t <= now);
        self.tries.retry_at.is_none()
    }

    /// When the back-off is over. `None` while it has a lane, or waits for one.
    pub(crate) fn retry_at(&self) -> Option<Instant> {
        self.tries.retry_at
    }
}
