//! A server with a desk that writes down what it is asked, and a consumer whose events can be waited for.

use std::{
    collections::HashMap,
    net::{SocketAddr, TcpListener},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    time::{Duration, Instant},
};

use kvferry::{
    block::{Incarnation, Nonce, OfferId, Rank},
    config::Config,
    control::{
        client::{Connecting, LaneConnector, PeerHandle, PeerTask},
        outbox::Outbox,
        server::{BenchDesk, Desk, Refusal, Server, SessionId},
        ticket::LaneTicket,
    },
    driver::{
        rail::{Addr, In},
        runtime::Runtime,
    },
    error::Cause,
    group::PoolLayout,
    lane::{LaneError, LaneKind},
    model::{Mismatch, Model},
    offer::{Offer, OfferRank},
    protocol::{
        frame::{ClaimId, ClientBody, ClientFrame, PeerId, Reader, Release, ServerBody, ServerFrame},
        hello::{self, Hello, VERSIONS, Welcome, features},
        session::Want,
    },
    shard::Shard,
};

/// How long anything may take before a test gives up.
pub const LIMIT: Duration = Duration::from_secs(20);

pub fn model() -> Model {
    Model {
        name: "m".into(),
        dtype: "bfloat16".into(),
        scales: String::new(),
        attention: "HND".into(),
        block_tokens: 16,
    }
}

pub fn peer_id(engine: &str) -> PeerId {
    PeerId { engine: engine.parse().unwrap(), rank: Rank(0), incarnation: Incarnation::random() }
}

pub fn hello() -> Hello {
    Hello {
        versions: VERSIONS,
        features: features::ALL,
        peer: peer_id("decode-0"),
        model: model(),
        shard: Shard::whole(8, 4),
        host: "host-a".into(),
    }
}

/// Short times, so that what is waited for comes soon.
pub fn config() -> Config {
    let mut c = Config::default();
    c.session.heartbeat = Duration::from_millis(100);
    c.session.hello_timeout = Duration::from_secs(2);
    c.session.redial_min = Duration::from_millis(10);
    c.session.redial_max = Duration::from_millis(100);
    c
}

/// What the desk was asked.
#[derive(Debug)]
pub enum Seen {
    Hello,
    Opened(SessionId),
    Frame(SessionId, ClientFrame),
    Closed(SessionId),
}

/// Keeps no books: grants every claim at once, and acknowledges every release, unless told otherwise.
pub struct TestDesk {
    pub me: PeerId,
    pub grants: AtomicBool,
    pub acknowledges: AtomicBool,
    pub refuses_sessions: AtomicBool,
    pub lanes: Mutex<Vec<LaneKind>>,
    /// How often a lane is not to be had yet.
    pub not_yet: AtomicU64,
    pub outboxes: Mutex<HashMap<SessionId, Outbox>>,
    next: AtomicU64,
    seen: Mutex<Sender<Seen>>,
}

impl TestDesk {
    fn see(&self, seen: Seen) {
        let _ = self.seen.lock().unwrap().send(seen);
    }

    fn expects_me(&self, expected: Incarnation) -> Result<(), Refusal> {
        let here = self.me.incarnation;
        if here == expected { Ok(()) } else { Err(Refusal::OtherIncarnation { here, expected }) }
    }

    pub fn outbox(&self, session: SessionId) -> Outbox {
        self.outboxes.lock().unwrap()[&session].clone()
    }
}

impl Desk for TestDesk {
    fn hello(&self, hello: &Hello) -> Result<Welcome, Mismatch> {
        let version = hello::answer(hello, &model())?;
        self.see(Seen::Hello);
        Ok(Welcome {
            version,
            features: features::ALL,
            peer: self.me.clone(),
            engine_incarnation: self.me.incarnation,
            model: model(),
            shard: Shard::whole(8, 4),
            pool: Arc::new(PoolLayout::uniform(8, 2, 4096, 16)),
            fence_slots: 1024,
            lanes: self.lanes.lock().unwrap().clone(),
            host: "host-b".into(),
            silence: Duration::from_secs(60),
        })
    }

