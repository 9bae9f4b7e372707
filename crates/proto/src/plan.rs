//! The plan of a pull, a pure function: (granted blocks, remote shards, local shard, local blocks by position) -> chunks of reads.
//!
//! Chunks are in prefix order; inside one, neighbours that are contiguous on both sides become one read. Blocks are matched
//! by position, never by count. Reads are generated chunk by chunk into a reused buffer, so a plan costs memory for its
//! blocks and not for its reads.
//!
//! The plan of an offer that grows is made in parts: each growth adds chunks behind those before it.

mod error;
mod piece;

use std::collections::VecDeque;

use crate::{
    Block, BlockId, Contents, Extent, Group, GroupId, Marks, OfferGroup, PoolLayout, Shard,
    contents::is_below,
    sabotage::{Bug, planted},
};

pub use self::error::PlanError;
use self::piece::{Piece, pieces};

/// The blocks that a pull writes, for consecutive positions of one group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalBlocks {
    /// The group.
    pub group: GroupId,
    /// Position of `blocks[0]`, in blocks from the prompt's start.
    pub first_position: u32,
    /// Local block ids by position; `None` for a position that is not wanted (a local prefix hit, a null block).
    pub blocks: Vec<Option<BlockId>>,
}

impl LocalBlocks {
    /// The wanted `(position, block)`s, ascending by position.
    pub fn wants(&self) -> impl Iterator<Item = (u32, BlockId)> + Clone + '_ {
        self.blocks.iter().enumerate().filter_map(|(i, b)| {
            // Positions end at 2^32.
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
/// `src_*` gives the place of the bytes, for lanes that address memory; `group`, `region`, `position`, `blocks`, `within` and
/// `piece` name the same bytes, for lanes that do not.
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
    /// Start of the piece in the source's block, in bytes.
    pub within: u64,
    /// Its chunk.
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

/// The size of chunks. A chunk is lost as a whole, so it must be small compared to the pull; each costs a fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkSize {
    /// Target number of chunks in a pull.
    pub per_pull: u32,
    /// Smallest chunk, in bytes (at least one block).
    pub min_bytes: u64,
    /// Largest chunk, in bytes (at least one block).
    pub max_bytes: u64,
}

impl Default for ChunkSize {
    /// 128 chunks of 256 KiB to 8 MiB: with four of them in flight, a peer's death costs about 3 % of the prompt.
    fn default() -> Self {
        Self { per_pull: 128, min_bytes: 256 << 10, max_bytes: 8 << 20 }
    }
}

/// One block that is both wanted and offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Want {
    /// Its position in the prompt, in blocks.
    pub position: u32,
    /// The block at the source.
    pub src: BlockId,
    /// The block here.
    pub dst: BlockId,
}

impl Want {
    /// Whether it is the next block after `prev` in the prompt, at the source, and here.
    fn follows(&self, prev: &Self) -> bool {
        self.position == prev.position + 1 && self.src.0 == prev.src.0 + 1 && self.dst.0 == prev.dst.0 + 1
    }
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
    /// Tokens in a block.
    pub block_tokens: u32,
    /// Wanted and offered, ascending by position.
    pub wants: Vec<Want>,
    /// Wanted, but not offered: `(position, local block)`.
    pub not_offered: Vec<(u32, BlockId)>,
    /// Wanted, and not yet known to be offered or not, ascending by position.
    waiting: VecDeque<(u32, BlockId)>,
    /// Number of `wants` that are in chunks.
    cut: u32,
    /// Pieces by source; empty until something is offered.
    pieces: Vec<Vec<Piece>>,
}

/// The reads of a pull, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    groups: Vec<GroupPlan>,
    chunks: Vec<Chunk>,
    sources: usize,
    bytes: u64,
    size: ChunkSize,
    mark: u64,
    complete: bool,
}

