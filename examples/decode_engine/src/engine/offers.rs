//! Offers of the KV of finished prompts. The blocks stay unchanged until the offer is freed: released after a pull, or
//! revoked when its lease ends.

use kvferry::{Freed, GroupId, Offer, OfferGroup, OfferSpec, Ready};

use super::Engine;
use crate::{api::fingerprints, kv::BLOCK, request::Req};

impl Engine {
    /// Offers the prompt of a finished request. `None` if it cannot be offered.
    pub(super) fn offer(&mut self, r: &mut Req) -> Option<Box<Offer>> {
        let producer = self.link.producer.as_ref().filter(|_| r.job.produce)?;
        let blocks = r.tables[0].get(..r.job.prompt.len().div_ceil(BLOCK))?.to_vec();
        let kept: Vec<_> = blocks.iter().flatten().copied().collect();
        let groups = vec![OfferGroup { group: GroupId(0), first_position: 0, blocks }];
        let request: String = r.job.name.chars().take(Offer::MAX_REQUEST / 4).collect();
        let spec = OfferSpec::new(r.prompt(), groups).request(request).fingerprints(fingerprints(&r.job.prompt));
        match producer.offer(spec, Ready::Now) {
            Ok(offer) => {
                kept.iter().for_each(|b| self.blocks.retain(*b));
                self.offers.insert(offer.id, kept);
                Some(Box::new(offer))
            }
            Err(e) => {
                tracing::warn!(request = %r.job.name, "its KV cannot be offered: {e}");
                None
            }
        }
    }

    /// Takes the blocks of a freed offer back.
    pub(super) fn freed(&mut self, freed: Freed) {
        for b in self.offers.remove(&freed.offer).into_iter().flatten().rev() {
            self.blocks.release(b);
        }
    }
}
