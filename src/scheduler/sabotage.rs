//! Bugs to plant, so that the property tests can prove that they would see them. Compiled away without the feature
//! `sabotage`, which only tests turn on.

use std::hash::Hash;

use kvferry_proto::block::Block;

/// A bug that was made, or nearly made, by some scheduler in the field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bug {
    /// The bug that started this: a request whose invalid blocks are all shared keeps its external count.
    ExternalLeftStale,
    /// What was lost is subtracted from the load alone, though part of it was a cache hit, and wraps below zero.
    Wraps,
    /// The same, stopped at zero: nothing crashes, and the load's tokens stay counted.
    Saturates,
    /// A preempted request's tokens are counted as final, and again when it has ended.
    CountedAtPreemption,
    /// Recomputed tokens are counted when they are lost, not when they are computed.
    CountedWhenLost,
    /// What a sharer computed is taken over, but not told to the books.
    AdoptionForgotten,
    /// The owner of a shared block goes away, and the others wait for it for ever.
    NobodyInherits,
    /// Every sharer computes the block again.
    EveryoneComputes,
    /// A sharer counts on a block at once, though its owner has yet to compute it.
    CountedOnAtOnce,
    /// A request takes a block for its own to compute while another one's load writes it.
    LoaderOverruled,
    /// Tokens that were computed on top of an invalid block stay counted.
    ComputedKept,
    /// What was computed on top of an invalid block is good enough for others.
    TaintIgnored,
    /// The blocks behind an invalid one stay in the prefix cache.
    DependentsStayCached,
    /// A late report of a block truncates the request that has computed it since.
    LateReportBelieved,
    /// With several groups, what the other groups need of the past is not looked at.
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
        Bug::NobodyInherits,
        Bug::EveryoneComputes,
        Bug::CountedOnAtOnce,
        Bug::LoaderOverruled,
        Bug::ComputedKept,
        Bug::TaintIgnored,
        Bug::DependentsStayCached,
        Bug::LateReportBelieved,
        Bug::GroupsApart,
    ];
}

#[cfg(feature = "sabotage")]
mod on {
    use super::{Block, Bug, Hash};
    use std::{
        cell::{Cell, RefCell},
        collections::HashMap,
        hash::{DefaultHasher, Hasher},
    };

    thread_local! {
        static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
        /// What a scheduler remembers that should remember nothing: who owned a block when it was lost.
        static OWNERS: RefCell<HashMap<Block, u64>> = RefCell::default();
    }

    /// Plants a bug in this thread, or takes it out.
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

    /// Whether somebody else owned the block when it was lost, who cannot be its owner any more.
    pub(in crate::scheduler) fn disinherited(block: Block, owner: &impl Hash) -> bool {
        planted(Bug::NobodyInherits) && OWNERS.with_borrow(|o| o.get(&block).is_some_and(|was| *was != key(owner)))
    }

    /// Remembers who owns a lost block.
    pub(in crate::scheduler) fn remember(block: Block, owner: &impl Hash) {
        if planted(Bug::NobodyInherits) {
            OWNERS.with_borrow_mut(|o| o.insert(block, key(owner)));
        }
    }
}

#[cfg(feature = "sabotage")]
pub(super) use on::{disinherited, remember};
#[cfg(feature = "sabotage")]
pub use on::{plant, planted};

/// Whether this bug is planted in this thread: never, without the feature.
#[cfg(not(feature = "sabotage"))]
#[inline(always)]
pub fn planted(_: Bug) -> bool {
    false
}

#[cfg(not(feature = "sabotage"))]
#[inline(always)]
pub(super) fn disinherited(_: Block, _: &impl Hash) -> bool {
    false
}

#[cfg(not(feature = "sabotage"))]
#[inline(always)]
pub(super) fn remember(_: Block, _: &impl Hash) {}
