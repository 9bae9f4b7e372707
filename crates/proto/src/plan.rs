//! The plan of a pull, a pure function: (offer, remote shards, local shard, local blocks by position) -> chunks of reads.
//!
//! Chunks go in prefix order; inside one, neighbours that are contiguous on both sides are merged into one read.
//! Positions decide what is read into what, never counts. Reads are generated chunk by chunk into a buffer that is used
//! again, so a plan costs memory for its blocks and not for its reads.

use crate::{
    block::{Block, BlockId, GroupId, Marks},
    group::{Group, GroupKind, PoolLayout},
    offer::Offer,
    shard::Shard,
};

/// The blocks that a pull writes, for consecutive positions of one group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalBlocks {
    /// The group.
    pub group: GroupId,
    /// Position of `blocks[0]`, in blocks from the prompt's start.
    pub first_position: u32,
    /// Local block ids by position; `None` where nothing is wanted (a local prefix hit, a null block).
    pub blocks: Vec<Option<BlockId>>,
}

impl LocalBlocks {
    /// The wanted `(position, block)`s, ascending by position.
    pub fn wants(&self) -> impl Iterator<Item = (u32, BlockId)> + Clone + '_ {
        self.blocks.iter().enumerate().filter_map(|(i, b)| {
            // Past 2^32 there is no position.
            let position = u32::try_from(i).ok().and_then(|i| self.first_position.checked_add(i))?;
            b.map(|b| (position, b))
        })
    }

    /// The wanted blocks.
    pub fn wanted_blocks(&self) -> impl Iterator<Item = Block> + Clone + '_ {
        self.wants().map(|(_, id)| Block { group: self.group, id })
    }
}

/// One contiguous copy from a source rank's memory into this rank's.
///
/// `src_*` says where the bytes lie, for lanes that address memory; `group`, `region`, `position`, `blocks`, `within`
/// and `piece` say what they are, for lanes that name it. Both say the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Read {
    /// Offset in the source segment, in bytes.
    pub src_offset: u64,
    /// Offset in the local segment, in bytes.
    pub dst_offset: u64,
    /// Length in bytes: `blocks * piece`.
    pub len: u64,
    /// Bytes of each block that are read.
    pub piece: u64,
    /// Where in the source's block the piece starts, in bytes.
    pub within: u64,
    /// The chunk that it belongs to.
    pub chunk: u32,
    /// First position.
    pub position: u32,
    /// Consecutive positions.
    pub blocks: u32,
    /// The group.
    pub group: GroupId,
    /// Index into the source's regions of the group.
    pub region: u16,
    /// Index into the source's segments.
    pub src_segment: u16,
    /// Index into the local segments.
    pub dst_segment: u16,
}

impl Read {
    /// A read of one block at position 0, between these segments and offsets.
    pub fn between(chunk: u32, src: (u16, u64), dst: (u16, u64), len: u64) -> Self {
        Self {
            src_offset: src.1,
            dst_offset: dst.1,
            len,
            piece: len,
            within: 0,
            chunk,
            position: 0,
            blocks: 1,
            group: GroupId(0),
            region: 0,
            src_segment: src.0,
            dst_segment: dst.0,
        }
    }
}

/// Memory and shard of one source rank.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// Its pool.
    pub layout: &'a PoolLayout,
    /// Its part of the model.
    pub shard: &'a Shard,
}

/// How large chunks are. A chunk is lost as a whole, so it must be small next to the pull; each costs a fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkSize {
    /// Aim for this many chunks a pull.
    pub per_pull: u32,
    /// But no smaller than this, in bytes (one block at least).
    pub min_bytes: u64,
    /// And no larger, in bytes (one block at least).
    pub max_bytes: u64,
}

