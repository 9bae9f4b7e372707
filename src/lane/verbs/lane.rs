//! The consumer's end of the verbs lane: READs striped over queue pairs and rails, fences, and their events.
//!
//! Owns a path for each rail, and what was accepted and is not posted. It never posts a read again before the rail that
//! had it is quiet, and says `Quiet` of an attempt only when no request of it is left on any rail (promise *quiet*).

mod seam;

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use kvferry_proto::{
    error::Cause,
    group::PoolLayout,
    lane::{Attempt, LaneEvent},
    plan::Read,
};

use super::{
    fences::{self, Carriers, Fence, Fences},
    ladder::{self, Rung},
    landing::{Landing, SLOTS},
    path::{Path, What, Why},
    wake::{Spin, Wake},
};
use crate::memory::Memory;

/// The attempt of a request that only makes a queue pair report.
const NOBODY: u32 = u32::MAX;

/// One attempt.
#[derive(Debug, Clone, Copy)]
struct Try {
    attempt: Attempt,
    /// What its fence words hold.
    nonce: u64,
    /// Word in the peer's fence table.
    slot: u32,
    /// Requests on rails, filled ones included.
    in_flight: u32,
    failed: bool,
    stopped: Option<Instant>,
}

/// A lane to one peer rank over one or several rails.
#[derive(Debug)]
pub(crate) struct VerbsLane {
    paths: Vec<Path>,
    tries: Vec<Option<Try>>,
    /// Accepted, and not posted: what a full queue gave back, and what a failed rail lost.
    again: VecDeque<What>,
    fences: Fences,
    slots: Arc<Landing>,
    free_slots: Vec<u16>,
    fence_slots: u32,
    memory: Memory,
    remote: Arc<PoolLayout>,
    pending: Vec<LaneEvent>,
    wake: Wake,
    slept: bool,
    spin: Spin,
    max_read: u32,
    quiet_bound: Duration,
    peer: String,
    /// A rail that has worked, on either side, was not to be had when it was connected.
    degraded: bool,
    /// Being closed: nothing more is posted.
    closing: Option<Cause>,
    /// Said `Down`, or `Wedged`.
    down: Option<Cause>,
}

/// What a lane is made of.
pub(crate) struct Parts {
    pub paths: Vec<Path>,
    pub slots: Arc<Landing>,
    pub fence_slots: u32,
    pub memory: Memory,
    pub remote: Arc<PoolLayout>,
    pub wake: Wake,
    pub spin: Duration,
    pub max_read: u32,
    pub quiet_bound: Duration,
    pub peer: String,
    /// A rail that has worked, on either side, was not to be had.
    pub degraded: bool,
    /// Requests that all paths together take.
    pub depth: usize,
}

impl VerbsLane {
    pub(crate) fn new(p: Parts) -> Self {
        Self {
            paths: p.paths,
            tries: Vec::with_capacity(64),
            again: VecDeque::with_capacity(2 * p.depth),
            fences: Fences::default(),
            slots: p.slots,
            free_slots: (0..SLOTS).rev().collect(),
            fence_slots: p.fence_slots,
            memory: p.memory,
            remote: p.remote,
            pending: Vec::with_capacity(64),
            wake: p.wake,
            slept: true,
            spin: Spin::new(p.spin),
            max_read: p.max_read,
            quiet_bound: p.quiet_bound,
            peer: p.peer,
            degraded: p.degraded,
            closing: None,
            down: None,
        }
    }

    /// The rails that it still uses, for logs and tests.
    #[cfg(test)]
    pub(crate) fn rails(&self) -> impl Iterator<Item = &str> {
        self.paths.iter().filter(|p| p.rung.is_live()).map(Path::name)
    }

    fn find(&self, a: Attempt) -> Option<usize> {
        self.tries.iter().position(|t| t.is_some_and(|t| t.attempt == a))
    }

    fn open(&self, a: Attempt) -> Option<usize> {
        let i = self.find(a)?;
        self.tries[i].filter(|t| !t.failed && t.stopped.is_none() && self.closing.is_none()).map(|_| i)
    }

