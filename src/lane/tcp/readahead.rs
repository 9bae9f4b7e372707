//! Replies out of GPU memory: their data is copied ahead of the sockets into a pinned ring in host memory, and sent from there.
//!
//! [`ReadAhead`] owns a server's ring and its queue of copies; [`Slices`] is the part of the ring that one connection holds.
//! Neither waits for a copy: a driver that hangs delays replies, and nothing else of the server.
//!
//! # The fence
//! The word of a reply is loaded when its last copy has been seen to end: then all of its bytes are out of the pool, and an
//! offer that is withdrawn while they are copied makes the word stale (promise 2, Fresh). Data that is copied again gets a word
//! that is loaded again.
//!
//! # A consumer that does not receive
//! The ring is shared by all connections, so one whose socket is full must not hold it (promise 7, Isolated). It keeps its
//! slices while half of the slots are free, since the socket of an active consumer soon has room again. Otherwise it gives all of
//! them back, also one that is partly sent, and copies the rest again when its socket has room. So connections that cannot
//! send hold half of the ring at most, and the other half serves those that can.

use std::{collections::VecDeque, io, os::fd::BorrowedFd, time::Duration};

use super::slots::Slots;
use crate::memory::{
    Export, Memory, Span,
    gpu::{Direction, GpuError, Piece, RingQueue},
};

/// Bytes of a slot: long enough that the cost of a copy's submission and wake-up is small, and short enough that the first
/// bytes of a reply leave soon.
const SLOT: u64 = 1 << 20;
/// A ring of fewer bytes has this many smaller slots.
const FEWEST_SLOTS: u64 = 4;
/// How long a server that ends waits for its copies. They take milliseconds; a GPU that hangs must not keep an engine from
/// ending.
pub(super) const LAST_COPIES: Duration = Duration::from_secs(1);
/// Most slices of a connection: one is sent while others are copied.
pub(super) const MOST_SLICES: usize = 4;
/// Most pieces of a slice: more make a copy too long. The GPU's thread cuts jobs there too.
const MOST_PIECES: usize = 4096;

/// A server's ring, and the copies into it.
pub(super) struct ReadAhead {
    ring: Memory,
    slot_bytes: u64,
    slots: Slots,
    copies: RingQueue,
    /// Copies up to this ticket have ended.
    finished: u64,
    /// A copy has failed, or the GPU is unusable.
    failed: bool,
}

impl ReadAhead {
    /// Copies into the ring of the export; `None` for host memory.
    ///
    /// # Errors
    /// The pool is GPU memory, and there is no ring for it.
    pub(super) fn new(export: &Export) -> io::Result<Option<Self>> {
        if export.memory.gpu().is_none() {
            return Ok(None);
        }
        let Some(ring) = &export.ring else {
            return Err(GpuError::Os { what: "a pool in GPU memory", error: "there is no pinned ring".into() }.into());
        };
        let bytes = ring.memory().segments().iter().sum::<u64>();
        // Whole pages, so that the copy kernel finds every slot aligned.
        let slot_bytes = SLOT.min(bytes / FEWEST_SLOTS) & !0xfff;
        let count = bytes.checked_div(slot_bytes).unwrap_or(0);
        Ok(Some(Self {
            ring: ring.memory().clone(),
            slot_bytes,
            slots: Slots::new(u32::try_from(count).unwrap_or(u32::MAX)),
            copies: ring.queue(Direction::ToHost)?,
            finished: 0,
            failed: false,
        }))
    }

    /// The memory that slices lie in.
    pub(super) fn ring(&self) -> &Memory {
        &self.ring
    }

