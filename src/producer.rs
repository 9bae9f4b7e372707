//! The producer: what a prefill engine's rank holds to offer blocks of its memory.
//!
//! [`Producer::offer`] names blocks that will stay put; the name goes through the router to the decode side. The engine
//! keeps the blocks as they are until [`Producer::poll_freed`] hands the offer back, which it does whatever the consumers
//! do: released, or revoked at the end of its lease.

use std::{
    collections::{HashMap, VecDeque},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use crate::{
    block::{BlockId, EngineId, Incarnation, OfferId, Rank},
    config::Config,
    control::{
        host,
        outbox::Outbox,
        server::{BenchDesk, Desk, Refusal, Server, SessionId},
        ticket::LaneTicket,
    },
    driver::runtime::Runtime,
    error::{OfferError, StartError},
    group::PoolLayout,
    lane::{LaneKind, local, tcp},
    memory::{Export, FenceWords, Memory},
    metrics::ProducerMetrics,
    model::{Mismatch, Model},
    offer::{BadOffer, Offer, OfferGroup, OfferRank},
    protocol::{
        Machine,
        frame::{ClientFrame, Gone, PeerId},
        hello::{self, Hello, Welcome},
        offer::{self as books, OfferTable},
    },
    shard::Shard,
};

pub use crate::protocol::offer::Freed;

/// Blocks to offer.
#[derive(Debug, Clone, Default)]
pub struct OfferSpec {
    /// The id, if a scheduler has minted one already; else a new one.
    pub id: Option<OfferId>,
    /// The engine's request id, for logs.
    pub request: String,
    /// Tokens that the blocks hold. The last block may be partial.
    pub tokens: u64,
    /// The blocks, by group, ascending.
    pub groups: Vec<OfferGroup>,
}

/// When an offer's blocks can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    /// Now.
    Now,
    /// When [`Producer::ready`] says so: the blocks are still being written.
    Later,
}

/// How a producer is built.
pub struct Builder {
    engine: EngineId,
    rank: Rank,
    model: Model,
    shard: Shard,
    layout: PoolLayout,
    memory: Option<Memory>,
    listen: String,
    advertise: Option<String>,
    lanes: Vec<LaneKind>,
    bench: bool,
    config: Config,
}

impl Builder {
    /// Which rank of the engine this is, and its part of the model. By default the only one.
    pub fn rank(mut self, rank: Rank, shard: Shard) -> Self {
        (self.rank, self.shard) = (rank, shard);
        self
    }

    /// The engine's own memory. Without it, kvferry allocates what the layout needs, and consumers on this host map it.
    pub fn memory(mut self, memory: Memory) -> Self {
        self.memory = Some(memory);
        self
    }

    /// `HOST:PORT` of the control plane; port 0 takes a free one. By default `127.0.0.1:0`.
    pub fn listen(mut self, addr: impl Into<String>) -> Self {
        self.listen = addr.into();
        self
    }

    /// `HOST:PORT` that offers name, when it is not the one listened on.
    pub fn advertise(mut self, addr: impl Into<String>) -> Self {
        self.advertise = Some(addr.into());
        self
    }

    /// Which lanes it serves. By default all that this build has.
    pub fn lanes(mut self, lanes: Vec<LaneKind>) -> Self {
        self.lanes = lanes;
        self
    }

    /// Hands out offers of its own blocks to whoever asks: for `kvferry serve`, whose memory holds a pattern. Never for an
    /// engine, whose blocks are not free for the taking.
    pub fn bench(mut self) -> Self {
        self.bench = true;
        self
    }

    /// Other settings than the defaults.
    pub fn config(mut self, config: Config) -> Self {
        self.config = config;
        self
    }