    /// Whether both ends of a read lie in their segments.
    fn fits(&self, r: &Read) -> bool {
        let segment = self.remote.segments.get(usize::from(r.src_segment));
        let there = segment.is_some_and(|&has| r.src_offset.checked_add(r.len).is_some_and(|end| end <= has));
        r.len > 0
            && r.len <= u64::from(self.max_read)
            && there
            && self.memory.at(r.dst_segment, r.dst_offset, r.len).is_ok()
            && self.paths.iter().all(|p| p.has(r.src_segment, r.dst_segment))
    }

    /// Fills one request on the queue pair with the least to do; `false` when none takes it now.
    #[inline]
    fn place(&mut self, w: What) -> bool {
        let mut best: Option<(usize, usize, u64)> = None;
        for (p, path) in self.paths.iter().enumerate() {
            if let Some((e, bytes)) = path.best()
                && best.is_none_or(|b| bytes < b.2)
            {
                best = Some((p, e, bytes));
            }
        }
        let Some((p, e, _)) = best else { return false };
        self.fill(p, e, w);
        true
    }

    /// Fills one request on this queue pair.
    #[inline]
    fn fill(&mut self, path: usize, end: usize, w: What) {
        self.paths[path].fill(end, w);
        self.spin.moved();
        if let Some(Some(t)) = self.tries.get_mut(w.attempt as usize) {
            t.in_flight += 1;
        }
    }

    /// Whether all of these queue pairs could still complete something. Of nobody nothing is known.
    fn alive(&self, carriers: Carriers) -> bool {
        carriers != 0 && fences::each(carriers).all(|(p, e)| self.paths.get(p).is_some_and(|p| p.alive(e)))
    }

    /// Posts READs of a fence's word, one on each carrier; `false` when there is no room for all of them now.
    fn post_words(&mut self, f: &Fence) -> bool {
        let room = fences::each(f.carriers).all(|(p, e)| self.paths[p].has_room(e));
        if !room || self.free_slots.len() < f.carriers.count_ones() as usize {
            return false;
        }
        for (path, end) in fences::each(f.carriers) {
            let Some(slot) = self.free_slots.pop() else { break };
            self.slots.clear(slot);
            let w = What {
                src: u64::from(f.word_at) * 8,
                dst: u64::from(slot),
                len: 8,
                attempt: f.attempt,
                chunk: f.chunk,
                fence: true,
                path: path as u8,
                end: end as u8,
                ..What::default()
            };
            self.fill(path, end, w);
        }
        true
    }

    /// What is read of a chunk is not to be trusted: it is read again.
    fn doubt(&mut self, i: usize, chunk: u32) {
        self.fences.forget(i, chunk);
        if let Some(Some(t)) = self.tries.get(i) {
            self.pending.push(LaneEvent::Again { attempt: t.attempt, chunk });
        }
    }

    /// Posts the fences of chunks whose reads are all done. One that its rails have no room for holds up no other.
    #[inline]
    fn post_fences(&mut self) {
        let mut any = false;
        for _ in 0..self.fences.due() {
            let Some((i, chunk, carriers)) = self.fences.next_due() else { break };
            let Some(t) = self.tries.get(i).copied().flatten().filter(|t| !t.failed && t.stopped.is_none()) else {
                continue;
            };
            if !self.alive(carriers) {
                self.doubt(i, chunk);
                continue;
            }
            let fence = Fence::new(i as u32, chunk, t.slot, carriers);
            if self.post_words(&fence) {
                self.fences.posted(fence, t.nonce);
                any = true;
            } else {
                self.fences.later(i, chunk);
            }
        }
        if any {
            self.flush();
        }
    }

    /// Says what came of fences whose words are all back.
    fn conclude_fences(&mut self) {
        while let Some(mut f) = self.fences.next_back() {
            let i = f.attempt as usize;
            let Some(t) = self.tries.get(i).copied().flatten().filter(|t| !t.failed && t.stopped.is_none()) else {
                continue;
            };
            if f.doubt {
                self.doubt(i, f.chunk);
            } else if f.word == t.nonce || f.second {
                self.pending.push(LaneEvent::Fence { attempt: t.attempt, chunk: f.chunk, word: f.word });
            } else if !self.alive(f.carriers) {
                self.doubt(i, f.chunk);
            } else {
                f.second = self.post_words(&f);
                match f.second {
                    true => self.fences.posted(f, t.nonce),
                    // No room: it is back still, and looked at after the next completion.
                    false => return self.fences.back(f),
                }
                self.flush();
            }
        }
    }

