//! Connects the lane that a producer's ticket is for.

use std::{future::Future, net::SocketAddr, pin::Pin, sync::Arc};

use crate::{
    config::TcpConfig,
    control::{client::LaneConnector, server::LaneTicket},
    lane::{Lane, LaneError, local, tcp},
    memory::Memory,
    protocol::hello::Welcome,
};

/// What connecting takes on this side: the memory that lanes write, and their settings.
pub struct Connector {
    memory: Memory,
    tcp: TcpConfig,
}

impl Connector {
    /// A connector of lanes into `memory`.
    pub fn new(memory: Memory, tcp: TcpConfig) -> Self {
        Self { memory, tcp }
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
            Ok(match ticket {
                LaneTicket::Tcp { port, lane, key, .. } => {
                    let addr = SocketAddr::new(peer.ip(), port);
                    Box::new(tcp::connect(addr, lane, &key, incarnation, memory, &self.tcp).await?) as Box<dyn Lane>
                }
                LaneTicket::Local { uds, lane } => {
                    Box::new(local::connect(&uds, lane, incarnation, welcome.pool.clone(), memory).await?)
                }
            })
        })
    }
}
