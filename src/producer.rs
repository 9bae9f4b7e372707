//! The producer: what a prefill engine's rank holds to offer blocks of its memory.
//!
//! [`Producer::offer`] names blocks that will stay put; the name goes through the router to the decode side. The engine
//! keeps the blocks as they are until [`Producer::poll_freed`] hands the offer back, which it does whatever the consumers
//! do: released, or revoked at the end of its lease.

mod core;

use std::{
    collections::{HashMap, VecDeque},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    sync::Arc,
    time::{Duration, Instant},
};

use kvferry_proto::{
    Machine,
    block::{EngineId, Incarnation, OfferId, Rank},
    error::OfferError,
    frame::PeerId,
    group::PoolLayout,
    lane::LaneKind,
    model::Model,
    offer::{Offer, OfferGroup},
    shard::Shard,
    table::{self as books, OfferTable},
};
use parking_lot::{Condvar, Mutex};
use tokio::sync::Notify;

use self::core::{Core, State, keep_time};
use crate::{
    config::Config,
    control::server::{Extra, Server},
    driver::runtime::Runtime,
    error::StartError,
    lane::{self, local, tcp},
    memory::{Export, FenceWords, Memory},
    metrics::ProducerMetrics,
};

pub(crate) use kvferry_proto::table::Freed;

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
    services: Option<Extra>,
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

    /// Serves these gRPC services too, on the control plane's port. `described` are their names, such as `package.Service`,
    /// each with its encoded file descriptors, for the reflection service.
    pub fn services(mut self, routes: tonic::service::Routes, described: Vec<(String, Vec<u8>)>) -> Self {
        self.services = Some(Extra { routes, described });
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
        #[cfg(feature = "verbs")]
        let verbs = match self.lanes.contains(&LaneKind::Verbs) {
            true => match lane::verbs::Server::start(&export, me.incarnation, &self.config.verbs, limits) {
                Ok(server) => Some(server),
                Err(e) if self.lanes.len() == 1 => {
                    return Err(os("cannot serve verbs")(std::io::Error::other(e)));
                }
                Err(error) => {
                    use crate::lane::verbs::VerbsError;
                    // A host that has none, and nobody asked for them.
                    match &error {
                        VerbsError::NoDevice | VerbsError::NoLibrary { .. } if self.config.verbs.rails.is_empty() => {
                            tracing::info!(%error, "verbs are not served");
                        }
                        error => tracing::warn!(%error, "verbs are not served"),
                    }
                    None
                }
            },
            false => None,
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
            #[cfg(feature = "verbs")]
            verbs,
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
        let server = Server::start(runtime.handle(), listener, core.clone(), &core.config, self.services)?;
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
            lanes: lane::built().to_vec(),
            services: None,
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
    /// now will not count them. A name that was given away and not entered is taken back as well: it cannot be entered any
    /// more, and who waits for it hears so at once.
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
        if let Some(f) = self.core.freed.lock().pop_front() {
            return Some(f);
        }
        let mut state = self.core.lock();
        state.table.tick(Instant::now());
        self.core.carry_out(&mut state);
        drop(state);
        self.core.freed.lock().pop_front()
    }

    /// Waits for the next freed offer, for `timeout` at most.
    pub fn wait_freed(&self, timeout: Duration) -> Option<Freed> {
        let mut freed = self.core.freed.lock();
        self.core.freed_now.wait_while_for(&mut freed, |f| f.is_empty(), timeout);
        freed.pop_front()
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
