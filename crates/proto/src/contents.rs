//! The contents of an offer, from the producer's own table. A grant brings them to the consumer, which reads only by them.
//!
//! An offer may grow while its prefill runs: blocks are appended to its lists, and its mark moves. Nothing in it ever changes
//! or leaves.

use std::collections::BTreeMap;

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
    /// The mark: tokens, from the prompt's start, that are computed. Until the contents are complete, only blocks whose last
    /// token is among them can be read.
    pub tokens: u64,
    /// Tokens when the contents are complete. The last block may be partial.
    pub whole: u64,
    /// Whether nothing follows.
    pub complete: bool,
    /// What the KV was computed from.
    pub fingerprints: Fingerprints,
    /// The blocks, by group, ascending.
    pub groups: Vec<OfferGroup>,
}

/// An offer's gain: blocks behind those that it has, and a new mark.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Growth {
    /// The new mark.
    pub tokens: u64,
    /// Whether nothing follows.
    pub complete: bool,
    /// The blocks, by group, ascending. Each list begins where the group's list in the offer ends; the first list of a group
    /// may begin anywhere.
    pub groups: Vec<OfferGroup>,
}

impl Growth {
    /// Whether it brings nothing to an offer with this mark.
    pub fn is_empty_after(&self, tokens: u64) -> bool {
        self.tokens == tokens && !self.complete && self.groups.iter().all(|g| g.blocks.is_empty())
    }
}

/// How far contents have grown.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Extent {
    tokens: u64,
    whole: u64,
    complete: bool,
    /// By group, the position after the last block.
    ends: BTreeMap<GroupId, u32>,
    /// Blocks in all lists, null ones included.
    listed: usize,
}

impl Extent {
    /// The extent of these contents, which have been checked.
    pub fn of(contents: &Contents) -> Self {
        let end = |g: &OfferGroup| g.first_position.saturating_add(u32::try_from(g.blocks.len()).unwrap_or(u32::MAX));
        Self {
            tokens: contents.tokens,
            whole: contents.whole,
            complete: contents.complete,
            ends: contents.groups.iter().map(|g| (g.group, end(g))).collect(),
            listed: contents.groups.iter().map(|g| g.blocks.len()).sum(),
        }
    }

    /// The mark.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Whether nothing follows.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Whether these contents reach at least as far as the other ones of the same offer.
    pub fn covers(&self, other: &Self) -> bool {
        self.tokens >= other.tokens
            && self.complete >= other.complete
            && other.ends.iter().all(|(group, end)| self.ends.get(group) >= Some(end))
    }

    /// Adds a growth. `limit` bounds the blocks of the offer, null ones included.
    ///
    /// # Errors
    /// It does not follow, or a field is out of bounds. The extent is as before.
    pub fn grow(&mut self, growth: &Growth, limit: usize) -> Result<(), BadOffer> {
        let bad = |what: String| Err(BadOffer::Malformed(what));
        if self.complete {
            return bad("it grows after it was finished".into());
        }
        if growth.is_empty_after(self.tokens) {
            return bad("a growth brings nothing".into());
        }
        if growth.tokens < self.tokens || growth.tokens > self.whole {
            return bad(format!("its mark moves from {} to {} of {} tokens", self.tokens, growth.tokens, self.whole));
        }
        if growth.complete && growth.tokens != self.whole {
            return bad(format!("it is finished with {} tokens, and its name says {}", growth.tokens, self.whole));
        }
        let listed = growth.groups.iter().map(|g| g.blocks.len()).sum::<usize>().saturating_add(self.listed);
        if listed > limit {
            return Err(BadOffer::TooManyBlocks { blocks: listed, limit });
        }
        check_groups(&growth.groups)?;
        for g in &growth.groups {
            if g.blocks.is_empty() {
                return bad(format!("the growth of group {} has no blocks", g.group.0));
            }
            if self.ends.get(&g.group).is_some_and(|end| *end != g.first_position) {
                return bad(format!("the new blocks of group {} do not follow the earlier ones", g.group.0));
            }
        }
        for g in &growth.groups {
            self.ends.insert(g.group, g.first_position + g.blocks.len() as u32);
        }
        (self.tokens, self.complete, self.listed) = (growth.tokens, growth.complete, listed);
        Ok(())
    }
}

impl Contents {
    /// The contents of the offer with this name: these blocks, by group.
    pub fn of(name: &Offer, groups: Vec<OfferGroup>) -> Self {
        let (tokens, fingerprints) = (name.tokens, name.fingerprints.clone());
        Self { tokens, whole: tokens, complete: true, fingerprints, groups }
    }

    /// The contents of the offer with this name before anything is computed.
    pub fn open(name: &Offer) -> Self {
        Self { whole: name.tokens, fingerprints: name.fingerprints.clone(), ..Self::default() }
    }

