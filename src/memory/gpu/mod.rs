//! GPU memory: what the CUDA driver offers, and the threads of each GPU that talk to it.
//!
//! A driver may block for milliseconds to minutes, so lanes never call it: they submit copies and flushes to the GPU's thread,
//! get tickets, and sleep on a descriptor (promise *timely*). Pools are set up and taken down on a thread of their own. The
//! threads share the engine's context, where a fault would
//! poison the engine's own work: every range is checked before it is submitted.
//!
//! Without the feature `cuda` the types exist and no GPU does: [`Gpu::open`] fails with [`GpuError::NotBuilt`].
#![cfg_attr(not(feature = "cuda"), allow(dead_code, unreachable_pub))]

mod error;
mod exchange;
mod handle;
mod queue;
mod ring;
pub(crate) mod stats;
mod stream;
mod window;

#[cfg(not(feature = "cuda"))]
mod absent;
#[cfg(feature = "cuda")]
mod alloc;
#[cfg(feature = "cuda")]
mod calls;
#[cfg(feature = "cuda")]
mod context;
#[cfg(feature = "cuda")]
mod library;
#[cfg(feature = "cuda")]
mod pipe;
#[cfg(feature = "cuda")]
mod pointer;
#[cfg(feature = "cuda")]
mod share;
#[cfg(all(test, feature = "cuda"))]
mod speed;
#[cfg(all(test, feature = "cuda"))]
pub(crate) mod testing;
#[cfg(feature = "cuda")]
mod thread;
#[cfg(feature = "cuda")]
mod way;

#[cfg(not(feature = "cuda"))]
pub(crate) use absent::{Allocation, Context, Imported, Pinned};
#[cfg(feature = "cuda")]
pub(crate) use {alloc::Allocation, calls::Pinned, context::Context, share::Imported};

pub use error::GpuError;
pub(crate) use exchange::{Exported, Handle, Part};
pub(crate) use handle::{Gpu, uuid_text};
pub use handle::{GpuInfo, survey};
pub(crate) use queue::{CopyQueue, Direction, Piece};
pub(crate) use ring::{PinnedRing, RingQueue};
pub use stream::CudaStream;
pub(crate) use stream::Mark;
pub(crate) use window::Window;
