//! The memory of a rank, in host memory or on one GPU: segments that kvferry allocates, or segments of the engine.
//!
//! Owns its own segments, and keeps the engine's `keep` value alive with the engine's segments. Never frees a segment while a
//! clone is held, and never allocates in an access. Only [`Memory::at`] gives a pointer, and for GPU memory it fails: the host
//! cannot access GPU memory.

use std::{
    any::Any,
    fmt, io,
    ops::Range,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::Arc,
};

use kvferry_proto::{BadLayout, PoolLayout};
use parking_lot::Mutex;

use super::{
    gpu::{Allocation, Gpu, GpuError, GpuInfo, Window},
    mapping::{self, Mapping},
};
use crate::error::StartError;

/// A rank's memory: the segments that hold its pool's regions. A clone is another handle to the same memory.
///
/// ```
/// # use kvferry::{Memory, PoolLayout};
/// let layout = PoolLayout::uniform(64, 2, 4096, 16);
/// let memory = Memory::alloc(&layout.segments)?;
/// memory.check(&layout)?;
/// memory.write_from(0, 4096, b"block 1")?;
/// let mut back = [0; 7];
/// memory.read_into(0, 4096, &mut back)?;
/// assert_eq!(&back, b"block 1");
/// assert!(memory.write_from(0, layout.segments[0], b"past the end").is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Memory(Arc<Inner>);

struct Inner {
    base: Vec<NonNull<u8>>,
    lengths: Vec<u64>,
    owned: Option<Owned>,
    /// `None`: host memory.
    gpu: Option<GpuPart>,
    _keep: Option<Arc<dyn Any + Send + Sync>>,
}

/// The GPU that holds the memory.
struct GpuPart {
    /// Memory that kvferry allocated. Freed before the handle is dropped.
    _allocation: Option<Allocation>,
    gpu: Gpu,
    /// For accesses by the host.
    window: Mutex<Option<Window>>,
}

/// Where a pool lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Place {
    /// Host memory.
    Host,
    /// One GPU.
    Gpu {
        /// Its number in this process.
        ordinal: u32,
        /// Its UUID.
        uuid: [u8; 16],
    },
}

/// Segments that kvferry allocated.
struct Owned {
    files: Vec<OwnedFd>,
    mappings: Vec<Mapping>,
}

// SAFETY: the segments are address ranges that stay mapped as long as `Inner` lives (by `owned`, or by the contract of
// `from_raw`), whichever thread holds it; `keep` is Send and Sync.
unsafe impl Send for Inner {}
// SAFETY: shared access reads and writes bytes that are allowed to race (see `from_raw`), and never forms a reference to
// them.
unsafe impl Sync for Inner {}

impl Memory {
    /// Allocates zeroed memory: one sealed memfd for each segment, so that a consumer on the same host can map it. Lengths
    /// are in bytes. A page is backed at its first access; see [`Memory::touch`].
    pub fn alloc(segments: &[u64]) -> Result<Self, StartError> {
        let bytes = segments.iter().fold(0u64, |sum, &s| sum.saturating_add(s));
        let fail = |source: io::Error| StartError::Memory { bytes, source };
        if let Some(free) = available().filter(|&free| bytes > free) {
            // Without this check the allocation succeeds, and the process is killed when it uses the pages.
            return Err(fail(io::Error::new(
                io::ErrorKind::OutOfMemory,
                format!("only {free} bytes of memory are available"),
            )));
        }
        let mut owned = Owned { files: Vec::with_capacity(segments.len()), mappings: Vec::new() };
        for &len in segments {
            let (fd, mapping) = mapping::sealed("kvferry-pool", len).map_err(fail)?;
            owned.files.push(fd);
            owned.mappings.push(mapping);
        }
        Ok(Self(Arc::new(Inner {
            base: owned.mappings.iter().map(Mapping::base).collect(),
            lengths: segments.to_vec(),
            owned: Some(owned),
            gpu: None,
            _keep: None,
        })))
    }

