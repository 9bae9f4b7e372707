//! One shared mapping of a memfd. Owns the address range, and unmaps it on drop.

use std::{
    ffi::c_void,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::{self, NonNull},
};

use rustix::{
    fs::{MemfdFlags, SealFlags},
    mm::{Advice, MapFlags, ProtFlags},
};

/// Size of a huge page where it matters (x86-64, and arm64 with 4 KiB pages): mappings of at least this are aligned to it.
/// Copying 4 KiB blocks between two such mappings is limited by TLB misses otherwise.
const HUGE: usize = 2 << 20;

/// A shared mapping of the first `len` bytes of a file.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping is an address range that only this value unmaps, from whichever thread.
unsafe impl Send for Mapping {}
// SAFETY: shared access returns only the address; an access through it needs a SAFETY reason of its own.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` zeroed private bytes, in huge pages where the system has them.
    pub(crate) fn anonymous(len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        if len == 0 {
            return Ok(Self { base: NonNull::dangling(), len });
        }
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced.
        let at = unsafe {
            rustix::mm::mmap_anonymous(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)?
        };
        // SAFETY: the range was mapped just now and is ours; advice does not change what it holds.
        let advised = unsafe { rustix::mm::madvise(at, len, Advice::LinuxHugepage) };
        if let Err(error) = advised {
            // Slower, not wrong.
            tracing::debug!(%error, "no huge pages for anonymous memory");
        }
        let base = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len })
    }

    /// Maps `len` bytes of `fd`, which has at least as many. `write` asks for a writable mapping.
    pub(crate) fn new(fd: BorrowedFd<'_>, len: u64, write: bool) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        if len == 0 {
            return Ok(Self { base: NonNull::dangling(), len });
        }
        let prot = if write { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        if len < HUGE {
            // SAFETY: the kernel chooses the address, so no existing mapping is replaced.
            let at = unsafe { rustix::mm::mmap(ptr::null_mut(), len, prot, MapFlags::SHARED, fd, 0)? };
            return Self::own(at, len);
        }
        // The kernel aligns mappings of shared memory to huge pages only under some settings, and an unaligned mapping never
        // gets huge pages: reserve more than needed, and map at the aligned place inside.
        let reserve = len.checked_add(HUGE).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced.
        let space = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                reserve,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )?
        };
        let head = space.cast::<u8>().align_offset(HUGE);
        let at = space.wrapping_byte_add(head);
        // SAFETY: `at..at + len` lies in `space`, which is ours and unused: `head` is less than HUGE.
        let mapped = unsafe { rustix::mm::mmap(at, len, prot, MapFlags::SHARED | MapFlags::FIXED, fd, 0) };
        if mapped.is_err() {
            // SAFETY: `space` is ours and unused.
            let _ = unsafe { rustix::mm::munmap(space, reserve) };
        }
        let at = mapped?;
        let end = head + len.next_multiple_of(rustix::param::page_size());
        for (from, len) in [(0, head), (end, reserve.saturating_sub(end))] {
            if len > 0 {
                // SAFETY: the parts of `space` around the mapping are ours and unused. A failure leaves address space reserved.
                let _ = unsafe { rustix::mm::munmap(space.wrapping_byte_add(from), len) };
            }
        }
        let it = Self::own(at, len)?;
        // Without huge pages the mapping only is slower.
        it.advise(0, len, Advice::LinuxHugepage).ok();
        Ok(it)
    }

    fn own(at: *mut c_void, len: usize) -> io::Result<Self> {
        let base = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len })
    }

    fn advise(&self, from: usize, len: usize, advice: Advice) -> io::Result<()> {
        // SAFETY: every caller passes a part of this mapping, and none of the advice used here changes its contents.
        unsafe { rustix::mm::madvise(self.base.as_ptr().wrapping_add(from).cast(), len, advice) }?;
        Ok(())
    }

    /// Backs every page now rather than at its first access, with huge pages where possible. Keeps the contents. Writable
    /// mappings only.
    ///
    /// Under the usual setting (`shmem_enabled` is `never`) shared memory gets no huge pages by itself, but MADV_COLLAPSE
    /// works under every setting. It is also faster: 256 MiB take 0.07 s, and 0.48 s in small pages.
    pub(crate) fn touch(&self) -> io::Result<()> {
        const MADV_COLLAPSE: libc::c_int = 25;
        let page = rustix::param::page_size();
        let mut from = 0;
        while self.len - from >= HUGE {
            // MADV_COLLAPSE fails on a range without a backed page.
            self.populate(from, page)?;
            // SAFETY: the range is a part of this mapping; the call keeps its contents.
            let rc = unsafe { libc::madvise(self.base.as_ptr().wrapping_add(from).cast(), HUGE, MADV_COLLAPSE) };
            if rc != 0 {
                break;
            }
            from += HUGE;
        }
        self.populate(from, self.len - from)
    }

    fn populate(&self, from: usize, len: usize) -> io::Result<()> {
        match self.advise(from, len, Advice::LinuxPopulateWrite) {
            // A kernel before 5.14 backs pages only at their first access.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            done => done,
        }
    }

    /// The address of the first byte.
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: the range was mapped by `new` and is unmapped only here.
            let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        }
    }
}

/// The seals of a file whose size can never change: an access to its mapping cannot fault for lack of bytes. And nothing but
/// the mapping that was made before the seals can write it: no later mapping, no `pwrite`, whichever way the file is opened.
pub(crate) const SEALS: SealFlags =
    SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::FUTURE_WRITE).union(SealFlags::SEAL);

/// A memfd of at least `len` bytes (whole pages), sealed (see [`SEALS`]), and its one writable mapping. Needs Linux 5.1.
pub(crate) fn sealed(name: &str, len: u64) -> io::Result<(OwnedFd, Mapping)> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let page = rustix::param::page_size() as u64;
    rustix::fs::ftruncate(&fd, len.checked_next_multiple_of(page).ok_or(io::ErrorKind::OutOfMemory)?)?;
    let mapping = Mapping::new(fd.as_fd(), len, true)?;
    rustix::fs::fcntl_add_seals(&fd, SEALS)?;
    Ok((fd, mapping))
}
