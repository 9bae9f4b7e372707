//! The simulation's `Lane`: passes every call to the [`Fabric`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvferry_proto::{Attempt, FenceSlot, Grant, Lane, LaneCaps, LaneEvent, Read};

use crate::fabric::Fabric;

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
    pub(crate) fn connect(fabric: &Shared, local: usize, proc: usize, caps: LaneCaps, degraded: bool) -> Self {
        let number = fabric.get().new_lane(local, proc, caps);
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
