//! The consumer's half of the handshake: queue pairs first, then the peer's answer, then the lane.

use std::{net::IpAddr, sync::Arc, time::Duration};

use kvferry_proto::{block::Incarnation, group::PoolLayout};

use super::{
    chain::MAX_DEPTH,
    cq::Cq,
    device::Port,
    error::VerbsError,
    exchange::{LinkLayer, MAX_QUEUE_PAIRS, MAX_RAILS, QpEnd, RailEnd, ServedRail, VerbsRequest, VerbsTicket},
    gid::Gid,
    ladder,
    landing::Landing,
    lane::{self, VerbsLane},
    memory::{Access, Region, Source},
    path::{self, End, Path},
    qp::{Agreed, At, Qp, Side},
    rail::Rail,
    rails::Rails,
    wake::{Wake, undertake},
};
use crate::{config::VerbsConfig, lane::LaneError, memory::Memory};

/// A rail's half-open part.
#[derive(Debug)]
struct Half {
    /// Dropped before the queue.
    pairs: Vec<Qp>,
    cq: Cq,
    rail: Arc<Rail>,
    port: Port,
    layer: LinkLayer,
    at: At,
    /// The peer's.
    host: Option<IpAddr>,
    /// Requests of a pair.
    depth: u32,
}

/// Half-open parts. What is not used of them is given back on another thread: whoever drops them, a task that was told to
/// give up for one, must not wait for a device.
#[derive(Debug)]
struct Halves(Vec<Half>);

impl Drop for Halves {
    fn drop(&mut self) {
        let halves = std::mem::take(&mut self.0);
        if !halves.is_empty() {
            undertake("kvferry-bury", move || drop(halves));
        }
    }
}

/// A lane that waits for the peer's answer. Dropping it gives everything back, without waiting for it.
#[derive(Debug)]
pub(crate) struct Opening {
    halves: Halves,
    request: VerbsRequest,
    host: Option<IpAddr>,
    /// A rail of this side that has worked is not among them.
    degraded: bool,
    config: VerbsConfig,
    memory: Memory,
}

/// A queue pair's first sequence number: random, so that packets of an earlier life are not taken for its own.
pub(crate) fn random_psn() -> u32 {
    let mut bytes = [0; 4];
    // Without randomness a late packet may do harm, but no more than with every stack that starts at zero.
    let _ = getrandom::fill(&mut bytes);
    u32::from_ne_bytes(bytes) & 0xff_ffff
}

impl Opening {
    /// Makes the queue pairs. `host` is where the peer's control plane is, as a hint which address reaches it. Blocks for a
    /// few milliseconds.
    pub(crate) fn new(rails: &Arc<Rails>, host: Option<IpAddr>) -> Result<Self, VerbsError> {
        let config = rails.config().clone();
        let peer = host.map(|ip| match ip {
            IpAddr::V4(a) => Gid(a.to_ipv6_mapped().octets()),
            IpAddr::V6(a) => Gid(a.octets()),
        });
        let (mut halves, mut ends, mut why) = (Vec::new(), Vec::new(), Vec::new());
        for (rail, port, layer) in rails.usable(host)?.into_iter().take(MAX_RAILS) {
            match half(rail.clone(), port, layer, host, peer.as_ref(), &config) {
                Ok((half, end)) => {
                    halves.push(half);
                    ends.push(end);
                }
                Err(e) => {
                    rail.failed(None);
                    why.push(e.to_string());
                }
            }
        }
        if halves.is_empty() {
            return Err(VerbsError::NoRail { why: why.join("; ") });
        }
        let (request, degraded) = (VerbsRequest { rails: ends }, rails.to_be_had() > halves.len());
        Ok(Self { halves: Halves(halves), request, host, degraded, config, memory: rails.memory().clone() })
    }

    /// What to send.
    pub(crate) fn request(&self) -> &VerbsRequest {
        &self.request
    }

    /// Connects to what the peer answered. `remote` is the pool of its Hello. Blocks for a few milliseconds.
    pub(crate) fn finish(
        mut self,
        ticket: &VerbsTicket,
        remote: Arc<PoolLayout>,
        incarnation: Incarnation,
    ) -> Result<VerbsLane, LaneError> {
        remote.check().map_err(|e| LaneError::protocol(format!("its pool is malformed: {e}")))?;
        if ticket.incarnation != incarnation.get() {
            return Err(LaneError::Restarted);
        }
        ticket.check(&self.request, remote.segments.len()).map_err(LaneError::protocol)?;
        if ticket
            .rails
            .iter()
            .any(|r| r.segments.iter().zip(&remote.segments).any(|(r, len)| r.address.checked_add(*len).is_none()))
        {
            return Err(LaneError::protocol("segments past the end of memory"));
        }
        let wake = Wake::new().map_err(LaneError::io("cannot make the lane's descriptors"))?;
        let slots = Arc::new(Landing::new().map_err(LaneError::io("cannot map the fence slots"))?);
        let config = &self.config;
        let mut halves: Vec<Option<Half>> = std::mem::take(&mut self.halves.0).into_iter().map(Some).collect();
        let (mut paths, mut max_read, mut depth, mut failed) = (Vec::new(), config.max_read, 0, None);
        let mut degraded = self.degraded || ticket.degraded;
        for served in &ticket.rails {
            let of = usize::from(served.of);
            let (Some(half), Some(mine)) = (halves.get_mut(of).and_then(Option::take), self.request.rails.get(of))
            else {
                continue;
            };
            let (rail, longest, requests) = (half.rail.clone(), half.port.max_message.max(1), half.depth);
            match path(half, mine, served, config, &wake, &slots, &self.memory) {
                Ok(path) => {
                    depth += mine.queue_pairs.len() * requests as usize;
                    max_read = max_read.min(longest);
                    rail.reaches(self.host);
                    paths.push(path);
                }
                Err(error) => {
                    tracing::warn!(rail = rail.name(), %error, "a rail does not reach this peer: its others are used");
                    degraded |= rail.has_reached(self.host);
                    failed = Some(error);
                }
            }
        }
        if let (true, Some(error)) = (paths.is_empty(), failed) {
            return Err(error);
        }
        if paths.is_empty() {
            return Err(VerbsError::NoPath { why: "the peer named no rail of this side".into() }.into());
        }
        // The tracker kills after half of the bound: that long reads may drain, or time out. The ladder has the other half.
        let quiet_bound = (config.gives_up_after() + config.gives_up_after() / 4).max(ladder::BOUND) * 2;
        // A rail that has no counterpart there never had one: a lane is not the worse for it.
        degraded |= halves.iter().flatten().any(|h| h.rail.has_reached(self.host));
        let peer = ticket.rails.first().map(|r| format!("{} {}", r.end.gid, r.end.name)).unwrap_or_default();
        Ok(VerbsLane::new(lane::Parts {
            paths,
            slots,
            fence_slots: ticket.fence_slots,
            memory: self.memory,
            remote,
            wake,
            spin: config.spin,
            max_read,
            quiet_bound,
            peer,
            degraded,
            depth,
        }))
    }
}

