//! The contract, with real processes and sockets: one module for each promise.

mod exact;
mod fresh;
mod frugal;
mod growing;
mod healing;
mod isolated;
mod leak_free;
mod names;
mod network;
mod proxy;
mod quiet;
mod sockets;
mod timely;
mod tls;

/// Not a test: the work of a producer or consumer process, which other tests start.
#[test]
#[ignore = "a role: other tests start it"]
fn role() {
    leak_free::play_consumer();
    isolated::play_stranger();
    kvferry_testkit::rig::play();
}
