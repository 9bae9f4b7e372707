//! An offer, as the bench service hands it out.

use super::{BadMessage, bad, incarnation, narrow, offer_id, text};
use crate::{
    block::{BlockId, GroupId, Rank},
    control::proto,
    group::PoolLayout,
    offer::{Offer, OfferGroup, OfferRank},
};

impl From<&Offer> for proto::Offer {
    fn from(o: &Offer) -> Self {
        let rank =
            |r: &OfferRank| proto::OfferRank { rank: r.rank.0, incarnation: r.incarnation.get(), addr: r.addr.clone() };
        let group = |g: &OfferGroup| proto::OfferGroup {
            group: g.group.0.into(),
            first_position: g.first_position,
            blocks: g.blocks.iter().map(|b| b.map_or(BlockId::NULL, |b| b.0)).collect(),
        };
        Self {
            id: Some(o.id.into()),
            engine: o.engine.to_string(),
            engine_incarnation: o.incarnation.get(),
            ranks: o.ranks.iter().map(rank).collect(),
            groups: o.groups.iter().map(group).collect(),
            tokens: o.tokens,
            request: o.request.clone(),
        }
    }
}

/// An offer from the wire; `limit` bounds its blocks.
pub fn offer(o: proto::Offer, limit: usize) -> Result<Offer, BadMessage> {
    let listed: usize = o.groups.iter().map(|g| g.blocks.len()).sum();
    if listed > limit {
        return bad("groups.blocks", format!("{listed}, over the limit of {limit}"));
    }
    let mut ranks = Vec::with_capacity(o.ranks.len().min(Offer::MAX_RANKS));
    for r in o.ranks {
        let incarnation = incarnation("ranks.incarnation", r.incarnation)?;
        let addr = text("ranks.addr", r.addr, Offer::MAX_ADDR)?;
        ranks.push(OfferRank { rank: Rank(r.rank), incarnation, addr });
    }
    let mut groups = Vec::with_capacity(o.groups.len().min(PoolLayout::MAX_GROUPS));
    for g in o.groups {
        groups.push(OfferGroup {
            group: GroupId(narrow("groups.group", g.group)?),
            first_position: g.first_position,
            blocks: g.blocks.into_iter().map(|b| (b != BlockId::NULL).then_some(BlockId(b))).collect(),
        });
    }
    let offer = Offer {
        id: offer_id("id", o.id)?,
        engine: o.engine.parse().or_else(|e: crate::block::BadEngineId| bad("engine", e.to_string()))?,
        incarnation: incarnation("engine_incarnation", o.engine_incarnation)?,
        ranks,
        groups,
        tokens: o.tokens,
        request: text("request", o.request, Offer::MAX_REQUEST)?,
    };
    offer.check(limit).or_else(|e| bad("offer", e.to_string()))?;
    Ok(offer)
}
