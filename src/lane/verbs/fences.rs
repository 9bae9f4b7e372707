//! Fences of chunks in flight, when they are due, and which queue pairs carried their data.
//!
//! A chunk is fenced on every queue pair that carried any of it, never on another. Two things hang on that:
//! - A queue pair that has failed completes nothing well any more. So a fence that came back well on it says that it was
//!   alive after the chunk's data, and that what it had reported of the data was no slip on the way into its error state.
//!   Such slips are real: soft-RoCE of Linux 6.1 reports a READ whose answer came out of sequence as successful, though
//!   nothing was written, and only then goes to ERR (`rxe_comp.c`: `check_ack` leaves the status as it was). One pull in
//!   thirty of 32 MiB over a congested wire loaded a block of zeros before this rule was here.
//! - A word that is not the nonce may be such a slip too. It is looked at a second time before the offer is called stale.
//!
//! Where a carrier has failed, the chunk is in doubt, and is read again as a whole (promise *exact*).

use std::collections::VecDeque;

use super::exchange::{MAX_QUEUE_PAIRS, MAX_RAILS};

/// Queue pairs, one bit each: see [`bit`].
pub(crate) type Carriers = u64;

const _: () = assert!(MAX_RAILS * MAX_QUEUE_PAIRS <= Carriers::BITS as usize);

/// The bit of a rail's queue pair.
#[inline]
pub(crate) fn bit(path: usize, end: usize) -> Carriers {
    1 << (path * MAX_QUEUE_PAIRS + end)
}

/// The rail and queue pair of each bit.
pub(crate) fn each(mut carriers: Carriers) -> impl Iterator<Item = (usize, usize)> {
    std::iter::from_fn(move || {
        let n = carriers.trailing_zeros() as usize;
        // Without the lowest one.
        carriers &= carriers.checked_sub(1)?;
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
    pub carriers: Carriers,
    /// READs of the word that are on their way.
    left: u8,
    /// The first word that was not what it should be, or what it should be.
    pub word: u64,
    /// A carrier failed.
    pub doubt: bool,
    /// This is the second look.
    pub second: bool,
}

impl Fence {
    /// A fence to post.
    pub(crate) fn new(attempt: u32, chunk: u32, word_at: u32, carriers: Carriers) -> Self {
        Self { attempt, chunk, word_at, carriers, left: 0, word: 0, doubt: false, second: false }
    }
}

/// What a lane has of a chunk.
#[derive(Debug, Clone, Copy, Default)]
struct Chunk {
    /// Who carried its data.
    carriers: Carriers,
    /// Reads that were accepted and are not done.
    open: u32,
    /// All of its reads were accepted.
    all: bool,
}

/// All fences of a lane.
#[derive(Debug, Default)]
pub(crate) struct Fences {
    /// On their way.
    posted: Vec<Fence>,
    /// For each attempt's slot: its chunks.
    chunks: Vec<Vec<Chunk>>,
    /// Attempt's slot and chunk: all reads are done, and the fence is to be posted.
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

    /// So many reads of the chunk were accepted; `last`: its last one among them.
    pub(crate) fn accepted(&mut self, attempt: usize, chunk: u32, reads: u32, last: bool) {
        let Some(chunks) = self.chunks.get_mut(attempt) else { return };
        let at = chunk as usize;
        if at >= chunks.len() {
            chunks.resize(at + 1, Chunk::default());
        }
        chunks[at].open += reads;
        chunks[at].all |= last;
    }

    /// A read of the chunk has completed on this queue pair. After the last one the fence is due.
    #[inline]
    pub(crate) fn carried(&mut self, attempt: u32, chunk: u32, by: Carriers) {
        let chunks = self.chunks.get_mut(attempt as usize);
        let Some(c) = chunks.and_then(|c| c.get_mut(chunk as usize)) else { return };
        c.carriers |= by;
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

    /// Takes the next fence to post: the attempt's slot, the chunk, and who carried its data.
    pub(crate) fn next_due(&mut self) -> Option<(usize, u32, Carriers)> {
        let (attempt, chunk) = self.due.pop_front()?;
        let at = self.chunks.get(attempt as usize).and_then(|c| c.get(chunk as usize));
        Some((attempt as usize, chunk, at.map_or(0, |c| c.carriers)))
    }

    /// There is no room for one that was taken.
    pub(crate) fn later(&mut self, attempt: usize, chunk: u32) {
        self.due.push_back((attempt as u32, chunk));
    }

    /// The chunk is read anew.
    pub(crate) fn forget(&mut self, attempt: usize, chunk: u32) {
        if let Some(c) = self.chunks.get_mut(attempt).and_then(|c| c.get_mut(chunk as usize)) {
            *c = Chunk::default();
        }
    }

    /// A fence was posted on all of its carriers.
    pub(crate) fn posted(&mut self, mut f: Fence, nonce: u64) {
        self.forget(f.attempt as usize, f.chunk);
        (f.left, f.word) = (f.carriers.count_ones() as u8, nonce);
        self.posted.push(f);
    }

    fn find(&mut self, attempt: u32, chunk: u32) -> Option<&mut Fence> {
        self.posted.iter_mut().find(|f| f.attempt == attempt && f.chunk == chunk)
    }

    /// A word has come.
    pub(crate) fn landed(&mut self, attempt: u32, chunk: u32, word: u64, nonce: u64) {
        if let Some(f) = self.find(attempt, chunk) {
            f.left = f.left.saturating_sub(1);
            if word != nonce && f.word == nonce {
                f.word = word;
            }
        }
    }

    /// One will not come: its queue pair has failed.
    pub(crate) fn lost(&mut self, attempt: u32, chunk: u32) {
        if let Some(f) = self.find(attempt, chunk) {
            f.left = f.left.saturating_sub(1);
            f.doubt = true;
        }
    }

    /// Takes the next fence all of whose words have come or are lost.
    pub(crate) fn next_back(&mut self) -> Option<Fence> {
        let i = self.posted.iter().position(|f| f.left == 0)?;
        Some(self.posted.swap_remove(i))
    }

    /// Keeps one that was taken for later.
    pub(crate) fn back(&mut self, f: Fence) {
        self.posted.push(f);
    }

    /// Whether any fence is back already.
    pub(crate) fn any_back(&self) -> bool {
        self.posted.iter().any(|f| f.left == 0)
    }
}
