//! The destinations of fence words: one slot for each fence in flight, zeroed before the READ is posted.
//!
//! A slot is re-used only after its READ has completed, or when its rail is quiet: a late word must never be taken for the
//! word of another fence.

use std::{
    io,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use crate::memory::Mapping;

/// Most fence words in flight on a lane.
pub(crate) const SLOTS: u16 = 64;
/// Bytes from one slot to the next: a cache line, so that a device and a core never write to the same line.
const STRIDE: usize = 64;

/// The slots.
#[derive(Debug)]
pub(crate) struct Landing(Mapping);

impl Landing {
    pub(crate) const BYTES: u64 = SLOTS as u64 * STRIDE as u64;

    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(Mapping::anonymous(Self::BYTES)?))
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.0.base()
    }

    fn word(&self, slot: u16) -> &AtomicU64 {
        let at = usize::from(slot % SLOTS) * STRIDE;
        // SAFETY: the mapping is page-aligned, zeroed at first, and holds SLOTS slots of STRIDE bytes while `self` lives.
        // The device writes eight aligned bytes at once, which an atomic may race with.
        unsafe { self.0.base().byte_add(at).cast::<AtomicU64>().as_ref() }
    }

    /// Address of a slot.
    pub(crate) fn address(&self, slot: u16) -> u64 {
        std::ptr::from_ref(self.word(slot)).addr() as u64
    }

    /// Zeroes a slot. No live offer has the word zero.
    pub(crate) fn clear(&self, slot: u16) {
        self.word(slot).store(0, Ordering::SeqCst);
    }

    /// The word in a slot. Valid after its READ's completion was polled.
    pub(crate) fn load(&self, slot: u16) -> u64 {
        self.word(slot).load(Ordering::Acquire)
    }
}
