//! The producer's books: which offers are live, who has claimed them, and when their blocks go back.
//!
//! An offer is `unclaimed` for a short while, then `claimed` and kept by its claims' renewals, and never outlives a hard
//! cap. When it ends, its fence word is cleared *before* the engine hears that the blocks are free (promise 2), and it
//! does end, whatever its consumers do (promise 6). A tombstone then says why for a while.
//!
//! An offer's name may come before the offer itself (a router is fast) and a release before both. Unknown ids are
//! therefore answered `NotYet` for a grace period, and a release of one is remembered.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    time::Instant,
};

use crate::{
    Machine,
    block::{EngineId, Incarnation, Nonce, OfferId},
    config::{LeaseConfig, Limits},
    error::OfferError,
    frame::{ClaimId, ClientBody, ClientFrame, Gone, PeerId, Reader, Release, ServerBody, ServerFrame},
    lane::Grant,
    sabotage::{Bug, planted},
};

/// What happens to the books.
#[derive(Debug, Clone)]
pub enum In {
    /// The work that fills the offer's blocks is done.
    Ready(OfferId),
    /// A frame of a consumer's session, but for `Open`, which is the session's own affair.
    Frame(PeerId, ClientFrame),
    /// A release that came without a session; `None`: on behalf of whoever it may concern.
    Release(Option<PeerId>, OfferId),
    /// The engine takes the offer back, or the name, if it never entered it.
    Revoke(OfferId),
    /// No new offers.
    Drain,
}

/// What the books want done, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Out {
    /// Set the fence word: from now on the offer can be read.
    Publish {
        /// The offer.
        offer: OfferId,
        /// Its word.
        slot: u32,
        /// What to store there.
        nonce: Nonce,
    },
    /// Clear the fence word, with a full fence, and forget what the slot stood for.
    Withdraw {
        /// The offer.
        offer: OfferId,
        /// Its word.
        slot: u32,
    },
    /// The blocks may be used again.
    Freed(Freed),
    /// Send a frame to a consumer, if it has a session.
    Send(Incarnation, ServerFrame),
    /// Send a frame to every session.
    Broadcast(ServerFrame),
}

/// An offer whose blocks went back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Freed {
    /// The offer.
    pub offer: OfferId,
    /// Why it ended.
    pub why: Gone,
}

/// A claim's name: the consumer's incarnation, and the claim in it.
type ClaimKey = (Incarnation, ClaimId);

/// Released claims that an offer remembers, at least.
const LET_GO: usize = 16;

#[derive(Debug)]
struct Entry {
    slot: u32,
    nonce: Nonce,
    ready: bool,
    cap: Instant,
    unclaimed_until: Instant,
    /// Until when each claim holds, unless renewed.
    claims: BTreeMap<ClaimKey, Instant>,
    /// Claims that were released: a late frame of an old stream must not bring one back.
    let_go: BTreeSet<ClaimKey>,
    /// Readers that let go, by engine.
    released: HashMap<EngineId, HashSet<u32>>,
    /// Somebody's last reader let go: free as soon as nobody reads.
    done: bool,
    /// The time under which this entry stands in `timers`; its true end may be later.
    timer: Instant,
}

impl Entry {
    fn end(&self) -> Instant {
        if !self.ready {
            // The engine still writes the blocks: no lease runs yet.
            return self.cap;
        }
        self.claims.values().copied().max().unwrap_or(self.unclaimed_until).min(self.cap)
    }
}

/// A name that was used before the books knew it.
#[derive(Debug)]
struct Early {
    since: Instant,
    released: bool,
}

/// Random 64-bit numbers. From the system in production, from a seed in the simulation.
pub type Entropy = Box<dyn FnMut() -> u64 + Send>;

