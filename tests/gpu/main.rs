//! GPU memory through the public API: pools, ordering by streams, and a bad day of the GPU.
//!
//! They run on the stand-in for libcuda, each test in a process of its own, since a GPU that is made to fail stays failed.
//! On a real GPU (`KVFERRY_TEST_CUDA=real`) those run that need no failure on demand.
#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "every call of the driver API is unsafe; the pointers are locals, and the streams outlive their use"
)]

mod alone;
mod cost;
mod errors;
mod failures;
mod kills;
mod metrics;
mod order;
mod pair;
mod pools;

/// Not a test: the work of a producer or consumer process, which other tests start.
#[test]
#[ignore = "a role: other tests start it"]
fn role() {
    kills::play_consumer();
    kvferry_testkit::rig::play();
}
