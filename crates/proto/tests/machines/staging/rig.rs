//! A staged lane over an inner lane and a copier that the test moves by hand. Memory is a map from an address to the source
//! offset of the read that wrote it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use kvferry_proto::{
    Attempt, FenceKind, FenceSlot, Grant, Lane, LaneCaps, LaneEvent, LaneKind, Nonce, Read,
    staging::{Copier, Finished, Ring, Staged, StagedCopy},
};

pub(crate) const SLOT: u64 = 64 << 10;
pub(crate) const BOUND: Duration = Duration::from_millis(20);
pub(crate) const A: Attempt = Attempt(1);
pub(crate) const B: Attempt = Attempt(2);

pub(crate) fn grant() -> Grant {
    Grant { slot: 0, nonce: Nonce::from_wire(77).unwrap() }
}

/// Reads of a chunk, of `len` bytes each. Source and destination are the same offset.
pub(crate) fn reads(chunk: u32, n: u64, len: u64) -> Vec<Read> {
    let at = |i| u64::from(chunk) * (64 << 20) + i * len;
    (0..n).map(|i| Read::between(chunk, (3, at(i)), (5, at(i)), len)).collect()
}

/// The inner lane's state and the copier's, and the memory that they write.
#[derive(Default)]
pub(crate) struct State {
    pub fence: Option<FenceKind>,
    /// Reads in flight, in the order of their posts.
    pub in_flight: Vec<(Attempt, Read)>,
    /// Chunks whose last read was accepted, by the lane's chunk number.
    pub complete: Vec<(Attempt, u32)>,
    /// Most reads that a post accepts.
    pub accepts: Option<usize>,
    pub events: Vec<LaneEvent>,
    pub begun: Vec<Attempt>,
    pub stopped: Vec<Attempt>,
    pub fences: Vec<FenceSlot>,
    pub kills: u32,
    /// Jobs that were not carried out.
    pub jobs: Vec<(u64, Vec<StagedCopy>)>,
    pub tickets: u64,
    pub finished: Finished,
    /// Jobs that the copier holds at most.
    pub room: Option<usize>,
    /// Source offset by offset in the ring.
    pub ring: BTreeMap<u64, u64>,
    /// Source offset by offset in local memory.
    pub local: BTreeMap<u64, u64>,
}

impl State {
    /// The `n`th read in flight lands and is reported.
    pub(crate) fn land(&mut self, n: usize) -> (Attempt, Read) {
        let (attempt, r) = self.in_flight.remove(n);
        self.ring.insert(r.dst_offset, r.src_offset);
        self.events.push(LaneEvent::Done { attempt, chunk: r.chunk, reads: 1 });
        (attempt, r)
    }

    pub(crate) fn land_all(&mut self) {
        while !self.in_flight.is_empty() {
            let last = self.in_flight.len() - 1;
            self.land(last);
        }
    }

    /// A lane with fences of its own reads those of chunks that are complete and landed.
    pub(crate) fn fence_all(&mut self, word: u64) {
        if self.fence == Some(FenceKind::Posted) {
            return;
        }
        for (attempt, chunk) in std::mem::take(&mut self.complete) {
            if self.in_flight.iter().any(|(a, r)| (*a, r.chunk) == (attempt, chunk)) {
                self.complete.push((attempt, chunk));
            } else {
                self.events.push(LaneEvent::Fence { attempt, chunk, word });
            }
        }
    }

    /// Carries out and finishes the next job.
    pub(crate) fn copy(&mut self) -> bool {
        if self.jobs.is_empty() || self.finished.failed {
            return false;
        }
        let (ticket, copies) = self.jobs.remove(0);
        for c in copies {
            assert_eq!(c.segment, 5);
            let from = self.ring.get(&c.ring_offset).copied();
            assert_eq!(from, Some(c.offset), "the slot holds another read's bytes");
            self.local.insert(c.offset, c.offset);
        }
        self.finished.up_to = ticket;
        true
    }

    pub(crate) fn copy_all(&mut self) {
        while self.copy() {}
    }
}

#[derive(Clone, Default)]
pub(crate) struct Shared(Arc<Mutex<State>>);

