//! Both ends in one process, over loopback; and hand-written peers that break the protocol.

mod bad_peers;
mod changed;
#[cfg(feature = "cuda")]
mod gpu;
mod greedy;
mod pulls;
mod rig;
mod tls;
