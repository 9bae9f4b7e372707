//! The result of a pull: two sets of positions for each group, with causes.

use std::time::Duration;

use crate::{Block, Cause, GroupId, LaneKind, LocalBlocks, PositionSet};

/// One group's part of an outcome. `loaded` and `invalid` are disjoint, and together they are the wanted positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupOutcome {
    /// The group.
    pub group: GroupId,
    /// Positions whose blocks hold bytes that the producer had there while the offer was live.
    pub loaded: PositionSet,
    /// Positions whose blocks have unusable content.
    pub invalid: PositionSet,
    /// The invalid positions by cause; disjoint.
    pub causes: Vec<(Cause, PositionSet)>,
}

impl GroupOutcome {
    /// An outcome without loaded blocks.
    pub fn all_invalid(wanted: &LocalBlocks, cause: Cause) -> Self {
        let mut invalid = PositionSet::new();
        invalid.insert_ascending(wanted.wants().map(|(p, _)| p));
        let causes = if invalid.is_empty() { Vec::new() } else { vec![(cause, invalid.clone())] };
        Self { group: wanted.group, loaded: PositionSet::new(), invalid, causes }
    }
}

/// Times of a pull's steps, counted from the call. `None`: the step was not reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Times {
    /// The peers had answered Hello; zero if the sessions were up already.
    pub hello: Option<Duration>,
    /// The last claim was granted.
    pub claim: Option<Duration>,
    /// The first chunk was fenced, from any of the sources.
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

/// The result of a pull.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// By group, in the order of the call.
    pub groups: Vec<GroupOutcome>,
    /// Bytes of the loaded blocks.
    pub bytes: u64,
    /// Kinds of the lanes of all attempts, in order.
    pub lanes: Vec<LaneKind>,
    /// Attempts after the first.
    pub retries: u32,
    /// Times of the steps.
    pub times: Times,
}

impl Outcome {
    /// Whether every wanted block is loaded.
    pub fn complete(&self) -> bool {
        self.groups.iter().all(|g| g.invalid.is_empty())
    }

    /// Number of loaded blocks, over all groups.
    pub fn loaded(&self) -> u64 {
        self.groups.iter().map(|g| g.loaded.len()).sum()
    }

    /// Number of invalid blocks, over all groups.
    pub fn invalid(&self) -> u64 {
        self.groups.iter().map(|g| g.invalid.len()).sum()
    }

    /// The first cause of the earliest invalid position.
    pub fn cause(&self) -> Option<Cause> {
        let first = |s: &PositionSet| s.ranges().first().map(|r| r[0]);
        self.groups.iter().flat_map(|g| &g.causes).min_by_key(|(_, s)| first(s)).map(|(c, _)| *c)
    }
}

/// The local blocks at the positions of an outcome.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockReport {
    /// Blocks that hold the prompt's KV.
    pub loaded: Vec<Block>,
    /// Blocks that do not.
    pub invalid: Vec<Block>,
}