impl Default for ChunkSize {
    /// 128 chunks a pull: with four of them in flight, a death costs about 3 % of the prompt. 256 KiB to 8 MiB each.
    fn default() -> Self {
        Self { per_pull: 128, min_bytes: 256 << 10, max_bytes: 8 << 20 }
    }
}

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
    /// A local block that is to be written twice.
    #[error("local block {block} of group {group} is wanted for two positions: pass each destination once")]
    LocalBlockTwice {
        /// The group.
        group: u16,
        /// The block.
        block: u32,
    },
    /// A block id in the offer past the source's pool.
    #[error(
        "the offer names block {block} of group {group}, past the {blocks} of the peer's pool: the offer is not this peer's"
    )]
    SourceBlock {
        /// The group.
        group: u16,
        /// The block.
        block: u32,
        /// Blocks of the group.
        blocks: u32,
    },
    /// A local region that no source has in a shape that fits.
    #[error("region {region:?} of group {group}: {why}; start both engines with the same model and cache settings")]
    Region {
        /// The region's name.
        region: String,
        /// The group.
        group: u16,
        /// What does not fit.
        why: String,
    },
    /// More blocks than the limits allow.
    #[error("{blocks} blocks wanted, over the limit of {limit}; pull them in parts, or raise limits.blocks_per_offer")]
    TooManyBlocks {
        /// Blocks wanted.
        blocks: usize,
        /// Most that the limits allow.
        limit: usize,
    },
}

/// One block that is wanted and offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Want {
    /// Its position in the prompt, in blocks.
    pub position: u32,
    /// The block at the source.
    pub src: BlockId,
    /// The block here.
    pub dst: BlockId,
}

/// Consecutive wanted blocks that are read, fenced and reported together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Index into [`Plan::groups`].
    pub group: u16,
    /// First index into the group's wants.
    pub first: u32,
    /// Number of wants.
    pub count: u32,
}

/// The wants of one group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupPlan {
    /// The group.
    pub id: GroupId,
    /// What its layers compute.
    pub kind: GroupKind,
    /// Wanted and offered, ascending by position.
    pub wants: Vec<Want>,
    /// Wanted here, but not in the offer: `(position, local block)`.
    pub not_offered: Vec<(u32, BlockId)>,
    /// Pieces by source.
    pieces: Vec<Vec<Piece>>,
}

/// How the blocks of one local region come out of one source region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    region: u16,
    src_segment: u16,
    dst_segment: u16,
    src_base: u64,
    src_stride: u64,
    dst_base: u64,
    dst_stride: u64,
    within: u64,
    len: u64,
}

impl Piece {
    /// Whether consecutive blocks are contiguous on both sides.
    fn dense(&self) -> bool {
        self.len == self.src_stride && self.len == self.dst_stride
    }
}

/// What a pull reads, in which order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    groups: Vec<GroupPlan>,
    chunks: Vec<Chunk>,
    sources: usize,
    bytes: u64,
}

impl Plan {
    /// Plans a pull of `local` blocks out of `offer`.
    ///
    /// `sources` are the source ranks that hold a part of what this rank needs, in the order that [`Plan::reads`] numbers
    /// them. `limit` bounds the wanted blocks.
    pub fn new(
        offer: &Offer,
        sources: &[Source<'_>],
        here: Source<'_>,
        local: &[LocalBlocks],
        size: ChunkSize,
        limit: usize,
    ) -> Result<Self, PlanError> {
        let wanted = local.iter().map(|l| l.blocks.len()).sum();
        if wanted > limit {
            return Err(PlanError::TooManyBlocks { blocks: wanted, limit });
        }
        let mut groups: Vec<GroupPlan> = Vec::with_capacity(local.len());
        let mut bytes = 0;
        for l in local {
            let g = here.layout.group(l.group).ok_or(PlanError::LocalGroup(l.group.0))?;
            if groups.iter().any(|p| p.id == l.group) {
                return Err(PlanError::LocalGroup(l.group.0));
            }
            let plan = plan_group(offer, sources, here, g, l)?;
            bytes += plan.wants.len() as u64 * plan.bytes_per_block();
            groups.push(plan);
        }
        let target =
            (bytes / u64::from(size.per_pull.max(1))).clamp(size.min_bytes, size.max_bytes.max(size.min_bytes));
        let chunks = cut(&groups, here.layout, target);
        Ok(Self { groups, chunks, sources: sources.len(), bytes })
    }

    /// The chunks, in prefix order.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// The groups.
    pub fn groups(&self) -> &[GroupPlan] {
        &self.groups
    }

    /// Number of source ranks.
    pub fn sources(&self) -> usize {
        self.sources
    }

    /// Bytes that all reads together bring.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The wants of a chunk.
    pub fn wants(&self, chunk: u32) -> &[Want] {
        let c = &self.chunks[chunk as usize];
        &self.groups[usize::from(c.group)].wants[c.first as usize..(c.first + c.count) as usize]
    }

    /// The group of a chunk.
    pub fn group_of(&self, chunk: u32) -> &GroupPlan {
        &self.groups[usize::from(self.chunks[chunk as usize].group)]
    }

    /// Every local block that the plan writes.
    pub fn local_blocks(&self) -> impl Iterator<Item = Block> + '_ {
        self.groups.iter().flat_map(|g| g.wants.iter().map(|w| Block { group: g.id, id: w.dst }))
    }

