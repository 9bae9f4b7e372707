//! The pinned ring in host memory, cut into slots that the staged lanes of one consumer share.
//!
//! Owns the list of free slots, and no memory. A slot is in use by one lane at most. A slot that may still be written is
//! never handed out again: it is lost.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Every slot is a multiple of this, in bytes: the size of a page on every platform, and below it a copy job costs more
/// than its bytes.
const UNIT: u64 = 64 << 10;
/// A ring has at least this many slots, unless slots of [`UNIT`] bytes would be too small.
const SLOTS: u64 = 64;

/// The slots of a ring.
#[derive(Debug)]
pub struct Ring {
    slot_bytes: u64,
    slots: usize,
    free: Mutex<Free>,
}

#[derive(Debug)]
struct Free {
    /// The slot that was freed last is handed out first: it is still in the CPU's caches.
    slots: Vec<u32>,
    lost: usize,
}

impl Ring {
    /// A ring of `bytes` bytes. A ring of less than 64 KiB has no slots: lanes on it fail every attempt.
    pub fn new(bytes: u64) -> Self {
        let slot_bytes = (bytes / SLOTS / UNIT * UNIT).max(UNIT);
        // Below 2 * SLOTS, because of the rounding.
        Self::with_slots((bytes / slot_bytes) as u32, slot_bytes)
    }

    /// A ring of `slots` slots of `slot_bytes` bytes each, a multiple of 16. For simulations: a slot of less than 64 KiB costs
    /// more in copy jobs than it saves in memory.
    pub fn with_slots(slots: u32, slot_bytes: u64) -> Self {
        let free = Mutex::new(Free { slots: (0..slots).rev().collect(), lost: 0 });
        Self { slot_bytes, slots: slots as usize, free }
    }

    /// Bytes of a slot: no read through this ring can be longer.
    pub fn slot_bytes(&self) -> u64 {
        self.slot_bytes
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Slots that no lane holds.
    pub fn free(&self) -> usize {
        self.lock().slots.len()
    }

    /// Slots that are never used again: a lane or a copy job may write or read them indefinitely.
    pub fn lost(&self) -> usize {
        self.lock().lost
    }

    /// A free slot for a lane that holds `held` slots. `None`: not now.
    ///
    /// A lane may take a second slot, or a later one, only while it holds fewer than are free. A fixed share would leave most of
    /// the ring unused while one lane is busy. A quarter of the slots is set aside for lanes that hold none: a threshold
    /// alone would give 7 stalled lanes all 64 slots (32, 16, 8, 4, 2, 1, 1), and the next peer's lane none (promise
    /// *isolated*). So up to a quarter of the slots' number, stalled lanes cannot starve another one.
    pub(super) fn take(&self, held: usize) -> Option<u32> {
        let mut free = self.lock();
        if held > 0 && held + self.slots / 4 >= free.slots.len() {
            return None;
        }
        free.slots.pop()
    }

    /// Frees slots.
    pub(super) fn give_back(&self, slots: &mut Vec<u32>) {
        if !slots.is_empty() {
            self.lock().slots.append(slots);
        }
    }

    /// Counts slots that are not given back.
    pub(super) fn lose(&self, slots: usize) {
        if slots > 0 {
            self.lock().lost += slots;
        }
    }

    /// Whether every slot is lost.
    pub(super) fn is_unusable(&self) -> bool {
        self.lock().lost == self.slots
    }

    fn lock(&self) -> MutexGuard<'_, Free> {
        // Each change is one step: a panic elsewhere leaves the list whole.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
