//! The bare copy that this lane is measured against: `process_vm_readv` of a list of blocks, and nothing else.

use std::{io, mem::MaybeUninit};

use super::source::{MAX_PIECES, read_process};
use crate::memory::Memory;

/// Reads blocks of `size` bytes of process `pid` into segment 0 of `memory`. `base` is an address there; `reads` are
/// `(offset from base, offset in the segment)`. For benchmarks: nothing says whether the bytes were good.
pub fn bare_read(pid: u32, base: u64, memory: &Memory, size: u64, reads: &[(u64, u64)]) -> io::Result<()> {
    let pid = i32::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
    let len = usize::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut here = [const { MaybeUninit::<libc::iovec>::uninit() }; MAX_PIECES];
    let mut there = [const { MaybeUninit::<libc::iovec>::uninit() }; MAX_PIECES];
    for part in reads.chunks(MAX_PIECES) {
        for (i, (from, to)) in part.iter().enumerate() {
            let to = memory.at(0, *to, size)?;
            let from = base.wrapping_add(*from) as usize;
            here[i].write(libc::iovec { iov_base: to.as_ptr().cast(), iov_len: len });
            there[i].write(libc::iovec { iov_base: std::ptr::without_provenance_mut(from), iov_len: len });
        }
        let n = part.len();
        // SAFETY: the first `n` pieces of both lists are initialised, and those of `here` lie in local memory.
        let read = unsafe { read_process(pid, &here[..n], &there[..n])? };
        if read != n * len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}