    /// Appends the reads of one chunk from one source to `out`, none longer than `max_read` bytes.
    pub fn reads(&self, chunk: u32, source: usize, max_read: u64, out: &mut Vec<Read>) {
        let c = &self.chunks[chunk as usize];
        let g = &self.groups[usize::from(c.group)];
        let wants = &g.wants[c.first as usize..(c.first + c.count) as usize];
        let max_read = max_read.max(1);
        for p in &g.pieces[source] {
            if p.len > max_read {
                split(chunk, g.id, p, wants, max_read, out);
                continue;
            }
            let most = if p.dense() { (max_read / p.len).min(u64::from(u32::MAX)) as u32 } else { 1 };
            let mut rest = wants;
            while let [first, ..] = rest {
                let mut n = 1;
                while n < most as usize
                    && rest.get(n).is_some_and(|w| {
                        let prev = &rest[n - 1];
                        w.position == prev.position + 1 && w.src.0 == prev.src.0 + 1 && w.dst.0 == prev.dst.0 + 1
                    })
                {
                    n += 1;
                }
                out.push(Read {
                    src_offset: p.src_base + u64::from(first.src.0) * p.src_stride,
                    dst_offset: p.dst_base + u64::from(first.dst.0) * p.dst_stride,
                    len: n as u64 * p.len,
                    piece: p.len,
                    within: p.within,
                    chunk,
                    position: first.position,
                    blocks: n as u32,
                    group: g.id,
                    region: p.region,
                    src_segment: p.src_segment,
                    dst_segment: p.dst_segment,
                });
                rest = &rest[n..];
            }
        }
    }
}

impl GroupPlan {
    /// Bytes that one block brings, from all sources.
    pub fn bytes_per_block(&self) -> u64 {
        self.pieces.iter().flatten().map(|p| p.len).sum()
    }
}

/// Reads of pieces that are longer than a read may be.
fn split(chunk: u32, group: GroupId, p: &Piece, wants: &[Want], max_read: u64, out: &mut Vec<Read>) {
    for w in wants {
        let mut done = 0;
        while done < p.len {
            let len = (p.len - done).min(max_read);
            out.push(Read {
                src_offset: p.src_base + u64::from(w.src.0) * p.src_stride + done,
                dst_offset: p.dst_base + u64::from(w.dst.0) * p.dst_stride + done,
                len,
                piece: len,
                within: p.within + done,
                chunk,
                position: w.position,
                blocks: 1,
                group,
                region: p.region,
                src_segment: p.src_segment,
                dst_segment: p.dst_segment,
            });
            done += len;
        }
    }
}

