//! The contract with real processes and sockets: one module for each promise.

mod exact;
mod fresh;
mod frugal;
mod healing;
mod isolated;
mod leak_free;
mod network;
mod quiet;
mod timely;

/// Not a test: the work of a producer's or a consumer's process. Does nothing unless it was started as one.
#[test]
#[ignore = "a role: other tests start it"]
fn role() {
    kvferry_testkit::rig::play();
}
