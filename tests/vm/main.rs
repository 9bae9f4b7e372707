//! Verbs on real libibverbs: soft-RoCE devices with a wire between them, in a virtual machine (see tests/vm/run).
//!
//! Outside of it every test says so and passes, since there is nothing to be tried. Producers are processes of their own,
//! on the far ends of the wires (rxb1, rxb2); the control plane goes over loopback, so that a cut wire cuts the data only.

mod cli;
#[path = "../../benches/support/counting.rs"]
mod counting;
mod failures;
mod mishap;
#[path = "../../src/bin/kvferry/pattern.rs"]
mod pattern;
mod peers;
mod pulls;
mod rails;
mod raw;
mod reasons;
#[path = "../contract/rig.rs"]
#[allow(dead_code)]
mod rig;
mod wires;

#[global_allocator]
static COUNTING: counting::Counting = counting::Counting;

/// Not a test: what a producer's process runs. Does nothing unless it was started as one.
#[test]
fn role() {
    if let Ok(spec) = std::env::var(rig::ROLE) {
        rig::run_producer(&spec);
    }
}

#[test]
fn the_library_is_opened_at_run_time() {
    // One binary starts on every host.
    let me = std::env::current_exe().unwrap();
    let needs = std::process::Command::new("ldd").arg(me).output().expect("ldd");
    let needs = String::from_utf8_lossy(&needs.stdout);
    assert!(needs.contains("libc.so") && !needs.contains("ibverbs"), "{needs}");
}
