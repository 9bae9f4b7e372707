//! The contract with real processes and sockets: one module for each promise.

mod exact;
mod fresh;
mod frugal;
mod healing;
mod isolated;
mod leak_free;
mod network;
#[path = "../../src/bin/kvferry/pattern.rs"]
mod pattern;
mod quiet;
mod rig;
mod timely;

/// Not a test: what a producer's or a consumer's process runs. Does nothing unless it was started as one.
#[test]
fn role() {
    if let Ok(spec) = std::env::var(rig::ROLE) {
        rig::run_producer(&spec);
    }
    if let Ok(what) = std::env::var(rig::CONSUMER) {
        rig::run_consumer(&what);
    }
}
