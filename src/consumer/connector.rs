//! Connects lanes with the tickets that producers issue.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use kvferry_proto::{LaneKind, hello::Welcome};

use crate::{
    config::{Config, GpuConfig, LocalConfig, TcpConfig},
    control::{
        dial::not_listed,
        lanes::{Connecting, LaneConnector, Prepared, Preparing},
    },
    dial_list::DialList,
    faults::Faults,
    lane::{LaneError, WakingLane, faulty::Faulty, local, staged::stage, tcp::TcpLane, ticket::LaneTicket},
    memory::{
        Memory,
        gpu::{GpuError, PinnedRing},
    },
    tls::TlsIdentity,
};

/// The memory that lanes write, and the lanes' settings.
pub(super) struct Connector {
    memory: Memory,
    /// The ring that lanes read into when the memory is a GPU's.
    ring: Option<PinnedRing>,
    local: LocalConfig,
    gpu: GpuConfig,
    tcp: TcpConfig,
    dial: DialList,
    tls: Option<Arc<TlsIdentity>>,
    faults: Option<Faults>,
    /// Lanes connected so far.
    lanes: AtomicU32,
    #[cfg(feature = "verbs")]
    verbs: Option<Arc<verbs::Verbs>>,
}

impl Connector {
    /// A connector of lanes into `memory`. Verbs rails are opened in the background: registering a large pool takes a while.
    ///
    /// # Errors
    /// The memory is a GPU's, and the ring cannot be pinned.
    pub(super) fn new(memory: Memory, config: &Config, tls: Option<Arc<TlsIdentity>>) -> Result<Self, GpuError> {
        let ring = PinnedRing::new(&memory, &config.gpu)?;
        Ok(Self {
            #[cfg(feature = "verbs")]
            verbs: (config.pull.lanes.contains(&LaneKind::Verbs))
                .then(|| verbs::Verbs::new(config.verbs.clone(), memory.clone(), ring.clone())),
            memory,
            ring,
            local: config.local.clone(),
            gpu: config.gpu.clone(),
            tcp: config.tcp.clone(),
            // `Config::check` has refused a malformed list.
            dial: DialList::new(&config.dial).unwrap_or_default(),
            tls,
            faults: config.pull.faults.clone(),
            lanes: AtomicU32::new(0),
        })
    }

    /// The memory that tcp lanes, and local lanes from host memory, read into.
    fn landing(&self) -> &Memory {
        self.ring.as_ref().map_or(&self.memory, |ring| ring.memory())
    }

    /// Wraps a lane in the configured faults, if any.
    fn add_faults(&self, lane: Box<dyn WakingLane>) -> Result<Box<dyn WakingLane>, LaneError> {
        let before = self.lanes.fetch_add(1, Ordering::Relaxed);
        match &self.faults {
            Some(f) if f.lanes.is_none_or(|n| before < n) => {
                Ok(Box::new(Faulty::new(lane, f.clone()).map_err(LaneError::io("cannot add faults to the lane"))?))
            }
            _ => Ok(lane),
        }
    }
}

/// Copies what the lane reads into the ring on to the memory, if there is a ring.
fn onward(ring: Option<&PinnedRing>, lane: impl WakingLane + 'static) -> Result<Box<dyn WakingLane>, LaneError> {
    Ok(match ring {
        Some(ring) => {
            Box::new(stage(ring, Box::new(lane)).map_err(LaneError::io("cannot make the lane's descriptors"))?)
        }
        None => Box::new(lane),
    })
}

impl LaneConnector for Connector {
    fn on_gpu(&self) -> bool {
        self.memory.gpu().is_some()
    }

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

