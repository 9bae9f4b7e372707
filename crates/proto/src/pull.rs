//! One pull: which chunks are read, fenced and loaded; when it decides, and when it ends.
//!
//! A chunk's part from a source rank goes `Waiting → Reading → Fencing → Good`; the chunk is loaded when all parts are good.
//! A failed attempt is stopped, and its chunks are read again only after its lane's `Quiet` (promise 4): an old lane must
//! never overwrite a good block. The sets are frozen by the deadline, even if no lane reports anything (promise 3), and the engine
//! hears of the end only when every attempt is quiet.
//!
//! The plan of an offer that grows comes in parts. A pull that has read everything so far rests: its attempts stay, and cost nothing.

mod event;

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::{
    Attempt, Block, BlockReport, Cause, Chunk, FenceSlot, Grant, GroupOutcome, LaneEvent, LaneKind, LocalBlocks,
    Machine, Outcome, Plan, PositionSet, Read, Times,
    sabotage::{Bug, planted},
    source::{Fenced, Source, TooManyDone},
};

pub use self::event::{In, Out, Retry};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    /// Nothing new is posted; reads in flight may still complete.
    Draining(Cause),
    Decided,
    Ended,
}

/// One pull.
pub struct PullTracker {
    wanted: Vec<LocalBlocks>,
    plan: Option<Box<Plan>>,
    started: Instant,
    deadline: Instant,
    retry: Retry,
    local_ready: bool,
    sources: Vec<Source>,
    phase: Phase,
    lanes: Vec<LaneKind>,
    times: Times,
    outcome: Option<Box<Outcome>>,
    /// When the plan was made or grew.
    grown: Option<Instant>,
    /// The plan's mark and number of chunks then.
    extent: (u64, usize),
    /// For each group of the plan, a chunk before which all its chunks are loaded.
    low: Vec<usize>,
    out: VecDeque<Out>,
}

impl PullTracker {
    /// A pull of the `wanted` blocks from `sources` ranks. It waits for its plan, its claims, its lanes, and (unless
    /// `local_ready`) its destination blocks. Decides by `deadline`.
    pub fn new(
        now: Instant,
        wanted: Vec<LocalBlocks>,
        sources: usize,
        deadline: Instant,
        retry: Retry,
        local_ready: bool,
    ) -> Self {
        Self {
            wanted,
            plan: None,
            sources: (0..sources).map(|_| Source::new(now, retry.wait)).collect(),
            started: now,
            deadline,
            retry,
            local_ready,
            phase: Phase::Running,
            lanes: Vec::new(),
            times: Times { deadline: deadline.saturating_duration_since(now), ..Times::default() },
            outcome: None,
            grown: None,
            extent: (0, 0),
            low: Vec::new(),
            out: VecDeque::new(),
        }
    }

    /// The plan, once there is one.
    pub fn plan(&self) -> Option<&Plan> {
        self.plan.as_deref()
    }

    /// Takes the plan, to extend it and to give it back with [`In::Planned`].
    pub fn take_plan(&mut self) -> Option<Box<Plan>> {
        self.plan.take()
    }

    /// The attempt of a source that is not quiet.
    pub fn attempt(&self, source: usize) -> Option<Attempt> {
        Some(self.sources.get(source)?.live.as_ref()?.attempt)
    }

    /// Whether a source's attempt has nothing to do until the offer grows.
    pub fn rests(&self, source: usize) -> bool {
        self.sources.get(source).is_some_and(Source::rests)
    }

    /// Tokens from the prompt's start whose wanted blocks are all loaded; `whole` in all. 0 until there is a plan.
    pub fn loaded_prefix(&mut self, whole: u64) -> u64 {
        let Some(plan) = &self.plan else { return 0 };
        self.low.resize(plan.groups().len(), 0);
        let mut prefix = whole;
        for ((i, g), low) in plan.groups().iter().enumerate().zip(&mut self.low) {
            let open = |at: usize, c: &Chunk| usize::from(c.group) == i && !self.sources.iter().all(|s| s.is_good(at));
            let chunks = plan.chunks();
            while chunks.get(*low).is_some_and(|c| !open(*low, c)) {
                *low += 1;
            }
            let unread = chunks.get(*low).map(|c| g.wants[c.first as usize].position);
            let unread = unread.or_else(|| g.uncut().next().map(|(position, _)| position));
            let absent = g.not_offered.first().map(|(position, _)| *position);
            for position in [unread, absent].into_iter().flatten() {
                prefix = prefix.min(u64::from(position) * u64::from(g.block_tokens));
            }
        }
        prefix
    }

