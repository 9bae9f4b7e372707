//! The session's frames.

use std::sync::Arc;

use kvferry_proto::{
    BlockId, ClaimId, ClientBody, ClientFrame, Contents, Gone, Grant, GroupId, Growth, Nonce, Offer, OfferGroup,
    Release, ServerBody, ServerFrame,
};

use super::check::{
    BadMessage, Checked, bad, claim_id, incarnation, millis, narrow, offer_id, peer, present, reader, time, token,
    within,
};
use crate::control::proto::{self, client_frame::Frame as C, server_frame::Frame as S};

impl From<ClientFrame> for proto::ClientFrame {
    fn from(f: ClientFrame) -> Self {
        let frame = match f.body {
            ClientBody::Open { from, expect } => {
                C::Open(proto::Open { from: Some((&from).into()), expect_incarnation: expect.get() })
            }
            ClientBody::Ping(number) => C::Ping(proto::Ping { number }),
            ClientBody::Claim { claim, offer, token, number, reader, awaited } => C::Claim(proto::Claim {
                claim: claim.0,
                offer: Some(offer.into()),
                reader: reader.index,
                readers: reader.of,
                token: token.to_bytes().to_vec().into(),
                number,
                awaited,
            }),
            ClientBody::Renew(claims) => C::Renew(proto::Renew { claims: claims.into_iter().map(|c| c.0).collect() }),
            ClientBody::Release(r) => C::Release(proto::Unclaim {
                claim: r.claim.map_or(0, |c| c.0),
                offer: Some(r.offer.into()),
                reader: r.reader.index,
                readers: r.reader.of,
                all: r.all,
                token: r.token.to_bytes().to_vec().into(),
            }),
        };
        Self { seq: f.seq, frame: Some(frame) }
    }
}

impl TryFrom<proto::ClientFrame> for ClientFrame {
    type Error = BadMessage;
    fn try_from(f: proto::ClientFrame) -> Checked<Self> {
        let body = match present("frame", f.frame)? {
            C::Open(o) => within("open", open(o))?,
            C::Ping(p) => ClientBody::Ping(p.number),
            C::Claim(c) => within("claim", claim(c))?,
            C::Renew(r) => within("renew", renew(r))?,
            C::Release(u) => {
                if f.seq == 0 {
                    return bad("seq", "is zero, so that this release cannot be acknowledged");
                }
                ClientBody::Release(within("release", unclaim(u))?)
            }
        };
        Ok(Self { seq: f.seq, body })
    }
}

/// Most claims in one `Renew`; a session with more sends several.
pub(in crate::control) const MAX_RENEW: usize = 4096;

fn open(o: proto::Open) -> Checked<ClientBody> {
    Ok(ClientBody::Open {
        from: peer("from", o.from)?,
        expect: incarnation("expect_incarnation", o.expect_incarnation)?,
    })
}

fn claim(c: proto::Claim) -> Checked<ClientBody> {
    Ok(ClientBody::Claim {
        claim: claim_id("claim", c.claim)?,
        offer: offer_id("offer", c.offer)?,
        token: token("token", &c.token)?,
        number: c.number,
        reader: reader(c.reader, c.readers)?,
        awaited: c.awaited,
    })
}

fn renew(r: proto::Renew) -> Checked<ClientBody> {
    if r.claims.len() > MAX_RENEW {
        return bad("claims", format!("{}, over the limit of {MAX_RENEW}", r.claims.len()));
    }
    let claims: Checked<Vec<_>> = r.claims.into_iter().map(|c| claim_id("claims", c)).collect();
    Ok(ClientBody::Renew(claims?))
}

fn unclaim(u: proto::Unclaim) -> Checked<Release> {
    Ok(Release {
        claim: (u.claim != 0).then_some(ClaimId(u.claim)),
        offer: offer_id("offer", u.offer)?,
        token: token("token", &u.token)?,
        reader: reader(u.reader, u.readers)?,
        all: u.all,
    })
}

