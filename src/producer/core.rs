//! The state of a producer: its offer table, sessions and data servers. It is the [`Desk`] that the control server asks.
//!
//! The table's lock is held while its actions are carried out, so that "word cleared, then freed" is one step for every
//! other thread (promise 2).

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::Notify;

use super::{
    shares::Shares,
    spec::{OfferSpec, Ready},
};

#[cfg(feature = "verbs")]
use crate::lane::verbs::{self, VerbsError, VerbsRequest};
use crate::{
    config::Config,
    control::{
        desk::{Desk, SessionId},
        host,
        outbox::Outbox,
        peer::{Counts, PeerKey},
        refusal::Refusal,
    },
    lane::{local, tcp, ticket::LaneTicket},
    memory::{Export, Mark, Place},
    metrics::ProducerMetrics,
    repeats::Repeats,
};
use kvferry_proto::{
    BadOffer, ClaimId, ClientBody, ClientFrame, Contents, Gone, Growth, Incarnation, LaneKind, Machine, Mismatch,
    Model, Offer, OfferError, OfferGroup, OfferId, OfferRank, PeerId, ServerBody, ServerFrame, Shard, Token,
    hello::{self, Hello, Welcome},
    table::{self, Freed, OfferTable},
};

pub(super) struct Core {
    pub(super) me: PeerId,
    pub(super) addr: String,
    model: Model,
    shard: Shard,
    pub(super) export: Arc<Export>,
    servers: Servers,
    pub(super) config: Config,
    state: Mutex<State>,
    pub(super) freed: Mutex<VecDeque<Freed>>,
    pub(super) freed_now: Condvar,
    pub(super) freed_notify: Notify,
    /// The offer table's next timeout may have changed.
    pub(super) rearm: Arc<Notify>,
    pub(super) metrics: ProducerMetrics,
    /// Why offers ended without a release.
    unreleased: Repeats<Gone>,
}

/// The data servers; `None`: that lane is not served.
pub(super) struct Servers {
    pub(super) tcp: Option<tcp::Server>,
    pub(super) local: Option<local::Server>,
    #[cfg(feature = "verbs")]
    pub(super) verbs: Option<verbs::Server>,
}

impl Servers {
    /// The lanes that are served, best first.
    fn kinds(&self) -> Vec<LaneKind> {
        #[cfg(feature = "verbs")]
        let verbs = self.verbs.as_ref().map(|_| LaneKind::Verbs);
        #[cfg(not(feature = "verbs"))]
        let verbs = None;
        let (local, tcp) = (self.local.as_ref().map(|_| LaneKind::Local), self.tcp.as_ref().map(|_| LaneKind::Tcp));
        [verbs, local, tcp].into_iter().flatten().collect()
    }

    /// Closes a lane.
    fn dismiss(&self, (kind, lane): (LaneKind, u64)) {
        match kind {
            LaneKind::Tcp => self.tcp.iter().for_each(|s| s.dismiss(lane)),
            LaneKind::Local => self.local.iter().for_each(|s| s.dismiss(lane)),
            #[cfg(feature = "verbs")]
            LaneKind::Verbs => self.verbs.iter().for_each(|s| s.dismiss(lane)),
            _ => {}
        }
    }
}

pub(super) struct State {
    pub(super) table: OfferTable,
    pub(super) sessions: HashMap<SessionId, Session>,
    /// The newest session of each consumer incarnation.
    by_consumer: HashMap<Incarnation, SessionId>,
    /// The claims of each peer.
    shares: Shares,
    /// Lanes of all sessions, and of each peer's.
    lanes: usize,
    lanes_by_peer: Counts,
    /// Peers for which a verbs lane is being made.
    #[cfg(feature = "verbs")]
    connecting: std::collections::HashSet<PeerKey>,
    next_session: u64,
    /// Those that the metrics have counted.
    wrong_tokens: u64,
}

/// Most lanes of one session and kind. A consumer starts pulls on the newest; older lanes finish their pulls. A consumer
/// that searches for a better lane opens its eighth after four minutes. A pull that waits for growth on the first one until then
/// gets another lane.
const LANES_OF_A_KIND: usize = 8;

