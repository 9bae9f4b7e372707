//! Pulls and lanes of one consumer rank, joined. Owns every tracker and every lane; never blocks, never reads a clock.

pub mod better;
mod event;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::Arc,
    time::Instant,
};

use crate::{
    Machine,
    block::Incarnation,
    error::Cause,
    frame::{ClaimId, Release},
    group::PoolLayout,
    hello::Welcome,
    lane::{Attempt, Lane, LaneEvent, LaneKind},
    plan::{Plan, Source},
    pull::{self, PullTracker},
    sabotage::{Bug, planted},
    session::Want,
    shard::Shard,
};

use self::better::{Search, Waits};
pub use self::event::{Addr, Ended, In, LaneWish, Need, Out, Progress, PullId, Start};

struct PullState {
    tracker: PullTracker,
    start: Box<Start>,
    claims: Vec<ClaimId>,
    /// Claims were let go.
    released: bool,
    timer: Option<Instant>,
}

/// A lane's number; numbers are not used twice.
type LaneNo = u64;

struct LaneSlot<L> {
    lane: L,
    peer: Addr,
    incarnation: Incarnation,
    kind: LaneKind,
    /// In the order in which their next chunk is posted.
    attempts: VecDeque<Attempt>,
    /// It takes no new attempts.
    dead: bool,
    /// It may have something to say.
    stirred: bool,
    /// It takes nothing more before it is polled.
    full: bool,
}

#[derive(Default)]
struct Peer {
    welcome: Option<Arc<Welcome>>,
    /// Who waits for a lane that is being connected.
    waiting: Vec<(PullId, usize)>,
    connecting: bool,
    /// A better lane than what there is is looked for, beside that: nobody waits for it.
    looking: bool,
    better: Search,
}

/// Pulls and lanes of one consumer rank.
pub struct Puller<L> {
    layout: Arc<PoolLayout>,
    shard: Shard,
    limit: usize,
    waits: Waits,
    pulls: BTreeMap<PullId, PullState>,
    by_claim: HashMap<ClaimId, (PullId, usize)>,
    attempts: BTreeMap<Attempt, (PullId, usize, LaneNo)>,
    lanes: BTreeMap<LaneNo, LaneSlot<L>>,
    peers: HashMap<Addr, Peer>,
    timers: BTreeSet<(Instant, PullId)>,
    next_lane: LaneNo,
    next_attempt: u64,
    next_claim: u64,
    events: Vec<LaneEvent>,
    /// Space for a turn's lanes: a turn allocates nothing.
    numbers: Vec<LaneNo>,
    /// Pulls whose tracker may have something to say.
    touched: BTreeSet<PullId>,
    out: VecDeque<Out>,
}

impl<L: Lane> Puller<L> {
    /// A puller over this rank's memory. `limit` bounds the blocks of a pull, `waits` how often a better lane is looked for.
    pub fn new(layout: Arc<PoolLayout>, shard: Shard, limit: usize, waits: Waits) -> Self {
        Self {
            layout,
            shard,
            limit,
            waits,
            pulls: BTreeMap::new(),
            by_claim: HashMap::new(),
            attempts: BTreeMap::new(),
            lanes: BTreeMap::new(),
            peers: HashMap::new(),
            timers: BTreeSet::new(),
            next_lane: 1,
            next_attempt: 1,
            next_claim: 1,
            events: Vec::new(),
            numbers: Vec::new(),
            touched: BTreeSet::new(),
            out: VecDeque::new(),
        }
    }

    /// Pulls that have not ended.
    pub fn pulls(&self) -> usize {
        self.pulls.len()
    }

    /// Lanes that are connected.
    pub fn lanes(&self) -> impl Iterator<Item = (LaneNo, LaneKind, &Addr)> {
        self.lanes.iter().filter(|(_, l)| !l.dead).map(|(n, l)| (*n, l.kind, &l.peer))
    }

    /// A lane, to arm it before sleeping.
    pub fn lane_mut(&mut self, lane: LaneNo) -> Option<&mut L> {
        self.lanes.get_mut(&lane).map(|l| &mut l.lane)
    }

