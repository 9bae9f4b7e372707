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
    BadOffer, Growth, Offer, OfferError, OfferGroup, OfferId, PeerId, PoolLayout,
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

    /// Opens an offer before its blocks are computed: consumers claim it at once, and read its blocks as they are computed, see
    /// [`Producer::grow`]. `spec.tokens` is the number of tokens in the whole prompt; `spec.groups` is empty. No lease runs before
    /// [`Producer::finish`], except that a consumer that claimed the offer and went silent ends it.
    ///
    /// # Errors
    /// The spec has blocks or is out of bounds, the id was used before, or the table is full or draining.
    pub fn open(&self, spec: OfferSpec) -> Result<Offer, OfferError> {
        let (name, groups) = self.core.name(spec);
        if !groups.is_empty() {
            return Err(BadOffer::Malformed("an open offer starts without blocks: add them with `grow`".into()).into());
        }
        self.core.enter_open(&name)?;
        Ok(name)
    }

    /// Opens an offer like [`Producer::open`] under a name that was made elsewhere. Claims that wait for it are granted now.
    ///
    /// # Errors
    /// The name is out of bounds, the id was used before, or the table is full or draining.
    pub fn enter_open(&self, name: &Offer) -> Result<(), OfferError> {
        self.core.enter_open(name)
    }

    /// Appends blocks to an open offer and moves its mark. Each group's list begins at the position after its last one; the first
    /// list of a group may begin anywhere. `tokens` counts the tokens from the prompt's start that are computed in all groups:
    /// a block is read once the mark is past its last token, so blocks may be listed before they are full.
    ///
    /// Growths become readable in the order of the calls: now, or when the work is done that the stream of `ready` holds now. If
    /// that work fails, the offer is revoked.
    ///
    /// A consumer's release ends an open offer too. [`Producer::poll_freed`] may therefore return an offer whose prefill still
    /// runs: nothing reads its blocks any more, and the prefill may go on.
    ///
    /// # Errors
    /// The offer has ended or is finished, `ready` is [`Ready::Later`], or the growth does not follow or is out of bounds.
    pub fn grow(&self, offer: OfferId, blocks: Vec<OfferGroup>, tokens: u64, ready: Ready) -> Result<(), OfferError> {
        self.core.grow(offer, Growth { tokens, complete: false, groups: blocks }, ready)
    }

    /// Finishes an open offer, once all its growths are readable: nothing follows, and its partial last block can be read. From
    /// then on it has the lease of any offer.
    ///
    /// # Errors
    /// The offer has ended or is finished, or its name says another number of tokens.
    pub fn finish(&self, offer: OfferId, tokens: u64) -> Result<(), OfferError> {
        self.core.grow(offer, Growth { tokens, complete: true, groups: Vec::new() }, Ready::Now)
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
