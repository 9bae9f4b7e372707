//! Helpers that the tests, the benchmarks and the command line share. Never published.
#![allow(missing_docs, reason = "most names of test helpers need no explanation")]

pub mod counting;
#[cfg(feature = "gpu")]
pub mod gpu;
#[cfg(feature = "rig")]
pub mod pattern;
#[cfg(feature = "rig")]
pub mod rdma;
#[cfg(feature = "rig")]
pub mod reasons;
#[cfg(feature = "rig")]
pub mod rig;
#[cfg(feature = "rig")]
pub mod serve;
#[cfg(feature = "rig")]
pub mod wire;
