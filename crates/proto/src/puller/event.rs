//! Events for the puller, and its actions.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use super::HoldRequest;
use crate::{
    Block, BlockReport, Cause, ChunkSize, ClaimId, Contents, Grant, Growth, Incarnation, LaneKind, LocalBlocks, Offer,
    Outcome, Reader, Release, hello::Welcome, pull::Retry, session::Want,
};

/// A pull's id, unique in this process; never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PullId(pub u64);

/// A peer rank's address, the key of its session.
pub type Addr = Arc<str>;

/// A pull to start.
#[derive(Debug)]
pub struct Start {
    /// Its id.
    pub id: PullId,
    /// The offer.
    pub offer: Arc<Offer>,
    /// The source ranks: indices into the offer's ranks.
    pub sources: Vec<usize>,
    /// The wanted blocks, and their destinations.
    pub wanted: Vec<LocalBlocks>,
    /// This rank's place among the offer's readers.
    pub reader: Reader,
    /// The time of the engine's call; [`Outcome::times`] counts from here.
    pub started: Instant,
    /// The latest time of its decision.
    pub deadline: Instant,
    /// How often and how patiently it tries again.
    pub retry: Retry,
    /// The size of chunks.
    pub chunk: ChunkSize,
    /// The permitted kinds of lanes, best first.
    pub lanes: Vec<LaneKind>,
    /// Whether earlier work on the destination blocks is done.
    pub local_ready: bool,
    /// The progress of the pull, shared with the engine.
    pub progress: Arc<Progress>,
}

/// The progress of a pull, readable from any thread.
#[derive(Debug, Default)]
pub struct Progress {
    loaded: AtomicUsize,
    chunks: AtomicUsize,
    prefix: AtomicU64,
}

impl Progress {
    /// Number of loaded chunks, and of all chunks; both are zero until the pull is planned.
    pub fn get(&self) -> (usize, usize) {
        (self.loaded.load(Ordering::Relaxed), self.chunks.load(Ordering::Relaxed))
    }

    /// Tokens from the prompt's start whose wanted blocks are all loaded.
    pub fn prefix(&self) -> u64 {
        // The engine may read the blocks: their bytes come before the count.
        self.prefix.load(Ordering::Acquire)
    }

    pub(super) fn set(&self, (loaded, chunks): (usize, usize), prefix: u64) {
        self.loaded.store(loaded, Ordering::Relaxed);
        self.chunks.store(chunks, Ordering::Relaxed);
        self.prefix.store(prefix, Ordering::Release);
    }
}

/// An event for the puller.
pub enum In<L> {
    /// The engine starts a pull.
    Start(Box<Start>),
    /// The engine is going to pull this offer: it is claimed now, for the given time at most. [`In::Start`] takes the claims
    /// over.
    Hold(Box<HoldRequest>, Duration),
    /// The engine will not pull this offer: it is released on behalf of all readers, held or not.
    Release(Arc<Offer>),
    /// Earlier work on a pull's destination blocks is done.
    LocalReady(PullId),
    /// The engine cancels a pull.
    Cancel(PullId, Cause),
    /// A peer answered Hello; state of another incarnation of it is void.
    Peer(Addr, Arc<Welcome>),
    /// A claim was granted: its fence word, and what it may read. May come again with more contents.
    Granted(ClaimId, Grant, Arc<Contents>),
    /// The offer of a granted claim has grown.
    Grown(ClaimId, Growth),
    /// A claim is gone.
    Lost(ClaimId, Cause),
    /// The answer to [`Out::Connect`].
    Lane {
        /// The peer.
        peer: Addr,
        /// The peer's incarnation that answered.
        incarnation: Incarnation,
        /// The need in the wish.
        need: Need,
        /// The lane, or the cause of the failure.
        lane: Result<L, Cause>,
    },
    /// A peer owes an answer and gives none (`true`), or answers again.
    Silent(Addr, bool),
    /// The peer's session was dropped: its lanes are dropped too, once no pull uses them.
    Dropped(Addr),
    /// The consumer shuts down: cancel all pulls.
    Shutdown,
}

