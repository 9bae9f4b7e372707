//! Device addresses: where they are, what is mapped there, and who may touch it.
//!
//! All device addresses lie in one reservation without access rights, so a host access crashes as on hardware, and the
//! kernel refuses to pin it. The bytes are reached through the aliases of the backings.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::{Mutex, MutexGuard};

use crate::error::{Error, Result};
use crate::store::Backing;

/// Address space for all devices. It costs no memory.
const ARENA: u64 = 1 << 40;

/// What maps memory at a device address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `cuMemAlloc`.
    Allocation,
    /// `cuIpcOpenMemHandle`.
    Import,
    /// `cuMemMap`.
    Mapping,
}

#[derive(Clone)]
pub(crate) struct Region {
    pub(crate) base: u64,
    pub(crate) size: u64,
    pub(crate) kind: Kind,
    pub(crate) backing: Arc<Backing>,
    /// Devices that may touch it, one bit each.
    pub(crate) devices: u32,
    /// The device in whose context a legacy pointer exists.
    pub(crate) context: i32,
    /// Never given twice.
    pub(crate) id: u64,
}

impl Region {
    pub(crate) fn end(&self) -> u64 {
        self.base + self.size
    }
}

#[derive(Default)]
pub(crate) struct Space {
    /// Allocations, imports and reservations: base to size.
    taken: BTreeMap<u64, u64>,
    pub(crate) reservations: BTreeMap<u64, u64>,
    pub(crate) regions: BTreeMap<u64, Region>,
}

/// Who touches memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// A kernel on this device, with the devices whose memory it may touch.
    Kernel(i32, u32),
    /// A copy engine: memory that some device may touch.
    Copy,
    /// A test that looks behind the driver.
    Any,
}

/// Contiguous bytes of one backing, kept alive.
pub(crate) struct Piece {
    pub(crate) at: *mut u8,
    pub(crate) len: usize,
    _backing: Option<Arc<Backing>>,
}

static SPACE: LazyLock<Mutex<Space>> = LazyLock::new(Mutex::default);

static BASE: LazyLock<Option<u64>> = LazyLock::new(|| {
    // Of an empty file: anonymous memory would be registered with a NIC, as pages of zeros, by kernels before 6.2, which pin
    // memory for reads whatever its protection.
    // SAFETY: a fresh file; a fresh reservation without access, at an address of the kernel's choice, which keeps the file.
    let at = unsafe {
        let empty = libc::memfd_create(c"kvferry-standin".as_ptr(), libc::MFD_CLOEXEC);
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        let at = libc::mmap(std::ptr::null_mut(), ARENA as usize, libc::PROT_NONE, flags, empty, 0);
        libc::close(empty);
        at
    };
    (at != libc::MAP_FAILED).then_some(at as u64)
});

pub(crate) fn lock() -> MutexGuard<'static, Space> {
    SPACE.lock()
}

/// An id that no allocation, handle, stream or event had before.
pub(crate) fn fresh_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0x1000);
    NEXT.fetch_add(16, Relaxed)
}

/// Whether device memory could be at this address.
pub(crate) fn is_device(address: u64) -> bool {
    BASE.is_some_and(|base| (base..base + ARENA).contains(&address))
}

impl Space {
    /// Takes the first gap of `size` bytes, so addresses come back into use soon after they are freed.
    pub(crate) fn take(&mut self, size: u64, alignment: u64) -> Result<u64> {
        let base = BASE.ok_or(Error::OUT_OF_MEMORY)?;
        let mut at = base.next_multiple_of(alignment);
        for (&start, &len) in &self.taken {
            if at.checked_add(size).ok_or(Error::OUT_OF_MEMORY)? <= start {
                break;
            }
            at = at.max((start + len).next_multiple_of(alignment));
        }
        if at.checked_add(size).is_none_or(|end| end > base + ARENA) {
            return Err(Error::OUT_OF_MEMORY);
        }
        self.taken.insert(at, size);
        Ok(at)
    }

