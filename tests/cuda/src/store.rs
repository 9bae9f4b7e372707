//! Physical device memory: one file for each allocation, in a folder that processes can share.
//!
//! A process holds an allocation by a shared `flock` on an open file description of it. The kernel releases the lock
//! when the last process that holds the description ends, also after `kill -9`. So memory is in use exactly while
//! somebody holds its file, and a file that nobody holds is deleted.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::control::{knobs, tally};
use crate::device::driver;
use crate::error::{Error, Result};

/// Fresh memory has this pattern, so that a read of unwritten memory shows.
const FRESH: u8 = 0xCD;

const PAGE: u64 = 4096;

/// The call that created an allocation, with the properties that importers must learn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// `cuMemAlloc`.
    Alloc,
    /// `cuMemCreate`.
    Create { handle_types: u32, rdma_capable: bool },
}

/// One physical allocation, mapped into this process where only the stand-in uses it.
pub(crate) struct Backing {
    file: Option<File>,
    pub(crate) name: String,
    pub(crate) ordinal: i32,
    pub(crate) size: u64,
    pub(crate) origin: Origin,
    /// Created here, not imported.
    pub(crate) own: bool,
    alias: *mut u8,
}

// SAFETY: `alias` is a shared mapping of `size` bytes that lives as long as the value; all access is by raw copies.
unsafe impl Send for Backing {}
// SAFETY: as above.
unsafe impl Sync for Backing {}

impl Backing {
    fn new(file: File, name: &str, own: bool) -> io::Result<Backing> {
        let (ordinal, origin) = parse(name).ok_or(io::ErrorKind::InvalidData)?;
        let size = file.metadata()?.len();
        // SAFETY: a fresh shared mapping of the file's `size` bytes, at an address of the kernel's choice.
        let alias = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if alias == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let backing =
            Backing { file: Some(file), name: name.to_owned(), ordinal, size, origin, own, alias: alias.cast() };
        if let Some(counter) = backing.counter() {
            counter.fetch_add(1, Relaxed);
        }
        Ok(backing)
    }

    /// Counts it while it lives. Memory of `cuMemAlloc` is counted by its address instead.
    fn counter(&self) -> Option<&'static AtomicU64> {
        match self.origin {
            Origin::Alloc => None,
            Origin::Create { .. } if self.own => Some(&tally().physical),
            Origin::Create { .. } => Some(&tally().imports),
        }
    }

    /// The bytes at `offset`, for accesses that stay below `size` while the value lives.
    pub(crate) fn at(&self, offset: u64) -> *mut u8 {
        self.alias.wrapping_add(offset as usize)
    }

    /// A descriptor of the same open file description: whoever holds it holds the memory.
    pub(crate) fn share(&self) -> Result<OwnedFd> {
        let file = self.file.as_ref().ok_or(Error::UNKNOWN)?;
        file.try_clone().map(OwnedFd::from).map_err(|_| Error::UNKNOWN)
    }

    /// A descriptor of an own open file description, which holds the memory and whose position is `offset`.
    pub(crate) fn reopen(&self, offset: u64) -> Result<OwnedFd> {
        use std::io::Seek;
        let file = self.file.as_ref().ok_or(Error::UNKNOWN)?;
        let reopen = || {
            let mut again =
                OpenOptions::new().read(true).write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
            lock(&again, libc::LOCK_SH)?;
            again.seek(io::SeekFrom::Start(offset))?;
            Ok(OwnedFd::from(again))
        };
        reopen().map_err(|_: io::Error| Error::UNKNOWN)
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        if let Some(counter) = self.counter() {
            counter.fetch_sub(1, Relaxed);
        }
        // SAFETY: the mapping that `new` made; nothing refers to it after the last owner.
        unsafe { libc::munmap(self.alias.cast(), self.size as usize) };
        self.file = None;
        // Deletes the file now, unless another process holds it.
        if let Ok(driver) = driver() {
            let _ = driver.store.used(self.ordinal);
        }
    }
}

pub(crate) struct Store {
    dir: PathBuf,
    /// Held while this process lives; a private folder without a holder is left over.
    _owner: File,
    next: AtomicU64,
}

