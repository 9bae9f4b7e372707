//! The producer's end: queue pairs for a consumer's READs.
//!
//! Owns those queue pairs for as long as their session lives. It posts nothing, polls nothing, and spends no CPU on a pull.
//! A connected consumer can READ the whole pool and the fence table, and nothing else: verbs peers are one trust domain.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use kvferry_proto::{Incarnation, Limits};

use super::{
    cleanup,
    cq::Cq,
    device::Port,
    error::VerbsError,
    events::Subscriber,
    exchange::{LinkLayer, QpEnd, RailEnd, Remote, ServedRail, VerbsRequest, VerbsTicket},
    memory::Region,
    qp::{Agreed, Qp, Side, random_psn},
    rail::{Rail, Role},
    rails::Rails,
};
use crate::{
    config::VerbsConfig,
    memory::{Export, Memory},
};

/// One lane's queue pairs on one rail. Fields drop in this order.
#[derive(Debug)]
struct Served {
    pairs: Vec<Qp>,
    cq: Cq,
    rail: Arc<Rail>,
}

/// All served lanes, by number.
#[derive(Debug, Default)]
pub(crate) struct Lanes(Mutex<HashMap<u64, Vec<Served>>>);

impl Lanes {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Vec<Served>>> {
        // The map is consistent after any panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Subscriber for Lanes {
    /// Destroys queue pairs on failed devices, which cannot be closed before. Queue pairs on other rails stay.
    fn device_failed(&self) {
        let mut failed = Vec::new();
        for served in self.lock().values_mut() {
            failed.extend(served.extract_if(.., |s| s.rail.state().fatal()));
        }
        give_back(failed);
    }
}

/// A producer rank's verbs. Dropping it destroys all queue pairs.
#[derive(Debug)]
pub(crate) struct Server {
    rails: Arc<Rails>,
    incarnation: Incarnation,
    fence_slots: u32,
    max: usize,
    lanes: Arc<Lanes>,
}

impl Server {
    /// Opens the rails, and begins to register the pool in the background. At most `limits.lanes` lanes are served.
    pub(crate) fn start(
        export: &Export,
        incarnation: Incarnation,
        config: &VerbsConfig,
        limits: &Limits,
    ) -> Result<Self, VerbsError> {
        let rails = Rails::open(config, export.memory.clone(), Role::Served(export.words.clone()))?;
        Ok(Self::on(rails, incarnation, export.words.len(), limits))
    }

    /// On open rails.
    pub(crate) fn on(rails: Arc<Rails>, incarnation: Incarnation, fence_slots: u32, limits: &Limits) -> Self {
        Self { rails, incarnation, fence_slots, max: limits.lanes, lanes: Arc::default() }
    }

    /// Its rails.
    #[cfg(test)]
    pub(crate) fn rails(&self) -> &Arc<Rails> {
        &self.rails
    }

    fn lanes(&self) -> MutexGuard<'_, HashMap<u64, Vec<Served>>> {
        self.lanes.lock()
    }

    /// Makes a lane of this number. Blocks for a few milliseconds.
    pub(crate) fn admit(&self, lane: u64, request: &VerbsRequest) -> Result<VerbsTicket, VerbsError> {
        request.check().map_err(|what| VerbsError::Protocol { what })?;
        let full = |lanes: &HashMap<u64, Vec<Served>>| lanes.len() >= self.max;
        if full(&self.lanes()) {
            return Err(VerbsError::Full { limit: self.max });
        }
        let usable = self.rails.usable(None)?;
        let (mut served, mut answers, mut why) = (Vec::new(), Vec::new(), Vec::new());
        for (of, here) in self.pair(request, &usable, &mut why) {
            let (rail, port, layer) = &usable[here];
            match self.serve(rail, port, *layer, &request.rails[of]) {
                Ok((s, mut answer)) => {
                    answer.of = of as u8;
                    served.push(s);
                    answers.push(answer);
                }
                Err(e) => {
                    // The rail counts as working: the peer's description of itself may be the cause.
                    why.push(format!("{} to {}: {e}", rail.name(), request.rails[of].name));
                }
            }
        }
        if answers.is_empty() {
            if why.is_empty() {
                let theirs: Vec<_> = request.rails.iter().map(|r| format!("{} {}", r.name, r.gid)).collect();
                why.push(format!("there: {}", theirs.join(", ")));
            }
            return Err(VerbsError::NoPath { why: why.join("; ") });
        }
        let mut lanes = self.lanes();
        if full(&lanes) {
            return Err(VerbsError::Full { limit: self.max });
        }
        lanes.insert(lane, served);
        drop(lanes);
        // A device that failed meanwhile told its subscribers before this lane was in the map.
        if usable.iter().any(|(rail, ..)| rail.state().fatal()) {
            self.lanes.device_failed();
        }
        let (incarnation, fence_slots) = (self.incarnation.get(), self.fence_slots);
        let degraded = self.rails.expected() > usable.len();
        Ok(VerbsTicket { lane, incarnation, fence_slots, rails: answers, degraded })
    }

    /// Destroys a lane's queue pairs: reads through them fail from now on.
    pub(crate) fn dismiss(&self, lane: u64) {
        if let Some(served) = self.lanes().remove(&lane) {
            give_back(served);
        }
    }

