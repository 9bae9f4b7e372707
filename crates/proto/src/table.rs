//! A producer's offer table: which offers are live, who has claimed them, and when their blocks go back to the engine.
//!
//! An offer is unclaimed for a short while, then kept by its claims' renewals, and never outlives a hard cap. When it ends,
//! its fence word is cleared *before* the engine hears that the blocks are free (promise 2), and it does end, even if its
//! consumers never release it (promise 6). A tombstone then gives the reason for a while.
//!
//! Only this table says which blocks an offer has: a grant takes them from here. A claim and a release show the offer's token;
//! without it an id opens and ends nothing.
//!
//! An offer's name may arrive before the offer itself (a router is fast), and a release before both. Unknown ids are
//! therefore answered `NotYet` for a grace period, and a release of one is remembered. Names may be numbered: one that the
//! engine has passed over is unknown at once. A claim may say that its request waits in the prefill engine's queue: it is
//! answered when the offer is entered.
//!
//! An open offer grows: it is entered before anything is computed, and its growths become readable in their order, each once
//! its data is in place. The word and the nonce stay. Claims hear of growths in batches.

mod aged;
mod awaiting;
mod claims;
mod entry;
mod growth;
mod order;

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use self::{
    aged::Aged,
    awaiting::Awaiting,
    claims::ClaimIndex,
    entry::{ClaimKey, Entry},
    order::Order,
};
use crate::{
    BadOffer, ClaimId, ClientBody, ClientFrame, Contents, Gone, Grant, Growth, Incarnation, LeaseConfig, Limits,
    Machine, Nonce, OfferError, OfferId, PeerId, Reader, Release, ServerBody, ServerFrame, Token,
    sabotage::{Bug, planted},
};

/// An event for the offer table.
#[derive(Debug, Clone)]
pub enum In {
    /// The work that fills the offer's blocks is done.
    Ready(OfferId),
    /// The data of the growth with this number is in place, see [`OfferTable::grow`].
    Grown(OfferId, u64),
    /// A frame of a consumer's session. `Open` is ignored: the session handles it.
    Frame(PeerId, ClientFrame),
    /// A release that came without a session, with the offer's token. No peer: on behalf of every reader.
    Release(Option<PeerId>, OfferId, Token),
    /// The session of a consumer has ended, and it has no other one.
    Closed(Incarnation),
    /// The engine takes the offer back, or the name if it never entered the offer.
    Revoke(OfferId),
    /// The engine takes back every offer that nobody has claimed.
    RevokeUnclaimed,
    /// No new offers.
    Drain,
}

/// An action of the offer table. The caller carries them out in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Out {
    /// Set the fence word: from now on the offer can be read. Comes again when the offer has grown, with the same word.
    Publish {
        /// The offer.
        offer: OfferId,
        /// What may be read.
        contents: Arc<Contents>,
        /// Its word.
        slot: u32,
        /// The word's new value.
        nonce: Nonce,
    },
    /// Clear the fence word, with a full memory fence, and forget the slot's offer.
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

/// An offer whose blocks went back to the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Freed {
    /// The offer.
    pub offer: OfferId,
    /// Why it ended.
    pub why: Gone,
}

/// Released claims that an offer remembers, at least.
const ENDED_CLAIMS: usize = 16;

/// Between two claims of an offer whose blocks are being filled: a few engine steps, and 200 small frames a second.
const UNREADY_RETRY: Duration = Duration::from_millis(5);

/// Bounds on the wait between two claims of an unknown offer. The first waits are short, since the offer is usually about to
/// be entered; 2 ms is about one step of a fast engine.
const EARLY_RETRY: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(50));

/// After this time a waiting claim is sent again. The answer comes when the offer is entered; the second claim covers the loss of
/// the first one on this side.
const AWAITED_RETRY: Duration = Duration::from_secs(5);

/// A name that was used before its offer was entered.
#[derive(Debug)]
struct Early {
    since: Instant,
    /// Tokens of early releases. One takes effect when the offer is entered with the same token.
    released: Vec<Token>,
}

/// Releases that are remembered for a name that was not entered yet. One is right; the others have a wrong token.
const EARLY_RELEASES: usize = 4;

/// Random 64-bit numbers. From the system in production, from a seed in the simulation.
pub type Entropy = Box<dyn FnMut() -> u64 + Send>;

