//! The control plane alone, over real sockets: a real server before a desk that keeps no books, and real peers' tasks.

mod handshake;
mod rig;
mod services;
mod sessions;
mod strangers;
mod tls;
