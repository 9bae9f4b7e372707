//! A lane's state in the fabric: its attempts, its operations, and its faults.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use kvferry_proto::{Attempt, Cause, FenceKind, FenceSlot, Grant, LaneCaps, LaneEvent, Read};

use super::copies::CopyQueue;
use crate::trace::Micros;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LaneState {
    Up,
    Killing,
    /// `Down` is out, `Quiet` of its attempts is not.
    Down,
    Wedged,
    Gone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    Read(Read),
    Fence(FenceSlot),
}

/// A read or a fence, and its fate.
#[derive(Debug)]
pub(super) struct Op {
    pub(super) attempt: Attempt,
    pub(super) pull: u64,
    pub(super) work: Work,
    pub(super) loaded: Vec<u64>,
    pub(super) stored: usize,
    pub(super) torn: bool,
    pub(super) in_flight: bool,
    /// It fails.
    pub(super) fails: bool,
    /// It lands, and no event reports it.
    pub(super) lost: bool,
    /// It is reported as done although nothing was read; from a stream, words come that were changed on their way.
    pub(super) unread: bool,
    /// It does not complete by itself.
    pub(super) hung: bool,
    /// When the second half of a torn read is loaded.
    pub(super) second: Micros,
}

#[derive(Debug)]
pub(super) struct AttemptState {
    pub(super) grant: Grant,
    pub(super) in_flight: usize,
    pub(super) stopped: bool,
    pub(super) failed: bool,
    /// Chunks of a stream that came changed.
    pub(super) corrupt: u32,
    pub(super) stuck: bool,
    pub(super) quiet: bool,
}

impl AttemptState {
    pub(super) fn new(grant: Grant) -> Self {
        Self { grant, in_flight: 0, stopped: false, failed: false, corrupt: 0, stuck: false, quiet: false }
    }
}

/// How a lane shows that its peer's process is dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DeadMode {
    Fails,
    Hangs,
    /// Its address space belongs to another process now.
    Other,
}

/// How a lane reaches local memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Path {
    /// Local memory is host memory.
    Host,
    /// Over a ring in host memory, and copies.
    Staged,
    /// It writes GPU memory, where words may become visible late: it flushes them before it fences a chunk.
    Direct,
    /// It copies out of a mapping of its peer's GPU memory, which it closes when it goes down.
    Mapped,
}

#[derive(Debug)]
pub(super) struct LaneCore {
    pub(super) path: Path,
    /// The mapping of the peer's memory is open.
    pub(super) mapped: bool,
    /// Words that were written and are not visible: segment, index, word, pull, attempt.
    pub(super) unseen: Vec<(usize, usize, u64, (u64, u64))>,
    pub(super) copies: CopyQueue,
    pub(super) local: usize,
    pub(super) proc: usize,
    pub(super) caps: LaneCaps,
    pub(super) window: usize,
    pub(super) in_flight: usize,
    pub(super) attempts: BTreeMap<Attempt, AttemptState>,
    pub(super) ops: Vec<Op>,
    pub(super) out: VecDeque<LaneEvent>,
    pub(super) state: LaneState,
    pub(super) dead_mode: DeadMode,
    pub(super) down_cause: Cause,
    pub(super) last_load: Micros,
    pub(super) last_store: Micros,
    pub(super) last_done: Micros,
    /// Chunks whose fences the lane posts: the number of reads that are not done, and whether all were accepted.
    pub(super) unfenced: BTreeMap<(Attempt, u32), (usize, bool)>,
    /// Chunks with a read that was reported as done and was not, or came changed.
    pub(super) unverified: BTreeSet<(Attempt, u32)>,
    /// A stream that makes no progress.
    pub(super) hung: bool,
}

impl LaneCore {
    pub(super) fn new(
        local: usize,
        proc: usize,
        caps: LaneCaps,
        window: usize,
        dead_mode: DeadMode,
        path: Path,
    ) -> Self {
        Self {
            path,
            mapped: path == Path::Mapped,
            unseen: Vec::new(),
            copies: CopyQueue::default(),
            local,
            proc,
            caps,
            window,
            in_flight: 0,
            attempts: BTreeMap::new(),
            ops: Vec::new(),
            out: VecDeque::new(),
            state: LaneState::Up,
            dead_mode,
            down_cause: Cause::LaneFailed,
            last_load: 0,
            last_store: 0,
            last_done: 0,
            unfenced: BTreeMap::new(),
            unverified: BTreeSet::new(),
            hung: false,
        }
    }

    /// Whether its operations complete in order, as bytes of a stream do.
    pub(super) fn is_stream(&self) -> bool {
        self.caps.fence == FenceKind::Trailer
    }

    /// Whether it accepts operations of an attempt.
    pub(super) fn takes(&self, a: Attempt) -> bool {
        self.state == LaneState::Up && self.attempts.get(&a).is_some_and(|s| !s.stopped && !s.failed && !s.quiet)
    }

    /// The pull of an attempt; 0 before its first read.
    pub(super) fn pull_of(&self, a: Attempt) -> u64 {
        self.ops.iter().rev().find(|o| o.attempt == a).map_or(0, |o| o.pull)
    }

    /// Adds an operation in flight. Returns its index.
    pub(super) fn launch(&mut self, op: Op) -> usize {
        self.in_flight += 1;
        if let Some(s) = self.attempts.get_mut(&op.attempt) {
            s.in_flight += 1;
        }
        self.ops.push(op);
        self.ops.len() - 1
    }

    /// Ends an operation: no event of it follows.
    pub(super) fn finish(&mut self, o: usize) {
        let op = &mut self.ops[o];
        if std::mem::replace(&mut op.in_flight, false) {
            self.in_flight -= 1;
            if let Some(s) = self.attempts.get_mut(&op.attempt) {
                s.in_flight -= 1;
            }
        }
    }

    /// Ends all operations.
    pub(super) fn cancel_all(&mut self) {
        (0..self.ops.len()).for_each(|o| self.finish(o));
    }
}
