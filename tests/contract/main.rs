//! The contract with real processes and sockets: one module for each promise.

#[path = "../../src/bin/kvferry/pattern.rs"]
mod pattern;
mod rig;

/// Not a test: what a producer process runs. Does nothing unless it was started as one.
#[test]
fn role() {
    if let Ok(spec) = std::env::var(rig::ROLE) {
        rig::run_producer(&spec);
    }
}
