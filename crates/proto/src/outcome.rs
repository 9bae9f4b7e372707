//! What became of a pull: two sets of positions for each group, and why.

use std::time::Duration;

use crate::{
    block::{Block, GroupId, PositionSet},
    error::Cause,
    lane::LaneKind,
    plan::LocalBlocks,
};

/// One group's part of an outcome. `loaded` and `invalid` are disjoint, and together they are what was wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupOutcome {
    /// The group.
    pub group: GroupId,
    /// Positions whose blocks hold what the producer held while the offer was live.
    pub loaded: PositionSet,
    /// Positions whose blocks hold nothing of use.
    pub invalid: PositionSet,
    /// The invalid positions by cause; disjoint.
    pub causes: Vec<(Cause, PositionSet)>,
}

impl GroupOutcome {
    /// Nothing that was wanted arrived.
    pub fn all_invalid(wanted: &LocalBlocks, cause: Cause) -> Self {
        let mut invalid = PositionSet::new();
        invalid.insert_ascending(wanted.wants().map(|(p, _)| p));
        let causes = if invalid.is_empty() { Vec::new() } else { vec![(cause, invalid.clone())] };
        Self { group: wanted.group, loaded: PositionSet::new(), invalid, causes }
    }
}

/// When things happened, from the call on. `None`: they did not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Times {
    /// The peer's Hello was there; zero when the session was up already.
    pub hello: Option<Duration>,
    /// The last claim was granted.
    pub claim: Option<Duration>,
    /// The first chunk was fenced, from any of its sources.
    pub first: Option<Duration>,
    /// The last chunk was fenced.
    pub data: Option<Duration>,
    /// The two sets were frozen.
    pub decided: Option<Duration>,
    /// Nothing could write the local blocks any more.
    pub ended: Option<Duration>,
    /// The deadline.
    pub deadline: Duration,
}

/// What became of a pull.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// By group, in the order of the call.
    pub groups: Vec<GroupOutcome>,
    /// Bytes of the loaded blocks.
    pub bytes: u64,
    /// Lanes that bytes were asked for on, in order; the last one is the one that finished.
    pub lanes: Vec<LaneKind>,
    /// Attempts after the first.
    pub retries: u32,
    /// When things happened.
    pub times: Times,
}

impl Outcome {
    /// Whether every wanted block is loaded.
    pub fn complete(&self) -> bool {
        self.groups.iter().all(|g| g.invalid.is_empty())
    }

    /// Loaded blocks, over all groups.
    pub fn loaded(&self) -> u64 {
        self.groups.iter().map(|g| g.loaded.len()).sum()
    }

    /// Invalid blocks, over all groups.
    pub fn invalid(&self) -> u64 {
        self.groups.iter().map(|g| g.invalid.len()).sum()
    }

    /// The first cause of the earliest invalid position.
    pub fn cause(&self) -> Option<Cause> {
        let first = |s: &PositionSet| s.ranges().first().map(|r| r[0]);
        self.groups.iter().flat_map(|g| &g.causes).min_by_key(|(_, s)| first(s)).map(|(c, _)| *c)
    }
}

/// An ended pull, with the local blocks that its positions stand for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockReport {
    /// Blocks that hold the prompt's KV.
    pub loaded: Vec<Block>,
    /// Blocks that do not.
    pub invalid: Vec<Block>,
}
