//! An offer: a *name* for blocks that stay put for a request. Small, self-contained, JSON or protobuf. It contains no time
//! and no key, so a router may log it.

use serde::{Deserialize, Serialize};

use crate::{BlockId, EngineId, GroupId, Incarnation, OfferId, Rank};

/// A name for blocks that a producer engine keeps until they are pulled, released or revoked.
///
/// ```
/// # use kvferry_proto::Offer;
/// let text = r#"{"id":"00000000000000010000000000000002","engine":"prefill-0","incarnation":"00000000000000aa",
///   "ranks":[{"rank":0,"incarnation":"00000000000000aa","addr":"127.0.0.1:7400"}],
///   "groups":[{"group":0,"first_position":0,"blocks":[3,1,null]}],"tokens":40,"request":"req-1"}"#;
/// let offer = Offer::from_json(text)?;
/// assert_eq!(offer.groups[0].blocks[2], None);
/// assert_eq!(Offer::from_json(&offer.to_json())?, offer);
/// # Ok::<(), kvferry_proto::BadOffer>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Offer {
    /// The format's version. A name of a newer version may have fields that this one does not know: they are ignored.
    #[serde(default = "first_version")]
    pub version: u32,
    /// The offer's id.
    pub id: OfferId,
    /// The engine that made the offer.
    pub engine: EngineId,
    /// The engine's incarnation, minted from all its ranks'.
    pub incarnation: Incarnation,
    /// The engine's ranks, ascending.
    pub ranks: Vec<OfferRank>,
    /// The blocks, by group.
    pub groups: Vec<OfferGroup>,
    /// Tokens that the blocks hold. The last block may be partial.
    pub tokens: u64,
    /// The producer's request id, for logs.
    #[serde(default)]
    pub request: String,
}

/// One rank of the engine that made the offer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferRank {
    /// The rank.
    pub rank: Rank,
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// `HOST:PORT` of its control plane.
    pub addr: String,
}

/// A group's blocks for consecutive positions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferGroup {
    /// The group.
    pub group: GroupId,
    /// Position of `blocks[0]`, in blocks from the prompt's start.
    pub first_position: u32,
    /// Block ids by position; `None` where a sliding window has left the block.
    pub blocks: Vec<Option<BlockId>>,
}

/// An offer that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadOffer {
    /// The text is not the JSON of an offer.
    #[error("the offer is unreadable: {0}; pass on the producer's offer unchanged")]
    Json(String),
    /// A field is missing, repeated, or out of bounds.
    #[error("the offer is malformed: {0}; pass on the producer's offer unchanged")]
    Malformed(String),
    /// The offer has more blocks than a pull may have.
    #[error(
        "the offer names {blocks} blocks, over the limit of {limit}; raise limits.blocks_per_offer if this is intended"
    )]
    TooManyBlocks {
        /// Blocks in the offer.
        blocks: usize,
        /// The limit.
        limit: usize,
    },
}

fn first_version() -> u32 {
    1
}

impl Offer {
    /// The version of the format that this build writes. Names without a version are of version 1.
    pub const VERSION: u32 = 1;
    /// Most ranks in an offer.
    pub const MAX_RANKS: usize = 1024;
    /// Longest address, in bytes.
    pub const MAX_ADDR: usize = 256;
    /// Longest request id, in bytes.
    pub const MAX_REQUEST: usize = 1024;

    /// An offer of these blocks, which hold `tokens` tokens, for no request in particular.
    pub fn new(
        id: OfferId,
        engine: EngineId,
        incarnation: Incarnation,
        ranks: Vec<OfferRank>,
        tokens: u64,
        groups: Vec<OfferGroup>,
    ) -> Self {
        Self { version: Self::VERSION, id, engine, incarnation, ranks, groups, tokens, request: String::new() }
    }

    /// Sets the producer's request id, for logs.
    pub fn request(mut self, request: impl Into<String>) -> Self {
        self.request = request.into();
        self
    }

