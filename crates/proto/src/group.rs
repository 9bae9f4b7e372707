//! The layout of a rank's registered KV memory: pool, groups, regions. It has offsets into segments instead of pointers, so
//! that both sides can describe their memory with it.

use std::sync::Arc;

use crate::GroupId;

/// The kind of a group's layers, which decides which blocks may be missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GroupKind {
    /// Full attention: every position has a block.
    Full,
    /// Sliding window attention: positions before the window have null blocks.
    SlidingWindow,
    /// Recurrent state: one loss fails the whole load, since a state cannot be truncated.
    State,
}

/// One layer's (or packed layers') range, cut into blocks of equal stride.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// The layer's name; the regions of two ranks are paired by it.
    pub name: Arc<str>,
    /// Index into [`PoolLayout::segments`].
    pub segment: u16,
    /// Offset of block 0 from the segment's start, in bytes.
    pub offset: u64,
    /// Bytes of one block in this region.
    pub block_bytes: u64,
    /// Bytes from one block's start to the next one's; at least `block_bytes`.
    pub stride: u64,
}

impl Region {
    /// Offset of a block in its segment, in bytes.
    pub fn block_offset(&self, block: u32) -> u64 {
        self.offset + u64::from(block) * self.stride
    }
}

/// Layers that share a block table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// The group's number; unique in the pool.
    pub id: GroupId,
    /// Kind of its layers.
    pub kind: GroupKind,
    /// Tokens in a block.
    pub block_tokens: u32,
    /// Blocks in each region.
    pub blocks: u32,
    /// One for each layer, or for layers packed together.
    pub regions: Vec<Region>,
}

impl Group {
    /// Bytes of one block over all regions.
    pub fn block_bytes(&self) -> u64 {
        self.regions.iter().map(|r| r.block_bytes).sum()
    }
}

/// A rank's registered KV memory: contiguous segments, and the groups that lie in them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PoolLayout {
    /// Length of each contiguous piece of memory, in bytes.
    pub segments: Vec<u64>,
    /// The groups, ascending by id.
    pub groups: Vec<Group>,
}

/// A layout that does not fit its memory or the limits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadLayout {
    /// A region reaches past its segment.
    #[error(
        "region {region:?} of group {group} needs {needed} bytes of segment {segment}, which has {has}: give more memory or fewer blocks"
    )]
    PastEnd {
        /// The region's name.
        region: String,
        /// The group's id.
        group: u16,
        /// The segment's index.
        segment: u16,
        /// Bytes that the region needs, from the segment's start.
        needed: u64,
        /// Bytes of the segment; 0 if it does not exist.
        has: u64,
    },
    /// A value is zero, out of order, or repeated.
    #[error("group {group}: {what}")]
    Group {
        /// The group's id.
        group: u16,
        /// The problem.
        what: &'static str,
    },
    /// A count or a size is over its limit.
    #[error("{what}: {has} is over the limit of {limit}")]
    TooMany {
        /// The counted thing.
        what: &'static str,
        /// The count.
        has: u64,
        /// The limit.
        limit: u64,
    },
}

impl PoolLayout {
    /// Most segments of a pool.
    pub const MAX_SEGMENTS: usize = 4096;
    /// Most groups of a pool.
    pub const MAX_GROUPS: usize = 256;
    /// Most regions of a group.
    pub const MAX_REGIONS: usize = 4096;
    /// Longest region name, in bytes.
    pub const MAX_NAME: usize = 256;
    /// Most bytes of a segment: offsets and their sums stay far from overflow.
    pub const MAX_SEGMENT: u64 = 1 << 56;

    /// A pool of one group whose regions lie one after the other in one segment, each `blocks` blocks of `block_bytes`
    /// bytes. Regions are named `layer.0`, `layer.1`, …
    pub fn uniform(blocks: u32, regions: u32, block_bytes: u64, block_tokens: u32) -> Self {
        let size = u64::from(blocks).saturating_mul(block_bytes);
        let regions = (0..regions)
            .map(|i| Region {
                name: format!("layer.{i}").into(),
                segment: 0,
                offset: u64::from(i).saturating_mul(size),
                block_bytes,
                stride: block_bytes,
            })
            .collect::<Vec<_>>();
        Self {
            segments: vec![size.saturating_mul(regions.len() as u64)],
            groups: vec![Group { id: GroupId(0), kind: GroupKind::Full, block_tokens, blocks, regions }],
        }
    }

