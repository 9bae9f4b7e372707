//! Stamped memory. Every 8 bytes of a block say which request wrote them, and for which group, layer, head and position:
//! a stale, torn or misplaced byte is recognised.

use std::sync::Arc;

use kvferry_proto::{BlockId, Group, GroupId, GroupKind, PoolLayout, Read, Region, Shard};

use crate::rng::Rng;

/// The model that all engines of a seed run, with any layouts and shards.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    pub heads: u32,
    pub groups: Vec<GroupShape>,
}

/// One group of it.
#[derive(Debug, Clone)]
pub(crate) struct GroupShape {
    pub id: u16,
    pub kind: GroupKind,
    pub tokens: u32,
    pub layers: u16,
    /// Stamps of a head.
    pub words: u32,
}

impl Shape {
    pub(crate) fn new(rng: &mut Rng) -> Self {
        let kinds = [GroupKind::Full, GroupKind::SlidingWindow, GroupKind::State];
        let n = *rng.pick(&[1, 1, 1, 2, 3]);
        let group = |i: u16, rng: &mut Rng| GroupShape {
            id: i * 2,
            kind: if i == 0 { GroupKind::Full } else { *rng.pick(&kinds) },
            tokens: *rng.pick(&[8, 16, 32]),
            layers: rng.between(2, 3) as u16,
            words: rng.between(1, 2) as u32,
        };
        Self { heads: *rng.pick(&[2, 4, 6]), groups: (0..n).map(|i| group(i, rng)).collect() }
    }

    /// A rank's memory: its part of every block, in this process's own layout.
    pub(crate) fn layout(&self, rng: &mut Rng, shard: &Shard, blocks: u32) -> Layout {
        let split = rng.chance(300);
        let mut segments: Vec<u64> = vec![0];
        let mut groups = Vec::new();
        let mut layers = Vec::new();
        for g in &self.groups {
            let extra = rng.below(4) as u32;
            let held = shard.first_layer as u16..(shard.first_layer + shard.layers) as u16;
            let mut names: Vec<u16> = (0..g.layers).filter(|l| held.contains(l)).collect();
            rng.shuffle(&mut names);
            let mut regions = Vec::new();
            for &l in &names {
                let block_bytes = u64::from(shard.heads * g.words) * 8;
                let stride = block_bytes + 8 * *rng.pick(&[0, 0, 0, 1, 3]);
                if split {
                    segments.push(0);
                }
                let at = segments.len() - 1;
                let offset = segments[at] + 8 * rng.below(4);
                segments[at] = offset + stride * u64::from(blocks + extra);
                let name = format!("g{}.l{l}", g.id).into();
                regions.push(Region { name, segment: at as u16, offset, block_bytes, stride });
            }
            if regions.is_empty() {
                continue;
            }
            layers.push(names);
            groups.push(Group {
                id: GroupId(g.id),
                kind: g.kind,
                block_tokens: g.tokens,
                blocks: blocks + extra,
                regions,
            });
        }
        let pool = PoolLayout { segments, groups };
        pool.check().expect("the simulation's own layouts fit");
        Layout { pool: Arc::new(pool), layers, shard: *shard }
    }

    pub(crate) fn group(&self, id: GroupId) -> &GroupShape {
        self.groups.iter().find(|g| g.id == id.0).expect("a group of the shape")
    }
}

/// A rank's layout, with the layer of every region.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub pool: Arc<PoolLayout>,
    layers: Vec<Vec<u16>>,
    pub shard: Shard,
}

impl Layout {
    pub(crate) fn zeroed(&self) -> Memory {
        Memory(self.pool.segments.iter().map(|s| vec![0; (*s / 8) as usize]).collect())
    }

    /// The place and the meaning of each word of a block.
    fn words(&self, shape: &Shape, group: GroupId, block: BlockId, mut f: impl FnMut(u16, usize, Piece)) {
        let Ok(at) = self.pool.groups.binary_search_by_key(&group, |g| g.id) else { return };
        let words = shape.group(group).words;
        for (r, &layer) in self.pool.groups[at].regions.iter().zip(&self.layers[at]) {
            let first = (r.block_offset(block.0) / 8) as usize;
            for head in 0..self.shard.heads {
                for word in 0..words {
                    let piece = Piece { group, layer, head: self.shard.first_head + head, word };
                    f(r.segment, first + (head * words + word) as usize, piece);
                }
            }
        }
    }
}

/// The meaning of a word of a block.
#[derive(Debug, Clone, Copy)]
struct Piece {
    group: GroupId,
    layer: u16,
    head: u32,
    word: u32,
}

/// The writer of a block: a request, or an engine that reuses it.
pub(crate) type Version = u32;

fn stamp(version: Version, p: Piece, position: u32) -> u64 {
    u64::from(version) << 32
        | u64::from(p.group.0 & 15) << 28
        | u64::from(p.layer & 15) << 24
        | u64::from(p.head & 15) << 20
        | u64::from(p.word & 15) << 16
        | u64::from(position & 0xffff)
}

/// A readable stamp.
pub(crate) fn describe(stamp: u64) -> String {
    let part = |at: u32| stamp >> at & 15;
    format!(
        "v{} group {} layer {} head {} word {} position {}",
        stamp >> 32,
        part(28),
        part(24),
        part(20),
        part(16),
        stamp & 0xffff
    )
}