/// A rail's part of a lane, connected to what the peer answered for it.
fn path(
    half: Half,
    mine: &RailEnd,
    served: &ServedRail,
    config: &VerbsConfig,
    wake: &Wake,
    slots: &Arc<Landing>,
    memory: &Memory,
) -> Result<Path, LaneError> {
    let at = match config.gid_index {
        // InfiniBand: which subnet the peer is in, only its GID says; the address of its control plane does not.
        None if half.layer == LinkLayer::InfiniBand => {
            half.rail.address(&half.port, half.layer, Some(&served.end.gid), config)?.1
        }
        _ => half.at,
    };
    let agreed = Agreed { mtu: mine.mtu.min(served.end.mtu), rd_atomic: mine.rd_atomic.min(served.end.rd_atomic) };
    for (qp, (mine, theirs)) in half.pairs.iter().zip(mine.queue_pairs.iter().zip(&served.end.queue_pairs)) {
        qp.connect(at, &served.end, *theirs, mine.psn, agreed, config)?;
    }
    wake.watch(half.cq.fd()).map_err(LaneError::io("epoll"))?;
    half.rail.state().wake(wake.bell.clone());
    let source = Source::Address { base: slots.base(), len: Landing::BYTES };
    // Never in relaxed order: the word must not land after its completion.
    let access = Access::Landing { relaxed: false };
    // SAFETY: the slots stay mapped as long as `slots` is held, and are accessed as atomics only.
    let landing = unsafe { Region::register(half.rail.pd(), source, access, slots.clone()) }?;
    let end = |(i, qp)| End::new(qp, half.depth, config.signal_every, i as u8);
    Ok(Path::new(path::Parts {
        ends: half.pairs.into_iter().enumerate().map(end).collect(),
        cq: half.cq,
        rail: half.rail,
        landing,
        slots: slots.clone(),
        memory: memory.clone(),
        segments: served.segments.clone(),
        words: served.words,
        host: half.host,
        window: config.window,
        stall: stall(config),
    }))
}

fn half(
    rail: Arc<Rail>,
    port: Port,
    layer: LinkLayer,
    host: Option<IpAddr>,
    peer: Option<&Gid>,
    config: &VerbsConfig,
) -> Result<(Half, RailEnd), VerbsError> {
    let (gid, at) = rail.address(&port, layer, peer, config)?;
    let n = config.queue_pairs.clamp(1, MAX_QUEUE_PAIRS);
    let depth = depth(config.depth, rail.limits().max_wr);
    // A completion for every request: when a queue pair fails, each of them reports.
    let cq = Cq::new(rail.pd().device(), (depth * n as u32).min(rail.limits().max_cqe.max(1)))?;
    let mut pairs = Vec::with_capacity(n);
    for _ in 0..n {
        pairs.push(Qp::new(rail.pd(), &cq, depth, Side::Reader, port.number)?);
    }
    let end = RailEnd {
        name: rail.name().into(),
        link_layer: layer,
        lid: port.lid,
        gid,
        mtu: port.mtu,
        rd_atomic: config.rd_atomic.min(rail.limits().max_rd_atomic).max(1),
        queue_pairs: pairs.iter().map(|q| QpEnd { number: q.number(), psn: random_psn() }).collect(),
    };
    Ok((Half { pairs, cq, rail, port, layer, at, host, depth }, end))
}

/// How long nothing may complete. The specification lets a device wait up to four times as long for an answer as it is told
/// to, and a long READ that shares a slow wire (4 MB/s are left for it) is no lost one.
fn stall(config: &VerbsConfig) -> Duration {
    config.gives_up_after() * 4 + Duration::from_micros(u64::from(config.max_read) / 4) + Duration::from_millis(300)
}

/// The largest power of two that is not more than what is asked for, and not more than a device takes.
fn depth(asked: u32, takes: u32) -> u32 {
    1 << asked.clamp(1, MAX_DEPTH).min(takes.max(1)).ilog2()
}

#[cfg(test)]
mod tests {
    use super::depth;

    #[test]
    fn a_queue_is_no_deeper_than_its_device_takes() {
        assert_eq!(depth(128, 1 << 15), 128);
        assert_eq!(depth(128, 100), 64);
        assert_eq!(depth(1 << 20, u32::MAX), super::MAX_DEPTH);
        assert_eq!(depth(0, 0), 1);
    }
}