    /// The wanted blocks.
    pub fn wanted(&self) -> &[LocalBlocks] {
        &self.wanted
    }

    /// The frozen sets, from the decision to the end.
    pub fn outcome(&self) -> Option<&Outcome> {
        self.outcome.as_deref()
    }

    /// Whether its sets are frozen.
    pub fn decided(&self) -> bool {
        matches!(self.phase, Phase::Decided | Phase::Ended)
    }

    /// Number of loaded chunks, and of all chunks.
    pub fn progress(&self) -> (usize, usize) {
        (self.sources.iter().map(|s| s.good).min().unwrap_or(0), self.chunks())
    }

    fn chunks(&self) -> usize {
        self.plan.as_ref().map_or(0, |p| p.chunks().len())
    }

    /// The next reads to post for a source: the rest of one chunk. The caller reports how many the lane took with
    /// [`PullTracker::accepted`].
    pub fn next_reads(&mut self, source: usize) -> Option<(Attempt, &[Read])> {
        if self.phase != Phase::Running || !self.local_ready {
            return None;
        }
        self.sources.get_mut(source)?.next_reads(self.plan.as_deref()?, source)
    }

    /// The lane took the first `reads` reads of [`PullTracker::next_reads`].
    pub fn accepted(&mut self, source: usize, reads: usize) {
        if let Some(s) = self.sources.get_mut(source) {
            s.accepted(reads);
        }
    }

    /// The next fence to post for a source. The caller reports its post with [`PullTracker::fence_posted`].
    pub fn next_fence(&self, source: usize) -> Option<(Attempt, FenceSlot)> {
        self.sources.get(source)?.next_fence()
    }

    /// The fence of [`PullTracker::next_fence`] was posted.
    pub fn fence_posted(&mut self, source: usize) {
        if let Some(s) = self.sources.get_mut(source) {
            s.fence_posted();
        }
    }

    /// The grant for attempts of this source.
    pub fn grant(&self, source: usize) -> Option<Grant> {
        self.sources.get(source)?.grant
    }

    /// Asks for a lane for each source that can use one.
    fn want_lanes(&mut self, now: Instant) {
        if self.phase != Phase::Running || !self.local_ready || self.plan.is_none() {
            return;
        }
        for (source, s) in self.sources.iter_mut().enumerate() {
            let blocked = s.live.as_ref().is_some_and(|l| !(planted(Bug::RetryBeforeQuiet) && l.stopped.is_some()));
            if s.grant.is_none() || blocked || s.asked || !s.may_retry(now) {
                continue;
            }
            s.asked = true;
            self.out.push_back(Out::NeedLane { source, avoid: s.failed.clone() });
        }
    }

    fn event(&mut self, now: Instant, attempt: Attempt, event: LaneEvent) {
        let Some(source) = self.sources.iter().position(|s| s.live.as_ref().is_some_and(|l| l.attempt == attempt))
        else {
            return;
        };
        match event {
            // The sets are frozen.
            LaneEvent::Done { .. } | LaneEvent::Fence { .. } | LaneEvent::Again { .. } if self.decided() => {}
            LaneEvent::Done { chunk, reads, .. } => match self.sources[source].done(chunk, reads) {
                Ok(()) => {
                    self.sources[source].moved = now;
                    self.check_complete(now);
                }
                Err(TooManyDone) => self.failed(now, source, Cause::LaneFailed),
            },
            LaneEvent::Fence { chunk, word, .. } => match self.sources[source].fenced(chunk, word) {
                Fenced::Good => {
                    self.sources[source].moved = now;
                    self.times.first.get_or_insert(now.saturating_duration_since(self.started));
                    self.check_complete(now);
                }
                Fenced::Stale => self.conclude(now, Cause::Stale),
                Fenced::NotPosted => {}
            },
            LaneEvent::Again { chunk, .. } => self.sources[source].again(chunk),
            LaneEvent::Failed { cause, .. } | LaneEvent::Down { cause } => self.failed(now, source, cause),
            LaneEvent::Quiet { .. } => self.quiet(now, source),
            LaneEvent::Wedged => {
                // It will never be quiet, so nothing can be read into these blocks again. The sets are frozen before the
                // engine hears of the wedge, so that it can read them.
                self.conclude(now, Cause::LaneFailed);
                self.out.push_back(Out::Wedged);
            }
        }
    }

