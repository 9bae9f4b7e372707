//! The lanes of a consumer rank, and the attempts on them.
//!
//! Owns the numbers of lanes and attempts; neither is used twice. A dead lane takes no new attempts and is dropped when its
//! last attempt is quiet. An attempt that waits for its offer to grow rests: no turn looks at it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{Addr, PullId, PullSource, pulls::Pulls};
use crate::{Attempt, Cause, Grant, Incarnation, Lane, LaneCaps, LaneEvent, LaneKind, OfferRank};

/// A lane's number.
pub(super) type LaneNo = u64;

/// A connected lane.
pub(super) struct LaneSlot<L> {
    pub(super) lane: L,
    pub(super) peer: Addr,
    pub(super) kind: LaneKind,
    /// The next turn polls it, even if it has no attempts.
    pub(super) ready: bool,
    incarnation: Incarnation,
    /// In the order in which they post their next chunk.
    attempts: VecDeque<Attempt>,
    /// Attempts that have nothing to do until they are woken.
    resting: BTreeSet<Attempt>,
    dead: bool,
    /// Its window is full until the next poll.
    full: bool,
}

impl<L> LaneSlot<L> {
    fn len(&self) -> usize {
        self.attempts.len() + self.resting.len()
    }

    fn wake(&mut self, attempt: Attempt) {
        if self.resting.remove(&attempt) {
            self.attempts.push_back(attempt);
        }
    }
}

impl<L: Lane> LaneSlot<L> {
    pub(super) fn poll(&mut self, events: &mut Vec<LaneEvent>) {
        (self.ready, self.full) = (false, false);
        self.lane.poll(events);
    }
}

/// The lanes of a consumer rank.
pub(super) struct Lanes<L> {
    slots: BTreeMap<LaneNo, LaneSlot<L>>,
    attempts: BTreeMap<Attempt, (PullSource, LaneNo)>,
    last_lane: LaneNo,
    last_attempt: u64,
}

impl<L> Default for Lanes<L> {
    fn default() -> Self {
        Self { slots: BTreeMap::new(), attempts: BTreeMap::new(), last_lane: 0, last_attempt: 0 }
    }
}

impl<L: Lane> Lanes<L> {
    pub(super) fn get(&self, n: LaneNo) -> Option<&LaneSlot<L>> {
        self.slots.get(&n)
    }

    pub(super) fn get_mut(&mut self, n: LaneNo) -> Option<&mut LaneSlot<L>> {
        self.slots.get_mut(&n)
    }

    pub(super) fn alive(&self) -> impl Iterator<Item = (LaneNo, LaneKind, &Addr)> {
        self.slots.iter().filter(|(_, l)| !l.dead).map(|(n, l)| (*n, l.kind, &l.peer))
    }

