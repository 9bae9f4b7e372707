//! Events for a pull's tracker, and its actions.

use std::time::Duration;

use crate::{Attempt, Cause, Grant, LaneCaps, LaneEvent, LaneKind, Outcome, Plan};

/// An event for a pull.
#[derive(Debug, Clone)]
pub enum In {
    /// Earlier work on the destination blocks is done.
    LocalReady,
    /// All peers have answered Hello.
    Met,
    /// All peers have granted their claims, and the reads are planned. Comes again with the plan of
    /// [`PullTracker::take_plan`](super::PullTracker::take_plan), when the offer has grown.
    Planned(Box<Plan>),
    /// A source rank granted its claim.
    Granted {
        /// Index of the source.
        source: usize,
        /// The fence word and its nonce.
        grant: Grant,
    },
    /// A source's claim is gone: no more fences can hold.
    Lost {
        /// Why.
        cause: Cause,
    },
    /// The answer to [`Out::NeedLane`].
    Lane {
        /// Index of the source.
        source: usize,
        /// The new attempt.
        attempt: Attempt,
        /// The lane's properties.
        caps: LaneCaps,
    },
    /// A source's peer owes an answer and gives none (`true`), or answers again.
    Silent {
        /// Index of the source.
        source: usize,
        /// Whether it is silent.
        silent: bool,
    },
    /// The other answer to [`Out::NeedLane`]: no lane is available.
    NoLane {
        /// Index of the source.
        source: usize,
        /// Why.
        cause: Cause,
    },
    /// An event of an attempt's lane. `Down` of a lane is passed to each of its attempts.
    Event(Attempt, LaneEvent),
    /// The engine cancels the pull, or this side shuts down.
    Cancel(Cause),
}

/// An action of a pull. The caller carries them out in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Out {
    /// Find a lane to this source, if possible of none of these kinds.
    NeedLane {
        /// Index of the source.
        source: usize,
        /// Kinds that failed this pull.
        avoid: Vec<LaneKind>,
    },
    /// Stop the attempt; the tracker waits for its `Quiet`.
    Stop(Attempt),
    /// The attempt did not become quiet in time: kill its lane.
    Kill(Attempt),
    /// The sets are frozen: the producer's blocks are not needed any more.
    Decided,
    /// Nothing can write the local blocks any more. Comes once.
    Ended(Box<Outcome>),
    /// The local blocks may be written at any time, indefinitely: withhold them. The pull stays open.
    Wedged,
}

/// How often and how patiently a pull tries again.
#[derive(Debug, Clone, Copy)]
pub struct Retry {
    /// Attempts for each source, the first included.
    pub attempts: u32,
    /// Wait before the third attempt; doubles with each further one. The second comes at once: a broken lane says nothing
    /// about the next one.
    pub wait: Duration,
    /// How long a source may move nothing while its peer is silent, before the pull gives up.
    pub patience: Duration,
    /// Whether its claims wait for an offer that is not entered yet.
    pub awaited: bool,
    /// How long it waits for the first block of an offer that grows, or is awaited: its request is in the prefill engine's queue.
    pub queued: Duration,
    /// How long it waits for the next growth after that.
    pub stalled: Duration,
}

impl Retry {
    /// For a pull whose offer is entered, and which waits for growths until its deadline.
    pub fn new(attempts: u32, wait: Duration, patience: Duration) -> Self {
        Self { attempts, wait, patience, awaited: false, queued: Duration::MAX, stalled: Duration::MAX }
    }
}
