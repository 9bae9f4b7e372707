//! Both ends in one process, over loopback; and hand-written peers that break the protocol.

mod bad_peers;
mod pulls;
mod rig;
