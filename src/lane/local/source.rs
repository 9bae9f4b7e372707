//! The two ways to copy out of another process: from its memfds, mapped here, or with `process_vm_readv`.
//!
//! Owns the mappings. Knows no attempts and no chunks.

use std::{
    collections::VecDeque,
    io,
    mem::MaybeUninit,
    os::fd::BorrowedFd,
    sync::atomic::{AtomicU64, Ordering, fence},
};

use kvferry_proto::{Attempt, PoolLayout};

use crate::memory::{Mapping, Memory};

/// A queued read, or its remaining part.
#[derive(Debug, Clone, Copy)]
pub(super) struct QueuedRead {
    pub attempt: Attempt,
    pub chunk: u32,
    pub src_segment: u16,
    pub dst_segment: u16,
    pub src_offset: u64,
    pub dst_offset: u64,
    pub len: u64,
}

/// Most pieces of one `process_vm_readv`: the kernel's UIO_MAXIOV.
const MAX_PIECES: usize = 1024;

/// The peer's fence table, mapped read-only.
#[derive(Debug)]
pub(super) struct WordTable {
    mapping: Mapping,
    slots: u32,
}

impl WordTable {
    /// Bytes of a table of `slots` words.
    pub(super) fn bytes(slots: u32) -> u64 {
        u64::from(slots) * 8
    }

    /// Maps a file that is at least as long as the table.
    pub(super) fn new(file: BorrowedFd<'_>, slots: u32) -> io::Result<Self> {
        Ok(Self { mapping: Mapping::new(file, Self::bytes(slots), false)?, slots })
    }

    /// Reads fence words, after all earlier copies are complete. A slot past the table reads as 0. `words` is as long as
    /// `slots`.
    pub(super) fn load(&self, slots: impl Iterator<Item = u32>, words: &mut [u64]) {
        // The data's loads must not move after the words' loads.
        fence(Ordering::SeqCst);
        let table = self.mapping.base().cast::<AtomicU64>();
        for (word, slot) in words.iter_mut().zip(slots) {
            *word = if slot < self.slots {
                // SAFETY: the mapping holds `slots` aligned words, which are only ever accessed as atomics.
                unsafe { table.add(slot as usize).as_ref() }.load(Ordering::Acquire)
            } else {
                0
            };
        }
    }
}

/// Where the peer's bytes come from.
#[derive(Debug)]
pub(super) enum Source {
    /// Its memfds, mapped read-only. Each mapping is as long as the peer's layout says.
    Mapped { segments: Vec<Mapping>, table: WordTable },
    /// Its address space.
    Process { pid: i32, segments: Vec<u64>, words: u64, slots: u32 },
}

impl Source {
    /// Number of words in the peer's fence table.
    pub(super) fn slots(&self) -> u32 {
        match self {
            Self::Mapped { table, .. } => table.slots,
            Self::Process { slots, .. } => *slots,
        }
    }

    /// Copies from the front of the queue, at most `budget` bytes, and returns how many. The copy may end in the middle of a
    /// read. Every read was checked against the peer's layout and against `memory` when it was queued.
    pub(super) fn copy(&self, queue: &VecDeque<QueuedRead>, memory: &Memory, budget: usize) -> io::Result<usize> {
        match self {
            Self::Mapped { segments, .. } => {
                let mut done = 0;
                for c in queue {
                    let len = usize::try_from(c.len).unwrap_or(usize::MAX).min(budget - done);
                    if len == 0 {
                        break;
                    }
                    let to = memory.at(c.dst_segment, c.dst_offset, len as u64)?;
                    let from = segments[usize::from(c.src_segment)].base();
                    // SAFETY: `to` is valid for `len` bytes of local memory. The source lies in its segment by the check when
                    // it was queued, and the mapping is as long as the segment. The file is sealed, so the mapping has no
                    // hole. The producer may write these bytes meanwhile; they are not interpreted before the fence.
                    unsafe {
                        std::ptr::copy_nonoverlapping(from.as_ptr().add(c.src_offset as usize), to.as_ptr(), len);
                    }
                    done += len;
                }
                Ok(done)
            }
            Self::Process { pid, segments, .. } => {
                let mut here = [const { MaybeUninit::<libc::iovec>::uninit() }; MAX_PIECES];
                let mut there = [const { MaybeUninit::<libc::iovec>::uninit() }; MAX_PIECES];
                let (mut used, mut left) = (0, budget);
                for c in queue.iter().take(MAX_PIECES) {
                    let len = usize::try_from(c.len).unwrap_or(usize::MAX).min(left);
                    if len == 0 {
                        break;
                    }
                    let to = memory.at(c.dst_segment, c.dst_offset, len as u64)?;
                    let from = segments[usize::from(c.src_segment)].wrapping_add(c.src_offset) as usize;
                    here[used].write(libc::iovec { iov_base: to.as_ptr().cast(), iov_len: len });
                    there[used].write(libc::iovec { iov_base: std::ptr::without_provenance_mut(from), iov_len: len });
                    used += 1;
                    left -= len;
                }
                // SAFETY: the first `used` pieces of both lists are initialised, and those of `here` lie in local memory.
                unsafe { read_process(*pid, &here[..used], &there[..used]) }
            }
        }
    }

    /// Reads fence words, after all earlier copies are complete. A slot past the table reads as 0. `words` is as long as
    /// `slots`.
    pub(super) fn words(&self, slots: impl Iterator<Item = u32>, words: &mut [u64]) -> io::Result<()> {
        match self {
            Self::Mapped { table, .. } => {
                table.load(slots, words);
                Ok(())
            }
            Self::Process { pid, words: table, slots: len, .. } => {
                for (word, slot) in words.iter_mut().zip(slots) {
                    *word = 0;
                    if slot >= *len {
                        continue;
                    }
                    let from = table.wrapping_add(u64::from(slot) * 8) as usize;
                    let here = MaybeUninit::new(libc::iovec { iov_base: (&raw mut *word).cast(), iov_len: 8 });
                    let from = std::ptr::without_provenance_mut(from);
                    let there = MaybeUninit::new(libc::iovec { iov_base: from, iov_len: 8 });
                    // SAFETY: both pieces are initialised, and `here` is one word of our own slice.
                    let n = unsafe { read_process(*pid, &[here], &[there])? };
                    if n != 8 {
                        return Err(io::Error::from_raw_os_error(libc::EFAULT));
                    }
                }
                Ok(())
            }
        }
    }

    /// Whether the segments match the peer's `layout`.
    pub(super) fn fits(&self, layout: &PoolLayout) -> bool {
        match self {
            Self::Mapped { segments, .. } => segments.len() == layout.segments.len(),
            Self::Process { segments, .. } => {
                segments.len() == layout.segments.len()
                    && segments.iter().zip(&layout.segments).all(|(base, len)| base.checked_add(*len).is_some())
            }
        }
    }
}

/// Copies from another process's memory; returns how many bytes.
///
/// # Safety
/// All pieces are initialised, and those of `here` are valid for writes.
unsafe fn read_process(
    pid: i32,
    here: &[MaybeUninit<libc::iovec>],
    there: &[MaybeUninit<libc::iovec>],
) -> io::Result<usize> {
    // SAFETY: by the contract of this function; the kernel checks the pieces of the other process.
    let n = unsafe {
        libc::process_vm_readv(
            pid,
            here.as_ptr().cast(),
            here.len() as libc::c_ulong,
            there.as_ptr().cast(),
            there.len() as libc::c_ulong,
            0,
        )
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}
