//! The bare copy for the local lane with an engine's own memory: `process_vm_readv` of a list of blocks.

use std::io;

use kvferry::Memory;

/// Pieces per call: the limit of Linux (`IOV_MAX`).
const MAX_PIECES: usize = 1024;

/// Reads blocks of `size` bytes of process `pid` into segment 0 of `memory`. `base` is an address in that process; `reads`
/// has pairs of an offset from `base` and an offset in the segment. It does not check the bytes.
pub(crate) fn read(pid: u32, base: u64, memory: &Memory, size: u64, reads: &[(u64, u64)]) -> io::Result<()> {
    let pid = i32::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
    let len = usize::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?;
    let local = memory.segments().first().copied().unwrap_or(0);
    let piece = |at: u64| libc::iovec { iov_base: std::ptr::with_exposed_provenance_mut(at as usize), iov_len: len };
    let (mut here, mut there) = (Vec::with_capacity(MAX_PIECES), Vec::with_capacity(MAX_PIECES));
    for part in reads.chunks(MAX_PIECES) {
        here.clear();
        there.clear();
        for (from, to) in part {
            if to.checked_add(size).is_none_or(|end| end > local) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            here.push(piece(memory.base(0) + to));
            there.push(piece(base.wrapping_add(*from)));
        }
        // SAFETY: the pieces of `here` lie in segment 0, which `memory` keeps mapped, and any byte is valid there. The
        // addresses in `there` belong to another process, and the kernel checks them.
        let read =
            unsafe { libc::process_vm_readv(pid, here.as_ptr(), here.len() as _, there.as_ptr(), there.len() as _, 0) };
        match usize::try_from(read) {
            Ok(n) if n == part.len() * len => {}
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(_) => return Err(io::Error::last_os_error()),
        }
    }
    Ok(())
}
