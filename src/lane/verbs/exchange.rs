//! The messages that the two ends of a lane exchange in ConnectLane: the reader's queue pairs in the request, the served ones
//! in the answer.
//!
//! All of it comes from a peer: counts and numbers are checked before a queue pair is made from them.

use super::gid::Gid;

/// The link layer of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkLayer {
    /// InfiniBand: addressed by LID.
    InfiniBand,
    /// Ethernet: RoCE, addressed by GID.
    Ethernet,
}

/// Most queue pairs of a lane on one rail.
pub(super) const MAX_QUEUE_PAIRS: usize = 4;
/// Most rails of a lane.
pub(crate) const MAX_RAILS: usize = 16;
/// Longest name of a rail, in bytes: DEVICE:PORT.
pub(crate) const MAX_NAME: usize = 80;

/// The description of a queue pair for its peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct QpEnd {
    /// Its number; 24 bits.
    pub number: u32,
    /// Its first packet's sequence number; 24 bits.
    pub psn: u32,
}

/// One end of a lane on one rail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RailEnd {
    /// DEVICE:PORT, for logs.
    pub name: String,
    /// The port's link layer.
    pub link_layer: LinkLayer,
    /// The port's local identifier; 0 on RoCE.
    pub lid: u16,
    /// The port's GID.
    pub gid: Gid,
    /// Path MTU that the port takes, in bytes.
    pub mtu: u32,
    /// READs in flight: how many the device can have (reader), or accepts (served end).
    pub rd_atomic: u8,
    /// Its queue pairs.
    pub queue_pairs: Vec<QpEnd>,
}

impl RailEnd {
    /// Checks the bounds; the error names the field.
    pub(crate) fn check(&self) -> Result<(), &'static str> {
        let bad = Err;
        if self.name.len() > MAX_NAME || self.name.chars().any(char::is_control) {
            return bad("the name of a rail");
        }
        if !(1..=MAX_QUEUE_PAIRS).contains(&self.queue_pairs.len()) {
            return bad("the number of queue pairs");
        }
        if self.queue_pairs.iter().any(|q| q.number >= 1 << 24 || q.psn >= 1 << 24) {
            return bad("a queue pair's numbers");
        }
        if !(256..=1 << 16).contains(&self.mtu) {
            return bad("the path MTU");
        }
        if self.rd_atomic == 0 {
            return bad("no READ in flight");
        }
        match self.link_layer {
            LinkLayer::Ethernet if self.gid.is_zero() => bad("no GID on RoCE"),
            LinkLayer::InfiniBand if self.lid == 0 && self.gid.is_zero() => bad("neither LID nor GID"),
            _ => Ok(()),
        }
    }
}

/// A part of the peer's memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Remote {
    /// Address of its first byte.
    pub address: u64,
    /// Its key.
    pub rkey: u32,
}

/// The reader's request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VerbsRequest {
    /// Its rails, best first.
    pub rails: Vec<RailEnd>,
}

impl VerbsRequest {
    /// Checks the bounds; the error names the field.
    pub(crate) fn check(&self) -> Result<(), &'static str> {
        if !(1..=MAX_RAILS).contains(&self.rails.len()) {
            return Err("the number of rails");
        }
        self.rails.iter().try_for_each(RailEnd::check)
    }
}

/// The served end of one of the reader's rails.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServedRail {
    /// Index of the reader's rail.
    pub of: u8,
    /// The served end: as many queue pairs as the reader's, in their order.
    pub end: RailEnd,
    /// The pool's segments.
    pub segments: Vec<Remote>,
    /// The fence table.
    pub words: Remote,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VerbsTicket {
    /// Names the lane.
    pub lane: u64,
    /// The incarnation of the process that answers.
    pub incarnation: u64,
    /// Words in the fence table.
    pub fence_slots: u32,
    /// The reader's rails that reach a rail of the served end.
    pub rails: Vec<ServedRail>,
    /// A rail of the served end that has worked before is not among them: a later lane may have more.
    pub degraded: bool,
}

impl VerbsTicket {
    /// Checks the bounds, and that it answers `request` and has `segments` segments.
    pub(crate) fn check(&self, request: &VerbsRequest, segments: usize) -> Result<(), &'static str> {
        let bad = Err;
        if !(1..=MAX_RAILS).contains(&self.rails.len()) {
            return bad("the number of rails");
        }
        let mut seen = [false; MAX_RAILS];
        for r in &self.rails {
            r.end.check()?;
            match request.rails.get(usize::from(r.of)) {
                Some(asked) if asked.queue_pairs.len() != r.end.queue_pairs.len() => {
                    return bad("the number of queue pairs");
                }
                Some(asked) if asked.link_layer != r.end.link_layer => return bad("the link layer"),
                Some(_) if !std::mem::replace(&mut seen[usize::from(r.of)], true) => {}
                _ => return bad("a rail that was not asked for"),
            }
            if r.segments.len() != segments {
                return bad("the number of segments");
            }
            let ends = |r: &Remote, len: u64| r.address.checked_add(len).is_none();
            if ends(&r.words, u64::from(self.fence_slots) * 8) {
                return bad("the fence table's address");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end() -> RailEnd {
        RailEnd {
            name: "mlx5_0:1".into(),
            link_layer: LinkLayer::Ethernet,
            lid: 0,
            gid: Gid([1; 16]),
            mtu: 4096,
            rd_atomic: 16,
            queue_pairs: vec![QpEnd { number: 17, psn: 5 }],
        }
    }

    #[test]
    fn a_malformed_end_is_refused() {
        assert!(end().check().is_ok());
        let bad: [fn(&mut RailEnd); 8] = [
            |e| e.name = "x".repeat(MAX_NAME + 1),
            |e| e.name = "a\nb".into(),
            |e| e.queue_pairs.clear(),
            |e| e.queue_pairs = vec![QpEnd { number: 1, psn: 1 }; MAX_QUEUE_PAIRS + 1],
            |e| e.queue_pairs[0].number = 1 << 24,
            |e| e.queue_pairs[0].psn = 1 << 24,
            |e| e.mtu = 128,
            |e| e.gid = Gid::default(),
        ];
        for f in bad {
            let mut e = end();
            f(&mut e);
            assert!(e.check().is_err(), "{e:?}");
        }
    }

    #[test]
    fn a_ticket_must_answer_its_request() {
        let request = VerbsRequest { rails: vec![end(), end()] };
        let remote = Remote { address: 4096, rkey: 1 };
        let served = ServedRail { of: 1, end: end(), segments: vec![remote; 2], words: remote };
        let good = VerbsTicket { lane: 1, incarnation: 2, fence_slots: 8, rails: vec![served], degraded: false };
        assert!(good.check(&request, 2).is_ok());
        let bad: [fn(&mut VerbsTicket); 6] = [
            |t| t.rails.clear(),
            |t| t.rails[0].of = 2,
            |t| t.rails.push(t.rails[0].clone()),
            |t| t.rails[0].end.queue_pairs.push(QpEnd { number: 1, psn: 1 }),
            |t| t.rails[0].segments.truncate(1),
            |t| t.rails[0].words.address = u64::MAX,
        ];
        for f in bad {
            let mut t = good.clone();
            f(&mut t);
            assert!(t.check(&request, 2).is_err(), "{t:?}");
        }
    }
}
