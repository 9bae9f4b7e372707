//! Reads on their way through the ring: batches, which the inner lane fences, and the chunks that they are parts of.
//!
//! A chunk that does not fit into the free part of the ring is read in several batches. A lane with fences of its own takes
//! the last read that it is given for the chunk's last, so each batch is a chunk of its own to such a lane.

use super::StagedCopy;
use crate::{Attempt, Read};

/// The result of a batch's fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Word(u64),
    Again,
}

/// Reads of one chunk that the inner lane knows under one chunk number.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) live: bool,
    pub(super) attempt: Attempt,
    pub(super) chunk: u32,
    /// Reads that were posted since the last job, in order.
    pub(super) copies: Vec<StagedCopy>,
    /// How many of `copies` have landed. The inner lane does not say which.
    pub(super) landed: usize,
    /// The slots of `copies`.
    pub(super) slots: Vec<u32>,
    /// Used bytes of the last slot.
    pub(super) used: u64,
    /// Jobs that are not finished.
    pub(super) jobs: u32,
    /// No read joins it any more.
    pub(super) sealed: bool,
    /// Some of its data will not be copied.
    pub(super) dropped: bool,
    pub(super) verdict: Option<Verdict>,
    /// It waits for the copier.
    pub(super) queued: bool,
}

impl Batch {
    fn new(attempt: Attempt, chunk: u32) -> Self {
        Self {
            live: true,
            attempt,
            chunk,
            copies: Vec::new(),
            landed: 0,
            slots: Vec::new(),
            used: 0,
            jobs: 0,
            sealed: false,
            dropped: false,
            verdict: None,
            queued: false,
        }
    }

    /// All reads that were posted since the last job have landed, and there are some.
    pub(super) fn is_landed(&self) -> bool {
        self.landed == self.copies.len() && !self.copies.is_empty()
    }

    /// Appends a read at an offset in the ring.
    pub(super) fn push(&mut self, read: &Read, ring_offset: u64) {
        let (segment, offset, len) = (read.dst_segment, read.dst_offset, read.len);
        self.copies.push(StagedCopy { ring_offset, segment, offset, len });
    }

    /// All its data was copied, and its fence was read unless the owner posts the chunk's.
    pub(super) fn is_over(&self, fenced_by_owner: bool) -> bool {
        self.sealed
            && self.jobs == 0
            && self.copies.is_empty()
            && !self.dropped
            && (fenced_by_owner || self.verdict.is_some())
    }
}

/// A chunk with batches.
#[derive(Debug)]
pub(super) struct ChunkState {
    attempt: Attempt,
    chunk: u32,
    batches: u32,
    /// All its reads were accepted.
    complete: bool,
    verdict: Verdict,
}

/// The batches and chunks of a lane. An index of a batch is used again when the batch is over, so indices stay small:
/// lanes keep tables by chunk number.
#[derive(Debug, Default)]
pub(super) struct Batches {
    batches: Vec<Batch>,
    chunks: Vec<ChunkState>,
}

impl Batches {
    pub(super) fn get_mut(&mut self, i: usize) -> Option<&mut Batch> {
        self.batches.get_mut(i).filter(|b| b.live)
    }

    /// Batches of an attempt.
    pub(super) fn of(&mut self, a: Attempt) -> impl Iterator<Item = &mut Batch> {
        self.batches.iter_mut().filter(move |b| b.live && b.attempt == a)
    }

    pub(super) fn all(&mut self) -> impl Iterator<Item = &mut Batch> {
        self.batches.iter_mut().filter(|b| b.live)
    }

    /// The batch of a chunk that reads may join.
    pub(super) fn open(&self, a: Attempt, chunk: u32) -> Option<usize> {
        self.batches.iter().position(|b| b.live && b.attempt == a && b.chunk == chunk && !b.sealed)
    }

    /// The batch of a chunk, for lanes whose owner posts the fences: there is one at most.
    pub(super) fn of_chunk(&self, a: Attempt, chunk: u32) -> Option<usize> {
        self.batches.iter().position(|b| b.live && b.attempt == a && b.chunk == chunk)
    }

    /// Begins a batch.
    pub(super) fn begin(&mut self, a: Attempt, chunk: u32) -> usize {
        match self.batches.iter().position(|b| !b.live) {
            Some(i) => {
                let b = &mut self.batches[i];
                // The buffers are kept.
                let (copies, slots) = (std::mem::take(&mut b.copies), std::mem::take(&mut b.slots));
                *b = Batch { copies, slots, ..Batch::new(a, chunk) };
                b.copies.clear();
                b.slots.clear();
                i
            }
            None => {
                self.batches.push(Batch::new(a, chunk));
                self.batches.len() - 1
            }
        }
    }

    /// A batch of which nothing was accepted.
    pub(super) fn discard(&mut self, i: usize) {
        self.batches[i].live = false;
    }

    /// Reads of a batch were accepted: the first ones of it if `new`, the chunk's last if `complete`.
    pub(super) fn accepted(&mut self, i: usize, new: bool, complete: bool, nonce: u64) {
        let (attempt, chunk) = (self.batches[i].attempt, self.batches[i].chunk);
        let at = self.chunks.iter().position(|c| c.attempt == attempt && c.chunk == chunk).unwrap_or_else(|| {
            let verdict = Verdict::Word(nonce);
            self.chunks.push(ChunkState { attempt, chunk, batches: 0, complete: false, verdict });
            self.chunks.len() - 1
        });
        let c = &mut self.chunks[at];
        c.batches += u32::from(new);
        c.complete |= complete;
    }

    /// Ends a batch. Returns the chunk's verdict if the whole chunk is over: a word other than the nonce, if any batch read one.
    pub(super) fn end(&mut self, i: usize, nonce: u64) -> Option<Verdict> {
        let b = &mut self.batches[i];
        b.live = false;
        let (attempt, chunk, verdict) = (b.attempt, b.chunk, b.verdict);
        let at = self.chunks.iter().position(|c| c.attempt == attempt && c.chunk == chunk)?;
        let c = &mut self.chunks[at];
        c.batches = c.batches.saturating_sub(1);
        match (c.verdict, verdict) {
            // A revoked offer stays revoked: its word tells more than unverified data.
            (Verdict::Word(word), _) if word != nonce => {}
            (_, Some(Verdict::Word(word))) if word != nonce => c.verdict = Verdict::Word(word),
            (_, Some(Verdict::Again)) => c.verdict = Verdict::Again,
            _ => {}
        }
        if !c.complete || c.batches > 0 {
            return None;
        }
        Some(self.chunks.swap_remove(at).verdict)
    }

    /// Forgets an attempt.
    pub(super) fn forget(&mut self, a: Attempt) {
        for b in self.batches.iter_mut().filter(|b| b.attempt == a) {
            b.live = false;
        }
        self.chunks.retain(|c| c.attempt != a);
    }
}