    fn open(&self, _: &PeerId, expect: Incarnation, outbox: Outbox) -> Result<SessionId, Refusal> {
        self.expects_me(expect)?;
        let id = SessionId(self.next.fetch_add(1, Ordering::SeqCst));
        if self.refuses_sessions.load(Ordering::SeqCst) {
            self.see(Seen::Opened(id));
            return Err(Refusal::Limit { what: "sessions", limit: 0 });
        }
        self.outboxes.lock().unwrap().insert(id, outbox);
        self.see(Seen::Opened(id));
        Ok(id)
    }

    fn frame(&self, session: SessionId, _: &PeerId, frame: ClientFrame) {
        let outbox = self.outbox(session);
        let reply = |ack, body| assert!(outbox.send(ServerFrame { ack, body }));
        match &frame.body {
            ClientBody::Ping(n) => reply(0, Some(ServerBody::Pong(*n))),
            ClientBody::Claim { claim, .. } if self.grants.load(Ordering::SeqCst) => {
                let remaining = Duration::from_secs(10);
                reply(0, Some(ServerBody::Granted { claim: *claim, slot: 7, nonce: Nonce::random(), remaining }));
            }
            ClientBody::Release(_) if self.acknowledges.load(Ordering::SeqCst) => reply(frame.seq, None),
            _ => {}
        }
        self.see(Seen::Frame(session, frame));
    }

    fn closed(&self, session: SessionId, _: &PeerId) {
        assert!(self.outboxes.lock().unwrap().remove(&session).is_some(), "closed twice, or never opened");
        self.see(Seen::Closed(session));
    }

    fn connect_lane(&self, _: &PeerId, expect: Incarnation, kind: LaneKind) -> Result<LaneTicket, Refusal> {
        self.expects_me(expect)?;
        let less = |n: u64| n.checked_sub(1);
        if self.not_yet.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok() {
            return Err(Refusal::NotYet("half of it is there".into()));
        }
        match kind {
            LaneKind::Tcp => Ok(LaneTicket::Tcp { host: None, port: 9, lane: 5, key: [3; 32] }),
            _ => Err(Refusal::Unsupported { what: format!("lane {kind}") }),
        }
    }

    fn release(&self, _: Option<PeerId>, _: OfferId, expect: Option<Incarnation>) -> Result<bool, Refusal> {
        expect.map_or(Ok(()), |e| self.expects_me(e))?;
        Ok(true)
    }
}

/// A bench service with one offer, whatever is asked for.
pub struct OneOffer(pub PeerId);

impl BenchDesk for OneOffer {
    fn make_offer(&self, blocks: u32, _: bool, _: u32) -> Result<(Offer, u64), String> {
        if blocks > 8 {
            return Err(format!("{blocks} blocks, where the pool has 8"));
        }
        let rank = OfferRank { rank: Rank(0), incarnation: self.0.incarnation, addr: "127.0.0.1:1".into() };
        let offer = Offer {
            id: OfferId::random(),
            engine: self.0.engine.clone(),
            incarnation: self.0.incarnation,
            ranks: vec![rank],
            groups: Vec::new(),
            tokens: 0,
            request: "bench".into(),
        };
        Ok((offer, 42))
    }
}

/// A producer that serves.
pub struct Rig {
    pub server: Server,
    pub desk: Arc<TestDesk>,
    pub seen: Receiver<Seen>,
    pub addr: SocketAddr,
    pub runtime: Runtime,
}

impl Rig {
    pub fn new(config: &Config) -> Self {
        Self::at("127.0.0.1:0".parse().unwrap(), config)
    }

    pub fn at(addr: SocketAddr, config: &Config) -> Self {
        let (tx, seen) = mpsc::channel();
        let desk = Arc::new(TestDesk {
            me: peer_id("prefill-0"),
            grants: true.into(),
            acknowledges: true.into(),
            refuses_sessions: false.into(),
            not_yet: 0.into(),
            lanes: Mutex::new(vec![LaneKind::Local, LaneKind::Tcp]),
            outboxes: Mutex::default(),
            next: 1.into(),
            seen: Mutex::new(tx),
        });
        let runtime = Runtime::start("test-server").unwrap();
        let listener = TcpListener::bind(addr).unwrap();
        let bench = Some(Arc::new(OneOffer(desk.me.clone())) as _);
        let server = Server::start(runtime.handle(), listener, desk.clone(), config, bench).unwrap();
        let addr = server.addr();
        Self { server, desk, seen, addr, runtime }
    }