pub(super) struct Session {
    from: PeerId,
    /// The peer that it counts for.
    by: PeerKey,
    outbox: Outbox,
    /// Oldest first.
    lanes: VecDeque<(LaneKind, u64)>,
    /// A claim was granted on it: the consumer has shown the token of an offer.
    granted: bool,
}

impl Session {
    /// Checks that the consumer may have a lane of this kind. Over `local` and `verbs` it can read the whole pool, so it must
    /// have been granted a claim before. Consumers ask for lanes only then.
    fn may_have(&self, kind: LaneKind) -> Result<(), Refusal> {
        if self.granted || kind == LaneKind::Tcp {
            return Ok(());
        }
        Err(Refusal::Precondition(format!("a lane {kind} needs a claim first, and none was granted in this session")))
    }
}

/// Which lane of a session must close for a new one of this kind, if any. Never one of another kind: the consumer may have
/// only that one to read over.
fn superfluous(lanes: &VecDeque<(LaneKind, u64)>, kind: LaneKind) -> Option<usize> {
    let mut same = lanes.iter().enumerate().filter(|(_, (k, _))| *k == kind).map(|(i, _)| i);
    let oldest = same.next()?;
    (same.count() + 1 >= LANES_OF_A_KIND).then_some(oldest)
}

impl Core {
    pub(super) fn new(
        me: PeerId,
        addr: String,
        model: Model,
        shard: Shard,
        export: Arc<Export>,
        servers: Servers,
        config: Config,
    ) -> Self {
        let random = Box::new(|| Incarnation::random().get());
        let state = State {
            table: OfferTable::new(config.lease.clone(), config.limits.clone(), random),
            sessions: HashMap::new(),
            by_consumer: HashMap::new(),
            shares: Shares::default(),
            lanes: 0,
            lanes_by_peer: Counts::default(),
            #[cfg(feature = "verbs")]
            connecting: Default::default(),
            next_session: 1,
            wrong_tokens: 0,
        };
        Self {
            me,
            addr,
            model,
            shard,
            export,
            servers,
            config,
            state: Mutex::new(state),
            freed: Mutex::default(),
            freed_now: Condvar::new(),
            freed_notify: Notify::new(),
            rearm: Arc::default(),
            unreleased: Repeats::default(),
            metrics: ProducerMetrics::default(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    pub(super) fn consumers(&self) -> Vec<PeerId> {
        self.lock().sessions.values().map(|s| s.from.clone()).collect()
    }

    /// The name of an offer, sealed if there is a key, and its blocks.
    pub(super) fn name(&self, spec: OfferSpec) -> (Offer, Vec<OfferGroup>) {
        let rank = OfferRank { rank: self.me.rank, incarnation: self.me.incarnation, addr: self.addr.clone() };
        let id = spec.id.unwrap_or_else(OfferId::random);
        let name = Offer::new(id, self.me.engine.clone(), self.me.incarnation, vec![rank], spec.tokens)
            .request(spec.request)
            .number(spec.number)
            .fingerprints(spec.fingerprints);
        let name = match self.config.names.seal_keys.first() {
            Some(key) => name.sealed(key),
            None => name,
        };
        (name, spec.groups)
    }

    pub(super) fn enter(
        self: &Arc<Self>,
        name: &Offer,
        groups: Vec<OfferGroup>,
        ready: Ready,
    ) -> Result<(), OfferError> {
        name.check()?;
        let contents = Contents::of(name, groups);
        contents.check(self.config.limits.blocks_per_offer)?;
        self.check_blocks(&contents.groups)?;
        let mark = self.mark(ready)?;
        self.add(name, contents, ready == Ready::Now)?;
        self.when_done(mark, name.id, table::In::Ready(name.id));
        Ok(())
    }

    pub(super) fn enter_open(&self, name: &Offer) -> Result<(), OfferError> {
        name.check()?;
        self.add(name, Contents::open(name), true)
    }

    pub(super) fn grow(self: &Arc<Self>, offer: OfferId, growth: Growth, ready: Ready) -> Result<(), OfferError> {
        if ready == Ready::Later {
            return Err(OfferError::Stream {
                why: "a growth cannot be `Ready::Later`: call `grow` when its data is in place".into(),
            });
        }
        self.check_blocks(&growth.groups)?;
        let mark = self.mark(ready)?;
        let number = {
            let mut state = self.lock();
            let before = state.table.next_timeout();
            let number = state.table.grow(Instant::now(), offer, growth, ready == Ready::Now)?;
            self.carry_out(&mut state);
            if state.table.next_timeout() != before {
                self.rearm.notify_one();
            }
            number
        };
        self.when_done(mark, offer, table::In::Grown(offer, number));
        Ok(())
    }

    /// Enters an offer that was checked.
    fn add(&self, name: &Offer, contents: Contents, ready: bool) -> Result<(), OfferError> {
        let mut state = self.lock();
        let entered = state.table.offer(Instant::now(), (name.id, name.token), Arc::new(contents), ready);
        if entered.is_ok() {
            state.table.numbered(Instant::now(), name.number);
            self.metrics.offers.inc();
        }
        self.carry_out(&mut state);
        entered
    }

    /// Checks that these blocks are in the pool.
    fn check_blocks(&self, groups: &[OfferGroup]) -> Result<(), BadOffer> {
        for g in groups {
            let blocks = self.export.layout.group(g.group).map_or(0, |l| l.blocks);
            if let Some(b) = g.blocks.iter().flatten().find(|b| b.0 >= blocks) {
                let (block, group) = (b.0, g.group.0);
                return Err(BadOffer::Malformed(format!(
                    "block {block} of group {group} is not in this rank's pool, which has {blocks}"
                )));
            }
        }
        Ok(())
    }

    /// A mark after the work that the stream of `ready` holds now.
    fn mark(&self, ready: Ready) -> Result<Option<Mark>, OfferError> {
        let Ready::After(stream) = ready else { return Ok(None) };
        Mark::record(&self.export.memory, stream).map(Some).map_err(|why| OfferError::Stream { why })
    }

    /// Tells the table `event` when the marked work is done. Revokes the offer if it failed.
    fn when_done(self: &Arc<Self>, mark: Option<Mark>, offer: OfferId, event: table::In) {
        let Some(mark) = mark else { return };
        let core = Arc::downgrade(self);
        mark.then(move |done| {
            let Some(core) = core.upgrade() else { return };
            core.tell(match done {
                Ok(()) => event,
                Err(error) => {
                    tracing::error!(%offer, %error, "the work that fills an offer's blocks failed: it is revoked");
                    table::In::Revoke(offer)
                }
            });
            if Arc::strong_count(&core) == 1 {
                // The producer was dropped meanwhile, and this thread must not wait for its servers.
                std::thread::spawn(move || drop(core));
            }
        });
    }

    /// Tells the table of an event. `false`: it shows a wrong token.
    pub(super) fn tell(&self, event: table::In) -> bool {
        self.tell_locked(&mut self.lock(), event)
    }

    fn tell_locked(&self, state: &mut State, event: table::In) -> bool {
        let (before, wrong) = (state.table.next_timeout(), state.table.wrong_tokens());
        state.table.handle(Instant::now(), event);
        self.carry_out(state);
        if state.table.next_timeout() != before {
            self.rearm.notify_one();
        }
        state.table.wrong_tokens() == wrong
    }

    /// Ends the leases that have run out by `now`; returns the table's next timeout.
    pub(super) fn tick(&self, now: Instant) -> Option<Instant> {
        let mut state = self.lock();
        state.table.tick(now);
        self.carry_out(&mut state);
        state.table.next_timeout()
    }

    /// Carries out the table's actions.
    fn carry_out(&self, state: &mut State) {
        let mut freed = 0;
        while let Some(out) = state.table.poll() {
            match out {
                table::Out::Publish { contents, slot, nonce, .. } => {
                    self.export.publish(slot, nonce, contents);
                    self.rearm.notify_one();
                }
                table::Out::Withdraw { slot, .. } => self.export.withdraw(slot),
                table::Out::Freed(f) => {
                    if !matches!(f.why, Gone::Released)
                        && let Some(unlogged) = self.unreleased.is_news(Instant::now(), f.why)
                    {
                        tracing::warn!(
                            offer = %f.offer, why = f.why.as_str(), unlogged,
                            "offer ended without a release; its blocks are freed"
                        );
                    }
                    self.metrics.freed(f.why);
                    self.freed.lock().push_back(f);
                    freed += 1;
                }
                table::Out::Send(to, frame) => {
                    let session = state.by_consumer.get(&to).and_then(|id| state.sessions.get_mut(id));
                    if let Some(s) = session {
                        s.granted |= matches!(frame.body, Some(ServerBody::Granted { .. }));
                        s.outbox.send(frame);
                    }
                }
                table::Out::Broadcast(frame) => {
                    for s in state.sessions.values() {
                        s.outbox.send(frame.clone());
                    }
                }
            }
        }
        let wrong = state.table.wrong_tokens();
        self.metrics.wrong_tokens.inc_by(wrong - std::mem::replace(&mut state.wrong_tokens, wrong));
        while let Some((consumer, claims)) = state.table.poll_claims() {
            state.shares.holds(consumer, claims);
        }
        self.metrics.live.set(state.table.live() as i64);
        self.metrics.claims.set(state.table.claims() as i64);
        if freed > 0 {
            self.freed_now.notify_all();
            self.freed_notify.notify_waiters();
        }
    }

    /// The open session of a consumer.
    fn session<'a>(&self, state: &'a mut State, from: &PeerId) -> Result<&'a mut Session, Refusal> {
        let id = state.by_consumer.get(&from.incarnation).copied();
        id.and_then(|id| state.sessions.get_mut(&id)).filter(|s| s.from == *from).ok_or_else(|| {
            Refusal::Precondition("no session of this consumer is open: open one before requesting a lane".into())
        })
    }

    /// Checks that a peer may have one more claim. A resent claim does not count.
    fn check_claims(&self, state: &State, from: Incarnation, claim: ClaimId) -> Result<(), Refusal> {
        let limit = self.config.limits.claims_per_peer;
        match state.shares.of(from) {
            Some((peer, held)) if held >= limit && !state.table.holds(from, claim) => {
                let peer = peer.clone();
                Err(Refusal::Share { what: "claims", peer, limit, setting: "limits.claims_per_peer" })
            }
            _ => Ok(()),
        }
    }

    /// Checks that a consumer may have one more lane. Returns the place of the lane that must close for it, if any. Changes
    /// nothing.
    fn room(&self, state: &mut State, from: &PeerId, kind: LaneKind) -> Result<Option<usize>, Refusal> {
        let (lanes, limit) = (state.lanes, self.config.limits.lanes);
        let share = self.config.limits.lanes_per_peer;
        let session = self.session(state, from)?;
        session.may_have(kind)?;
        let oldest = superfluous(&session.lanes, kind);
        let peer = session.by.clone();
        if oldest.is_none() && state.lanes_by_peer.of(&peer) >= share {
            return Err(Refusal::Share { what: "lanes", peer, limit: share, setting: "limits.lanes_per_peer" });
        }
        if oldest.is_none() && lanes >= limit {
            return Err(Refusal::Limit { what: "lanes", limit });
        }
        Ok(oldest)
    }

    /// Enters a lane in the place that [`Core::room`] found under the same lock, and closes the lane that was there.
    fn keep(
        &self,
        mut state: MutexGuard<'_, State>,
        from: &PeerId,
        lane: (LaneKind, u64),
        oldest: Option<usize>,
    ) -> Result<(), Refusal> {
        let session = self.session(&mut state, from)?;
        let closed = oldest.and_then(|i| session.lanes.remove(i));
        session.lanes.push_back(lane);
        let by = session.by.clone();
        if closed.is_none() {
            state.lanes += 1;
            state.lanes_by_peer.add(&by);
        }
        drop(state);
        if let Some(closed) = closed {
            self.servers.dismiss(closed);
        }
        Ok(())
    }

    /// Begins to make a verbs lane: checks the limits before queue pairs are created. One at a time for each peer, so that
    /// requests in parallel create no more queue pairs than its share.
    #[cfg(feature = "verbs")]
    fn connecting(&self, from: &PeerId, by: &PeerKey) -> Result<Connecting<'_>, Refusal> {
        let mut state = self.lock();
        self.room(&mut state, from, LaneKind::Verbs)?;
        if !state.connecting.insert(by.clone()) {
            return Err(Refusal::NotYet("another verbs lane of this peer is being made".into()));
        }
        Ok(Connecting { core: self, by: by.clone() })
    }

