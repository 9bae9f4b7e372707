//! The pulls and lanes of one consumer rank.
//!
//! Owns every tracker and every lane. Never blocks, never does I/O and never reads a clock: the data thread calls it with
//! events and the time, and carries out its actions. Pulls keep going while lanes come and go: a failed lane is replaced, a
//! better one is searched for in the background, and no event of a dead incarnation reaches a pull.

pub mod better;
mod event;
mod holds;
mod lanes;
mod peers;
mod pulls;

use std::{collections::VecDeque, sync::Arc, time::Instant};

use crate::{
    Cause, Contents, Grant, Incarnation, Lane, LaneEvent, LaneKind, LocalBlocks, OfferGroup, Offered, Outcome, Plan,
    PlanError, PoolLayout, Shard, Source,
    hello::Welcome,
    pull,
    sabotage::{Bug, planted},
};

use self::{
    better::Waits,
    holds::Holds,
    lanes::{LaneNo, Lanes},
    peers::Peers,
    pulls::{Pull, Pulls},
};
pub use self::{
    event::{Addr, Ended, In, LaneWish, Need, Out, Progress, PullId, Start},
    holds::{Hold, HoldRequest, HoldSetter, HoldState},
};

/// One source rank of a pull.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct PullSource {
    pull: PullId,
    /// Index into the pull's sources.
    source: usize,
}

/// Pulls and lanes of one consumer rank.
pub struct Puller<L> {
    layout: Arc<PoolLayout>,
    shard: Shard,
    limit: usize,
    pulls: Pulls,
    holds: Holds,
    peers: Peers,
    lanes: Lanes<L>,
    /// Scratch space of a turn, so that a turn allocates nothing.
    events: Vec<LaneEvent>,
    numbers: Vec<LaneNo>,
    out: VecDeque<Out>,
}

impl<L: Lane> Puller<L> {
    /// A puller over this rank's memory. `limit` bounds the blocks of a pull. `waits` sets how often it searches for a
    /// better lane.
    pub fn new(layout: Arc<PoolLayout>, shard: Shard, limit: usize, waits: Waits) -> Self {
        Self {
            layout,
            shard,
            limit,
            pulls: Pulls::default(),
            holds: Holds::default(),
            peers: Peers::new(waits),
            lanes: Lanes::default(),
            events: Vec::new(),
            numbers: Vec::new(),
            out: VecDeque::new(),
        }
    }

    /// Number of pulls that have not ended.
    pub fn pulls(&self) -> usize {
        self.pulls.len()
    }

    /// Number of offers that are held for a later pull.
    pub fn holds(&self) -> usize {
        self.holds.len()
    }

    /// The frozen sets of a pull that has decided and not ended.
    pub fn outcome(&self, pull: PullId) -> Option<&Outcome> {
        self.pulls.get(pull)?.tracker.outcome()
    }

    /// Connected lanes that take new attempts.
    pub fn lanes(&self) -> impl Iterator<Item = (LaneNo, LaneKind, &Addr)> {
        self.lanes.alive()
    }

    /// A lane, for the caller to arm it before it sleeps.
    pub fn lane_mut(&mut self, lane: LaneNo) -> Option<&mut L> {
        self.lanes.get_mut(lane).map(|l| &mut l.lane)
    }

