//! Why a pull cannot be planned.

/// A pull that cannot be planned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The local layout lacks a group, or the caller named one twice.
    #[error("group {0} is not in this rank's pool, or is listed twice: pass each group's blocks once")]
    LocalGroup(u16),
    /// A local block id past the pool.
    #[error("local block {block} of group {group} is not in the pool, which has {blocks}")]
    LocalBlock {
        /// The group.
        group: u16,
        /// The block.
        block: u32,
        /// Blocks of the group.
        blocks: u32,
    },
    /// A local block that is listed twice.
    #[error("local block {block} of group {group} is wanted for two positions: pass each destination once")]
    LocalBlockTwice {
        /// The group.
        group: u16,
        /// The block.
        block: u32,
    },
    /// The name disagrees with the producer's table.
    #[error("the name does not fit the offer: {0}; pass on the producer's offer unchanged")]
    Name(String),
    /// The source ranks have entered different blocks for one offer.
    #[error("the peer's ranks offer different blocks under one name: enter the same lists on each rank of an engine")]
    Ranks,
    /// A granted block id past the source's pool.
    #[error(
        "the peer granted block {block} of group {group}, past the {blocks} blocks of its own pool: upgrade or restart it"
    )]
    SourceBlock {
        /// The group.
        group: u16,
        /// The block.
        block: u32,
        /// Blocks of the group.
        blocks: u32,
    },
    /// A local region that fits no region of the sources.
    #[error("region {region:?} of group {group}: {why}; start both engines with the same model and cache settings")]
    Region {
        /// The region's name.
        region: String,
        /// The group.
        group: u16,
        /// The difference.
        why: String,
    },
    /// The pull has more blocks than the limit.
    #[error("{blocks} blocks wanted, over the limit of {limit}; pull them in parts, or raise limits.blocks_per_offer")]
    TooManyBlocks {
        /// Blocks wanted.
        blocks: usize,
        /// The limit.
        limit: usize,
    },
}
