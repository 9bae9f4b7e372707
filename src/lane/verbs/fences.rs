//! Fences of chunks: when they are due, and over which queue pairs they go.
//!
//! A chunk is fenced on every queue pair that carried any of its data, and on no other. There are two reasons:
//! - A failed queue pair completes no later request successfully. So a fence that succeeds on a queue pair proves that the
//!   pair was alive after the chunk's data, and that the data's completions were true. False completions are real:
//!   soft-RoCE of Linux 6.1 reports a READ whose answer came out of sequence as successful, though nothing was written, and
//!   only then goes to ERR (`rxe_comp.c`: `check_ack` leaves the status as it was). Before this rule, one pull in thirty of
//!   32 MiB over a congested wire loaded a block of zeros.
//! - A word other than the nonce may be such a false completion too. It is read a second time before the offer is called
//!   stale.
//!
//! If a queue pair of a chunk has failed, the chunk is unverified and is read again as a whole (promise *exact*).

use std::collections::VecDeque;

use super::exchange::{MAX_QUEUE_PAIRS, MAX_RAILS};

/// Queue pairs of a lane, one bit each: see [`bit`].
pub(crate) type PairSet = u64;

const _: () = assert!(MAX_RAILS * MAX_QUEUE_PAIRS <= PairSet::BITS as usize);

/// The bit of a rail's queue pair.
#[inline]
pub(crate) fn bit(path: usize, pair: usize) -> PairSet {
    1 << (path * MAX_QUEUE_PAIRS + pair)
}

/// The rail and queue pair of each bit.
pub(crate) fn each(mut pairs: PairSet) -> impl Iterator<Item = (usize, usize)> {
    std::iter::from_fn(move || {
        let n = pairs.trailing_zeros() as usize;
        // Without the lowest bit.
        pairs &= pairs.checked_sub(1)?;
        Some((n / MAX_QUEUE_PAIRS, n % MAX_QUEUE_PAIRS))
    })
}

/// A chunk's fence.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fence {
    /// The lane's slot of the attempt.
    pub attempt: u32,
    pub chunk: u32,
    /// Word in the peer's fence table.
    pub word_at: u32,
    /// Queue pairs that carried the chunk's data.
    pub pairs: PairSet,
    /// READs of the word in flight.
    left: u8,
    /// The first word that was not the nonce, otherwise the nonce.
    pub word: u64,
    /// A queue pair of the chunk has failed.
    pub unverified: bool,
    /// The word is read for the second time.
    pub second: bool,
}

impl Fence {
    /// A fence to post.
    pub(crate) fn new(attempt: u32, chunk: u32, word_at: u32, pairs: PairSet) -> Self {
        Self { attempt, chunk, word_at, pairs, left: 0, word: 0, unverified: false, second: false }
    }
}

/// The state of a chunk.
#[derive(Debug, Clone, Copy, Default)]
struct Chunk {
    /// Queue pairs that carried its data.
    pairs: PairSet,
    /// Accepted reads that are not done.
    open: u32,
    /// All of its reads were accepted.
    all: bool,
}

/// All fences of a lane.
#[derive(Debug, Default)]
pub(crate) struct Fences {
    /// In flight.
    posted: Vec<Fence>,
    /// The chunks of each attempt's slot.
    chunks: Vec<Vec<Chunk>>,
    /// Slot and chunk of fences to post: all reads of the chunk are done.
    due: VecDeque<(u32, u32)>,
}

impl Fences {
    /// An attempt begins in a slot.
    pub(crate) fn begin(&mut self, attempt: usize) {
        if self.chunks.len() <= attempt {
            self.chunks.resize_with(attempt + 1, Vec::new);
        }
        self.chunks[attempt].clear();
        self.posted.retain(|f| f.attempt as usize != attempt);
        self.due.retain(|(a, _)| *a as usize != attempt);
    }

    /// So many reads of the chunk were accepted; `last`: its last read is among them.
    pub(crate) fn accepted(&mut self, attempt: usize, chunk: u32, reads: u32, last: bool) {
        let Some(chunks) = self.chunks.get_mut(attempt) else { return };
        let at = chunk as usize;
        if at >= chunks.len() {
            chunks.resize(at + 1, Chunk::default());
        }
        chunks[at].open += reads;
        chunks[at].all |= last;
    }

    /// A read of the chunk has completed on this queue pair. After the last read the fence is due.
    #[inline]
    pub(crate) fn carried(&mut self, attempt: u32, chunk: u32, by: PairSet) {
        let chunks = self.chunks.get_mut(attempt as usize);
        let Some(c) = chunks.and_then(|c| c.get_mut(chunk as usize)) else { return };
        c.pairs |= by;
        c.open = c.open.saturating_sub(1);
        if c.open == 0 && c.all {
            self.due.push_back((attempt, chunk));
        }
    }

    /// How many fences are to be posted.
    #[inline]
    pub(crate) fn due(&self) -> usize {
        self.due.len()
    }

    /// Takes the next fence to post: the attempt's slot, the chunk, and the queue pairs that carried its data.
    pub(crate) fn next_due(&mut self) -> Option<(usize, u32, PairSet)> {
        let (attempt, chunk) = self.due.pop_front()?;
        let at = self.chunks.get(attempt as usize).and_then(|c| c.get(chunk as usize));
        Some((attempt as usize, chunk, at.map_or(0, |c| c.pairs)))
    }

    /// Puts back a fence from `next_due`, for which there is no room.
    pub(crate) fn postpone(&mut self, attempt: usize, chunk: u32) {
        self.due.push_back((attempt as u32, chunk));
    }

    /// The chunk is to be read again.
    pub(crate) fn forget(&mut self, attempt: usize, chunk: u32) {
        if let Some(c) = self.chunks.get_mut(attempt).and_then(|c| c.get_mut(chunk as usize)) {
            *c = Chunk::default();
        }
    }

    /// A fence was posted on all of its queue pairs.
    pub(crate) fn posted(&mut self, mut f: Fence, nonce: u64) {
        self.forget(f.attempt as usize, f.chunk);
        (f.left, f.word) = (f.pairs.count_ones() as u8, nonce);
        self.posted.push(f);
    }

    fn find(&mut self, attempt: u32, chunk: u32) -> Option<&mut Fence> {
        self.posted.iter_mut().find(|f| f.attempt == attempt && f.chunk == chunk)
    }

    /// A word has arrived.
    pub(crate) fn landed(&mut self, attempt: u32, chunk: u32, word: u64, nonce: u64) {
        if let Some(f) = self.find(attempt, chunk) {
            f.left = f.left.saturating_sub(1);
            if word != nonce && f.word == nonce {
                f.word = word;
            }
        }
    }

    /// A word will not arrive: its queue pair has failed.
    pub(crate) fn lost(&mut self, attempt: u32, chunk: u32) {
        if let Some(f) = self.find(attempt, chunk) {
            f.left = f.left.saturating_sub(1);
            f.unverified = true;
        }
    }

    /// Takes the next fence whose words have all arrived or are lost.
    pub(crate) fn next_complete(&mut self) -> Option<Fence> {
        let i = self.posted.iter().position(|f| f.left == 0)?;
        Some(self.posted.swap_remove(i))
    }

    /// Puts back a fence from `next_complete`.
    pub(crate) fn put_back(&mut self, f: Fence) {
        self.posted.push(f);
    }

    /// Whether all words of any fence have arrived or are lost.
    pub(crate) fn any_complete(&self) -> bool {
        self.posted.iter().any(|f| f.left == 0)
    }
}
