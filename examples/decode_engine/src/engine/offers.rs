//! Offers of prompts' KV. The blocks stay unchanged until the offer is freed: released after a pull, or revoked when its
//! lease ends.
//!
//! An offer is made when the request has finished, or it is opened when the request is admitted and grows with each step. Until
//! the prompt is complete, the blocks of a growing offer are those of its request. It ends before they are released.

use std::collections::HashSet;

use kvferry::{BlockId, GroupId, Offer, OfferError, OfferGroup, OfferId, OfferSpec, Ready};

use super::Engine;
use crate::{api::fingerprints, kv::BLOCK, request::Req};

fn list(first: usize, blocks: &[Option<BlockId>]) -> Vec<OfferGroup> {
    vec![OfferGroup { group: GroupId(0), first_position: first as u32, blocks: blocks.to_vec() }]
}

impl Engine {
    /// Offers the prompt of a finished request. `None` if it cannot be offered.
    pub(super) fn offer(&mut self, r: &mut Req) -> Option<Box<Offer>> {
        let producer = self.link.producer.as_ref().filter(|_| r.job.produce)?;
        let blocks = r.tables[0].get(..r.job.prompt.len().div_ceil(BLOCK))?;
        let request: String = r.job.name.chars().take(Offer::MAX_REQUEST / 4).collect();
        let spec =
            OfferSpec::new(r.prompt(), list(0, blocks)).request(request).fingerprints(fingerprints(&r.job.prompt));
        match producer.offer(spec, Ready::Now) {
            Ok(offer) => {
                self.keep(offer.id, r);
                Some(Box::new(offer))
            }
            Err(e) => {
                tracing::warn!(request = %r.job.name, "its KV cannot be offered: {e}");
                None
            }
        }
    }

    /// Keeps the blocks of a request's prompt until its offer is freed.
    fn keep(&mut self, offer: OfferId, r: &Req) {
        let kept: Vec<_> = r.table().iter().take(r.job.prompt.len().div_ceil(BLOCK)).flatten().copied().collect();
        kept.iter().for_each(|b| self.blocks.retain(*b));
        self.offers.insert(offer, kept);
    }

    /// Takes the blocks of a freed offer back.
    pub(super) fn take_back(&mut self, offer: OfferId) {
        for b in self.offers.remove(&offer).into_iter().flatten().rev() {
            self.blocks.release(b);
        }
    }

    /// Opens the growing offers of requests that hold blocks, and adds the blocks that are filled now.
    pub(super) fn grow_offers(&mut self) {
        if self.running.iter().all(|r| r.job.growing.is_none()) {
            return;
        }
        // Another request may find the blocks in the prefix cache that this step fills.
        let step = |r: &Req| r.held.total() as usize / BLOCK..(r.ran_to() as usize).div_ceil(BLOCK);
        let in_step = self.running.iter().filter(|r| r.scheduled > 0);
        let unfilled: HashSet<BlockId> =
            in_step.filter_map(|r| r.table().get(step(r))).flatten().flatten().copied().collect();
        let mut running = std::mem::take(&mut self.running);
        for r in running.iter_mut().filter(|r| r.job.growing.is_some() && !r.gone && r.load.is_none()) {
            if let Err(e) = self.grow(r, &unfilled) {
                // For example, its consumer is gone and has released it.
                tracing::info!(request = %r.job.name, "its offer no longer grows: {e}");
                match e {
                    // The name belongs to another request.
                    OfferError::Duplicate(_) => r.job.growing = None,
                    _ => self.withdraw(r),
                }
            }
        }
        self.running = running;
    }

    fn grow(&mut self, r: &mut Req, unfilled: &HashSet<BlockId>) -> Result<(), OfferError> {
        let (Some(producer), Some(name)) = (self.link.producer.clone(), &r.job.growing) else { return Ok(()) };
        let (offer, prompt) = (name.id, r.job.prompt.len());
        if r.listed.is_none() {
            producer.enter_open(name)?;
        }
        let listed = *r.listed.get_or_insert(0);
        let filled = |b: &&Option<BlockId>| b.is_some_and(|b| !unfilled.contains(&b));
        let held = prompt.min(r.held.total() as usize);
        let full = r.table().iter().take(held / BLOCK).take_while(filled).count();
        let complete = held == prompt && full == prompt / BLOCK;
        let (to, tokens) = if complete { (prompt.div_ceil(BLOCK), prompt) } else { (full, full * BLOCK) };
        if to > listed {
            producer.grow(offer, list(listed, &r.table()[listed..to]), tokens as u64, Ready::Now)?;
            r.listed = Some(to);
        }
        if complete {
            // From here on its consumers may free it.
            self.keep(offer, r);
            r.job.growing = None;
            producer.finish(offer, tokens as u64).inspect_err(|_| self.take_back(offer))?;
        }
        Ok(())
    }

    /// Ends the offer of a request whose prompt will not be complete, before its blocks are released. Consumers keep what they
    /// have loaded, and others do not wait for the offer.
    pub(super) fn withdraw(&mut self, r: &mut Req) {
        if let (Some(name), Some(producer)) = (r.job.growing.take(), &self.link.producer) {
            producer.revoke(name.id);
        }
    }
}