/// A producer's offer table.
pub struct OfferTable {
    lease: LeaseConfig,
    limits: Limits,
    entropy: Entropy,
    live: HashMap<OfferId, Entry>,
    claims: ClaimIndex,
    awaiting: Awaiting,
    free_slots: VecDeque<u32>,
    early: Aged<Early>,
    tombs: Aged<Gone>,
    order: Order,
    /// Entries by a time no later than their end. A renewal leaves the old, earlier time in place; the entry is looked at
    /// again at that time, so renewals in any order cannot hide an end.
    timers: BTreeSet<(Instant, OfferId)>,
    /// Open offers whose claims are told of growth later, by the time for that.
    news: BTreeSet<(Instant, OfferId)>,
    /// Number of growths of all offers: the number of the last one.
    growths: u64,
    draining: bool,
    wrong_tokens: u64,
    out: VecDeque<Out>,
}

impl OfferTable {
    /// An empty table with [`Limits::offers`] fence words.
    pub fn new(lease: LeaseConfig, limits: Limits, entropy: Entropy) -> Self {
        let slots = u32::try_from(limits.offers).unwrap_or(u32::MAX);
        Self {
            live: HashMap::new(),
            claims: ClaimIndex::default(),
            awaiting: Awaiting::default(),
            free_slots: (0..slots).collect(),
            early: Aged::new(limits.remembered),
            tombs: Aged::new(limits.remembered),
            order: Order::default(),
            timers: BTreeSet::new(),
            news: BTreeSet::new(),
            growths: 0,
            draining: false,
            wrong_tokens: 0,
            out: VecDeque::new(),
            lease,
            limits,
            entropy,
        }
    }

    /// Enters an offer, which can be claimed with its token once it is `ready`. Without complete contents it is open, and grows.
    /// An offer that was released before is freed at once.
    ///
    /// # Errors
    /// The table is draining or full, or the id was used before.
    pub fn offer(
        &mut self,
        now: Instant,
        (id, token): (OfferId, Token),
        contents: Arc<Contents>,
        ready: bool,
    ) -> Result<(), OfferError> {
        if self.draining {
            return Err(OfferError::Draining);
        }
        if self.live.contains_key(&id) || self.tombs.get(id).is_some() {
            return Err(OfferError::Duplicate(id));
        }
        if self.early.get(id).is_some_and(|e| e.released.contains(&token)) {
            self.early.remove(id);
            self.refuse_awaiting(id, Gone::Released);
            self.tombs.insert(now, id, Gone::Released);
            self.out.push_back(Out::Freed(Freed { offer: id, why: Gone::Released }));
            return Ok(());
        }
        let slot = self.free_slots.pop_front().ok_or(OfferError::TooManyOffers { limit: self.limits.offers })?;
        self.early.remove(id);
        let nonce = loop {
            if let Some(n) = Nonce::from_wire((self.entropy)()) {
                break n;
            }
        };
        if ready {
            self.out.push_back(Out::Publish { offer: id, contents: contents.clone(), slot, nonce });
        }
        let entry = Entry::new(now, (slot, nonce), token, contents, ready, &self.lease);
        self.timers.insert((entry.timer, id));
        self.live.insert(id, entry);
        if ready {
            self.grant_awaiting(now, id);
        }
        Ok(())
    }

    /// Adds to an open offer. It becomes readable when its data and that of all earlier growths is in place: at once if it is
    /// `ready`, else with [`In::Grown`] of the returned number.
    ///
    /// # Errors
    /// The offer has ended or is not open, or the growth does not follow.
    pub fn grow(&mut self, now: Instant, id: OfferId, growth: Growth, ready: bool) -> Result<u64, OfferError> {
        let gone = || self.tombs.get(id).copied().unwrap_or(Gone::Unknown);
        let Some(entry) = self.live.get_mut(&id) else { return Err(OfferError::Ended { offer: id, why: gone() }) };
        let Some(growing) = &mut entry.growing else {
            return Err(BadOffer::Malformed("it grows after it was finished".into()).into());
        };
        self.growths += 1;
        growing.add(self.growths, growth, ready, self.limits.blocks_per_offer)?;
        self.apply(now, id);
        Ok(self.growths)
    }