    fn expects_me(&self, expect: Incarnation) -> Result<(), Refusal> {
        if expect == self.me.incarnation {
            return Ok(());
        }
        Err(Refusal::OtherIncarnation { here: self.me.incarnation, expected: expect })
    }
}

/// A verbs lane that is being made. See [`Core::connecting`].
#[cfg(feature = "verbs")]
struct Connecting<'a> {
    core: &'a Core,
    by: PeerKey,
}

#[cfg(feature = "verbs")]
impl Drop for Connecting<'_> {
    fn drop(&mut self) {
        self.core.lock().connecting.remove(&self.by);
    }
}

impl Desk for Core {
    fn hello(&self, hello: &Hello, _: &PeerKey) -> Result<Welcome, Mismatch> {
        let version = hello::answer(hello, &self.model)?;
        Ok(Welcome {
            version,
            features: hello.features & hello::features::ALL,
            peer: self.me.clone(),
            engine_incarnation: self.me.incarnation,
            model: self.model.clone(),
            shard: self.shard,
            pool: self.export.layout.clone(),
            fence_slots: self.config.limits.offers as u32,
            lanes: self.servers.kinds(),
            host: host::identity().to_owned(),
            silence: self.config.session.silence,
            gpu_uuid: match self.export.memory.place() {
                Place::Gpu { uuid, .. } => Some(uuid),
                Place::Host => None,
            },
        })
    }

