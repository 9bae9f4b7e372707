//! Planted bugs, with which the property tests prove that they find such bugs. Only a build with debug assertions and the
//! feature `sabotage` contains them, so a release build cannot.

use std::hash::Hash;

use kvferry_proto::Block;

/// A bug that a real scheduler had, or nearly had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bug {
    /// A request whose invalid blocks are all shared keeps its external count.
    ExternalLeftStale,
    /// All lost tokens are subtracted from the load, although some were cache hits, and the count wraps below zero.
    Wraps,
    /// The same, but the count stops at zero, and the load's tokens stay counted.
    Saturates,
    /// The tokens of a preempted request are counted as final, and again when it ends.
    CountedAtPreemption,
    /// Recomputed tokens are counted when they are lost instead of when they are computed.
    CountedWhenLost,
    /// A request adopts tokens, but the ledger is not told.
    AdoptionForgotten,
    /// The owner of a shared block is removed, and the other requests wait for it indefinitely.
    NoInheritance,
    /// Every request that shares a lost block computes it.
    AllCompute,
    /// A request counts on a shared block before its owner has computed it.
    CountedOnAtOnce,
    /// A request computes a block while another request's load writes it.
    LoaderOverruled,
    /// Tokens that were computed on top of an invalid block stay counted.
    ComputedKept,
    /// A block that was computed on top of an invalid one counts as valid for other requests.
    TaintIgnored,
    /// The blocks after an invalid one stay in the prefix cache.
    DependentsStayCached,
    /// A late report of a block truncates the request that has computed it since.
    LateReportBelieved,
    /// With several groups, the blocks that the other groups need are not checked.
    GroupsApart,
}

impl Bug {
    /// All of them.
    pub const ALL: [Bug; 15] = [
        Bug::ExternalLeftStale,
        Bug::Wraps,
        Bug::Saturates,
        Bug::CountedAtPreemption,
        Bug::CountedWhenLost,
        Bug::AdoptionForgotten,
        Bug::NoInheritance,
        Bug::AllCompute,
        Bug::CountedOnAtOnce,
        Bug::LoaderOverruled,
        Bug::ComputedKept,
        Bug::TaintIgnored,
        Bug::DependentsStayCached,
        Bug::LateReportBelieved,
        Bug::GroupsApart,
    ];
}

#[cfg(all(feature = "sabotage", debug_assertions))]
mod on {
    use super::{Block, Bug, Hash};
    use std::{
        cell::{Cell, RefCell},
        collections::HashMap,
        hash::{DefaultHasher, Hasher},
    };

    thread_local! {
        static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
        /// The owner of each block at the time of its loss. A correct scheduler remembers no owners.
        static OWNERS: RefCell<HashMap<Block, u64>> = RefCell::default();
    }

    /// Plants a bug in this thread, or removes it.
    pub fn plant(bug: Option<Bug>) {
        PLANTED.set(bug);
        OWNERS.take();
    }

    /// Whether this bug is planted in this thread.
    #[inline]
    pub fn planted(bug: Bug) -> bool {
        PLANTED.get() == Some(bug)
    }

    fn key(id: &impl Hash) -> u64 {
        let mut h = DefaultHasher::new();
        id.hash(&mut h);
        h.finish()
    }

    /// Whether another request owned the block when it was lost.
    pub(in crate::scheduler) fn disinherited(block: Block, owner: &impl Hash) -> bool {
        planted(Bug::NoInheritance) && OWNERS.with_borrow(|o| o.get(&block).is_some_and(|was| *was != key(owner)))
    }

    /// Remembers the owner of a lost block.
    pub(in crate::scheduler) fn remember(block: Block, owner: &impl Hash) {
        if planted(Bug::NoInheritance) {
            OWNERS.with_borrow_mut(|o| o.insert(block, key(owner)));
        }
    }
}

#[cfg(all(feature = "sabotage", debug_assertions))]
pub(super) use on::{disinherited, remember};
#[cfg(all(feature = "sabotage", debug_assertions))]
pub use on::{plant, planted};

/// Always false: this build has no planted bugs.
#[cfg(not(all(feature = "sabotage", debug_assertions)))]
#[inline(always)]
pub fn planted(_: Bug) -> bool {
    false
}

#[cfg(not(all(feature = "sabotage", debug_assertions)))]
#[inline(always)]
pub(super) fn disinherited(_: Block, _: &impl Hash) -> bool {
    false
}

#[cfg(not(all(feature = "sabotage", debug_assertions)))]
#[inline(always)]
pub(super) fn remember(_: Block, _: &impl Hash) {}
