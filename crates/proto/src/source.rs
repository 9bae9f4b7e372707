//! One source rank of a pull: which of its parts of the chunks are read, fenced and good, and the attempt that is at it.
//!
//! Owns the order in which reads are posted, and fences where the lane does not post them itself, and the count of what is in flight. Never decides what becomes of
//! the pull: that is [`super::pull`]'s.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::{
    error::Cause,
    fence,
    lane::{Attempt, FenceKind, FenceSlot, Grant, LaneCaps, LaneKind},
    plan::{Plan, Read},
    retry::Backoff,
    sabotage::{Bug, planted},
};

/// A chunk's part from one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Waiting,
    /// Reads not done yet.
    Reading(u32),
    /// All reads done; the fence is to be posted.
    Unfenced,
    /// The fence's word is awaited.
    Fencing,
    Good,
}

/// An attempt that is not quiet.
#[derive(Debug)]
pub(super) struct Live {
    pub attempt: Attempt,
    pub caps: LaneCaps,
    /// Since when it is being stopped.
    pub stopped: Option<Instant>,
    pub killed: bool,
    /// What it failed of first.
    pub why: Option<Cause>,
}

/// More completions came than reads were posted: the lane's count cannot be trusted any more.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooManyDone;

/// What a fence's word said.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fenced {
    Good,
    Stale,
    /// No fence of this chunk was awaited.
    Unasked,
}

#[derive(Debug)]
pub(super) struct Source {
    pub grant: Option<Grant>,
    pub live: Option<Live>,
    /// A lane has been asked for.
    pub asked: bool,
    pub retry_at: Option<Instant>,
    backoff: Backoff,
    /// Attempts and askings that came to nothing.
    pub tries: u32,
    /// Attempts that were begun.
    pub attempts: u32,
    /// Kinds of lanes that failed this pull.
    pub failed: Vec<LaneKind>,
    parts: Vec<Part>,
    /// Parts that are good.
    pub good: usize,
    /// The chunk whose reads are in `reads`, from `posted` on not yet posted.
    cursor: usize,
    /// No chunk before this one is waiting.
    low: usize,
    reads: Vec<Read>,
    posted: usize,
    /// Chunks whose fence is to be posted.
    unfenced: VecDeque<u32>,
}

impl Source {
    /// A source without a grant. `wait` is the wait before its third attempt.
    pub(crate) fn new(wait: Duration) -> Self {
        Self {
            grant: None,
            live: None,
            asked: false,
            retry_at: None,
            backoff: Backoff::new(wait, wait.saturating_mul(1 << 10)),
            tries: 0,
            attempts: 0,
            failed: Vec::new(),
            parts: Vec::new(),
            good: 0,
            cursor: 0,
            low: 0,
            reads: Vec::new(),
            posted: 0,
            unfenced: VecDeque::new(),
        }
    }

    /// The plan is known: there are so many chunks.
    pub(crate) fn planned(&mut self, chunks: usize) {
        self.parts = vec![Part::Waiting; chunks];
    }

    /// Whether this source's part of a chunk is good.
    pub(crate) fn is_good(&self, chunk: usize) -> bool {
        self.parts.get(chunk) == Some(&Part::Good)
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
            if self.reads.is_empty() {
                // This source holds nothing of the chunk.
                self.parts[next] = Part::Good;
                self.good += 1;
            }
        }
        Some((attempt, &self.reads[self.posted..]))
    }

    /// So many of the offered reads were taken by the lane.
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

    /// The fence that [`Source::next_fence`] gave was posted.
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
        let part = &mut self.parts[chunk as usize];
        if planted(Bug::FenceSkipped) {
            *part = Part::Good;
            self.good += 1;
            return Ok(());
        }
        let posted = self.live.as_ref().is_some_and(|l| l.caps.fence == FenceKind::Posted);
        if posted && !planted(Bug::FenceBeforeData) {
            // Not before all of the chunk's data is in: reads may execute in any order (promise 2).
            *part = Part::Unfenced;
            self.unfenced.push_back(chunk);
        } else {
            *part = Part::Fencing;
        }
        Ok(())
    }

    /// A chunk's fence read `word`.
    pub(crate) fn fenced(&mut self, chunk: u32, word: u64) -> Fenced {
        let Some(part) = self.parts.get_mut(chunk as usize) else { return Fenced::Unasked };
        let early = planted(Bug::FenceBeforeData) && matches!(part, Part::Reading(_));
        if *part != Part::Fencing && !early {
            return Fenced::Unasked;
        }
        if self.grant.is_some_and(|g| fence::holds(g.nonce, word)) {
            *part = Part::Good;
            self.good += 1;
            Fenced::Good
        } else {
            Fenced::Stale
        }
    }

    /// What the lane has of a chunk is in doubt: it is read again. All its reads are done, so none is in flight.
    pub(crate) fn again(&mut self, chunk: u32) {
        if let Some(part) = self.parts.get_mut(chunk as usize)
            && *part == Part::Fencing
        {
            if planted(Bug::UnverifiedLoaded) {
                *part = Part::Good;
                self.good += 1;
                return;
            }
            *part = Part::Waiting;
            self.low = self.low.min(chunk as usize);
        }
    }

    /// The attempt goes no further: it is to be stopped, unless it is being stopped already.
    pub(crate) fn stop(&mut self, now: Instant) -> Option<Attempt> {
        let live = self.live.as_mut().filter(|l| l.stopped.is_none())?;
        live.stopped = Some(now);
        Some(live.attempt)
    }

    /// The attempt has been stopping for half of its lane's bound: the ladder needs the other half.
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

    /// Lanes of this kind are tried last from now on.
    pub(crate) fn avoid(&mut self, kind: LaneKind) {
        if !self.failed.contains(&kind) {
            self.failed.push(kind);
        }
    }

    /// What is not good is waiting again.
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

    /// When its lane may be asked for again, if a wait is on.
    pub(crate) fn wait(&mut self, now: Instant) {
        // The second try comes at once: a broken lane says nothing about the next one.
        if self.tries >= 2 {
            self.retry_at = Some(self.backoff.wait_from(now));
        }
    }
}