    /// Posts what is filled. What is not taken waits in `again`, in front.
    fn flush(&mut self) {
        for path in &mut self.paths {
            let (again, tries) = (&mut self.again, &mut self.tries);
            path.flush(|w| {
                if let Some(Some(t)) = tries.get_mut(w.attempt as usize) {
                    t.in_flight -= 1;
                }
                again.push_back(w);
            });
        }
    }

    /// Posts what waits, as far as there is room.
    fn post_again(&mut self) {
        if self.again.is_empty() || self.closing.is_some() {
            return;
        }
        let mut any = false;
        // Each once: what a full queue gives back waits for the next poll.
        for _ in 0..self.again.len() {
            let Some(&w) = self.again.front() else { break };
            if !self.wanted(w) {
                self.again.pop_front();
                self.give_back(w);
                continue;
            }
            if w.fence {
                let (path, end) = (usize::from(w.path), usize::from(w.end));
                if !self.paths[path].alive(end) {
                    self.again.pop_front();
                    self.give_back(w);
                    self.fences.lost(w.attempt, w.chunk);
                    continue;
                }
                if !self.paths[path].has_room(end) {
                    break;
                }
                self.fill(path, end, w);
            } else if !self.place(w) {
                break;
            }
            self.again.pop_front();
            any = true;
        }
        if any {
            self.flush();
        }
    }

    /// Has queue pairs report what a full queue took of them without a report, where nothing else is to be posted on them.
    fn nudge(&mut self) {
        if !self.again.is_empty() || self.closing.is_some() {
            return;
        }
        let mut any = false;
        for path in 0..self.paths.len() {
            let Some(end) = self.paths[path].silent() else { continue };
            let Some(slot) = self.free_slots.pop() else { return };
            // A fence's word, for nobody.
            let w = What {
                dst: u64::from(slot),
                len: 8,
                attempt: NOBODY,
                fence: true,
                path: path as u8,
                end: end as u8,
                ..What::default()
            };
            self.fill(path, end, w);
            any = true;
        }
        if any {
            self.flush();
        }
    }

    /// Whether what waits first waits for this rail: data for any of them, a fence for its own.
    fn waits_for(&self, path: usize) -> bool {
        self.again.front().is_some_and(|w| !w.fence || usize::from(w.path) == path)
    }

    fn wanted(&self, w: What) -> bool {
        matches!(self.tries.get(w.attempt as usize), Some(Some(t)) if !t.failed && t.stopped.is_none())
    }

    /// A request is over, or was never posted: its landing slot is free again.
    fn give_back(&mut self, w: What) {
        if w.fence {
            self.free_slots.push(w.dst as u16);
        }
    }

    fn fail(&mut self, i: usize, cause: Cause) {
        if let Some(Some(t)) = self.tries.get_mut(i)
            && !t.failed
        {
            t.failed = true;
            if t.stopped.is_none() {
                self.pending.push(LaneEvent::Failed { attempt: t.attempt, cause });
            }
        }
        self.purge();
    }

    /// Forgets what waits for attempts that go no further.
    fn purge(&mut self) {
        for _ in 0..self.again.len() {
            let Some(w) = self.again.pop_front() else { break };
            if self.wanted(w) {
                self.again.push_back(w);
            } else {
                self.give_back(w);
            }
        }
    }

    /// Says `Quiet` of an attempt that was stopped and has nothing in flight.
    fn settle(&mut self, i: usize) {
        if let Some(t) = self.tries.get(i).copied().flatten()
            && t.stopped.is_some()
            && t.in_flight == 0
        {
            self.tries[i] = None;
            self.pending.push(LaneEvent::Quiet { attempt: t.attempt });
        }
    }

