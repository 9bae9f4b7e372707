//! Protection domains, and memory that a device may access.
//!
//! Owns registrations, and holds the memory of each until the device has released it. Host pages, a dmabuf and a device
//! pointer are registered through the same function.

use std::{
    ffi::c_void,
    io,
    os::fd::{AsRawFd, BorrowedFd},
    ptr::NonNull,
    sync::Arc,
};

use ibverbs_sys::{ibv_mr, ibv_pd};

use super::{
    device::{Device, check},
    error::VerbsError,
};

/// A protection domain: its queue pairs reach its regions and no others.
#[derive(Debug)]
pub(crate) struct Pd {
    pd: NonNull<ibv_pd>,
    device: Arc<Device>,
}

// SAFETY: libibverbs allows calls on a domain from any thread.
unsafe impl Send for Pd {}
// SAFETY: libibverbs allows concurrent calls on a domain.
unsafe impl Sync for Pd {}

impl Pd {
    /// A new domain.
    pub(crate) fn new(device: Arc<Device>) -> Result<Arc<Self>, VerbsError> {
        // SAFETY: the context is open.
        let pd = NonNull::new(unsafe { (device.lib().alloc_pd)(device.context()) });
        match pd {
            Some(pd) => Ok(Arc::new(Self { pd, device })),
            None => Err(device.os("ibv_alloc_pd", io::Error::last_os_error())),
        }
    }

    /// Its device.
    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub(crate) fn raw(&self) -> *mut ibv_pd {
        self.pd.as_ptr()
    }
}

impl Drop for Pd {
    fn drop(&mut self) {
        // SAFETY: regions and queue pairs hold their domain, so none is left but those that a teardown gave up as wedged.
        let rc = unsafe { (self.device.lib().dealloc_pd)(self.raw()) };
        if let Err(error) = check(rc) {
            tracing::warn!(device = self.device.name(), %error, "a protection domain cannot be released");
        }
    }
}

/// A device's access to a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// The device writes READ responses to it.
    Landing {
        /// In any order: twice as fast on some machines.
        relaxed: bool,
    },
    /// Peers READ it.
    Exported {
        /// In any order.
        relaxed: bool,
    },
}

const LOCAL_WRITE: i32 = 1;
const REMOTE_READ: i32 = 4;
/// Optional: a device or kernel without it ignores it.
const RELAXED_ORDERING: i32 = 1 << 20;

impl Access {
    fn flags(self) -> i32 {
        match self {
            Self::Landing { .. } => LOCAL_WRITE,
            Self::Exported { .. } => REMOTE_READ,
        }
    }

    fn relaxed(self) -> bool {
        match self {
            Self::Landing { relaxed } | Self::Exported { relaxed } => relaxed,
        }
    }
}

/// Memory to register.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Source<'a> {
    /// Pages of this process, or device memory that a peer-memory module maps like them.
    Address {
        /// The first byte.
        base: NonNull<u8>,
        /// Bytes.
        len: u64,
    },
    /// Part of a dmabuf.
    Dmabuf {
        /// The dmabuf.
        fd: BorrowedFd<'a>,
        /// Offset in it, in bytes.
        offset: u64,
        /// Bytes.
        len: u64,
        /// The address that work requests use for its first byte.
        address: u64,
    },
}

/// A registered region.
pub(crate) struct Region<K> {
    mr: NonNull<ibv_mr>,
    pd: Arc<Pd>,
    address: u64,
    len: u64,
    /// The memory. `None` only inside `drop`.
    keep: Option<K>,
}

// SAFETY: libibverbs allows calls on a region from any thread; the memory moves along, so it must be Send too.
unsafe impl<K: Send> Send for Region<K> {}
// SAFETY: libibverbs allows concurrent calls on a region; the memory is shared, so it must be Sync too.
unsafe impl<K: Sync> Sync for Region<K> {}

