//! Protobuf to the protocol's types and back. Every bound on a peer's message is checked here, on the way in, and the error
//! names the field; code behind this module can rely on the bounds. Pure: no I/O, no panic on any input.

use std::sync::Arc;

use kvferry_proto::{
    EngineId, Group, GroupId, GroupKind, Incarnation, LaneKind, Mismatch, Model, OfferId, PeerId, PoolLayout, Rank,
    Region, Shard, Token,
    hello::{Hello, Welcome},
};

use self::check::{
    Checked, bad, incarnation, millis, narrow, offer_id, peer, present, shortened, text, time, token, within,
};
use super::proto;
use crate::lane::{ticket::LaneTicket, verbs::VerbsRequest};

#[cfg(test)]
pub(super) use self::frame::MAX_RENEW;
pub(super) use self::{check::BadMessage, frame::server_frame};

mod check;
mod frame;
mod verbs;

/// Longest host identity, in bytes.
pub(crate) const MAX_HOST: usize = 256;
/// Most lane kinds in a `Welcome`.
pub(crate) const MAX_LANES: usize = 32;
impl From<OfferId> for proto::OfferId {
    fn from(o: OfferId) -> Self {
        Self { high: o.high, low: o.low }
    }
}

impl From<&PeerId> for proto::Peer {
    fn from(p: &PeerId) -> Self {
        Self { engine: p.engine.to_string(), rank: p.rank.0, incarnation: p.incarnation.get() }
    }
}

impl TryFrom<proto::Peer> for PeerId {
    type Error = BadMessage;
    fn try_from(p: proto::Peer) -> Checked<Self> {
        let engine: EngineId = p.engine.parse().or_else(|e| bad("engine", format!("{e}")))?;
        Ok(Self { engine, rank: Rank(p.rank), incarnation: incarnation("incarnation", p.incarnation)? })
    }
}

impl From<&Model> for proto::Model {
    fn from(m: &Model) -> Self {
        Self {
            name: m.name.clone(),
            dtype: m.dtype.clone(),
            scales: m.scales.clone(),
            weights: m.weights.clone(),
            attention: m.attention.clone(),
            block_tokens: m.block_tokens,
        }
    }
}

impl TryFrom<proto::Model> for Model {
    type Error = BadMessage;
    fn try_from(m: proto::Model) -> Checked<Self> {
        if m.block_tokens == 0 {
            return bad("block_tokens", "is zero");
        }
        Ok(Self {
            name: text("name", m.name, Self::MAX_TEXT)?,
            dtype: text("dtype", m.dtype, Self::MAX_TEXT)?,
            scales: text("scales", m.scales, Self::MAX_TEXT)?,
            weights: text("weights", m.weights, Self::MAX_TEXT)?,
            attention: text("attention", m.attention, Self::MAX_TEXT)?,
            block_tokens: m.block_tokens,
        })
    }
}

impl From<&Shard> for proto::Shard {
    fn from(s: &Shard) -> Self {
        let Shard { tp_rank, tp_size, pp_rank, pp_size, first_head, heads, first_layer, layers } = *s;
        Self { tp_rank, tp_size, pp_rank, pp_size, first_head, heads, first_layer, layers }
    }
}

impl TryFrom<proto::Shard> for Shard {
    type Error = BadMessage;
    fn try_from(s: proto::Shard) -> Checked<Self> {
        let proto::Shard { tp_rank, tp_size, pp_rank, pp_size, first_head, heads, first_layer, layers } = s;
        let shard = Self { tp_rank, tp_size, pp_rank, pp_size, first_head, heads, first_layer, layers };
        shard.check().or_else(|what| bad("shard", what))?;
        Ok(shard)
    }
}

impl From<&PoolLayout> for proto::Pool {
    fn from(p: &PoolLayout) -> Self {
        let region = |r: &Region| proto::Region {
            name: r.name.as_ref().into(),
            segment: r.segment.into(),
            offset: r.offset,
            block_bytes: r.block_bytes,
            stride: r.stride,
        };
        let group = |g: &Group| proto::Group {
            id: g.id.0.into(),
            kind: match g.kind {
                GroupKind::Full => proto::GroupKind::Full,
                GroupKind::SlidingWindow => proto::GroupKind::SlidingWindow,
                GroupKind::State => proto::GroupKind::State,
            }
            .into(),
            block_tokens: g.block_tokens,
            blocks: g.blocks,
            regions: g.regions.iter().map(region).collect(),
        };
        Self { segments: p.segments.clone(), groups: p.groups.iter().map(group).collect() }
    }
}

impl TryFrom<proto::Pool> for PoolLayout {
    type Error = BadMessage;
    fn try_from(p: proto::Pool) -> Checked<Self> {
        let mut groups = Vec::with_capacity(p.groups.len().min(Self::MAX_GROUPS));
        for g in p.groups {
            groups.push(within("groups", group(g))?);
        }
        let layout = Self { segments: p.segments, groups };
        layout.check().or_else(|e| bad("pool", e.to_string()))?;
        Ok(layout)
    }
}