/// Why a lane is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Pulls wait for it.
    Now,
    /// A background search: pulls use the present lane meanwhile.
    Better,
}

/// A lane to connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaneWish {
    /// The peer's incarnation that must answer.
    pub expect: Incarnation,
    /// Kinds, in the order to try.
    pub kinds: Vec<LaneKind>,
    /// Whether pulls wait for it.
    pub need: Need,
}

/// An action of the puller. The caller carries them out in order.
#[derive(Debug)]
pub enum Out {
    /// The peer's session must make a claim.
    Claim(Addr, Want),
    /// The peer's session must release a claim or an offer.
    Release(Addr, Incarnation, Release),
    /// Connect a lane.
    Connect(Addr, LaneWish),
    /// The pull's sets are frozen.
    Decided(PullId),
    /// The pull has ended: its blocks belong to the engine again.
    Ended(Box<Ended>),
    /// A pull's blocks may be written at any time, indefinitely.
    Wedged(PullId),
}

/// A pull that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// The pull.
    pub pull: PullId,
    /// The offer's name.
    pub offer: Arc<Offer>,
    /// What the first source granted, as far as it had grown; `None` if the pull ended before all its sources had granted.
    pub contents: Option<Arc<Contents>>,
    /// The result, by position.
    pub outcome: Outcome,
    /// The result, by local block.
    pub blocks: BlockReport,
}

impl Ended {
    /// The local blocks that are invalid, each with its cause.
    pub fn lost(&self) -> impl Iterator<Item = (Block, Cause)> {
        // Both lists are in the order of the groups, and ascend by position within a group.
        let causes = self.outcome.groups.iter().flat_map(|g| {
            g.invalid
                .iter()
                .map(|p| g.causes.iter().find(|(_, s)| s.contains(p)).map_or(Cause::LaneFailed, |(c, _)| *c))
        });
        self.blocks.invalid.iter().copied().zip(causes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockId, EngineId, GroupId, GroupOutcome, OfferId, PositionSet, Times};

    #[test]
    fn each_lost_block_has_the_cause_of_its_own_position() {
        let set = |positions: &[u32]| {
            let mut set = PositionSet::new();
            positions.iter().for_each(|p| set.insert(*p));
            set
        };
        let group = |group, loaded: &[u32], causes: Vec<(Cause, PositionSet)>| {
            let mut invalid = PositionSet::new();
            causes.iter().flat_map(|(_, s)| s.iter()).for_each(|p| invalid.insert(p));
            GroupOutcome { group: GroupId(group), loaded: set(loaded), invalid, causes }
        };
        let groups = vec![
            group(0, &[4], vec![(Cause::PeerDown, set(&[7])), (Cause::NotOffered, set(&[5, 9]))]),
            group(1, &[], vec![(Cause::Deadline, set(&[0]))]),
        ];
        let block = |group, id| Block { group: GroupId(group), id: BlockId(id) };
        let engine: EngineId = "e".parse().unwrap();
        let ended = Ended {
            pull: PullId(1),
            offer: Arc::new(Offer::new(OfferId::random(), engine, Incarnation::random(), vec![], 1)),
            contents: None,
            outcome: Outcome { groups, bytes: 0, lanes: vec![], retries: 0, times: Times::default() },
            blocks: BlockReport {
                loaded: vec![block(0, 1)],
                // Of positions 5, 7, 9, and of position 0 of the second group.
                invalid: vec![block(0, 30), block(0, 2), block(0, 8), block(1, 2)],
            },
        };
        let lost: Vec<_> = ended.lost().collect();
        assert_eq!(
            lost,
            [
                (block(0, 30), Cause::NotOffered),
                (block(0, 2), Cause::PeerDown),
                (block(0, 8), Cause::NotOffered),
                (block(1, 2), Cause::Deadline),
            ]
        );
    }
}
