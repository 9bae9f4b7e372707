//! A rank's memory: the segments of its pool, its fence words, and the state that its data servers share.
//!
//! Owns mappings and their lifetime; knows blocks only by segment and offset, and never decides what is read. Every
//! access is checked against the segment's length, so an offset that a peer made up cannot leave the pool. The bytes
//! themselves race with the engine on purpose: the fence says afterwards whether they were good (promise *fresh*).

mod export;
pub(crate) mod gpu;

mod low_water;
mod mapping;
mod segments;
mod spans;
mod words;

pub(crate) use export::Export;
pub(crate) use gpu::Mark;
pub use gpu::{CudaStream, GpuError, GpuInfo, survey as survey_gpus};
pub(crate) use low_water::set_low_water;
pub(crate) use mapping::Mapping;
pub use segments::{Memory, Place};
pub use spans::Span;
pub(crate) use words::FenceWords;
