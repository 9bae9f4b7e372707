//! The control plane: gRPC between a consumer rank and a producer rank.
//!
//! Owns the sockets of the handshake and the sessions, the translation between protobuf and the protocol's own words, and
//! every bound on what a peer may send. It never decides anything: what a claim, a release or a broken stream *means* is
//! said by the machines in [`kvferry_proto::?protocol`], and bytes of the KV cache never travel here. It keeps promise 7 (a peer's
//! bad input ends that peer's session and nothing else) and carries promise 8 (every dial is answered by one incarnation).
//!
//! - [`wire`]: protobuf to domain and back, with every bound checked on the way in.
//! - [`server`]: what a producer serves; the producer is asked through the [`desk::Desk`] trait. [`outbox`],
//!   `guard` and `service` are its parts: frames to a session, bounds on connections, the calls themselves.
//! - [`client`]: one task for each peer address that runs a [`kvferry_proto::session::PeerSession`]. `dial` connects and
//!   says Hello, `connect` gets lanes; [`call`] has the calls that need no session.
//! - `tls`, [`host`]: certificates of both ends; what tells that two ranks share a host.

pub(crate) mod call;
pub(crate) mod client;
pub(crate) mod desk;
pub(crate) mod events;
pub(crate) mod host;
pub(crate) mod outbox;
pub(crate) mod refusal;
pub(crate) mod server;
pub(crate) mod wire;

pub(crate) mod connect;
pub(crate) mod dial;
pub(crate) mod guard;
pub(crate) mod health;
pub(crate) mod service;
pub(crate) mod tls;

#[cfg(test)]
mod tests;

/// The messages and services as they are compiled from `proto/kvferry/v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, unused_qualifications, rustdoc::all)]
pub(crate) mod proto {
    tonic::include_proto!("kvferry.v1");
}

/// The compiled descriptors of `proto/kvferry/v1`, as the reflection service hands them out.
pub(crate) const DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("kvferry.v1");