    /// Readable when a copy has ended while the server slept.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.copies.queue.fd()
    }

    /// The server is about to sleep. `false`: a copy has ended.
    pub(super) fn about_to_sleep(&self) -> bool {
        self.slots.is_idle() || self.copies.queue.about_to_sleep()
    }

    /// Looks for copies that have ended, and adds the connections that hold them to `ready`. `woken`: the descriptor was
    /// readable. Without a copy in flight, and unless woken, it makes no system call.
    pub(super) fn look(&mut self, woken: bool, ready: &mut Vec<u64>) {
        if self.slots.is_idle() && !woken {
            return;
        }
        let (finished, failed) = self.copies.queue.finished();
        self.finished = finished;
        self.failed |= failed;
        // After a failure, no copy writes any more.
        self.slots.finished(if failed { u64::MAX } else { finished }, ready);
    }

    /// Whether the connection is the one that was admitted last, and has taken no slot yet.
    pub(super) fn is_admitted(&self, token: u64) -> bool {
        self.slots.is_admitted(token)
    }

    /// Waits until every copy has ended, so that the engine may unmap its pool. `false`: one did not in time.
    pub(super) fn wait(&mut self) -> bool {
        self.copies.queue.wait(LAST_COPIES)
    }

    /// A copy has failed, or the GPU is unusable: there will be no more copies.
    pub(super) fn has_failed(&self) -> bool {
        self.failed
    }

    /// The next connection that has waited for a slot, if there is one for it: it must get a turn.
    pub(super) fn admit(&mut self) -> Option<u64> {
        self.slots.admit()
    }

    #[cfg(test)]
    pub(super) fn slots(&mut self) -> &mut Slots {
        &mut self.slots
    }

    /// Whether a connection that cannot send must give its slices back.
    pub(super) fn is_scarce(&self) -> bool {
        self.slots.is_scarce()
    }

    /// Begins to copy the spans from `at` on into a slot: as much as fits. Moves `at` behind it. `None`: copies fail from now on.
    fn copy(&mut self, slot: u32, spans: &[Span], at: &mut Place, owner: u64) -> Option<Slice> {
        let begin = u64::from(slot) * self.slot_bytes;
        let (pieces, len) = self.pieces(begin, spans, at);
        // Fewer copies are in flight than the queue takes, so a refusal means that it has failed.
        let Some(ticket) = self.copies.submit(pieces) else {
            self.failed = true;
            self.slots.give_back(slot, 0);
            return None;
        };
        self.slots.submitted(slot, ticket, owner);
        Some(Slice { slot, ticket, rest: Span { segment: 0, offset: begin, len }, fence: None, word: None })
    }

    /// The copies of one slice, and its length. Without gaps in the slot: the copy kernel needs that.
    fn pieces(&self, begin: u64, spans: &[Span], at: &mut Place) -> (Vec<Piece>, u64) {
        let (mut pieces, mut len) = (Vec::new(), 0);
        while let Some(s) = spans.get(at.span)
            && len < self.slot_bytes
            && pieces.len() < MOST_PIECES
        {
            let n = (s.len - at.skip).min(self.slot_bytes - len);
            // Cannot fail: the spans were checked against the pool's layout, and the slot lies in the ring.
            let Ok(piece) = self.copies.piece(begin + len, (s.segment, s.offset + at.skip), n) else { break };
            pieces.push(piece);
            len += n;
            at.forward(n, spans);
        }
        (pieces, len)
    }
}

/// A place in a reply's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Place {
    /// Index of the span.
    pub(super) span: usize,
    /// Bytes of it before this place.
    pub(super) skip: u64,
}

impl Place {
    /// Moves by `n` bytes.
    pub(super) fn forward(&mut self, n: u64, spans: &[Span]) {
        self.skip += n;
        while let Some(s) = spans.get(self.span)
            && self.skip >= s.len
        {
            self.skip -= s.len;
            self.span += 1;
        }
    }
}

/// The slot and nonce of a reply's offer.
pub(super) type Fence = (u32, u64);

/// Consecutive bytes of a reply, in a slot of the ring.
struct Slice {
    slot: u32,
    ticket: u64,
    /// The bytes that are not sent yet.
    rest: Span,
    /// With the last slice of a reply.
    fence: Option<Fence>,
    /// The reply's word, once the copy has ended.
    word: Option<u64>,
}

/// The slices of one connection, in the order in which they are sent.
#[derive(Default)]
pub(super) struct Slices {
    queue: VecDeque<Slice>,
    /// The reply to copy from next, counted from the one that is sent, and the place in it.
    reply: usize,
    at: Place,
    /// It holds no slice, and waits for a slot.
    waits: bool,
}