    /// The offer as JSON, on one line.
    pub fn to_json(&self) -> String {
        // Every field is a number, a string or a list of them: serialising cannot fail.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Parses the text of [`Offer::to_json`]. Does not check the bounds, see [`Offer::check`].
    ///
    /// # Errors
    /// The text is not the JSON of an offer.
    pub fn from_json(text: &str) -> Result<Self, BadOffer> {
        serde_json::from_str(text).map_err(|e| BadOffer::Json(e.to_string()))
    }

    /// Number of blocks in all groups, without null ones.
    pub fn blocks(&self) -> usize {
        self.groups.iter().map(|g| g.blocks.iter().flatten().count()).sum()
    }

    /// Checks all bounds. An offer may come from any source. `limit` bounds its blocks, null ones included.
    ///
    /// # Errors
    /// A field is missing, repeated, or out of bounds.
    pub fn check(&self, limit: usize) -> Result<(), BadOffer> {
        let bad = |what: String| Err(BadOffer::Malformed(what));
        if self.version == 0 {
            return bad("version 0, where the first is 1".into());
        }
        let listed: usize = self.groups.iter().map(|g| g.blocks.len()).sum();
        if listed > limit {
            return Err(BadOffer::TooManyBlocks { blocks: listed, limit });
        }
        if self.ranks.is_empty() || self.ranks.len() > Self::MAX_RANKS {
            return bad(format!("{} ranks, not 1 to {}", self.ranks.len(), Self::MAX_RANKS));
        }
        if !self.ranks.windows(2).all(|w| w[0].rank < w[1].rank) {
            return bad("ranks do not ascend".into());
        }
        if let Some(r) = self.ranks.iter().find(|r| r.addr.is_empty() || r.addr.len() > Self::MAX_ADDR) {
            return bad(format!("rank {} has no address, or one longer than {} bytes", r.rank, Self::MAX_ADDR));
        }
        // Refuse a bad address here: otherwise the pull fails only at its deadline.
        let reachable = |a: &str| {
            a.rsplit_once(':').is_some_and(|(host, port)| {
                let bracketed = host.starts_with('[') && host.ends_with(']');
                let plain = !host.contains([':', '[', ']', ' ']) && !host.is_empty();
                (bracketed || plain) && port.parse::<u16>().is_ok_and(|p| p > 0)
            })
        };
        if let Some(r) = self.ranks.iter().find(|r| !reachable(&r.addr)) {
            return bad(format!("the address {1:?} of rank {0} is not a HOST:PORT", r.rank, r.addr));
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
        if self.request.len() > Self::MAX_REQUEST {
            return bad(format!("the request id is longer than {} bytes", Self::MAX_REQUEST));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, option, prelude::*};

    #[test]
    fn a_malformed_address_is_refused_at_once() {
        let offer = |addr: &str| {
            let incarnation = Incarnation::random();
            Offer::new(
                OfferId::random(),
                "prefill".parse().unwrap(),
                incarnation,
                vec![OfferRank { rank: Rank(0), incarnation, addr: addr.into() }],
                1,
                vec![],
            )
        };
        for good in ["10.0.0.1:7400", "prefill-3.rack:1", "[fe80::1]:65535"] {
            assert_eq!(offer(good).check(10), Ok(()), "{good}");
        }
        for bad in ["", "10.0.0.1", "10.0.0.1:", ":7400", "a:0", "a:65536", "not an address", "[fe80::1"] {
            assert!(matches!(offer(bad).check(10), Err(BadOffer::Malformed(_))), "{bad}");
        }
    }

    #[test]
    fn a_name_of_a_newer_version_is_read_and_its_unknown_fields_are_ignored() {
        let text = r#"{"version":7,"id":"00000000000000010000000000000002","engine":"e","incarnation":"00000000000000aa",
          "ranks":[{"rank":0,"incarnation":"00000000000000aa","addr":"127.0.0.1:7400","zone":"b"}],"colour":"red",
          "groups":[{"group":0,"first_position":0,"blocks":[3],"sparse":true}],"tokens":16}"#;
        let offer = Offer::from_json(text).unwrap();
        assert_eq!((offer.version, offer.blocks(), offer.check(1)), (7, 1, Ok(())));
        let first = Offer::from_json(&text.replace(r#""version":7,"#, "")).unwrap();
        assert_eq!(first.version, 1, "names without a version are of the first");
        assert!(Offer::from_json(&text.replace(":7,", ":0,")).unwrap().check(1).is_err());
    }

    fn offers() -> impl Strategy<Value = Offer> {
        let ranks = vec((any::<u64>(), "[a-z0-9.]{1,20}:[1-9][0-9]{0,3}"), 1..4);
        let groups = vec((0u32..1000, vec(option::of(0u32..1000), 0..20)), 0..4);
        ("[a-z0-9-]{1,20}", ranks, groups, any::<u64>(), "[a-z0-9 ]{0,20}").prop_map(
            |(engine, ranks, groups, tokens, request)| {
                Offer::new(
                    OfferId::random(),
                    engine.parse().unwrap(),
                    Incarnation::random(),
                    ranks
                        .into_iter()
                        .enumerate()
                        .map(|(i, (incarnation, addr))| OfferRank {
                            rank: Rank(i as u32),
                            incarnation: Incarnation::from_wire(incarnation.max(1)).unwrap(),
                            addr,
                        })
                        .collect(),
                    tokens,
                    groups
                        .into_iter()
                        .enumerate()
                        .map(|(i, (first_position, blocks))| OfferGroup {
                            group: GroupId(i as u16),
                            first_position,
                            blocks: blocks.into_iter().map(|b| b.map(BlockId)).collect(),
                        })
                        .collect(),
                )
                .request(request)
            },
        )
    }

    proptest! {
        #[test]
        fn an_offer_survives_json_and_a_changed_byte_never_panics(
            offer in offers(), at in any::<prop::sample::Index>(), byte in any::<u8>(),
        ) {
            let text = offer.to_json();
            prop_assert_eq!(Offer::from_json(&text), Ok(offer));
            let mut bytes = text.into_bytes();
            let i = at.index(bytes.len());
            bytes[i] = byte;
            if let Ok(o) = Offer::from_json(&String::from_utf8_lossy(&bytes)) {
                let _ = o.check(1000);
            }
        }
    }
}