    fn reap(&mut self, now: Instant, out: &mut Vec<LaneEvent>) -> bool {
        let mut any = false;
        for (p, path) in self.paths.iter_mut().enumerate() {
            let (tries, slots, free) = (&mut self.tries, &self.slots, &mut self.free_slots);
            let fences = &mut self.fences;
            any |= path.reap(now, |w, end| {
                if w.fence {
                    free.push(w.dst as u16);
                }
                let Some(place) = tries.get_mut(w.attempt as usize) else { return };
                let Some(t) = place else { return };
                t.in_flight = t.in_flight.saturating_sub(1);
                let (a, k) = (t.attempt, w.chunk);
                if let Some(since) = t.stopped {
                    if t.in_flight == 0 {
                        *place = None;
                        ladder::drained(now.saturating_duration_since(since));
                        out.push(LaneEvent::Quiet { attempt: a });
                    }
                } else if t.failed {
                } else if w.fence {
                    fences.landed(w.attempt, k, slots.load(w.dst as u16), t.nonce);
                } else {
                    fences.carried(w.attempt, k, fences::bit(p, end));
                    match out.last_mut() {
                        Some(LaneEvent::Done { attempt, chunk, reads }) if *attempt == a && *chunk == k => *reads += 1,
                        _ => out.push(LaneEvent::Done { attempt: a, chunk: k, reads: 1 }),
                    }
                }
            });
        }
        if any {
            self.spin.moved();
        }
        any
    }

    /// Moves failed rails up the ladder, and what they lost to other rails.
    fn climb(&mut self, now: Instant) {
        for p in 0..self.paths.len() {
            let waiting = self.waits_for(p);
            let path = &mut self.paths[p];
            path.watch(now, waiting);
            if path.rung.is_live() {
                continue;
            }
            path.climb(now, &self.wake.bell, &self.peer);
            if !path.rung.is_quiet() {
                continue;
            }
            let mut lost = Vec::new();
            path.take_lost(|w| lost.push(w));
            for w in lost {
                if let Some(Some(t)) = self.tries.get_mut(w.attempt as usize) {
                    t.in_flight = t.in_flight.saturating_sub(1);
                }
                if !self.wanted(w) || self.closing.is_some() {
                    self.give_back(w);
                    self.settle(w.attempt as usize);
                    continue;
                }
                if w.fence {
                    self.give_back(w);
                    self.fences.lost(w.attempt, w.chunk);
                } else {
                    self.again.push_back(w);
                }
            }
        }
        if self.down.is_some() {
            return;
        }
        if self.paths.iter().any(|p| matches!(p.rung, Rung::Wedged)) {
            self.down = Some(Cause::LaneFailed);
            self.close(Cause::LaneFailed, now);
            self.pending.push(LaneEvent::Wedged);
            return;
        }
        if self.closing.is_none() && self.paths.iter().all(|p| !p.rung.is_live()) {
            let cause = self.paths.iter().rev().find_map(|p| p.why).map_or(Cause::LaneFailed, Why::cause);
            if let Some(path) = self.paths.iter().find(|p| p.why.is_some())
                && let Some(why) = path.why
            {
                tracing::warn!(peer = %self.peer, rail = path.name(), %why, "verbs lane down: no rail to this peer is left");
            }
            self.close(cause, now);
        }
        if let Some(cause) = self.closing
            && self.paths.iter().all(|p| p.rung.is_quiet())
        {
            self.down = Some(cause);
            self.pending.push(LaneEvent::Down { cause });
            self.pending.extend(self.tries.drain(..).flatten().map(|t| LaneEvent::Quiet { attempt: t.attempt }));
        }
    }

    /// Stops posting for good.
    fn close(&mut self, cause: Cause, now: Instant) {
        if self.closing.is_some() {
            return;
        }
        self.closing = Some(cause);
        for i in 0..self.tries.len() {
            self.fail(i, cause);
        }
        while let Some(w) = self.again.pop_front() {
            self.give_back(w);
        }
        for path in &mut self.paths {
            path.fail(Why::Killed, now);
        }
    }

    /// Whether to look for the end of what is in flight instead of sleeping.
    fn nearly_there(&mut self) -> bool {
        self.spin.goes_on(self.bytes(), Instant::now)
    }

    /// Bytes in flight; `None`: nothing is.
    fn bytes(&self) -> Option<u64> {
        let (bytes, any) = self.paths.iter().fold((0, false), |(b, any), p| (b + p.bytes(), any | (p.in_flight() > 0)));
        any.then_some(bytes)
    }

    /// Whether something waits for a completion that may never come by itself.
    fn must_spin(&self) -> bool {
        !self.again.is_empty()
            && self.closing.is_none()
            && self.paths.iter().any(|p| p.rung.is_live())
            && self.paths.iter().filter(|p| p.rung.is_live()).all(|p| p.in_flight() == 0 || !p.will_complete())
    }
}
