//! The fence words of a rank: one 64-bit word for each live offer, in memory that lanes can read.
//!
//! Owns the words' memory. A word holds its offer's nonce while the offer is live and zero otherwise (promise *fresh*; see
//! [`kvferry_proto::fence`]).

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicU64, Ordering, fence},
};

use kvferry_proto::Nonce;

use super::mapping::{self, Mapping};

/// A table of fence words, in a sealed memfd.
#[derive(Debug)]
pub(crate) struct FenceWords {
    fd: OwnedFd,
    mapping: Mapping,
    slots: u32,
}

impl FenceWords {
    /// A table of `slots` words, all zero: no offer is live.
    pub(crate) fn new(slots: u32) -> io::Result<Self> {
        let (fd, mapping) = mapping::sealed("kvferry-words", u64::from(slots) * 8)?;
        Ok(Self { fd, mapping, slots })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping holds `slots` words of 8 bytes, page-aligned and zeroed at first, for as long as `self` lives.
        // Without slots the mapping's base is dangling and aligned to a byte only, so an aligned dangling pointer replaces it
        // for the empty slice. The words are accessed only as atomics; other processes map them read-only.
        unsafe {
            let base = self.mapping.base().cast::<AtomicU64>();
            let base = if self.slots == 0 { std::ptr::NonNull::dangling() } else { base };
            std::slice::from_raw_parts(base.as_ptr(), self.slots as usize)
        }
    }

    /// The offer in this slot is live from now on. A slot past the table's end is never live.
    pub(crate) fn set(&self, slot: u32, nonce: Nonce) {
        if let Some(w) = self.words().get(slot as usize) {
            // Release: a reader that sees the nonce also sees every earlier write to the blocks.
            w.store(nonce.get(), Ordering::Release);
        }
    }

    /// The offer in this slot is no longer live. When this returns, the blocks may be written again.
    pub(crate) fn clear(&self, slot: u32) {
        if let Some(w) = self.words().get(slot as usize) {
            w.store(0, Ordering::SeqCst);
        }
        // A full fence: the zero must be visible before any later write of the engine to the blocks. Without the fence those
        // stores could pass this one, and a reader could copy new bytes and still find the old nonce afterwards.
        fence(Ordering::SeqCst);
    }

    /// The word in this slot; 0 past the end.
    pub(crate) fn load(&self, slot: u32) -> u64 {
        self.words().get(slot as usize).map_or(0, |w| w.load(Ordering::Acquire))
    }

    /// Address of word 0 in this process.
    pub(crate) fn address(&self) -> u64 {
        self.mapping.base().addr().get() as u64
    }

    /// The file that holds the words.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Number of words.
    pub(crate) fn len(&self) -> u32 {
        self.slots
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_the_nonce_until_it_is_cleared() {
        let words = FenceWords::new(1000).unwrap();
        let nonce = Nonce::random();
        words.set(999, nonce);
        assert_eq!(words.load(999), nonce.get());
        assert_eq!(words.load(998), 0);
        words.clear(999);
        assert_eq!(words.load(999), 0);
    }

    #[test]
    fn a_slot_past_the_end_is_never_live() {
        for slots in [0, 5] {
            let words = FenceWords::new(slots).unwrap();
            words.set(slots, Nonce::random());
            assert_eq!(words.load(slots), 0);
            words.clear(u32::MAX);
        }
    }
}
