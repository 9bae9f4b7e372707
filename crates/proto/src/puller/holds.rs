//! Claims of offers whose pulls have not started yet: the request waits in the engine's queue.
//!
//! A hold claims an offer at each of its source ranks, and the sessions renew the claims. The pull of the offer takes the
//! claims over, with the grants that have come. A hold ends with its pull, its release, the loss of all its claims, the
//! shutdown, or after a bounded time.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{
    Addr, Out, PullSource, Start,
    pulls::{add, follows, want},
};
use crate::{
    ClaimId, Contents, Grant, Growth, Offer, OfferId, Reader, Release,
    sabotage::{Bug, planted},
};

/// The state of a hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HoldState {
    /// Not every claim is granted.
    Waiting,
    /// Every claim is granted: the offer is open, and a pull can read it.
    Granted,
    /// Its pull has taken it over, it was released, or a claim was lost. A pull hears why.
    Ended,
}

/// A hold as the engine sees it, from any thread.
#[derive(Clone, Default)]
pub struct Hold(Arc<Mutex<Shown>>);

/// The part of a hold that both sides share.
struct Shown {
    state: HoldState,
    on_change: Option<OnChange>,
}

type OnChange = Arc<dyn Fn(HoldState) + Send + Sync>;

impl Default for Shown {
    fn default() -> Self {
        Self { state: HoldState::Waiting, on_change: None }
    }
}

impl Hold {
    /// Its state now.
    pub fn state(&self) -> HoldState {
        self.shown().state
    }

    /// Calls `f` with each new state, in a thread of kvferry, which `f` must not block. If the hold does not wait any more, `f` is
    /// called at once, in this thread. It replaces an earlier function, and is dropped after the end of the hold.
    pub fn on_change(&self, f: impl Fn(HoldState) + Send + Sync + 'static) {
        let f: OnChange = Arc::new(f);
        let mut shown = self.shown();
        let state = shown.state;
        let before = match state {
            HoldState::Ended => shown.on_change.take(),
            _ => shown.on_change.replace(f.clone()),
        };
        drop(shown);
        // It may look at the state.
        drop(before);
        if state != HoldState::Waiting {
            f(state);
        }
    }

    fn shown(&self) -> MutexGuard<'_, Shown> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Hold").field(&self.state()).finish()
    }
}

/// Sets the state of a [`Hold`]. Dropped, it ends the hold: no engine waits for a consumer that is gone.
#[derive(Debug)]
pub struct HoldSetter(Hold);

impl HoldSetter {
    /// The setter of a hold.
    pub fn of(hold: &Hold) -> Self {
        Self(hold.clone())
    }

    fn set(&self, state: HoldState) {
        let mut shown = self.0.shown();
        if std::mem::replace(&mut shown.state, state) == state {
            return;
        }
        let f = match state {
            HoldState::Ended => shown.on_change.take(),
            _ => shown.on_change.clone(),
        };
        // It may look at the state.
        drop(shown);
        f.into_iter().for_each(|f| f(state));
    }
}

impl Drop for HoldSetter {
    fn drop(&mut self) {
        self.set(HoldState::Ended);
    }
}

/// An offer to hold.
#[derive(Debug)]
pub struct HoldRequest {
    /// The offer.
    pub offer: Arc<Offer>,
    /// The source ranks: indices into the offer's ranks.
    pub sources: Vec<usize>,
    /// This rank's place among the offer's readers.
    pub reader: Reader,
    /// Whether its claims wait for an offer that is not entered yet.
    pub awaited: bool,
    /// Shows the engine its state.
    pub seen: HoldSetter,
    /// The hold ends if a source's peer is silent for so long before its claim is granted.
    pub patience: Duration,
}

/// A claim of a hold.
#[derive(Debug)]
pub(super) struct Claimed {
    pub(super) claim: ClaimId,
    pub(super) granted: Option<(Grant, Arc<Contents>)>,
}

#[derive(Debug)]
struct Held {
    request: HoldRequest,
    /// One for each source; `None`: it was lost.
    claims: Vec<Option<Claimed>>,
    /// Which hold of this consumer it is.
    number: u64,
    /// Those of later calls for the same offer.
    also: Vec<HoldSetter>,
}

impl Held {
    /// Shows the engine its state.
    fn show(&self, state: HoldState) {
        self.also.iter().chain([&self.request.seen]).for_each(|seen| seen.set(state));
    }

    fn is_granted(&self) -> bool {
        self.claims.iter().all(|c| c.as_ref().is_some_and(|c| c.granted.is_some()))
    }

