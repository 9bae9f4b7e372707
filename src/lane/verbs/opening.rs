//! The consumer's side of the handshake: queue pairs first, then the peer's answer, then the lane.

use std::{net::IpAddr, sync::Arc, time::Duration};

use kvferry_proto::{Incarnation, PoolLayout};

use super::{
    chain::MAX_DEPTH,
    cleanup,
    cq::Cq,
    device::Port,
    error::VerbsError,
    exchange::{LinkLayer, MAX_QUEUE_PAIRS, MAX_RAILS, QpEnd, RailEnd, ServedRail, VerbsRequest, VerbsTicket},
    gid::Gid,
    gpu::Flushes,
    landing::Landing,
    lane::{self, VerbsLane},
    memory::{Access, Region, Source},
    path::{self, Path, QueuePairState},
    qp::{Agreed, At, Qp, Side, random_psn},
    rail::Rail,
    rails::Rails,
    teardown,
    wake::Wake,
};
use crate::{config::VerbsConfig, lane::LaneError, memory::Memory};

/// A rail whose queue pairs are not connected yet.
#[derive(Debug)]
struct PendingRail {
    /// Dropped before the queue.
    pairs: Vec<Qp>,
    cq: Cq,
    rail: Arc<Rail>,
    port: Port,
    layer: LinkLayer,
    at: At,
    /// The peer's host.
    host: Option<IpAddr>,
    /// Requests of a pair.
    depth: u32,
}

/// Rails that are not connected yet. Unused ones are given back on another thread: a cancelled task that drops them must not
/// wait for a device.
#[derive(Debug)]
struct PendingRails(Vec<PendingRail>);

impl Drop for PendingRails {
    fn drop(&mut self) {
        let rails = std::mem::take(&mut self.0);
        if !rails.is_empty() {
            cleanup::spawn("kvferry-cleanup", move || drop(rails));
        }
    }
}

/// A lane before the peer's answer. Dropping it gives everything back on another thread.
#[derive(Debug)]
pub(crate) struct Opening {
    pending: PendingRails,
    request: VerbsRequest,
    host: Option<IpAddr>,
    /// A rail of this side that has worked before is not among them.
    degraded: bool,
    config: VerbsConfig,
    memory: Memory,
}

impl Opening {
    /// Makes the queue pairs. `host` is the address of the peer's control plane, as a hint which GID reaches it. Blocks for a
    /// few milliseconds.
    pub(crate) fn new(rails: &Arc<Rails>, host: Option<IpAddr>) -> Result<Self, VerbsError> {
        let config = rails.config().clone();
        let peer = host.map(|ip| match ip {
            IpAddr::V4(a) => Gid(a.to_ipv6_mapped().octets()),
            IpAddr::V6(a) => Gid(a.octets()),
        });
        let (mut pending, mut ends, mut why) = (Vec::new(), Vec::new(), Vec::new());
        for (rail, port, layer) in rails.usable(host)?.into_iter().take(MAX_RAILS) {
            match prepare(rail.clone(), port, layer, host, peer.as_ref(), &config) {
                Ok((rail, end)) => {
                    pending.push(rail);
                    ends.push(end);
                }
                Err(e) => {
                    rail.failed(None);
                    why.push(e.to_string());
                }
            }
        }
        if pending.is_empty() {
            return Err(VerbsError::NoRail { why: why.join("; ") });
        }
        let (request, degraded) = (VerbsRequest { rails: ends }, rails.expected() > pending.len());
        Ok(Self { pending: PendingRails(pending), request, host, degraded, config, memory: rails.memory().clone() })
    }

    /// The request to send to the peer.
    pub(crate) fn request(&self) -> &VerbsRequest {
        &self.request
    }

    /// Connects to the queue pairs of the peer's answer. `remote` is the pool of its Hello. Blocks for a few milliseconds.
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
        let mut pending: Vec<Option<PendingRail>> = std::mem::take(&mut self.pending.0).into_iter().map(Some).collect();
        let (mut paths, mut max_read, mut depth, mut failed) = (Vec::new(), config.max_read, 0, None);
        let mut degraded = self.degraded || ticket.degraded;
        for served in &ticket.rails {
            let of = usize::from(served.of);
            let (Some(own), Some(mine)) = (pending.get_mut(of).and_then(Option::take), self.request.rails.get(of))
            else {
                continue;
            };
            let (rail, longest, requests) = (own.rail.clone(), own.port.max_message.max(1), own.depth);
            match path(own, mine, served, config, &wake, &slots, &self.memory) {
                Ok(path) => {
                    depth += mine.queue_pairs.len() * requests as usize;
                    max_read = max_read.min(longest);
                    rail.reaches(self.host);
                    paths.push(path);
                }
                Err(error) => {
                    tracing::warn!(rail = rail.name(), %error, "a rail does not reach this peer: the other rails are used");
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
        // The tracker kills after half of the bound: until then reads may drain or time out. Teardown has the other half.
        let quiet_bound = (config.gives_up_after() + config.gives_up_after() / 4).max(teardown::BOUND) * 2;
        // A rail that never reached this peer has no counterpart there, and does not count.
        degraded |= pending.iter().flatten().any(|r| r.rail.has_reached(self.host));
        let flushes = Flushes::new(&self.memory).map_err(LaneError::io("cannot make the lane's descriptors"))?;
        if let Some(f) = &flushes {
            wake.watch(f.fd()).map_err(LaneError::io("epoll"))?;
        }
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
            flushes,
        }))
    }
}