impl Slices {
    /// Whether it holds none.
    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Whether there is room for slices of a reply after the first `known` ones.
    pub(super) fn wants_reply(&self, known: usize) -> bool {
        self.queue.len() < MOST_SLICES && self.reply >= known && known < MOST_SLICES
    }

    /// Begins to copy what comes next of these replies, as far as there are slots. `false`: copies fail from now on.
    pub(super) fn fill<'a>(
        &mut self,
        ahead: &mut ReadAhead,
        token: u64,
        replies: impl Iterator<Item = (&'a [Span], Fence)>,
    ) -> bool {
        if self.waits && !ahead.slots.is_admitted(token) {
            return true;
        }
        let mut replies = replies.skip(self.reply).peekable();
        while self.queue.len() < MOST_SLICES
            && let Some(&(spans, fence)) = replies.peek()
        {
            if self.at.span >= spans.len() {
                // Of a refusal: no data.
                (self.reply, self.at) = (self.reply + 1, Place::default());
                replies.next();
                continue;
            }
            let slot = if self.queue.is_empty() { ahead.slots.first(token) } else { ahead.slots.further() };
            self.waits = self.queue.is_empty() && slot.is_none();
            let Some(slot) = slot else { break };
            let Some(mut slice) = ahead.copy(slot, spans, &mut self.at, token) else { return false };
            if self.at.span >= spans.len() {
                slice.fence = Some(fence);
                (self.reply, self.at) = (self.reply + 1, Place::default());
                replies.next();
            }
            self.queue.push_back(slice);
        }
        true
    }

    /// It no longer waits to be admitted.
    pub(super) fn stop_waiting(&mut self) {
        self.waits = false;
    }

    /// Loads the words of replies whose last copy has ended.
    pub(super) fn load_words(&mut self, ahead: &ReadAhead, export: &Export) {
        for slice in self.queue.iter_mut().take_while(|s| s.ticket <= ahead.finished) {
            if let (Some((slot, nonce)), None) = (slice.fence, slice.word) {
                slice.word = Some(export.still(slot, nonce));
            }
        }
    }

    /// Writes the spans of the ring that can be sent of the first reply to `spans`, and returns their number.
    pub(super) fn ready(&self, ahead: &ReadAhead, spans: &mut [Span; MOST_SLICES]) -> usize {
        let mut n = 0;
        for slice in self.queue.iter().take_while(|s| s.ticket <= ahead.finished).take(MOST_SLICES) {
            spans[n] = slice.rest;
            n += 1;
            if slice.fence.is_some() {
                break;
            }
        }
        n
    }

    /// `n` bytes of the first reply were sent. With its last byte: its word.
    pub(super) fn sent(&mut self, ahead: &mut ReadAhead, mut n: u64) -> Option<u64> {
        while let Some(first) = self.queue.front_mut() {
            let of_first = n.min(first.rest.len);
            first.rest.offset += of_first;
            first.rest.len -= of_first;
            n -= of_first;
            if first.rest.len > 0 {
                break;
            }
            ahead.slots.give_back(first.slot, first.ticket);
            let last = self.queue.pop_front();
            if let Some(Slice { fence: Some(_), word, .. }) = last {
                return word;
            }
        }
        None
    }

    /// The first reply is over.
    pub(super) fn next_reply(&mut self) {
        self.reply = self.reply.saturating_sub(1);
    }

    /// Gives every slice back. What was not sent is copied again, from `at` in the first reply.
    pub(super) fn give_back(&mut self, ahead: &mut ReadAhead, at: Place) {
        self.queue.drain(..).for_each(|s| ahead.slots.give_back(s.slot, s.ticket));
        (self.reply, self.at) = (0, at);
    }

    /// The connection ends.
    pub(super) fn close(&mut self, ahead: &mut ReadAhead, token: u64) {
        self.give_back(ahead, Place::default());
        if std::mem::take(&mut self.waits) {
            ahead.slots.forget(token);
        }
    }
}
