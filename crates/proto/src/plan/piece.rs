//! The pieces of a group: how the blocks of one rank's memory map to another's.

use std::collections::HashMap;

use super::{PlanError, Read, Source, Want};
use crate::{Group, GroupId};

/// The part of each block of a local region that comes from one source region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    region: u16,
    src_segment: u16,
    dst_segment: u16,
    src_base: u64,
    src_stride: u64,
    dst_base: u64,
    dst_stride: u64,
    within: u64,
    pub(super) len: u64,
}

impl Piece {
    /// Appends the reads of a chunk's wants. Neighbours on both sides become one read, up to `max_read` bytes; a piece that
    /// is longer than `max_read` becomes several.
    pub(super) fn reads(&self, chunk: u32, group: GroupId, wants: &[Want], max_read: u64, out: &mut Vec<Read>) {
        if self.len > max_read {
            for w in wants {
                let mut done = 0;
                while done < self.len {
                    let len = (self.len - done).min(max_read);
                    out.push(self.read(chunk, group, w, done, len, 1));
                    done += len;
                }
            }
            return;
        }
        // Consecutive blocks are contiguous only if the strides leave no gap on either side.
        let dense = self.len == self.src_stride && self.len == self.dst_stride;
        let most = if dense { (max_read / self.len).min(u64::from(u32::MAX)) as usize } else { 1 };
        let mut rest = wants;
        while let [first, ..] = rest {
            let mut n = 1;
            while n < most && rest.get(n).is_some_and(|w| w.follows(&rest[n - 1])) {
                n += 1;
            }
            out.push(self.read(chunk, group, first, 0, self.len, n as u32));
            rest = &rest[n..];
        }
    }

    /// A read of `len` bytes of each block, from `skip` bytes into the piece on.
    fn read(&self, chunk: u32, group: GroupId, first: &Want, skip: u64, len: u64, blocks: u32) -> Read {
        Read {
            src_offset: self.src_base + u64::from(first.src.0) * self.src_stride + skip,
            dst_offset: self.dst_base + u64::from(first.dst.0) * self.dst_stride + skip,
            len: u64::from(blocks) * len,
            piece: len,
            within: self.within + skip,
            chunk,
            position: first.position,
            blocks,
            group,
            region: self.region,
            src_segment: self.src_segment,
            dst_segment: self.dst_segment,
        }
    }
}

/// The pieces of a group that one source holds. Adds their places in each local region's block, `(offset, length)`, to
/// `covered`.
pub(super) fn pieces(
    src: Source<'_>,
    here: Source<'_>,
    g: &Group,
    covered: &mut [Vec<(u64, u64)>],
) -> Result<Vec<Piece>, PlanError> {
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
    let by_name: HashMap<&str, usize> = theirs.regions.iter().enumerate().map(|(i, r)| (&*r.name, i)).collect();
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
        covered[i].push((dst_within, len));
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