/// The producer's books.
pub struct OfferTable {
    lease: LeaseConfig,
    limits: Limits,
    entropy: Entropy,
    live: HashMap<OfferId, Entry>,
    by_claim: HashMap<ClaimKey, OfferId>,
    claims_of: HashMap<Incarnation, usize>,
    free_slots: VecDeque<u32>,
    early: HashMap<OfferId, Early>,
    tombs: HashMap<OfferId, Gone>,
    /// Tombs and early names by age, oldest first.
    tomb_age: VecDeque<(Instant, OfferId)>,
    early_age: VecDeque<(Instant, OfferId)>,
    /// Entries by a time no later than their end. A renewal leaves the old, earlier time standing; it is looked at again
    /// when it comes, so renewals in any order cannot hide an end.
    timers: BTreeSet<(Instant, OfferId)>,
    draining: bool,
    out: VecDeque<Out>,
}

impl OfferTable {
    /// Empty books.
    pub fn new(lease: LeaseConfig, limits: Limits, entropy: Entropy) -> Self {
        let slots = u32::try_from(limits.offers).unwrap_or(u32::MAX);
        Self {
            lease,
            limits,
            entropy,
            live: HashMap::new(),
            by_claim: HashMap::new(),
            claims_of: HashMap::new(),
            free_slots: (0..slots).collect(),
            early: HashMap::new(),
            tombs: HashMap::new(),
            tomb_age: VecDeque::new(),
            early_age: VecDeque::new(),
            timers: BTreeSet::new(),
            draining: false,
            out: VecDeque::new(),
        }
    }

    /// Enters an offer. It can be claimed once `ready`. One that was released before it was entered is freed at once.
    pub fn offer(&mut self, now: Instant, id: OfferId, ready: bool) -> Result<(), OfferError> {
        if self.draining {
            return Err(OfferError::Draining);
        }
        if self.live.contains_key(&id) || self.tombs.contains_key(&id) {
            return Err(OfferError::Duplicate(id));
        }
        if self.early.remove(&id).is_some_and(|e| e.released) {
            self.bury(now, id, Gone::Released);
            self.out.push_back(Out::Freed(Freed { offer: id, why: Gone::Released }));
            return Ok(());
        }
        let slot = self.free_slots.pop_front().ok_or(OfferError::TooManyOffers { limit: self.limits.offers })?;
        let nonce = loop {
            if let Some(n) = Nonce::from_wire((self.entropy)()) {
                break n;
            }
        };
        let entry = Entry {
            slot,
            nonce,
            ready,
            cap: now + self.lease.hard_cap,
            unclaimed_until: now + self.lease.unclaimed,
            claims: BTreeMap::new(),
            let_go: BTreeSet::new(),
            released: HashMap::new(),
            done: false,
            timer: now,
        };
        let entry = Entry { timer: entry.end(), ..entry };
        self.timers.insert((entry.timer, id));
        self.live.insert(id, entry);
        if ready {
            self.out.push_back(Out::Publish { offer: id, slot, nonce });
        }
        Ok(())
    }

    /// Live offers.
    pub fn live(&self) -> usize {
        self.live.len()
    }

    /// Claims on live offers.
    pub fn claims(&self) -> usize {
        self.by_claim.len()
    }

    fn frame(&mut self, now: Instant, from: PeerId, frame: ClientFrame) {
        let to = from.incarnation;
        match frame.body {
            // The session has dealt with it.
            ClientBody::Open { .. } => {}
            ClientBody::Ping(n) => self.reply(to, ServerBody::Pong(n)),
            ClientBody::Claim { claim, offer, .. } => {
                let body = self.claim(now, (to, claim), offer);
                self.reply(to, body);
            }
            ClientBody::Renew(claims) => self.renew(now, to, &claims),
            ClientBody::Release(release) => {
                self.release(now, Some(from), &release);
                self.out.push_back(Out::Send(to, ServerFrame { ack: frame.seq, body: None }));
            }
        }
    }

    fn reply(&mut self, to: Incarnation, body: ServerBody) {
        self.out.push_back(Out::Send(to, ServerFrame { ack: 0, body: Some(body) }));
    }

