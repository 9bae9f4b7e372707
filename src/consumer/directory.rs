//! The sessions of a consumer with its peers.

use std::{collections::HashMap, sync::Arc, time::Instant};

use kvferry_proto::{
    block::Incarnation,
    error::Cause,
    frame::{ClaimId, Release},
    hello::{Hello, Welcome},
    lane::Grant,
    puller::{Addr, In, LaneWish},
    session::Want,
};

use super::{Shared, connector::Connector};
use crate::{
    config::Config,
    control::{
        client::{PeerHandle, PeerTask},
        events::{Connected, Events},
    },
    driver::{
        mailbox::Mailbox,
        thread::{Mail, Peers},
    },
};

/// The sessions with peers, by address.
pub(super) struct Directory {
    pub(super) handle: tokio::runtime::Handle,
    pub(super) hello: Arc<Hello>,
    pub(super) config: Arc<Config>,
    pub(super) events: Arc<dyn Events>,
    pub(super) connector: Arc<Connector>,
    pub(super) peers: HashMap<Addr, Known>,
    pub(super) shared: Arc<Shared>,
}

pub(super) struct Known {
    handle: PeerHandle,
    /// When something was last wanted of it.
    used: Instant,
}

impl Directory {
    /// Whether this would be one peer too many.
    fn is_full(&self, peer: &Addr) -> bool {
        self.peers.len() >= self.config.limits.peers && !self.peers.contains_key(peer)
    }

    fn peer(&mut self, addr: &Addr) -> &PeerHandle {
        let known = self.peers.entry(addr.clone()).or_insert_with(|| {
            let handle = PeerTask::spawn(
                &self.handle,
                addr.clone(),
                self.hello.clone(),
                self.config.clone(),
                self.events.clone(),
                self.connector.clone(),
            );
            let mut up = self.shared.up.lock();
            up.retain(|u| u.strong_count() > 0);
            up.push(handle.up());
            Known { handle, used: Instant::now() }
        });
        known.used = Instant::now();
        &known.handle
    }
}

impl Peers for Directory {
    fn claim(&mut self, peer: &Addr, want: Want) {
        if self.is_full(peer) {
            let limit = self.config.limits.peers;
            tracing::warn!(%peer, limit, "as many peers as the limits allow are known: raise limits.peers");
            return self.events.lost(want.claim, Cause::Limit);
        }
        self.peer(peer).claim(want);
    }

    fn release(&mut self, peer: &Addr, expect: Incarnation, release: Release) {
        // What could not be claimed has nothing to be let go; a mere release is left to the lease.
        if !self.is_full(peer) {
            self.peer(peer).release(expect, release);
        }
    }

    fn connect(&mut self, peer: &Addr, wish: LaneWish) {
        self.peer(peer).connect_lane(wish);
    }

    fn dropped(&mut self, peer: &Addr) -> bool {
        // What was sent to it since is still carried out: its task ends when its handle is gone and it has nothing to do.
        let idle = self.peers.get(peer).is_none_or(|k| k.used.elapsed() >= self.config.session.idle / 2);
        if idle {
            self.peers.remove(peer);
        }
        idle
    }
}

/// Passes what peers' tasks tell on to the data thread.
pub(super) struct ToPuller(pub(super) Mailbox<Mail>);

impl Events for ToPuller {
    fn welcomed(&self, peer: &Addr, welcome: Arc<Welcome>) {
        self.0.send(Mail::Puller(In::Peer(peer.clone(), welcome)));
    }

    fn granted(&self, claim: ClaimId, grant: Grant) {
        self.0.send(Mail::Puller(In::Granted(claim, grant)));
    }

    fn lost(&self, claim: ClaimId, cause: Cause) {
        self.0.send(Mail::Puller(In::Lost(claim, cause)));
    }

    fn connected(&self, peer: &Addr, connected: Connected) {
        let Connected { incarnation, need, lane } = connected;
        self.0.send(Mail::Puller(In::Lane { peer: peer.clone(), incarnation, need, lane }));
    }

    fn dropped(&self, peer: &Addr) {
        self.0.send(Mail::Puller(In::Dropped(peer.clone())));
    }
}