    /// The engine's memory, or memory of kvferry's own with every page backed. Checked against the layout.
    pub(crate) fn for_layout(given: Option<Self>, layout: &PoolLayout) -> Result<Self, StartError> {
        let memory = match given {
            Some(memory) => memory,
            None => {
                let memory = Self::alloc(&layout.segments)?;
                memory.touch()?;
                memory
            }
        };
        memory.check(layout)?;
        Ok(memory)
    }

    /// Allocates zeroed memory that no other process can map: to kvferry it looks like an engine's own allocation.
    pub fn anonymous(segments: &[u64]) -> Result<Self, StartError> {
        let bytes = segments.iter().fold(0u64, |sum, &s| sum.saturating_add(s));
        let maps = segments.iter().map(|&len| Mapping::anonymous(len)).collect::<io::Result<Vec<_>>>();
        let maps = maps.map_err(|source| StartError::Memory { bytes, source })?;
        let raw: Vec<_> = maps.iter().zip(segments).map(|(m, &len)| (m.base(), len)).collect();
        // SAFETY: the mappings have these lengths, and live as long as the memory does: it keeps them.
        Ok(unsafe { Self::from_raw(&raw, Some(Arc::new(maps))) })
    }

    /// Takes memory that the engine owns: address and length in bytes of each segment. `keep` is dropped with the last
    /// clone, for memory whose owner can be held that way.
    ///
    /// # Safety
    /// Every segment must be valid for reads and writes of its whole length until the last clone of this `Memory` is gone
    /// and every lane that was given one is quiet. In that time it must not be unmapped, given back to an allocator, or
    /// covered by a Rust reference.
    ///
    /// Other threads, other processes and devices (the engine's own kernels among them) may read and write the same bytes
    /// at any time. Such races are part of this contract: kvferry copies bytes without interpreting them, and the fence
    /// discards bytes that raced. Apart from that the engine keeps offered blocks unchanged until they are freed, and does
    /// not touch the local blocks of a pull until the pull has ended.
    pub unsafe fn from_raw(segments: &[(NonNull<u8>, u64)], keep: Option<Arc<dyn Any + Send + Sync>>) -> Self {
        Self(Arc::new(Inner {
            base: segments.iter().map(|s| s.0).collect(),
            lengths: segments.iter().map(|s| s.1).collect(),
            owned: None,
            gpu: None,
            _keep: keep,
        }))
    }

    /// Allocates zeroed memory on a GPU: with the virtual memory functions, so that a consumer on the same host can map it, and
    /// for NICs where the GPU supports them. Lengths are in bytes.
    ///
    /// # Errors
    /// There is no usable driver or no such GPU, or the GPU has no memory left.
    pub fn alloc_gpu(ordinal: u32, segments: &[u64]) -> Result<Self, GpuError> {
        let gpu = Gpu::open(ordinal)?;
        let allocation = gpu.allocate(segments)?;
        let base = allocation.addresses().map(address_only).collect();
        Ok(Self::on_gpu(gpu, base, segments.to_vec(), Some(allocation), None))
    }

    /// Takes GPU memory that the engine owns: address and length in bytes of each segment, all on one GPU. They may come from
    /// `cudaMalloc` or from the virtual memory functions, with any number of mappings in a segment. `keep` is dropped with
    /// the last clone.
    ///
    /// # Errors
    /// There is no usable driver, a segment is not mapped GPU memory from its first to its last byte, it is managed memory or
    /// another context's than the GPU's primary one, or the segments lie on several GPUs.
    ///
    /// # Safety
    /// As for [`Memory::from_raw`], with the GPU's address space in place of this process's: every segment must stay mapped
    /// to the same memory until the last clone is gone and every lane that was given one is quiet.
    pub unsafe fn from_gpu(
        segments: &[(u64, u64)],
        keep: Option<Arc<dyn Any + Send + Sync>>,
    ) -> Result<Self, GpuError> {
        let gpu = Gpu::holding(segments)?;
        let base = segments.iter().map(|s| address_only(s.0)).collect();
        let lengths = segments.iter().map(|s| s.1).collect();
        Ok(Self::on_gpu(gpu, base, lengths, None, keep))
    }

