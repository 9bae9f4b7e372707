//! Connects the lane that a producer's ticket is for.

use std::{
    future::Future,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use crate::{
    config::TcpConfig,
    control::{client::LaneConnector, ticket::LaneTicket},
    lane::{
        Lane, LaneError,
        fault::{Faults, Faulty},
        local,
        tcp::TcpLane,
    },
    memory::Memory,
    protocol::hello::Welcome,
};

/// What connecting takes on this side: the memory that lanes write, and their settings.
pub struct Connector {
    memory: Memory,
    tcp: TcpConfig,
    faults: Option<Faults>,
    /// Lanes connected so far.
    lanes: AtomicU32,
}

impl Connector {
    /// A connector of lanes into `memory`.
    pub fn new(memory: Memory, tcp: TcpConfig, faults: Option<Faults>) -> Self {
        Self { memory, tcp, faults, lanes: AtomicU32::new(0) }
    }

    /// Breaks a lane, if it is to be broken.
    fn break_it(&self, lane: Box<dyn Lane>) -> Result<Box<dyn Lane>, LaneError> {
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
    fn connect(
        &self,
        ticket: LaneTicket,
        welcome: Arc<Welcome>,
        peer: SocketAddr,
    ) -> Pin<Box<dyn Future<Output = Result<Box<dyn Lane>, LaneError>> + Send + '_>> {
        let memory = self.memory.clone();
        let incarnation = welcome.peer.incarnation;
        Box::pin(async move {
            let lane = match ticket {
                LaneTicket::Tcp { host, port, lane, key } => {
                    let addr = match host {
                        Some(host) => resolve(&host, port).await?,
                        None => SocketAddr::new(peer.ip(), port),
                    };
                    Box::new(TcpLane::connect(addr, lane, &key, incarnation, memory, &self.tcp).await?) as Box<dyn Lane>
                }
                LaneTicket::Local { uds, lane } => {
                    Box::new(local::connect(&uds, lane, incarnation, welcome.pool.clone(), memory).await?)
                }
            };
            self.break_it(lane)
        })
    }
}

/// The data server's address, where it is not on the host of the control plane.
async fn resolve(host: &str, port: u16) -> Result<SocketAddr, LaneError> {
    let connect = |source| LaneError::Connect { to: format!("{host}:{port}"), source };
    let mut found = tokio::net::lookup_host((host, port)).await.map_err(connect)?;
    found.next().ok_or_else(|| connect(std::io::ErrorKind::AddrNotAvailable.into()))
}