/// A rank's memory, in words.
#[derive(Debug, Clone)]
pub(crate) struct Memory(pub Vec<Vec<u64>>);

impl Memory {
    /// The engine writes a block for a position. `part` of it: all, or the even or odd words only.
    pub(crate) fn write(
        &mut self,
        shape: &Shape,
        layout: &Layout,
        (group, block): (GroupId, BlockId),
        position: u32,
        version: Version,
        part: Part,
    ) {
        layout.words(shape, group, block, |segment, at, piece| {
            let mine = match part {
                Part::All => true,
                Part::Even => at % 2 == 0,
                Part::Odd => at % 2 == 1,
            };
            if mine {
                self.0[usize::from(segment)][at] = stamp(version, piece, position);
            }
        });
    }

    /// The first word of a block that the version did not write: `(found, wanted)`.
    pub(crate) fn differs(
        &self,
        shape: &Shape,
        layout: &Layout,
        (group, block): (GroupId, BlockId),
        position: u32,
        version: Version,
    ) -> Option<(u64, u64)> {
        let mut bad = None;
        layout.words(shape, group, block, |segment, at, piece| {
            let (found, wanted) = (self.0[usize::from(segment)][at], stamp(version, piece, position));
            if found != wanted {
                bad.get_or_insert((found, wanted));
            }
        });
        bad
    }

    /// Every word of a block.
    pub(crate) fn each(
        shape: &Shape,
        layout: &Layout,
        group: GroupId,
        block: BlockId,
        mut f: impl FnMut(usize, usize),
    ) {
        layout.words(shape, group, block, |segment, at, _| f(usize::from(segment), at));
    }
}

/// A selection of a block's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    All,
    Even,
    Odd,
}

/// A producer's process as lanes see it.
pub(crate) struct ProcMem {
    pub addr: usize,
    pub alive: bool,
    pub stopped: bool,
    /// When it died; 0 before.
    pub died: u64,
    pub memory: Memory,
    /// Fence words by slot.
    pub words: Vec<u64>,
}

impl ProcMem {
    pub(crate) fn word(&self, slot: u32) -> u64 {
        self.words.get(slot as usize).copied().unwrap_or(0)
    }

    pub(crate) fn set_word(&mut self, slot: u32, word: u64) {
        let at = slot as usize;
        if self.words.len() <= at {
            self.words.resize(at + 1, 0);
        }
        self.words[at] = word;
    }
}

/// The checks' record of a local word.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Note {
    /// Index into [`LocalMem::holders`].
    pub block: u32,
    /// The last attempt that asked for it.
    pub attempt: u64,
    /// The pull whose fence said that it is good, and when.
    pub good: (u64, u64),
}

/// A consumer's process as lanes see it.
pub(crate) struct LocalMem {
    pub alive: bool,
    pub memory: Memory,
    pub notes: Vec<Vec<Note>>,
    /// Which pull holds each block; 0: none.
    pub holders: Vec<u64>,
    /// The ring in host memory, where local memory is GPU memory: words, and the lane and operation that last had the word's place.
    pub ring: Vec<(u64, (usize, usize))>,
    /// The device is unusable: every copy fails.
    pub dead_device: bool,
    firsts: Vec<(GroupId, u32)>,
}

impl LocalMem {
    pub(crate) fn new(shape: &Shape, layout: &Layout) -> Self {
        let memory = layout.zeroed();
        let mut notes: Vec<Vec<Note>> =
            memory.0.iter().map(|s| vec![Note { block: u32::MAX, ..Note::default() }; s.len()]).collect();
        let mut firsts = Vec::new();
        let mut n = 0;
        for g in &layout.pool.groups {
            firsts.push((g.id, n));
            for b in 0..g.blocks {
                Memory::each(shape, layout, g.id, BlockId(b), |s, at| notes[s][at].block = n + b);
            }
            n += g.blocks;
        }
        Self { alive: true, memory, notes, holders: vec![0; n as usize], ring: Vec::new(), dead_device: false, firsts }
    }

    /// Writes a word for a pull's attempt. `Err`: the attempt must not write there.
    pub(crate) fn store(&mut self, segment: usize, at: usize, word: u64, of: (u64, u64)) -> Result<(), String> {
        let (pull, attempt) = of;
        let note = self.notes[segment][at];
        let holder = self.holders.get(note.block as usize).copied().unwrap_or(0);
        self.memory.0[segment][at] = word;
        if note.attempt > attempt {
            return Err(format!("block {}, which Attempt({}) reads since", note.block, note.attempt));
        }
        if holder != pull {
            return Err(format!("block {} of pull {pull}, which has ended (held by {holder} now)", note.block));
        }
        Ok(())
    }

    /// A read's words were fenced for a pull.
    pub(crate) fn good(&mut self, r: &Read, pull: u64, now: u64) {
        let (first, n) = ((r.dst_offset / 8) as usize, (r.len / 8) as usize);
        for note in &mut self.notes[usize::from(r.dst_segment)][first..first + n] {
            if note.good.0 != pull {
                note.good = (pull, now);
            }
        }
    }

    /// Index of a block into `holders`.
    pub(crate) fn index(&self, group: GroupId, block: BlockId) -> usize {
        let first = self.firsts.iter().find(|(g, _)| *g == group).map_or(0, |(_, n)| *n);
        (first + block.0) as usize
    }
}
