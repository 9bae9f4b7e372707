//! The simulation's lanes: each passes its calls to the [`Fabric`]. The staged one is the real one over a simulated lane.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use kvferry_proto::{
    Attempt, FenceSlot, Grant, Lane, LaneCaps, LaneEvent, Read,
    staging::{Copier, Finished, Ring, Staged, StagedCopy},
};

use crate::{
    fabric::{Fabric, Path},
    trace::Micros,
};

/// The data plane, shared by the world and its lanes; one thread, so the lock is never waited for.
#[derive(Clone)]
pub(crate) struct Shared(Arc<Mutex<Fabric>>);

impl Shared {
    pub(crate) fn new(fabric: Fabric) -> Self {
        Self(Arc::new(Mutex::new(fabric)))
    }

    pub(crate) fn get(&self) -> MutexGuard<'_, Fabric> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) struct SimLane {
    fabric: Shared,
    number: usize,
    caps: LaneCaps,
    /// Some of its paths failed.
    degraded: bool,
}

impl SimLane {
    pub(crate) fn connect(
        fabric: &Shared,
        local: usize,
        proc: usize,
        caps: LaneCaps,
        degraded: bool,
        path: Path,
    ) -> Self {
        let number = fabric.get().new_lane(local, proc, caps, path);
        Self { fabric: fabric.clone(), number, caps, degraded }
    }

    pub(crate) fn number(&self) -> usize {
        self.number
    }
}

impl Lane for SimLane {
    fn caps(&self) -> LaneCaps {
        self.caps
    }

    fn degraded(&self) -> bool {
        self.degraded
    }

    fn begin(&mut self, a: Attempt, grant: Grant) {
        self.fabric.get().begin(self.number, a, grant);
    }

    fn post(&mut self, a: Attempt, reads: &[Read]) -> usize {
        self.fabric.get().post(self.number, a, reads)
    }

    fn post_fence(&mut self, a: Attempt, f: FenceSlot) -> bool {
        self.fabric.get().post_fence(self.number, a, f)
    }

    fn stop(&mut self, a: Attempt) {
        self.fabric.get().stop(self.number, a);
    }

    fn kill(&mut self) {
        self.fabric.get().kill(self.number);
    }

    fn poll(&mut self, out: &mut Vec<LaneEvent>) {
        self.fabric.get().poll(self.number, out);
    }
}

impl Drop for SimLane {
    fn drop(&mut self) {
        self.fabric.get().dropped(self.number);
    }
}

/// The copier of a lane.
struct SimCopier {
    fabric: Shared,
    lane: usize,
}

impl Copier for SimCopier {
    fn submit(&mut self, copies: &[StagedCopy]) -> Option<u64> {
        self.fabric.get().submit(self.lane, copies)
    }

    fn finished(&mut self) -> Finished {
        self.fabric.get().copies_finished(self.lane)
    }
}

/// A staged lane, with the timer of the real one's wrapper.
pub(crate) struct StagedLane {
    fabric: Shared,
    number: usize,
    local: usize,
    staged: Staged<SimLane, SimCopier>,
    /// When it gives up waiting for copies.
    overdue: Option<Micros>,
}

impl StagedLane {
    pub(crate) fn new(inner: SimLane, local: usize, ring: Arc<Ring>, bound: Duration) -> Self {
        let (fabric, number) = (inner.fabric.clone(), inner.number);
        let copier = SimCopier { fabric: fabric.clone(), lane: number };
        Self { fabric, number, local, staged: Staged::new(inner, copier, ring, bound), overdue: None }
    }

    /// The real lane's owner does not sleep while the lane has events.
    fn stay_awake(&self) {
        if self.staged.has_events() {
            self.fabric.get().ready.push(self.local);
        }
    }
}

impl Lane for StagedLane {
    fn caps(&self) -> LaneCaps {
        self.staged.caps()
    }

    fn degraded(&self) -> bool {
        self.staged.degraded()
    }

    fn begin(&mut self, a: Attempt, grant: Grant) {
        self.staged.begin(a, grant);
        self.stay_awake();
    }

    fn post(&mut self, a: Attempt, reads: &[Read]) -> usize {
        self.fabric.get().offers(self.number, reads);
        let n = self.staged.post(a, reads);
        self.fabric.get().accepted(self.number, a, &reads[..n]);
        self.stay_awake();
        n
    }

    fn post_fence(&mut self, a: Attempt, f: FenceSlot) -> bool {
        self.staged.post_fence(a, f)
    }

    fn stop(&mut self, a: Attempt) {
        self.staged.stop(a);
    }

    fn kill(&mut self) {
        self.staged.kill();
        if self.overdue.is_none() {
            let half = self.caps().quiet_bound.as_micros() as Micros / 2;
            self.overdue = Some(self.fabric.get().copies_due(self.number, half));
        }
    }

    fn poll(&mut self, out: &mut Vec<LaneEvent>) {
        let now = self.fabric.get().now;
        if self.overdue.is_some_and(|t| t <= now) && self.staged.copies_outstanding() {
            self.overdue = Some(Micros::MAX);
            self.fabric.get().copies_overdue(self.number);
            self.staged.wedge();
        }
        let first = out.len();
        self.staged.poll(out);
        for e in &out[first..] {
            if let LaneEvent::Fence { attempt, chunk, word } = *e {
                self.fabric.get().staged_fence(self.number, attempt, chunk, word);
            }
        }
    }
}
