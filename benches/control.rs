//! What the control plane costs: a claim's round trip between two runtimes over loopback, and the memory of an idle session
//! on both sides together. `cargo bench --bench control`

use std::{
    net::{SocketAddr, TcpListener},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, channel},
    },
    time::{Duration, Instant},
};

use kvferry::{
    block::{Incarnation, Nonce, OfferId, Rank},
    config::Config,
    control::{
        client::{Connecting, LaneConnector, PeerHandle, PeerTask},
        outbox::Outbox,
        server::{Desk, Refusal, Server, SessionId},
        ticket::LaneTicket,
    },
    driver::{rail::In, runtime::Runtime},
    group::PoolLayout,
    lane::{LaneError, LaneKind},
    model::{Mismatch, Model},
    protocol::{
        frame::{ClaimId, ClientBody, ClientFrame, PeerId, Reader, Release, ServerBody, ServerFrame},
        hello::{Hello, VERSIONS, Welcome, features},
        session::Want,
    },
    shard::Shard,
};

/// Grants everything at once.
struct Generous {
    me: PeerId,
    outboxes: Mutex<Vec<Outbox>>,
    closed: AtomicU64,
}

impl Desk for Generous {
    fn hello(&self, hello: &Hello) -> Result<Welcome, Mismatch> {
        Ok(Welcome {
            version: 1,
            features: features::ALL,
            peer: self.me.clone(),
            engine_incarnation: self.me.incarnation,
            model: hello.model.clone(),
            shard: Shard::whole(8, 32),
            pool: Arc::new(PoolLayout::uniform(1000, 32, 4096, 16)),
            fence_slots: 1024,
            lanes: vec![LaneKind::Tcp],
            host: String::new(),
            silence: Duration::from_secs(60),
        })
    }

    fn open(&self, _: &PeerId, _: Incarnation, outbox: Outbox) -> Result<SessionId, Refusal> {
        let mut all = self.outboxes.lock().unwrap();
        all.push(outbox);
        Ok(SessionId(all.len() as u64 - 1))
    }

    fn frame(&self, session: SessionId, _: &PeerId, frame: ClientFrame) {
        let (ack, body) = match frame.body {
            ClientBody::Ping(n) => (0, Some(ServerBody::Pong(n))),
            ClientBody::Claim { claim, .. } => {
                let remaining = Duration::from_secs(10);
                (0, Some(ServerBody::Granted { claim, slot: 1, nonce: Nonce::random(), remaining }))
            }
            ClientBody::Release(_) => (frame.seq, None),
            _ => return,
        };
        self.outboxes.lock().unwrap()[session.0 as usize].send(ServerFrame { ack, body });
    }

    fn closed(&self, _: SessionId, _: &PeerId) {
        self.closed.fetch_add(1, Ordering::SeqCst);
    }

    fn connect_lane(&self, _: &PeerId, _: Incarnation, kind: LaneKind) -> Result<LaneTicket, Refusal> {
        Err(Refusal::Unsupported { what: kind.to_string() })
    }

    fn release(&self, _: Option<PeerId>, _: OfferId, _: Option<Incarnation>) -> Result<bool, Refusal> {
        Ok(false)
    }
}

struct NoLanes;

impl LaneConnector for NoLanes {
    fn connect(&self, _: LaneTicket, _: Arc<Welcome>, _: SocketAddr) -> Connecting<'_> {
        Box::pin(async { Err(LaneError::Died) })
    }
}

struct Rig {
    me: Arc<Hello>,
    peer: PeerId,
    addr: Arc<str>,
    config: Arc<Config>,
    clients: Runtime,
    _servers: Runtime,
    server: Server,
}

impl Rig {
    fn new() -> Self {
        let id = |e: &str| PeerId { engine: e.parse().unwrap(), rank: Rank(0), incarnation: Incarnation::random() };
        let config = Config::default();
        let servers = Runtime::start("servers").unwrap();
        let desk = Arc::new(Generous { me: id("p"), outboxes: Mutex::default(), closed: 0.into() });
        let peer = desk.me.clone();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Server::start(servers.handle(), listener, desk, &config, None).unwrap();
        let model = Model {
            name: "m".into(),
            dtype: "float32".into(),
            scales: String::new(),
            attention: "HND".into(),
            block_tokens: 16,
        };
        let me = Hello {
            versions: VERSIONS,
            features: features::ALL,
            peer: id("d"),
            model,
            shard: Shard::whole(8, 32),
            host: String::new(),
        };
        let addr = server.addr().to_string().into();
        let clients = Runtime::start("clients").unwrap();
        Self { me: Arc::new(me), peer, addr, config: Arc::new(config), clients, _servers: servers, server }
    }

    fn peer(&self) -> (PeerHandle, Receiver<In>) {
        let (tx, rx) = channel();
        let tx = Mutex::new(tx);
        let sink = Arc::new(move |e| drop(tx.lock().unwrap().send(e)));
        let task = PeerTask::spawn(
            self.clients.handle(),
            self.addr.clone(),
            self.me.clone(),
            self.config.clone(),
            sink,
            Arc::new(NoLanes),
        );
        (task, rx)
    }

    fn claim(&self, peer: &(PeerHandle, Receiver<In>), claim: u64) -> OfferId {
        let offer = OfferId::random();
        let engine = self.peer.engine.clone();
        peer.0.claim(Want {
            claim: ClaimId(claim),
            offer,
            engine,
            expect: self.peer.incarnation,
            reader: Reader::ONLY,
        });
        while !matches!(peer.1.recv_timeout(Duration::from_secs(10)).expect("no grant"), In::Granted(..)) {}
        offer
    }

    fn release(&self, peer: &(PeerHandle, Receiver<In>), claim: u64, offer: OfferId) {
        let release = Release { claim: Some(ClaimId(claim)), offer, reader: Reader::ONLY, all: false };
        peer.0.release(self.peer.incarnation, release);
    }
}

fn rss_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn cpu() -> Duration {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
}

fn main() {
    let rig = Rig::new();
    let peer = rig.peer();
    let began = Instant::now();
    let offer = rig.claim(&peer, 1);
    println!("first claim, dial and Hello included: {:?}", began.elapsed());
    rig.release(&peer, 1, offer);
    let mut times: Vec<_> = (2..5000)
        .map(|n| {
            let began = Instant::now();
            let offer = rig.claim(&peer, n);
            let took = began.elapsed();
            rig.release(&peer, n, offer);
            took
        })
        .collect();
    times.sort_unstable();
    let at = |p: usize| times[times.len() * p / 100];
    println!("claim to granted: p10 {:?}, median {:?}, p90 {:?}, p99 {:?}", at(10), at(50), at(90), at(99));
    drop(peer);

    // Both ends are in this process: two descriptors a session.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let _ = rustix::process::setrlimit(
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum },
    );
    let before = rss_kib();
    let count = 1000;
    let peers: Vec<_> = (0..count)
        .map(|n| {
            let peer = rig.peer();
            let offer = rig.claim(&peer, n + 1);
            rig.release(&peer, n + 1, offer);
            peer
        })
        .collect();
    let memory = rss_kib() - before;
    println!("{} idle sessions: {} KiB each, both ends together", rig.server.sessions(), memory / count);
    let (wall, used) = (Instant::now(), cpu());
    std::thread::sleep(Duration::from_secs(22));
    let used = (cpu() - used).as_secs_f64() / wall.elapsed().as_secs_f64();
    println!("{count} idle sessions: {:.2} % of a core, both ends together", used * 100.0);
    drop(peers);
}