    /// The releases of its claims. `all`: on behalf of all readers.
    fn releases(&self, all: bool) -> impl Iterator<Item = Out> + '_ {
        let HoldRequest { offer, sources, reader, .. } = &self.request;
        sources.iter().zip(&self.claims).filter_map(move |(&at, claimed)| {
            let rank = &offer.ranks[at];
            let claim = Some(claimed.as_ref()?.claim);
            let release = Release { claim, offer: offer.id, token: offer.token, reader: *reader, all };
            Some(Out::Release(rank.addr.as_str().into(), rank.incarnation, release))
        })
    }
}

/// Most offers that are held at a time. Names come from clients, so there is a bound: an offer beyond it is not held, and lives
/// as long as its lease.
const MOST: usize = 65_536;

/// An offer and its token. A name with another token must not touch the hold of the right one.
type Key = (OfferId, [u8; 16]);

fn key(offer: &Offer) -> Key {
    (offer.id, offer.token.to_bytes())
}

/// The holds of a consumer rank.
#[derive(Default)]
pub(super) struct Holds {
    by_offer: HashMap<Key, Held>,
    by_claim: HashMap<ClaimId, (Key, usize)>,
    /// When each hold ends, oldest first. A hold that ended before stays listed until then.
    ends: VecDeque<(Instant, Key, u64)>,
    made: u64,
    /// Silent peers that holds wait for, and when these holds end.
    silent: HashMap<Addr, Instant>,
}

impl Holds {
    pub(super) fn len(&self) -> usize {
        self.by_offer.len()
    }

    /// Claims an offer, for `limit` at most. Without effect if the offer is held already.
    pub(super) fn hold(
        &mut self,
        now: Instant,
        request: HoldRequest,
        limit: Duration,
        next_claim: &mut impl FnMut() -> ClaimId,
        out: &mut VecDeque<Out>,
    ) {
        let id = key(&request.offer);
        if let Some(held) = self.by_offer.get_mut(&id) {
            if held.request.offer.ranks != request.offer.ranks {
                // An edited name, or one transfer at two engines: the claims of the first are not those of the second.
                return;
            }
            request.seen.set(match () {
                () if held.claims.iter().any(Option::is_none) => HoldState::Ended,
                () if held.is_granted() => HoldState::Granted,
                () => HoldState::Waiting,
            });
            // The engine may have dropped its earlier ones.
            held.also.retain(|seen| Arc::strong_count(&seen.0.0) > 1);
            return held.also.push(request.seen);
        }
        if self.by_offer.len() >= MOST {
            return;
        }
        let mut claims = Vec::with_capacity(request.sources.len());
        for (source, &at) in request.sources.iter().enumerate() {
            let claim = next_claim();
            self.by_claim.insert(claim, (id, source));
            claims.push(Some(Claimed { claim, granted: None }));
            out.push_back(Out::Claim(
                request.offer.ranks[at].addr.as_str().into(),
                want(claim, &request.offer, at, request.reader, request.awaited),
            ));
        }
        self.made += 1;
        self.ends.push_back((now + limit, id, self.made));
        self.by_offer.insert(id, Held { request, claims, number: self.made, also: Vec::new() });
    }

    /// A claim was granted. `false`: it belongs to no hold.
    pub(super) fn granted(&mut self, claim: ClaimId, grant: Grant, contents: &Arc<Contents>) -> bool {
        let Some(&(id, source)) = self.by_claim.get(&claim) else { return false };
        if let Some(claimed) = self.by_offer.get_mut(&id).and_then(|h| h.claims[source].as_mut())
            && claimed.granted.as_ref().is_none_or(|(_, had)| follows(contents, had))
        {
            claimed.granted = Some((grant, contents.clone()));
        }
        if let Some(held) = self.by_offer.get(&id).filter(|h| h.is_granted()) {
            held.show(HoldState::Granted);
        }
        true
    }

    /// The offer of a claim has grown. `false`: it belongs to no hold.
    pub(super) fn grown(&mut self, claim: ClaimId, growth: &Growth) -> bool {
        let Some(&(id, source)) = self.by_claim.get(&claim) else { return false };
        if let Some(claimed) = self.by_offer.get_mut(&id).and_then(|h| h.claims[source].as_mut())
            && let Some((_, contents)) = &mut claimed.granted
        {
            // A growth that does not follow is ignored: the session claims again.
            let _ = add(contents, growth);
        }
        true
    }

    /// A claim was lost: the pull claims again and hears why.
    pub(super) fn lost(&mut self, claim: ClaimId) {
        let Some((id, source)) = self.by_claim.remove(&claim) else { return };
        let Some(hold) = self.by_offer.get_mut(&id) else { return };
        hold.claims[source] = None;
        hold.show(HoldState::Ended);
        if hold.claims.iter().all(Option::is_none) {
            self.by_offer.remove(&id);
        }
    }