    /// Whether every chunk so far is loaded.
    fn has_read_all(&self) -> bool {
        let all = self.chunks();
        self.sources.iter().all(|s| s.good == all)
    }

    fn check_complete(&mut self, now: Instant) {
        if !self.decided() && self.plan.as_ref().is_some_and(|p| p.is_complete()) && self.has_read_all() {
            self.times.data = Some(now.saturating_duration_since(self.started));
            self.decide(now, Cause::LaneFailed);
        }
    }

    /// An attempt failed: stops it. The next one begins after its `Quiet`.
    fn failed(&mut self, now: Instant, source: usize, cause: Cause) {
        let s = &mut self.sources[source];
        if let Some(attempt) = s.fail(now, cause) {
            self.out.push_back(Out::Stop(attempt));
            if planted(Bug::RetryBeforeQuiet) {
                s.reread();
                self.want_lanes(now);
            }
        }
        match cause {
            // Another lane may succeed, if time and attempts are left.
            Cause::LaneFailed | Cause::Unreachable | Cause::Corrupt => {}
            // The offer or its owner is gone: no lane can help.
            cause => self.conclude(now, cause),
        }
    }

    fn quiet(&mut self, now: Instant, source: usize) {
        let s = &mut self.sources[source];
        let Some(cause) = s.quiet() else { return };
        if self.phase == Phase::Running {
            s.reread();
            self.try_again(now, source, cause);
        }
        self.check_end(now);
    }

    fn try_again(&mut self, now: Instant, source: usize, cause: Cause) {
        if self.sources[source].back_off(now) >= self.retry.attempts {
            return self.conclude(now, cause);
        }
        self.want_lanes(now);
    }

    fn stop_all(&mut self, now: Instant) {
        self.out.extend(self.sources.iter_mut().filter_map(|s| s.stop(now)).map(Out::Stop));
    }

    /// Nothing more can be loaded: decides now.
    fn conclude(&mut self, now: Instant, cause: Cause) {
        if !self.decided() {
            self.decide(now, cause);
        }
    }

    fn decide(&mut self, now: Instant, cause: Cause) {
        let (groups, bytes) = match &self.plan {
            Some(plan) => self.freeze(plan, cause),
            None => (self.wanted.iter().map(|l| GroupOutcome::all_invalid(l, cause)).collect(), 0),
        };
        self.times.decided = Some(now.saturating_duration_since(self.started));
        let retries = self.sources.iter().map(|s| s.attempts.saturating_sub(1)).sum();
        let lanes = std::mem::take(&mut self.lanes);
        self.outcome = Some(Box::new(Outcome { groups, bytes, lanes, retries, times: self.times }));
        self.phase = Phase::Decided;
        self.out.push_back(Out::Decided);
        self.stop_all(now);
        self.check_end(now);
    }

    /// The frozen sets and the loaded bytes: good chunks are loaded, and the rest is invalid by `cause`.
    fn freeze(&self, plan: &Plan, cause: Cause) -> (Vec<GroupOutcome>, u64) {
        let mut groups: Vec<GroupOutcome> = plan
            .groups()
            .iter()
            .map(|g| {
                let missing: PositionSet = g.not_offered.iter().map(|(p, _)| *p).collect();
                let causes = if missing.is_empty() { Vec::new() } else { vec![(Cause::NotOffered, missing.clone())] };
                GroupOutcome { group: g.id, loaded: PositionSet::new(), invalid: missing, causes }
            })
            .collect();
        let mut bytes = 0;
        for (i, chunk) in plan.chunks().iter().enumerate() {
            let g = &mut groups[usize::from(chunk.group)];
            let wants = plan.wants(i as u32);
            if self.sources.iter().all(|s| s.is_good(i)) {
                bytes += wants.len() as u64 * plan.group_of(i as u32).bytes_per_block();
                g.loaded.insert_ascending(wants.iter().map(|w| w.position));
                continue;
            }
            g.invalid.insert_ascending(wants.iter().map(|w| w.position));
            add_cause(g, cause, wants.iter().map(|w| w.position));
        }
        for (g, planned) in groups.iter_mut().zip(plan.groups()) {
            let uncut = planned.uncut().map(|(position, _)| position);
            g.invalid.insert_ascending(uncut.clone());
            add_cause(g, cause, uncut);
        }
        (groups, bytes)
    }