    /// How many lanes are served now.
    #[cfg(test)]
    pub(crate) fn lanes_served(&self) -> usize {
        self.lanes().len()
    }

    /// Pairs the reader's rails with rails here: nearest addresses first, each used once as far as possible. A rail here
    /// without an address is not paired, and its reason is added to `why`.
    fn pair(
        &self,
        request: &VerbsRequest,
        usable: &[(Arc<Rail>, Port, LinkLayer)],
        why: &mut Vec<String>,
    ) -> Vec<(usize, usize)> {
        let mut options = Vec::new();
        for (of, theirs) in request.rails.iter().enumerate() {
            for (here, (rail, port, layer)) in usable.iter().enumerate() {
                if *layer != theirs.link_layer {
                    continue;
                }
                match rail.address(port, *layer, Some(&theirs.gid), self.rails.config()) {
                    Ok((gid, _)) => {
                        let family = *layer == LinkLayer::InfiniBand || gid.ip().is_ipv4() == theirs.gid.ip().is_ipv4();
                        if family {
                            options.push((gid.shared_prefix(&theirs.gid), of, here));
                        }
                    }
                    Err(e) => {
                        let e = e.to_string();
                        if !why.contains(&e) {
                            why.push(e);
                        }
                    }
                }
            }
        }
        options.sort_by_key(|&(near, of, here)| (std::cmp::Reverse(near), of, here));
        assign(&options, request.rails.len(), usable.len())
    }

    fn serve(
        &self,
        rail: &Arc<Rail>,
        port: &Port,
        layer: LinkLayer,
        reader: &RailEnd,
    ) -> Result<(Served, ServedRail), VerbsError> {
        let config = self.rails.config();
        let pool = rail.pool().ok_or_else(|| {
            let (done, all) = self.rails.progress();
            VerbsError::NotYet { done, all }
        })?;
        let (gid, at) = rail.address(port, layer, Some(&reader.gid), config)?;
        let lanes: Weak<Lanes> = Arc::downgrade(&self.lanes);
        rail.state().subscribe(lanes);
        let cq = Cq::new(rail.pd().device(), 1)?;
        let rd_atomic = config.rd_atomic.min(rail.limits().max_dest_rd_atomic).max(1);
        let agreed = Agreed { mtu: port.mtu.min(reader.mtu), rd_atomic: rd_atomic.min(reader.rd_atomic) };
        let (mut pairs, mut ends) = (Vec::new(), Vec::new());
        for theirs in &reader.queue_pairs {
            let qp = Qp::new(rail.pd(), &cq, 1, Side::Served, port.number)?;
            let end = QpEnd { number: qp.number(), psn: random_psn() };
            qp.connect(at, reader, *theirs, end.psn, agreed, config)?;
            pairs.push(qp);
            ends.push(end);
        }
        let end = RailEnd {
            name: rail.name().into(),
            link_layer: layer,
            lid: port.lid,
            gid,
            mtu: port.mtu,
            rd_atomic,
            queue_pairs: ends,
        };
        let place = |r: &Region<Memory>| Remote { address: r.address(), rkey: r.rkey() };
        // No read names an empty segment.
        let segments = pool.segments.iter().map(|r| r.as_ref().map(place).unwrap_or_default()).collect();
        let words = pool.words.as_ref().map(|r| Remote { address: r.address(), rkey: r.rkey() });
        let words = words.ok_or(VerbsError::Protocol { what: "no fence table is served here" })?;
        Ok((Served { pairs, cq, rail: rail.clone() }, ServedRail { of: 0, end, segments, words }))
    }
}

/// Takes the best options: each rail of either side once, then rails here again for the reader's remaining rails.
fn assign(options: &[(u32, usize, usize)], there: usize, here: usize) -> Vec<(usize, usize)> {
    let (mut used_there, mut used_here, mut pairs) = (vec![false; there], vec![false; here], Vec::new());
    for again in [false, true] {
        for &(_, of, at) in options {
            if !used_there[of] && (again || !used_here[at]) {
                (used_there[of], used_here[at]) = (true, true);
                pairs.push((of, at));
            }
        }
    }
    pairs.sort_unstable();
    pairs
}

fn give_back(served: Vec<Served>) {
    for s in served {
        let pairs = s.pairs;
        cleanup::give_back(|| pairs, Some(s.cq), s.rail);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let lanes = std::mem::take(&mut *self.lanes());
        lanes.into_values().for_each(give_back);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rails_are_paired_by_nearness_and_each_is_used() {
        // Two wires: 0-1 and 1-0 are near.
        let options = [(28, 0, 1), (28, 1, 0), (20, 0, 0), (20, 1, 1)];
        assert_eq!(assign(&options, 2, 2), [(0, 1), (1, 0)]);
        // One rail here serves both of the reader's.
        assert_eq!(assign(&[(28, 0, 0), (20, 1, 0)], 2, 1), [(0, 0), (1, 0)]);
        // Nothing reaches the second one.
        assert_eq!(assign(&[(28, 0, 0)], 2, 1), [(0, 0)]);
        assert!(assign(&[], 2, 0).is_empty());
    }
}