    /// Lanes that have attempts.
    pub fn busy_lanes(&self) -> impl Iterator<Item = LaneNo> + '_ {
        self.lanes.busy(true)
    }

    /// Lanes that have no attempts.
    pub fn idle_lanes(&self) -> impl Iterator<Item = LaneNo> + '_ {
        self.lanes.busy(false)
    }

    /// Marks a lane whose descriptor is readable: the next turn polls it.
    pub fn mark_ready(&mut self, lane: LaneNo) {
        if let Some(l) = self.lanes.get_mut(lane) {
            l.ready = true;
        }
    }

    /// Takes an event.
    pub fn handle(&mut self, now: Instant, event: In<L>) {
        match event {
            In::Start(start) => {
                let taken = self.holds.take(&start);
                let id = self.pulls.start(start, &taken, &mut self.out);
                let Some(p) = self.pulls.get(id) else { return };
                let silent: Vec<_> = p.ranks().map(|r| self.peers.is_silent(&r.addr)).collect();
                for (source, _) in silent.into_iter().enumerate().filter(|(_, silent)| *silent) {
                    self.pulls.tell(now, id, pull::In::Silent { source, silent: true });
                }
                for (of, grant, contents) in holds::grants(taken, |source| PullSource { pull: id, source }) {
                    self.granted(now, of, grant, contents);
                }
                self.plan(now, id);
            }
            In::Hold(wait, limit) => {
                let Self { holds, pulls, out, .. } = self;
                let at: Vec<Addr> = wait.sources.iter().map(|at| wait.offer.ranks[*at].addr.as_str().into()).collect();
                holds.hold(now, *wait, limit, &mut || pulls.next_claim(), out);
                for addr in at.iter().filter(|addr| self.peers.is_silent(addr)) {
                    self.holds.set_silent(now, addr, true);
                }
            }
            In::Release(offer) => self.holds.release(&offer, &mut self.out),
            In::LocalReady(id) => self.pulls.tell(now, id, pull::In::LocalReady),
            In::Cancel(id, cause) => self.pulls.tell(now, id, pull::In::Cancel(cause)),
            In::Peer(addr, welcome) => self.met(now, addr, welcome),
            In::Granted(claim, grant, contents) => {
                if !self.holds.granted(claim, grant, &contents)
                    && let Some(of) = self.pulls.of_claim(claim)
                {
                    self.granted(now, of, grant, contents);
                }
            }
            In::Grown(claim, growth) => {
                if !self.holds.grown(claim, &growth)
                    && let Some(of) = self.pulls.of_claim(claim)
                    && self.pulls.grown(of, &growth)
                {
                    self.plan(now, of.pull);
                }
            }
            In::Lost(claim, cause) => {
                self.holds.lost(claim);
                if let Some(of) = self.pulls.of_claim(claim) {
                    self.pulls.tell(now, of.pull, pull::In::Lost { cause });
                }
            }
            In::Lane { peer, incarnation, need, lane } => self.connected(now, peer, incarnation, need, lane),
            In::Silent(addr, silent) if !planted(Bug::SilenceIgnored) => {
                self.peers.set_silent(&addr, silent);
                self.holds.set_silent(now, &addr, silent);
                for PullSource { pull, source } in self.pulls.sources_at(&addr) {
                    self.pulls.tell(now, pull, pull::In::Silent { source, silent });
                }
            }
            In::Silent(..) => {}
            In::Dropped(addr) => {
                self.peers.remove(&addr);
                self.lanes.retire(&addr, None);
                self.lanes.remove_dead();
            }
            In::Shutdown => {
                self.holds.end_all(&mut self.out);
                self.pulls.tell_all(now, &pull::In::Cancel(Cause::Shutdown));
            }
        }
        self.settle(now);
    }

    /// Makes progress: polls lanes, posts reads and checks deadlines. `true` when there is more to do at once.
    pub fn turn(&mut self, now: Instant) -> bool {
        // Poll before checking deadlines: if the thread was descheduled for a few milliseconds, a lane's `Quiet` may already
        // be there, and a kill would lose the reads of every pull on that lane.
        if self.pulls.next_timeout().is_some_and(|t| t <= now) {
            let busy: Vec<_> = self.busy_lanes().collect();
            for n in busy {
                self.poll_lane(now, n);
            }
        }
        self.pulls.tick(now);
        self.holds.tick(now, &mut self.out);
        self.settle(now);
        let mut numbers = std::mem::take(&mut self.numbers);
        numbers.extend(self.lanes.due());
        let mut more = false;
        for n in numbers.drain(..) {
            self.lanes.post(n, &mut self.pulls);
            more |= self.poll_lane(now, n);
        }
        self.numbers = numbers;
        self.settle(now);
        more
    }

    /// The next action, in order.
    pub fn poll(&mut self) -> Option<Out> {
        self.out.pop_front()
    }

    /// The time of the next [`Puller::turn`] if no event comes before it.
    pub fn next_timeout(&self) -> Option<Instant> {
        [self.pulls.next_timeout(), self.holds.next_timeout()].into_iter().flatten().min()
    }

    /// A source granted a pull's claim.
    fn granted(&mut self, now: Instant, of: PullSource, grant: Grant, contents: Arc<Contents>) {
        self.pulls.granted(of, contents);
        self.pulls.tell(now, of.pull, pull::In::Granted { source: of.source, grant });
        self.plan(now, of.pull);
    }

    /// Plans a pull once all its peers are known and have granted their claims, and again when its offer has grown.
    fn plan(&mut self, now: Instant, id: PullId) {
        let planned = |p: &&Pull| p.tracker.plan().is_some_and(Plan::is_complete);
        let Some(p) = self.pulls.get(id).filter(|p| !planned(p) && !p.tracker.decided()) else { return };
        // A peer that is missing or of another incarnation: its session finds out which.
        let welcomes: Option<Vec<_>> = p.ranks().map(|rank| self.peers.welcome(rank)).collect();
        let Some(welcomes) = welcomes else { return };
        let Some(contents) = p.contents() else {
            return self.pulls.tell(now, id, pull::In::Met);
        };
        let contents: Vec<_> = contents.into_iter().cloned().collect();
        let sources: Vec<_> = welcomes.iter().map(|w| Source { layout: &w.pool, shard: &w.shard }).collect();
        let plan = self.pulls.take_plan(id);
        let Some(p) = self.pulls.get(id) else { return };
        let (plan, error) = match self.plan_of(p, plan, &contents, &sources) {
            Ok(plan) => (Some(plan), None),
            Err((plan, error)) => (plan, Some(error)),
        };
        if let Some(error) = &error {
            tracing::warn!(request = %p.start.offer.request, offer = %p.start.offer.id, %error, "cannot plan the pull");
        }
        if let Some(plan) = plan {
            self.pulls.tell(now, id, pull::In::Planned(plan));
        }
        if error.is_some() {
            return self.pulls.tell(now, id, pull::In::Cancel(Cause::BadOffer));
        }
        let Some(p) = self.pulls.get(id) else { return };
        for attempt in (0..sources.len()).filter_map(|source| p.tracker.attempt(source)) {
            self.lanes.wake(attempt);
        }
    }

    /// Makes or extends the plan of a pull. The old plan comes back with an error.
    fn plan_of(
        &self,
        p: &Pull,
        plan: Option<Box<Plan>>,
        contents: &[Arc<Contents>],
        sources: &[Source<'_>],
    ) -> Result<Box<Plan>, (Option<Box<Plan>>, PlanError)> {
        let contents: Vec<&Contents> = contents.iter().map(|c| &**c).collect();
        let fits = match contents.first() {
            None => Err(PlanError::Name("it has no ranks".into())),
            Some(first) if contents[1..].iter().any(|c| !c.agrees(first)) => Err(PlanError::Ranks),
            Some(first) => first.fits(&p.start.offer).map_err(PlanError::Name),
        };
        if let Err(error) = fits {
            return Err((plan, error));
        }
        let here = Source { layout: &self.layout, shard: &self.shard };
        let wanted = p.tracker.wanted();
        let mut plan = match plan {
            Some(plan) => plan,
            None => Box::new(Plan::open(here, wanted, p.start.chunk, self.limit).map_err(|e| (None, e))?),
        };
        let Some(mut offered) = Offered::by_all(&contents) else { return Err((Some(plan), PlanError::Ranks)) };
        let listed =
            |l: &LocalBlocks| OfferGroup { group: l.group, first_position: l.first_position, blocks: l.blocks.clone() };
        let elsewhere: Vec<_> = match planted(Bug::ListFromElsewhere) {
            true => wanted.iter().map(listed).collect(),
            false => Vec::new(),
        };
        if planted(Bug::ListFromElsewhere) {
            offered.groups = &elsewhere;
        }
        match plan.extend(offered, sources, here) {
            Ok(()) => Ok(plan),
            Err(error) => Err((Some(plan), error)),
        }
    }

    /// A peer answered Hello in a new session.
    fn met(&mut self, now: Instant, addr: Addr, welcome: Arc<Welcome>) {
        // A lane ends with its session: lanes of the last session, and of a dead incarnation above all, take no new
        // attempts.
        if !planted(Bug::IncarnationIgnored) {
            self.lanes.retire(&addr, None);
        }
        self.lanes.remove_dead();
        let unplanned = self.pulls.unplanned(&addr);
        self.peers.met(addr, welcome);
        for id in unplanned {
            self.plan(now, id);
        }
    }

    /// A lane was connected, or could not be.
    fn connected(&mut self, now: Instant, addr: Addr, incarnation: Incarnation, need: Need, lane: Result<L, Cause>) {
        // A lane to a dead incarnation is unusable. The pulls that wait for it hear of the restart from the session, or ask
        // again.
        let current = self.peers.is_current(&addr, incarnation);
        let lane = lane.and_then(|l| if current { Ok(l) } else { Err(Cause::LaneFailed) });
        let waiting = self.peers.connected(&addr, need, lane.is_ok());
        match lane {
            Ok(lane) => {
                let kind = lane.caps().kind;
                let n = self.lanes.insert(lane, addr, incarnation);
                for of in waiting {
                    if self.pulls.get(of.pull).is_some_and(|p| p.start.lanes.contains(&kind)) {
                        self.attach(now, of, n);
                    } else {
                        self.connect(of, &[]);
                    }
                }
            }
            Err(cause) => {
                for PullSource { pull, source } in waiting {
                    self.pulls.tell(now, pull, pull::In::NoLane { source, cause });
                }
            }
        }
    }

    /// Begins an attempt of a pull's source on a lane.
    fn attach(&mut self, now: Instant, of: PullSource, n: LaneNo) {
        let Some(grant) = self.pulls.get(of.pull).and_then(|p| p.tracker.grant(of.source)) else { return };
        if let Some((attempt, caps)) = self.lanes.begin(n, of, grant) {
            self.pulls.tell(now, of.pull, pull::In::Lane { source: of.source, attempt, caps });
        }
    }

    /// Gives a pull's source an existing lane, or has one connected.
    fn need_lane(&mut self, now: Instant, of: PullSource, avoid: &[LaneKind]) {
        // A pull may have decided since it asked.
        let Some(p) = self.pulls.get(of.pull).filter(|p| !p.tracker.decided()) else { return };
        match self.lanes.best(p.rank(of.source), &p.start.lanes, avoid) {
            Some(n) => {
                self.improve(now, of, n);
                self.attach(now, of, n);
            }
            None => self.connect(of, avoid),
        }
    }

    /// Searches for a better lane than `n` from time to time. Pulls do not wait for the result.
    fn improve(&mut self, now: Instant, of: PullSource, n: LaneNo) {
        let (Some(p), Some(l)) = (self.pulls.get(of.pull), self.lanes.get(n)) else { return };
        if let Some(kinds) = self.peers.search(now, &l.peer, (l.kind, l.lane.degraded()), &p.start.lanes) {
            let wish = LaneWish { expect: p.rank(of.source).incarnation, kinds, need: Need::Better };
            self.out.push_back(Out::Connect(l.peer.clone(), wish));
        }
    }

    /// Queues a pull's source for a new lane. Kinds that failed are tried last, not never: the failure may be over.
    fn connect(&mut self, of: PullSource, avoid: &[LaneKind]) {
        let Some(p) = self.pulls.get(of.pull) else { return };
        let rank = p.rank(of.source);
        let (mut kinds, last): (Vec<_>, Vec<_>) = p.start.lanes.iter().partition(|k| !avoid.contains(k));
        kinds.extend(last);
        let addr: Addr = rank.addr.as_str().into();
        if self.peers.wait(&addr, of) {
            let wish = LaneWish { expect: rank.incarnation, kinds, need: Need::Now };
            self.out.push_back(Out::Connect(addr, wish));
        }
    }

    /// Polls a lane and handles its events. `true` when there were any.
    fn poll_lane(&mut self, now: Instant, n: LaneNo) -> bool {
        let Some(l) = self.lanes.get_mut(n) else { return false };
        let mut events = std::mem::take(&mut self.events);
        l.poll(&mut events);
        let any = !events.is_empty();
        for event in events.drain(..) {
            match event.attempt() {
                Some(attempt) => {
                    if let Some(of) = self.lanes.event(n, attempt, &event) {
                        self.pulls.tell(now, of.pull, pull::In::Event(attempt, event));
                    }
                }
                None => {
                    for (attempt, of) in self.lanes.down(n, &event) {
                        self.pulls.tell(now, of.pull, pull::In::Event(attempt, event.clone()));
                    }
                }
            }
        }
        self.events = events;
        // Post before anything else: the wire is idle until then.
        self.lanes.post(n, &mut self.pulls);
        if self.settle(now) {
            self.lanes.post(n, &mut self.pulls);
        }
        self.lanes.remove_dead();
        any
    }

    /// Carries out the trackers' actions until there are none. `false` when there were none.
    fn settle(&mut self, now: Instant) -> bool {
        let mut any = false;
        while let Some(id) = self.pulls.next_touched() {
            while let Some(out) = self.pulls.poll(id) {
                self.carry_out(now, id, out);
                any = true;
            }
            self.pulls.update(id);
        }
        any
    }

    fn carry_out(&mut self, now: Instant, id: PullId, out: pull::Out) {
        match out {
            pull::Out::NeedLane { source, avoid } => self.need_lane(now, PullSource { pull: id, source }, &avoid),
            pull::Out::Stop(a) => self.lanes.stop(a),
            pull::Out::Kill(a) => self.lanes.kill(a, id),
            pull::Out::Decided => {
                self.pulls.release(id, &mut self.out);
                self.out.push_back(Out::Decided(id));
            }
            pull::Out::Wedged => self.out.push_back(Out::Wedged(id)),
            pull::Out::Ended(outcome) => {
                let Some(p) = self.pulls.get(id) else { return };
                let (blocks, offer) = (p.tracker.report(&outcome), p.start.offer.clone());
                let contents = p.contents().and_then(|c| c.first().map(|c| Arc::clone(c)));
                self.out.push_back(Out::Ended(Box::new(Ended {
                    pull: id,
                    offer,
                    contents,
                    outcome: *outcome,
                    blocks,
                })));
                self.pulls.remove(id);
                self.peers.forget(id);
            }
        }
    }
}
