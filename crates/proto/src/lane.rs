//! A lane: one data path to one peer rank. This file is the seam between the pull tracker, which decides what is read, and
//! the lanes, which move bytes. The simulation has a lane of its own behind the same trait.

use std::{fmt, time::Duration};

use crate::{block::Nonce, error::Cause, plan::Read};

/// One try of a pull on one lane. Never used twice in a process, so a late event of an old try cannot be taken for a new
/// one's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Attempt(pub u64);

/// The kinds of lanes there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum LaneKind {
    /// Verbs: RDMA READ over InfiniBand or RoCE.
    Verbs,
    /// Same host, other process.
    Local,
    /// TCP.
    Tcp,
}

impl LaneKind {
    /// The name in flags, logs and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Verbs => "verbs",
            Self::Local => "local",
            Self::Tcp => "tcp",
        }
    }
}

impl fmt::Display for LaneKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How a lane learns that the offer was still live when a chunk's last byte was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FenceKind {
    /// The tracker posts it with [`Lane::post_fence`] once all the chunk's reads are done.
    Posted,
    /// The lane reads the word once it has seen all the chunk's reads complete, without being asked: the wire does not wait
    /// for the tracker. It comes as [`LaneEvent::Fence`] by itself.
    Own,
    /// The producer checks after copying the chunk, and its word comes as [`LaneEvent::Fence`] by itself.
    Trailer,
}

/// What a lane can do.
#[derive(Debug, Clone, Copy)]
pub struct LaneCaps {
    /// Which kind it is.
    pub kind: LaneKind,
    /// Longest read, in bytes.
    pub max_read: u64,
    /// How long it may take from [`Lane::stop`] to [`LaneEvent::Quiet`], the ladder included. A pull on this lane starts
    /// to stop that long before its deadline.
    pub quiet_bound: Duration,
    /// How fences come.
    pub fence: FenceKind,
}

/// Where a chunk's fence word is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FenceSlot {
    /// The chunk.
    pub chunk: u32,
    /// Word in the source rank's fence table.
    pub slot: u32,
}

/// What a lane is told of an attempt before its first read: the claim that it reads under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// Word in the source rank's fence table.
    pub slot: u32,
    /// What the word holds while the offer is live.
    pub nonce: Nonce,
}

/// What happened on a lane. Every event is of one attempt, but for `Down` and `Wedged`, which are of the lane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LaneEvent {
    /// `reads` more reads of the chunk are done: their bytes lie in local memory.
    Done {
        /// The attempt.
        attempt: Attempt,
        /// The chunk.
        chunk: u32,
        /// How many more.
        reads: u32,
    },
    /// A read or a fence failed. The attempt goes no further on this lane; it is not quiet yet.
    Failed {
        /// The attempt.
        attempt: Attempt,
        /// Why.
        cause: Cause,
    },
    /// The word that the chunk's fence read.
    Fence {
        /// The attempt.
        attempt: Attempt,
        /// The chunk.
        chunk: u32,
        /// The word.
        word: u64,
    },
    /// What was read of this chunk cannot be trusted, and no fence of it will come: read it again, on this attempt. None of
    /// its reads is in flight. Instead of `Fence`, where the tracker would hear that; never from lanes whose fences are
    /// trailers.
    Again {
        /// The attempt.
        attempt: Attempt,
        /// The chunk.
        chunk: u32,
    },
    /// Nothing of this attempt can write local memory any more. Comes once, after `stop` or `kill`, or by itself after
    /// `Down`; nothing else of the attempt comes after it.
    Quiet {
        /// The attempt.
        attempt: Attempt,
    },
    /// The lane is of no more use. `Quiet` for each of its attempts comes before or after.
    Down {
        /// Why.
        cause: Cause,
    },
    /// The ladder's last rung failed: what was in flight may still be written, for ever.
    Wedged,
}

impl LaneEvent {
    /// The attempt of the event; `None` for an event of the whole lane.
    pub fn attempt(&self) -> Option<Attempt> {
        match self {
            Self::Done { attempt, .. }
            | Self::Failed { attempt, .. }
            | Self::Fence { attempt, .. }
            | Self::Again { attempt, .. }
            | Self::Quiet { attempt } => Some(*attempt),
            Self::Down { .. } | Self::Wedged => None,
        }
    }
}

/// One data path to one peer rank.
///
/// One owner thread; no call blocks. Dropping one that is not quiet leaks its memory rather than freeing it.
pub trait Lane: Send {
    /// What it can do.
    fn caps(&self) -> LaneCaps;

    /// Whether it has less than a new one might have: a part of it failed, or was not to be had when it was connected. It
    /// goes on, and its owner looks for a new one now and then.
    fn degraded(&self) -> bool {
        false
    }

    /// Begins an attempt under a grant. `post`, `post_fence` and `stop` of an attempt that was not begun, or is quiet, do
    /// nothing.
    fn begin(&mut self, a: Attempt, grant: Grant);

    /// Takes reads, and returns how many of them it accepted, from the front. Fewer than all means that its window is full:
    /// offer the rest again after the next event. A slice ends with its chunk's last read, so reads of a chunk are offered
    /// without another chunk's between them.
    fn post(&mut self, a: Attempt, reads: &[Read]) -> usize;

    /// Posts the chunk's fence; `false` when there is no room now. Called only where fences are [`FenceKind::Posted`].
    fn post_fence(&mut self, a: Attempt, f: FenceSlot) -> bool {
        let _ = (a, f);
        debug_assert!(false, "this lane's fences come by themselves");
        true
    }

    /// Posts nothing more of this attempt and lets what is in flight drain; then [`LaneEvent::Quiet`].
    fn stop(&mut self, a: Attempt);

    /// Up the ladder, now: after it come `Quiet` for every attempt and `Down`, or `Wedged`.
    fn kill(&mut self);

    /// Makes progress and appends what happened. `out` is used again by the caller. Moves a bounded number of bytes.
    fn poll(&mut self, out: &mut Vec<LaneEvent>);
}

impl<L: Lane + ?Sized> Lane for Box<L> {
    fn caps(&self) -> LaneCaps {
        (**self).caps()
    }

    fn degraded(&self) -> bool {
        (**self).degraded()
    }

    fn begin(&mut self, a: Attempt, grant: Grant) {
        (**self).begin(a, grant);
    }

    fn post(&mut self, a: Attempt, reads: &[Read]) -> usize {
        (**self).post(a, reads)
    }

    fn post_fence(&mut self, a: Attempt, f: FenceSlot) -> bool {
        (**self).post_fence(a, f)
    }

    fn stop(&mut self, a: Attempt) {
        (**self).stop(a);
    }

    fn kill(&mut self) {
        (**self).kill();
    }

    fn poll(&mut self, out: &mut Vec<LaneEvent>) {
        (**self).poll(out);
    }
}