    fn connect(
        &self,
        ticket: LaneTicket,
        prepared: Prepared,
        welcome: Arc<Welcome>,
        peer: SocketAddr,
    ) -> Connecting<'_> {
        let landing = self.landing().clone();
        let incarnation = welcome.peer.incarnation;
        Box::pin(async move {
            let lane = match ticket {
                LaneTicket::Tcp { host, port, lane, key } => {
                    let addr = match host {
                        Some(host) if !self.dial.allows(&host) => {
                            return Err(LaneError::NoPath { what: not_listed(&host).to_string() });
                        }
                        Some(host) => resolve(&host, port).await?,
                        None => SocketAddr::new(peer.ip(), port),
                    };
                    let tls = self.tls.as_deref();
                    let lane = TcpLane::connect(addr, lane, &key, incarnation, landing, &self.tcp, tls).await?;
                    onward(self.ring.as_ref(), lane)?
                }
                LaneTicket::Local { uds, lane, key } => {
                    let (pool, uids) = (welcome.pool.clone(), &self.local.uids);
                    let lane = (lane, key);
                    if self.memory.gpu().is_some() && welcome.gpu_uuid.is_some() {
                        let memory = self.memory.clone();
                        local::connect(&uds, lane, incarnation, pool, memory, uids, &self.gpu).await?
                    } else {
                        let lane = local::connect(&uds, lane, incarnation, pool, landing, uids, &self.gpu).await?;
                        onward(self.ring.as_ref(), lane)?
                    }
                }
                #[cfg(feature = "verbs")]
                LaneTicket::Verbs(ticket) => verbs::finish(ticket, prepared, &welcome).await?,
                #[cfg(not(feature = "verbs"))]
                LaneTicket::Verbs(_) => {
                    drop(prepared);
                    return Err(LaneError::protocol(
                        "it sent a ticket for a verbs lane, which this build never requests",
                    ));
                }
            };
            self.add_faults(lane)
        })
    }
}

#[cfg(feature = "verbs")]
mod verbs {
    //! The consumer's rails. Verbs calls block for milliseconds, so they run on threads that may block.

    use std::{net::SocketAddr, sync::Arc};

    use parking_lot::Mutex;

    use crate::{
        config::VerbsConfig,
        control::lanes::Prepared,
        lane::{
            LaneError, WakingLane,
            verbs::{Opening, Rails, Role, VerbsError, VerbsTicket},
        },
        memory::{Memory, gpu::PinnedRing},
    };
    use kvferry_proto::hello::Welcome;

    /// This side's rails, opened at first use, and again at the next use if that failed.
    pub(super) struct Verbs {
        config: VerbsConfig,
        memory: Memory,
        /// Of a pool in GPU memory: used where no NIC reaches it.
        ring: Option<PinnedRing>,
        rails: Mutex<Option<Opened>>,
    }

    /// Open rails, and the ring that their lanes read into, if they do not read into the pool itself.
    #[derive(Clone)]
    struct Opened {
        rails: Arc<Rails>,
        ring: Option<PinnedRing>,
    }

    impl Verbs {
        pub(super) fn new(config: VerbsConfig, memory: Memory, ring: Option<PinnedRing>) -> Arc<Self> {
            let it = Arc::new(Self { config, memory, ring, rails: Mutex::default() });
            let early = it.clone();
            let open = move || {
                if let Err(error) = early.rails() {
                    tracing::debug!(%error, "no verbs rails");
                }
            };
            // Without the thread, the first use opens them.
            let _ = std::thread::Builder::new().name("kvferry-rails".into()).spawn(open);
            it
        }

        fn rails(&self) -> Result<Opened, VerbsError> {
            let mut rails = self.rails.lock();
            let refused = match &*rails {
                // A part of the pool could be registered, and then not all of it.
                Some(opened) => opened.ring.is_none() && self.ring.is_some() && opened.rails.refused(),
                None => false,
            };
            if let Some(opened) = rails.as_ref().filter(|_| !refused) {
                return Ok(opened.clone());
            }
            let ring = self.ring.as_ref().filter(|_| refused || !self.is_reached()).cloned();
            let memory = ring.as_ref().map_or(&self.memory, |ring| ring.memory());
            let opened = Opened { rails: Rails::open(&self.config, memory.clone(), Role::Reader)?, ring };
            Ok(rails.insert(opened).clone())
        }