    fn on_gpu(
        gpu: Gpu,
        base: Vec<NonNull<u8>>,
        lengths: Vec<u64>,
        allocation: Option<Allocation>,
        keep: Option<Arc<dyn Any + Send + Sync>>,
    ) -> Self {
        let gpu = Some(GpuPart { _allocation: allocation, gpu, window: Mutex::new(None) });
        Self(Arc::new(Inner { base, lengths, owned: None, gpu, _keep: keep }))
    }

    /// Where it lies.
    pub fn place(&self) -> Place {
        self.gpu().map_or(Place::Host, |gpu| Place::Gpu { ordinal: gpu.info().ordinal, uuid: gpu.info().uuid })
    }

    /// The GPU that holds it, as it was when it was opened; `None`: host memory.
    pub fn gpu_info(&self) -> Option<&GpuInfo> {
        self.gpu().map(Gpu::info)
    }

    /// The GPU that holds it; `None`: host memory.
    pub(crate) fn gpu(&self) -> Option<&Gpu> {
        self.0.gpu.as_ref().map(|p| &p.gpu)
    }

    /// Backs every page of allocated memory now, with huge pages where the system has them, and keeps the contents. Then
    /// the first pull causes no page faults, and copies of small blocks run about twice as fast. Takes about 0.3 s for a
    /// GiB. Does nothing for memory of the engine.
    pub fn touch(&self) -> Result<(), StartError> {
        let fail = |source| StartError::Memory { bytes: self.0.lengths.iter().sum(), source };
        self.0.owned.iter().flat_map(|o| &o.mappings).try_for_each(|m| m.touch().map_err(fail))
    }

    /// Length of each segment, in bytes.
    pub fn segments(&self) -> &[u64] {
        &self.0.lengths
    }

    /// Checks the layout's bounds, and that its segments are those of this memory.
    pub fn check(&self, layout: &PoolLayout) -> Result<(), BadLayout> {
        layout.check()?;
        let (here, there) = (self.segments(), &layout.segments[..]);
        if here.len() != there.len() {
            let (has, limit) = (there.len() as u64, here.len() as u64);
            return Err(BadLayout::TooMany { what: "segments of the layout, next to those of the memory", has, limit });
        }
        match here.iter().zip(there).find(|(here, there)| here != there) {
            Some((&limit, &has)) => {
                let what = "bytes of a segment in the layout, next to its length in memory";
                Err(BadLayout::TooMany { what, has, limit })
            }
            None => Ok(()),
        }
    }

