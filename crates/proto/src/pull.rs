//! One pull: which chunks are read, fenced, loaded; when it decides, and when it ends.
//!
//! A chunk's part from a source rank goes `Waiting → Reading → Fencing → Good`; it is loaded when all parts are good.
//! A failed attempt is stopped, and its chunks are read again only when its lane has said `Quiet` (promise 4): an old lane
//! must never overwrite a good block. The sets are frozen by the deadline, whatever the lanes say (promise 3), and the
//! engine hears of the end only when every attempt is quiet.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::{
    Machine,
    block::{Block, PositionSet},
    error::Cause,
    lane::{Attempt, FenceSlot, Grant, LaneCaps, LaneEvent, LaneKind},
    outcome::{BlockReport, GroupOutcome, Outcome, Times},
    plan::{LocalBlocks, Plan, Read},
    sabotage::{Bug, planted},
    source::{Fenced, Live, Source, TooManyDone},
};

/// What happens to a pull.
#[derive(Debug, Clone)]
pub enum In {
    /// Earlier work on the destination blocks is done.
    LocalReady,
    /// The peers' Hellos are there, and what is to be read is known.
    Planned(Box<Plan>),
    /// A source rank granted its claim.
    Granted {
        /// Index of the source.
        source: usize,
        /// What to read under.
        grant: Grant,
    },
    /// A source's claim is gone: nothing more can be fenced.
    Lost {
        /// Why.
        cause: Cause,
    },
    /// The lane that was asked for.
    Lane {
        /// Index of the source.
        source: usize,
        /// The new attempt.
        attempt: Attempt,
        /// What the lane can do.
        caps: LaneCaps,
    },
    /// No lane can be had.
    NoLane {
        /// Index of the source.
        source: usize,
        /// Why.
        cause: Cause,
    },
    /// Something happened on an attempt's lane. `Down` of a lane is told to each of its attempts.
    Event(Attempt, LaneEvent),
    /// The engine, or this side's shutdown, gives the pull up.
    Cancel(Cause),
}

/// What a pull wants done, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Out {
    /// A lane to this source, if possible of none of these kinds.
    NeedLane {
        /// Index of the source.
        source: usize,
        /// Kinds that failed this pull.
        avoid: Vec<LaneKind>,
    },
    /// Stop the attempt; its `Quiet` is awaited.
    Stop(Attempt),
    /// It did not become quiet in time: up the ladder.
    Kill(Attempt),
    /// The sets are frozen: the producer's blocks are not needed any more.
    Decided,
    /// Nothing can write the local blocks any more. Said once.
    Ended(Box<Outcome>),
    /// Local blocks may be written for ever: withhold them. The pull stays open.
    Wedged,
}

/// How often and how patiently a pull tries again.
#[derive(Debug, Clone, Copy)]
pub struct Retry {
    /// Attempts for each source, the first included.
    pub attempts: u32,
    /// Wait before the third attempt; doubles with each further one. The second comes at once.
    pub wait: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    /// Nothing new is posted; what is in flight may still make it.
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
    out: VecDeque<Out>,
}

