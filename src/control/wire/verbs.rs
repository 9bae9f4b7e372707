//! The ends of a verbs lane.

use super::check::{BadMessage, Checked, bad, narrow, present, text, within};
use crate::{
    control::proto,
    lane::verbs::{Gid, LinkLayer, MAX_NAME, MAX_RAILS, QpEnd, RailEnd, Remote, ServedRail, VerbsRequest, VerbsTicket},
};

/// Most segments of a pool: a segment's index has 16 bits.
const MAX_SEGMENTS: usize = 1 << 16;

/// The ends of a request; `None`: it names none.
pub(super) fn request(ends: Vec<proto::VerbsEnd>) -> Checked<Option<VerbsRequest>> {
    if ends.is_empty() {
        return Ok(None);
    }
    if ends.len() > MAX_RAILS {
        return bad("verbs", format!("{} ends, over the limit of {MAX_RAILS}", ends.len()));
    }
    let rails = ends.into_iter().map(|e| within("verbs", e.try_into())).collect::<Checked<_>>()?;
    let request = VerbsRequest { rails };
    request.check().or_else(|what| bad("verbs", what))?;
    Ok(Some(request))
}

impl From<RailEnd> for proto::VerbsEnd {
    fn from(e: RailEnd) -> Self {
        let layer = match e.link_layer {
            LinkLayer::InfiniBand => proto::LinkLayer::Infiniband,
            LinkLayer::Ethernet => proto::LinkLayer::Ethernet,
        };
        let pair = |q: QpEnd| proto::VerbsQueuePair { number: q.number, psn: q.psn };
        Self {
            rail: e.name,
            link_layer: layer.into(),
            lid: e.lid.into(),
            gid: e.gid.0.to_vec().into(),
            mtu: e.mtu,
            rd_atomic: e.rd_atomic.into(),
            queue_pairs: e.queue_pairs.into_iter().map(pair).collect(),
        }
    }
}

impl TryFrom<proto::VerbsEnd> for RailEnd {
    type Error = BadMessage;
    fn try_from(e: proto::VerbsEnd) -> Checked<Self> {
        let link_layer = match proto::LinkLayer::try_from(e.link_layer) {
            Ok(proto::LinkLayer::Infiniband) => LinkLayer::InfiniBand,
            Ok(proto::LinkLayer::Ethernet) => LinkLayer::Ethernet,
            _ => return bad("link_layer", format!("{} is not known", e.link_layer)),
        };
        let end = Self {
            name: text("rail", e.rail, MAX_NAME)?,
            link_layer,
            lid: narrow("lid", e.lid)?,
            gid: Gid(e.gid.as_ref().try_into().or_else(|_| bad("gid", "is not 16 bytes long"))?),
            mtu: e.mtu,
            rd_atomic: narrow("rd_atomic", e.rd_atomic)?,
            queue_pairs: e.queue_pairs.into_iter().map(|q| QpEnd { number: q.number, psn: q.psn }).collect(),
        };
        end.check().or_else(|what| bad("end", what))?;
        Ok(end)
    }
}

fn remote(r: Remote) -> proto::RemoteMemory {
    proto::RemoteMemory { address: r.address, rkey: r.rkey }
}

impl From<proto::RemoteMemory> for Remote {
    fn from(r: proto::RemoteMemory) -> Self {
        Self { address: r.address, rkey: r.rkey }
    }
}

impl From<VerbsTicket> for proto::VerbsLane {
    fn from(t: VerbsTicket) -> Self {
        let rail = |r: ServedRail| proto::VerbsRail {
            of: r.of.into(),
            end: Some(r.end.into()),
            segments: r.segments.into_iter().map(remote).collect(),
            words: Some(remote(r.words)),
        };
        Self {
            lane: t.lane,
            incarnation: t.incarnation,
            fence_slots: t.fence_slots,
            rails: t.rails.into_iter().map(rail).collect(),
            degraded: t.degraded,
        }
    }
}

impl TryFrom<proto::VerbsLane> for VerbsTicket {
    type Error = BadMessage;
    /// The caller checks that it answers the request.
    fn try_from(t: proto::VerbsLane) -> Checked<Self> {
        if t.rails.is_empty() || t.rails.len() > MAX_RAILS {
            return bad("verbs.rails", format!("{}, where 1 to {MAX_RAILS} are possible", t.rails.len()));
        }
        let rail = |r: proto::VerbsRail| {
            if r.segments.len() > MAX_SEGMENTS {
                return bad("segments", format!("{}, over the limit of {MAX_SEGMENTS}", r.segments.len()));
            }
            Ok(ServedRail {
                of: narrow("of", r.of)?,
                end: within("end", present("end", r.end)?.try_into())?,
                segments: r.segments.into_iter().map(Remote::from).collect(),
                words: present("words", r.words)?.into(),
            })
        };
        Ok(Self {
            lane: t.lane,
            incarnation: t.incarnation,
            fence_slots: t.fence_slots,
            rails: t.rails.into_iter().map(|r| within("verbs.rails", rail(r))).collect::<Checked<_>>()?,
            degraded: t.degraded,
        })
    }
}