    fn open(&self, from: &PeerId, expect: Incarnation, outbox: Outbox, by: &PeerKey) -> Result<SessionId, Refusal> {
        self.expects_me(expect)?;
        let mut state = self.lock();
        if state.sessions.len() >= self.config.limits.sessions {
            return Err(Refusal::Limit { what: "sessions", limit: self.config.limits.sessions });
        }
        self.metrics.sessions.inc();
        let id = SessionId(state.next_session);
        state.next_session += 1;
        state.by_consumer.insert(from.incarnation, id);
        state.shares.opened(from.incarnation, by);
        state
            .sessions
            .insert(id, Session { from: from.clone(), by: by.clone(), outbox, lanes: VecDeque::new(), granted: false });
        Ok(id)
    }

    fn frame(&self, session: SessionId, from: &PeerId, frame: ClientFrame, _: &PeerKey) -> Result<(), Refusal> {
        // One lock for the check and the claim: frames in parallel get no more than the share.
        let mut state = self.lock();
        if let ClientBody::Claim { claim, .. } = frame.body
            && let Err(refusal) = self.check_claims(&state, from.incarnation, claim)
        {
            if let Some(s) = state.sessions.get(&session) {
                s.outbox.send(ServerFrame { ack: 0, body: Some(ServerBody::Gone { claim, why: Gone::Limit }) });
            }
            return Err(refusal);
        }
        // The table has answered a wrong token.
        match self.tell_locked(&mut state, table::In::Frame(from.clone(), frame)) {
            true => Ok(()),
            false => Err(Refusal::Token),
        }
    }

