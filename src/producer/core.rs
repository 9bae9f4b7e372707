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

use super::spec::{OfferSpec, Ready};

#[cfg(feature = "verbs")]
use crate::lane::verbs::{self, VerbsError, VerbsRequest};
use crate::{
    config::Config,
    control::{
        desk::{Desk, SessionId},
        host,
        outbox::Outbox,
        peer::PeerKey,
        refusal::Refusal,
    },
    lane::{local, tcp, ticket::LaneTicket},
    memory::Export,
    metrics::ProducerMetrics,
};
use kvferry_proto::{
    BadOffer, ClaimId, ClientBody, ClientFrame, Contents, Gone, Incarnation, LaneKind, Machine, Mismatch, Model, Offer,
    OfferError, OfferGroup, OfferId, OfferRank, PeerId, ServerBody, ServerFrame, Shard, Token,
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
    /// The sessions of each peer.
    by_peer: HashMap<PeerKey, Vec<SessionId>>,
    /// Lanes of all sessions.
    lanes: usize,
    next_session: u64,
}

impl State {
    fn of_peer(&self, peer: &PeerKey) -> impl Iterator<Item = &Session> {
        self.by_peer.get(peer).into_iter().flatten().filter_map(|id| self.sessions.get(id))
    }
}

/// Most lanes of one session and kind. A consumer starts pulls on the newest; older lanes finish their pulls. A consumer
/// that searches for a better lane opens its eighth after four minutes, when no pull uses the first any more.
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
            by_peer: HashMap::new(),
            lanes: 0,
            next_session: 1,
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
            metrics: ProducerMetrics::default(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
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

    pub(super) fn enter(&self, name: &Offer, groups: Vec<OfferGroup>, ready: Ready) -> Result<(), OfferError> {
        name.check()?;
        let contents = Contents::of(name, groups);
        contents.check(self.config.limits.blocks_per_offer)?;
        for g in &contents.groups {
            let blocks = self.export.layout.group(g.group).map_or(0, |l| l.blocks);
            if let Some(b) = g.blocks.iter().flatten().find(|b| b.0 >= blocks) {
                let (block, group) = (b.0, g.group.0);
                return Err(BadOffer::Malformed(format!(
                    "block {block} of group {group} is not in this rank's pool, which has {blocks}"
                ))
                .into());
            }
        }
        let mut state = self.lock();
        let secret = (name.id, name.token);
        let entered = state.table.offer(Instant::now(), secret, Arc::new(contents), ready == Ready::Now);
        if entered.is_ok() {
            state.table.numbered(Instant::now(), name.number);
            self.metrics.offers.inc();
        }
        self.carry_out(&mut state);
        entered
    }

    /// Tells the table of an event. `false`: it shows a wrong token.
    pub(super) fn tell(&self, event: table::In) -> bool {
        let mut state = self.lock();
        let (before, wrong) = (state.table.next_timeout(), state.table.wrong_tokens());
        state.table.handle(Instant::now(), event);
        self.carry_out(&mut state);
        if state.table.next_timeout() != before {
            self.rearm.notify_one();
        }
        let wrong = state.table.wrong_tokens() - wrong;
        self.metrics.wrong_tokens.inc_by(wrong);
        wrong == 0
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
                    if !matches!(f.why, Gone::Released) {
                        tracing::warn!(offer = %f.offer, why = ?f.why, "offer ended without a release; its blocks are freed");
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
    fn check_claims(&self, from: Incarnation, claim: ClaimId, by: &PeerKey) -> Result<(), Refusal> {
        let limit = self.config.limits.claims_per_peer;
        let state = self.lock();
        let held: usize = state.of_peer(by).map(|s| state.table.claims_of(s.from.incarnation)).sum();
        if held < limit || state.table.holds(from, claim) {
            return Ok(());
        }
        Err(Refusal::Share { what: "claims", peer: by.clone(), limit, setting: "limits.claims_per_peer" })
    }

    /// Checks that a consumer may have one more lane. Returns the lane that must close for it, if any.
    fn room(
        &self,
        state: &mut State,
        from: &PeerId,
        kind: LaneKind,
        by: &PeerKey,
    ) -> Result<Option<(LaneKind, u64)>, Refusal> {
        let (lanes, limit) = (state.lanes, self.config.limits.lanes);
        let share = self.config.limits.lanes_per_peer;
        let of_peer: usize = state.of_peer(by).map(|s| s.lanes.len()).sum();
        let session = self.session(state, from)?;
        session.may_have(kind)?;
        let oldest = superfluous(&session.lanes, kind).and_then(|i| session.lanes.remove(i));
        if oldest.is_none() && of_peer >= share {
            let (peer, setting) = (by.clone(), "limits.lanes_per_peer");
            return Err(Refusal::Share { what: "lanes", peer, limit: share, setting });
        }
        if oldest.is_none() && lanes >= limit {
            return Err(Refusal::Limit { what: "lanes", limit });
        }
        Ok(oldest)
    }

    /// Enters a lane after [`Core::room`].
    fn keep(
        &self,
        mut state: MutexGuard<'_, State>,
        from: &PeerId,
        lane: (LaneKind, u64),
        oldest: Option<(LaneKind, u64)>,
    ) {
        if let Ok(session) = self.session(&mut state, from) {
            session.lanes.push_back(lane);
        }
        if oldest.is_none() {
            state.lanes += 1;
        }
        drop(state);
        if let Some(oldest) = oldest {
            self.servers.dismiss(oldest);
        }
    }

    fn expects_me(&self, expect: Incarnation) -> Result<(), Refusal> {
        if expect == self.me.incarnation {
            return Ok(());
        }
        Err(Refusal::OtherIncarnation { here: self.me.incarnation, expected: expect })
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
        state.by_peer.entry(by.clone()).or_default().push(id);
        state
            .sessions
            .insert(id, Session { from: from.clone(), by: by.clone(), outbox, lanes: VecDeque::new(), granted: false });
        Ok(id)
    }

    fn frame(&self, session: SessionId, from: &PeerId, frame: ClientFrame, by: &PeerKey) -> Result<(), Refusal> {
        if let ClientBody::Claim { claim, .. } = frame.body
            && let Err(refusal) = self.check_claims(from.incarnation, claim, by)
        {
            if let Some(s) = self.lock().sessions.get(&session) {
                s.outbox.send(ServerFrame { ack: 0, body: Some(ServerBody::Gone { claim, why: Gone::Limit }) });
            }
            return Err(refusal);
        }
        // The table has answered a wrong token.
        if self.tell(table::In::Frame(from.clone(), frame)) { Ok(()) } else { Err(Refusal::Token) }
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
                if let Some(ids) = state.by_peer.get_mut(&s.by) {
                    ids.retain(|id| *id != session);
                    if ids.is_empty() {
                        state.by_peer.remove(&s.by);
                    }
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
        by: &PeerKey,
    ) -> Result<LaneTicket, Refusal> {
        self.expects_me(expect)?;
        // Before `room`: a refused request must not close another lane. A verbs lane needs `connect_verbs`.
        if kind == LaneKind::Verbs || !self.servers.kinds().contains(&kind) {
            return Err(Refusal::Unsupported { what: format!("lane {kind} by this request") });
        }
        let mut state = self.lock();
        let oldest = self.room(&mut state, from, kind, by)?;
        let lane = Incarnation::random().get();
        let mut key = [0; 32];
        getrandom::fill(&mut key).map_err(|_| Refusal::Precondition("the system's random source failed".into()))?;
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
        self.keep(state, from, (kind, lane), oldest);
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
        // Checked before queue pairs are created, and again afterwards, since the session may have ended meanwhile.
        self.session(&mut self.lock(), from)?.may_have(LaneKind::Verbs)?;
        let lane = Incarnation::random().get();
        let ticket = server.admit(lane, ends).map_err(|e| match e {
            VerbsError::NotYet { .. } => Refusal::NotYet(e.to_string()),
            e => Refusal::Precondition(e.to_string()),
        })?;
        let mut state = self.lock();
        match self.room(&mut state, from, LaneKind::Verbs, by) {
            Ok(oldest) => {
                self.keep(state, from, (LaneKind::Verbs, lane), oldest);
                Ok(LaneTicket::Verbs(ticket))
            }
            Err(refusal) => {
                drop(state);
                server.dismiss(lane);
                Err(refusal)
            }
        }
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
mod tests {
    use super::*;

    #[test]
    fn a_lane_kind_that_is_requested_repeatedly_closes_only_lanes_of_its_own_kind() {
        let mut lanes = VecDeque::from([(LaneKind::Tcp, 0)]);
        for n in 1..=LANES_OF_A_KIND as u64 {
            assert_eq!(superfluous(&lanes, LaneKind::Verbs), None);
            lanes.push_back((LaneKind::Verbs, n));
        }
        assert_eq!(superfluous(&lanes, LaneKind::Verbs), Some(1), "the oldest of its own kind");
        assert_eq!(superfluous(&lanes, LaneKind::Tcp), None);
    }
}
