//! Blocks with recorded content: each slot has the stamp of the prefix that its token ends, or none if it is invalid.

use std::collections::{HashMap, VecDeque};

use kvferry::BlockId;

/// A text, and the position of a token in it. Requests with a common prefix have the same stamps in it.
pub(crate) type Stamp = (u32, u64);

#[derive(Debug, Clone, Default)]
pub(crate) struct Slab {
    pub refs: u32,
    /// Its key in the prefix cache.
    pub key: Option<Stamp>,
    /// Its real content.
    pub slots: Vec<Option<Stamp>>,
    /// Its load failed, and it was not written since.
    pub failed: bool,
}

#[derive(Debug)]
pub(crate) struct Pool {
    pub blocks: Vec<Slab>,
    free: VecDeque<BlockId>,
    cache: HashMap<Stamp, Vec<BlockId>>,
}

impl Pool {
    pub(crate) fn new(blocks: u32, tokens: u64) -> Self {
        let slab = Slab { slots: vec![None; tokens as usize], ..Slab::default() };
        Self { blocks: vec![slab; blocks as usize], free: (0..blocks).map(BlockId).collect(), cache: HashMap::new() }
    }

    pub(crate) fn slab(&mut self, b: BlockId) -> &mut Slab {
        &mut self.blocks[b.0 as usize]
    }

    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn alloc(&mut self) -> Option<BlockId> {
        let b = self.free.pop_front()?;
        self.uncache(b);
        let s = self.slab(b);
        s.refs = 1;
        s.failed = false;
        s.slots.fill(None);
        Some(b)
    }

    pub(crate) fn retain(&mut self, b: BlockId) {
        let s = self.slab(b);
        s.refs += 1;
        if s.refs == 1 {
            self.free.retain(|f| *f != b);
        }
    }

    pub(crate) fn release(&mut self, b: BlockId) {
        let s = self.slab(b);
        s.refs -= 1;
        if s.refs == 0 {
            self.free.push_back(b);
        }
    }

    /// A cached block with this content; `pick` selects one of several.
    pub(crate) fn find(&self, key: Stamp, pick: usize) -> Option<BlockId> {
        let all = self.cache.get(&key)?;
        Some(all[pick % all.len()])
    }

    pub(crate) fn cache(&mut self, b: BlockId, key: Stamp) {
        let s = self.slab(b);
        if s.key.is_none() {
            s.key = Some(key);
            self.cache.entry(key).or_default().push(b);
        }
    }

    pub(crate) fn uncache(&mut self, b: BlockId) {
        if let Some(key) = self.slab(b).key.take() {
            let all = self.cache.get_mut(&key).unwrap();
            all.retain(|c| *c != b);
            if all.is_empty() {
                self.cache.remove(&key);
            }
        }
    }
}
