//! The pulls of a consumer rank: their trackers, claims and timers.
//!
//! A tracker changes only through [`Pulls::tell`] and [`Pulls::tick`], which mark its pull as touched. The puller then polls
//! touched pulls only, so a turn costs nothing for pulls without events.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::Arc,
    time::Instant,
};

use super::{Out, PullId, PullSource, Start, holds::Claimed};
use crate::{
    ClaimId, Contents, Extent, Growth, Machine, Offer, OfferRank, Plan, Reader, Release,
    pull::{self, PullTracker},
    session::Want,
};

/// A pull that has not ended.
pub(super) struct Pull {
    pub(super) tracker: PullTracker,
    pub(super) start: Box<Start>,
    /// One for each source; empty once they are released.
    claims: Vec<ClaimId>,
    /// What each source granted.
    granted: Vec<Option<Arc<Contents>>>,
    timer: Option<Instant>,
}

impl Pull {
    /// The ranks to read from.
    pub(super) fn ranks(&self) -> impl Iterator<Item = &OfferRank> {
        self.start.sources.iter().map(|&at| &self.start.offer.ranks[at])
    }

    /// What the sources granted, once all of them have.
    pub(super) fn contents(&self) -> Option<Vec<&Arc<Contents>>> {
        self.granted.iter().map(Option::as_ref).collect()
    }

    pub(super) fn rank(&self, source: usize) -> &OfferRank {
        &self.start.offer.ranks[self.start.sources[source]]
    }
}

/// A claim of an offer at the rank with this index in it.
/// `awaited`: it waits for an offer that is not entered yet.
pub(super) fn want(claim: ClaimId, offer: &Offer, at: usize, reader: Reader, awaited: bool) -> Want {
    let rank = &offer.ranks[at];
    Want {
        claim,
        offer: offer.id,
        token: offer.token,
        number: offer.number,
        engine: offer.engine.clone(),
        rank: rank.rank,
        expect: rank.incarnation,
        reader,
        awaited,
    }
}

/// Whether the contents are those that were granted before, with or without growth.
pub(super) fn follows(contents: &Contents, before: &Contents) -> bool {
    Extent::of(contents).covers(&Extent::of(before)) && contents.agrees(before)
}

/// Adds a growth, whose bounds the session has checked. `false`: it does not follow.
pub(super) fn add(contents: &mut Arc<Contents>, growth: &Growth) -> bool {
    Arc::make_mut(contents).grow(growth, usize::MAX).is_ok()
}

/// The pulls of a consumer rank.
#[derive(Default)]
pub(super) struct Pulls {
    by_id: BTreeMap<PullId, Pull>,
    by_claim: HashMap<ClaimId, PullSource>,
    last_claim: u64,
    timers: BTreeSet<(Instant, PullId)>,
    touched: BTreeSet<PullId>,
}

impl Pulls {
    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(super) fn get(&self, id: PullId) -> Option<&Pull> {
        self.by_id.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: PullId) -> Option<&mut Pull> {
        self.by_id.get_mut(&id)
    }

    pub(super) fn of_claim(&self, claim: ClaimId) -> Option<PullSource> {
        self.by_claim.get(&claim).copied()
    }

    /// Pulls without a plan that read from a peer.
    pub(super) fn unplanned(&self, addr: &str) -> Vec<PullId> {
        let unplanned = self.by_id.iter().filter(|(_, p)| p.tracker.plan().is_none());
        unplanned.filter(|(_, p)| p.ranks().any(|r| r.addr == addr)).map(|(id, _)| *id).collect()
    }

    /// The sources of all pulls that a peer serves.
    pub(super) fn sources_at(&self, addr: &str) -> Vec<PullSource> {
        let sources = self.by_id.iter().flat_map(|(&pull, p)| {
            let at = p.ranks().enumerate().filter(|(_, r)| r.addr == addr);
            at.map(move |(source, _)| PullSource { pull, source })
        });
        sources.collect()
    }