impl Store {
    pub(crate) fn open(dir: Option<&Path>) -> io::Result<Store> {
        let private = dir.is_none();
        let dir = match dir {
            Some(dir) => dir.to_owned(),
            None => {
                remove_leftovers();
                // SAFETY: reads the process's user id.
                let user = unsafe { libc::getuid() };
                PathBuf::from(format!("{PRIVATE}{user}-{}", std::process::id()))
            }
        };
        let owner = own(&dir)?;
        let dir = dir.canonicalize()?;
        if private {
            // SAFETY: a function without arguments that the library keeps until the process ends.
            unsafe { libc::atexit(remove_private) };
        }
        Ok(Store { dir, _owner: owner, next: AtomicU64::new(0) })
    }

    /// Identifies the device `ordinal` of this folder, equal in all processes.
    pub(crate) fn uuid(&self, ordinal: i32) -> [u8; 16] {
        let mut uuid = [0; 16];
        for (i, half) in uuid.chunks_mut(8).enumerate() {
            // FNV-1a.
            let mut hash = 0xcbf2_9ce4_8422_2325_u64;
            let words = (ordinal as u32).to_le_bytes().into_iter().chain([i as u8]);
            for byte in self.dir.as_os_str().as_bytes().iter().copied().chain(words) {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
            }
            half.copy_from_slice(&hash.to_le_bytes());
        }
        uuid
    }

    /// Bytes of the device that somebody holds.
    pub(crate) fn used(&self, ordinal: i32) -> io::Result<u64> {
        let _exclusive = self.exclusive()?;
        self.sum(ordinal)
    }

    pub(crate) fn create(&self, ordinal: i32, size: u64, origin: Origin, total: u64) -> Result<Arc<Backing>> {
        let size = size.checked_next_multiple_of(PAGE).filter(|&s| s <= total).ok_or(Error::OUT_OF_MEMORY)?;
        knobs().allocate(size)?;
        let tag = match origin {
            Origin::Alloc => "a".to_owned(),
            Origin::Create { handle_types, rdma_capable } => format!("c{handle_types}r{}", u8::from(rdma_capable)),
        };
        let name = format!("{ordinal}-{}-{}-{tag}", std::process::id(), self.next.fetch_add(1, Relaxed));
        let made = || -> io::Result<Option<Backing>> {
            let _exclusive = self.exclusive()?;
            if self.sum(ordinal)? + size > total {
                return Ok(None);
            }
            let file = OpenOptions::new().read(true).write(true).create_new(true).open(self.dir.join(&name))?;
            lock(&file, libc::LOCK_SH)?;
            // SAFETY: an open descriptor.
            let code = unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, size as libc::off_t) };
            if code != 0 {
                let _ = fs::remove_file(self.dir.join(&name));
                return Err(io::Error::from_raw_os_error(code));
            }
            Backing::new(file, &name, true).map(Some)
        };
        match made() {
            Ok(Some(backing)) => {
                // SAFETY: the mapping has `size` bytes, and nobody else knows it yet.
                unsafe { backing.at(0).write_bytes(FRESH, size as usize) };
                Ok(Arc::new(backing))
            }
            Ok(None) => Err(Error::OUT_OF_MEMORY),
            Err(error) => {
                eprintln!("kvferry stand-in: no {size} bytes in {}: {error}", self.dir.display());
                Err(Error::OUT_OF_MEMORY)
            }
        }
    }

    /// Opens an allocation by name. It fails once nobody holds it.
    pub(crate) fn import(&self, name: &str) -> Result<Arc<Backing>> {
        parse(name).ok_or(Error::INVALID_HANDLE)?;
        let open = || {
            let _exclusive = self.exclusive()?;
            let path = self.dir.join(name);
            if !held(&path)? {
                fs::remove_file(&path)?;
                return Err(io::ErrorKind::NotFound.into());
            }
            let file = OpenOptions::new().read(true).write(true).open(&path)?;
            lock(&file, libc::LOCK_SH)?;
            Backing::new(file, name, false)
        };
        open().map(Arc::new).map_err(|_| Error::INVALID_VALUE)
    }

    /// Opens an allocation by a descriptor of it, which the caller keeps.
    pub(crate) fn adopt(&self, fd: i32) -> Result<Arc<Backing>> {
        let adopt = || {
            // SAFETY: any number is allowed; the kernel rejects one that is not an open descriptor.
            let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
            if copy < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: a descriptor that this function has just made.
            let file = unsafe { File::from_raw_fd(copy) };
            let meta = file.metadata()?;
            for entry in fs::read_dir(&self.dir)? {
                let entry = entry?;
                let is_it = entry.metadata().is_ok_and(|m| (m.dev(), m.ino()) == (meta.dev(), meta.ino()));
                if is_it {
                    return Backing::new(file, &entry.file_name().to_string_lossy(), false);
                }
            }
            Err(io::ErrorKind::NotFound.into())
        };
        adopt().map(Arc::new).map_err(|_| Error::INVALID_VALUE)
    }

    /// Serialises looking at locks and creating files among all processes of the folder.
    fn exclusive(&self) -> io::Result<File> {
        let file = open_or_create(&self.dir.join("lock"))?;
        lock(&file, libc::LOCK_EX)?;
        Ok(file)
    }

    fn sum(&self, ordinal: i32) -> io::Result<u64> {
        let mut sum = 0;
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            if parse(&entry.file_name().to_string_lossy()).is_none_or(|(of, _)| of != ordinal) {
                continue;
            }
            if held(&entry.path())? {
                sum += entry.metadata()?.len();
            } else {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(sum)
    }
}

