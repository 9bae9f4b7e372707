//! This host's devices and their abilities, for `kvferry doctor`. Abilities are tried where possible.

use std::{
    ffi::c_void,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

use super::{
    device::{self, Device, Limits, Port, SYS, check},
    error::VerbsError,
    gid::{self, GidEntry},
    library::Library,
    memory::Pd,
};
use crate::memory::Mapping;

/// The result of trying an ability: the error says why the device lacks it.
pub(super) type Tried = Result<(), io::Error>;

/// Whether a device registers dmabufs.
#[derive(Debug)]
pub enum Dmabuf {
    /// A dmabuf was made, and registered or refused.
    Tried(Tried),
    /// The driver registers dmabufs, but none could be made here to try it.
    NotTried(io::Error),
}

/// A port and its addresses.
#[derive(Debug)]
pub struct PortReport {
    /// The port.
    pub port: Port,
    /// Its GIDs.
    pub gids: Vec<GidEntry>,
    /// Index of the GID that would be used on RoCE.
    pub chosen: Option<u8>,
}

/// A device.
#[derive(Debug)]
pub struct DeviceReport {
    /// Its name.
    pub name: String,
    /// Its limits.
    pub limits: Limits,
    /// Its ports.
    pub ports: Vec<PortReport>,
    /// Registration of ordinary memory.
    pub register: Tried,
    /// Registration for writes in any order. A device may accept this and keep the order anyway: verbs do not tell.
    pub relaxed_ordering: Tried,
    /// Registration without pinning.
    pub odp: Tried,
    /// Registration of a dmabuf, the form of GPU memory.
    pub dmabuf: Dmabuf,
}

/// A device's name, and its report or the reason for which there is none.
pub(super) type Surveyed = (String, Result<DeviceReport, VerbsError>);

/// All devices, each with an error if it cannot be opened.
pub fn survey() -> Result<Vec<Surveyed>, VerbsError> {
    let lib = Library::get()?;
    let names = device::names(Path::new(SYS));
    if names.is_empty() {
        return Err(VerbsError::NoDevice);
    }
    Ok(names.into_iter().map(|n| (n.clone(), look(lib, n))).collect())
}

const LOCAL_WRITE: i32 = 1;
const ON_DEMAND: i32 = 1 << 6;
const RELAXED_ORDERING: i32 = 1 << 20;
const PROBE: u64 = 1 << 16;

fn look(lib: &'static Library, name: String) -> Result<DeviceReport, VerbsError> {
    let device = Device::open(lib, &name)?;
    let limits = device.limits()?;
    let mut ports = Vec::new();
    for n in 1..=limits.ports {
        let gids = device.gids(n);
        let chosen = gid::choose(&gids, None).map(|e| e.index);
        ports.push(PortReport { port: device.port(n)?, gids, chosen });
    }
    let pd = Pd::new(device.clone())?;
    let memory = Mapping::anonymous(PROBE).map_err(|e| device.os("mmap", e))?;
    let at: *mut c_void = memory.base().as_ptr().cast();
    let len = PROBE as usize;
    let plain = |flags: i32| {
        // SAFETY: the domain and the memory are alive until the region is deregistered, in this function.
        let mr = unsafe { (lib.reg_mr)(pd.raw(), at, len, flags) };
        give_back(lib, mr)
    };
    let relaxed = match lib.reg_mr_iova2 {
        None => Err(io::Error::other("libibverbs is too old for it")),
        Some(register) => {
            // SAFETY: the domain and the memory are alive until the region is deregistered, in this function.
            let mr = unsafe { register(pd.raw(), at, len, at as u64, (LOCAL_WRITE | RELAXED_ORDERING) as u32) };
            give_back(lib, mr)
        }
    };
    let dmabuf = match lib.reg_dmabuf_mr {
        None => Dmabuf::Tried(Err(io::Error::other("libibverbs is too old for it"))),
        Some(register) => {
            let take = |fd: &OwnedFd| {
                // SAFETY: the domain is alive, and the descriptor is open, until the region is deregistered in this function.
                give_back(lib, unsafe { register(pd.raw(), 0, len, 0, fd.as_raw_fd(), LOCAL_WRITE) })
            };
            match udmabuf() {
                Ok(fd) => Dmabuf::Tried(take(&fd)),
                // A file that is not a dmabuf: a driver with dmabufs rejects the file, a driver without them the call.
                Err(why) => match memfd().and_then(|fd| take(&fd)) {
                    Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EBADF)) => Dmabuf::NotTried(why),
                    tried => Dmabuf::Tried(tried),
                },
            }
        }
    };
    Ok(DeviceReport {
        limits,
        ports,
        register: plain(LOCAL_WRITE),
        relaxed_ordering: relaxed,
        odp: plain(LOCAL_WRITE | ON_DEMAND),
        dmabuf,
        name,
    })
}

fn give_back(lib: &Library, mr: *mut ibverbs_sys::ibv_mr) -> Tried {
    if mr.is_null() {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was registered just now, and is deregistered once.
    check(unsafe { (lib.dereg_mr)(mr) })
}

fn memfd() -> io::Result<OwnedFd> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create("kvferry-probe", flags)?;
    rustix::fs::ftruncate(&fd, PROBE)?;
    Ok(fd)
}

/// A dmabuf of host memory, from the kernel's `udmabuf` driver.
fn udmabuf() -> io::Result<OwnedFd> {
    /// `struct udmabuf_create`.
    #[repr(C)]
    struct Create {
        memfd: u32,
        flags: u32,
        offset: u64,
        size: u64,
    }
    /// `_IOW('u', 0x42, struct udmabuf_create)`.
    const CREATE: libc::c_ulong = 0x4018_7542;
    const CLOEXEC: u32 = 1;

    let memfd = memfd()?;
    rustix::fs::fcntl_add_seals(&memfd, rustix::fs::SealFlags::SHRINK)?;
    let driver = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/udmabuf")
        .map_err(|e| io::Error::new(e.kind(), format!("/dev/udmabuf: {e}")))?;
    let create = Create { memfd: memfd.as_raw_fd() as u32, flags: CLOEXEC, offset: 0, size: PROBE };
    // SAFETY: the request belongs to this driver, and reads a value of this layout.
    let fd = unsafe { libc::ioctl(driver.as_raw_fd(), CREATE as _, &create) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call made this descriptor, which has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