    pub(crate) fn give_back(&mut self, base: u64) {
        self.taken.remove(&base);
    }

    /// The region that contains `address`.
    pub(crate) fn at(&self, address: u64) -> Option<&Region> {
        let (_, region) = self.regions.range(..=address).next_back()?;
        (address < region.end()).then_some(region)
    }

    /// The regions that cover `len` bytes from `address` without a gap.
    pub(crate) fn cover(&self, address: u64, len: u64) -> Result<Vec<&Region>> {
        let end = address.checked_add(len).ok_or(Error::INVALID_VALUE)?;
        let mut regions = Vec::new();
        let mut at = address;
        while at < end {
            let region = self.at(at).ok_or(Error::INVALID_VALUE)?;
            at = region.end();
            regions.push(region);
        }
        Ok(regions)
    }
}

/// The bytes behind `len` bytes of device memory at `address`. The range must lie in one allocation, or in mappings
/// that follow each other.
pub(crate) fn resolve(address: u64, len: u64, access: Access) -> Result<Vec<Piece>> {
    let space = lock();
    let regions = space.cover(address, len)?;
    if regions.len() > 1 && regions.iter().any(|r| r.kind != Kind::Mapping) {
        return Err(Error::INVALID_VALUE);
    }
    let piece = |region: &&Region| {
        let allowed = match access {
            Access::Kernel(device, peers) => {
                let peer = region.kind != Kind::Mapping && region.devices & peers != 0;
                peer || region.devices & (1 << device) != 0
            }
            Access::Copy => region.devices != 0,
            Access::Any => true,
        };
        let start = address.max(region.base);
        let end = (address + len).min(region.end());
        allowed.then(|| Piece {
            at: region.backing.at(start - region.base),
            len: (end - start) as usize,
            _backing: Some(region.backing.clone()),
        })
    };
    regions.iter().map(|region| piece(region).ok_or(Error::INVALID_VALUE)).collect()
}

/// Host memory as a piece. The caller of the driver vouches for it.
pub(crate) fn host(address: u64, len: u64) -> Vec<Piece> {
    vec![Piece { at: address as *mut u8, len: len as usize, _backing: None }]
}

/// # Safety
/// `to` has room for all bytes of `pieces`.
pub(crate) unsafe fn copy_out(pieces: &[Piece], mut to: *mut u8) {
    for piece in pieces {
        // SAFETY: a piece is memory of its length; the caller vouches for `to`; `copy` allows overlap.
        unsafe { piece.at.copy_to(to, piece.len) };
        to = to.wrapping_add(piece.len);
    }
}

/// # Safety
/// `from` holds as many bytes as `pieces`.
pub(crate) unsafe fn copy_in(pieces: &[Piece], mut from: *const u8) {
    for piece in pieces {
        // SAFETY: a piece is memory of its length; the caller vouches for `from`; `copy` allows overlap.
        unsafe { piece.at.copy_from(from, piece.len) };
        from = from.wrapping_add(piece.len);
    }
}

/// Copies between lists of pieces of equal total length.
pub(crate) fn copy(from: &[Piece], to: &[Piece]) {
    let (mut from, mut to) = (from.iter(), to.iter());
    let (mut source, mut target): (&[Piece], &[Piece]) = (&[], &[]);
    let (mut read, mut written) = (0, 0);
    loop {
        if source.first().is_none_or(|p| read == p.len) {
            let Some(next) = from.next() else { return };
            (source, read) = (std::slice::from_ref(next), 0);
            continue;
        }
        if target.first().is_none_or(|p| written == p.len) {
            let Some(next) = to.next() else { return };
            (target, written) = (std::slice::from_ref(next), 0);
            continue;
        }
        let len = (source[0].len - read).min(target[0].len - written);
        // SAFETY: both stay inside their pieces; `copy` allows overlap.
        unsafe { source[0].at.add(read).copy_to(target[0].at.add(written), len) };
        read += len;
        written += len;
    }
}