impl<K> Region<K> {
    /// Registers memory that `keep` owns, for as long as the region lives.
    ///
    /// # Safety
    /// `source` must be memory that stays valid for this access as long as `keep` lives, and that a device may read and write
    /// during that time.
    pub(crate) unsafe fn register(
        pd: &Arc<Pd>,
        source: Source<'_>,
        access: Access,
        keep: K,
    ) -> Result<Self, VerbsError> {
        let (device, lib) = (pd.device(), pd.device().lib());
        let (mr, address, len, what) = match source {
            Source::Address { base, len } => {
                let at: *mut c_void = base.as_ptr().cast();
                let bytes = usize::try_from(len).unwrap_or(usize::MAX);
                let address = base.addr().get() as u64;
                let mr = match lib.reg_mr_iova2.filter(|_| access.relaxed()) {
                    // SAFETY: the domain is alive, and the memory is valid by this function's contract.
                    Some(reg) => unsafe {
                        reg(pd.raw(), at, bytes, address, (access.flags() | RELAXED_ORDERING) as u32)
                    },
                    // SAFETY: the domain is alive, and the memory is valid by this function's contract.
                    None => unsafe { (lib.reg_mr)(pd.raw(), at, bytes, access.flags()) },
                };
                (mr, address, len, "this memory")
            }
            Source::Dmabuf { fd, offset, len, address } => {
                let bytes = usize::try_from(len).unwrap_or(usize::MAX);
                let Some(reg) = lib.reg_dmabuf_mr else {
                    return Err(VerbsError::OldLibrary { symbol: "ibv_reg_dmabuf_mr" });
                };
                // A driver without the optional flag ignores it, as with `ibv_reg_mr_iova2`.
                let relaxed = if access.relaxed() { RELAXED_ORDERING } else { 0 };
                // SAFETY: the domain is alive, the memory is valid by this function's contract, and the descriptor is borrowed
                // for the call.
                let mr = unsafe { reg(pd.raw(), offset, bytes, address, fd.as_raw_fd(), access.flags() | relaxed) };
                (mr, address, len, "a dmabuf (its driver may be too old: use nvidia-peermem, or staging)")
            }
        };
        match NonNull::new(mr) {
            Some(mr) => Ok(Self { mr, pd: pd.clone(), address, len, keep: Some(keep) }),
            None => Err(refused(device, io::Error::last_os_error(), len, what)),
        }
    }

    /// Its key in local work requests.
    pub(crate) fn lkey(&self) -> u32 {
        // SAFETY: the region is registered as long as `self` lives, and its keys never change.
        unsafe { (*self.mr.as_ptr()).lkey }
    }

    /// Its key in a peer's work requests.
    pub(crate) fn rkey(&self) -> u32 {
        // SAFETY: the region is registered as long as `self` lives, and its keys never change.
        unsafe { (*self.mr.as_ptr()).rkey }
    }

    /// Address of its first byte in work requests.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }
}

impl<K> Drop for Region<K> {
    fn drop(&mut self) {
        // SAFETY: the region was registered and is deregistered once.
        let rc = unsafe { (self.pd.device().lib().dereg_mr)(self.mr.as_ptr()) };
        match check(rc) {
            Ok(()) => {}
            // The device is gone, and with it every registration.
            Err(e) if gone(self.pd.device(), &e) => {}
            Err(error) => {
                tracing::error!(device = self.pd.device().name(), %error, "memory stays registered: it is never freed");
                // The device may still access it, so it must never be re-used.
                std::mem::forget(self.keep.take());
            }
        }
    }
}

impl<K> std::fmt::Debug for Region<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Region").field("address", &self.address).field("len", &self.len).finish_non_exhaustive()
    }
}

/// Whether an error means that the device was removed: the kernel destroys all objects on a device first. Commands fail with
/// EIO then, as they may on a broken device that still exists.
pub(crate) fn gone(device: &Device, e: &io::Error) -> bool {
    match e.raw_os_error() {
        Some(libc::ENODEV) => true,
        Some(libc::EIO) => !device.is_listed(),
        _ => false,
    }
}

/// Bytes of this process that devices have pinned; 0 if the kernel does not tell.
fn pinned(status: &std::path::Path) -> u64 {
    let text = std::fs::read_to_string(status).unwrap_or_default();
    let kib =
        text.lines().find_map(|l| l.strip_prefix("VmPin:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

fn refused(device: &Device, source: io::Error, need: u64, what: &'static str) -> VerbsError {
    // The kernel counts the pinned bytes of all registrations of the process.
    let need = pinned(std::path::Path::new("/proc/self/status")).saturating_add(need);
    if source.raw_os_error() == Some(libc::ENOMEM)
        && let Some(limit) = rustix::process::getrlimit(rustix::process::Resource::Memlock).current
        && limit < need
    {
        return VerbsError::Memlock { need, limit };
    }
    VerbsError::Register { device: device.name().into(), what, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pinned_memory_is_read_in_bytes() {
        let file = std::env::temp_dir().join(format!("kvferry-status-{}", std::process::id()));
        std::fs::write(&file, "VmLck:\t      12 kB\nVmPin:\t    2048 kB\nVmHWM:\t 7 kB\n").unwrap();
        assert_eq!(pinned(&file), 2 << 20);
        std::fs::write(&file, "Name: x\n").unwrap();
        assert_eq!(pinned(&file), 0);
        std::fs::remove_file(&file).unwrap();
    }
}