    /// The files behind the segments, in order; `None` for memory of the engine, and for GPU memory.
    pub fn memfds(&self) -> Option<Vec<BorrowedFd<'_>>> {
        Some(self.0.owned.as_ref()?.files.iter().map(AsFd::as_fd).collect())
    }

    /// Address of a segment in this process, or in its GPU's address space; 0 when there is no such segment.
    pub fn base(&self, segment: u16) -> u64 {
        self.0.base.get(usize::from(segment)).map_or(0, |b| b.addr().get() as u64)
    }

    /// Copies bytes out of a segment, also of GPU memory, for which the call waits. Fails when they do not all lie in it. They
    /// may race with writes; see [`Memory::from_raw`].
    pub fn read_into(&self, segment: u16, offset: u64, into: &mut [u8]) -> io::Result<()> {
        if self.0.gpu.is_some() {
            return self.through_window(segment, offset, into.len() as u64, |window, at, range| {
                window.read(self, (segment, at), &mut into[range])
            });
        }
        let from = self.at(segment, offset, into.len() as u64)?;
        // SAFETY: `from` is valid for `into.len()` bytes. `into` is a Rust reference, so no segment covers it.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies bytes into a segment, also of GPU memory, for which the call waits. Fails, having written nothing, when they do
    /// not all fit.
    pub fn write_from(&self, segment: u16, offset: u64, from: &[u8]) -> io::Result<()> {
        if self.0.gpu.is_some() {
            return self.through_window(segment, offset, from.len() as u64, |window, at, range| {
                window.write(self, (segment, at), &from[range])
            });
        }
        let to = self.at(segment, offset, from.len() as u64)?;
        // SAFETY: `to` is valid for `from.len()` bytes. `from` is a Rust reference, so no segment covers it.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), from.len()) };
        Ok(())
    }

    /// Copies `len` bytes from another memory's `(segment, offset)` to this one's. Fails, having written nothing, when
    /// either side does not have them.
    pub fn copy_from(&self, from: &Memory, src: (u16, u64), dst: (u16, u64), len: u64) -> io::Result<()> {
        if self.0.gpu.is_some() || from.0.gpu.is_some() {
            from.address(src.0, src.1, len)?;
            self.address(dst.0, dst.1, len)?;
            let mut bytes = vec![0; usize::try_from(len).map_err(|_| outside())?];
            from.read_into(src.0, src.1, &mut bytes)?;
            return self.write_from(dst.0, dst.1, &bytes);
        }
        let (src, dst) = (from.at(src.0, src.1, len)?, self.at(dst.0, dst.1, len)?);
        // SAFETY: both are valid for `len` bytes. Two memories may be the same one, so the ranges may overlap.
        unsafe { std::ptr::copy(src.as_ptr(), dst.as_ptr(), len as usize) };
        Ok(())
    }

    /// Runs `step` for each part of a range of GPU memory that fits the window.
    fn through_window(
        &self,
        segment: u16,
        offset: u64,
        len: u64,
        mut step: impl FnMut(&mut Window, u64, Range<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        self.address(segment, offset, len)?;
        let Some(part) = &self.0.gpu else { return Err(outside()) };
        let mut window = part.window.lock();
        let mut done = 0;
        while done < len {
            let mut open = match window.take() {
                Some(open) => open,
                None => Window::new(&part.gpu)?,
            };
            let n = (len - done).min(Window::BYTES);
            // A window whose copy did not end is not used again.
            step(&mut open, offset + done, done as usize..(done + n) as usize)?;
            *window = Some(open);
            done += n;
        }
        Ok(())
    }

    /// The address of `len` bytes of a segment, for devices and for the GPU's thread. The host must not access it: for that
    /// there is [`Memory::at`].
    #[inline]
    pub(crate) fn address(&self, segment: u16, offset: u64, len: u64) -> io::Result<u64> {
        let i = usize::from(segment);
        match (self.0.base.get(i), self.0.lengths.get(i)) {
            (Some(base), Some(&has)) if offset.checked_add(len).is_some_and(|end| end <= has) => {
                Ok(base.addr().get() as u64 + offset)
            }
            _ => Err(outside()),
        }
    }

    /// The address of `len` bytes of a segment: valid for reads and writes of them as long as this memory lives. Fails for
    /// GPU memory.
    #[inline]
    pub(crate) fn at(&self, segment: u16, offset: u64, len: u64) -> io::Result<NonNull<u8>> {
        if self.0.gpu.is_some() {
            return Err(on_gpu());
        }
        let i = usize::from(segment);
        match (self.0.base.get(i), self.0.lengths.get(i)) {
            (Some(base), Some(&has)) if offset.checked_add(len).is_some_and(|end| end <= has) => {
                // SAFETY: `offset` is at most the segment's length, so the result stays in or just past its range.
                Ok(unsafe { base.add(offset as usize) })
            }
            _ => Err(outside()),
        }
    }
}

/// An address that the host never accesses. 0, of an empty segment, becomes a dangling one.
fn address_only(address: u64) -> NonNull<u8> {
    NonNull::new(std::ptr::without_provenance_mut(address as usize)).unwrap_or(NonNull::dangling())
}

#[cold]
fn on_gpu() -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, "the host cannot access GPU memory")
}

