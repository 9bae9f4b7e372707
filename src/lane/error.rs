//! The error of a lane that could not be set up. Each message names the next step; the pull goes on over another lane if
//! there is one.

use std::{io, time::Duration};

use kvferry_proto::Cause;

use crate::memory::GpuError;

/// A lane that could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum LaneError {
    /// The data address cannot be reached.
    #[error("cannot connect the lane to {to}: {source}; check that the producer runs and that its data port is open")]
    Connect {
        /// The address or socket.
        to: String,
        /// The system's error.
        source: io::Error,
    },
    /// The peer answered, and refused.
    #[error("the peer refused the lane: {why}")]
    Refused {
        /// The peer's reason.
        why: String,
    },
    /// The peer and this side do not agree on TLS.
    #[error("TLS with {to} failed: {why}; do both ends have certificates of one authority?")]
    Tls {
        /// The address.
        to: String,
        /// The TLS library's error.
        why: String,
    },
    /// Another incarnation of the peer answers.
    #[error("the peer has restarted since its Hello; its earlier offers are gone")]
    Restarted,
    /// The system does not let this process read the peer's memory.
    #[error("not permitted to read the peer's memory: {why}")]
    Forbidden {
        /// The likely reason, and the setting to change.
        why: String,
    },
    /// The peer is not on this host, or not in the namespaces that the lane needs.
    #[error("the peer is on another host or in another namespace: {what}")]
    Elsewhere {
        /// The evidence, and the setting to change.
        what: String,
    },
    /// No path of the data network connects the two sides.
    #[error("{what}")]
    NoPath {
        /// The paths that were tried, and the next step.
        what: String,
    },
    /// The peer's process ended while the lane was set up.
    #[error("the peer's process ended while the lane was set up")]
    Died,
    /// The peer did not answer in time.
    #[error("the peer did not answer the lane's first frame within {after:?}; is its process stopped?")]
    Silent {
        /// The time limit.
        after: Duration,
    },
    /// The peer is not ready yet, and expects to be soon.
    #[error("{what}")]
    NotYet {
        /// The part that is not ready.
        what: String,
    },
    /// The peer's message was malformed.
    #[error("the peer broke the lane's protocol: {what}; are both ends kvferry of the same version?")]
    Protocol {
        /// What is wrong with it.
        what: String,
    },
    /// This side's driver does not map the peer's GPU memory.
    #[error("GPU {here} cannot map the memory of the peer's {there}: {source}; the tcp lane works without")]
    Gpu {
        /// UUID of this side's GPU.
        here: String,
        /// UUID of the peer's.
        there: String,
        /// The driver's error.
        source: GpuError,
    },
    /// A system call failed on this side.
    #[error("{what}: {source}")]
    Io {
        /// The call.
        what: &'static str,
        /// The system's error.
        source: io::Error,
    },
}

impl LaneError {
    /// The cause that a pull's blocks get when no other lane is left.
    pub(crate) fn cause(&self) -> Cause {
        match self {
            Self::Connect { .. }
            | Self::Elsewhere { .. }
            | Self::NoPath { .. }
            | Self::Silent { .. }
            | Self::NotYet { .. } => Cause::Unreachable,
            Self::Refused { .. } | Self::Tls { .. } => Cause::Refused,
            Self::Restarted => Cause::PeerRestarted,
            Self::Died => Cause::PeerDown,
            Self::Forbidden { .. } | Self::Protocol { .. } | Self::Gpu { .. } | Self::Io { .. } => Cause::LaneFailed,
        }
    }

    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }

    pub(crate) fn protocol(what: impl Into<String>) -> Self {
        Self::Protocol { what: what.into() }
    }
}
