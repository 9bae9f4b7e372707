//! Verbs on real libibverbs: soft-RoCE devices with a wire between them, in a virtual machine (see tests/vm/run).
//!
//! Tests that need the machine are ignored outside of it. Producers are processes of their own, on the far ends of the wires
//! (rxb1, rxb2). The control plane uses loopback, so that a cut wire cuts the data only.

mod failures;
mod gpu;
mod mishap;
mod peers;
mod pulls;
mod rails;

use kvferry_testkit::{counting::Counting, rig};

#[global_allocator]
static COUNTING: Counting = Counting;

/// Not a test: the work of a producer's process. Does nothing unless it was started as one.
#[test]
#[ignore = "a role: other tests start it"]
fn role() {
    rig::play();
}

#[test]
fn the_library_is_opened_at_run_time() {
    // One binary starts on every host.
    let me = std::env::current_exe().unwrap();
    let needs = std::process::Command::new("ldd").arg(me).output().expect("ldd");
    let needs = String::from_utf8_lossy(&needs.stdout);
    assert!(needs.contains("libc.so") && !needs.contains("ibverbs"), "{needs}");
}
