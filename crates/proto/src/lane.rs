//! A lane: one data path to one peer rank. The trait separates the pull tracker, which decides what to read, from the lanes,
//! which move bytes. The simulation implements it too.

use std::{fmt, time::Duration};

use crate::{Cause, Nonce, Read};

/// One attempt of a pull on one lane. Numbers are never reused in a process, so a late event of an old attempt cannot pass
/// for a new one's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Attempt(pub u64);

/// The kind of a lane.
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
    /// The lane reads the word itself once all the chunk's reads have completed, and reports it as [`LaneEvent::Fence`]: the
    /// wire does not wait for the tracker.
    Own,
    /// The producer checks after it has copied the chunk. The lane reports its word as [`LaneEvent::Fence`].
    Trailer,
}

/// Properties of a lane.
#[derive(Debug, Clone, Copy)]
pub struct LaneCaps {
    /// Its kind.
    pub kind: LaneKind,
    /// Longest read, in bytes.
    pub max_read: u64,
    /// Longest time from [`Lane::stop`] to [`LaneEvent::Quiet`], all teardown stages included. A pull stops its lanes that
    /// long before its deadline.
    pub quiet_bound: Duration,
    /// How it learns the fence's word.
    pub fence: FenceKind,
}

/// The place of a chunk's fence word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FenceSlot {
    /// The chunk.
    pub chunk: u32,
    /// Index of the word in the source rank's fence table.
    pub slot: u32,
}

/// The claim under which an attempt reads. A lane gets it before the first read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// Index of the word in the source rank's fence table.
    pub slot: u32,
    /// The word's value while the offer is live.
    pub nonce: Nonce,
}

/// An event of a lane. Each belongs to one attempt, except `Down` and `Wedged`, which belong to the lane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LaneEvent {
    /// `reads` more reads of the chunk are done: their bytes are in local memory.
    Done {
        /// The attempt.
        attempt: Attempt,
        /// The chunk.
        chunk: u32,
        /// Number of reads.
        reads: u32,
    },
    /// A read or a fence failed. The attempt makes no more progress on this lane; it is not quiet yet.
    Failed {
        /// The attempt.
        attempt: Attempt,
        /// Why.
        cause: Cause,
    },
    /// A chunk's fence has read its word.
    Fence {
        /// The attempt.
        attempt: Attempt,
        /// The chunk.
        chunk: u32,
        /// The word.
        word: u64,
    },
    /// The data of this chunk is unverified, or known to be wrong, and no fence of it follows: read it again, on this attempt.
    /// None of its reads is in flight. Comes instead of `Fence`. The lane bounds how often: it fails the attempt instead.
    Again {
        /// The attempt.
        attempt: Attempt,
        /// The chunk.
        chunk: u32,
    },
    /// The attempt cannot write local memory any more. Comes once, after `stop`, `kill` or `Down`; it is the attempt's last
    /// event.
    Quiet {
        /// The attempt.
        attempt: Attempt,
    },
    /// The lane is unusable. `Quiet` of each of its attempts comes before or after.
    Down {
        /// Why.
        cause: Cause,
    },
    /// The last teardown stage failed: reads that were in flight may still write local memory, indefinitely.
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
/// A lane has one owner thread, and no call blocks. A lane that is dropped before it is quiet leaks its memory rather than
/// freeing it.
pub trait Lane: Send {
    /// Its properties.
    fn caps(&self) -> LaneCaps;

    /// Whether a new lane might be better: a part of this one failed, or was unavailable when it was connected. The lane
    /// still works; its owner searches for a new one from time to time.
    fn degraded(&self) -> bool {
        false
    }

    /// Begins an attempt under a grant. `post`, `post_fence` and `stop` of an attempt that was not begun, or is quiet, do
    /// nothing.
    fn begin(&mut self, a: Attempt, grant: Grant);

    /// Posts reads of one chunk, up to its last. Returns the number that it accepted, from the front. Fewer than all: its
    /// window is full, and the caller offers the rest again after the next event, before another chunk's.
    fn post(&mut self, a: Attempt, reads: &[Read]) -> usize;

    /// Posts the chunk's fence; `false` when there is no room now. Only for [`FenceKind::Posted`].
    fn post_fence(&mut self, a: Attempt, f: FenceSlot) -> bool {
        let _ = (a, f);
        debug_assert!(false, "this lane posts its own fences");
        true
    }

    /// Ends the attempt: posts no more of it, drains its operations in flight, then reports [`LaneEvent::Quiet`].
    fn stop(&mut self, a: Attempt);

    /// Escalates the teardown: then come `Quiet` of every attempt and `Down`, or `Wedged`.
    fn kill(&mut self);

    /// Makes progress and appends events to `out`, which the caller reuses. Moves a bounded number of bytes.
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
