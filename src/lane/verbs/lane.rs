//! The consumer's end of the verbs lane: READs striped over queue pairs and rails, fences, and their events.
//!
//! Owns a path for each rail, and the accepted reads that are not posted. It never posts a read again before the rail that
//! had it is quiet, and reports `Quiet` for an attempt only when no request of it is left on any rail (promise *quiet*).

mod seam;

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use kvferry_proto::{Attempt, Cause, LaneEvent, PoolLayout, Read};

use super::{
    failure::FailureReason,
    fences::{self, Fence, Fences, PairSet},
    gpu::Flushes,
    landing::{Landing, SLOTS},
    path::{Path, Work},
    teardown::{self, Stage},
    wake::{Spin, Wake},
};
use crate::memory::{Memory, gpu::stats};

/// One attempt.
#[derive(Debug, Clone, Copy)]
struct AttemptState {
    attempt: Attempt,
    /// The value of its fence words while the offer is live.
    nonce: u64,
    /// Word in the peer's fence table.
    slot: u32,
    /// Requests on rails, filled ones included.
    in_flight: u32,
    failed: bool,
    stopped: Option<Instant>,
}

impl AttemptState {
    /// Whether it may go on.
    fn is_open(&self) -> bool {
        !self.failed && self.stopped.is_none()
    }
}

/// A lane to one peer rank over one or several rails.
#[derive(Debug)]
pub(crate) struct VerbsLane {
    paths: Vec<Path>,
    attempts: Vec<Option<AttemptState>>,
    /// Reads that were lost on a failed rail, and are to be posted on another one.
    unposted: VecDeque<Work>,
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
    /// When it was connected, a rail that had worked before, on either side, was unavailable.
    degraded: bool,
    /// It is being closed, and nothing more is posted.
    closing: Option<Cause>,
    /// `Down` or `Wedged` was reported.
    down: Option<Cause>,
    /// Of a lane into GPU memory that must be flushed.
    flushes: Option<Flushes>,
}

/// The parts of a lane.
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
    /// A rail that had worked before, on either side, was unavailable.
    pub degraded: bool,
    /// Requests that all paths together can hold.
    pub depth: usize,
    pub flushes: Option<Flushes>,
}

impl VerbsLane {
    pub(crate) fn new(p: Parts) -> Self {
        Self {
            paths: p.paths,
            attempts: Vec::with_capacity(64),
            unposted: VecDeque::with_capacity(2 * p.depth),
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
            flushes: p.flushes,
        }
    }

    /// The rails that it still uses.
    #[cfg(test)]
    pub(crate) fn rails(&self) -> impl Iterator<Item = &str> {
        self.paths.iter().filter(|p| p.stage.is_live()).map(Path::name)
    }

    fn find(&self, a: Attempt) -> Option<usize> {
        self.attempts.iter().position(|t| t.is_some_and(|t| t.attempt == a))
    }

    /// The attempt in this slot, if it may go on.
    fn open_in(&self, slot: usize) -> Option<AttemptState> {
        self.attempts.get(slot).copied().flatten().filter(AttemptState::is_open)
    }

    fn open(&self, a: Attempt) -> Option<usize> {
        self.find(a).filter(|&i| self.closing.is_none() && self.open_in(i).is_some())
    }

    /// Whether both ends of a read are within their segments.
    fn fits(&self, r: &Read) -> bool {
        let segment = self.remote.segments.get(usize::from(r.src_segment));
        let there = segment.is_some_and(|&has| r.src_offset.checked_add(r.len).is_some_and(|end| end <= has));
        r.len > 0
            && r.len <= u64::from(self.max_read)
            && there
            && self.memory.address(r.dst_segment, r.dst_offset, r.len).is_ok()
            && self.paths.iter().all(|p| p.has(r.src_segment, r.dst_segment))
    }

    /// Fills one request on the queue pair with the fewest bytes in flight; `false` if none accepts it now.
    #[inline]
    fn place(&mut self, w: Work) -> bool {
        let mut best: Option<(usize, usize, u64)> = None;
        for (p, path) in self.paths.iter().enumerate() {
            if let Some((pair, bytes)) = path.best()
                && best.is_none_or(|b| bytes < b.2)
            {
                best = Some((p, pair, bytes));
            }
        }
        let Some((p, pair, _)) = best else { return false };
        self.fill(p, pair, w);
        true
    }

    /// Fills one request on this queue pair.
    #[inline]
    fn fill(&mut self, path: usize, pair: usize, w: Work) {
        self.paths[path].fill(pair, w);
        self.spin.moved();
        if let Some(Some(t)) = self.attempts.get_mut(w.attempt as usize) {
            t.in_flight += 1;
        }
    }

