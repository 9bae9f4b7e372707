//! Shared by the data servers of a producer rank: its pool, its fence words, and its live offers.
//!
//! Owns the map of live offers. Never decides which offers are live: the producer publishes and withdraws them.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
};

use kvferry_proto::{Contents, Nonce, PoolLayout};
use parking_lot::RwLock;

use super::{gpu::PinnedRing, segments::Memory, words::FenceWords};

/// A producer rank's pool and live offers.
#[derive(Debug)]
pub(crate) struct Export {
    /// The pool; checked against the memory.
    pub layout: Arc<PoolLayout>,
    /// Its memory.
    pub memory: Memory,
    /// The fence words.
    pub words: Arc<FenceWords>,
    /// What is sent by sockets passes through it; `None`: the memory is host memory.
    pub ring: Option<PinnedRing>,
    live: RwLock<HashMap<u32, Live>>,
}

#[derive(Debug)]
struct Live {
    nonce: Nonce,
    contents: Arc<Contents>,
}

impl Export {
    /// An export without live offers.
    pub(crate) fn new(layout: Arc<PoolLayout>, memory: Memory, words: Arc<FenceWords>) -> Self {
        Self { layout, memory, words, ring: None, live: RwLock::default() }
    }

    /// Adds the ring of a pool in GPU memory.
    pub(crate) fn with_ring(self, ring: Option<PinnedRing>) -> Self {
        Self { ring, ..self }
    }

    /// The offer in `slot` may be read from now on. Its word is set last, once its blocks are known here.
    pub(crate) fn publish(&self, slot: u32, nonce: Nonce, contents: Arc<Contents>) {
        self.live.write().insert(slot, Live { nonce, contents });
        self.words.set(slot, nonce);
    }

    /// The offer in `slot` may no longer be read. The word is cleared first; when this returns, the blocks may be written.
    pub(crate) fn withdraw(&self, slot: u32) {
        self.words.clear(slot);
        self.live.write().remove(&slot);
    }

    /// The blocks of the offer in `slot`, if it is live and its nonce is this one.
    pub(crate) fn resolve(&self, slot: u32, nonce: u64) -> Option<Arc<Contents>> {
        let live = self.live.read();
        live.get(&slot).filter(|l| l.nonce.get() == nonce).map(|l| l.contents.clone())
    }

    /// The check after the copy: the nonce if the offer in `slot` is still live under it, else 0. If it is, every earlier
    /// read of the pool happened while the offer was live. Never returns another offer's nonce.
    pub(crate) fn still(&self, slot: u32, nonce: u64) -> u64 {
        // The copy's loads must not move after the word's load: they could read bytes that are newer than the word.
        fence(Ordering::SeqCst);
        let word = self.words.load(slot);
        if word == nonce { word } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvferry_proto::{BlockId, GroupId, OfferGroup};

    #[test]
    fn only_the_live_offer_with_its_own_nonce_resolves() {
        let layout = Arc::new(PoolLayout::uniform(4, 1, 4096, 16));
        let memory = Memory::alloc(&layout.segments).unwrap();
        let e = Export::new(layout, memory, Arc::new(FenceWords::new(4).unwrap()));
        let groups = vec![OfferGroup { group: GroupId(0), first_position: 0, blocks: vec![Some(BlockId(3))] }];
        let groups = Arc::new(Contents { groups, ..Contents::default() });
        let (a, b) = (Nonce::random(), Nonce::random());
        e.publish(2, a, groups.clone());
        assert_eq!(e.resolve(2, a.get()), Some(groups.clone()));
        assert_eq!(e.still(2, a.get()), a.get());
        assert!(e.resolve(2, b.get()).is_none() && e.resolve(1, a.get()).is_none());
        assert_eq!(e.still(2, b.get()), 0, "a caller with a wrong nonce does not learn the live one");
        e.withdraw(2);
        assert!(e.resolve(2, a.get()).is_none() && e.resolve(2, 0).is_none());
        assert_eq!(e.still(2, a.get()), 0);
        e.publish(2, b, groups);
        assert!(e.resolve(2, a.get()).is_none(), "a reused slot does not serve its former offer");
        assert_eq!(e.still(2, a.get()), 0);
    }

    #[test]
    fn a_thread_that_panicked_leaves_the_live_offers_usable() {
        let layout = Arc::new(PoolLayout::uniform(4, 1, 4096, 16));
        let memory = Memory::alloc(&layout.segments).unwrap();
        let e = Arc::new(Export::new(layout, memory, Arc::new(FenceWords::new(4).unwrap())));
        let e2 = e.clone();
        let _ = std::thread::spawn(move || {
            let _held = e2.live.write();
            panic!("on purpose");
        })
        .join();
        let n = Nonce::random();
        e.publish(0, n, Arc::default());
        assert!(e.resolve(0, n.get()).is_some());
        e.withdraw(0);
        assert!(e.resolve(0, n.get()).is_none());
    }
}