fn plan_group(
    offer: &Offer,
    sources: &[Source<'_>],
    here: Source<'_>,
    g: &Group,
    local: &LocalBlocks,
) -> Result<GroupPlan, PlanError> {
    let mut plan = GroupPlan { id: g.id, kind: g.kind, wants: Vec::new(), not_offered: Vec::new(), pieces: Vec::new() };
    let offered = offer.groups.iter().find(|o| o.group == g.id);
    let most = sources.iter().filter_map(|s| s.layout.group(g.id)).map(|s| s.blocks).min().unwrap_or(0);
    let mut seen = Marks::new(g.blocks);
    plan.wants.reserve_exact(local.blocks.len());
    for (position, dst) in local.wants() {
        if dst.0 >= g.blocks {
            return Err(PlanError::LocalBlock { group: g.id.0, block: dst.0, blocks: g.blocks });
        }
        if !seen.insert(dst) {
            return Err(PlanError::LocalBlockTwice { group: g.id.0, block: dst.0 });
        }
        let src = offered.and_then(|o| {
            position.checked_sub(o.first_position).and_then(|at| o.blocks.get(at as usize).copied().flatten())
        });
        match src {
            None => plan.not_offered.push((position, dst)),
            Some(src) if src.0 >= most => {
                return Err(PlanError::SourceBlock { group: g.id.0, block: src.0, blocks: most });
            }
            Some(src) => plan.wants.push(Want { position, src, dst }),
        }
    }
    if plan.wants.is_empty() {
        plan.pieces = vec![Vec::new(); sources.len()];
        return Ok(plan);
    }
    let mut covered = vec![0u64; g.regions.len()];
    for s in sources {
        plan.pieces.push(pieces(*s, here, g, &mut covered)?);
    }
    for (r, covered) in g.regions.iter().zip(covered) {
        if covered != r.block_bytes {
            return Err(PlanError::Region {
                region: r.name.to_string(),
                group: g.id.0,
                why: format!("the peer's ranks bring {covered} of its {} bytes a block", r.block_bytes),
            });
        }
    }
    Ok(plan)
}

/// The pieces that one source brings for the group. `covered` adds up the bytes of each local region's block.
fn pieces(src: Source<'_>, here: Source<'_>, g: &Group, covered: &mut [u64]) -> Result<Vec<Piece>, PlanError> {
    let mut out = Vec::new();
    let Some(theirs) = src.layout.group(g.id) else { return Ok(out) };
    if theirs.block_tokens != g.block_tokens || theirs.kind != g.kind {
        return Err(PlanError::Region {
            region: g.regions[0].name.to_string(),
            group: g.id.0,
            why: format!(
                "block_tokens and kind are {} {:?} here, {} {:?} at the peer",
                g.block_tokens, g.kind, theirs.block_tokens, theirs.kind
            ),
        });
    }
    let by_name: std::collections::HashMap<&str, usize> =
        theirs.regions.iter().enumerate().map(|(i, r)| (&*r.name, i)).collect();
    for (i, r) in g.regions.iter().enumerate() {
        let Some(&at) = by_name.get(&*r.name) else { continue };
        let t = &theirs.regions[at];
        let Some((first, heads)) = src.shard.common_heads(here.shard) else { continue };
        // A head is one run of bytes in a block (heads outermost), so a range of heads is one run too.
        let (theirs_a_head, ours_a_head) =
            (t.block_bytes / u64::from(src.shard.heads), r.block_bytes / u64::from(here.shard.heads));
        let whole = src.shard.first_head == here.shard.first_head && src.shard.heads == here.shard.heads;
        let (within, dst_within, len) = if whole {
            if t.block_bytes != r.block_bytes {
                return Err(PlanError::Region {
                    region: r.name.to_string(),
                    group: g.id.0,
                    why: format!("a block has {} bytes here, {} at the peer", r.block_bytes, t.block_bytes),
                });
            }
            (0, 0, r.block_bytes)
        } else if theirs_a_head == ours_a_head
            && theirs_a_head * u64::from(src.shard.heads) == t.block_bytes
            && ours_a_head * u64::from(here.shard.heads) == r.block_bytes
        {
            (
                u64::from(first - src.shard.first_head) * ours_a_head,
                u64::from(first - here.shard.first_head) * ours_a_head,
                u64::from(heads) * ours_a_head,
            )
        } else {
            return Err(PlanError::Region {
                region: r.name.to_string(),
                group: g.id.0,
                why: format!(
                    "{} bytes for {} heads here, {} bytes for {} heads at the peer: a head differs in size",
                    r.block_bytes, here.shard.heads, t.block_bytes, src.shard.heads
                ),
            });
        };
        covered[i] += len;
        out.push(Piece {
            region: at as u16,
            src_segment: t.segment,
            dst_segment: r.segment,
            src_base: t.offset + within,
            src_stride: t.stride,
            dst_base: r.offset + dst_within,
            dst_stride: r.stride,
            within,
            len,
        });
    }
    Ok(out)
}

/// Cuts the wants into chunks of about `target` bytes, ordered by the first token they hold.
fn cut(groups: &[GroupPlan], here: &PoolLayout, target: u64) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    for (i, g) in groups.iter().enumerate() {
        let per = (target / g.bytes_per_block().max(1)).clamp(1, u64::from(u32::MAX)) as u32;
        let total = g.wants.len() as u32;
        let mut first = 0;
        while first < total {
            let count = per.min(total - first);
            chunks.push(Chunk { group: i as u16, first, count });
            first += count;
        }
    }
    if groups.len() > 1 {
        chunks.sort_by_key(|c| {
            let g = &groups[usize::from(c.group)];
            let tokens = here.group(g.id).map_or(1, |g| g.block_tokens);
            u64::from(g.wants[c.first as usize].position) * u64::from(tokens)
        });
    }
    chunks
}
