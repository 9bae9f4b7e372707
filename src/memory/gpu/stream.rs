//! A CUDA stream of the engine, and the wait for the work that it holds.

use super::{error::GpuError, handle::Gpu, queue::Order};
use crate::memory::Memory;

/// A CUDA stream of the engine, on the GPU of its pool. kvferry records an event of its own on it, in the calling thread, and
/// keeps no reference to the stream.
///
/// An engine's own events are not taken: engines record them again for later work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaStream(usize);

impl CudaStream {
    /// A stream from its `CUstream` (or `cudaStream_t`); null is the legacy default stream.
    ///
    /// # Safety
    /// The stream must belong to the primary context of the GPU that holds the pool. It must exist while the call that is
    /// given this value runs.
    pub unsafe fn from_raw(stream: *mut std::ffi::c_void) -> Self {
        Self(stream.addr())
    }

    pub(super) fn raw(self) -> usize {
        self.0
    }
}

/// The work that a stream held when this was recorded. Dropped unwatched, it costs nothing more.
pub(crate) struct Mark {
    gpu: Gpu,
    stream: usize,
    /// The event; `None` once it is watched.
    event: Option<usize>,
}

impl Mark {
    /// Marks the end of the work that `stream` holds now, in the memory's GPU.
    ///
    /// # Errors
    /// The memory is host memory, the stream is capturing a graph, or the event cannot be recorded.
    pub(crate) fn record(memory: &Memory, stream: CudaStream) -> Result<Self, String> {
        let Some(gpu) = memory.gpu() else {
            return Err("the pool is host memory, which no stream fills; use `Ready::Later` or `local_ready`".into());
        };
        gpu.check().and_then(|()| gpu.record(stream)).map_err(|e| e.to_string()).map(|event| Self {
            gpu: gpu.clone(),
            stream: stream.raw(),
            event: Some(event),
        })
    }

    /// Calls `then`, on the GPU's thread, when the work is done, or with the error that keeps it from being done. `then` must
    /// not block.
    pub(crate) fn then(mut self, then: impl FnOnce(Result<(), GpuError>) + Send + 'static) {
        if let Some(event) = self.event.take() {
            self.gpu.send(Order::After { event, stream: self.stream, then: Box::new(then) });
        }
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if let Some(event) = self.event.take() {
            self.gpu.send(Order::After { event, stream: self.stream, then: Box::new(|_| ()) });
        }
    }
}