    fn closed(&self, session: SessionId, _: &PeerId) {
        let gone = {
            let mut state = self.lock();
            let gone = state.sessions.remove(&session);
            if let Some(s) = &gone {
                self.metrics.sessions.dec();
                state.lanes -= s.lanes.len();
                if state.by_consumer.get(&s.from.incarnation) == Some(&session) {
                    state.by_consumer.remove(&s.from.incarnation);
                }
                state.lanes_by_peer.remove(&s.by, s.lanes.len());
                if state.shares.closed(s.from.incarnation) {
                    self.tell_locked(&mut state, table::In::Closed(s.from.incarnation));
                }
            }
            gone
        };
        for lane in gone.into_iter().flat_map(|s| s.lanes) {
            self.servers.dismiss(lane);
        }
    }

    fn connect_lane(
        &self,
        from: &PeerId,
        expect: Incarnation,
        kind: LaneKind,
        _: &PeerKey,
    ) -> Result<LaneTicket, Refusal> {
        self.expects_me(expect)?;
        // A verbs lane needs `connect_verbs`.
        if kind == LaneKind::Verbs || !self.servers.kinds().contains(&kind) {
            return Err(Refusal::Unsupported { what: format!("lane {kind} by this request") });
        }
        let lane = Incarnation::random().get();
        let mut key = [0; 32];
        getrandom::fill(&mut key).map_err(|_| Refusal::Precondition("the system's random source failed".into()))?;
        let mut state = self.lock();
        let oldest = self.room(&mut state, from, kind)?;
        let ticket = match (kind, &self.servers.tcp, &self.servers.local) {
            (LaneKind::Tcp, Some(server), _) => {
                server.admit(lane, key);
                LaneTicket::Tcp { host: None, port: server.addr().port(), lane, key }
            }
            (LaneKind::Local, _, Some(server)) => {
                server.admit(lane, key);
                LaneTicket::Local { uds: server.name(), lane, key }
            }
            _ => return Err(Refusal::Unsupported { what: format!("lane {kind}") }),
        };
        self.keep(state, from, (kind, lane), oldest)?;
        Ok(ticket)
    }