    /// Whether all of these queue pairs can complete requests. An empty set proves nothing.
    fn alive(&self, pairs: PairSet) -> bool {
        pairs != 0 && fences::each(pairs).all(|(p, pair)| self.paths.get(p).is_some_and(|p| p.alive(pair)))
    }

    /// Posts READs of a fence's word, one on each of its queue pairs; `false` if there is not room for all of them now.
    fn post_words(&mut self, f: &Fence) -> bool {
        let room = fences::each(f.pairs).all(|(p, pair)| self.paths[p].has_room(pair));
        if !room || self.free_slots.len() < f.pairs.count_ones() as usize {
            return false;
        }
        for (path, pair) in fences::each(f.pairs) {
            let Some(slot) = self.free_slots.pop() else { break };
            self.slots.clear(slot);
            let w = Work {
                src: u64::from(f.word_at) * 8,
                dst: u64::from(slot),
                len: 8,
                attempt: f.attempt,
                chunk: f.chunk,
                fence: true,
                ..Work::default()
            };
            self.fill(path, pair, w);
        }
        true
    }

    /// The data of a chunk is unverified, so the chunk is read again.
    fn read_again(&mut self, i: usize, chunk: u32) {
        self.fences.forget(i, chunk);
        if let Some(Some(t)) = self.attempts.get(i) {
            self.pending.push(LaneEvent::Again { attempt: t.attempt, chunk });
        }
    }

    /// Posts the fences of chunks whose reads are all done. A fence without room on its rails does not delay the others.
    #[inline]
    fn post_fences(&mut self) {
        let mut any = false;
        for _ in 0..self.fences.due() {
            let Some((i, chunk, pairs)) = self.fences.next_due() else { break };
            let Some(t) = self.open_in(i) else { continue };
            if !self.alive(pairs) {
                self.read_again(i, chunk);
                continue;
            }
            let fence = Fence::new(i as u32, chunk, t.slot, pairs);
            if self.post_words(&fence) {
                self.fences.posted(fence, t.nonce);
                any = true;
            } else {
                self.fences.postpone(i, chunk);
            }
        }
        if any {
            self.flush();
        }
    }

    /// Reports the results of fences whose words have all arrived or are lost.
    fn conclude_fences(&mut self) {
        while let Some(mut f) = self.fences.next_complete() {
            let i = f.attempt as usize;
            let Some(t) = self.open_in(i) else { continue };
            if f.unverified {
                self.read_again(i, f.chunk);
            } else if f.word == t.nonce || f.second {
                let event = LaneEvent::Fence { attempt: t.attempt, chunk: f.chunk, word: f.word };
                match &mut self.flushes {
                    Some(flushes) => flushes.hold(event),
                    None => self.pending.push(event),
                }
            } else if !self.alive(f.pairs) {
                self.read_again(i, f.chunk);
            } else {
                f.second = self.post_words(&f);
                match f.second {
                    true => self.fences.posted(f, t.nonce),
                    // Without room it stays complete, and is looked at after the next completion.
                    false => return self.fences.put_back(f),
                }
                self.flush();
            }
        }
    }

    /// Reports fences whose data is visible now.
    fn advance_flushes(&mut self, now: Instant) {
        let Some(mut flushes) = self.flushes.take() else { return };
        let usable = flushes.advance(|event| {
            // An attempt that was stopped meanwhile has no more use for it.
            if event.attempt().is_some_and(|a| self.open(a).is_some()) {
                self.pending.push(event);
            }
        });
        self.flushes = Some(flushes);
        if !usable {
            self.close(Cause::GpuFailed, now);
        }
    }

    /// Posts the filled requests.
    fn flush(&mut self) {
        self.paths.iter_mut().for_each(Path::flush);
    }

    /// Posts reads that a failed rail lost, as far as there is room.
    fn post_lost(&mut self) {
        let mut any = false;
        while let Some(&w) = self.unposted.front() {
            if self.wanted(w) && !self.place(w) {
                break;
            }
            self.unposted.pop_front();
            any = true;
        }
        if any {
            self.flush();
        }
    }

    fn wanted(&self, w: Work) -> bool {
        self.closing.is_none() && self.open_in(w.attempt as usize).is_some()
    }

    fn fail(&mut self, i: usize, cause: Cause) {
        if let Some(Some(t)) = self.attempts.get_mut(i)
            && !t.failed
        {
            t.failed = true;
            if t.stopped.is_none() {
                self.pending.push(LaneEvent::Failed { attempt: t.attempt, cause });
            }
        }
        self.purge();
    }

    /// Forgets unposted reads of attempts that do not go on.
    fn purge(&mut self) {
        let mut unposted = std::mem::take(&mut self.unposted);
        unposted.retain(|w| self.wanted(*w));
        self.unposted = unposted;
    }