    fn claim(&mut self, now: Instant, key: ClaimKey, id: OfferId) -> ServerBody {
        let claim = key.1;
        let gone = |why| ServerBody::Gone { claim, why };
        if let Some(&why) = self.tombs.get(&id) {
            return gone(why);
        }
        let Some(entry) = self.live.get_mut(&id) else { return self.claim_early(now, claim, id) };
        // A timer may be late; an end is an end.
        if entry.end() <= now {
            self.expire(now, id);
            return gone(self.tombs.get(&id).copied().unwrap_or(Gone::Expired));
        }
        if !entry.ready {
            // The engine is filling the blocks: whoever waits for them waits for a first token.
            return ServerBody::NotYet { claim, retry: UNREADY_RETRY };
        }
        if entry.let_go.contains(&key) {
            return gone(Gone::Released);
        }
        // One claim id names one offer; the same pair again is a claim that was sent again.
        if self.by_claim.get(&key).is_some_and(|o| *o != id) {
            return gone(Gone::Limit);
        }
        let fresh = !entry.claims.contains_key(&key);
        let held = self.claims_of.entry(key.0).or_default();
        if fresh && (entry.claims.len() >= self.limits.claims_per_offer || *held >= self.limits.claims_per_session) {
            return gone(Gone::Limit);
        }
        if fresh {
            *held += 1;
        }
        let until = (now + self.lease.claimed).min(entry.cap);
        entry.claims.insert(key, until);
        self.by_claim.insert(key, id);
        let (grant, end) = (Grant { slot: entry.slot, nonce: entry.nonce }, entry.end());
        self.watch(id, end);
        ServerBody::Granted { claim, grant, remaining: until - now }
    }

    /// An id that nobody entered: it may be early, or long gone.
    fn claim_early(&mut self, now: Instant, claim: ClaimId, id: OfferId) -> ServerBody {
        let waited = match self.early.get(&id) {
            Some(e) if e.released => return ServerBody::Gone { claim, why: Gone::Released },
            Some(e) => now.saturating_duration_since(e.since),
            None if self.draining => return ServerBody::Gone { claim, why: Gone::Unknown },
            None => {
                self.remember_early(now, id, false);
                std::time::Duration::ZERO
            }
        };
        if waited >= self.lease.early_grace {
            ServerBody::Gone { claim, why: Gone::Unknown }
        } else {
            ServerBody::NotYet { claim, retry: retry_after(waited) }
        }
    }

    fn remember_early(&mut self, now: Instant, id: OfferId, released: bool) {
        while self.early.len() >= self.limits.remembered.max(1) {
            let Some((_, old)) = self.early_age.pop_front() else { break };
            self.early.remove(&old);
        }
        let e = self.early.entry(id).or_insert(Early { since: now, released });
        e.released |= released;
        self.early_age.push_back((now, id));
    }

    fn renew(&mut self, now: Instant, from: Incarnation, claims: &[ClaimId]) {
        for claim in claims {
            let key = (from, *claim);
            let Some(entry) = self.by_claim.get(&key).and_then(|id| self.live.get_mut(id)) else { continue };
            let cap = entry.cap;
            if let Some(until) = entry.claims.get_mut(&key)
                && *until > now
            {
                *until = (now + self.lease.claimed).min(cap);
            }
        }
    }