    fn check_end(&mut self, now: Instant) {
        let quiet = self.sources.iter().all(|s| s.live.is_none());
        if let Phase::Draining(cause) = self.phase
            && quiet
        {
            return self.decide(now, cause);
        }
        if self.phase == Phase::Decided && quiet {
            self.phase = Phase::Ended;
            if let Some(mut outcome) = self.outcome.take() {
                outcome.times.ended = Some(now.saturating_duration_since(self.started));
                self.out.push_back(Out::Ended(outcome));
            }
        }
    }

    /// The longest time that one of its lanes may take to become quiet.
    fn quiet_bound(&self) -> Duration {
        self.sources.iter().filter_map(|s| s.live.as_ref()).map(|l| l.caps.quiet_bound).max().unwrap_or_default()
    }

    /// When it starts to stop its lanes. If the deadline is short compared to the bound, half of the time is still for reading:
    /// the pull then ends later, but decides no later.
    fn stop_at(&self) -> Instant {
        let half = self.started + self.deadline.saturating_duration_since(self.started) / 2;
        self.deadline.checked_sub(self.quiet_bound()).map_or(half, |t| t.max(half))
    }

    /// When it gives up because a source moves nothing and its peer is silent. Data that moves is no reason to give up: a device
    /// or a mapping may serve the memory of a stopped process.
    fn patience_ends(&self) -> Option<Instant> {
        let patience = self.retry.patience;
        // This process may have been stopped itself, with the peer's answers unread: time to read them.
        let second_look = patience / 8;
        let open = !self.plan.as_ref().is_some_and(|p| p.is_complete());
        let unfinished = self.sources.iter().filter(|s| open || s.good < self.chunks());
        let ends = unfinished.filter_map(|s| {
            let silent = s.silent?.checked_add(second_look)?;
            Some(silent.max(s.moved.checked_add(patience)?))
        });
        ends.min()
    }

    /// When the pull ends as `Stalled`. The peer is alive meanwhile: a silent one ends the pull earlier.
    fn growth_ends(&self) -> Option<Instant> {
        let begun = self.plan.as_ref().is_some_and(|p| p.mark() > 0);
        match (&self.plan, self.grown) {
            (Some(p), _) if p.is_complete() || !self.has_read_all() => None,
            (Some(_), Some(grown)) if begun => grown.checked_add(self.retry.stalled),
            (None, _) if !self.retry.awaited => None,
            _ => self.started.checked_add(self.retry.queued),
        }
    }

    /// The local blocks at the positions of an outcome.
    pub fn report(&self, outcome: &Outcome) -> BlockReport {
        let mut report = BlockReport { loaded: Vec::new(), invalid: Vec::new() };
        for (l, o) in self.wanted.iter().zip(&outcome.groups) {
            report.loaded.reserve_exact(o.loaded.len() as usize);
            report.invalid.reserve_exact(o.invalid.len() as usize);
            // Both ascend by position, so one pass over the ranges is enough.
            let mut ranges = o.loaded.ranges().iter().peekable();
            for (position, id) in l.wants() {
                let block = Block { group: l.group, id };
                while ranges.next_if(|r| r[1] < position).is_some() {}
                let loaded = ranges.peek().is_some_and(|r| r[0] <= position);
                if loaded { &mut report.loaded } else { &mut report.invalid }.push(block);
            }
        }
        report
    }
}

/// Adds invalid positions of a group to those of their cause. They are ascending.
fn add_cause(g: &mut GroupOutcome, cause: Cause, positions: impl Iterator<Item = u32>) {
    let mut positions = positions.peekable();
    if positions.peek().is_none() {
        return;
    }
    let at = g.causes.iter().position(|(c, _)| *c == cause).unwrap_or_else(|| {
        g.causes.push((cause, PositionSet::new()));
        g.causes.len() - 1
    });
    g.causes[at].1.insert_ascending(positions);
}

impl Machine for PullTracker {
    type In = In;
    type Out = Out;

