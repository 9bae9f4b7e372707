//! A CUDA stream of the engine, and the wait for the work that it holds.

use super::{
    error::GpuError,
    handle::Gpu,
    queue::{Order, Then},
};

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

impl Gpu {
    /// Calls `then`, on the GPU's thread, when the work that `stream` holds now is done, or with the error that keeps it from
    /// being done. `then` must not block.
    ///
    /// # Errors
    /// The stream is capturing a graph, or the event cannot be recorded. `then` is not called.
    pub(crate) fn after(
        &self,
        stream: CudaStream,
        then: impl FnOnce(Result<(), GpuError>) + Send + 'static,
    ) -> Result<(), GpuError> {
        self.check()?;
        #[cfg(feature = "cuda")]
        let event = super::context::record(self.info().ordinal, stream)?;
        #[cfg(not(feature = "cuda"))]
        let event = 0;
        let then: Then = Box::new(then);
        self.send(Order::After { event, stream: stream.raw(), then });
        Ok(())
    }
}