    /// Applies the growths whose data is in place.
    fn apply(&mut self, now: Instant, id: OfferId) {
        let Some(entry) = self.live.get_mut(&id) else { return };
        let Some(growing) = &mut entry.growing else { return };
        let mut contents = None;
        while let Some(growth) = growing.next(planted(Bug::MarkAhead)) {
            // It was checked when it was queued.
            let grown = contents.get_or_insert_with(|| Contents::clone(&entry.contents));
            if grown.grow(&growth, usize::MAX).is_err() {
                debug_assert!(false, "a growth that was checked does not follow");
            }
        }
        if planted(Bug::FinalTooEarly) && growing.ends() {
            contents.get_or_insert_with(|| Contents::clone(&entry.contents)).complete = true;
        }
        let Some(contents) = contents else { return };
        let complete = contents.complete;
        entry.contents = Arc::new(contents);
        if let Some(due) = growing.due() {
            self.news.remove(&(due, id));
        }
        self.news.insert((growing.tell_at(now, complete), id));
        self.out.push_back(Out::Publish {
            offer: id,
            contents: entry.contents.clone(),
            slot: entry.slot,
            nonce: entry.nonce,
        });
        self.tell_news(now);
        if complete && let Some(entry) = self.live.get_mut(&id) {
            entry.set_complete(now, self.lease.unclaimed);
            let end = entry.end();
            self.watch(id, end);
        }
    }

    /// Tells claims of growths that are due.
    fn tell_news(&mut self, now: Instant) {
        while let Some(&(at, id)) = self.news.first()
            && at <= now
        {
            self.news.pop_first();
            let Some(entry) = self.live.get_mut(&id) else { continue };
            let (contents, claims) = (entry.contents.clone(), entry.claims().collect::<Vec<_>>());
            let Some(growing) = &mut entry.growing else { continue };
            let growths = growing.applied();
            for ((to, claim), after, growth) in growing.news(now, &contents, claims.into_iter()) {
                self.reply(to, ServerBody::Grown { claim, after, growths, growth });
            }
        }
    }

    /// Answers the claims that waited for an offer.
    fn grant_awaiting(&mut self, now: Instant, id: OfferId) {
        for awaiting::Wait { key, token, .. } in self.awaiting.take(id) {
            self.claims.remove(key);
            let body = self.claim(now, key, (id, token), 0, true);
            self.reply(key.0, body);
        }
    }

    /// Tells the claims that wait for an offer that it will not come.
    fn refuse_awaiting(&mut self, id: OfferId, why: Gone) {
        for awaiting::Wait { key, .. } in self.awaiting.take(id) {
            self.claims.remove(key);
            self.reply(key.0, ServerBody::Gone { claim: key.1, why });
        }
    }

    /// Answers a claim of an offer that is not there yet: it waits, if it may.
    fn await_offer(&mut self, now: Instant, key: ClaimKey, (id, token): (OfferId, Token)) -> ServerBody {
        let (claim, limits) = (key.1, &self.limits);
        let of = self.claims.offer(key);
        let full = of.is_none() && self.claims.of_consumer(key.0) >= limits.claims_per_session;
        if full || of.is_some_and(|o| o != id) || !self.awaiting.add(now, id, (key, token)) {
            return ServerBody::Gone { claim, why: Gone::Limit };
        }
        self.claims.insert(key, id);
        ServerBody::NotYet { claim, retry: AWAITED_RETRY }
    }

    /// The offer whose name has this number was entered: see [`Offer::number`](crate::Offer::number).
    pub fn numbered(&mut self, now: Instant, number: u64) {
        self.order.entered(now, number, self.lease.reorder);
    }

    /// Whether an offer is live, and if so, whether this is its token.
    pub fn shows(&self, id: OfferId, token: Token) -> Option<bool> {
        self.live.get(&id).map(|e| e.token == token)
    }

    /// Claims and releases so far whose token was not the offer's.
    pub fn wrong_tokens(&self) -> u64 {
        self.wrong_tokens
    }

    /// Number of live offers.
    pub fn live(&self) -> usize {
        self.live.len()
    }

    /// Number of claims on live offers, and of those that wait for their offers.
    pub fn claims(&self) -> usize {
        self.claims.len()
    }