#[cold]
fn outside() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "outside the memory's segments")
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory").field("segments", &self.0.lengths).field("place", &self.place()).finish()
    }
}

/// Bytes of memory that are still available, as far as the system reports it.
fn available() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| {
        let line = info.lines().find_map(|l| l.strip_prefix(name))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
    };
    let host = field("MemAvailable:")?.saturating_add(field("SwapFree:").unwrap_or(0));
    // A container's own limit is at this path; on the host there is no such file.
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|t| t.trim().parse().ok());
    Some(group.map_or(host, |g: u64| host.min(g)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_access_leaves_a_segment_whatever_the_numbers() {
        let m = Memory::alloc(&[4096, 0, 100]).unwrap();
        let mut buf = [0; 8];
        assert!(m.read_into(0, 4088, &mut buf).is_ok());
        assert!(m.read_into(1, 0, &mut []).is_ok());
        for (segment, offset) in [(0, 4089), (0, u64::MAX), (0, u64::MAX - 7), (1, 0), (2, 93), (3, 0), (u16::MAX, 0)] {
            assert!(m.read_into(segment, offset, &mut buf).is_err(), "{segment} {offset}");
            assert!(m.write_from(segment, offset, &buf).is_err(), "{segment} {offset}");
        }
    }

    #[test]
    fn a_layout_must_match_its_memory() {
        let layout = PoolLayout::uniform(4, 2, 4096, 16);
        assert!(Memory::alloc(&layout.segments).unwrap().check(&layout).is_ok());
        assert!(Memory::alloc(&[4 * 4096]).unwrap().check(&layout).is_err());
        assert!(Memory::alloc(&[]).unwrap().check(&layout).is_err());
    }

    #[test]
    fn memory_of_the_engine_is_kept_as_long_as_a_clone_lives() {
        let keep: Arc<Vec<std::sync::atomic::AtomicU8>> = Arc::new((0..64).map(|_| 7.into()).collect());
        let base = NonNull::from(&keep[0]).cast();
        // SAFETY: `keep` holds 64 bytes at `base`, atomics that may be written through a shared reference.
        let m = unsafe { Memory::from_raw(&[(base, 64)], Some(keep.clone())) };
        assert_eq!(m.base(0), base.addr().get() as u64);
        assert_eq!(m.base(1), 0);
        assert!(m.memfds().is_none());
        m.write_from(0, 10, &[9]).unwrap();
        assert_eq!(keep[10].load(std::sync::atomic::Ordering::Relaxed), 9);
        let clone = m.clone();
        drop(m);
        assert_eq!(Arc::strong_count(&keep), 2);
        drop(clone);
        assert_eq!(Arc::strong_count(&keep), 1);
    }

    #[test]
    fn more_than_the_machine_has_is_refused_at_once() {
        let e = Memory::alloc(&[1 << 50, 1 << 50]).unwrap_err().to_string();
        assert!(e.contains("ask for fewer blocks"), "{e}");
        assert!(Memory::alloc(&[u64::MAX, u64::MAX]).is_err());
    }

    #[test]
    fn allocated_memory_is_sealed_and_touchable() {
        let m = Memory::alloc(&[(5 << 20) + 100, 0, 7]).unwrap();
        m.write_from(0, 3 << 20, b"kept").unwrap();
        m.touch().unwrap();
        let mut kept = [0; 4];
        m.read_into(0, 3 << 20, &mut kept).unwrap();
        assert_eq!(&kept, b"kept");
        let fds = m.memfds().unwrap();
        assert!(rustix::fs::fcntl_get_seals(fds[0]).unwrap().contains(mapping::SEALS));
        assert!(rustix::fs::ftruncate(fds[0], 0).is_err());
    }
}
