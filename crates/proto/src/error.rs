//! Causes of invalid blocks, and the errors of the public calls. Each message names the next step.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{BadOffer, Gone, Mismatch, OfferId, PlanError, puller::PullId};

/// Why a block did not arrive. Each invalid block has one cause; the names are stable in logs, metrics and JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Cause {
    /// The pull's deadline passed first.
    Deadline,
    /// The engine cancelled the pull.
    Cancelled,
    /// The peer's process is gone or does not answer.
    PeerDown,
    /// Another process answers at the peer's address: the offer died with the one that made it.
    PeerRestarted,
    /// The peer could not be reached.
    Unreachable,
    /// The peer refused the handshake (other model, dtype, version or engine), or this side does not trust the peer.
    Refused,
    /// The producer never heard of the offer.
    Unknown,
    /// The offer's lease ran out.
    Expired,
    /// The offer had been released.
    Released,
    /// The producer took the offer back.
    Revoked,
    /// The fence's word was not the offer's: the bytes may be another request's.
    Stale,
    /// The lane broke, and no other lane was left.
    LaneFailed,
    /// Bytes were repeatedly changed in transit.
    Corrupt,
    /// Wanted here, but not in the offer.
    NotOffered,
    /// The prefill did not begin, or did not go on, in time.
    Stalled,
    /// The offer does not fit the peer's memory or this rank's.
    BadOffer,
    /// A limit of this side or the peer's was reached.
    Limit,
    /// This side is shutting down.
    Shutdown,
    /// The GPU is unusable in this process, or the work that had to come before the pull failed on it.
    GpuFailed,
}

impl Cause {
    /// The stable name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deadline => "deadline",
            Self::Cancelled => "cancelled",
            Self::PeerDown => "peer_down",
            Self::PeerRestarted => "peer_restarted",
            Self::Unreachable => "unreachable",
            Self::Refused => "refused",
            Self::Unknown => "unknown",
            Self::Expired => "expired",
            Self::Released => "released",
            Self::Revoked => "revoked",
            Self::Stale => "stale",
            Self::LaneFailed => "lane_failed",
            Self::Corrupt => "corrupt",
            Self::NotOffered => "not_offered",
            Self::Stalled => "stalled",
            Self::BadOffer => "bad_offer",
            Self::Limit => "limit",
            Self::Shutdown => "shutdown",
            Self::GpuFailed => "gpu_failed",
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A pull that could not be started. Nothing was written, and nothing is held.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PullError {
    /// The offer is malformed.
    #[error(transparent)]
    Offer(#[from] BadOffer),
    /// The pull does not fit the local blocks or the peers' memory.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A local block belongs to a pull that has not ended.
    #[error(
        "local block {block} of group {group} is still being written by pull {pull}: wait until that pull has ended"
    )]
    BlockBusy {
        /// The group.
        group: u16,
        /// The block.
        block: u32,
        /// The pull that holds it.
        pull: u64,
    },
    /// The number of open pulls is at its limit.
    #[error("{limit} pulls are open already: wait for one to end, or raise limits.pulls")]
    TooManyPulls {
        /// The limit.
        limit: usize,
    },
    /// The consumer was shut down.
    #[error("this consumer was shut down")]
    Shutdown,
    /// The stream that the pull comes after cannot be waited for.
    #[error("the pull cannot wait for the stream: {why}")]
    Stream {
        /// The reason, and the next step.
        why: String,
    },
    /// The consumer's data thread panicked.
    #[error("this consumer's data thread panicked (the panic is on stderr): restart this process, and report it")]
    Died,
}

impl PullError {
    /// The cause to report for the blocks that were wanted.
    pub fn cause(&self) -> Cause {
        match self {
            Self::Offer(_) | Self::Plan(_) => Cause::BadOffer,
            Self::BlockBusy { .. } | Self::TooManyPulls { .. } => Cause::Limit,
            Self::Shutdown => Cause::Shutdown,
            Self::Died => Cause::LaneFailed,
            Self::Stream { .. } => Cause::GpuFailed,
        }
    }
}

/// A wait for the end of a pull that returned without one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WaitError {
    /// No pull ended in time.
    #[error("no pull ended within {after:?}: wait again")]
    NotYet {
        /// The time-out.
        after: Duration,
    },
    /// A pull decided and will not end: its lane may write the local blocks at any time. Said once for each such pull.
    #[error(
        "pull {} will not end: its lane is wedged, and its local blocks are withheld; `Consumer::decided` has its sets, and a \
         restart of this process frees the blocks", .pull.0
    )]
    Wedged {
        /// The pull.
        pull: PullId,
    },
    /// The consumer's data thread panicked: no pull ends any more.
    #[error("this consumer's data thread panicked (the panic is on stderr): restart this process, and report it")]
    Died,
    /// The consumer was shut down, and every pull that ended has been returned.
    #[error("this consumer was shut down")]
    Shutdown,
}

/// An offer that could not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OfferError {
    /// The offer does not fit the pool or the limits.
    #[error(transparent)]
    Bad(#[from] BadOffer),
    /// Every word of the fence table is in use.
    #[error("{limit} offers are live already: poll for freed ones, or raise limits.offers")]
    TooManyOffers {
        /// The limit.
        limit: usize,
    },
    /// The id was used before.
    #[error("offer {0} exists or existed: mint a new id for every offer")]
    Duplicate(OfferId),
    /// The offer cannot grow: it has ended.
    #[error("offer {offer} has ended: {}; the prefill may go on, and nothing reads its blocks", .why.as_str())]
    Ended {
        /// The offer.
        offer: OfferId,
        /// Why it ended.
        why: Gone,
    },
    /// The producer is draining or was shut down.
    #[error("this producer is draining: use another one")]
    Draining,
    /// The stream that fills the offer's blocks cannot be waited for.
    #[error("the offer cannot wait for the stream: {why}")]
    Stream {
        /// The reason, and the next step.
        why: String,
    },
}

/// A handshake that failed; the pulls that needed it end with [`Cause`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HelloError {
    /// The models differ.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// No common protocol version.
    #[error("no common protocol version: {here} here, {there} at the peer; upgrade the older one")]
    Version {
        /// Versions spoken here.
        here: String,
        /// Versions spoken by the peer.
        there: String,
    },
    /// A message of the peer breaks the protocol's bounds.
    #[error("the peer at {addr} sent a malformed message: {what}; is it a kvferry of this version?")]
    Protocol {
        /// The address.
        addr: String,
        /// The problem.
        what: String,
    },
    /// No process answers.
    #[error("cannot reach {addr}: {why}; check that the producer runs there and the port is open")]
    Unreachable {
        /// The address.
        addr: String,
        /// The system's error.
        why: String,
        /// Whether the connection was refused: no process listens.
        refused: bool,
    },
    /// The peer refused this side, or this side does not trust the peer.
    #[error("refused at {addr}: {why}")]
    Refused {
        /// The address.
        addr: String,
        /// Why.
        why: String,
    },
    /// A limit of the peer is reached.
    #[error("a limit is reached at {addr}: {why}")]
    Limit {
        /// The address.
        addr: String,
        /// The limit.
        why: String,
    },
}

impl HelloError {
    /// The cause that a pull's blocks get.
    pub fn cause(&self) -> Cause {
        match self {
            Self::Mismatch(_) | Self::Version { .. } | Self::Protocol { .. } | Self::Refused { .. } => Cause::Refused,
            Self::Limit { .. } => Cause::Limit,
            Self::Unreachable { .. } => Cause::Unreachable,
        }
    }
}