    /// The claims that a pull takes over, by source. None if its offer is not held, or for other ranks.
    pub(super) fn take(&mut self, start: &Start) -> HashMap<usize, Claimed> {
        let id = key(&start.offer);
        let fits = |HoldRequest { offer, sources, reader, .. }: &HoldRequest| {
            offer.ranks == start.offer.ranks && *sources == start.sources && *reader == start.reader
        };
        if !self.by_offer.get(&id).is_some_and(|h| fits(&h.request)) || planted(Bug::HoldKept) {
            return HashMap::new();
        }
        let Some(hold) = self.remove(id) else { return HashMap::new() };
        hold.claims.into_iter().enumerate().filter_map(|(source, claimed)| Some((source, claimed?))).collect()
    }

    /// Ends the hold of an offer that will not be pulled, on behalf of all readers. The other ranks of the offer hear of it
    /// without a claim.
    pub(super) fn release(&mut self, offer: &Offer, out: &mut VecDeque<Out>) {
        let id = key(offer);
        let fits = self.by_offer.get(&id).is_some_and(|h| h.request.offer.ranks == offer.ranks);
        let held = if fits { self.remove(id) } else { None };
        for (at, rank) in offer.ranks.iter().enumerate() {
            let source = held.as_ref().and_then(|h| h.request.sources.iter().position(|s| *s == at).map(|s| (h, s)));
            let (claim, reader) = match source {
                Some((h, s)) => (h.claims[s].as_ref().map(|c| c.claim), h.request.reader),
                None => (None, Reader::ONLY),
            };
            let release = Release { claim, offer: offer.id, token: offer.token, reader, all: true };
            out.push_back(Out::Release(rank.addr.as_str().into(), rank.incarnation, release));
        }
    }

    /// Ends all holds.
    pub(super) fn end_all(&mut self, out: &mut VecDeque<Out>) {
        for hold in self.by_offer.values() {
            out.extend(hold.releases(false));
        }
        *self = Self { made: self.made, ..Self::default() };
    }

    /// A peer owes an answer and gives none, or answers again.
    pub(super) fn set_silent(&mut self, now: Instant, addr: &Addr, silent: bool) {
        if !silent {
            self.silent.remove(addr);
        } else if let Some(end) = self.waiting_at(addr).filter_map(|(_, patience)| now.checked_add(patience)).min() {
            self.silent.entry(addr.clone()).or_insert(end);
        }
    }

    /// The holds with a claim at a peer that is not granted, and their patience.
    fn waiting_at(&self, addr: &Addr) -> impl Iterator<Item = (Key, Duration)> {
        self.by_offer.iter().filter_map(move |(id, held)| {
            let HoldRequest { offer, sources, patience, .. } = &held.request;
            let mut claims = sources.iter().zip(&held.claims);
            let waits = |(at, c): (&usize, &Option<Claimed>)| {
                *offer.ranks[*at].addr == **addr && c.as_ref().is_some_and(|c| c.granted.is_none())
            };
            claims.any(waits).then_some((*id, *patience))
        })
    }

    /// Ends the holds that wait for a peer which has been silent for too long.
    fn end_silent(&mut self, now: Instant, out: &mut VecDeque<Out>) {
        while let Some(addr) = self.silent.iter().find(|(_, end)| **end <= now).map(|(addr, _)| addr.clone()) {
            self.silent.remove(&addr);
            let over: Vec<_> = self.waiting_at(&addr).map(|(id, _)| id).collect();
            for id in over {
                if let Some(hold) = self.remove(id) {
                    out.extend(hold.releases(false));
                }
            }
        }
    }

    /// Ends the holds whose time is over.
    pub(super) fn tick(&mut self, now: Instant, out: &mut VecDeque<Out>) {
        self.end_silent(now, out);
        while let Some(&(end, id, number)) = self.ends.front()
            && end <= now
        {
            self.ends.pop_front();
            if self.by_offer.get(&id).is_some_and(|h| h.number == number)
                && let Some(hold) = self.remove(id)
            {
                out.extend(hold.releases(false));
            }
        }
    }

    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.ends.front().map(|e| e.0).into_iter().chain(self.silent.values().copied()).min()
    }

    fn remove(&mut self, id: Key) -> Option<Held> {
        let hold = self.by_offer.remove(&id)?;
        for claimed in hold.claims.iter().flatten() {
            self.by_claim.remove(&claimed.claim);
        }
        Some(hold)
    }
}

/// Tells a new pull of the grants that its claims already have.
pub(super) fn grants(
    taken: HashMap<usize, Claimed>,
    of: impl Fn(usize) -> PullSource,
) -> Vec<(PullSource, Grant, Arc<Contents>)> {
    let mut grants: Vec<_> = taken
        .into_iter()
        .filter_map(|(source, c)| c.granted.map(|(grant, contents)| (of(source), grant, contents)))
        .collect();
    grants.sort_by_key(|(of, ..)| of.source);
    grants
}
