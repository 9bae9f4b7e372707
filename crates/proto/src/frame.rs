//! The frames of a session as the machines see them. The control plane converts them to and from protobuf, and checks every
//! bound of received ones.

use std::{sync::Arc, time::Duration};

use crate::{Cause, Contents, EngineId, Grant, Growth, Incarnation, OfferId, Rank, Token};

/// A rank in one run of its process: a consumer or a producer.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerId {
    /// The engine.
    pub engine: EngineId,
    /// The rank in it.
    pub rank: Rank,
    /// The rank's incarnation.
    pub incarnation: Incarnation,
}

/// A claim's id, unique in the consumer's incarnation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClaimId(pub u64);

/// One of several ranks of an engine that read the same offer at the same producer rank: `index` of `of`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reader {
    /// Index of the reader, below `of`.
    pub index: u32,
    /// Number of readers, at least 1.
    pub of: u32,
}

impl Reader {
    /// The only reader.
    pub const ONLY: Self = Self { index: 0, of: 1 };
}

/// A frame from consumer to producer. A frame with a non-zero `seq` is sent again until it is acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientFrame {
    /// Sequence number of a frame that must not get lost (a release); 0 for the others.
    pub seq: u64,
    /// The content.
    pub body: ClientBody,
}

/// The content of a client frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientBody {
    /// First frame of a stream.
    Open {
        /// The caller.
        from: PeerId,
        /// The producer's incarnation in its Hello.
        expect: Incarnation,
    },
    /// A heartbeat.
    Ping(u64),
    /// The consumer is going to read this offer.
    Claim {
        /// The claim.
        claim: ClaimId,
        /// The offer.
        offer: OfferId,
        /// The offer's secret, from its name.
        token: Token,
        /// The number in its name; 0: none.
        number: u64,
        /// The engine's reader that claims.
        reader: Reader,
        /// Whether the claim waits for an offer that is not entered yet. It is answered when the offer is.
        awaited: bool,
    },
    /// The consumer still needs these claims.
    Renew(Vec<ClaimId>),
    /// The consumer is done with an offer.
    Release(Release),
}

/// The end of a claim, or of an offer without one, on the consumer's side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// The claim, if one was made.
    pub claim: Option<ClaimId>,
    /// The offer.
    pub offer: OfferId,
    /// The offer's secret, from its name.
    pub token: Token,
    /// The engine's reader that releases.
    pub reader: Reader,
    /// Whether it is on behalf of all readers of the engine.
    pub all: bool,
}

/// A frame from producer to consumer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerFrame {
    /// Sequence number of the release that this frame acknowledges; 0 for none.
    pub ack: u64,
    /// The content; `None` for an acknowledgement only.
    pub body: Option<ServerBody>,
}

/// The content of a server frame.
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
        /// What may be read: the consumer reads by this, and not by the name.
        contents: Arc<Contents>,
        /// Number of the offer's growths so far.
        growths: u64,
        /// How long the claim holds without a renewal.
        remaining: Duration,
    },
    /// The offer of a granted claim has grown.
    Grown {
        /// The claim.
        claim: ClaimId,
        /// Number of growths of the offer that came before these. A consumer that knows another number has missed some: it
        /// claims again.
        after: u64,
        /// Number of the offer's growths, these included.
        growths: u64,
        /// Their gain.
        growth: Growth,
    },
    /// Claim again later: the blocks are not ready, or the offer is not entered yet.
    NotYet {
        /// The claim.
        claim: ClaimId,
        /// Wait before the next claim.
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
    /// The producer makes no new offers; live ones can still be claimed.
    Draining,
}

/// Why an offer is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Gone {
    /// It was never entered, and the grace period is over.
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
    /// The claim's token is not the offer's: the name was changed on its way, or guessed.
    Token,
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
            Self::Token => "token",
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
            Self::Token => Cause::BadOffer,
        }
    }
}
