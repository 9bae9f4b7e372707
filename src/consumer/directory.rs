//! The sessions of a consumer with its peers.

use std::{
    collections::HashMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use kvferry_proto::{
    Cause, ClaimId, Contents, Grant, Growth, Incarnation, Release,
    hello::{Hello, Welcome},
    puller::{Addr, In, LaneWish},
    session::Want,
};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::connector::Connector;
use crate::{
    config::Config,
    control::{
        client::{PeerHandle, PeerTask},
        dial::not_listed,
        events::{Connected, Events},
    },
    dial_list::DialList,
    driver::thread::{Mail, Peers},
    mailbox::Mailbox,
    repeats::Repeats,
    tls::TlsIdentity,
};

/// Whether each peer's session is up.
#[derive(Default)]
pub(super) struct Sessions(Mutex<Vec<Weak<AtomicBool>>>);

impl Sessions {
    fn add(&self, up: Weak<AtomicBool>) {
        let mut all = self.0.lock();
        all.retain(|u| u.strong_count() > 0);
        all.push(up);
    }

    /// Number of sessions that are up.
    pub(super) fn up(&self) -> usize {
        self.0.lock().iter().filter_map(Weak::upgrade).filter(|u| u.load(Ordering::Relaxed)).count()
    }
}

/// The peers' tasks, by address. Lives on the data thread.
pub(super) struct Directory {
    handle: Handle,
    hello: Arc<Hello>,
    config: Arc<Config>,
    events: Arc<dyn Events>,
    connector: Arc<Connector>,
    sessions: Arc<Sessions>,
    tls: Option<Arc<TlsIdentity>>,
    dial: DialList,
    refused: Repeats<()>,
    peers: HashMap<Addr, Known>,
}

struct Known {
    handle: PeerHandle,
    /// When this peer was last used.
    used: Instant,
}

impl Directory {
    pub(super) fn new(
        handle: Handle,
        hello: Arc<Hello>,
        config: Arc<Config>,
        events: Arc<dyn Events>,
        connector: Arc<Connector>,
        sessions: Arc<Sessions>,
        tls: Option<Arc<TlsIdentity>>,
    ) -> Self {
        // `Config::check` has refused a malformed list.
        let dial = DialList::new(&config.dial).unwrap_or_default();
        Self {
            handle,
            hello,
            config,
            events,
            connector,
            sessions,
            tls,
            dial,
            refused: Repeats::default(),
            peers: HashMap::new(),
        }
    }

    /// Whether this peer is unknown and the limit of known peers is reached.
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
                self.tls.clone(),
            );
            self.sessions.add(handle.up());
            Known { handle, used: Instant::now() }
        });
        known.used = Instant::now();
        &known.handle
    }
}

impl Peers for Directory {
    fn claim(&mut self, peer: &Addr, want: Want) {
        // Before a task is made: such names must not fill the list of peers.
        if !self.dial.allows_addr(peer) {
            // Such names come from clients: they are one kind, whatever they say.
            if let Some(unlogged) = self.refused.is_news(Instant::now(), ()) {
                tracing::warn!(error = %not_listed(peer), unlogged, "refused a name");
            }
            return self.events.lost(want.claim, Cause::Refused);
        }
        if self.is_full(peer) {
            let limit = self.config.limits.peers;
            tracing::warn!(%peer, limit, "the limit of known peers is reached: raise limits.peers");
            return self.events.lost(want.claim, Cause::Limit);
        }
        self.peer(peer).claim(want);
    }

    fn release(&mut self, peer: &Addr, expect: Incarnation, release: Release) {
        // A peer over the limit has no claim of ours to release; a release without a claim is left to the lease.
        if !self.is_full(peer) && self.dial.allows_addr(peer) {
            self.peer(peer).release(expect, release);
        }
    }

    fn connect(&mut self, peer: &Addr, wish: LaneWish) {
        self.peer(peer).connect_lane(wish);
    }

    fn dropped(&mut self, peer: &Addr) -> bool {
        // Commands sent since are still carried out: the task ends when its handle is gone and its work is done.
        let idle = self.peers.get(peer).is_none_or(|k| k.used.elapsed() >= self.config.session.idle / 2);
        if idle {
            self.peers.remove(peer);
        }
        idle
    }
}

/// Passes the events of the peers' tasks on to the data thread.
pub(super) struct ToPuller(pub(super) Mailbox<Mail>);

impl Events for ToPuller {
    fn welcomed(&self, peer: &Addr, welcome: Arc<Welcome>) {
        self.0.send(Mail::Puller(In::Peer(peer.clone(), welcome)));
    }

    fn granted(&self, claim: ClaimId, grant: Grant, contents: Arc<Contents>) {
        self.0.send(Mail::Puller(In::Granted(claim, grant, contents)));
    }

    fn grown(&self, claim: ClaimId, growth: Growth) {
        self.0.send(Mail::Puller(In::Grown(claim, growth)));
    }

    fn lost(&self, claim: ClaimId, cause: Cause) {
        self.0.send(Mail::Puller(In::Lost(claim, cause)));
    }

    fn connected(&self, peer: &Addr, connected: Connected) {
        let Connected { incarnation, need, lane } = connected;
        self.0.send(Mail::Puller(In::Lane { peer: peer.clone(), incarnation, need, lane }));
    }

    fn silent(&self, peer: &Addr, silent: bool) {
        self.0.send(Mail::Puller(In::Silent(peer.clone(), silent)));
    }

    fn dropped(&self, peer: &Addr) {
        self.0.send(Mail::Puller(In::Dropped(peer.clone())));
    }
}