impl From<Gone> for proto::GoneReason {
    fn from(g: Gone) -> Self {
        match g {
            Gone::Unknown => Self::Unknown,
            Gone::Expired => Self::Expired,
            Gone::Released => Self::Released,
            Gone::Revoked => Self::Revoked,
            Gone::HardCap => Self::HardCap,
            Gone::Limit => Self::Limit,
            Gone::Token => Self::Token,
        }
    }
}

fn gone(raw: i32) -> Gone {
    match proto::GoneReason::try_from(raw) {
        Ok(proto::GoneReason::Expired) => Gone::Expired,
        Ok(proto::GoneReason::Released) => Gone::Released,
        Ok(proto::GoneReason::Revoked) => Gone::Revoked,
        Ok(proto::GoneReason::HardCap) => Gone::HardCap,
        Ok(proto::GoneReason::Limit) => Gone::Limit,
        Ok(proto::GoneReason::Token) => Gone::Token,
        // A reason that this build does not know.
        Ok(proto::GoneReason::Unspecified | proto::GoneReason::Unknown) | Err(_) => Gone::Unknown,
    }
}

impl From<ServerFrame> for proto::ServerFrame {
    fn from(f: ServerFrame) -> Self {
        let frame = f.body.map(|body| match body {
            ServerBody::Opened(i) => S::Opened(proto::Opened { incarnation: i.get() }),
            ServerBody::Pong(number) => S::Pong(proto::Pong { number }),
            ServerBody::Granted { claim, grant, contents, growths, remaining } => S::Granted(proto::Granted {
                claim: claim.0,
                slot: grant.slot,
                nonce: grant.nonce.get(),
                remaining_ms: millis(remaining),
                contents: Some((&*contents).into()),
                growths,
            }),
            ServerBody::Grown { claim, after, growths, growth } => S::Grown(proto::Grown {
                claim: claim.0,
                tokens: growth.tokens,
                r#final: growth.complete,
                groups: growth.groups.iter().map(Into::into).collect(),
                after,
                growths,
            }),
            ServerBody::NotYet { claim, retry } => S::NotYet(proto::NotYet {
                claim: claim.0,
                retry_ms: u32::try_from(retry.as_millis()).unwrap_or(u32::MAX),
            }),
            ServerBody::Gone { claim, why } => {
                S::Gone(proto::Gone { claim: claim.0, why: proto::GoneReason::from(why).into() })
            }
            ServerBody::Revoked { offer, why } => {
                S::Revoked(proto::Revoked { offer: Some(offer.into()), why: proto::GoneReason::from(why).into() })
            }
            ServerBody::Draining => S::Draining(proto::Draining {}),
        });
        Self { ack: f.ack, frame }
    }
}

impl From<&Contents> for proto::Contents {
    fn from(c: &Contents) -> Self {
        Self {
            tokens: c.tokens,
            whole: c.whole,
            r#final: c.complete,
            fingerprints: c.fingerprints.clone().into_iter().collect(),
            groups: c.groups.iter().map(Into::into).collect(),
        }
    }
}

impl From<&OfferGroup> for proto::GroupBlocks {
    fn from(g: &OfferGroup) -> Self {
        let mut runs = Self { group: g.group.0.into(), first_position: g.first_position, ..Self::default() };
        let mut next = None;
        for block in &g.blocks {
            let id = block.map_or(BlockId::NULL, |b| b.0);
            match runs.counts.last_mut() {
                Some(count) if next == Some(id) => *count += 1,
                _ => {
                    runs.firsts.push(id);
                    runs.counts.push(1);
                }
            }
            next =
                Some(if id == BlockId::NULL { id } else { id + 1 }).filter(|n| block.is_none() || *n != BlockId::NULL);
        }
        runs
    }
}

