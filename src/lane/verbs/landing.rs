//! Where fence words land: a slot of its own for each fence in flight, zeroed before it is posted.
//!
//! A slot is used again only after its READ has completed, or after nothing can write it any more: a late word must never be
//! taken for another fence's.

use std::{
    io,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use crate::memory::Mapping;

/// Fences of a lane that may be in flight.
pub(crate) const SLOTS: u16 = 64;
/// Bytes from one slot to the next: a cache line, so that devices and cores do not get in each other's way.
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

    /// Makes a slot ready: zero, which no live offer's word is.
    pub(crate) fn clear(&self, slot: u16) {
        self.word(slot).store(0, Ordering::SeqCst);
    }

    /// What landed. After its READ's completion was polled.
    pub(crate) fn load(&self, slot: u16) -> u64 {
        self.word(slot).load(Ordering::Acquire)
    }
}