    /// Starts the control plane, the data servers and their threads.
    pub fn build(self) -> Result<Producer, StartError> {
        self.layout.check()?;
        self.shard.check().map_err(|why| StartError::Config { field: "shard", why: why.into() })?;
        self.config.check()?;
        let os = |what| move |source| StartError::Os { what, source };
        let listener = listen(&self.listen)?;
        let bound = listener.local_addr().map_err(os("cannot read the listening address"))?;
        let memory = match self.memory {
            Some(m) => m,
            None => {
                let memory = Memory::alloc(&self.layout.segments)?;
                memory.touch()?;
                memory
            }
        };
        memory.check(&self.layout)?;
        // When a process dies, the kernel closes the file that was opened last first, and freeing a pool of a gigabyte takes
        // it 0.2 s. With the sockets opened after the pool, peers hear of the death before that and not after. The port was
        // taken early, so that a port in use costs no memory; here its socket gets a later number.
        let listener = listener.try_clone().map_err(os("cannot duplicate the listening socket"))?;
        let words = FenceWords::new(self.config.limits.offers as u32).map_err(os("cannot allocate the fence table"))?;
        let layout = Arc::new(self.layout);
        let export = Arc::new(Export::new(layout.clone(), memory.clone(), Arc::new(words)));
        let me = PeerId { engine: self.engine, rank: self.rank, incarnation: Incarnation::random() };
        let runtime = Runtime::start("kvferry-control").map_err(os("cannot start the control thread"))?;
        let limits = &self.config.limits;
        let tcp = if self.lanes.contains(&LaneKind::Tcp) {
            let any = SocketAddr::new(bound.ip(), 0);
            Some(
                tcp::Server::start(any, export.clone(), me.incarnation, limits)
                    .map_err(os("cannot start the tcp lane"))?,
            )
        } else {
            None
        };
        let local = if self.lanes.contains(&LaneKind::Local) {
            let server = local::Server::start(export.clone(), me.incarnation, runtime.handle().clone(), limits);
            Some(server.map_err(os("cannot start the local lane"))?)
        } else {
            None
        };
        let random = Box::new(|| Incarnation::random().get());
        let table = OfferTable::new(self.config.lease.clone(), self.config.limits.clone(), random);
        let addr = self.advertise.unwrap_or_else(|| advertised(bound));
        let core = Arc::new(Core {
            me,
            addr,
            model: self.model,
            shard: self.shard,
            layout,
            export,
            memory,
            tcp,
            local,
            config: self.config,
            state: Mutex::new(State {
                table,
                groups: HashMap::new(),
                sessions: HashMap::new(),
                by_consumer: HashMap::new(),
                lanes: 0,
                next_session: 1,
            }),
            freed: Mutex::new(VecDeque::new()),
            freed_now: Condvar::new(),
            freed_notify: Notify::new(),
            rearm: Arc::new(Notify::new()),
            metrics: ProducerMetrics::default(),
        });
        runtime.handle().spawn(keep_time(Arc::downgrade(&core), core.rearm.clone()));
        let bench = self.bench.then(|| core.clone() as Arc<dyn BenchDesk>);
        let server = Server::start(runtime.handle(), listener, core.clone(), &core.config, bench)?;
        Ok(Producer { core, server: Some(server), _runtime: runtime })
    }
}

/// Binds `HOST:PORT`.
fn listen(addr: &str) -> Result<TcpListener, StartError> {
    let listener = TcpListener::bind(addr).map_err(|source| StartError::Listen { addr: addr.into(), source })?;
    listener.set_nonblocking(true).map_err(|source| StartError::Listen { addr: addr.into(), source })?;
    Ok(listener)
}

/// What others can reach a bound address at. An address of no host in particular is this host's loopback: whoever listens
/// on all of them for others says with `advertise` which one they should use.
fn advertised(bound: SocketAddr) -> String {
    let ip = match bound.ip() {
        ip if !ip.is_unspecified() => ip,
        _ => IpAddr::V4(Ipv4Addr::LOCALHOST),
    };
    SocketAddr::new(ip, bound.port()).to_string()
}

/// A prefill engine's rank, offering.
pub struct Producer {
    core: Arc<Core>,
    server: Option<Server>,
    _runtime: Runtime,
}

impl Producer {
    /// Starts building a producer: the engine, what its KV means, and how its memory is laid out.
    pub fn builder(engine: EngineId, model: Model, layout: PoolLayout) -> Builder {
        Builder {
            engine,
            rank: Rank(0),
            model,
            shard: Shard::whole(1, 1),
            layout,
            memory: None,
            listen: "127.0.0.1:0".into(),
            advertise: None,
            lanes: vec![LaneKind::Local, LaneKind::Tcp],
            bench: false,
            config: Config::default(),
        }
    }

    /// Who this is.
    pub fn me(&self) -> &PeerId {
        &self.core.me
    }

    /// `HOST:PORT` of its control plane, as offers name it.
    pub fn addr(&self) -> &str {
        &self.core.addr
    }

    /// The memory that is offered.
    pub fn memory(&self) -> &Memory {
        &self.core.memory
    }

    /// How it is laid out.
    pub fn layout(&self) -> &Arc<PoolLayout> {
        &self.core.layout
    }

