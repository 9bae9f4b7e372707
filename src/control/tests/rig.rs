//! A server with a desk that records its calls, and a consumer whose events a test can wait for.

use std::{
    collections::{BTreeSet, HashMap},
    net::{SocketAddr, TcpListener},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    time::{Duration, Instant},
};

use kvferry_proto::{
    Cause, ClaimId, ClientBody, ClientFrame, Contents, Grant, Growth, Incarnation, LaneKind, Mismatch, Model, Nonce,
    OfferId, PeerId, PoolLayout, Rank, Reader, Release, ServerBody, ServerFrame, Shard, Token,
    hello::{self, Hello, VERSIONS, Welcome, features},
    puller::{Addr, In},
    session::Want,
};
use tonic::service::Routes;

use crate::{
    config::Config,
    control::{
        client::{PeerHandle, PeerTask},
        desk::{Desk, SessionId},
        events::{Connected, Events},
        lanes::{Connecting, LaneConnector, Prepared},
        outbox::Outbox,
        peer::PeerKey,
        refusal::Refusal,
        server::{Extra, Server},
    },
    driver::runtime::Runtime,
    lane::{LaneError, WakingLane, ticket::LaneTicket},
    tls::TlsIdentity,
};

/// Longest wait of a test.
pub(super) const LIMIT: Duration = Duration::from_secs(20);

pub(super) fn model() -> Model {
    Model {
        name: "m".into(),
        dtype: "bfloat16".into(),
        scales: String::new(),
        weights: String::new(),
        attention: "HND".into(),
        block_tokens: 16,
    }
}

pub(super) fn peer_id(engine: &str) -> PeerId {
    PeerId { engine: engine.parse().unwrap(), rank: Rank(0), incarnation: Incarnation::random() }
}

pub(super) fn hello() -> Hello {
    Hello {
        versions: VERSIONS,
        features: features::ALL,
        peer: peer_id("decode-0"),
        model: model(),
        shard: Shard::whole(8, 4),
        host: "host-a".into(),
    }
}

/// Short times, so that tests wait little.
pub(super) fn config() -> Config {
    let mut c = Config::default();
    c.session.heartbeat = Duration::from_millis(100);
    c.session.hello_timeout = Duration::from_secs(2);
    c.session.redial_min = Duration::from_millis(10);
    c.session.redial_max = Duration::from_millis(100);
    c
}

/// A call of the desk.
#[derive(Debug)]
pub(super) enum Seen {
    Hello,
    Opened(SessionId),
    Frame(SessionId, ClientFrame),
    Closed(SessionId),
}

/// A desk without an offer table: it grants every claim at once and acknowledges every release, unless told otherwise.
pub(super) struct TestDesk {
    pub me: PeerId,
    pub grants: AtomicBool,
    pub acknowledges: AtomicBool,
    pub refuses_sessions: AtomicBool,
    /// The only token with which it releases; `None`: any.
    pub right: Mutex<Option<Token>>,
    pub lanes: Mutex<Vec<LaneKind>>,
    /// The GPU of its pool; `None`: host memory.
    pub gpu_uuid: Mutex<Option<[u8; 16]>>,
    /// How many requests for a lane are still answered with `NotYet`.
    pub not_yet: AtomicU64,
    pub outboxes: Mutex<HashMap<SessionId, Outbox>>,
    /// The incarnations under which it knows the consumers of all sessions.
    known: Mutex<BTreeSet<Incarnation>>,
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

    pub(super) fn consumers(&self) -> BTreeSet<Incarnation> {
        self.known.lock().unwrap().clone()
    }

    pub(super) fn outbox(&self, session: SessionId) -> Outbox {
        self.outboxes.lock().unwrap()[&session].clone()
    }
}

