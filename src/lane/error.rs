//! Why a lane could not be set up. Each message says what to do about it; the pull goes on over another lane if there is one.

use std::{io, time::Duration};

use kvferry_proto::error::Cause;

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
        /// In its words.
        why: String,
    },
    /// Another process life of the peer answers.
    #[error("the peer has restarted since its Hello; its offers of before are gone")]
    Restarted,
    /// The system does not let this process read the peer's memory.
    #[error("not permitted to read the peer's memory: {why}")]
    Forbidden {
        /// The reason as far as it can be known, and what to set.
        why: String,
    },
    /// The peer is not on this host, or not in the namespaces that the lane needs.
    #[error("the peer is on another host or in another namespace: {what}")]
    Elsewhere {
        /// What shows it, and what to set.
        what: String,
    },
    /// No path of the data's network leads from one side to the other.
    #[error("{what}")]
    NoPath {
        /// What was tried, and what to do.
        what: String,
    },
    /// The peer's process ended while the lane was set up.
    #[error("the peer's process ended while the lane was set up")]
    Died,
    /// The peer did not answer in time.
    #[error("the peer did not answer the lane's first frame within {after:?}; is its process stopped?")]
    Silent {
        /// How long it had.
        after: Duration,
    },
    /// Not now, but soon.
    #[error("{what}")]
    NotYet {
        /// What is not ready.
        what: String,
    },
    /// What the peer sent makes no sense.
    #[error("the peer broke the lane's protocol: {what}; are both ends kvferry of the same version?")]
    Protocol {
        /// What was wrong.
        what: String,
    },
    /// A system call failed on this side.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
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
            Self::Refused { .. } => Cause::Refused,
            Self::Restarted => Cause::PeerRestarted,
            Self::Died => Cause::PeerDown,
            Self::Forbidden { .. } | Self::Protocol { .. } | Self::Io { .. } => Cause::LaneFailed,
        }
    }

    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }

    pub(crate) fn protocol(what: impl Into<String>) -> Self {
        Self::Protocol { what: what.into() }
    }
}