    /// The group with this id.
    pub fn group(&self, id: GroupId) -> Option<&Group> {
        self.groups.binary_search_by_key(&id, |g| g.id).ok().map(|i| &self.groups[i])
    }

    /// Checks every bound, so that no offset computed from this layout can leave its segment. For the local layout, and for a
    /// peer's, which may contain any value.
    ///
    /// # Errors
    /// A region does not fit its segment, a value is zero, out of order or repeated, or a limit is exceeded.
    pub fn check(&self) -> Result<(), BadLayout> {
        let over = |what, has: usize, limit: usize| BadLayout::TooMany { what, has: has as u64, limit: limit as u64 };
        if self.segments.len() > Self::MAX_SEGMENTS {
            return Err(over("segments", self.segments.len(), Self::MAX_SEGMENTS));
        }
        if let Some(&has) = self.segments.iter().find(|&&s| s > Self::MAX_SEGMENT) {
            return Err(BadLayout::TooMany { what: "bytes of a segment", has, limit: Self::MAX_SEGMENT });
        }
        if self.groups.len() > Self::MAX_GROUPS {
            return Err(over("groups", self.groups.len(), Self::MAX_GROUPS));
        }
        let mut last = None;
        for g in &self.groups {
            let bad = |what| BadLayout::Group { group: g.id.0, what };
            if last.is_some_and(|l| l >= g.id) {
                return Err(bad("group ids must ascend without repeats"));
            }
            last = Some(g.id);
            if g.blocks == 0 || g.blocks == u32::MAX {
                return Err(bad("has no blocks, or too many to number"));
            }
            if g.block_tokens == 0 {
                return Err(bad("a block holds no tokens"));
            }
            if g.regions.is_empty() {
                return Err(bad("has no regions"));
            }
            if g.regions.len() > Self::MAX_REGIONS {
                return Err(over("regions of a group", g.regions.len(), Self::MAX_REGIONS));
            }
            let mut names = std::collections::HashSet::with_capacity(g.regions.len());
            for r in &g.regions {
                if r.name.is_empty() || r.name.len() > Self::MAX_NAME {
                    return Err(bad("a region's name is empty or too long"));
                }
                if !names.insert(&r.name) {
                    return Err(bad("two regions have the same name"));
                }
                if r.block_bytes == 0 || r.stride < r.block_bytes {
                    return Err(bad("a block is empty, or longer than the stride"));
                }
                let has = self.segments.get(usize::from(r.segment)).copied().unwrap_or(0);
                let needed = u64::from(g.blocks - 1)
                    .checked_mul(r.stride)
                    .and_then(|n| n.checked_add(r.block_bytes))
                    .and_then(|n| n.checked_add(r.offset))
                    .unwrap_or(u64::MAX);
                if needed > has {
                    return Err(BadLayout::PastEnd {
                        region: r.name.to_string(),
                        group: g.id.0,
                        segment: r.segment,
                        needed,
                        has,
                    });
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_past_its_segment_is_refused_for_any_numbers() {
        let good = PoolLayout::uniform(8, 2, 4096, 16);
        assert_eq!(good.check(), Ok(()));
        assert_eq!(good.groups[0].block_bytes(), 8192);
        for (offset, stride) in [(1, 4096), (u64::MAX, 4096), (0, u64::MAX), (u64::MAX, u64::MAX)] {
            let mut bad = good.clone();
            bad.groups[0].regions[1].offset = bad.groups[0].regions[1].offset.saturating_add(offset);
            bad.groups[0].regions[1].stride = stride;
            assert!(matches!(bad.check(), Err(BadLayout::PastEnd { .. })), "{offset} {stride}");
        }
        let mut bad = good.clone();
        bad.groups[0].regions[0].segment = 7;
        assert!(matches!(bad.check(), Err(BadLayout::PastEnd { has: 0, .. })));
        let mut bad = good;
        bad.groups[0].regions[1].name = "layer.0".into();
        assert!(matches!(bad.check(), Err(BadLayout::Group { .. })));
    }
}