        /// Whether NICs reach the pool in GPU memory. Logs the reasons if not.
        fn is_reached(&self) -> bool {
            let reached = Rails::reach(&self.config, &self.memory, &Role::Reader);
            match &reached {
                Ok(()) => tracing::info!("verbs read into GPU memory directly"),
                Err(VerbsError::NoDevice | VerbsError::NoLibrary { .. }) => {}
                Err(why) => tracing::info!(%why, "verbs read into GPU memory through the pinned ring"),
            }
            reached.is_ok()
        }

        pub(super) async fn prepare(self: Arc<Self>, peer: SocketAddr) -> Result<Prepared, LaneError> {
            let open = move || {
                let Opened { rails, ring } = self.rails()?;
                Ok::<_, VerbsError>((Opening::new(&rails, Some(peer.ip()))?, ring))
            };
            let (opening, ring) = blocking(open).await??;
            Ok(Prepared { verbs: Some(opening.request().clone()), state: Some(Box::new((opening, ring))) })
        }
    }

    pub(super) async fn finish(
        ticket: VerbsTicket,
        prepared: Prepared,
        welcome: &Welcome,
    ) -> Result<Box<dyn WakingLane>, LaneError> {
        let state = prepared.state.and_then(|s| s.downcast::<(Opening, Option<PinnedRing>)>().ok());
        let (opening, ring) =
            *state.ok_or_else(|| LaneError::protocol("it sent a ticket for a verbs lane that was not requested"))?;
        let (pool, incarnation) = (welcome.pool.clone(), welcome.peer.incarnation);
        let lane = blocking(move || opening.finish(&ticket, pool, incarnation)).await??;
        super::onward(ring.as_ref(), lane)
    }

    async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, LaneError> {
        tokio::task::spawn_blocking(work)
            .await
            .map_err(|_| LaneError::protocol("the thread that connects the lane panicked"))
    }
}

/// Resolves the data server's address, for a data server on another host than the control plane.
async fn resolve(host: &str, port: u16) -> Result<SocketAddr, LaneError> {
    let connect = |source| LaneError::Connect { to: format!("{host}:{port}"), source };
    let mut found = tokio::net::lookup_host((host, port)).await.map_err(connect)?;
    found.next().ok_or_else(|| connect(std::io::ErrorKind::AddrNotAvailable.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PoolLayout, Producer};

    #[tokio::test]
    async fn a_ticket_leads_to_no_host_that_is_not_listed() {
        let layout = PoolLayout::uniform(1, 1, 4096, 16);
        let model = crate::Model {
            name: "m".into(),
            dtype: "uint8".into(),
            scales: String::new(),
            weights: String::new(),
            attention: "HND".into(),
            block_tokens: 16,
        };
        let producer = Producer::builder("p".parse().unwrap(), model.clone(), layout.clone()).build().unwrap();
        let welcome = crate::probe(producer.addr(), &"d".parse().unwrap(), &model, std::time::Duration::from_secs(5))
            .await
            .unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let config = Config { dial: vec!["10.0.0.0/8".into()], ..Config::default() };
        let connector = Connector::new(Memory::for_layout(None, &layout).unwrap(), &config, None).unwrap();
        let port = listener.local_addr().unwrap().port();
        let ticket = LaneTicket::Tcp { host: Some("127.0.0.1".into()), port, lane: 1, key: [1; 32] };
        let peer = "10.0.0.1:1".parse().unwrap();
        let error =
            connector.connect(ticket, Prepared::default(), Arc::new(welcome), peer).await.err().expect("an error");
        assert!(error.to_string().contains("`dial` does not list it"), "{error}");
        assert!(listener.accept().is_err(), "no connection came");
    }
}