fn group(g: proto::Group) -> Checked<Group> {
    let kind = match g.kind() {
        proto::GroupKind::Full => GroupKind::Full,
        proto::GroupKind::SlidingWindow => GroupKind::SlidingWindow,
        proto::GroupKind::State => GroupKind::State,
        // Whether a group of an unknown kind may have null blocks is unknown too.
        proto::GroupKind::Unspecified => return bad("kind", format!("{} is not known here", g.kind)),
    };
    let mut regions = Vec::with_capacity(g.regions.len().min(PoolLayout::MAX_REGIONS));
    for r in g.regions {
        regions.push(Region {
            name: r.name.into(),
            segment: narrow("regions.segment", r.segment)?,
            offset: r.offset,
            block_bytes: r.block_bytes,
            stride: r.stride,
        });
    }
    let id = GroupId(narrow("id", g.id)?);
    Ok(Group { id, kind, block_tokens: g.block_tokens, blocks: g.blocks, regions })
}

impl From<LaneKind> for proto::LaneKind {
    fn from(k: LaneKind) -> Self {
        match k {
            LaneKind::Tcp => Self::Tcp,
            LaneKind::Local => Self::Local,
            LaneKind::Verbs => Self::Verbs,
            // This version of the wire has no number for the kind, so no peer can request it.
            _ => Self::Unspecified,
        }
    }
}

/// A lane kind from the wire; `None`: this build does not know it.
pub(crate) fn lane_kind(raw: i32) -> Option<LaneKind> {
    match proto::LaneKind::try_from(raw).ok()? {
        proto::LaneKind::Unspecified => None,
        proto::LaneKind::Tcp => Some(LaneKind::Tcp),
        proto::LaneKind::Local => Some(LaneKind::Local),
        proto::LaneKind::Verbs => Some(LaneKind::Verbs),
    }
}

impl From<&Hello> for proto::HelloRequest {
    fn from(h: &Hello) -> Self {
        Self {
            min_version: h.versions.0,
            max_version: h.versions.1,
            features: h.features,
            peer: Some((&h.peer).into()),
            model: Some((&h.model).into()),
            shard: Some((&h.shard).into()),
            host: h.host.clone(),
            // The dialer's, see `Dialer::hello`.
            secret: Default::default(),
        }
    }
}

impl TryFrom<proto::HelloRequest> for Hello {
    type Error = BadMessage;
    fn try_from(h: proto::HelloRequest) -> Checked<Self> {
        Ok(Self {
            // An empty range is not malformed: the answer names it as a mismatch.
            versions: (h.min_version, h.max_version),
            features: h.features,
            peer: peer("peer", h.peer)?,
            model: within("model", present("model", h.model)?.try_into())?,
            shard: present("shard", h.shard)?.try_into()?,
            host: text("host", h.host, MAX_HOST)?,
        })
    }
}

impl From<&Welcome> for proto::Welcome {
    fn from(w: &Welcome) -> Self {
        Self {
            version: w.version,
            features: w.features,
            peer: Some((&w.peer).into()),
            engine_incarnation: w.engine_incarnation.get(),
            model: Some((&w.model).into()),
            shard: Some((&w.shard).into()),
            pool: Some(w.pool.as_ref().into()),
            fence_slots: w.fence_slots,
            lanes: w.lanes.iter().map(|k| proto::LaneKind::from(*k).into()).collect(),
            host: w.host.clone(),
            silence_ms: millis(w.silence),
            gpu_uuid: w.gpu_uuid.map_or_else(Default::default, |uuid| uuid.to_vec().into()),
        }
    }
}

impl TryFrom<proto::Welcome> for Welcome {
    type Error = BadMessage;
    fn try_from(w: proto::Welcome) -> Checked<Self> {
        if w.version == 0 {
            return bad("version", "is zero");
        }
        if w.lanes.len() > MAX_LANES {
            return bad("lanes", format!("{}, over the limit of {MAX_LANES}", w.lanes.len()));
        }
        if w.silence_ms == 0 {
            return bad("silence_ms", "is zero");
        }
        let gpu_uuid = match &*w.gpu_uuid {
            [] => None,
            bytes => Some(bytes.try_into().or_else(|_| bad("gpu_uuid", "is not 16 bytes long"))?),
        };
        Ok(Self {
            version: w.version,
            features: w.features,
            peer: peer("peer", w.peer)?,
            engine_incarnation: incarnation("engine_incarnation", w.engine_incarnation)?,
            model: within("model", present("model", w.model)?.try_into())?,
            shard: present("shard", w.shard)?.try_into()?,
            pool: Arc::new(present("pool", w.pool)?.try_into()?),
            fence_slots: w.fence_slots,
            // A newer producer may serve kinds that this build does not know; the others still work.
            lanes: w.lanes.into_iter().filter_map(lane_kind).collect(),
            host: text("host", w.host, MAX_HOST)?,
            silence: time(w.silence_ms),
            gpu_uuid,
        })
    }
}