impl Desk for TestDesk {
    fn hello(&self, hello: &Hello, _: &PeerKey) -> Result<Welcome, Mismatch> {
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
            gpu_uuid: *self.gpu_uuid.lock().unwrap(),
        })
    }

    fn open(&self, from: &PeerId, expect: Incarnation, outbox: Outbox, _: &PeerKey) -> Result<SessionId, Refusal> {
        self.expects_me(expect)?;
        let id = SessionId(self.next.fetch_add(1, Ordering::SeqCst));
        if self.refuses_sessions.load(Ordering::SeqCst) {
            self.see(Seen::Opened(id));
            return Err(Refusal::Precondition("not now".into()));
        }
        self.known.lock().unwrap().insert(from.incarnation);
        self.outboxes.lock().unwrap().insert(id, outbox);
        self.see(Seen::Opened(id));
        Ok(id)
    }

    fn frame(&self, session: SessionId, _: &PeerId, frame: ClientFrame, _: &PeerKey) -> Result<(), Refusal> {
        let outbox = self.outbox(session);
        let reply = |ack, body| assert!(outbox.send(ServerFrame { ack, body }));
        match &frame.body {
            ClientBody::Ping(n) => reply(0, Some(ServerBody::Pong(*n))),
            ClientBody::Claim { claim, .. } if self.grants.load(Ordering::SeqCst) => {
                let remaining = Duration::from_secs(10);
                reply(
                    0,
                    Some(ServerBody::Granted {
                        growths: 0,
                        claim: *claim,
                        grant: Grant { slot: 7, nonce: Nonce::random() },
                        contents: Arc::default(),
                        remaining,
                    }),
                );
            }
            ClientBody::Release(_) if self.acknowledges.load(Ordering::SeqCst) => reply(frame.seq, None),
            _ => {}
        }
        self.see(Seen::Frame(session, frame));
        Ok(())
    }

    fn closed(&self, session: SessionId, _: &PeerId) {
        assert!(self.outboxes.lock().unwrap().remove(&session).is_some(), "closed twice, or never opened");
        self.see(Seen::Closed(session));
    }

    fn connect_lane(
        &self,
        _: &PeerId,
        expect: Incarnation,
        kind: LaneKind,
        _: &PeerKey,
    ) -> Result<LaneTicket, Refusal> {
        self.expects_me(expect)?;
        let less = |n: u64| n.checked_sub(1);
        if self.not_yet.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok() {
            return Err(Refusal::NotYet("not all rails are open".into()));
        }
        match kind {
            LaneKind::Tcp => Ok(LaneTicket::Tcp { host: None, port: 9, lane: 5, key: [3; 32] }),
            LaneKind::Local => Ok(LaneTicket::Local { uds: b"\0nowhere".to_vec(), lane: 5, key: [3; 32] }),
            _ => Err(Refusal::Unsupported { what: format!("lane {kind}") }),
        }
    }

    fn release(
        &self,
        _: Option<PeerId>,
        (_, token): (OfferId, Token),
        expect: Option<Incarnation>,
        _: &PeerKey,
    ) -> Result<bool, Refusal> {
        expect.map_or(Ok(()), |e| self.expects_me(e))?;
        match *self.right.lock().unwrap() {
            Some(right) if right != token => Err(Refusal::Token),
            _ => Ok(true),
        }
    }
}

/// A producer that serves.
pub(super) struct Rig {
    pub server: Server,
    pub desk: Arc<TestDesk>,
    pub seen: Receiver<Seen>,
    pub addr: SocketAddr,
    pub runtime: Runtime,
}

impl Rig {
    pub(super) fn new(config: &Config) -> Self {
        Self::at("127.0.0.1:0".parse().unwrap(), config)
    }

    pub(super) fn at(addr: SocketAddr, config: &Config) -> Self {
        let (tx, seen) = mpsc::channel();
        let desk = Arc::new(TestDesk {
            me: peer_id("prefill-0"),
            grants: true.into(),
            acknowledges: true.into(),
            refuses_sessions: false.into(),
            right: Mutex::default(),
            not_yet: 0.into(),
            lanes: Mutex::new(vec![LaneKind::Local, LaneKind::Tcp]),
            gpu_uuid: Mutex::default(),
            outboxes: Mutex::default(),
            known: Mutex::default(),
            next: 1.into(),
            seen: Mutex::new(tx),
        });
        let runtime = Runtime::start("test-server").unwrap();
        let listener = TcpListener::bind(addr).unwrap();
        let extra = Extra { routes: Routes::default(), described: vec![("test.Extra".into(), Vec::new())] };
        let tls = config.tls.as_ref().map(|t| TlsIdentity::new(t, None).unwrap());
        let server = Server::start(runtime.handle(), listener, desk.clone(), config, tls, Some(extra)).unwrap();
        let addr = server.addr();
        Self { server, desk, seen, addr, runtime }
    }

    /// The first of the desk's next calls for which `pick` returns a value.
    pub(super) fn seen<T>(&self, mut pick: impl FnMut(Seen) -> Option<T>) -> T {
        let until = Instant::now() + LIMIT;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let seen = self.seen.recv_timeout(left).expect("no such call of the desk in time");
            if let Some(t) = pick(seen) {
                return t;
            }
        }
    }

    pub(super) fn opened(&self) -> SessionId {
        self.seen(|s| match s {
            Seen::Opened(id) => Some(id),
            _ => None,
        })
    }

    pub(super) fn closed(&self) -> SessionId {
        self.seen(|s| match s {
            Seen::Closed(id) => Some(id),
            _ => None,
        })
    }

    pub(super) fn release(&self) -> (SessionId, u64, Release) {
        self.seen(|s| match s {
            Seen::Frame(id, ClientFrame { seq, body: ClientBody::Release(r) }) => Some((id, seq, r)),
            _ => None,
        })
    }

    /// The process dies: it sends nothing more, and the system closes its sockets.
    pub(super) fn die(self) {
        drop(self.runtime);
    }
}