    /// Offers blocks of an engine of one rank. They must stay as they are until the offer is freed.
    pub fn offer(&self, spec: OfferSpec, ready: Ready) -> Result<Offer, OfferError> {
        let offer = self.core.name(spec);
        self.core.enter(&offer, ready)?;
        Ok(offer)
    }

    /// Enters an offer that was named elsewhere, such as by the engine's scheduler for all of its ranks. Claims that came
    /// before it are granted from now on.
    pub fn enter(&self, offer: &Offer, ready: Ready) -> Result<(), OfferError> {
        self.core.enter(offer, ready)
    }

    /// The work that fills the offer's blocks is done: it can be claimed.
    pub fn ready(&self, offer: OfferId) {
        self.core.tell(books::In::Ready(offer));
    }

    /// Takes an offer back, claimed or not. Its blocks are freed with the next [`Producer::poll_freed`]; whoever reads them
    /// now will not count them.
    pub fn revoke(&self, offer: OfferId) {
        self.core.tell(books::In::Revoke(offer));
    }

    /// Makes no new offers. Those that are live can still be claimed and pulled.
    pub fn drain(&self) {
        self.core.tell(books::In::Drain);
    }

    /// The next offer whose blocks may be used again, if there is one. Call it once an engine step; it never blocks, and
    /// sees every lease that has run out by now.
    pub fn poll_freed(&self) -> Option<Freed> {
        if let Some(f) = lock(&self.core.freed).pop_front() {
            return Some(f);
        }
        let mut state = self.core.lock();
        state.table.tick(Instant::now());
        self.core.carry_out(&mut state);
        drop(state);
        lock(&self.core.freed).pop_front()
    }

    /// Waits for the next freed offer, for `timeout` at most.
    pub fn wait_freed(&self, timeout: Duration) -> Option<Freed> {
        let freed = lock(&self.core.freed);
        let waited = self.core.freed_now.wait_timeout_while(freed, timeout, |f| f.is_empty());
        waited.unwrap_or_else(PoisonError::into_inner).0.pop_front()
    }

    /// The next freed offer, for async code.
    pub async fn freed(&self) -> Freed {
        loop {
            let notified = self.core.freed_notify.notified();
            if let Some(f) = self.poll_freed() {
                return f;
            }
            notified.await;
        }
    }

    /// Live offers, and claims on them.
    pub fn live(&self) -> (usize, usize) {
        let state = self.core.lock();
        (state.table.live(), state.table.claims())
    }

    /// Its metrics, to register where the engine's are.
    pub fn metrics(&self) -> &ProducerMetrics {
        &self.core.metrics
    }

    /// Open sessions.
    pub fn sessions(&self) -> usize {
        self.core.lock().sessions.len()
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        // Sessions first: nobody asks for a lane that is going away.
        drop(self.server.take());
    }
}

struct Core {
    me: PeerId,
    addr: String,
    model: Model,
    shard: Shard,
    layout: Arc<PoolLayout>,
    export: Arc<Export>,
    memory: Memory,
    tcp: Option<tcp::Server>,
    local: Option<local::Server>,
    config: Config,
    state: Mutex<State>,
    freed: Mutex<VecDeque<Freed>>,
    freed_now: Condvar,
    freed_notify: Notify,
    /// The books' next timeout may have changed.
    rearm: Arc<Notify>,
    metrics: ProducerMetrics,
}

struct State {
    table: OfferTable,
    /// The blocks of offers that are live.
    groups: HashMap<OfferId, Arc<[OfferGroup]>>,
    sessions: HashMap<SessionId, Session>,
    /// The newest session of each consumer incarnation.
    by_consumer: HashMap<Incarnation, SessionId>,
    /// Lanes of all sessions.
    lanes: usize,
    next_session: u64,
}

/// Lanes of one session.
const MAX_LANES: usize = 64;