    /// Whether the offer was freed by it.
    fn release(&mut self, now: Instant, from: Option<PeerId>, r: &Release) -> bool {
        let key = r.claim.and_then(|c| from.as_ref().map(|f| (f.incarnation, c)));
        let Some(entry) = self.live.get_mut(&r.offer) else {
            if !self.tombs.contains_key(&r.offer) && (r.all || r.reader.of == 1) {
                self.remember_early(now, r.offer, true);
            }
            return false;
        };
        if let Some(key) = key {
            if entry.claims.remove(&key).is_some() {
                forget_claim(&mut self.by_claim, &mut self.claims_of, key);
            }
            entry.let_go.insert(key);
            if entry.let_go.len() > self.limits.claims_per_offer.max(LET_GO) {
                entry.let_go.pop_first();
            }
        }
        match from {
            _ if r.all => entry.done = true,
            Some(from) => {
                let seen = entry.released.entry(from.engine).or_default();
                if r.reader.index < r.reader.of {
                    seen.insert(r.reader.index);
                }
                entry.done |= seen.len() >= r.reader.of as usize;
            }
            None => entry.done = true,
        }
        // The engine's other readers are still to come.
        entry.unclaimed_until = entry.unclaimed_until.max(now + self.lease.unclaimed);
        self.lapse(now, r.offer);
        let Some(entry) = self.live.get(&r.offer) else { return true };
        if entry.done && entry.claims.is_empty() {
            self.end(now, r.offer, Gone::Released);
            return true;
        }
        let end = entry.end();
        self.watch(r.offer, end);
        false
    }

    /// Drops an offer's claims that ran out, and tells whose they were, so that their pulls stop early. Whether there were
    /// any.
    fn lapse(&mut self, now: Instant, id: OfferId) -> bool {
        let Some(entry) = self.live.get_mut(&id) else { return false };
        let lapsed: Vec<_> = entry.claims.iter().filter(|(_, until)| **until <= now).map(|(k, _)| *k).collect();
        for key in &lapsed {
            entry.claims.remove(key);
            forget_claim(&mut self.by_claim, &mut self.claims_of, *key);
        }
        for (to, claim) in &lapsed {
            self.reply(*to, ServerBody::Gone { claim: *claim, why: Gone::Expired });
        }
        !lapsed.is_empty()
    }

    /// Has `id` looked at no later than `end`.
    fn watch(&mut self, id: OfferId, end: Instant) {
        if let Some(e) = self.live.get_mut(&id)
            && end < e.timer
        {
            self.timers.remove(&(e.timer, id));
            e.timer = end;
            self.timers.insert((end, id));
        }
    }

    /// Drops claims that ran out, and the offer when none is left.
    fn expire(&mut self, now: Instant, id: OfferId) {
        let Some(entry) = self.live.get_mut(&id) else { return };
        self.timers.remove(&(entry.timer, id));
        if entry.cap <= now {
            return self.end(now, id, Gone::HardCap);
        }
        let lapsed = self.lapse(now, id);
        let Some(entry) = self.live.get_mut(&id) else { return };
        if entry.claims.is_empty() && entry.done {
            return self.end(now, id, Gone::Released);
        }
        // A consumer that claimed and fell silent does not give the offer back to the unclaimed: its lease was the offer's.
        // Readers of the same engine that are still to come keep it until the unclaimed time runs out.
        let waits_for_others = entry.released.values().any(|s| !s.is_empty());
        if entry.claims.is_empty() && (entry.unclaimed_until <= now || (lapsed && !waits_for_others)) {
            return self.end(now, id, Gone::Expired);
        }
        let end = entry.end();
        entry.timer = end;
        self.timers.insert((end, id));
    }

    /// The offer's end: word cleared, then blocks freed, then everybody told.
    fn end(&mut self, now: Instant, id: OfferId, why: Gone) {
        let Some(entry) = self.live.remove(&id) else { return };
        self.timers.remove(&(entry.timer, id));
        if planted(Bug::FreeBeforeClear) {
            self.out.push_back(Out::Freed(Freed { offer: id, why }));
        }
        if entry.ready {
            self.out.push_back(Out::Withdraw { offer: id, slot: entry.slot });
        }
        if !planted(Bug::FreeBeforeClear) {
            self.out.push_back(Out::Freed(Freed { offer: id, why }));
        }
        self.free_slots.push_back(entry.slot);
        let mut told = BTreeSet::new();
        for (key, _) in entry.claims {
            forget_claim(&mut self.by_claim, &mut self.claims_of, key);
            if told.insert(key.0) {
                self.reply(key.0, ServerBody::Revoked { offer: id, why });
            }
        }
        self.bury(now, id, why);
    }

