//! A producer's refusal of a call.

use kvferry_proto::Incarnation;
use tonic::{Code, Status};

use super::peer::PeerKey;

/// A refusal; its text goes to the peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum Refusal {
    /// The call was meant for another incarnation of this rank. FAILED_PRECONDITION.
    #[error("this rank is incarnation {here}, not {expected}: it has restarted; say Hello again")]
    OtherIncarnation {
        /// This rank's incarnation.
        here: Incarnation,
        /// The incarnation in the call.
        expected: Incarnation,
    },
    /// A precondition does not hold, such as an open session. FAILED_PRECONDITION.
    #[error("{0}")]
    Precondition(String),
    /// Not ready yet, but soon: the peer may ask again. ABORTED.
    #[error("{0}")]
    NotYet(String),
    /// The caller does not show the offer's token. PERMISSION_DENIED.
    #[error("the token is not that of this offer: pass on the producer's offer unchanged")]
    Token,
    /// A limit is reached. RESOURCE_EXHAUSTED.
    #[error("too many {what}: the limit here is {limit}")]
    Limit {
        /// The limited thing.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// The peer's share of a limit is used up. RESOURCE_EXHAUSTED.
    #[error("too many {what} from this peer ({peer}): its share here is {limit}; raise {setting} if it needs more")]
    Share {
        /// The limited thing.
        what: &'static str,
        /// The peer.
        peer: PeerKey,
        /// Its share.
        limit: usize,
        /// The setting's name.
        setting: &'static str,
    },
    /// The peer may not do this. PERMISSION_DENIED.
    #[error("{0}")]
    Denied(String),
    /// Not served by this producer. UNIMPLEMENTED.
    #[error("{what} is not served here")]
    Unsupported {
        /// The requested thing.
        what: String,
    },
    /// The producer is shutting down. UNAVAILABLE.
    #[error("this producer is shutting down")]
    Stopping,
}

impl Refusal {
    /// The kind of this refusal in the log, if it is logged for each peer: repeated ones share a line.
    pub(crate) fn logged_as(&self) -> Option<&'static str> {
        match self {
            Self::Limit { what, .. } | Self::Share { what, .. } => Some(what),
            Self::Denied(_) => Some("denied"),
            Self::Token => Some("token"),
            _ => None,
        }
    }

    /// The status for the peer.
    pub(crate) fn status(&self) -> Status {
        let code = match self {
            Self::OtherIncarnation { .. } | Self::Precondition(_) => Code::FailedPrecondition,
            Self::NotYet(_) => Code::Aborted,
            Self::Limit { .. } | Self::Share { .. } => Code::ResourceExhausted,
            Self::Denied(_) | Self::Token => Code::PermissionDenied,
            Self::Unsupported { .. } => Code::Unimplemented,
            Self::Stopping => Code::Unavailable,
        };
        Status::new(code, self.to_string())
    }
}
