//! How a producer is configured and started.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    sync::Arc,
};

use kvferry_proto::{EngineId, Incarnation, LaneKind, Model, PeerId, PoolLayout, Rank, Shard};

use super::{
    Producer,
    core::{Core, Servers, keep_time},
};
use crate::{
    config::Config,
    control::server::{Extra, Server},
    driver::runtime::Runtime,
    error::StartError,
    lane::{self, local, tcp},
    memory::{Export, FenceWords, Memory, gpu::PinnedRing},
    tls::TlsIdentity,
};

/// Builds a [`Producer`].
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
}

impl Builder {
    /// Sets the rank of the engine and its part of the model. Default: the engine's only rank.
    pub fn rank(mut self, rank: Rank, shard: Shard) -> Self {
        (self.rank, self.shard) = (rank, shard);
        self
    }

    /// Uses the engine's own memory. Default: kvferry allocates memory for the layout, which consumers on this host map.
    pub fn memory(mut self, memory: Memory) -> Self {
        self.memory = Some(memory);
        self
    }

    /// Sets `HOST:PORT` of the control plane; port 0 selects a free port. Default: `127.0.0.1:0`.
    pub fn listen(mut self, addr: impl Into<String>) -> Self {
        self.listen = addr.into();
        self
    }

    /// Sets the `HOST:PORT` that offers name, if it differs from the listening address.
    pub fn advertise(mut self, addr: impl Into<String>) -> Self {
        self.advertise = Some(addr.into());
        self
    }

    /// Sets the lanes to serve. Default: every lane of this build.
    pub fn lanes(mut self, lanes: Vec<LaneKind>) -> Self {
        self.lanes = lanes;
        self
    }

    /// Serves these gRPC services too, on the control plane's port. `described` holds their names, such as
    /// `package.Service`, each with its encoded file descriptors, for the reflection service.
    pub fn services(mut self, routes: tonic::service::Routes, described: Vec<(String, Vec<u8>)>) -> Self {
        self.services = Some(Extra { routes, described });
        self
    }

    /// Replaces the default settings.
    pub fn config(mut self, config: Config) -> Self {
        self.config = config;
        self
    }

    /// Starts the control plane, the data servers and their threads.
    pub fn build(self) -> Result<Producer, StartError> {
        self.layout.check()?;
        self.shard.check().map_err(|why| StartError::Config { field: "shard", why: why.into() })?;
        self.config.check()?;
        let listener = listen(&self.listen)?;
        let bound = listener.local_addr().map_err(StartError::os("cannot read the listening address"))?;
        let memory = Memory::for_layout(self.memory, &self.layout)?;
        // When a process dies, the kernel closes its files from the newest to the oldest, and freeing a pool of a gigabyte
        // takes 0.2 s. The listening socket is duplicated after the pool is allocated, so that peers notice the death first.
        // The port itself was bound early, so that a port in use costs no memory.
        let listener = listener.try_clone().map_err(StartError::os("cannot duplicate the listening socket"))?;
        let words = FenceWords::new(self.config.limits.offers as u32)
            .map_err(StartError::os("cannot allocate the fence table"))?;
        let layout = Arc::new(self.layout);
        let tls = self.config.tls.as_ref().map(|t| TlsIdentity::new(t, Some(&self.engine))).transpose()?;
        let ring = PinnedRing::new(&memory, &self.config.gpu)?;
        let export = Arc::new(Export::new(layout, memory, Arc::new(words)).with_ring(ring));
        let me = PeerId { engine: self.engine, rank: self.rank, incarnation: Incarnation::random() };
        let runtime = Runtime::start("kvferry-control").map_err(StartError::os("cannot start the control thread"))?;
        let serves = |kind| self.lanes.contains(&kind);
        let limits = &self.config.limits;
        let tcp = serves(LaneKind::Tcp)
            .then(|| {
                let (bind, config) = (SocketAddr::new(bound.ip(), 0), &self.config.tcp);
                tcp::Server::start(bind, export.clone(), me.incarnation, limits, config, tls.clone())
            })
            .transpose()
            .map_err(StartError::os("cannot start the tcp lane"))?;
        let local = serves(LaneKind::Local)
            .then(|| {
                local::Server::start(
                    export.clone(),
                    me.incarnation,
                    runtime.handle().clone(),
                    &self.config.local,
                    limits,
                )
            })
            .transpose()
            .map_err(StartError::os("cannot start the local lane"))?;
        #[cfg(feature = "verbs")]
        let verbs = match serves(LaneKind::Verbs) {
            true => start_verbs(&export, me.incarnation, &self.config, self.lanes.len() == 1)?,
            false => None,
        };
        let servers = Servers {
            tcp,
            local,
            #[cfg(feature = "verbs")]
            verbs,
        };
        let addr = self.advertise.unwrap_or_else(|| advertised(bound));
        let core = Arc::new(Core::new(me, addr, self.model, self.shard, export, servers, self.config));
        runtime.handle().spawn(keep_time(Arc::downgrade(&core), core.rearm.clone()));
        let server = Server::start(runtime.handle(), listener, core.clone(), &core.config, tls, self.services)?;
        Ok(Producer { core, server: Some(server), _runtime: runtime })
    }
}

/// Starts the verbs server. A failure is an error only if no other lane is served.
#[cfg(feature = "verbs")]
fn start_verbs(
    export: &Arc<Export>,
    incarnation: Incarnation,
    config: &Config,
    only: bool,
) -> Result<Option<lane::verbs::Server>, StartError> {
    use crate::lane::verbs::VerbsError;
    // The pool's GPU may be out of the NICs' reach, and a one-sided READ cannot make this side stage.
    let role = lane::verbs::Role::Served(export.words.clone());
    let reached = lane::verbs::Rails::reach(&config.verbs, &export.memory, &role);
    match reached.and_then(|()| lane::verbs::Server::start(export, incarnation, &config.verbs, &config.limits)) {
        Ok(server) => return Ok(Some(server)),
        Err(e) if only => return Err(StartError::os("cannot serve verbs")(std::io::Error::other(e))),
        // Not worth a warning: this host has no device, and the configuration names none.
        Err(error @ (VerbsError::NoDevice | VerbsError::NoLibrary { .. })) if config.verbs.rails.is_empty() => {
            tracing::info!(%error, "verbs are not served");
        }
        Err(error) => tracing::warn!(%error, "verbs are not served"),
    }
    Ok(None)
}

/// Binds `HOST:PORT`.
fn listen(addr: &str) -> Result<TcpListener, StartError> {
    let failed = |source| StartError::Listen { addr: addr.into(), source };
    let listener = TcpListener::bind(addr).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

/// The address that offers name for a bound address. For the unspecified address it is loopback: a producer that listens on
/// all addresses for other hosts sets `advertise`.
fn advertised(bound: SocketAddr) -> String {
    let ip = match bound.ip() {
        ip if !ip.is_unspecified() => ip,
        _ => IpAddr::V4(Ipv4Addr::LOCALHOST),
    };
    SocketAddr::new(ip, bound.port()).to_string()
}
