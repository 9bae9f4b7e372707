//! The pinned ring of a rank: host memory that data passes through on its way into or out of GPU memory.

use std::sync::Arc;

use kvferry_proto::staging::Ring;

use super::{CopyQueue, Direction, Gpu, GpuError, Piece, Pinned, queue::Keep};
use crate::{config::GpuConfig, memory::Memory};

/// A rank's pinned ring, and the pool that it serves.
#[derive(Clone)]
pub(crate) struct PinnedRing {
    gpu: Gpu,
    pool: Memory,
    memory: Memory,
    slots: Arc<Ring>,
    config: GpuConfig,
    /// Until the last copy has ended: jobs keep it.
    pinned: Arc<Pinned>,
}

impl PinnedRing {
    /// A ring for a pool in GPU memory; `None` for host memory.
    ///
    /// # Errors
    /// The host has no memory for it, or the driver cannot pin it.
    pub(crate) fn new(pool: &Memory, config: &GpuConfig) -> Result<Option<Self>, GpuError> {
        let Some(gpu) = pool.gpu().cloned() else { return Ok(None) };
        let failed = |error: String| GpuError::Os { what: "cannot pin the ring in host memory (gpu.ring)", error };
        let memory = Memory::anonymous(&[config.ring]).map_err(|e| failed(e.to_string()))?;
        let pinned = Arc::new(gpu.pin(&memory).map_err(|e| failed(e.to_string()))?);
        let slots = Arc::new(Ring::new(config.ring));
        Ok(Some(Self { gpu, pool: pool.clone(), memory, slots, config: config.clone(), pinned }))
    }

    /// The ring's memory: one segment.
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Its slots.
    pub(crate) fn slots(&self) -> &Arc<Ring> {
        &self.slots
    }

    /// The settings.
    pub(crate) fn config(&self) -> &GpuConfig {
        &self.config
    }

    /// A queue for copies between the ring and the pool.
    pub(crate) fn queue(&self, direction: Direction) -> std::io::Result<RingQueue> {
        let keep = Arc::new((self.pool.clone(), self.memory.clone(), self.pinned.clone()));
        let queue = CopyQueue::new(&self.gpu, self.config.copy)?;
        Ok(RingQueue { queue, direction, ring: self.memory.clone(), pool: self.pool.clone(), keep })
    }
}

impl std::fmt::Debug for PinnedRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PinnedRing").field("slots", &self.slots).finish_non_exhaustive()
    }
}

/// Copies between the ring and the pool, in one direction.
pub(crate) struct RingQueue {
    pub(crate) queue: CopyQueue,
    direction: Direction,
    ring: Memory,
    pub(crate) pool: Memory,
    keep: Keep,
}

impl RingQueue {
    /// A copy of `len` bytes between an offset in the ring and a place in the pool. Fails when either does not have them.
    pub(crate) fn piece(&self, ring: u64, (segment, offset): (u16, u64), len: u64) -> std::io::Result<Piece> {
        let (ring, pool) = ((&self.ring, 0, ring), (&self.pool, segment, offset));
        match self.direction {
            Direction::ToHost => Piece::new(pool, ring, len),
            Direction::ToGpu | Direction::Between => Piece::new(ring, pool, len),
        }
    }

    /// Submits copies; see [`CopyQueue::submit`].
    pub(crate) fn submit(&mut self, pieces: Vec<Piece>) -> Option<u64> {
        self.queue.submit(self.direction, pieces, self.keep.clone())
    }
}
