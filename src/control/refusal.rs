//! Why a producer turns a call down.

use kvferry_proto::block::Incarnation;
use tonic::{Code, Status};

/// Why a producer turns something down; the text goes to the peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum Refusal {
    /// It was meant for another process life of this rank. FAILED_PRECONDITION.
    #[error("this rank is incarnation {here}, not {expected}: it has restarted; say Hello again")]
    OtherIncarnation {
        /// This rank's.
        here: Incarnation,
        /// The one that was asked for.
        expected: Incarnation,
    },
    /// Something that must come before is missing, such as a session. FAILED_PRECONDITION.
    #[error("{0}")]
    Precondition(String),
    /// Not now, but soon: ask again. ABORTED.
    #[error("{0}")]
    NotYet(String),
    /// A limit is reached. RESOURCE_EXHAUSTED.
    #[error("too many {what}: the limit here is {limit}")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// Not served here. UNIMPLEMENTED.
    #[error("{what} is not served here")]
    Unsupported {
        /// What was asked for.
        what: String,
    },
    /// The producer is shutting down. UNAVAILABLE.
    #[error("this producer is shutting down")]
    Stopping,
}

impl Refusal {
    /// The status that the peer gets.
    pub(crate) fn status(&self) -> Status {
        let code = match self {
            Self::OtherIncarnation { .. } | Self::Precondition(_) => Code::FailedPrecondition,
            Self::NotYet(_) => Code::Aborted,
            Self::Limit { .. } => Code::ResourceExhausted,
            Self::Unsupported { .. } => Code::Unimplemented,
            Self::Stopping => Code::Unavailable,
        };
        Status::new(code, self.to_string())
    }
}
