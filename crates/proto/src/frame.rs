//! The session's frames as the machines see them; the control plane turns them into protobuf and back, and checks every
//! bound on the way in.

use std::time::Duration;

use crate::{
    block::{EngineId, Incarnation, OfferId, Rank},
    error::Cause,
    lane::Grant,
};

/// A rank in one process life: who claims, who offers.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerId {
    /// The engine.
    pub engine: EngineId,
    /// The rank in it.
    pub rank: Rank,
    /// The rank's incarnation.
    pub incarnation: Incarnation,
}

/// A claim, unique in the consumer's incarnation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClaimId(pub u64);

/// One of several ranks of an engine that read the same offer at the same producer rank: `index` of `of`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reader {
    /// Which one, below `of`.
    pub index: u32,
    /// How many there are, at least 1.
    pub of: u32,
}

impl Reader {
    /// The only reader.
    pub const ONLY: Self = Self { index: 0, of: 1 };
}

/// From consumer to producer. A non-zero `seq` is acknowledged, and sent again until it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientFrame {
    /// Names a frame that must not get lost (a release); 0 for those that may.
    pub seq: u64,
    /// What it says.
    pub body: ClientBody,
}

/// What a client frame says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientBody {
    /// First frame of a stream.
    Open {
        /// Who calls.
        from: PeerId,
        /// The producer's incarnation that the caller knows from Hello.
        expect: Incarnation,
    },
    /// A heartbeat.
    Ping(u64),
    /// "I am going to read this offer."
    Claim {
        /// The claim.
        claim: ClaimId,
        /// The offer.
        offer: OfferId,
        /// Which reader this is.
        reader: Reader,
    },
    /// "I still want these."
    Renew(Vec<ClaimId>),
    /// "I am done with this."
    Release(Release),
}

/// A claim's, or an offer's, end on the consumer's side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// The claim, if one was made.
    pub claim: Option<ClaimId>,
    /// The offer.
    pub offer: OfferId,
    /// Which reader lets go.
    pub reader: Reader,
    /// On behalf of all readers of the engine.
    pub all: bool,
}

/// From producer to consumer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerFrame {
    /// The release with this sequence number has been carried out; 0: none is acknowledged.
    pub ack: u64,
    /// What it says; `None`: the acknowledgement only.
    pub body: Option<ServerBody>,
}

/// What a server frame says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerBody {
    /// Answer to `Open`.
    Opened(Incarnation),
    /// Answer to `Ping`.
    Pong(u64),
    /// The claim holds.
    Granted {
        /// The claim.
        claim: ClaimId,
        /// Its fence word.
        grant: Grant,
        /// Of the lease.
        remaining: Duration,
    },
    /// Ask again: the blocks are not ready, or the books are behind the name.
    NotYet {
        /// The claim.
        claim: ClaimId,
        /// When.
        retry: Duration,
    },
    /// There is nothing to claim.
    Gone {
        /// The claim.
        claim: ClaimId,
        /// Why.
        why: Gone,
    },
    /// The producer took the offer back while it was claimed.
    Revoked {
        /// The offer.
        offer: OfferId,
        /// Why.
        why: Gone,
    },
    /// No new offers will be made; what is offered can still be claimed.
    Draining,
}

/// Why an offer is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Gone {
    /// Never heard of it, and waited long enough.
    Unknown,
    /// The lease ran out.
    Expired,
    /// All readers released it, or a scheduler did.
    Released,
    /// The producer took it back.
    Revoked,
    /// Renewed for longer than the producer allows.
    HardCap,
    /// Too many claims or readers.
    Limit,
}

impl Gone {
    /// The stable name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Expired => "expired",
            Self::Released => "released",
            Self::Revoked => "revoked",
            Self::HardCap => "hard_cap",
            Self::Limit => "limit",
        }
    }

    /// The cause that a pull's blocks get.
    pub fn cause(self) -> Cause {
        match self {
            Self::Unknown => Cause::Unknown,
            Self::Expired | Self::HardCap => Cause::Expired,
            Self::Released => Cause::Released,
            Self::Revoked => Cause::Revoked,
            Self::Limit => Cause::Limit,
        }
    }
}