    fn handle(&mut self, now: Instant, event: In) {
        match event {
            In::LocalReady => {
                self.local_ready = true;
                self.want_lanes(now);
            }
            In::Met => {
                self.times.hello.get_or_insert(now.saturating_duration_since(self.started));
            }
            In::Planned(plan) => {
                self.times.hello.get_or_insert(now.saturating_duration_since(self.started));
                if self.plan.is_some() || self.decided() || plan.sources() != self.sources.len() {
                    return;
                }
                for (number, s) in self.sources.iter_mut().enumerate() {
                    s.planned(&plan, number);
                }
                let nothing = plan.is_complete() && plan.chunks().is_empty();
                // One source's growth moves nothing while another source lags behind.
                let extent = (plan.mark(), plan.chunks().len());
                if std::mem::replace(&mut self.extent, extent) != extent || self.grown.is_none() {
                    self.grown = Some(now);
                }
                self.plan = Some(plan);
                if nothing {
                    return self.conclude(now, Cause::NotOffered);
                }
                self.check_complete(now);
                self.want_lanes(now);
            }
            In::Granted { source, grant } => {
                if let Some(s) = self.sources.get_mut(source) {
                    // A second grant after the session came back: the nonce cannot change while the offer lives.
                    let same = s.grant.is_none_or(|g| g == grant);
                    s.grant = Some(grant);
                    s.moved = now;
                    if !same {
                        return self.conclude(now, Cause::Stale);
                    }
                }
                if self.sources.iter().all(|s| s.grant.is_some()) {
                    self.times.claim.get_or_insert(now.saturating_duration_since(self.started));
                }
                self.want_lanes(now);
            }
            In::Lost { cause } => self.conclude(now, cause),
            In::Lane { source, attempt, caps } => {
                let running = self.phase == Phase::Running;
                if let Some(s) = self.sources.get_mut(source) {
                    s.begin(attempt, caps, running);
                    if running {
                        self.lanes.push(caps.kind);
                    } else {
                        // It came too late.
                        self.stop_all(now);
                    }
                }
            }
            In::Silent { source, silent } => {
                if let Some(s) = self.sources.get_mut(source) {
                    s.silent = silent.then(|| s.silent.unwrap_or(now));
                }
            }
            In::NoLane { source, cause } => {
                if let Some(s) = self.sources.get_mut(source) {
                    s.asked = false;
                }
                if self.phase == Phase::Running {
                    match cause {
                        Cause::LaneFailed | Cause::Unreachable | Cause::Corrupt => self.try_again(now, source, cause),
                        cause => self.conclude(now, cause),
                    }
                }
            }
            In::Event(attempt, event) => self.event(now, attempt, event),
            In::Cancel(cause) => self.conclude(now, cause),
        }
    }

    fn tick(&mut self, now: Instant) {
        if self.phase == Phase::Running && self.patience_ends().is_some_and(|t| t <= now) {
            self.conclude(now, if self.times.hello.is_some() { Cause::PeerDown } else { Cause::Unreachable });
        }
        if self.phase == Phase::Running && self.growth_ends().is_some_and(|t| t <= now) {
            self.conclude(now, Cause::Stalled);
        }
        if self.phase == Phase::Running && now >= self.stop_at() {
            self.phase = Phase::Draining(Cause::Deadline);
            self.stop_all(now);
            self.check_end(now);
        }
        if now >= self.deadline {
            self.conclude(now, Cause::Deadline);
        }
        self.out.extend(self.sources.iter_mut().filter_map(|s| s.kill(now)).map(Out::Kill));
        self.want_lanes(now);
    }

    fn poll(&mut self) -> Option<Out> {
        self.out.pop_front()
    }

    fn next_timeout(&self) -> Option<Instant> {
        let mut next: Option<Instant> = None;
        let mut at = |t: Instant| next = Some(next.map_or(t, |n| n.min(t)));
        match self.phase {
            Phase::Running => {
                at(self.stop_at());
                self.patience_ends().map(&mut at);
                self.growth_ends().map(&mut at);
            }
            Phase::Draining(_) => at(self.deadline),
            Phase::Decided | Phase::Ended => {}
        }
        for s in &self.sources {
            s.kill_at().map(&mut at);
            if self.phase == Phase::Running {
                s.retry_at().map(&mut at);
            }
        }
        next
    }
}