impl Plan {
    /// Plans a pull of `local` blocks out of the `offered` ones, which the producer granted and which do not grow.
    ///
    /// `sources` are the source ranks that hold a part of this rank's blocks, in the order of the numbers in [`Plan::reads`].
    /// `limit` bounds the wanted blocks.
    ///
    /// # Errors
    /// The granted blocks, the layouts and the local blocks do not fit together.
    pub fn new(
        offered: &[OfferGroup],
        sources: &[Source<'_>],
        here: Source<'_>,
        local: &[LocalBlocks],
        size: ChunkSize,
        limit: usize,
    ) -> Result<Self, PlanError> {
        let mut plan = Self::open(here, local, size, limit)?;
        plan.extend(Offered { groups: offered, tokens: u64::MAX, complete: true }, sources, here)?;
        Ok(plan)
    }

    /// A plan of these local blocks without a read yet.
    ///
    /// # Errors
    /// The layout and the local blocks do not fit together.
    pub fn open(here: Source<'_>, local: &[LocalBlocks], size: ChunkSize, limit: usize) -> Result<Self, PlanError> {
        let wanted = local.iter().map(|l| l.blocks.len()).sum();
        if wanted > limit {
            return Err(PlanError::TooManyBlocks { blocks: wanted, limit });
        }
        let mut groups: Vec<GroupPlan> = Vec::with_capacity(local.len());
        for l in local {
            let g = here.layout.group(l.group).ok_or(PlanError::LocalGroup(l.group.0))?;
            if groups.iter().any(|p| p.id == l.group) {
                return Err(PlanError::LocalGroup(l.group.0));
            }
            groups.push(GroupPlan::open(g, l)?);
        }
        Ok(Self { groups, chunks: Vec::new(), sources: 0, bytes: 0, size, mark: 0, complete: false })
    }

    /// Adds chunks for the blocks that have become readable. On an error the chunks stay as they are.
    ///
    /// # Errors
    /// The granted blocks, the layouts and the local blocks do not fit together.
    pub fn extend(&mut self, offered: Offered<'_>, sources: &[Source<'_>], here: Source<'_>) -> Result<(), PlanError> {
        self.sources = sources.len();
        for g in &mut self.groups {
            let Some(layout) = here.layout.group(g.id) else { continue };
            g.extend(&offered, sources, here, layout)?;
        }
        self.mark = offered.tokens;
        self.complete = offered.complete || self.groups.iter().all(|g| g.waiting.is_empty());
        let of = |count: &dyn Fn(&GroupPlan) -> usize| -> u64 {
            self.groups.iter().map(|g| count(g) as u64 * g.bytes_per_block()).sum()
        };
        self.bytes = of(&|g| g.wants.len());
        // While the offer grows, all that may still come counts: the chunks are then as large as those of a whole pull.
        let all = self.bytes + of(&|g| g.waiting.len());
        let ChunkSize { per_pull, min_bytes, max_bytes } = self.size;
        let target = (all / u64::from(per_pull.max(1))).clamp(min_bytes, max_bytes.max(min_bytes));
        cut(&mut self.groups, here.layout, (min_bytes, target), &mut self.chunks);
        Ok(())
    }

    /// Whether every wanted block is planned, or known not to be offered.
    pub fn is_complete(&self) -> bool {
        self.complete
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

    /// Bytes of all reads together.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The wants of a chunk.
    pub fn wants(&self, chunk: u32) -> &[Want] {
        let c = &self.chunks[chunk as usize];
        &self.groups[usize::from(c.group)].wants[c.first as usize..(c.first + c.count) as usize]
    }

    /// Whether a source holds a part of a chunk.
    pub fn has_part(&self, chunk: u32, source: usize) -> bool {
        self.group_of(chunk).pieces.get(source).is_some_and(|pieces| !pieces.is_empty())
    }

    /// The mark of the offer when it was last extended, in tokens.
    pub fn mark(&self) -> u64 {
        self.mark
    }

    /// The group of a chunk.
    pub fn group_of(&self, chunk: u32) -> &GroupPlan {
        &self.groups[usize::from(self.chunks[chunk as usize].group)]
    }

    /// Appends the reads of one chunk from one source to `out`, none longer than `max_read` bytes.
    pub fn reads(&self, chunk: u32, source: usize, max_read: u64, out: &mut Vec<Read>) {
        let c = &self.chunks[chunk as usize];
        let g = &self.groups[usize::from(c.group)];
        let wants = &g.wants[c.first as usize..(c.first + c.count) as usize];
        let max_read = max_read.max(1);
        for p in g.pieces.get(source).into_iter().flatten() {
            p.reads(chunk, g.id, wants, max_read, out);
        }
    }
}

/// The offered blocks so far.
#[derive(Debug, Clone, Copy)]
pub struct Offered<'a> {
    /// The lists of blocks.
    pub groups: &'a [OfferGroup],
    /// The mark, in tokens: until the offer is complete, only blocks below it can be read.
    pub tokens: u64,
    /// Whether nothing follows.
    pub complete: bool,
}

impl<'a> Offered<'a> {
    /// The blocks that all of an offer's ranks have granted: those of the rank that has grown least. `None`: the ranks have not grown by
    /// the same steps.
    pub fn by_all(contents: &[&'a Contents]) -> Option<Self> {
        let extents: Vec<_> = contents.iter().map(|c| Extent::of(c)).collect();
        let least = extents.iter().position(|e| extents.iter().all(|other| other.covers(e)))?;
        let least = contents[least];
        Some(Self { groups: &least.groups, tokens: least.tokens, complete: least.complete })
    }

    fn is_readable(&self, block_tokens: u32, position: u32) -> bool {
        self.complete || is_below(self.tokens, block_tokens, position) || planted(Bug::ReadAboveMark)
    }
}

impl GroupPlan {
    /// Wanted blocks that are in no chunk and may still be loaded: `(position, local block)`, ascending.
    pub fn uncut(&self) -> impl Iterator<Item = (u32, BlockId)> + Clone + '_ {
        let planned = self.wants[self.cut as usize..].iter().map(|w| (w.position, w.dst));
        planned.chain(self.waiting.iter().copied())
    }