    /// What the desk is asked next of which `pick` makes something.
    pub fn seen<T>(&self, mut pick: impl FnMut(Seen) -> Option<T>) -> T {
        let until = Instant::now() + LIMIT;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let seen = self.seen.recv_timeout(left).expect("the desk was not asked in time");
            if let Some(t) = pick(seen) {
                return t;
            }
        }
    }

    pub fn opened(&self) -> SessionId {
        self.seen(|s| match s {
            Seen::Opened(id) => Some(id),
            _ => None,
        })
    }

    pub fn closed(&self) -> SessionId {
        self.seen(|s| match s {
            Seen::Closed(id) => Some(id),
            _ => None,
        })
    }

    pub fn release(&self) -> (SessionId, u64, Release) {
        self.seen(|s| match s {
            Seen::Frame(id, ClientFrame { seq, body: ClientBody::Release(r) }) => Some((id, seq, r)),
            _ => None,
        })
    }

    /// The process is gone: nothing is said any more, and its sockets are closed by the system.
    pub fn die(self) {
        drop(self.runtime);
    }
}

/// Connects no lane, and says so.
pub struct NoLanes;

impl LaneConnector for NoLanes {
    fn connect(&self, ticket: LaneTicket, _: Arc<Welcome>, _: SocketAddr) -> Connecting<'_> {
        Box::pin(async move { Err(LaneError::Refused { why: format!("no {} lane in this test", ticket.kind()) }) })
    }
}

/// A consumer's task for one peer.
pub struct Consumer {
    pub handle: PeerHandle,
    pub events: Receiver<In>,
    pub addr: Addr,
    pub runtime: Runtime,
}

impl Consumer {
    pub fn new(addr: SocketAddr, config: Config) -> Self {
        Self::with(addr, config, hello(), Arc::new(NoLanes))
    }

    pub fn with(addr: SocketAddr, config: Config, me: Hello, connector: Arc<dyn LaneConnector>) -> Self {
        let (tx, events) = mpsc::channel();
        let tx = Mutex::new(tx);
        let sink = Arc::new(move |event| {
            let _ = tx.lock().unwrap().send(event);
        });
        let runtime = Runtime::start("test-consumer").unwrap();
        let addr: Addr = addr.to_string().into();
        let handle = PeerTask::spawn(runtime.handle(), addr.clone(), Arc::new(me), Arc::new(config), sink, connector);
        Self { handle, events, addr, runtime }
    }

    pub fn claim(&self, claim: u64, of: &PeerId) -> ClaimId {
        self.handle.claim(want(claim, of));
        ClaimId(claim)
    }

    /// The next event of which `pick` makes something.
    pub fn event<T>(&self, mut pick: impl FnMut(In) -> Option<T>) -> T {
        let until = Instant::now() + LIMIT;
        loop {
            match self.events.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(event) => {
                    if let Some(t) = pick(event) {
                        return t;
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("nothing came in time"),
                Err(RecvTimeoutError::Disconnected) => panic!("the task is gone"),
            }
        }
    }

    /// The next end of a question: granted, or lost and why.
    pub fn answer(&self) -> (ClaimId, Option<Cause>) {
        self.event(|e| match e {
            In::Granted(claim, grant) => {
                assert_eq!(grant.slot, 7);
                Some((claim, None))
            }
            In::Lost(claim, cause) => Some((claim, Some(cause))),
            _ => None,
        })
    }

    pub fn welcome(&self) -> Arc<Welcome> {
        self.event(|e| match e {
            In::Peer(addr, welcome) => {
                assert_eq!(addr, self.addr);
                Some(welcome)
            }
            _ => None,
        })
    }
}

pub fn want(claim: u64, of: &PeerId) -> Want {
    Want {
        claim: ClaimId(claim),
        offer: OfferId::random(),
        engine: of.engine.clone(),
        expect: of.incarnation,
        reader: Reader::ONLY,
    }
}

/// Runs a call to its end, within the limit.
pub fn run<T>(what: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(LIMIT, what).await.expect("not done in time") })
}
