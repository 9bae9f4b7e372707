//! Both ends in one process, over loopback; and hand-written peers that do what none should.

mod bad_peers;
mod pulls;
mod rig;