impl From<Mismatch> for proto::Mismatch {
    /// `here` is the producer, which sends it.
    fn from(m: Mismatch) -> Self {
        Self { field: m.field, here: m.producer, there: m.consumer }
    }
}

impl From<proto::Mismatch> for Mismatch {
    fn from(m: proto::Mismatch) -> Self {
        Self { field: shortened(m.field), consumer: shortened(m.there), producer: shortened(m.here) }
    }
}

impl From<LaneTicket> for proto::LaneReply {
    fn from(t: LaneTicket) -> Self {
        let lane = match t {
            LaneTicket::Tcp { host, port, lane, key } => proto::lane_reply::Lane::Tcp(proto::TcpLane {
                host: host.unwrap_or_default(),
                port: port.into(),
                lane,
                key: key.to_vec().into(),
            }),
            LaneTicket::Verbs(t) => proto::lane_reply::Lane::Verbs(t.into()),
            LaneTicket::Local { uds, lane, key } => {
                proto::lane_reply::Lane::Local(proto::LocalLane { uds: uds.into(), lane, key: key.to_vec().into() })
            }
        };
        Self { lane: Some(lane) }
    }
}

impl TryFrom<proto::LaneReply> for LaneTicket {
    type Error = BadMessage;
    fn try_from(r: proto::LaneReply) -> Checked<Self> {
        match present("lane", r.lane)? {
            proto::lane_reply::Lane::Tcp(t) => {
                let port: u16 = narrow("tcp.port", t.port)?;
                if port == 0 {
                    return bad("tcp.port", "is zero");
                }
                let host = text("tcp.host", t.host, Self::MAX_HOST)?;
                let key = t.key.as_ref().try_into().or_else(|_| bad("tcp.key", "is not 32 bytes long"))?;
                Ok(Self::Tcp { host: (!host.is_empty()).then_some(host), port, lane: t.lane, key })
            }
            proto::lane_reply::Lane::Verbs(v) => Ok(Self::Verbs(v.try_into()?)),
            proto::lane_reply::Lane::Local(l) => {
                if l.uds.is_empty() || l.uds.len() > Self::MAX_UDS {
                    return bad("local.uds", format!("{} bytes, where 1 to {} fit", l.uds.len(), Self::MAX_UDS));
                }
                let key = l.key.as_ref().try_into().or_else(|_| bad("local.key", "is not 32 bytes long"))?;
                Ok(Self::Local { uds: l.uds.into(), lane: l.lane, key })
            }
        }
    }
}

/// A consumer rank's request for a lane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LaneWanted {
    /// The consumer rank.
    pub from: PeerId,
    /// The producer's incarnation that the consumer knows.
    pub expect: Incarnation,
    /// The kind; `None`: this build does not know it.
    pub kind: Option<LaneKind>,
    /// For a verbs lane: the caller's ends.
    pub verbs: Option<VerbsRequest>,
}

impl TryFrom<proto::LaneRequest> for LaneWanted {
    type Error = BadMessage;
    fn try_from(r: proto::LaneRequest) -> Checked<Self> {
        if r.kind == 0 {
            return bad("kind", "is missing");
        }
        Ok(Self {
            from: peer("from", r.from)?,
            expect: incarnation("expect_incarnation", r.expect_incarnation)?,
            kind: lane_kind(r.kind),
            verbs: verbs::request(r.verbs)?,
        })
    }
}

/// A release without a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ReleaseWanted {
    /// The consumer on whose behalf; `None`: a router's call.
    pub from: Option<PeerId>,
    /// The offer.
    pub offer: OfferId,
    /// Its secret.
    pub token: Token,
    /// The incarnation that offered; `None`: any.
    pub expect: Option<Incarnation>,
}

impl From<&ReleaseWanted> for proto::ReleaseRequest {
    fn from(r: &ReleaseWanted) -> Self {
        Self {
            from: r.from.as_ref().map(Into::into),
            offer: Some(r.offer.into()),
            token: r.token.to_bytes().to_vec().into(),
            expect_incarnation: r.expect.map_or(0, Incarnation::get),
        }
    }
}

impl TryFrom<proto::ReleaseRequest> for ReleaseWanted {
    type Error = BadMessage;
    fn try_from(r: proto::ReleaseRequest) -> Checked<Self> {
        Ok(Self {
            from: r.from.map(|p| peer("from", Some(p))).transpose()?,
            offer: offer_id("offer", r.offer)?,
            token: token("token", &r.token)?,
            expect: Incarnation::from_wire(r.expect_incarnation),
        })
    }
}

#[cfg(test)]
mod tests;
