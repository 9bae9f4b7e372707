//! How a producer is configured and started.

use std::{
    io,
    net::{SocketAddr, TcpListener, ToSocketAddrs as _},
    sync::Arc,
};

use kvferry_proto::{
    BadAddress, EngineId, Incarnation, LaneKind, Model, PeerId, PoolLayout, Rank, Shard, check_address, check_host,
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, ipproto, listen, socket_with, sockopt};

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
    fill: Option<Fill>,
    config: Config,
}

type Fill = Box<dyn FnOnce(&PeerId, &Memory) -> io::Result<()> + Send>;

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
            fill: None,
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

    /// Sets `HOST:PORT` of the control plane; port 0 selects a free port. Default: `127.0.0.1:0`. An address that other hosts
    /// cannot use, such as `0.0.0.0`, needs [`Builder::advertise`] too.
    pub fn listen(mut self, addr: impl Into<String>) -> Self {
        self.listen = addr.into();
        self
    }

    /// Sets the `HOST:PORT` that offers name, if it differs from the listening address. Port 0 stands for the listening port.
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

    /// Fills the memory with content that must be there before the first peer is answered. The function gets this rank's
    /// identity and the memory. If it fails, nothing is started.
    pub fn fill(mut self, fill: impl FnOnce(&PeerId, &Memory) -> io::Result<()> + Send + 'static) -> Self {
        self.fill = Some(Box::new(fill));
        self
    }

    /// Replaces the default settings.
    pub fn config(mut self, config: Config) -> Self {
        self.config = config;
        self
    }

    /// Starts the control plane, the data servers and their threads. Until it returns, connections to its port are refused.
    ///
    /// # Errors
    /// A setting is wrong, consumers could not use the address that offers would name, or the system refuses the address,
    /// memory, a thread or a descriptor.
    pub fn build(self) -> Result<Producer, StartError> {
        self.layout.check()?;
        self.shard.check().map_err(|why| StartError::Config { field: "shard", why: why.into() })?;
        self.config.check()?;
        let listener = reserve(&self.listen)?;
        let bound = listener.local_addr().map_err(StartError::os("cannot read the listening address"))?;
        let addr = advertised(bound, self.advertise.as_deref())?;
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
        let me = PeerId { engine: self.engine, rank: self.rank, incarnation: Incarnation::random() };
        if let Some(fill) = self.fill {
            fill(&me, &memory).map_err(StartError::os("cannot fill the memory"))?;
        }
        let export = Arc::new(Export::new(layout, memory, Arc::new(words)).with_ring(ring));
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
        let core = Arc::new(Core::new(me, addr, self.model, self.shard, export, servers, self.config));
        runtime.handle().spawn(keep_time(Arc::downgrade(&core), core.rearm.clone()));
        listen(&listener, BACKLOG).map_err(|e| refused(&self.listen, e.into()))?;
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
        Err(e) if only => return Err(StartError::os("cannot serve verbs")(io::Error::other(e))),
        // Not worth a warning: this host has no device, and the configuration names none.
        Err(error @ (VerbsError::NoDevice | VerbsError::NoLibrary { .. })) if config.verbs.rails.is_empty() => {
            tracing::info!(%error, "verbs are not served");
        }
        Err(error) => tracing::warn!(%error, "verbs are not served"),
    }
    Ok(None)
}

/// Most connections that wait to be accepted; the kernel caps it at `net.core.somaxconn`, 4096 by default.
const BACKLOG: i32 = 4096;

fn refused(addr: &str, source: io::Error) -> StartError {
    StartError::Listen { addr: addr.into(), source }
}

/// Binds `HOST:PORT` and does not listen yet: until [`listen`], the kernel refuses connections.
fn reserve(addr: &str) -> Result<TcpListener, StartError> {
    let mut last = io::Error::new(io::ErrorKind::InvalidInput, "the name has no address");
    for at in addr.to_socket_addrs().map_err(|e| refused(addr, e))? {
        match reserve_at(at) {
            Ok(listener) => return Ok(listener),
            Err(e) => last = e,
        }
    }
    Err(refused(addr, last))
}

fn reserve_at(at: SocketAddr) -> io::Result<TcpListener> {
    let family = if at.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &at)?;
    Ok(socket.into())
}

/// The address that offers name: `advertise`, or the bound address. Consumers on other hosts must be able to use it.
fn advertised(bound: SocketAddr, advertise: Option<&str>) -> Result<String, StartError> {
    let Some(addr) = advertise else {
        let addr = bound.to_string();
        let why = |e: BadAddress| {
            format!("{addr} cannot be the address in offers: {e}; or set `advertise` to such a HOST:PORT")
        };
        check_address(&addr).map_err(|e| StartError::Config { field: "listen", why: why(e) })?;
        return Ok(addr);
    };
    let bad = |e: BadAddress| StartError::Config { field: "advertise", why: format!("{addr:?} is unusable: {e}") };
    match addr.rsplit_once(':') {
        Some((host, "0")) => check_host(host).map(|()| format!("{host}:{}", bound.port())).map_err(bad),
        _ => check_address(addr).map(|()| addr.to_owned()).map_err(bad),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;

    #[test]
    fn a_reserved_port_refuses_connections_until_the_producer_is_ready() {
        let listener = reserve("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        assert_eq!(TcpStream::connect(at).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        listen(&listener, BACKLOG).unwrap();
        TcpStream::connect(at).unwrap();
        assert_eq!(reserve_at(at).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn memory_is_filled_before_the_port_answers() {
        let port = reserve("127.0.0.1:0").unwrap().local_addr().unwrap();
        let model = Model {
            name: "m".into(),
            dtype: "uint8".into(),
            scales: String::new(),
            weights: String::new(),
            attention: "HND".into(),
            block_tokens: 16,
        };
        let producer = Producer::builder("p".parse().unwrap(), model, PoolLayout::uniform(1, 1, 4096, 16))
            .listen(port.to_string())
            .fill(move |_, memory| {
                assert_eq!(TcpStream::connect(port).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
                memory.write_from(0, 0, b"KV")
            })
            .build()
            .unwrap();
        TcpStream::connect(port).unwrap();
        let mut bytes = [0; 2];
        producer.memory().read_into(0, 0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"KV");
    }

    #[test]
    fn offers_name_an_address_that_other_hosts_can_use() {
        let of = |bound: &str, advertise: Option<&str>| {
            advertised(bound.parse().unwrap(), advertise).map_err(|e| e.to_string())
        };
        assert_eq!(of("127.0.0.1:7400", None).unwrap(), "127.0.0.1:7400");
        assert_eq!(of("[fd00::1]:7400", None).unwrap(), "[fd00::1]:7400");
        assert_eq!(of("0.0.0.0:7400", Some("prefill-0:80")).unwrap(), "prefill-0:80");
        assert_eq!(of("0.0.0.0:7400", Some("[fd00::1]:0")).unwrap(), "[fd00::1]:7400");
        for bound in ["0.0.0.0:7400", "[::]:7400", "[fe80::1%2]:7400", "[fe80::1]:7400"] {
            let error = of(bound, None).unwrap_err();
            assert!(error.starts_with("listen: ") && error.contains("`advertise`"), "{error}");
        }
        for addr in ["foo", "a@host:1", "[fe80::1%eth0]:1", "fe80::1%eth0", "0.0.0.0:0", "host:x"] {
            let error = of("127.0.0.1:7400", Some(addr)).unwrap_err();
            assert!(error.starts_with("advertise: ") && error.contains(addr), "{error}");
        }
    }
}