    #[cfg(feature = "verbs")]
    fn connect_verbs(
        &self,
        from: &PeerId,
        expect: Incarnation,
        ends: &VerbsRequest,
        by: &PeerKey,
    ) -> Result<LaneTicket, Refusal> {
        self.expects_me(expect)?;
        let Some(server) = &self.servers.verbs else {
            return Err(Refusal::Unsupported { what: format!("lane {}", LaneKind::Verbs) });
        };
        let _alone = self.connecting(from, by)?;
        let lane = Incarnation::random().get();
        let ticket = server.admit(lane, ends).map_err(|e| match e {
            VerbsError::NotYet { .. } => Refusal::NotYet(e.to_string()),
            e => Refusal::Precondition(e.to_string()),
        })?;
        // Again: the session may have ended meanwhile, or lanes of other kinds may have taken the share.
        let kept = {
            let mut state = self.lock();
            let room = self.room(&mut state, from, LaneKind::Verbs);
            room.and_then(|oldest| self.keep(state, from, (LaneKind::Verbs, lane), oldest))
        };
        kept.inspect_err(|_| server.dismiss(lane))?;
        Ok(LaneTicket::Verbs(ticket))
    }

    fn release(
        &self,
        from: Option<PeerId>,
        (offer, token): (OfferId, Token),
        expect: Option<Incarnation>,
        _: &PeerKey,
    ) -> Result<bool, Refusal> {
        if let Some(expect) = expect {
            self.expects_me(expect)?;
        }
        let shown = self.lock().table.shows(offer, token);
        // The table counts a wrong token.
        self.tell(table::In::Release(from, offer, token));
        match shown {
            None => Ok(false),
            Some(false) => Err(Refusal::Token),
            Some(true) => Ok(self.lock().table.shows(offer, token).is_none()),
        }
    }
}

/// Ends leases when they run out.
pub(super) async fn keep_time(core: Weak<Core>, rearm: Arc<Notify>) {
    loop {
        let next = {
            let Some(core) = core.upgrade() else { return };
            core.tick(Instant::now())
        };
        // Without leases it wakes once an hour, or when notified.
        let until = next.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600));
        tokio::select! {
            () = tokio::time::sleep_until(until.into()) => {}
            () = rearm.notified() => {}
        }
    }
}

#[cfg(test)]
mod tests;