    /// The group's wanted blocks, all of them waiting.
    fn open(g: &Group, local: &LocalBlocks) -> Result<Self, PlanError> {
        let mut seen = Marks::new(g.blocks);
        let mut waiting = VecDeque::with_capacity(local.blocks.len());
        for (position, dst) in local.wants() {
            if dst.0 >= g.blocks {
                return Err(PlanError::LocalBlock { group: g.id.0, block: dst.0, blocks: g.blocks });
            }
            if !seen.insert(dst) {
                return Err(PlanError::LocalBlockTwice { group: g.id.0, block: dst.0 });
            }
            waiting.push_back((position, dst));
        }
        let (wants, not_offered) = (Vec::with_capacity(waiting.len()), Vec::new());
        Ok(Self { id: g.id, block_tokens: g.block_tokens, wants, not_offered, waiting, cut: 0, pieces: Vec::new() })
    }

    /// Takes the readable blocks out of the waiting ones.
    fn extend(
        &mut self,
        offered: &Offered<'_>,
        sources: &[Source<'_>],
        here: Source<'_>,
        g: &Group,
    ) -> Result<(), PlanError> {
        let list = offered.groups.iter().find(|o| o.group == g.id);
        let most = sources.iter().filter_map(|s| s.layout.group(g.id)).map(|s| s.blocks).min().unwrap_or(0);
        while let Some(&(position, dst)) = self.waiting.front() {
            let at = list.and_then(|o| Some((o, position.checked_sub(o.first_position)? as usize)));
            let src = match (at, list) {
                (Some((o, at)), _) if at < o.blocks.len() && offered.is_readable(g.block_tokens, position) => {
                    o.blocks[at]
                }
                // Before the list's start, or behind its end when nothing follows.
                (None, Some(_)) => None,
                _ if offered.complete => None,
                _ => break,
            };
            match src {
                None => self.not_offered.push((position, dst)),
                Some(src) if src.0 >= most => {
                    return Err(PlanError::SourceBlock { group: g.id.0, block: src.0, blocks: most });
                }
                Some(src) => self.wants.push(Want { position, src, dst }),
            }
            self.waiting.pop_front();
        }
        if self.pieces.is_empty() && !self.wants.is_empty() {
            self.pieces = all_pieces(sources, here, g)?;
        }
        Ok(())
    }

    /// Bytes of one block, from all sources.
    pub fn bytes_per_block(&self) -> u64 {
        self.pieces.iter().flatten().map(|p| p.len).sum()
    }
}

/// The pieces of a group's blocks, by source.
fn all_pieces(sources: &[Source<'_>], here: Source<'_>, g: &Group) -> Result<Vec<Vec<Piece>>, PlanError> {
    let mut covered = vec![Vec::with_capacity(sources.len()); g.regions.len()];
    let all: Result<Vec<_>, _> = sources.iter().map(|s| pieces(*s, here, g, &mut covered)).collect();
    let all = all?;
    for (r, mut covered) in g.regions.iter().zip(covered) {
        covered.sort_unstable();
        // Each byte exactly once: two ranks that hold the same half must not pass for a whole.
        let end = covered.iter().try_fold(0, |end, &(at, len)| if at == end { Ok(at + len) } else { Err(end) });
        if end != Ok(r.block_bytes) {
            return Err(PlanError::Region {
                region: r.name.to_string(),
                group: g.id.0,
                why: format!(
                    "the peer's ranks hold {} of a block's {} bytes in order; the next are missing or held twice",
                    end.unwrap_or_else(|at| at),
                    r.block_bytes
                ),
            });
        }
    }
    Ok(all)
}

/// Cuts the wants that are in no chunk yet into chunks of about `target` bytes, in the order of their first tokens. While more of
/// a group may come, a chunk has at least `min_bytes` or a sixteenth of the group: blocks that are in no chunk yet are lost if the
/// prefill dies.
fn cut(groups: &mut [GroupPlan], here: &PoolLayout, (min_bytes, target): (u64, u64), chunks: &mut Vec<Chunk>) {
    let old = chunks.len();
    for (i, g) in groups.iter_mut().enumerate() {
        let bytes = g.bytes_per_block().max(1);
        let per = (target / bytes).clamp(1, u64::from(u32::MAX)) as u32;
        let total = g.wants.len() as u32;
        let all = (g.wants.len() + g.waiting.len()) as u64 * bytes;
        let least = if g.waiting.is_empty() { 0 } else { min_bytes.min(all / 16) };
        while g.cut < total {
            let count = per.min(total - g.cut);
            if u64::from(count) * bytes < least {
                break;
            }
            chunks.push(Chunk { group: i as u16, first: g.cut, count });
            g.cut += count;
        }
    }
    if groups.len() > 1 {
        chunks[old..].sort_by_key(|c| {
            let g = &groups[usize::from(c.group)];
            let tokens = here.group(g.id).map_or(1, |g| g.block_tokens);
            u64::from(g.wants[c.first as usize].position) * u64::from(tokens)
        });
    }
}