/// Lists of blocks. `limit` bounds the blocks, and so the memory that a few bytes of runs can occupy.
fn groups(lists: Vec<proto::GroupBlocks>, limit: usize) -> Checked<Vec<OfferGroup>> {
    if lists.len() > kvferry_proto::PoolLayout::MAX_GROUPS {
        return bad("groups", format!("{}, over the limit of {}", lists.len(), kvferry_proto::PoolLayout::MAX_GROUPS));
    }
    let mut left = limit as u64;
    let mut groups = Vec::with_capacity(lists.len());
    for g in lists {
        if g.firsts.len() != g.counts.len() {
            return bad("groups", format!("{} runs have {} counts", g.firsts.len(), g.counts.len()));
        }
        let blocks: u64 = g.counts.iter().map(|&n| u64::from(n)).sum();
        left = match left.checked_sub(blocks) {
            Some(left) => left,
            None => return bad("groups", format!("over {limit} blocks (limits.blocks_per_offer)")),
        };
        let mut list = Vec::with_capacity(blocks as usize);
        for (&first, &count) in g.firsts.iter().zip(&g.counts) {
            match first {
                _ if count == 0 => return bad("groups.counts", "a run is empty"),
                BlockId::NULL => list.extend(std::iter::repeat_n(None, count as usize)),
                first => {
                    let Some(end) = first.checked_add(count) else {
                        return bad("groups.firsts", "a run has blocks past 2^32");
                    };
                    list.extend((first..end).map(|b| Some(BlockId(b))));
                }
            }
        }
        groups.push(OfferGroup {
            group: GroupId(narrow("groups.group", g.group)?),
            first_position: g.first_position,
            blocks: list,
        });
    }
    Ok(groups)
}

/// The contents in a grant. `limit` bounds the blocks.
fn contents(c: proto::Contents, limit: usize) -> Checked<Contents> {
    let groups = groups(c.groups, limit)?;
    if c.fingerprints.len() > Offer::MAX_FINGERPRINTS {
        return bad("fingerprints", format!("{}, over the limit of {}", c.fingerprints.len(), Offer::MAX_FINGERPRINTS));
    }
    let fingerprints = c.fingerprints.into_iter().collect();
    let whole = if c.whole == 0 { c.tokens } else { c.whole };
    let contents = Contents { tokens: c.tokens, whole, complete: c.r#final, fingerprints, groups };
    contents.check(limit).or_else(|e| bad("groups", e.to_string()))?;
    Ok(contents)
}

/// A frame from a producer. `limit` bounds the blocks of a grant.
pub(crate) fn server_frame(f: proto::ServerFrame, limit: usize) -> Checked<ServerFrame> {
    let body = match f.frame {
        None => None,
        Some(S::Opened(o)) => Some(ServerBody::Opened(incarnation("opened.incarnation", o.incarnation)?)),
        Some(S::Pong(p)) => Some(ServerBody::Pong(p.number)),
        Some(S::Granted(g)) => Some(ServerBody::Granted {
            claim: claim_id("granted.claim", g.claim)?,
            grant: Grant {
                slot: g.slot,
                nonce: Nonce::from_wire(g.nonce).map_or_else(|| bad("granted.nonce", "is zero"), Ok)?,
            },
            contents: Arc::new(within("granted.contents", contents(present("granted.contents", g.contents)?, limit))?),
            growths: g.growths,
            remaining: time(g.remaining_ms),
        }),
        Some(S::Grown(g)) => Some(ServerBody::Grown {
            claim: claim_id("grown.claim", g.claim)?,
            after: g.after,
            growths: g.growths,
            growth: Growth { tokens: g.tokens, complete: g.r#final, groups: within("grown", groups(g.groups, limit))? },
        }),
        Some(S::NotYet(n)) => {
            Some(ServerBody::NotYet { claim: claim_id("not_yet.claim", n.claim)?, retry: time(n.retry_ms.into()) })
        }
        Some(S::Gone(g)) => Some(ServerBody::Gone { claim: claim_id("gone.claim", g.claim)?, why: gone(g.why) }),
        Some(S::Revoked(r)) => {
            Some(ServerBody::Revoked { offer: offer_id("revoked.offer", r.offer)?, why: gone(r.why) })
        }
        Some(S::Draining(_)) => Some(ServerBody::Draining),
    };
    Ok(ServerFrame { ack: f.ack, body })
}