impl Shared {
    pub(crate) fn get(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

pub(crate) struct Inner(Shared);
pub(crate) struct Device(Shared);

impl Lane for Inner {
    fn caps(&self) -> LaneCaps {
        let fence = self.0.get().fence.unwrap_or(FenceKind::Trailer);
        LaneCaps { kind: LaneKind::Tcp, max_read: 1 << 20, quiet_bound: Duration::from_millis(5), fence }
    }
    fn degraded(&self) -> bool {
        true
    }
    fn begin(&mut self, a: Attempt, _: Grant) {
        self.0.get().begun.push(a);
    }
    fn post(&mut self, a: Attempt, reads: &[Read]) -> usize {
        let mut s = self.0.get();
        let n = s.accepts.unwrap_or(usize::MAX).min(reads.len());
        for r in &reads[..n] {
            assert_eq!(r.dst_segment, 0);
            let (from, to) = (r.dst_offset, r.dst_offset + r.len);
            let overlap = s.in_flight.iter().find(|(_, o)| o.dst_offset < to && o.dst_offset + o.len > from);
            assert!(overlap.is_none(), "two reads in flight share a place: {overlap:?}");
            for (_, copies) in &s.jobs {
                let overlap = copies.iter().find(|c| c.ring_offset < to && c.ring_offset + c.len > from);
                assert!(overlap.is_none(), "a read goes to a slot that a job reads: {overlap:?}");
            }
            s.in_flight.push((a, *r));
        }
        if n == reads.len() {
            s.complete.push((a, reads[0].chunk));
        }
        n
    }
    fn post_fence(&mut self, _: Attempt, f: FenceSlot) -> bool {
        self.0.get().fences.push(f);
        true
    }
    fn stop(&mut self, a: Attempt) {
        self.0.get().stopped.push(a);
    }
    fn kill(&mut self) {
        self.0.get().kills += 1;
    }
    fn poll(&mut self, out: &mut Vec<LaneEvent>) {
        out.append(&mut self.0.get().events);
    }
}

impl Copier for Device {
    fn submit(&mut self, copies: &[StagedCopy]) -> Option<u64> {
        let mut s = self.0.get();
        assert!(!copies.is_empty());
        if s.finished.failed || s.room.is_some_and(|room| s.jobs.len() >= room) {
            return None;
        }
        s.tickets += 1;
        let ticket = s.tickets;
        s.jobs.push((ticket, copies.to_vec()));
        Some(ticket)
    }
    fn finished(&mut self) -> Finished {
        self.0.get().finished
    }
}

/// A staged lane, and the owner's view of it.
pub(crate) struct Rig {
    pub ring: Arc<Ring>,
    pub state: Shared,
    pub lane: Staged<Inner, Device>,
}

impl Rig {
    /// A lane with fences of this kind on a ring of its own with `slots` slots, and attempt `A`.
    pub(crate) fn new(fence: FenceKind, slots: u64) -> Self {
        Self::on(&Arc::new(Ring::new(slots * SLOT)), fence)
    }

    pub(crate) fn on(ring: &Arc<Ring>, fence: FenceKind) -> Self {
        let state = Shared::default();
        state.get().fence = Some(fence);
        let lane = Staged::new(Inner(state.clone()), Device(state.clone()), ring.clone(), BOUND);
        let mut rig = Self { ring: ring.clone(), state, lane };
        rig.lane.begin(A, grant());
        rig
    }

    pub(crate) fn s(&self) -> MutexGuard<'_, State> {
        self.state.get()
    }

    pub(crate) fn poll(&mut self) -> Vec<LaneEvent> {
        let mut out = Vec::new();
        self.lane.poll(&mut out);
        out
    }

    /// An event of the inner lane reaches the staged lane.
    pub(crate) fn inner(&mut self, event: LaneEvent) -> Vec<LaneEvent> {
        self.s().events.push(event);
        self.poll()
    }

    /// Everything in flight lands, and is copied.
    pub(crate) fn land_and_copy(&mut self) -> Vec<LaneEvent> {
        self.s().land_all();
        let mut out = self.poll();
        self.s().copy_all();
        out.extend(self.poll());
        out
    }

    /// Distinct slots of the reads in flight.
    pub(crate) fn slots_in_flight(&self) -> BTreeSet<u64> {
        self.s().in_flight.iter().map(|(_, r)| r.dst_offset / SLOT).collect()
    }
}

pub(crate) fn done(events: &[LaneEvent], a: Attempt, chunk: u32) -> u32 {
    let of = |e: &LaneEvent| match e {
        LaneEvent::Done { attempt, chunk: c, reads } if (*attempt, *c) == (a, chunk) => *reads,
        _ => 0,
    };
    events.iter().map(of).sum()
}
