//! Connects the lane that a producer's ticket is for.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use kvferry_proto::{hello::Welcome, lane::LaneKind};

use crate::{
    config::TcpConfig,
    control::client::{Connecting, LaneConnector, Prepared, Preparing},
    lane::{LaneError, WakingLane, faults::Faults, faulty::Faulty, local, tcp::TcpLane, ticket::LaneTicket},
    memory::Memory,
};

/// What connecting takes on this side: the memory that lanes write, and their settings.
pub(super) struct Connector {
    memory: Memory,
    tcp: TcpConfig,
    faults: Option<Faults>,
    /// Lanes connected so far.
    lanes: AtomicU32,
    #[cfg(feature = "verbs")]
    verbs: Option<Arc<verbs::Verbs>>,
}

impl Connector {
    /// A connector of lanes into `memory`.
    pub(super) fn new(memory: Memory, tcp: TcpConfig, faults: Option<Faults>) -> Self {
        Self {
            memory,
            tcp,
            faults,
            lanes: AtomicU32::new(0),
            #[cfg(feature = "verbs")]
            verbs: None,
        }
    }

    /// With verbs, whose rails are opened now, in the background: registering a large pool takes a while.
    #[cfg(feature = "verbs")]
    pub(super) fn with_verbs(mut self, config: &crate::config::VerbsConfig) -> Self {
        self.verbs = Some(verbs::Verbs::new(config.clone(), self.memory.clone()));
        self
    }

    /// Breaks a lane, if it is to be broken.
    fn break_it(&self, lane: Box<dyn WakingLane>) -> Result<Box<dyn WakingLane>, LaneError> {
        let before = self.lanes.fetch_add(1, Ordering::Relaxed);
        match &self.faults {
            Some(f) if f.lanes.is_none_or(|n| before < n) => {
                let broken = Faulty::new(lane, f.clone());
                Ok(Box::new(broken.map_err(|source| LaneError::Io { what: "cannot break the lane", source })?))
            }
            _ => Ok(lane),
        }
    }
}

impl LaneConnector for Connector {
    fn prepare(&self, kind: LaneKind, peer: SocketAddr) -> Preparing<'_> {
        #[cfg(feature = "verbs")]
        if kind == LaneKind::Verbs
            && let Some(verbs) = &self.verbs
        {
            return Box::pin(verbs.clone().prepare(peer));
        }
        let _ = (kind, peer);
        Box::pin(async { Ok(Prepared::default()) })
    }

    fn connect_prepared(
        &self,
        ticket: LaneTicket,
        prepared: Prepared,
        welcome: Arc<Welcome>,
        peer: SocketAddr,
    ) -> Connecting<'_> {
        let memory = self.memory.clone();
        let incarnation = welcome.peer.incarnation;
        Box::pin(async move {
            let lane = match ticket {
                LaneTicket::Tcp { host, port, lane, key } => {
                    let addr = match host {
                        Some(host) => resolve(&host, port).await?,
                        None => SocketAddr::new(peer.ip(), port),
                    };
                    Box::new(TcpLane::connect(addr, lane, &key, incarnation, memory, &self.tcp).await?)
                        as Box<dyn WakingLane>
                }
                LaneTicket::Local { uds, lane } => {
                    Box::new(local::connect(&uds, lane, incarnation, welcome.pool.clone(), memory).await?)
                }
                #[cfg(feature = "verbs")]
                LaneTicket::Verbs(ticket) => verbs::finish(ticket, prepared, &welcome).await?,
                #[cfg(not(feature = "verbs"))]
                LaneTicket::Verbs(_) => {
                    drop(prepared);
                    return Err(LaneError::protocol("a verbs lane, which this build cannot have asked for"));
                }
            };
            self.break_it(lane)
        })
    }

    fn connect(&self, ticket: LaneTicket, welcome: Arc<Welcome>, peer: SocketAddr) -> Connecting<'_> {
        self.connect_prepared(ticket, Prepared::default(), welcome, peer)
    }
}

#[cfg(feature = "verbs")]
mod verbs {
    //! Verbs calls block for milliseconds, so they run on threads that may.

    use std::{net::SocketAddr, sync::Arc};

    use parking_lot::Mutex;

    use crate::{
        config::VerbsConfig,
        control::client::Prepared,
        lane::{
            LaneError, WakingLane,
            verbs::{Opening, Rails, Role, VerbsError, VerbsTicket},
        },
        memory::Memory,
    };
    use kvferry_proto::hello::Welcome;

    /// This side's rails, opened when they are needed first, and again when that failed.
    pub(super) struct Verbs {
        config: VerbsConfig,
        memory: Memory,
        rails: Mutex<Option<Arc<Rails>>>,
    }

    impl Verbs {
        pub(super) fn new(config: VerbsConfig, memory: Memory) -> Arc<Self> {
            let it = Arc::new(Self { config, memory, rails: Mutex::default() });
            let early = it.clone();
            let open = move || {
                if let Err(error) = early.rails() {
                    tracing::debug!(%error, "no verbs here");
                }
            };
            // Without the thread they are opened when they are needed.
            let _ = std::thread::Builder::new().name("kvferry-rails".into()).spawn(open);
            it
        }

        fn rails(&self) -> Result<Arc<Rails>, VerbsError> {
            let mut rails = self.rails.lock();
            match &*rails {
                Some(rails) => Ok(rails.clone()),
                None => Ok(rails.insert(Rails::open(&self.config, self.memory.clone(), Role::Reader)?).clone()),
            }
        }

        pub(super) async fn prepare(self: Arc<Self>, peer: SocketAddr) -> Result<Prepared, LaneError> {
            let opening = blocking(move || Opening::new(&self.rails()?, Some(peer.ip()))).await??;
            Ok(Prepared { verbs: Some(opening.request().clone()), state: Some(Box::new(opening)) })
        }
    }

    pub(super) async fn finish(
        ticket: VerbsTicket,
        prepared: Prepared,
        welcome: &Welcome,
    ) -> Result<Box<dyn WakingLane>, LaneError> {
        let opening = prepared.state.and_then(|s| s.downcast::<Opening>().ok());
        let opening = opening.ok_or_else(|| LaneError::protocol("a verbs lane that was not asked for"))?;
        let (pool, incarnation) = (welcome.pool.clone(), welcome.peer.incarnation);
        let lane = blocking(move || opening.finish(&ticket, pool, incarnation)).await??;
        Ok(Box::new(lane))
    }

    async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, LaneError> {
        tokio::task::spawn_blocking(work).await.map_err(|_| LaneError::protocol("it could not be connected"))
    }
}

/// The data server's address, where it is not on the host of the control plane.
async fn resolve(host: &str, port: u16) -> Result<SocketAddr, LaneError> {
    let connect = |source| LaneError::Connect { to: format!("{host}:{port}"), source };
    let mut found = tokio::net::lookup_host((host, port)).await.map_err(connect)?;
    found.next().ok_or_else(|| connect(std::io::ErrorKind::AddrNotAvailable.into()))
}
