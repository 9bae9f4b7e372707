//! The producer: what a prefill engine's rank holds to offer blocks of its memory.
//!
//! [`Producer::offer`] offers blocks that will stay unchanged; the offer's name goes through the router to the decode side.
//! The engine keeps the blocks as they are until [`Producer::poll_freed`] returns the offer. That happens whatever the
//! consumers do: they release it, or it is revoked at the end of its lease.

mod builder;
mod core;
mod shares;
mod spec;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kvferry_proto::{
    Offer, OfferError, OfferGroup, OfferId, PeerId, PoolLayout,
    table::{self, Freed},
};

use self::core::Core;
use crate::{control::server::Server, driver::runtime::Runtime, memory::Memory, metrics::ProducerMetrics};

pub use self::{
    builder::Builder,
    spec::{OfferSpec, Ready},
};

/// A prefill engine's rank.
pub struct Producer {
    core: Arc<Core>,
    server: Option<Server>,
    _runtime: Runtime,
}

impl Producer {
    /// This rank's identity.
    pub fn me(&self) -> &PeerId {
        &self.core.me
    }

    /// `HOST:PORT` of its control plane, as offers name it.
    pub fn addr(&self) -> &str {
        &self.core.addr
    }

    /// The memory whose blocks are offered.
    pub fn memory(&self) -> &Memory {
        &self.core.export.memory
    }

    /// The layout of that memory.
    pub fn layout(&self) -> &Arc<PoolLayout> {
        &self.core.export.layout
    }

    /// Offers blocks of an engine of one rank. They must stay as they are until the offer is freed.
    pub fn offer(&self, spec: OfferSpec, ready: Ready) -> Result<Offer, OfferError> {
        let (name, groups) = self.core.name(spec);
        self.core.enter(&name, groups, ready)?;
        Ok(name)
    }

    /// Enters an offer of these blocks, by group, under a name that was made elsewhere, such as by the engine's scheduler for
    /// all of its ranks: each rank enters the same lists. Claims that came before it are granted from now on.
    ///
    /// # Errors
    /// The name or the blocks are out of bounds, the id was used before, or the table is full or draining.
    pub fn enter(&self, name: &Offer, groups: Vec<OfferGroup>, ready: Ready) -> Result<(), OfferError> {
        self.core.enter(name, groups, ready)
    }

    /// The work that fills the offer's blocks is done: consumers can claim it.
    pub fn ready(&self, offer: OfferId) {
        self.core.tell(table::In::Ready(offer));
    }

    /// Takes an offer back, claimed or not. Its blocks are freed with the next [`Producer::poll_freed`]; current readers
    /// will not count them as loaded. A name that was given away and never entered can be revoked too: it cannot be
    /// entered any more, and waiting claims are answered at once.
    pub fn revoke(&self, offer: OfferId) {
        self.core.tell(table::In::Revoke(offer));
    }

    /// Makes no new offers. Live offers can still be claimed and pulled.
    pub fn drain(&self) {
        self.core.tell(table::In::Drain);
    }

    /// Takes back every offer that nobody has claimed: for the end of an engine, after [`Producer::drain`].
    pub fn revoke_unclaimed(&self) {
        self.core.tell(table::In::RevokeUnclaimed);
    }

    /// The next offer whose blocks may be used again, if there is one. Call it once an engine step: it never blocks, and
    /// it first ends every lease that has run out.
    pub fn poll_freed(&self) -> Option<Freed> {
        if let Some(f) = self.core.freed.lock().pop_front() {
            return Some(f);
        }
        self.core.tick(Instant::now());
        self.core.freed.lock().pop_front()
    }

    /// Waits for the next freed offer, for `timeout` at most.
    pub fn wait_freed(&self, timeout: Duration) -> Option<Freed> {
        let mut freed = self.core.freed.lock();
        self.core.freed_now.wait_while_for(&mut freed, |f| f.is_empty(), timeout);
        freed.pop_front()
    }

    /// Whether there is a freed offer that [`Producer::poll_freed`] would return. Waits for one, for `timeout` at most, and leaves
    /// it there.
    pub fn has_freed(&self, timeout: Duration) -> bool {
        let mut freed = self.core.freed.lock();
        self.core.freed_now.wait_while_for(&mut freed, |f| f.is_empty(), timeout);
        !freed.is_empty()
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

    /// Number of live offers, and of claims on them.
    pub fn live(&self) -> (usize, usize) {
        let state = self.core.lock();
        (state.table.live(), state.table.claims())
    }

    /// This producer's metrics, to register in the engine's registry.
    pub fn metrics(&self) -> &ProducerMetrics {
        &self.core.metrics
    }

    /// Number of open sessions.
    pub fn sessions(&self) -> usize {
        self.core.lock().sessions.len()
    }

    /// The consumers whose sessions are open, one entry for each session.
    pub fn consumers(&self) -> Vec<PeerId> {
        self.core.consumers()
    }

    /// See [`Server::refusals`].
    #[cfg(test)]
    pub(crate) fn refused(&self, from: std::net::IpAddr, kind: &'static str) -> Option<u64> {
        self.server.as_ref().and_then(|s| s.refusals(from, kind))
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        // Sessions first, so that no consumer requests a lane that is going away.
        drop(self.server.take());
    }
}
