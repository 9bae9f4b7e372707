//! The peers of a consumer rank, and the pulls that wait for a lane to each.

use std::{collections::HashMap, sync::Arc, time::Instant};

use super::{
    Addr, Need, PullId, PullSource,
    better::{Search, Waits},
};
use crate::{Incarnation, LaneKind, OfferRank, hello::Welcome};

#[derive(Default)]
struct Peer {
    welcome: Option<Arc<Welcome>>,
    /// Queued for the lane that is being connected.
    waiting: Vec<PullSource>,
    connecting: bool,
    /// A background search for a better lane is running; no pull waits for it.
    searching: bool,
    better: Search,
    /// It owes an answer and gives none.
    silent: bool,
}

/// The peers of a consumer rank, by address.
pub(super) struct Peers {
    waits: Waits,
    by_addr: HashMap<Addr, Peer>,
}

impl Peers {
    pub(super) fn new(waits: Waits) -> Self {
        Self { waits, by_addr: HashMap::new() }
    }

    /// A peer answered Hello.
    pub(super) fn met(&mut self, addr: Addr, welcome: Arc<Welcome>) {
        let incarnation = welcome.peer.incarnation;
        let peer = self.by_addr.entry(addr).or_default();
        if peer.welcome.replace(welcome).is_some_and(|old| old.peer.incarnation != incarnation) {
            peer.better = Search::default();
        }
    }

    /// The Hello of a rank, if the offer's incarnation of it answered.
    pub(super) fn welcome(&self, rank: &OfferRank) -> Option<&Welcome> {
        let welcome = self.by_addr.get(rank.addr.as_str())?.welcome.as_deref()?;
        welcome.peer.incarnation.is(rank.incarnation).then_some(welcome)
    }

    /// Whether the peer answered last in this incarnation.
    pub(super) fn is_current(&self, addr: &Addr, incarnation: Incarnation) -> bool {
        let welcome = self.by_addr.get(addr).and_then(|p| p.welcome.as_ref());
        welcome.is_some_and(|w| w.peer.incarnation == incarnation)
    }

    pub(super) fn set_silent(&mut self, addr: &Addr, silent: bool) {
        self.by_addr.entry(addr.clone()).or_default().silent = silent;
    }

    pub(super) fn is_silent(&self, addr: &str) -> bool {
        self.by_addr.get(addr).is_some_and(|p| p.silent)
    }

    pub(super) fn remove(&mut self, addr: &Addr) {
        self.by_addr.remove(addr);
    }

    /// Queues a source for the peer's next lane. `true` when that lane must be connected first.
    pub(super) fn wait(&mut self, addr: &Addr, of: PullSource) -> bool {
        let peer = self.by_addr.entry(addr.clone()).or_default();
        peer.waiting.push(of);
        !std::mem::replace(&mut peer.connecting, true)
    }

    /// A connection attempt is over. Returns the queued sources that it settles: a background search that found nothing
    /// settles none, since they have a connection of their own under way.
    pub(super) fn connected(&mut self, addr: &Addr, need: Need, found: bool) -> Vec<PullSource> {
        let Some(peer) = self.by_addr.get_mut(addr) else { return Vec::new() };
        match need {
            Need::Now => peer.connecting = false,
            Need::Better => peer.searching = false,
        }
        if need == Need::Better && !found { Vec::new() } else { std::mem::take(&mut peer.waiting) }
    }

    /// The kinds to search for beside a lane of this `(kind, degraded)`; `None` when there is nothing better, or the search
    /// is not due.
    pub(super) fn search(
        &mut self,
        now: Instant,
        addr: &Addr,
        (kind, degraded): (LaneKind, bool),
        preferred: &[LaneKind],
    ) -> Option<Vec<LaneKind>> {
        let peer = self.by_addr.get_mut(addr)?;
        let served = &peer.welcome.as_ref()?.lanes;
        let better = preferred.iter().take_while(|k| **k != kind).filter(|k| served.contains(k));
        let kinds: Vec<_> = better.copied().chain(degraded.then_some(kind)).collect();
        if kinds.is_empty() {
            peer.better.not_needed(now);
            return None;
        }
        if peer.connecting || peer.searching || !peer.better.due(now, self.waits) {
            return None;
        }
        peer.searching = true;
        Some(kinds)
    }

    /// A pull has ended: it waits for no lane.
    pub(super) fn forget(&mut self, pull: PullId) {
        for peer in self.by_addr.values_mut() {
            peer.waiting.retain(|of| of.pull != pull);
        }
    }
}
