//! Verbs on real libibverbs: soft-RoCE devices with a wire between them, in a virtual machine (see tests/vm/run).
//!
//! Outside of it every test says so and passes, since there is nothing to be tried. Producers are processes of their own,
//! on the far ends of the wires (rxb1, rxb2); the control plane goes over loopback, so that a cut wire cuts the data only.

mod failures;
#[path = "../../src/bin/kvferry/pattern.rs"]
mod pattern;
mod pulls;
mod raw;
#[path = "../contract/rig.rs"]
#[allow(dead_code)]
mod rig;
mod wires;

/// Not a test: what a producer's process runs. Does nothing unless it was started as one.
#[test]
fn role() {
    if let Ok(spec) = std::env::var(rig::ROLE) {
        rig::run_producer(&spec);
    }
}