    pub(super) fn busy(&self, busy: bool) -> impl Iterator<Item = LaneNo> + '_ {
        self.slots.iter().filter(move |(_, l)| l.attempts.is_empty() != busy).map(|(n, _)| *n)
    }

    /// Lanes that a turn must poll.
    pub(super) fn due(&self) -> impl Iterator<Item = LaneNo> + '_ {
        self.slots.iter().filter(|(_, l)| l.ready || !l.attempts.is_empty()).map(|(n, _)| *n)
    }

    /// Adds a lane. An older lane of the same kind to the same peer finishes its attempts and takes no new ones.
    pub(super) fn insert(&mut self, lane: L, peer: Addr, incarnation: Incarnation) -> LaneNo {
        let kind = lane.caps().kind;
        self.retire(&peer, Some(kind));
        self.last_lane += 1;
        let (attempts, resting) = (VecDeque::new(), BTreeSet::new());
        let slot = LaneSlot { lane, peer, kind, ready: true, incarnation, attempts, resting, dead: false, full: false };
        self.slots.insert(self.last_lane, slot);
        self.last_lane
    }

    /// Marks a peer's lanes dead: those of one kind, or all.
    pub(super) fn retire(&mut self, peer: &Addr, kind: Option<LaneKind>) {
        for l in self.slots.values_mut().filter(|l| l.peer == *peer && kind.is_none_or(|k| k == l.kind)) {
            l.dead = true;
        }
    }

    /// Drops dead lanes that have no attempts.
    pub(super) fn remove_dead(&mut self) {
        self.slots.retain(|_, l| !l.dead || l.len() > 0);
    }

    /// The lane to use for a source rank: the most preferred kind, then the fewest attempts.
    pub(super) fn best(&self, rank: &OfferRank, preferred: &[LaneKind], avoid: &[LaneKind]) -> Option<LaneNo> {
        let usable = |l: &LaneSlot<L>| {
            !l.dead && *l.peer == *rank.addr && l.incarnation.is(rank.incarnation) && !avoid.contains(&l.kind)
        };
        let usable = self.slots.iter().filter(|(_, l)| usable(l));
        let ranked = usable.filter_map(|(n, l)| {
            let preference = preferred.iter().position(|k| *k == l.kind)?;
            Some((preference, l.len(), *n))
        });
        ranked.min().map(|(_, _, n)| n)
    }

    /// Begins an attempt on a lane.
    pub(super) fn begin(&mut self, n: LaneNo, of: PullSource, grant: Grant) -> Option<(Attempt, LaneCaps)> {
        let l = self.slots.get_mut(&n)?;
        self.last_attempt += 1;
        let attempt = Attempt(self.last_attempt);
        self.attempts.insert(attempt, (of, n));
        l.attempts.push_back(attempt);
        l.lane.begin(attempt, grant);
        Some((attempt, l.lane.caps()))
    }

    /// An attempt may have something to do.
    pub(super) fn wake(&mut self, attempt: Attempt) {
        if let Some(l) = self.lane_of(attempt) {
            l.wake(attempt);
        }
    }

    /// Posts reads, and fences where the lane does not post them itself, one chunk of each attempt in turn until the lane's
    /// window is full or no attempt has more.
    pub(super) fn post(&mut self, n: LaneNo, pulls: &mut Pulls) {
        let Some(l) = self.slots.get_mut(&n) else { return };
        if l.full {
            return;
        }
        let mut idle = 0;
        while idle < l.attempts.len() {
            let Some(attempt) = l.attempts.pop_front() else { return };
            l.attempts.push_back(attempt);
            idle += 1;
            let Some(&(PullSource { pull, source }, _)) = self.attempts.get(&attempt) else { continue };
            let Some(p) = pulls.get_mut(pull) else { continue };
            while let Some((a, f)) = p.tracker.next_fence(source).filter(|(a, _)| *a == attempt) {
                if !l.lane.post_fence(a, f) {
                    break;
                }
                p.tracker.fence_posted(source);
                idle = 0;
            }
            if let Some((a, reads)) = p.tracker.next_reads(source).filter(|(a, _)| *a == attempt) {
                let all = reads.len();
                let taken = l.lane.post(a, reads);
                p.tracker.accepted(source, taken);
                if taken < all {
                    // The window is full for every attempt; this one is first next time.
                    l.attempts.rotate_right(1);
                    l.full = true;
                    return;
                }
                idle = 0;
            } else if p.tracker.rests(source) {
                l.attempts.pop_back();
                l.resting.insert(attempt);
                idle -= 1;
            }
        }
    }

    /// Handles an event of one attempt. Returns the attempt's source unless the attempt is quiet already.
    pub(super) fn event(&mut self, n: LaneNo, attempt: Attempt, event: &LaneEvent) -> Option<PullSource> {
        let &(of, _) = self.attempts.get(&attempt)?;
        if let Some(l) = self.slots.get_mut(&n) {
            match event {
                LaneEvent::Quiet { .. } => {
                    self.attempts.remove(&attempt);
                    l.attempts.retain(|a| *a != attempt);
                    l.resting.remove(&attempt);
                }
                // The retry connects a new lane; if this one stayed, lanes would accumulate.
                LaneEvent::Failed { cause: Cause::LaneFailed | Cause::Unreachable | Cause::Corrupt, .. } => {
                    l.dead = true;
                }
                _ => {}
            }
        }
        Some(of)
    }

    /// Handles `Down` or `Wedged`. Returns the attempts on the lane.
    pub(super) fn down(&mut self, n: LaneNo, event: &LaneEvent) -> Vec<(Attempt, PullSource)> {
        let Some(l) = self.slots.get_mut(&n) else { return Vec::new() };
        l.dead = true;
        match event {
            LaneEvent::Down { cause } => tracing::info!(peer = %l.peer, lane = %l.kind, %cause, "lane down"),
            _ => tracing::error!(
                peer = %l.peer, lane = %l.kind,
                "lane wedged: its reads may still write local memory; their blocks are withheld, restart this process to get them back"
            ),
        }
        l.attempts.iter().chain(&l.resting).filter_map(|a| self.attempts.get(a).map(|(of, _)| (*a, *of))).collect()
    }

    pub(super) fn stop(&mut self, attempt: Attempt) {
        if let Some(l) = self.lane_of(attempt) {
            l.wake(attempt);
            l.lane.stop(attempt);
        }
    }

    /// Kills the lane of an attempt that did not become quiet in time.
    pub(super) fn kill(&mut self, attempt: Attempt, pull: PullId) {
        if let Some(l) = self.lane_of(attempt) {
            tracing::warn!(peer = %l.peer, lane = %l.kind, pull = pull.0, "lane does not drain: killing it");
            l.dead = true;
            l.attempts.extend(std::mem::take(&mut l.resting));
            l.lane.kill();
        }
    }

    fn lane_of(&mut self, attempt: Attempt) -> Option<&mut LaneSlot<L>> {
        let (_, n) = self.attempts.get(&attempt)?;
        self.slots.get_mut(n)
    }
}
