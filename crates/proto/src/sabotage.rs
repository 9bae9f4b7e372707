//! Bugs to plant, so that the simulation can prove that it would see them. Compiled away without the feature `sabotage`,
//! which only tests turn on.

/// A bug that was made, or nearly made, by some system in the field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bug {
    /// Data counts as loaded without a fence.
    FenceSkipped,
    /// The fence is posted behind the data's posts instead of after their completions: by the tracker, or by the simulation's
    /// lanes that post it themselves.
    FenceBeforeData,
    /// A failed attempt's blocks are read again before the old lane is quiet.
    RetryBeforeQuiet,
    /// Blocks go back to the engine before the fence word is cleared.
    FreeBeforeClear,
    /// A restarted peer is taken for the one that made the offer.
    IncarnationIgnored,
    /// A release is sent once, and never again.
    ReleaseLost,
    /// The pull decides when the lane reports, not at its deadline.
    DeadlineFromTransport,
    /// An ended pull is reported again.
    EndedTwice,
    /// A pull ends at its decision, though its lane may still write.
    EndBeforeQuiet,
    /// A lease is not renewed by heartbeats.
    RenewLost,
    /// A chunk that a lane takes back counts as loaded.
    DoubtIgnored,
}

impl Bug {
    /// All of them.
    pub const ALL: [Bug; 11] = [
        Bug::FenceSkipped,
        Bug::FenceBeforeData,
        Bug::RetryBeforeQuiet,
        Bug::FreeBeforeClear,
        Bug::IncarnationIgnored,
        Bug::ReleaseLost,
        Bug::DeadlineFromTransport,
        Bug::EndedTwice,
        Bug::EndBeforeQuiet,
        Bug::RenewLost,
        Bug::DoubtIgnored,
    ];
}

#[cfg(feature = "sabotage")]
mod on {
    use crate::sabotage::Bug;
    use std::cell::Cell;

    thread_local!(static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) });

    /// Plants a bug in this thread, or takes it out.
    pub fn plant(bug: Option<Bug>) {
        PLANTED.set(bug);
    }

    /// Whether this bug is planted in this thread.
    #[inline]
    pub fn planted(bug: Bug) -> bool {
        PLANTED.get() == Some(bug)
    }
}

#[cfg(feature = "sabotage")]
pub use on::{plant, planted};

/// Whether this bug is planted in this thread: never, without the feature.
#[cfg(not(feature = "sabotage"))]
#[inline(always)]
pub fn planted(_: Bug) -> bool {
    false
}
