//! The contents of an offer, from the producer's own table. A grant brings them to the consumer, which reads only by them.

use crate::{BadOffer, BlockId, Fingerprints, GroupId, Offer, offer::check_fingerprints};

/// A group's blocks for consecutive positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OfferGroup {
    /// The group.
    pub group: GroupId,
    /// Position of `blocks[0]`, in blocks from the prompt's start.
    pub first_position: u32,
    /// Block ids by position; `None` where a sliding window has left the block.
    pub blocks: Vec<Option<BlockId>>,
}

/// The contents of an offer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Contents {
    /// Tokens that can be read: the last block may be partial.
    pub tokens: u64,
    /// Whether nothing follows. Offers that grow while they are read come later; until then every offer is complete.
    pub complete: bool,
    /// What the KV was computed from.
    pub fingerprints: Fingerprints,
    /// The blocks, by group, ascending.
    pub groups: Vec<OfferGroup>,
}

impl Contents {
    /// The contents of the offer with this name: these blocks, by group.
    pub fn of(name: &Offer, groups: Vec<OfferGroup>) -> Self {
        Self { tokens: name.tokens, complete: true, fingerprints: name.fingerprints.clone(), groups }
    }

    /// Number of blocks in all groups, without null ones.
    pub fn blocks(&self) -> usize {
        self.groups.iter().map(|g| g.blocks.iter().flatten().count()).sum()
    }

    /// Checks all bounds. `limit` bounds the blocks, null ones included.
    ///
    /// # Errors
    /// A field is out of bounds.
    pub fn check(&self, limit: usize) -> Result<(), BadOffer> {
        let bad = |what: String| Err(BadOffer::Malformed(what));
        let listed: usize = self.groups.iter().map(|g| g.blocks.len()).sum();
        if listed > limit {
            return Err(BadOffer::TooManyBlocks { blocks: listed, limit });
        }
        if !self.groups.windows(2).all(|w| w[0].group < w[1].group) {
            return bad("groups do not ascend".into());
        }
        for g in &self.groups {
            if u32::try_from(g.blocks.len()).ok().and_then(|n| g.first_position.checked_add(n)).is_none() {
                return bad(format!("group {} has positions past 2^32", g.group.0));
            }
            if g.blocks.iter().flatten().any(|b| b.0 == BlockId::NULL) {
                return bad(format!("group {} contains block {}, which means no block", g.group.0, BlockId::NULL));
            }
        }
        check_fingerprints(&self.fingerprints).or_else(bad)
    }

    /// Checks that a name says the same as these contents. A name passes through routers and clients: if it says another
    /// token count, the engine would take a partial block for a whole one; with another fingerprint, it would take one
    /// prompt's KV for another's.
    ///
    /// # Errors
    /// The difference, for a log.
    pub fn fits(&self, name: &Offer) -> Result<(), String> {
        if !self.complete {
            return Err("the offer still grows, which this build cannot read".into());
        }
        if self.tokens != name.tokens {
            return Err(format!("the name says {} tokens, and the producer offered {}", name.tokens, self.tokens));
        }
        if self.fingerprints != name.fingerprints {
            return Err("the name says other fingerprints than the producer offered".into());
        }
        Ok(())
    }
}
