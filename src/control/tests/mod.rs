//! The control plane alone, over real sockets: a real server with a desk without an offer table, and real peers' tasks.

mod handshake;
mod peers;
mod pulls;
mod rig;
mod services;
mod sessions;
mod strangers;
mod tls;
