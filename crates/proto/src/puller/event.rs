//! Events for the puller, and actions that it asks for.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use crate::{
    block::Incarnation,
    error::Cause,
    frame::{ClaimId, Reader, Release},
    hello::Welcome,
    lane::{Grant, LaneKind},
    offer::Offer,
    outcome::{BlockReport, Outcome},
    plan::{ChunkSize, LocalBlocks},
    pull::Retry,
    session::Want,
};

/// A pull, unique in this consumer's life; never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PullId(pub u64);

/// A peer rank's address: what sessions are kept by.
pub type Addr = Arc<str>;

/// A pull to start.
#[derive(Debug)]
pub struct Start {
    /// Its id.
    pub id: PullId,
    /// The offer.
    pub offer: Arc<Offer>,
    /// Indices into the offer's ranks: whom to read from.
    pub sources: Vec<usize>,
    /// What is wanted, and where it goes.
    pub wanted: Vec<LocalBlocks>,
    /// Which reader of the offer this rank is.
    pub reader: Reader,
    /// When it was asked for: its times count from here.
    pub started: Instant,
    /// When it decides at the latest.
    pub deadline: Instant,
    /// How often it tries again.
    pub retry: Retry,
    /// How chunks are cut.
    pub chunk: ChunkSize,
    /// Which lanes may be used, best first.
    pub lanes: Vec<LaneKind>,
    /// Whether earlier work on the destination blocks is done.
    pub local_ready: bool,
    /// Where to say how far it is.
    pub progress: Arc<Progress>,
}

/// How far a pull is, for whoever looks from another thread.
#[derive(Debug, Default)]
pub struct Progress {
    loaded: AtomicUsize,
    chunks: AtomicUsize,
}

impl Progress {
    /// Loaded chunks, and all chunks; both zero until the pull is planned.
    pub fn get(&self) -> (usize, usize) {
        (self.loaded.load(Ordering::Relaxed), self.chunks.load(Ordering::Relaxed))
    }

    pub(super) fn set(&self, (loaded, chunks): (usize, usize)) {
        self.loaded.store(loaded, Ordering::Relaxed);
        self.chunks.store(chunks, Ordering::Relaxed);
    }
}

/// An event for the puller.
pub enum In<L> {
    /// A pull is wanted.
    Start(Box<Start>),
    /// Earlier work on a pull's destination blocks is done.
    LocalReady(PullId),
    /// A pull is given up.
    Cancel(PullId, Cause),
    /// A peer answered Hello; anything of another incarnation of it is void.
    Peer(Addr, Arc<Welcome>),
    /// A claim was granted.
    Granted(ClaimId, Grant),
    /// A claim is gone.
    Lost(ClaimId, Cause),
    /// A lane that was asked for.
    Lane {
        /// The peer.
        peer: Addr,
        /// The peer's incarnation that it was connected to.
        incarnation: Incarnation,
        /// What it was asked for.
        need: Need,
        /// The lane, or why there is none.
        lane: Result<L, Cause>,
    },
    /// The peer's session was dropped: its lanes go too, once no pull uses them.
    Dropped(Addr),
    /// Everything ends: all pulls are cancelled.
    Shutdown,
}

/// Whether anybody waits for a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Pulls wait for it.
    Now,
    /// It is to replace one that pulls go on with meanwhile.
    Better,
}

/// A lane that is to be connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaneWish {
    /// To this incarnation of the peer.
    pub expect: Incarnation,
    /// In the order to try.
    pub kinds: Vec<LaneKind>,
    /// Whether anybody waits for it.
    pub need: Need,
}

/// An action that the puller asks for, in order.
#[derive(Debug)]
pub enum Out {
    /// Have the peer's session make a claim.
    Claim(Addr, Want),
    /// Have the peer's session let go.
    Release(Addr, Incarnation, Release),
    /// Connect a lane.
    Connect(Addr, LaneWish),
    /// The pull's sets are frozen.
    Decided(PullId),
    /// The pull has ended: its blocks are the engine's again.
    Ended(Box<Ended>),
    /// A pull's blocks may be written for ever.
    Wedged(PullId),
}

/// A pull that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// The pull.
    pub pull: PullId,
    /// The offer.
    pub offer: Arc<Offer>,
    /// What became of it.
    pub outcome: Outcome,
    /// The same by local block.
    pub blocks: BlockReport,
}