struct Session {
    from: PeerId,
    outbox: Outbox,
    /// Oldest first.
    lanes: VecDeque<(LaneKind, u64)>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Core {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn name(&self, spec: OfferSpec) -> Offer {
        let rank = OfferRank { rank: self.me.rank, incarnation: self.me.incarnation, addr: self.addr.clone() };
        Offer {
            id: spec.id.unwrap_or_else(OfferId::random),
            engine: self.me.engine.clone(),
            incarnation: self.me.incarnation,
            ranks: vec![rank],
            groups: spec.groups,
            tokens: spec.tokens,
            request: spec.request,
        }
    }

    fn enter(&self, offer: &Offer, ready: Ready) -> Result<(), OfferError> {
        offer.check(self.config.limits.blocks_per_offer)?;
        for g in &offer.groups {
            let blocks = self.layout.group(g.group).map_or(0, |l| l.blocks);
            if let Some(b) = g.blocks.iter().flatten().find(|b| b.0 >= blocks) {
                let (block, group) = (b.0, g.group.0);
                return Err(BadOffer::Malformed(format!(
                    "block {block} of group {group} is not in this rank's pool, which has {blocks}"
                ))
                .into());
            }
        }
        let mut state = self.lock();
        // The books speak of it in the same breath, so its blocks must be there before.
        let known = state.groups.insert(offer.id, offer.groups.clone().into());
        let entered = state.table.offer(Instant::now(), offer.id, ready == Ready::Now);
        match (&entered, known) {
            (Err(_), Some(known)) => drop(state.groups.insert(offer.id, known)),
            (Err(_), None) => drop(state.groups.remove(&offer.id)),
            _ => {}
        }
        if entered.is_ok() {
            self.metrics.offers.inc();
        }
        self.carry_out(&mut state);
        entered
    }

    fn tell(&self, event: books::In) {
        let mut state = self.lock();
        let before = state.table.next_timeout();
        state.table.handle(Instant::now(), event);
        self.carry_out(&mut state);
        if state.table.next_timeout() != before {
            self.rearm.notify_one();
        }
    }

    /// Does what the books want. Holding their lock makes "word cleared, then freed" one step for everybody else.
    fn carry_out(&self, state: &mut State) {
        let mut freed = 0;
        while let Some(out) = state.table.poll() {
            match out {
                books::Out::Publish { offer, slot, nonce } => {
                    if let Some(groups) = state.groups.get(&offer) {
                        self.export.publish(slot, nonce, groups.clone());
                    }
                    self.rearm.notify_one();
                }
                books::Out::Withdraw { slot, .. } => self.export.withdraw(slot),
                books::Out::Freed(f) => {
                    state.groups.remove(&f.offer);
                    if !matches!(f.why, Gone::Released) {
                        tracing::warn!(offer = %f.offer, why = ?f.why, "offer ended without a release; its blocks are freed");
                    }
                    self.metrics.freed(f.why);
                    lock(&self.freed).push_back(f);
                    freed += 1;
                }
                books::Out::Send(to, frame) => {
                    let session = state.by_consumer.get(&to).and_then(|id| state.sessions.get(id));
                    if let Some(s) = session {
                        s.outbox.send(frame);
                    }
                }
                books::Out::Broadcast(frame) => {
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

    fn dismiss(&self, (kind, lane): (LaneKind, u64)) {
        match kind {
            LaneKind::Tcp => self.tcp.iter().for_each(|s| s.dismiss(lane)),
            LaneKind::Local => self.local.iter().for_each(|s| s.dismiss(lane)),
            _ => {}
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
    fn hello(&self, hello: &Hello) -> Result<Welcome, Mismatch> {
        let version = hello::answer(hello, &self.model)?;
        let mut lanes = Vec::new();
        if self.local.is_some() {
            lanes.push(LaneKind::Local);
        }
        if self.tcp.is_some() {
            lanes.push(LaneKind::Tcp);
        }
        Ok(Welcome {
            version,
            features: hello.features & hello::features::ALL,
            peer: self.me.clone(),
            engine_incarnation: self.me.incarnation,
            model: self.model.clone(),
            shard: self.shard,
            pool: self.layout.clone(),
            fence_slots: self.config.limits.offers as u32,
            lanes,
            host: host::identity().to_owned(),
            silence: self.config.session.silence,
        })
    }

    fn open(&self, from: &PeerId, expect: Incarnation, outbox: Outbox) -> Result<SessionId, Refusal> {
        self.expects_me(expect)?;
        let mut state = self.lock();
        if state.sessions.len() >= self.config.limits.sessions {
            return Err(Refusal::Limit { what: "sessions", limit: self.config.limits.sessions });
        }
        self.metrics.sessions.inc();
        let id = SessionId(state.next_session);
        state.next_session += 1;
        state.by_consumer.insert(from.incarnation, id);
        state.sessions.insert(id, Session { from: from.clone(), outbox, lanes: VecDeque::new() });
        Ok(id)
    }

    fn frame(&self, _: SessionId, from: &PeerId, frame: ClientFrame) {
        self.tell(books::In::Frame(from.clone(), frame));
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
            }
            gone
        };
        for lane in gone.into_iter().flat_map(|s| s.lanes) {
            self.dismiss(lane);
        }
    }

    fn connect_lane(&self, from: &PeerId, expect: Incarnation, kind: LaneKind) -> Result<LaneTicket, Refusal> {
        self.expects_me(expect)?;
        let mut state = self.lock();
        let (lanes, limit) = (state.lanes, self.config.limits.lanes);
        let id = state.by_consumer.get(&from.incarnation).copied();
        let Some(session) = id.and_then(|id| state.sessions.get_mut(&id)).filter(|s| s.from == *from) else {
            return Err(Refusal::Precondition(
                "no session of this consumer is open: open one before asking for a lane".into(),
            ));
        };
        // A consumer rank needs a few lanes at a time. One that goes through many has lost the old ones.
        let oldest = if session.lanes.len() >= MAX_LANES { session.lanes.pop_front() } else { None };
        if oldest.is_none() && lanes >= limit {
            return Err(Refusal::Limit { what: "lanes", limit });
        }
        let lane = Incarnation::random().get();
        let ticket = match (kind, &self.tcp, &self.local) {
            (LaneKind::Tcp, Some(server), _) => {
                let mut key = [0; 32];
                for part in key.chunks_exact_mut(8) {
                    part.copy_from_slice(&Incarnation::random().get().to_le_bytes());
                }
                server.admit(lane, key);
                LaneTicket::Tcp { host: None, port: server.addr().port(), lane, key }
            }
            (LaneKind::Local, _, Some(server)) => {
                server.admit(lane);
                LaneTicket::Local { uds: server.name(), lane }
            }
            _ => return Err(Refusal::Unsupported { what: format!("lane {kind}") }),
        };
        session.lanes.push_back((kind, lane));
        if oldest.is_none() {
            state.lanes += 1;
        }
        drop(state);
        if let Some(oldest) = oldest {
            self.dismiss(oldest);
        }
        Ok(ticket)
    }

    fn release(&self, from: Option<PeerId>, offer: OfferId, expect: Option<Incarnation>) -> Result<bool, Refusal> {
        if let Some(expect) = expect {
            self.expects_me(expect)?;
        }
        let before = self.lock().groups.contains_key(&offer);
        self.tell(books::In::Release(from, offer));
        Ok(before && !self.lock().groups.contains_key(&offer))
    }
}

impl BenchDesk for Core {
    /// Offers `blocks` blocks of the group whose blocks have `block_bytes` bytes (0: the first group), in pool order or
    /// scattered over the pool. The pattern's seed is this rank's incarnation: a restart fills memory anew.
    fn make_offer(&self, blocks: u32, scattered: bool, block_bytes: u32) -> Result<(Offer, u64), String> {
        let group = match block_bytes {
            0 => self.layout.groups.first(),
            b => self.layout.groups.iter().find(|g| g.block_bytes() == u64::from(b)),
        };
        let group = group.ok_or_else(|| format!("no group here has blocks of {block_bytes} bytes"))?;
        let count = if blocks == 0 { group.blocks } else { blocks };
        if count > group.blocks {
            return Err(format!(
                "{count} blocks asked for, but the pool has {}: ask for fewer, or serve more",
                group.blocks
            ));
        }
        let mut ids: Vec<u32> = (0..group.blocks).collect();
        if scattered {
            // Fisher-Yates with a small generator: any order does that is not the pool's.
            let mut x = OfferId::random().low;
            for i in (1..ids.len()).rev() {
                x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                ids.swap(i, ((x >> 33) % (i as u64 + 1)) as usize);
            }
        }
        let blocks = ids[..count as usize].iter().map(|b| Some(BlockId(*b))).collect();
        let spec = OfferSpec {
            id: None,
            request: "bench".into(),
            tokens: u64::from(count) * u64::from(group.block_tokens),
            groups: vec![OfferGroup { group: group.id, first_position: 0, blocks }],
        };
        let offer = self.name(spec);
        self.enter(&offer, Ready::Now).map_err(|e| e.to_string())?;
        Ok((offer, self.me.incarnation.get()))
    }
}

/// Has the books look at the clock when a lease may have run out.
async fn keep_time(core: Weak<Core>, rearm: Arc<Notify>) {
    loop {
        let next = {
            let Some(core) = core.upgrade() else { return };
            let mut state = core.lock();
            state.table.tick(Instant::now());
            core.carry_out(&mut state);
            state.table.next_timeout()
        };
        // Without leases it looks once an hour, and sooner when told to.
        let until = next.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600));
        tokio::select! {
            () = tokio::time::sleep_until(until.into()) => {}
            () = rearm.notified() => {}
        }
    }
}
