//! Bugs for the simulation to plant, to prove that it would see them.
//!
//! Only bugs whose wrong behaviour needs meaning are planted here; small edits are the job of mutation testing (see
//! `docs/development.md`). They exist only in builds with both the feature `sabotage`, which only tests turn on, and debug
//! assertions. In any other build, a release build with the feature included, [`planted`] is `false` at compile time and
//! nothing can plant a bug.

/// A bug that some system in the field has had, or almost had.
#[derive(Clone, Copy, PartialEq, Eq)]
#[cfg_attr(all(feature = "sabotage", debug_assertions), derive(Debug))]
pub enum Bug {
    /// Data counts as loaded without a fence.
    FenceSkipped,
    /// The fence is posted behind the data's posts instead of after their completions: by the tracker, or by those lanes of
    /// the simulation that post their own fences.
    FenceBeforeData,
    /// A failed attempt's blocks are read again before the old lane is quiet.
    RetryBeforeQuiet,
    /// Blocks go back to the engine before the fence word is cleared.
    FreeBeforeClear,
    /// A restarted peer passes for the one that made the offer.
    IncarnationIgnored,
    /// A chunk that its lane takes back as unverified counts as loaded.
    UnverifiedLoaded,
    /// A pull waits for its deadline although its peer is silent and nothing moves.
    SilenceIgnored,
    /// A silent stream gets no second connection beside it.
    OneConnection,
    /// A name is unknown as soon as a later one is entered, though names are entered a little out of order.
    OrderTrusted,
    /// A claim or a release counts with any token.
    TokenIgnored,
    /// The source's blocks are taken from the consumer's side instead of from the grant.
    ListFromElsewhere,
    /// A read through the ring is done before its copy is finished.
    DoneBeforeCopied,
    /// A slot of the ring is free before the copy out of it is finished.
    SlotReusedEarly,
    /// A staged attempt is quiet while its copies run.
    QuietBeforeCopied,
    /// Copies of a failed device count as finished.
    FailedCopyCounts,
    /// The list of a copy job is overwritten by the next one's before the job has run. Planted in the simulation's copier: the
    /// real one is in another crate, as are the lanes and producers of the next three.
    CopyListReused,
    /// An offer is readable before the device has written its blocks. Planted in the simulation's producer.
    ReadyBeforeEvent,
    /// A lane that writes GPU memory directly fences a chunk without a flush. Planted in the simulation's lane.
    FlushSkipped,
    /// A lane keeps the mapping of its peer's memory after it went down. Planted in the simulation's lane.
    MappedAfterDown,
    /// A pull claims its offer again and leaves the claims of the hold in place.
    HoldKept,
    /// A block of an open offer is read as soon as it is listed, though the mark is not past it.
    ReadAboveMark,
    /// The mark of an open offer moves before the data below it is in place.
    MarkAhead,
    /// An open offer counts as final while growths wait for their data.
    FinalTooEarly,
    /// An open offer that was revoked is published again by its next growth.
    GrownAfterRevoke,
    /// Growth during a broken session is lost when the session resumes.
    GrownLost,
}

#[cfg(all(feature = "sabotage", debug_assertions))]
mod planting {
    use std::cell::Cell;

    use super::Bug;

    impl Bug {
        /// All planted bugs.
        pub const ALL: [Bug; 25] = [
            Bug::FenceSkipped,
            Bug::FenceBeforeData,
            Bug::RetryBeforeQuiet,
            Bug::FreeBeforeClear,
            Bug::IncarnationIgnored,
            Bug::UnverifiedLoaded,
            Bug::SilenceIgnored,
            Bug::OneConnection,
            Bug::OrderTrusted,
            Bug::TokenIgnored,
            Bug::ListFromElsewhere,
            Bug::DoneBeforeCopied,
            Bug::SlotReusedEarly,
            Bug::QuietBeforeCopied,
            Bug::FailedCopyCounts,
            Bug::CopyListReused,
            Bug::ReadyBeforeEvent,
            Bug::FlushSkipped,
            Bug::MappedAfterDown,
            Bug::HoldKept,
            Bug::ReadAboveMark,
            Bug::MarkAhead,
            Bug::FinalTooEarly,
            Bug::GrownAfterRevoke,
            Bug::GrownLost,
        ];
    }

    thread_local!(static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) });

    /// Plants a bug in this thread, or removes it.
    pub fn plant(bug: Option<Bug>) {
        PLANTED.set(bug);
    }

    /// Whether this bug is planted in this thread.
    #[inline]
    pub fn planted(bug: Bug) -> bool {
        PLANTED.get() == Some(bug)
    }
}

#[cfg(all(feature = "sabotage", debug_assertions))]
pub use planting::{plant, planted};

/// Whether this bug is planted in this thread: never, in this build.
#[cfg(not(all(feature = "sabotage", debug_assertions)))]
#[inline(always)]
pub const fn planted(_: Bug) -> bool {
    false
}