    /// Number of claims of a consumer on live offers.
    pub fn claims_of(&self, consumer: Incarnation) -> usize {
        self.claims.of_consumer(consumer)
    }

    /// A consumer whose number of claims has changed since the last call that returned it, with the new number; `None`: no
    /// other one's has.
    pub fn poll_claims(&mut self) -> Option<(Incarnation, usize)> {
        self.claims.take_changed()
    }

    /// Whether a consumer's claim holds.
    pub fn holds(&self, consumer: Incarnation, claim: ClaimId) -> bool {
        self.claims.offer((consumer, claim)).is_some()
    }

    fn frame(&mut self, now: Instant, from: PeerId, frame: ClientFrame) {
        let to = from.incarnation;
        match frame.body {
            ClientBody::Open { .. } => {}
            ClientBody::Ping(n) => self.reply(to, ServerBody::Pong(n)),
            ClientBody::Claim { claim, offer, token, number, awaited, .. } => {
                let body = self.claim(now, (to, claim), (offer, token), number, awaited);
                // It has its answer, and no longer waits.
                if matches!(body, ServerBody::Gone { .. }) && self.awaiting.remove(offer, (to, claim)) {
                    self.claims.remove((to, claim));
                }
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

    fn claim(
        &mut self,
        now: Instant,
        key: ClaimKey,
        (id, token): (OfferId, Token),
        number: u64,
        awaited: bool,
    ) -> ServerBody {
        let claim = key.1;
        let gone = |why| ServerBody::Gone { claim, why };
        if let Some(&why) = self.tombs.get(id) {
            return gone(why);
        }
        let Some(entry) = self.live.get_mut(&id) else {
            return self.claim_early(now, key, (id, token), number, awaited);
        };
        if entry.token != token && !planted(Bug::TokenIgnored) {
            self.wrong_tokens += 1;
            return gone(Gone::Token);
        }
        // The timer may be late.
        if entry.end() <= now {
            self.expire(now, id);
            return gone(self.tombs.get(id).copied().unwrap_or(Gone::Expired));
        }
        if !entry.ready {
            if awaited {
                return self.await_offer(now, key, (id, token));
            }
            // The engine is filling the blocks, and a user waits for the first token.
            return ServerBody::NotYet { claim, retry: UNREADY_RETRY };
        }
        if entry.has_ended(key) {
            return gone(Gone::Released);
        }
        // One claim id names one offer; the same pair again is a claim that was sent again.
        if self.claims.offer(key).is_some_and(|o| o != id) {
            return gone(Gone::Limit);
        }
        if !entry.is_claimed_by(key)
            && (entry.claims().len() >= self.limits.claims_per_offer
                || self.claims.of_consumer(key.0) >= self.limits.claims_per_session)
        {
            return gone(Gone::Limit);
        }
        let until = entry.claim(now, key, self.lease.claimed);
        let (grant, end) = (Grant { slot: entry.slot, nonce: entry.nonce }, entry.end());
        let contents = entry.contents.clone();
        let growths = entry.growing.as_mut().map_or(entry.growths, |growing| {
            growing.granted(key, &contents);
            growing.applied()
        });
        self.claims.insert(key, id);
        self.watch(id, end);
        ServerBody::Granted { claim, grant, contents, growths, remaining: until - now }
    }

    /// A claim of an id that was never entered: it may be early, or long gone.
    fn claim_early(
        &mut self,
        now: Instant,
        key: ClaimKey,
        (id, token): (OfferId, Token),
        number: u64,
        awaited: bool,
    ) -> ServerBody {
        let claim = key.1;
        let reorder = if planted(Bug::OrderTrusted) { Duration::ZERO } else { self.lease.reorder };
        let passed = self.order.has_passed(now, number, reorder);
        let unknown = ServerBody::Gone { claim, why: Gone::Unknown };
        if self.early.get(id).is_some_and(|e| e.released.contains(&token)) {
            return ServerBody::Gone { claim, why: Gone::Released };
        }
        if passed || (self.draining && (awaited || self.early.get(id).is_none())) {
            return unknown;
        }
        if awaited {
            return self.await_offer(now, key, (id, token));
        }
        let early = self.early.insert(now, id, Early { since: now, released: Vec::new() });
        let waited = now.saturating_duration_since(early.since);
        if waited >= self.lease.early_grace {
            return unknown;
        }
        ServerBody::NotYet { claim, retry: (waited / 4).clamp(EARLY_RETRY.0, EARLY_RETRY.1) }
    }

    fn renew(&mut self, now: Instant, from: Incarnation, claims: &[ClaimId]) {
        for claim in claims {
            let key = (from, *claim);
            if let Some(entry) = self.claims.offer(key).and_then(|id| self.live.get_mut(&id)) {
                entry.renew(now, key, self.lease.claimed);
            }
        }
    }

    fn release(&mut self, now: Instant, from: Option<PeerId>, r: &Release) {
        let key = from.as_ref().map(|p| p.incarnation).zip(r.claim);
        if let Some(key) = key.filter(|key| self.awaiting.remove(r.offer, *key)) {
            self.claims.remove(key);
        }
        let Some(entry) = self.live.get_mut(&r.offer) else {
            if self.tombs.get(r.offer).is_none() && (r.all || r.reader.of == 1) {
                let early = self.early.insert(now, r.offer, Early { since: now, released: Vec::new() });
                if early.released.len() < EARLY_RELEASES && !early.released.contains(&r.token) {
                    early.released.push(r.token);
                }
                for (to, claim) in self.awaiting.take_with(r.offer, r.token) {
                    self.claims.remove((to, claim));
                    self.reply(to, ServerBody::Gone { claim, why: Gone::Released });
                }
            }
            return;
        };
        if entry.token != r.token && !planted(Bug::TokenIgnored) {
            self.wrong_tokens += 1;
            return;
        }
        if let (Some(claim), Some(from)) = (r.claim, &from) {
            let key = (from.incarnation, claim);
            if entry.end_claim(key, self.limits.claims_per_offer.max(ENDED_CLAIMS)) {
                self.claims.remove(key);
            }
        }
        entry.release(now, from, r, self.lease.unclaimed);
        self.drop_lapsed(now, r.offer);
        let Some(entry) = self.live.get(&r.offer) else { return };
        if entry.is_released() {
            return self.end(now, r.offer, Gone::Released);
        }
        let end = entry.end();
        self.watch(r.offer, end);
    }

    /// Drops the claims of an offer that ran out, and tells their consumers, so that their pulls stop early. `true` when there
    /// were any.
    fn drop_lapsed(&mut self, now: Instant, id: OfferId) -> bool {
        let Some(entry) = self.live.get_mut(&id) else { return false };
        let lapsed = entry.take_lapsed(now);
        for &(to, claim) in &lapsed {
            self.claims.remove((to, claim));
            self.reply(to, ServerBody::Gone { claim, why: Gone::Expired });
        }
        !lapsed.is_empty()
    }

    /// Makes sure that a timer looks at `id` no later than `end`.
    fn watch(&mut self, id: OfferId, end: Instant) {
        if let Some(e) = self.live.get_mut(&id)
            && end < e.timer
        {
            self.timers.remove(&(e.timer, id));
            e.timer = end;
            self.timers.insert((end, id));
        }
    }

    /// Drops claims that ran out, and ends the offer when none is left.
    fn expire(&mut self, now: Instant, id: OfferId) {
        let Some(entry) = self.live.get_mut(&id) else { return };
        self.timers.remove(&(entry.timer, id));
        if entry.is_over_cap(now) {
            return self.end(now, id, Gone::HardCap);
        }
        let lapsed = self.drop_lapsed(now, id);
        let Some(entry) = self.live.get_mut(&id) else { return };
        if entry.is_released() {
            return self.end(now, id, Gone::Released);
        }
        if entry.is_expired(now, lapsed) {
            return self.end(now, id, Gone::Expired);
        }
        entry.timer = entry.end();
        self.timers.insert((entry.timer, id));
    }

    /// Ends an offer: clears the word, then frees the blocks, then tells the consumers.
    fn end(&mut self, now: Instant, id: OfferId, why: Gone) {
        if planted(Bug::GrownAfterRevoke)
            && why == Gone::Revoked
            && let Some(entry) = self.live.get(&id).filter(|e| e.growing.is_some())
        {
            self.out.push_back(Out::Withdraw { offer: id, slot: entry.slot });
            return self.out.push_back(Out::Freed(Freed { offer: id, why }));
        }
        let Some(entry) = self.live.remove(&id) else { return };
        self.timers.remove(&(entry.timer, id));
        if let Some(due) = entry.growing.as_ref().and_then(|g| g.due()) {
            self.news.remove(&(due, id));
        }
        let freed = self.out.len();
        if entry.ready {
            self.out.push_back(Out::Withdraw { offer: id, slot: entry.slot });
        }
        self.out.push_back(Out::Freed(Freed { offer: id, why }));
        if planted(Bug::FreeBeforeClear) {
            self.out.make_contiguous()[freed..].reverse();
        }
        self.free_slots.push_back(entry.slot);
        let mut told = BTreeSet::new();
        for key in entry.claims() {
            self.claims.remove(key);
            if told.insert(key.0) {
                self.reply(key.0, ServerBody::Revoked { offer: id, why });
            }
        }
        self.refuse_awaiting(id, why);
        self.tombs.insert(now, id, why);
    }

    /// Ends an offer, or a name that will never be entered, so that early claims of it do not wait.
    fn revoke(&mut self, now: Instant, id: OfferId) {
        if self.live.contains_key(&id) {
            return self.end(now, id, Gone::Revoked);
        }
        if self.tombs.get(id).is_none() {
            self.early.remove(id);
            self.refuse_awaiting(id, Gone::Revoked);
            self.tombs.insert(now, id, Gone::Revoked);
        }
    }
}

impl Machine for OfferTable {
    type In = In;
    type Out = Out;

    fn handle(&mut self, now: Instant, event: In) {
        match event {
            In::Ready(id) => {
                if let Some(e) = self.live.get_mut(&id).filter(|e| !e.ready) {
                    e.set_ready(now, self.lease.unclaimed);
                    let end = e.end();
                    let (contents, slot, nonce) = (e.contents.clone(), e.slot, e.nonce);
                    self.out.push_back(Out::Publish { offer: id, contents, slot, nonce });
                    self.watch(id, end);
                    self.grant_awaiting(now, id);
                }
            }
            In::Grown(id, number) => {
                if let Some(growing) = self.live.get_mut(&id).and_then(|e| e.growing.as_mut()) {
                    growing.placed(number);
                    self.apply(now, id);
                }
            }
            In::Frame(from, frame) => self.frame(now, from, frame),
            In::Release(from, offer, token) => {
                self.release(now, from, &Release { claim: None, offer, token, reader: Reader::ONLY, all: true });
            }
            In::Closed(consumer) => {
                for key in self.awaiting.take_of(consumer) {
                    self.claims.remove(key);
                }
            }
            In::Revoke(id) => self.revoke(now, id),
            In::RevokeUnclaimed => {
                let unclaimed: Vec<_> =
                    self.live.iter().filter(|(_, e)| e.claims().len() == 0).map(|(id, _)| *id).collect();
                for id in unclaimed {
                    self.end(now, id, Gone::Revoked);
                }
            }
            In::Drain => {
                if !std::mem::replace(&mut self.draining, true) {
                    for id in self.awaiting.offers() {
                        if !self.live.contains_key(&id) {
                            self.refuse_awaiting(id, Gone::Unknown);
                        }
                    }
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
        // A release of an early name must outlast any delay of the offer, so early names are kept as long as tombstones.
        self.tombs.age(now, self.lease.tombstone);
        self.early.age(now, self.lease.tombstone);
        self.tell_news(now);
        let Some(since) = now.checked_sub(self.lease.awaited) else { return };
        for (id, key) in self.awaiting.since(since) {
            // An offer that is not ready yet will be.
            if !self.live.contains_key(&id) {
                self.awaiting.remove(id, key);
                self.claims.remove(key);
                self.reply(key.0, ServerBody::Gone { claim: key.1, why: Gone::Unknown });
            }
        }
    }

    fn poll(&mut self) -> Option<Out> {
        self.out.pop_front()
    }

    fn next_timeout(&self) -> Option<Instant> {
        // Only leases and growths need a clock; tombstones age at the next event.
        let awaited = self.awaiting.first().map(|since| since + self.lease.awaited);
        [self.timers.first().map(|t| t.0), self.news.first().map(|t| t.0), awaited].into_iter().flatten().min()
    }
}