const PRIVATE: &str = "/dev/shm/kvferry-standin-";

/// Ordinal and origin, from the name of an allocation's file.
fn parse(name: &str) -> Option<(i32, Origin)> {
    let mut parts = name.split('-');
    let ordinal = parts.next()?.parse().ok()?;
    let _creator: u32 = parts.next()?.parse().ok()?;
    let _number: u64 = parts.next()?.parse().ok()?;
    let tag = parts.next()?;
    let origin = match tag.strip_prefix('c') {
        None => (tag == "a").then_some(Origin::Alloc)?,
        Some(tag) => {
            let (handle_types, rdma) = tag.split_once('r')?;
            Origin::Create { handle_types: handle_types.parse().ok()?, rdma_capable: rdma == "1" }
        }
    };
    parts.next().is_none().then_some((ordinal, origin))
}

fn open_or_create(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

fn lock(file: &File, operation: i32) -> io::Result<()> {
    loop {
        // SAFETY: an open descriptor.
        if unsafe { libc::flock(file.as_raw_fd(), operation) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Whether a process holds the file. A file that cannot be opened counts as held.
fn held(path: &Path) -> io::Result<bool> {
    let file = File::open(path)?;
    match lock(&file, libc::LOCK_EX | libc::LOCK_NB) {
        Ok(()) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(true),
        Err(error) => Err(error),
    }
}

/// Removes the private folder at exit. Files that an importer holds live on without a name.
extern "C" fn remove_private() {
    let Ok(driver) = driver() else { return };
    let _ = fs::remove_dir_all(&driver.store.dir);
}

/// Creates the folder, and holds it against `remove_leftovers` of other processes.
fn own(dir: &Path) -> io::Result<File> {
    loop {
        fs::create_dir_all(dir)?;
        let path = dir.join("owner");
        let owner = match open_or_create(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            opened => opened?,
        };
        lock(&owner, libc::LOCK_SH)?;
        // A removal may have come between the creation and the lock.
        if fs::metadata(&path).is_ok_and(|m| owner.metadata().is_ok_and(|own| own.ino() == m.ino())) {
            return Ok(owner);
        }
    }
}

/// Removes private folders of processes that were killed.
fn remove_leftovers() {
    let Ok(entries) = fs::read_dir("/dev/shm") else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if !path.as_os_str().as_bytes().starts_with(PRIVATE.as_bytes()) {
            continue;
        }
        // The lock stays until the folder is gone, so that a new owner of the same name waits.
        let Ok(owner) = File::open(path.join("owner")) else { continue };
        if lock(&owner, libc::LOCK_EX | libc::LOCK_NB).is_ok() {
            let _ = fs::remove_dir_all(&path);
        }
    }
}
