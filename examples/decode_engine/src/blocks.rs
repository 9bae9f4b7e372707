//! The engine's blocks: their references, the free ones, and the prefix cache.
//!
//! A block without references is free. It keeps its content and its place in the prefix cache until it is allocated. The
//! key of a block is a chain of hashes, which covers all tokens before it.

use std::collections::{BTreeSet, HashMap};

use kvferry::BlockId;
use sha2::{Digest as _, Sha256};

/// The hash of a full block's tokens and of all tokens before it. It is collision-resistant, so that a prompt never finds
/// another prompt's KV.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Key([u8; 32]);

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl Key {
    /// The key of a block of these tokens after the block with key `self`. The first block comes after the default key.
    pub fn then(self, tokens: &[u32]) -> Self {
        let mut h = Sha256::new();
        h.update(self.0);
        tokens.iter().for_each(|t| h.update(t.to_le_bytes()));
        Self(h.finalize().into())
    }
}

#[derive(Debug, Clone, Default)]
struct Slab {
    refs: u32,
    key: Option<Key>,
    /// The time of its last release.
    since: u64,
}

/// All blocks of an engine.
#[derive(Debug)]
pub struct Blocks {
    slabs: Vec<Slab>,
    /// Free blocks in the order of their allocation: first uncached ones, then the longest unused.
    free: BTreeSet<(bool, u64, u32)>,
    cache: HashMap<Key, BlockId>,
    clock: u64,
}

impl Blocks {
    /// This many free blocks.
    pub fn new(blocks: u32) -> Self {
        let free = (0..blocks).map(|b| (false, 0, b)).collect();
        Self { slabs: vec![Slab::default(); blocks as usize], free, cache: HashMap::new(), clock: 0 }
    }

    /// The number of blocks.
    pub fn len(&self) -> usize {
        self.slabs.len()
    }

    /// Whether there are no blocks.
    pub fn is_empty(&self) -> bool {
        self.slabs.is_empty()
    }

    /// The number of free blocks.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// The number of blocks in the prefix cache.
    pub fn cached(&self) -> usize {
        self.cache.len()
    }

    fn place(&self, b: BlockId) -> (bool, u64, u32) {
        let s = &self.slabs[b.0 as usize];
        (s.key.is_some(), s.since, b.0)
    }

    /// Allocates a free block with one reference. Its content leaves the cache.
    pub fn alloc(&mut self) -> Option<BlockId> {
        let b = BlockId(self.free.pop_first()?.2);
        let s = &mut self.slabs[b.0 as usize];
        s.refs = 1;
        if let Some(key) = s.key.take() {
            self.cache.remove(&key);
        }
        Some(b)
    }

    /// Allocates `n` blocks, or none.
    pub fn alloc_all(&mut self, n: usize) -> Option<Vec<BlockId>> {
        if self.free() < n {
            return None;
        }
        (0..n).map(|_| self.alloc()).collect()
    }

    /// Adds a reference.
    pub fn retain(&mut self, b: BlockId) {
        if self.slabs[b.0 as usize].refs == 0 {
            self.free.remove(&self.place(b));
        }
        self.slabs[b.0 as usize].refs += 1;
    }

    /// Removes a reference. To keep prefixes longest, release the last block of a sequence first.
    pub fn release(&mut self, b: BlockId) {
        self.clock += 1;
        let s = &mut self.slabs[b.0 as usize];
        debug_assert!(s.refs > 0, "block {} is released too often", b.0);
        s.refs = s.refs.saturating_sub(1);
        if s.refs == 0 {
            s.since = self.clock;
            self.free.insert(self.place(b));
        }
    }

    /// The block with this content.
    pub fn find(&self, key: &Key) -> Option<BlockId> {
        self.cache.get(key).copied()
    }

    /// Adds this block to the prefix cache, unless the cache has a block with this content.
    pub fn cache(&mut self, b: BlockId, key: Key) {
        let s = &mut self.slabs[b.0 as usize];
        if s.key.is_none() && !self.cache.contains_key(&key) {
            debug_assert!(s.refs > 0, "a free block cannot be filled");
            s.key = Some(key);
            self.cache.insert(key, b);
        }
    }

    /// Removes this block from the prefix cache. Ignores unknown blocks.
    pub fn uncache(&mut self, b: BlockId) {
        let Some(key) = self.slabs.get(b.0 as usize).and_then(|s| s.key) else { return };
        let free = self.free.remove(&self.place(b));
        self.slabs[b.0 as usize].key = None;
        self.cache.remove(&key);
        if free {
            self.free.insert(self.place(b));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_covers_all_tokens_before_it() {
        let [a, b] = [1, 2].map(|t| Key::default().then(&[t; 16]));
        assert_ne!(a.then(&[3; 16]), b.then(&[3; 16]));
        assert_eq!(a.then(&[3; 16]), Key::default().then(&[1; 16]).then(&[3; 16]));
    }

    #[test]
    fn a_free_block_is_found_until_it_is_allocated() {
        let mut blocks = Blocks::new(3);
        let key = Key::default().then(&[1; 16]);
        let a = blocks.alloc().unwrap();
        blocks.cache(a, key);
        blocks.release(a);
        assert_eq!((blocks.free(), blocks.find(&key)), (3, Some(a)));
        blocks.retain(a);
        assert_eq!(blocks.free(), 2);
        blocks.release(a);
        // The two uncached blocks are allocated first.
        let others = blocks.alloc_all(2).unwrap();
        assert!(!others.contains(&a) && blocks.find(&key) == Some(a));
        assert_eq!(blocks.alloc_all(2), None);
        assert_eq!((blocks.alloc(), blocks.find(&key)), (Some(a), None));
    }

    #[test]
    fn an_uncached_block_is_not_found_and_not_lost() {
        let mut blocks = Blocks::new(2);
        let key = Key::default().then(&[1; 16]);
        let a = blocks.alloc().unwrap();
        blocks.cache(a, key);
        blocks.uncache(a);
        blocks.uncache(BlockId(77));
        assert_eq!(blocks.find(&key), None);
        blocks.cache(a, key);
        blocks.release(a);
        blocks.uncache(a);
        assert_eq!((blocks.free(), blocks.cached()), (2, 0));
        assert!(blocks.alloc_all(2).is_some());
    }

    #[test]
    fn prefixes_are_kept_longest() {
        let mut blocks = Blocks::new(3);
        let table = blocks.alloc_all(3).unwrap();
        let mut key = Key::default();
        for b in &table {
            key = key.then(&[b.0; 16]);
            blocks.cache(*b, key);
        }
        table.iter().rev().for_each(|b| blocks.release(*b));
        assert_eq!(blocks.alloc(), Some(table[2]));
        assert_eq!(blocks.alloc(), Some(table[1]));
    }
}