    /// Adds a pull and claims its offer at each source. `taken`: claims that a hold has made, by source.
    pub(super) fn start(
        &mut self,
        mut start: Box<Start>,
        taken: &HashMap<usize, Claimed>,
        out: &mut VecDeque<Out>,
    ) -> PullId {
        let id = start.id;
        let sources = start.sources.len();
        let wanted = std::mem::take(&mut start.wanted);
        let tracker = PullTracker::new(start.started, wanted, sources, start.deadline, start.retry, start.local_ready);
        let mut pull =
            Pull { tracker, start, claims: Vec::with_capacity(sources), granted: vec![None; sources], timer: None };
        for source in 0..sources {
            let held = taken.get(&source).map(|c| c.claim);
            let claim = held.unwrap_or_else(|| self.next_claim());
            self.by_claim.insert(claim, PullSource { pull: id, source });
            pull.claims.push(claim);
            if held.is_none() {
                let at = pull.start.sources[source];
                let want = want(claim, &pull.start.offer, at, pull.start.reader, pull.start.retry.awaited);
                out.push_back(Out::Claim(pull.rank(source).addr.as_str().into(), want));
            }
        }
        self.by_id.insert(id, pull);
        self.touched.insert(id);
        id
    }

    /// A claim's id that was never used.
    pub(super) fn next_claim(&mut self) -> ClaimId {
        self.last_claim += 1;
        ClaimId(self.last_claim)
    }

    /// Notes what a source granted. While an offer lives its contents only grow: anything else is ignored.
    pub(super) fn granted(&mut self, of: PullSource, contents: Arc<Contents>) {
        if let Some(p) = self.by_id.get_mut(&of.pull)
            && p.granted[of.source].as_ref().is_none_or(|had| follows(&contents, had))
        {
            p.granted[of.source] = Some(contents);
        }
    }

    /// Adds the growth of a source's offer. `false`: it does not follow what was granted.
    pub(super) fn grown(&mut self, of: PullSource, growth: &Growth) -> bool {
        let granted = self.by_id.get_mut(&of.pull).and_then(|p| p.granted[of.source].as_mut());
        granted.is_some_and(|contents| add(contents, growth))
    }

    /// Takes a pull's plan, to extend it.
    pub(super) fn take_plan(&mut self, id: PullId) -> Option<Box<Plan>> {
        self.by_id.get_mut(&id)?.tracker.take_plan()
    }

    pub(super) fn tell(&mut self, now: Instant, id: PullId, event: pull::In) {
        if let Some(p) = self.by_id.get_mut(&id) {
            p.tracker.handle(now, event);
            self.touched.insert(id);
        }
    }

    pub(super) fn tell_all(&mut self, now: Instant, event: &pull::In) {
        for (id, p) in &mut self.by_id {
            p.tracker.handle(now, event.clone());
            self.touched.insert(*id);
        }
    }

    /// Tells the time to every pull whose timer is due.
    pub(super) fn tick(&mut self, now: Instant) {
        for (_, id) in self.timers.range(..=(now, PullId(u64::MAX))) {
            if let Some(p) = self.by_id.get_mut(id) {
                p.tracker.tick(now);
                self.touched.insert(*id);
            }
        }
    }

    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.timers.first().map(|t| t.0)
    }

    pub(super) fn next_touched(&mut self) -> Option<PullId> {
        self.touched.pop_first()
    }

    pub(super) fn poll(&mut self, id: PullId) -> Option<pull::Out> {
        self.by_id.get_mut(&id)?.tracker.poll()
    }

    /// Publishes a touched pull's progress and sets its timer.
    pub(super) fn update(&mut self, id: PullId) {
        let Some(p) = self.by_id.get_mut(&id) else { return };
        p.start.progress.set(p.tracker.progress(), p.tracker.loaded_prefix(p.start.offer.tokens));
        let next = p.tracker.next_timeout();
        if p.timer != next {
            if let Some(t) = p.timer {
                self.timers.remove(&(t, id));
            }
            self.timers.extend(next.map(|t| (t, id)));
            p.timer = next;
        }
    }

    /// Releases a pull's claims, once.
    pub(super) fn release(&mut self, id: PullId, out: &mut VecDeque<Out>) {
        let Some(p) = self.by_id.get_mut(&id) else { return };
        for (source, claim) in std::mem::take(&mut p.claims).into_iter().enumerate() {
            self.by_claim.remove(&claim);
            let rank = p.rank(source);
            let (offer, token) = (p.start.offer.id, p.start.offer.token);
            let release = Release { claim: Some(claim), offer, token, reader: p.start.reader, all: false };
            out.push_back(Out::Release(rank.addr.as_str().into(), rank.incarnation, release));
        }
    }

    pub(super) fn remove(&mut self, id: PullId) {
        if let Some(t) = self.by_id.remove(&id).and_then(|p| p.timer) {
            self.timers.remove(&(t, id));
        }
    }
}