    /// Number of blocks in all groups, without null ones.
    pub fn blocks(&self) -> usize {
        self.groups.iter().map(|g| g.blocks.iter().flatten().count()).sum()
    }

    /// Whether a listed block can be read: the one at this position of a group with `block_tokens` tokens in a block.
    pub fn is_readable(&self, block_tokens: u32, position: u32) -> bool {
        self.complete || is_below(self.tokens, block_tokens, position)
    }

    /// Adds a growth. `limit` bounds the blocks, null ones included.
    ///
    /// # Errors
    /// It does not follow, or a field is out of bounds. The contents are as before.
    pub fn grow(&mut self, growth: &Growth, limit: usize) -> Result<(), BadOffer> {
        Extent::of(self).grow(growth, limit)?;
        for g in &growth.groups {
            match self.groups.binary_search_by_key(&g.group, |have| have.group) {
                Ok(at) => self.groups[at].blocks.extend_from_slice(&g.blocks),
                Err(at) => self.groups.insert(at, g.clone()),
            }
        }
        (self.tokens, self.complete) = (growth.tokens, growth.complete);
        Ok(())
    }

    /// The blocks and the mark that were added after `earlier`.
    pub fn since(&self, earlier: &Extent) -> Growth {
        let gain = |g: &OfferGroup| {
            let first_position = earlier.ends.get(&g.group).copied().unwrap_or(g.first_position);
            let blocks = g.blocks.get((first_position - g.first_position) as usize..).unwrap_or_default().to_vec();
            (!blocks.is_empty()).then_some(OfferGroup { group: g.group, first_position, blocks })
        };
        let groups = self.groups.iter().filter_map(gain).collect();
        Growth { tokens: self.tokens, complete: self.complete, groups }
    }

    /// Whether both can be contents of one offer: where both list blocks, they list the same ones.
    pub fn agrees(&self, other: &Self) -> bool {
        if self.complete && other.complete {
            return self == other;
        }
        let fits = |a: &Self, b: &Self| {
            a.groups.iter().all(|g| match b.groups.iter().find(|o| o.group == g.group) {
                Some(o) => {
                    let both = g.blocks.len().min(o.blocks.len());
                    g.first_position == o.first_position
                        && g.blocks[..both] == o.blocks[..both]
                        && (!b.complete || g.blocks.len() <= o.blocks.len())
                }
                None => !b.complete,
            })
        };
        let same = self.whole == other.whole && self.fingerprints == other.fingerprints;
        same && fits(self, other) && fits(other, self)
    }

    /// Checks all bounds. `limit` bounds the blocks, null ones included.
    ///
    /// # Errors
    /// A field is out of bounds.
    pub fn check(&self, limit: usize) -> Result<(), BadOffer> {
        let listed: usize = self.groups.iter().map(|g| g.blocks.len()).sum();
        if listed > limit {
            return Err(BadOffer::TooManyBlocks { blocks: listed, limit });
        }
        if self.tokens > self.whole || (self.complete && self.tokens != self.whole) {
            let what = format!("{} tokens are readable, of {} in all", self.tokens, self.whole);
            return Err(BadOffer::Malformed(what));
        }
        check_groups(&self.groups)?;
        check_fingerprints(&self.fingerprints).map_err(BadOffer::Malformed)
    }

    /// Checks that a name says the same as these contents. A name passes through routers and clients: if it says another
    /// token count, the engine would take a partial block for a whole one; with another fingerprint, it would take one
    /// prompt's KV for another's.
    ///
    /// # Errors
    /// The difference, for a log.
    pub fn fits(&self, name: &Offer) -> Result<(), String> {
        if self.whole != name.tokens {
            return Err(format!("the name says {} tokens, and the producer offered {}", name.tokens, self.whole));
        }
        if self.fingerprints != name.fingerprints {
            return Err("the name says other fingerprints than the producer offered".into());
        }
        Ok(())
    }
}

/// Whether the block at a position is below a mark with its last token.
pub(crate) fn is_below(mark: u64, block_tokens: u32, position: u32) -> bool {
    (u64::from(position) + 1) * u64::from(block_tokens) <= mark
}

/// Checks the bounds of lists of blocks.
fn check_groups(groups: &[OfferGroup]) -> Result<(), BadOffer> {
    let bad = |what: String| Err(BadOffer::Malformed(what));
    if !groups.windows(2).all(|w| w[0].group < w[1].group) {
        return bad("groups do not ascend".into());
    }
    for g in groups {
        if u32::try_from(g.blocks.len()).ok().and_then(|n| g.first_position.checked_add(n)).is_none() {
            return bad(format!("group {} has positions past 2^32", g.group.0));
        }
        if g.blocks.iter().flatten().any(|b| b.0 == BlockId::NULL) {
            return bad(format!("group {} contains block {}, which means no block", g.group.0, BlockId::NULL));
        }
    }
    Ok(())
}