    /// Reports `Quiet` for a stopped attempt with nothing in flight.
    fn settle(&mut self, i: usize) {
        if let Some(t) = self.attempts.get(i).copied().flatten()
            && t.stopped.is_some()
            && t.in_flight == 0
        {
            self.attempts[i] = None;
            self.pending.push(LaneEvent::Quiet { attempt: t.attempt });
        }
    }

    fn reap(&mut self, now: Instant, out: &mut Vec<LaneEvent>) -> bool {
        let (mut any, mut landed) = (false, 0);
        for (p, path) in self.paths.iter_mut().enumerate() {
            let (attempts, slots, free) = (&mut self.attempts, &self.slots, &mut self.free_slots);
            let fences = &mut self.fences;
            any |= path.reap(now, |w, pair| {
                if w.fence {
                    free.push(w.dst as u16);
                } else {
                    landed += u64::from(w.len);
                }
                let Some(place) = attempts.get_mut(w.attempt as usize) else { return };
                let Some(t) = place else { return };
                t.in_flight = t.in_flight.saturating_sub(1);
                let (a, k) = (t.attempt, w.chunk);
                if let Some(since) = t.stopped {
                    if t.in_flight == 0 {
                        *place = None;
                        teardown::drained(now.saturating_duration_since(since));
                        out.push(LaneEvent::Quiet { attempt: a });
                    }
                } else if t.failed {
                } else if w.fence {
                    fences.landed(w.attempt, k, slots.load(w.dst as u16), t.nonce);
                } else {
                    fences.carried(w.attempt, k, fences::bit(p, pair));
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
        if landed > 0 && self.memory.gpu().is_some() {
            stats::landed(stats::Landing::Direct, landed);
        }
        any
    }

    /// Looks for rails that failed, goes on with their teardown, and takes back their lost requests once they are quiet.
    fn tend_rails(&mut self, now: Instant) {
        for p in 0..self.paths.len() {
            let path = &mut self.paths[p];
            path.watch(now);
            if path.stage.is_live() {
                continue;
            }
            path.escalate(now, &self.wake.bell, &self.peer);
            for w in path.take_lost() {
                self.lost(w);
            }
        }
        if self.down.is_some() {
            return;
        }
        if self.paths.iter().any(|p| matches!(p.stage, Stage::Wedged)) {
            self.down = Some(Cause::LaneFailed);
            self.close(Cause::LaneFailed, now);
            self.pending.push(LaneEvent::Wedged);
            return;
        }
        if self.closing.is_none() && self.paths.iter().all(|p| !p.stage.is_live()) {
            let failures = || self.paths.iter().filter_map(|p| Some((p.name(), p.failure?)));
            let cause = failures().next_back().map_or(Cause::LaneFailed, |(_, reason)| reason.cause());
            if let Some((rail, reason)) = failures().next() {
                tracing::warn!(peer = %self.peer, rail, %reason, "verbs lane down: no rail to this peer is left");
            }
            self.close(cause, now);
        }
        if let Some(cause) = self.closing
            && self.paths.iter().all(|p| p.stage.is_quiet())
        {
            self.down = Some(cause);
            self.pending.push(LaneEvent::Down { cause });
            self.pending.extend(self.attempts.drain(..).flatten().map(|t| LaneEvent::Quiet { attempt: t.attempt }));
        }
    }

    /// A request was lost with its rail, which is quiet now. A read is to be posted on another rail.
    fn lost(&mut self, w: Work) {
        if let Some(Some(t)) = self.attempts.get_mut(w.attempt as usize) {
            t.in_flight = t.in_flight.saturating_sub(1);
        }
        if w.fence {
            self.free_slots.push(w.dst as u16);
        }
        if !self.wanted(w) {
            self.settle(w.attempt as usize);
        } else if w.fence {
            self.fences.lost(w.attempt, w.chunk);
        } else {
            self.unposted.push_back(w);
        }
    }

    /// Stops posting for good.
    fn close(&mut self, cause: Cause, now: Instant) {
        if self.closing.is_some() {
            return;
        }
        self.closing = Some(cause);
        for i in 0..self.attempts.len() {
            self.fail(i, cause);
        }
        self.unposted.clear();
        for path in &mut self.paths {
            path.fail(FailureReason::Killed, now);
        }
    }

    /// Bytes in flight; `None`: nothing is in flight.
    fn bytes(&self) -> Option<u64> {
        let (bytes, any) = self.paths.iter().fold((0, false), |(b, any), p| (b + p.bytes(), any | (p.in_flight() > 0)));
        any.then_some(bytes)
    }

    /// Whether reads wait for room that no completion will announce.
    fn must_poll(&self) -> bool {
        !self.unposted.is_empty() && self.paths.iter().any(|p| p.stage.is_live() && p.in_flight() == 0)
    }
}