/// A rail's part of a lane, connected to its counterpart in the peer's answer.
fn path(
    own: PendingRail,
    mine: &RailEnd,
    served: &ServedRail,
    config: &VerbsConfig,
    wake: &Wake,
    slots: &Arc<Landing>,
    memory: &Memory,
) -> Result<Path, LaneError> {
    let at = match config.gid_index {
        // InfiniBand: only the peer's GID names its subnet; the address of its control plane does not.
        None if own.layer == LinkLayer::InfiniBand => {
            own.rail.address(&own.port, own.layer, Some(&served.end.gid), config)?.1
        }
        _ => own.at,
    };
    let agreed = Agreed { mtu: mine.mtu.min(served.end.mtu), rd_atomic: mine.rd_atomic.min(served.end.rd_atomic) };
    for (qp, (mine, theirs)) in own.pairs.iter().zip(mine.queue_pairs.iter().zip(&served.end.queue_pairs)) {
        qp.connect(at, &served.end, *theirs, mine.psn, agreed, config)?;
    }
    wake.watch(own.cq.fd()).map_err(LaneError::io("epoll"))?;
    own.rail.state().wake(wake.bell.clone());
    let source = Source::Address { base: slots.base(), len: Landing::BYTES };
    // Never in relaxed order: the word must not land after its completion.
    let access = Access::Landing { relaxed: false };
    // SAFETY: the slots stay mapped as long as `slots` is held, and are accessed as atomics only.
    let landing = unsafe { Region::register(own.rail.pd(), source, access, slots.clone()) }?;
    let pair = |(i, qp)| QueuePairState::new(qp, own.depth, config.signal_every, i as u8);
    Ok(Path::new(path::Parts {
        pairs: own.pairs.into_iter().enumerate().map(pair).collect(),
        cq: own.cq,
        rail: own.rail,
        landing,
        slots: slots.clone(),
        memory: memory.clone(),
        segments: served.segments.clone(),
        words: served.words,
        host: own.host,
        window: config.window,
        stall: stall(config),
    }))
}

/// Makes a rail's queue pairs, and describes them for the peer.
fn prepare(
    rail: Arc<Rail>,
    port: Port,
    layer: LinkLayer,
    host: Option<IpAddr>,
    peer: Option<&Gid>,
    config: &VerbsConfig,
) -> Result<(PendingRail, RailEnd), VerbsError> {
    let (gid, at) = rail.address(&port, layer, peer, config)?;
    let n = config.queue_pairs.clamp(1, MAX_QUEUE_PAIRS);
    let depth = depth(config.depth, rail.limits().max_wr);
    // Room for a completion of every request: when a queue pair fails, each request reports.
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
    Ok((PendingRail { pairs, cq, rail, port, layer, at, host, depth }, end))
}

/// Longest time without a completion. The specification lets a device wait up to four times as long for an answer as it is
/// told to, and a long READ that shares a slow wire (with 4 MB/s left for it) is not lost.
fn stall(config: &VerbsConfig) -> Duration {
    config.gives_up_after() * 4 + Duration::from_micros(u64::from(config.max_read) / 4) + Duration::from_millis(300)
}

/// The largest power of two that is at most the configured depth, and at most the device's limit.
fn depth(configured: u32, limit: u32) -> u32 {
    1 << configured.clamp(1, MAX_DEPTH).min(limit.max(1)).ilog2()
}

#[cfg(test)]
mod tests {
    use super::depth;

    #[test]
    fn a_queue_is_no_deeper_than_its_device_allows() {
        assert_eq!(depth(128, 1 << 15), 128);
        assert_eq!(depth(128, 100), 64);
        assert_eq!(depth(1 << 20, u32::MAX), super::MAX_DEPTH);
        assert_eq!(depth(0, 0), 1);
    }
}