    /// A name that will never be entered is buried too: whoever came early need not wait for it.
    fn revoke(&mut self, now: Instant, id: OfferId) {
        if self.live.contains_key(&id) {
            return self.end(now, id, Gone::Revoked);
        }
        if !self.tombs.contains_key(&id) {
            self.early.remove(&id);
            self.bury(now, id, Gone::Revoked);
        }
    }

    fn bury(&mut self, now: Instant, id: OfferId, why: Gone) {
        while self.tombs.len() >= self.limits.remembered.max(1) {
            let Some((_, old)) = self.tomb_age.pop_front() else { break };
            self.tombs.remove(&old);
        }
        self.tombs.insert(id, why);
        self.tomb_age.push_back((now, id));
    }

    fn age(&mut self, now: Instant) {
        while let Some(&(t, id)) = self.tomb_age.front()
            && t + self.lease.tombstone <= now
        {
            self.tomb_age.pop_front();
            self.tombs.remove(&id);
        }
        // An early name's release must outlast the books' delay, so it is kept as long as a tombstone.
        while let Some(&(t, id)) = self.early_age.front()
            && t + self.lease.tombstone <= now
        {
            self.early_age.pop_front();
            self.early.remove(&id);
        }
    }
}

fn forget_claim(by_claim: &mut HashMap<ClaimKey, OfferId>, claims_of: &mut HashMap<Incarnation, usize>, key: ClaimKey) {
    if by_claim.remove(&key).is_some()
        && let Some(n) = claims_of.get_mut(&key.0)
    {
        *n = n.saturating_sub(1);
        if *n == 0 {
            claims_of.remove(&key.0);
        }
    }
}

/// Between two looks at an offer whose blocks are being filled: a few engine steps, and 200 small frames a second.
const UNREADY_RETRY: std::time::Duration = std::time::Duration::from_millis(5);

/// Soon at first, since the books are nearly there; then slower. 2 ms is about one step of a fast engine.
fn retry_after(waited: std::time::Duration) -> std::time::Duration {
    (waited / 4).clamp(std::time::Duration::from_millis(2), std::time::Duration::from_millis(50))
}

impl Machine for OfferTable {
    type In = In;
    type Out = Out;

    fn handle(&mut self, now: Instant, event: In) {
        match event {
            In::Ready(id) => {
                if let Some(e) = self.live.get_mut(&id)
                    && !e.ready
                {
                    e.ready = true;
                    // The time to fill the blocks was the engine's, not the consumer's.
                    e.unclaimed_until = now + self.lease.unclaimed;
                    let end = e.end();
                    self.out.push_back(Out::Publish { offer: id, slot: e.slot, nonce: e.nonce });
                    self.watch(id, end);
                }
            }
            In::Frame(from, frame) => self.frame(now, from, frame),
            In::Release(from, offer) => {
                self.release(now, from, &Release { claim: None, offer, reader: Reader::ONLY, all: true });
            }
            In::Revoke(id) => self.revoke(now, id),
            In::Drain => {
                if !std::mem::replace(&mut self.draining, true) {
                    self.out.push_back(Out::Broadcast(ServerFrame { ack: 0, body: Some(ServerBody::Draining) }));
                }
            }
        }
    }

    fn tick(&mut self, now: Instant) {
        while let Some(&(t, id)) = self.timers.first()
            && t <= now
        {
            self.timers.pop_first();
            match self.live.get_mut(&id) {
                Some(e) if e.end() > now => {
                    e.timer = e.end();
                    self.timers.insert((e.timer, id));
                }
                Some(_) => self.expire(now, id),
                None => {}
            }
        }
        self.age(now);
    }

    fn poll(&mut self) -> Option<Out> {
        self.out.pop_front()
    }

    fn next_timeout(&self) -> Option<Instant> {
        // Tombstones age when something happens; only leases need a clock.
        self.timers.first().map(|t| t.0)
    }
}