impl PullTracker {
    /// A pull of the `wanted` blocks from `sources` ranks. It waits for its plan, its claims, its lanes, and (unless
    /// `local_ready`) its destination blocks.
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
            sources: (0..sources).map(|_| Source::new(retry.wait)).collect(),
            started: now,
            deadline,
            retry,
            local_ready,
            phase: Phase::Running,
            lanes: Vec::new(),
            times: Times { deadline: deadline.saturating_duration_since(now), ..Times::default() },
            outcome: None,
            out: VecDeque::new(),
        }
    }

    /// The plan, once there is one.
    pub fn plan(&self) -> Option<&Plan> {
        self.plan.as_deref()
    }

    /// What was wanted.
    pub fn wanted(&self) -> &[LocalBlocks] {
        &self.wanted
    }

    /// When it decides at the latest.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Whether its sets are frozen.
    pub fn decided(&self) -> bool {
        matches!(self.phase, Phase::Decided | Phase::Ended)
    }

    /// Chunks that are loaded so far, and all chunks.
    pub fn progress(&self) -> (usize, usize) {
        (self.sources.iter().map(|s| s.good).min().unwrap_or(0), self.chunks())
    }

    fn chunks(&self) -> usize {
        self.plan.as_ref().map_or(0, |p| p.chunks().len())
    }

    /// Attempts that have not said `Quiet`.
    pub fn attempts(&self) -> impl Iterator<Item = Attempt> + '_ {
        self.sources.iter().filter_map(|s| s.live.as_ref().map(|l| l.attempt))
    }

    /// The next reads to post for a source: all of one chunk that are left. Tell how many were taken with
    /// [`PullTracker::accepted`].
    pub fn next_reads(&mut self, source: usize) -> Option<(Attempt, &[Read])> {
        if self.phase != Phase::Running || !self.local_ready {
            return None;
        }
        self.sources.get_mut(source)?.next_reads(self.plan.as_deref()?, source)
    }

    /// How many of the reads that [`PullTracker::next_reads`] gave were taken by the lane.
    pub fn accepted(&mut self, source: usize, reads: usize) {
        if let Some(s) = self.sources.get_mut(source) {
            s.accepted(reads);
        }
    }

    /// The next fence to post for a source. Tell with [`PullTracker::fence_posted`] that it was.
    pub fn next_fence(&self, source: usize) -> Option<(Attempt, FenceSlot)> {
        self.sources.get(source)?.next_fence()
    }

    /// The fence that [`PullTracker::next_fence`] gave was posted.
    pub fn fence_posted(&mut self, source: usize) {
        if let Some(s) = self.sources.get_mut(source) {
            s.fence_posted();
        }
    }

    /// What an attempt of this source must be begun with.
    pub fn grant(&self, source: usize) -> Option<Grant> {
        self.sources.get(source)?.grant
    }

    /// Asks for lanes where they are needed and useful.
    fn want_lanes(&mut self, now: Instant) {
        if self.phase != Phase::Running || !self.local_ready || self.plan.is_none() {
            return;
        }
        for (source, s) in self.sources.iter_mut().enumerate() {
            let blocked = s.live.as_ref().is_some_and(|l| !(planted(Bug::RetryBeforeQuiet) && l.stopped.is_some()));
            if s.grant.is_none() || blocked || s.asked || s.retry_at.is_some_and(|t| t > now) {
                continue;
            }
            s.retry_at = None;
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
            LaneEvent::Done { chunk, reads, .. } => match self.sources[source].done(chunk, reads) {
                Ok(()) => self.check_complete(now),
                Err(TooManyDone) => self.failed(now, source, Cause::LaneFailed),
            },
            LaneEvent::Fence { chunk, word, .. } => match self.sources[source].fenced(chunk, word) {
                Fenced::Good => {
                    self.times.first.get_or_insert(now.saturating_duration_since(self.started));
                    self.check_complete(now);
                }
                Fenced::Stale => self.conclude(now, Cause::Stale),
                Fenced::Unasked => {}
            },
            LaneEvent::Again { chunk, .. } => self.sources[source].again(chunk),
            LaneEvent::Failed { cause, .. } | LaneEvent::Down { cause } => self.failed(now, source, cause),
            LaneEvent::Quiet { .. } => self.quiet(now, source),
            LaneEvent::Wedged => {
                self.out.push_back(Out::Wedged);
                // It will never be quiet, so nothing is read again into these blocks: waiting brings nothing.
                self.conclude(now, Cause::LaneFailed);
            }
        }
    }

    fn check_complete(&mut self, now: Instant) {
        let all = self.chunks();
        if !self.decided() && self.sources.iter().all(|s| s.good == all) {
            self.times.data = Some(now.saturating_duration_since(self.started));
            self.decide(now, Cause::LaneFailed);
        }
    }

    /// An attempt goes no further: stop it, and try again when it is quiet.
    fn failed(&mut self, now: Instant, source: usize, cause: Cause) {
        let s = &mut self.sources[source];
        if let Some(live) = &mut s.live {
            live.why.get_or_insert(cause);
        }
        if let Some(attempt) = s.stop(now) {
            self.out.push_back(Out::Stop(attempt));
            if planted(Bug::RetryBeforeQuiet) {
                s.reread();
                self.want_lanes(now);
            }
        }
        match cause {
            // Another lane may do better, where time and tries are left.
            Cause::LaneFailed | Cause::Unreachable => {}
            // The offer or its owner is gone: no lane helps.
            cause => self.conclude(now, cause),
        }
    }

    fn quiet(&mut self, now: Instant, source: usize) {
        let s = &mut self.sources[source];
        let Some(live) = s.live.take() else { return };
        s.avoid(live.caps.kind);
        if self.phase == Phase::Running {
            s.reread();
            self.try_again(now, source, live.why.unwrap_or(Cause::LaneFailed));
        }
        self.check_end(now);
    }

    fn try_again(&mut self, now: Instant, source: usize, cause: Cause) {
        let s = &mut self.sources[source];
        s.tries += 1;
        if s.tries >= self.retry.attempts {
            return self.conclude(now, cause);
        }
        s.wait(now);
        self.want_lanes(now);
    }

    fn stop_all(&mut self, now: Instant) {
        self.out.extend(self.sources.iter_mut().filter_map(|s| s.stop(now)).map(Out::Stop));
    }

    /// Nothing better can come of it: freeze the sets now.
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

    /// What is good now is loaded, and the rest is invalid by `cause`; and the loaded bytes.
    fn freeze(&self, plan: &Plan, cause: Cause) -> (Vec<GroupOutcome>, u64) {
        let mut groups: Vec<GroupOutcome> = plan
            .groups()
            .iter()
            .map(|g| {
                let not: PositionSet = g.not_offered.iter().map(|(p, _)| *p).collect();
                let causes = if not.is_empty() { Vec::new() } else { vec![(Cause::NotOffered, not.clone())] };
                GroupOutcome { group: g.id, loaded: PositionSet::new(), invalid: not, causes }
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
            let at = g.causes.iter().position(|(c, _)| *c == cause).unwrap_or_else(|| {
                g.causes.push((cause, PositionSet::new()));
                g.causes.len() - 1
            });
            g.causes[at].1.insert_ascending(wants.iter().map(|w| w.position));
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

    /// The longest time that any of its lanes may take to become quiet.
    fn quiet_bound(&self) -> Duration {
        self.sources.iter().filter_map(|s| s.live.as_ref()).map(|l| l.caps.quiet_bound).max().unwrap_or_default()
    }

    /// When it starts to stop. A deadline that is short next to the bound still leaves half of its time for reading: the
    /// pull then ends later, but decides no later.
    fn stop_at(&self) -> Instant {
        let half = self.started + self.deadline.saturating_duration_since(self.started) / 2;
        self.deadline.checked_sub(self.quiet_bound()).map_or(half, |t| t.max(half))
    }

    /// The local blocks that an outcome's positions stand for.
    pub fn report(&self, outcome: &Outcome) -> BlockReport {
        let mut report = BlockReport { loaded: Vec::new(), invalid: Vec::new() };
        for (l, o) in self.wanted.iter().zip(&outcome.groups) {
            report.loaded.reserve_exact(o.loaded.len() as usize);
            report.invalid.reserve_exact(o.invalid.len() as usize);
            // Both ascend by position, so one walk over the ranges does.
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

impl Machine for PullTracker {
    type In = In;
    type Out = Out;

    fn handle(&mut self, now: Instant, event: In) {
        match event {
            In::LocalReady => {
                self.local_ready = true;
                self.want_lanes(now);
            }
            In::Planned(plan) => {
                self.times.hello.get_or_insert(now.saturating_duration_since(self.started));
                if self.plan.is_some() || self.decided() || plan.sources() != self.sources.len() {
                    return;
                }
                for s in &mut self.sources {
                    s.planned(plan.chunks().len());
                }
                self.plan = Some(plan);
                if self.chunks() == 0 {
                    return self.decide(now, Cause::NotOffered);
                }
                self.want_lanes(now);
            }
            In::Granted { source, grant } => {
                if let Some(s) = self.sources.get_mut(source) {
                    // Granted again after the session came back: the nonce may not change while the offer lives.
                    let same = s.grant.is_none_or(|g| g == grant);
                    s.grant = Some(grant);
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
                    s.asked = false;
                    s.live = Some(Live { attempt, caps, stopped: None, killed: false, why: None });
                    s.attempts += u32::from(running);
                    if running {
                        self.lanes.push(caps.kind);
                    } else {
                        // It came too late to be of use.
                        self.stop_all(now);
                    }
                }
            }
            In::NoLane { source, cause } => {
                if let Some(s) = self.sources.get_mut(source) {
                    s.asked = false;
                }
                if self.phase == Phase::Running {
                    match cause {
                        Cause::LaneFailed | Cause::Unreachable => self.try_again(now, source, cause),
                        cause => self.conclude(now, cause),
                    }
                }
            }
            In::Event(attempt, event) => self.event(now, attempt, event),
            In::Cancel(cause) => self.conclude(now, cause),
        }
    }

    fn tick(&mut self, now: Instant) {
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
            Phase::Running => at(self.stop_at()),
            Phase::Draining(_) => at(self.deadline),
            Phase::Decided | Phase::Ended => {}
        }
        for s in &self.sources {
            s.kill_at().map(&mut at);
            if s.live.is_none() && self.phase == Phase::Running && !s.asked {
                s.retry_at.map(&mut at);
            }
        }
        next
    }
}
