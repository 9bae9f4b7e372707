//! The producer's way out of GPU memory: slices of replies, gathered into a pinned ring before they are sent.
//!
//! Owns the ring's slots and the copies into them, for all connections of a server. A slot whose copy has not ended is not
//! used again, also when its connection is gone: a copy cannot be cancelled. Never touches a socket.

use std::{collections::VecDeque, os::fd::BorrowedFd};

use super::connection::Halt;
use crate::memory::{
    Memory, Span,
    gpu::{Direction, GpuError, PinnedRing, RingQueue},
};

/// Most slices of one connection: enough to send one while the next ones are gathered.
const MOST_SLICES: usize = 4;

/// The ring, shared by the connections of a server.
pub(super) struct Ahead {
    ring: Memory,
    slot_bytes: u64,
    slots: usize,
    free: Vec<u32>,
    queue: RingQueue,
    /// The last copy that has ended.
    finished: u64,
    failed: bool,
    /// Copies whose slices were given back, ascending.
    given_back: VecDeque<(u64, u32)>,
    /// Connections that a slot was refused to, longest first.
    starved: VecDeque<u64>,
    /// Connections whose next slice is not gathered yet.
    waiting: Vec<u64>,
}

/// A part of a reply in the ring.
pub(super) struct Slice {
    ticket: u64,
    slot: u32,
    len: u64,
    sent: u64,
}

/// The slices of one connection, in the order in which they are sent.
#[derive(Default)]
pub(super) struct Slices {
    queue: VecDeque<Slice>,
    /// The place in the reply's spans that is gathered next.
    at: usize,
    skip: u64,
    /// Bytes of the reply that no slice has.
    left: u64,
}

impl Ahead {
    /// The ring of a pool in GPU memory.
    pub(super) fn new(ring: &PinnedRing) -> std::io::Result<Self> {
        let (slot_bytes, slots) = (ring.slots().slot_bytes(), ring.slots().slots());
        Ok(Self {
            ring: ring.memory().clone(),
            slot_bytes,
            slots,
            free: (0..slots as u32).rev().collect(),
            queue: ring.queue(Direction::ToHost)?,
            finished: 0,
            failed: false,
            given_back: VecDeque::new(),
            starved: VecDeque::new(),
            waiting: Vec::new(),
        })
    }