    /// Lanes that have attempts on them.
    pub fn busy_lanes(&self) -> impl Iterator<Item = LaneNo> + '_ {
        self.lanes.iter().filter(|(_, l)| !l.attempts.is_empty()).map(|(n, _)| *n)
    }

    /// Lanes that are connected and have no attempts.
    pub fn idle_lanes(&self) -> impl Iterator<Item = LaneNo> + '_ {
        self.lanes.iter().filter(|(_, l)| l.attempts.is_empty()).map(|(n, _)| *n)
    }

    /// A lane's descriptor is readable: poll it at the next turn.
    pub fn stir(&mut self, lane: LaneNo) {
        if let Some(l) = self.lanes.get_mut(&lane) {
            l.stirred = true;
        }
    }

    /// Tells it what happened.
    pub fn handle(&mut self, now: Instant, event: In<L>) {
        match event {
            In::Start(start) => self.start(now, start),
            In::LocalReady(id) => self.tell(now, id, pull::In::LocalReady),
            In::Cancel(id, cause) => self.tell(now, id, pull::In::Cancel(cause)),
            In::Peer(addr, welcome) => self.welcome(now, addr, welcome),
            In::Granted(claim, grant) => {
                if let Some(&(id, source)) = self.by_claim.get(&claim) {
                    self.tell(now, id, pull::In::Granted { source, grant });
                }
            }
            In::Lost(claim, cause) => {
                if let Some(&(id, _)) = self.by_claim.get(&claim) {
                    self.tell(now, id, pull::In::Lost { cause });
                }
            }
            In::Lane { peer, incarnation, need, lane } => self.connected(now, peer, incarnation, need, lane),
            In::Dropped(addr) => {
                self.peers.remove(&addr);
                for l in self.lanes.values_mut().filter(|l| l.peer == addr) {
                    l.dead = true;
                }
                self.bury_lanes();
            }
            In::Shutdown => {
                let all: Vec<_> = self.pulls.keys().copied().collect();
                for id in all {
                    self.tell(now, id, pull::In::Cancel(Cause::Shutdown));
                }
            }
        }
        self.settle(now);
    }

    /// Lets lanes and trackers go on: polls, posts, and looks at the clock. `true` when there is more to do at once.
    pub fn turn(&mut self, now: Instant) -> bool {
        // What lanes have to say comes before the clock's verdict on them: a thread that was kept from running for a few
        // milliseconds would kill a lane, and with it everybody's reads, whose `Quiet` lies there already.
        if self.timers.first().is_some_and(|t| t.0 <= now) {
            let busy: Vec<_> = self.busy_lanes().collect();
            for n in busy {
                self.poll_lane(now, n);
            }
        }
        let due: Vec<_> = self.timers.range(..=(now, PullId(u64::MAX))).map(|(_, id)| *id).collect();
        for id in due {
            if let Some(p) = self.pulls.get_mut(&id) {
                p.tracker.tick(now);
                self.touched.insert(id);
            }
        }
        self.settle(now);
        let mut numbers = std::mem::take(&mut self.numbers);
        let stirred = self.lanes.iter().filter(|(_, l)| l.stirred || !l.attempts.is_empty());
        numbers.extend(stirred.map(|(n, _)| *n));
        let mut more = false;
        for n in numbers.drain(..) {
            self.post(n);
            more |= self.poll_lane(now, n);
        }
        self.numbers = numbers;
        self.settle(now);
        more
    }

    /// The next thing to do, in order.
    pub fn poll(&mut self) -> Option<Out> {
        self.out.pop_front()
    }

    /// When to call [`Puller::turn`], if nothing happens before.
    pub fn next_timeout(&self) -> Option<Instant> {
        self.timers.first().map(|t| t.0)
    }

    fn tell(&mut self, now: Instant, id: PullId, event: pull::In) {
        if let Some(p) = self.pulls.get_mut(&id) {
            p.tracker.handle(now, event);
            self.touched.insert(id);
        }
    }

    fn start(&mut self, now: Instant, mut start: Box<Start>) {
        let id = start.id;
        let sources = start.sources.len();
        let tracker = PullTracker::new(
            start.started,
            std::mem::take(&mut start.wanted),
            sources,
            start.deadline,
            start.retry,
            start.local_ready,
        );
        let mut claims = Vec::with_capacity(sources);
        for (source, &at) in start.sources.iter().enumerate() {
            let rank = &start.offer.ranks[at];
            let claim = ClaimId(self.next_claim);
            self.next_claim += 1;
            self.by_claim.insert(claim, (id, source));
            claims.push(claim);
            self.out.push_back(Out::Claim(
                rank.addr.as_str().into(),
                Want {
                    claim,
                    offer: start.offer.id,
                    engine: start.offer.engine.clone(),
                    expect: rank.incarnation,
                    reader: start.reader,
                },
            ));
        }
        self.pulls.insert(id, PullState { tracker, start, claims, released: false, timer: None });
        self.plan(now, id);
        self.touched.insert(id);
    }

    /// Plans a pull whose peers are all known.
    fn plan(&mut self, now: Instant, id: PullId) {
        let Some(p) = self.pulls.get_mut(&id) else { return };
        if p.tracker.plan().is_some() || p.tracker.decided() {
            return;
        }
        let mut welcomes = Vec::with_capacity(p.start.sources.len());
        for &at in &p.start.sources {
            let rank = &p.start.offer.ranks[at];
            let known = self.peers.get(rank.addr.as_str()).and_then(|peer| peer.welcome.clone());
            match known {
                Some(w) if w.peer.incarnation == rank.incarnation || planted(Bug::IncarnationIgnored) => {
                    welcomes.push(w);
                }
                // Not here yet, or of another incarnation: the session finds out which.
                _ => return,
            }
        }
        let sources: Vec<_> = welcomes.iter().map(|w| Source { layout: &w.pool, shard: &w.shard }).collect();
        let here = Source { layout: &self.layout, shard: &self.shard };
        let event = match Plan::new(&p.start.offer, &sources, here, p.tracker.wanted(), p.start.chunk, self.limit) {
            Ok(plan) => pull::In::Planned(Box::new(plan)),
            Err(error) => {
                tracing::warn!(request = %p.start.offer.request, offer = %p.start.offer.id, %error, "pull cannot be planned");
                pull::In::Cancel(Cause::BadOffer)
            }
        };
        p.tracker.handle(now, event);
        self.touched.insert(id);
    }

    fn welcome(&mut self, now: Instant, addr: Addr, welcome: Arc<Welcome>) {
        let incarnation = welcome.peer.incarnation;
        let peer = self.peers.entry(addr.clone()).or_default();
        if peer.welcome.replace(welcome).is_some_and(|old| old.peer.incarnation != incarnation) {
            peer.better = Search::default();
        }
        // Its session is new, and a lane ends with the session that it was made for: those of before take no new attempts,
        // and those of an earlier incarnation must not.
        for l in self.lanes.values_mut().filter(|l| l.peer == addr) {
            l.dead |= !planted(Bug::IncarnationIgnored);
        }
        self.bury_lanes();
        let of_peer: Vec<_> = self
            .pulls
            .iter()
            .filter(|(_, p)| p.tracker.plan().is_none())
            .filter(|(_, p)| p.start.sources.iter().any(|&at| p.start.offer.ranks[at].addr == *addr))
            .map(|(id, _)| *id)
            .collect();
        for id in of_peer {
            self.plan(now, id);
        }
    }

    fn connected(&mut self, now: Instant, addr: Addr, incarnation: Incarnation, need: Need, lane: Result<L, Cause>) {
        let peer = self.peers.entry(addr.clone()).or_default();
        let current = peer.welcome.as_ref().is_some_and(|w| w.peer.incarnation == incarnation);
        let found = current && lane.is_ok();
        match need {
            Need::Now => peer.connecting = false,
            Need::Better => peer.looking = false,
        }
        // Whoever waits has a connection of its own under way; what is found meanwhile does as well.
        let waiting = match need {
            Need::Better if !found => return,
            _ => std::mem::take(&mut peer.waiting),
        };
        match lane {
            Ok(lane) if current => {
                let n = self.next_lane;
                self.next_lane += 1;
                let kind = lane.caps().kind;
                // One lane of a kind to a peer: an older one finishes what it has, and goes.
                for l in self.lanes.values_mut().filter(|l| l.peer == addr && l.kind == kind) {
                    l.dead = true;
                }
                self.lanes.insert(
                    n,
                    LaneSlot {
                        lane,
                        peer: addr.clone(),
                        incarnation,
                        kind,
                        attempts: VecDeque::new(),
                        dead: false,
                        stirred: true,
                        full: false,
                    },
                );
                for (id, source) in waiting {
                    if self.allows(id, kind) {
                        self.attach(now, id, source, n);
                    } else {
                        self.connect(id, source, Vec::new());
                    }
                }
            }
            // It came for an incarnation that is gone; whoever still waits hears of it from the session, or asks again.
            Ok(_) => {
                for (id, source) in waiting {
                    self.tell(now, id, pull::In::NoLane { source, cause: Cause::LaneFailed });
                }
            }
            Err(cause) => {
                for (id, source) in waiting {
                    self.tell(now, id, pull::In::NoLane { source, cause });
                }
            }
        }
    }

    fn allows(&self, id: PullId, kind: LaneKind) -> bool {
        self.pulls.get(&id).is_some_and(|p| p.start.lanes.contains(&kind))
    }

    /// Gives a pull's source a new attempt on a lane.
    fn attach(&mut self, now: Instant, id: PullId, source: usize, n: LaneNo) {
        let (Some(p), Some(l)) = (self.pulls.get_mut(&id), self.lanes.get_mut(&n)) else { return };
        let Some(grant) = p.tracker.grant(source) else { return };
        let attempt = Attempt(self.next_attempt);
        self.next_attempt += 1;
        self.attempts.insert(attempt, (id, source, n));
        l.attempts.push_back(attempt);
        l.lane.begin(attempt, grant);
        let caps = l.lane.caps();
        self.tell(now, id, pull::In::Lane { source, attempt, caps });
    }

    /// A lane for a pull: one that is there, or a new one.
    fn need_lane(&mut self, now: Instant, id: PullId, source: usize, avoid: Vec<LaneKind>) {
        let Some(p) = self.pulls.get(&id) else { return };
        let rank = &p.start.offer.ranks[p.start.sources[source]];
        let usable = |l: &&LaneSlot<L>| {
            !l.dead
                && *l.peer == *rank.addr
                && (l.incarnation == rank.incarnation || planted(Bug::IncarnationIgnored))
                && p.start.lanes.contains(&l.kind)
                && !avoid.contains(&l.kind)
        };
        let preference = |l: &LaneSlot<L>| p.start.lanes.iter().position(|k| *k == l.kind);
        let best = self
            .lanes
            .iter()
            .filter(|(_, l)| usable(l))
            .min_by_key(|(_, l)| (preference(l), l.attempts.len()))
            .map(|(n, _)| *n);
        match best {
            Some(n) => {
                self.improve(now, id, source, n);
                self.attach(now, id, source, n);
            }
            None => self.connect(id, source, avoid),
        }
    }

    /// Looks for a better lane than this one, now and then: what failed once may work again. Pulls go on meanwhile.
    fn improve(&mut self, now: Instant, id: PullId, source: usize, n: LaneNo) {
        let (Some(p), Some(l)) = (self.pulls.get(&id), self.lanes.get(&n)) else { return };
        let rank = &p.start.offer.ranks[p.start.sources[source]];
        let Some(peer) = self.peers.get_mut(&l.peer) else { return };
        let Some(welcome) = &peer.welcome else { return };
        let preferred = p.start.lanes.iter().take_while(|k| **k != l.kind);
        let mut kinds: Vec<_> = preferred.copied().filter(|k| welcome.lanes.contains(k)).collect();
        if l.lane.degraded() {
            kinds.push(l.kind);
        }
        if kinds.is_empty() {
            peer.better.not_needed(now);
        } else if !peer.connecting && !peer.looking && peer.better.due(now, self.waits) {
            peer.looking = true;
            let wish = LaneWish { expect: rank.incarnation, kinds, need: Need::Better };
            self.out.push_back(Out::Connect(l.peer.clone(), wish));
        }
    }

    fn connect(&mut self, id: PullId, source: usize, avoid: Vec<LaneKind>) {
        let Some(p) = self.pulls.get(&id) else { return };
        let rank = &p.start.offer.ranks[p.start.sources[source]];
        let addr: Addr = rank.addr.as_str().into();
        // What failed is tried last, not never: it may have been one bad moment.
        let (mut kinds, last): (Vec<_>, Vec<_>) = p.start.lanes.iter().partition(|k| !avoid.contains(k));
        kinds.extend(last);
        let peer = self.peers.entry(addr.clone()).or_default();
        peer.waiting.push((id, source));
        if !std::mem::replace(&mut peer.connecting, true) {
            let wish = LaneWish { expect: rank.incarnation, kinds, need: Need::Now };
            self.out.push_back(Out::Connect(addr, wish));
        }
    }

    /// Posts reads on a lane, and fences where the lane does not post them itself, a chunk of each attempt in turn, until it
    /// takes no more.
    fn post(&mut self, n: LaneNo) {
        let Some(l) = self.lanes.get_mut(&n) else { return };
        if l.full {
            return;
        }
        let mut idle = 0;
        while idle < l.attempts.len() {
            let Some(attempt) = l.attempts.pop_front() else { return };
            l.attempts.push_back(attempt);
            let Some(&(id, source, _)) = self.attempts.get(&attempt) else {
                idle += 1;
                continue;
            };
            let Some(p) = self.pulls.get_mut(&id) else {
                idle += 1;
                continue;
            };
            let mut moved = false;
            while let Some((a, f)) = p.tracker.next_fence(source).filter(|(a, _)| *a == attempt) {
                if !l.lane.post_fence(a, f) {
                    break;
                }
                p.tracker.fence_posted(source);
                moved = true;
            }
            if let Some((a, reads)) = p.tracker.next_reads(source).filter(|(a, _)| *a == attempt) {
                let all = reads.len();
                let taken = l.lane.post(a, reads);
                p.tracker.accepted(source, taken);
                if taken < all {
                    // Its window is full, for everybody on it; this attempt goes on first.
                    l.attempts.rotate_right(1);
                    l.full = true;
                    return;
                }
                moved = true;
            }
            idle = if moved { 0 } else { idle + 1 };
        }
    }

    /// Polls a lane and passes on what it says. `true` when it said something.
    fn poll_lane(&mut self, now: Instant, n: LaneNo) -> bool {
        let Some(l) = self.lanes.get_mut(&n) else { return false };
        (l.stirred, l.full) = (false, false);
        let mut events = std::mem::take(&mut self.events);
        l.lane.poll(&mut events);
        let any = !events.is_empty();
        for event in events.drain(..) {
            let attempt = match &event {
                LaneEvent::Done { attempt, .. }
                | LaneEvent::Failed { attempt, .. }
                | LaneEvent::Fence { attempt, .. }
                | LaneEvent::Again { attempt, .. }
                | LaneEvent::Quiet { attempt } => Some(*attempt),
                LaneEvent::Down { .. } | LaneEvent::Wedged => None,
            };
            match attempt {
                Some(a) => self.lane_event(now, n, a, event),
                None => self.lane_down(now, n, event),
            }
        }
        self.events = events;
        // What can be posted now is, before anything else is done: the wire waits for it.
        self.post(n);
        if self.settle(now) {
            self.post(n);
        }
        self.bury_lanes();
        any
    }

    fn lane_event(&mut self, now: Instant, n: LaneNo, attempt: Attempt, event: LaneEvent) {
        let Some(&(id, _, _)) = self.attempts.get(&attempt) else { return };
        if let Some(l) = self.lanes.get_mut(&n) {
            match event {
                LaneEvent::Quiet { .. } => {
                    self.attempts.remove(&attempt);
                    l.attempts.retain(|a| *a != attempt);
                }
                // The retry connects a new lane; were this one kept beside it, lanes would pile up.
                LaneEvent::Failed { cause: Cause::LaneFailed | Cause::Unreachable, .. } => l.dead = true,
                _ => {}
            }
        }
        self.tell(now, id, pull::In::Event(attempt, event));
    }

    fn lane_down(&mut self, now: Instant, n: LaneNo, event: LaneEvent) {
        let Some(l) = self.lanes.get_mut(&n) else { return };
        l.dead = true;
        let peer = l.peer.clone();
        let on_it: Vec<_> = l.attempts.iter().copied().collect();
        match &event {
            LaneEvent::Down { cause } => tracing::info!(%peer, lane = %l.kind, %cause, "lane down"),
            _ => tracing::error!(
                %peer, lane = %l.kind,
                "lane wedged: what it was reading may be written at any time; its blocks are withheld, restart this process to get them back"
            ),
        }
        for a in on_it {
            if let Some(&(id, _, _)) = self.attempts.get(&a) {
                self.tell(now, id, pull::In::Event(a, event.clone()));
            }
        }
    }

    /// Drops lanes that are dead and have no attempts.
    fn bury_lanes(&mut self) {
        self.lanes.retain(|_, l| !l.dead || !l.attempts.is_empty());
    }

    /// Does what the trackers want, until they want no more. `false` when they wanted nothing.
    fn settle(&mut self, now: Instant) -> bool {
        let mut any = false;
        while let Some(id) = self.touched.pop_first() {
            while let Some(out) = self.pulls.get_mut(&id).and_then(|p| p.tracker.poll()) {
                self.carry_out(now, id, out);
                any = true;
            }
            self.set_timer(id);
        }
        any
    }

    fn carry_out(&mut self, now: Instant, id: PullId, out: pull::Out) {
        match out {
            pull::Out::NeedLane { source, avoid } => self.need_lane(now, id, source, avoid),
            pull::Out::Stop(a) => {
                if let Some(l) = self.attempts.get(&a).and_then(|(_, _, n)| self.lanes.get_mut(n)) {
                    l.lane.stop(a);
                }
            }
            pull::Out::Kill(a) => {
                if let Some(l) = self.attempts.get(&a).and_then(|(_, _, n)| self.lanes.get_mut(n)) {
                    tracing::warn!(peer = %l.peer, lane = %l.kind, pull = id.0, "lane does not drain: killing it");
                    l.dead = true;
                    l.lane.kill();
                }
            }
            pull::Out::Decided => {
                self.release(id);
                self.out.push_back(Out::Decided(id));
            }
            pull::Out::Wedged => self.out.push_back(Out::Wedged(id)),
            pull::Out::Ended(outcome) => {
                let Some(p) = self.pulls.get(&id) else { return };
                let blocks = p.tracker.report(&outcome);
                let offer = p.start.offer.clone();
                self.out.push_back(Out::Ended(Box::new(Ended { pull: id, offer, outcome: *outcome, blocks })));
                self.forget(id);
            }
        }
    }

    fn release(&mut self, id: PullId) {
        let Some(p) = self.pulls.get_mut(&id) else { return };
        if std::mem::replace(&mut p.released, true) {
            return;
        }
        for (&claim, &at) in p.claims.iter().zip(&p.start.sources) {
            self.by_claim.remove(&claim);
            let rank = &p.start.offer.ranks[at];
            let release = Release { claim: Some(claim), offer: p.start.offer.id, reader: p.start.reader, all: false };
            self.out.push_back(Out::Release(rank.addr.as_str().into(), rank.incarnation, release));
        }
    }

    fn forget(&mut self, id: PullId) {
        self.pulls.get_mut(&id).and_then(|p| p.timer.take()).map(|t| self.timers.remove(&(t, id)));
        self.pulls.remove(&id);
        for peer in self.peers.values_mut() {
            peer.waiting.retain(|(p, _)| *p != id);
        }
    }

    fn set_timer(&mut self, id: PullId) {
        let Some(p) = self.pulls.get_mut(&id) else { return };
        p.start.progress.set(p.tracker.progress());
        let next = p.tracker.next_timeout();
        if p.timer != next {
            if let Some(t) = p.timer {
                self.timers.remove(&(t, id));
            }
            if let Some(t) = next {
                self.timers.insert((t, id));
            }
            p.timer = next;
        }
    }
}
