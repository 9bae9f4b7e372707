//! The control plane: gRPC between a consumer rank and a producer rank.
//!
//! Owns the sockets of the handshake and the sessions, the translation between protobuf and the protocol's types, and
//! every bound on a peer's messages. It decides nothing: the machines in [`kvferry_proto`] say what a claim, a release or a
//! broken stream *means*. Bytes of the KV cache never travel here. It keeps promise 7 (a peer's bad input ends that peer's
//! session and no other) and carries promise 8 (every dial is answered by one incarnation).
//!
//! - [`wire`]: protobuf to domain types and back, with every bound checked on the way in.
//! - [`server`]: a producer's services; it asks the producer through the [`desk::Desk`] trait. Its parts: [`outbox`], the
//!   frames to a session; [`guard`], bounds on connections, and [`io`], their bytes; [`requests`], bounds on the
//!   requests of calls; [`pauses`], answers to wrong tokens; [`peer`], the definition of one peer; [`secret`], the sessions
//!   that belong to one consumer; [`service`], the calls.
//! - [`client`]: one task for each peer address, which runs a [`kvferry_proto::session::PeerSession`]. [`dial`] connects and
//!   says Hello, [`lanes`] sets up lanes; [`call`] has the calls that need no session.
//! - [`host`]: the identity by which two ranks learn that they share a host.

pub(crate) mod call;
pub(crate) mod client;
pub(crate) mod desk;
pub(crate) mod dial;
pub(crate) mod events;
pub(crate) mod guard;
pub(crate) mod health;
pub(crate) mod host;
mod io;
pub(crate) mod lanes;
mod once;
pub(crate) mod outbox;
mod pauses;
pub(crate) mod peer;
pub(crate) mod proto;
pub(crate) mod refusal;
mod requests;
mod secret;
pub(crate) mod server;
mod service;
mod wire;

#[cfg(test)]
mod tests;
