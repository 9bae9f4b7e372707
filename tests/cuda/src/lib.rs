//! A stand-in for NVIDIA's `libcuda`, the CUDA driver API, for tests on machines without a GPU.
//!
//! It proves logic and ordering: bounds, lifetimes, stream order, event waits, sharing between processes, and errors.
//! It proves neither coherence nor speed: its device memory is host memory, and its kernel is a loop of `memcpy`.
//!
//! The package builds two libraries from this source. Tests link the Rust one and call [`load`], which opens the C one
//! for the process; [`Control`] reaches the loaded library. The driver's state in the linked copy is never used, and an
//! executable does not export the `cu*` symbols of its Rust libraries, so the two copies do not meet.
//!
//! The environment variable `KVFERRY_STANDIN` configures a process; see the module `settings`.

mod abi;
mod capture;
mod context;
mod control;
mod copy;
mod device;
mod dmabuf;
mod error;
mod event;
mod faults;
mod host;
mod ipc;
mod kernel;
mod library;
mod memory;
mod pointer;
mod settings;
mod space;
mod store;
mod stream;
mod vmm;

pub use control::Counts;
pub use library::{Control, library, load};