    /// Readable when a copy has ended.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.queue.queue.fd()
    }

    /// The server is about to sleep. `false`: a copy has ended, so it must not.
    pub(super) fn about_to_sleep(&self) -> bool {
        self.queue.queue.outstanding() == 0 || self.queue.queue.about_to_sleep()
    }

    /// Looks which copies have ended.
    pub(super) fn look(&mut self) {
        let (finished, failed) = self.queue.queue.finished();
        if failed && !self.failed {
            tracing::error!(
                "copies out of GPU memory fail: the tcp lane serves nothing any more; restart this process"
            );
        }
        // Copies that failed write nothing any more, so their slots may be freed.
        self.finished = if failed { u64::MAX } else { finished };
        self.failed |= failed;
        while let Some(&(ticket, slot)) = self.given_back.front()
            && ticket <= self.finished
        {
            self.given_back.pop_front();
            self.free.push(slot);
        }
    }

    /// Appends the connections that can go on to `into`: those whose slices are gathered or failed, and as many of those
    /// that need a slot as there are slots.
    pub(super) fn ready(&mut self, into: &mut Vec<u64>) {
        into.append(&mut self.waiting);
        let n = if self.failed { self.starved.len() } else { self.starved.len().min(self.free.len()) };
        into.extend(self.starved.drain(..n));
    }

    /// Whether [`Ahead::ready`] has a connection that needs no copy to end.
    pub(super) fn has_room_for_starved(&self) -> bool {
        !self.starved.is_empty() && !self.free.is_empty()
    }

    /// A slice is not needed any more.
    fn give_back(&mut self, slice: Slice) {
        if slice.ticket <= self.finished {
            self.free.push(slice.slot);
        } else {
            let at = self.given_back.partition_point(|(ticket, _)| *ticket < slice.ticket);
            self.given_back.insert(at, (slice.ticket, slice.slot));
        }
    }

    /// Gathers up to a slot of the spans.
    fn gather(&mut self, spans: &[Span], slices: &mut Slices) -> Result<bool, Halt> {
        let Some(slot) = self.free.pop() else { return Ok(false) };
        let (mut pieces, mut len, base) = (Vec::new(), 0, u64::from(slot) * self.slot_bytes);
        let (mut at, mut skip) = (slices.at, slices.skip);
        while len < self.slot_bytes.min(slices.left)
            && let Some(s) = spans.get(at)
        {
            let n = (s.len - skip).min(self.slot_bytes - len);
            if n > 0 {
                let piece = self.queue.piece(base + len, (s.segment, s.offset + skip), n);
                // The spans were checked against the layout, and the layout against the pool.
                pieces.push(piece.map_err(|_| Halt::Over)?);
            }
            len += n;
            skip += n;
            if skip == s.len {
                (at, skip) = (at + 1, 0);
            }
        }
        let Some(ticket) = self.queue.submit(pieces) else {
            self.free.push(slot);
            return Ok(false);
        };
        slices.queue.push_back(Slice { ticket, slot, len, sent: 0 });
        (slices.at, slices.skip) = (at, skip);
        slices.left -= len;
        Ok(true)
    }

    /// The ring, and the span of it that is sent next; gathers ahead as far as there is room. Stops the connection `token` if
    /// its next slice is not there yet. `last` is called when the reply's last byte has been copied out of the pool.
    pub(super) fn next(
        &mut self,
        token: u64,
        spans: &[Span],
        slices: &mut Slices,
        last: impl FnOnce(),
    ) -> Result<(&Memory, Span), Halt> {
        if self.failed {
            return Err(Halt::Over);
        }
        while slices.left > 0 && slices.queue.len() < MOST_SLICES && self.gather(spans, slices)? {}
        let Some(front) = slices.queue.front() else {
            self.starved.push_back(token);
            return Err(Halt::Copies);
        };
        if slices.left == 0 && slices.queue.back().is_some_and(|s| s.ticket <= self.finished) {
            last();
        }
        if front.ticket > self.finished {
            self.waiting.push(token);
            return Err(Halt::Copies);
        }
        let offset = u64::from(front.slot) * self.slot_bytes + front.sent;
        Ok((&self.ring, Span { segment: 0, offset, len: front.len - front.sent }))
    }

    /// `n` bytes of the span were sent.
    pub(super) fn sent(&mut self, slices: &mut Slices, n: u64) {
        let Some(front) = slices.queue.front_mut() else { return };
        front.sent += n;
        if front.sent >= front.len
            && let Some(front) = slices.queue.pop_front()
        {
            self.give_back(front);
        }
    }

    /// A connection's socket is full. A peer that does not read must not keep the ring from the others: while less than half
    /// of it is free, the connection gives its slices back, and gathers them again later. So stalled connections hold half of
    /// the ring at most (promise 7, Isolated). Returns whether it did.
    pub(super) fn stalled(&mut self, slices: &mut Slices) -> bool {
        let gives = self.free.len() < self.slots / 2;
        if gives {
            self.drop_all(slices);
        }
        gives
    }

    /// Gives all slices of a connection back.
    pub(super) fn drop_all(&mut self, slices: &mut Slices) {
        for slice in slices.queue.drain(..) {
            self.give_back(slice);
        }
    }
}

impl Slices {
    /// Begins to gather at this place of the spans: nothing is gathered of what follows, `left` bytes.
    pub(super) fn begin(&mut self, at: usize, skip: u64, left: u64) {
        debug_assert!(self.queue.is_empty(), "slices of the last reply were sent");
        (self.at, self.skip, self.left) = (at, skip, left);
    }
}

/// Sets up gathering, if the pool is GPU memory.
pub(super) fn start(ring: Option<&PinnedRing>) -> Result<Option<Ahead>, std::io::Error> {
    ring.map(Ahead::new).transpose()
}

/// The error of a server whose pool is GPU memory without a ring.
pub(super) fn no_ring() -> std::io::Error {
    GpuError::Os { what: "the tcp lane", error: "the pool is GPU memory, and there is no pinned ring".into() }.into()
}
