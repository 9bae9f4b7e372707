//! What the tests, the benchmarks and the command line share. Never published.
#![allow(missing_docs, reason = "helpers of tests: most say all in their names")]

pub mod counting;
#[cfg(feature = "rig")]
pub mod pattern;
#[cfg(feature = "rig")]
pub mod rdma;
#[cfg(feature = "rig")]
pub mod reasons;
#[cfg(feature = "rig")]
pub mod rig;
#[cfg(feature = "rig")]
pub mod wire;