/// Refuses to connect any lane.
pub(super) struct NoLanes;

impl LaneConnector for NoLanes {
    fn connect(&self, ticket: LaneTicket, _: Prepared, _: Arc<Welcome>, _: SocketAddr) -> Connecting<'_> {
        Box::pin(async move { Err(LaneError::Refused { why: format!("no {} lane in this test", ticket.kind()) }) })
    }
}

/// An event of a peer's task, as the data thread receives it.
pub(super) type LaneIn = In<Box<dyn WakingLane>>;

/// Keeps the events of a peer's task.
struct Recorder(Mutex<Sender<LaneIn>>);

impl Recorder {
    fn keep(&self, event: LaneIn) {
        let _ = self.0.lock().unwrap().send(event);
    }
}

impl Events for Recorder {
    fn welcomed(&self, peer: &Addr, welcome: Arc<Welcome>) {
        self.keep(In::Peer(peer.clone(), welcome));
    }
    fn granted(&self, claim: ClaimId, grant: Grant, contents: Arc<Contents>) {
        self.keep(In::Granted(claim, grant, contents));
    }
    fn grown(&self, claim: ClaimId, growth: Growth) {
        self.keep(In::Grown(claim, growth));
    }
    fn lost(&self, claim: ClaimId, cause: Cause) {
        self.keep(In::Lost(claim, cause));
    }
    fn connected(&self, peer: &Addr, Connected { incarnation, need, lane }: Connected) {
        self.keep(In::Lane { peer: peer.clone(), incarnation, need, lane });
    }
    fn silent(&self, peer: &Addr, silent: bool) {
        self.keep(In::Silent(peer.clone(), silent));
    }
    fn dropped(&self, peer: &Addr) {
        self.keep(In::Dropped(peer.clone()));
    }
}

/// A consumer's task for one peer.
pub(super) struct Consumer {
    pub handle: PeerHandle,
    pub events: Receiver<LaneIn>,
    pub addr: Addr,
    pub runtime: Runtime,
}

impl Consumer {
    pub(super) fn new(addr: SocketAddr, config: Config) -> Self {
        Self::with(addr, config, hello(), Arc::new(NoLanes))
    }

    pub(super) fn with(addr: SocketAddr, config: Config, me: Hello, connector: Arc<dyn LaneConnector>) -> Self {
        let (tx, events) = mpsc::channel();
        let runtime = Runtime::start("test-consumer").unwrap();
        let addr: Addr = addr.to_string().into();
        let tls = config.tls.as_ref().map(|t| TlsIdentity::new(t, None).unwrap());
        let handle = PeerTask::spawn(
            runtime.handle(),
            addr.clone(),
            Arc::new(me),
            Arc::new(config),
            Arc::new(Recorder(Mutex::new(tx))),
            connector,
            tls,
        );
        Self { handle, events, addr, runtime }
    }

    pub(super) fn claim(&self, claim: u64, of: &PeerId) -> ClaimId {
        self.handle.claim(want(claim, of));
        ClaimId(claim)
    }

    /// The first of the next events for which `pick` returns a value.
    pub(super) fn event<T>(&self, mut pick: impl FnMut(LaneIn) -> Option<T>) -> T {
        let until = Instant::now() + LIMIT;
        loop {
            match self.events.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(event) => {
                    if let Some(t) = pick(event) {
                        return t;
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("no such event in time"),
                Err(RecvTimeoutError::Disconnected) => panic!("the task is gone"),
            }
        }
    }

    /// Drops the handle, and waits until the task has ended. Returns the remaining events.
    pub(crate) fn close(self) -> Vec<LaneIn> {
        let Consumer { handle, events, runtime: _runtime, .. } = self;
        drop(handle);
        events.iter().collect()
    }

    /// The next answer to a claim: granted, or lost with its cause.
    pub(super) fn answer(&self) -> (ClaimId, Option<Cause>) {
        self.event(|e| match e {
            In::Granted(claim, grant, _) => {
                assert_eq!(grant.slot, 7);
                Some((claim, None))
            }
            In::Lost(claim, cause) => Some((claim, Some(cause))),
            _ => None,
        })
    }

    pub(super) fn welcome(&self) -> Arc<Welcome> {
        self.event(|e| match e {
            In::Peer(addr, welcome) => {
                assert_eq!(addr, self.addr);
                Some(welcome)
            }
            _ => None,
        })
    }
}

pub(super) fn want(claim: u64, of: &PeerId) -> Want {
    Want {
        claim: ClaimId(claim),
        offer: OfferId::random(),
        token: Token::random(),
        number: 0,
        engine: of.engine.clone(),
        rank: of.rank,
        expect: of.incarnation,
        reader: Reader::ONLY,
        awaited: false,
    }
}

/// Runs a call to its end, within the limit.
pub(super) fn run<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(LIMIT, work).await.expect("not done in time") })
}
