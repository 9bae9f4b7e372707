//! Requests of pools and lanes to a GPU's set-up thread.

use std::ffi::{c_uint, c_void};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::{
    CudaStream, Gpu, alloc::Allocation, context, error::GpuError, exchange::Exported, pointer, share, share::Imported,
};
use crate::memory::Memory;

/// CUDA_ERROR_ALREADY_MAPPED.
const ALREADY_MAPPED: u32 = 208;

impl Gpu {
    /// The GPU that holds all of these segments, each an address and a length in bytes.
    pub(crate) fn holding(segments: &[(u64, u64)]) -> Result<Self, GpuError> {
        let first = segments.iter().position(|s| s.1 > 0).unwrap_or(0);
        let &(address, len) = segments.get(first).ok_or(GpuError::NoDevice)?;
        let gpu = Self::open(pointer::ordinal(first, address, len)?)?;
        let list = segments.to_vec();
        gpu.call(move |c| {
            for (i, &(address, len)) in list.iter().enumerate() {
                pointer::extents(c.lib, c.raw(), (c.ordinal, i), address, len)?;
            }
            Ok(())
        })?;
        Ok(gpu)
    }

    /// Allocates zeroed memory that other processes can map.
    pub(crate) fn allocate(&self, segments: &[u64]) -> Result<Allocation, GpuError> {
        Allocation::new(self, segments)
    }

    /// Records a new event on an engine's stream, in the calling thread.
    pub(super) fn record(&self, stream: CudaStream) -> Result<usize, GpuError> {
        context::record(self.info().ordinal, stream)
    }

    /// Bytes of its memory: free, and in total.
    #[cfg(test)]
    pub(crate) fn memory(&self) -> Result<(u64, u64), GpuError> {
        self.call(super::Context::memory)
    }

    /// Exports the segments of a pool for other processes of this host.
    pub(crate) async fn export(&self, segments: Vec<(u64, u64)>) -> Result<Exported, GpuError> {
        self.call_async(move |c| share::export(c, &segments)).await
    }

    /// Maps the pool of another process: see [`share::import`].
    pub(crate) async fn import(&self, exported: Exported, lengths: Vec<u64>) -> Result<Imported, GpuError> {
        let (exported, lengths) = (Arc::new(exported), Arc::new(lengths));
        let mut tries = 3;
        loop {
            let (gpu, e, l) = (self.clone(), exported.clone(), lengths.clone());
            match self.call_async(move |c| share::import(c, &gpu, &e, &l)).await {
                // The former mapping was given up a moment ago, and its close is in the queue by now.
                Err(GpuError::Call { code: ALREADY_MAPPED, .. }) if tries > 1 => tries -= 1,
                imported => return imported,
            }
        }
    }

    /// Exports a range of its memory as a dmabuf; returns the range's offset in it.
    pub(crate) fn dmabuf(&self, address: u64, len: u64) -> Result<(OwnedFd, u64), GpuError> {
        self.call(move |c| share::dmabuf(c, address, len))
    }

    /// Pins host memory, so that copies of it run at full speed and beside others.
    pub(crate) fn pin(&self, memory: &Memory) -> Result<Pinned, GpuError> {
        /// CU_MEMHOSTREGISTER_PORTABLE: pinned for every context.
        const PORTABLE: c_uint = 1;
        let mut this = Pinned { gpu: self.clone(), addresses: Vec::new(), memory: memory.clone() };
        let ranges: Vec<_> =
            (0..memory.segments().len()).map(|i| (memory.base(i as u16), memory.segments()[i])).collect();
        this.addresses = self.call(move |c| {
            let mut pinned = Vec::new();
            for (at, len) in ranges.into_iter().filter(|r| r.1 > 0) {
                let start: *mut c_void = std::ptr::with_exposed_provenance_mut(at as usize);
                // SAFETY: the range is host memory, which `Pinned` keeps mapped until it is unregistered.
                let code = unsafe { (c.lib.cuMemHostRegister_v2)(start, len as usize, PORTABLE) };
                c.lib.check("cuMemHostRegister", code)?;
                pinned.push(at);
            }
            Ok(pinned)
        })?;
        Ok(this)
    }
}

/// Pinned host memory. Dropping it unpins the memory, on the GPU's set-up thread.
pub(crate) struct Pinned {
    gpu: Gpu,
    addresses: Vec<u64>,
    memory: Memory,
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let (addresses, memory) = (std::mem::take(&mut self.addresses), self.memory.clone());
        self.gpu.set_up(move |c| {
            for at in addresses {
                let start: *mut c_void = std::ptr::with_exposed_provenance_mut(at as usize);
                // SAFETY: the range was registered, and no copy touches it any more: jobs keep what they touch.
                let _ = unsafe { (c.lib.cuMemHostUnregister)(start) };
            }
            drop(memory);
        });
    }
}
