//! GPU memory of another process of this host: exported by its owner, mapped here for reads.
//!
//! An import keeps the memory of a dead owner allocated, so it is closed as soon as its lane ends, and when its copies have
//! ended: see [`Imported`].

use std::{
    collections::HashMap,
    ffi::{c_char, c_void},
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    sync::{Arc, Weak},
};

use cudarc::driver::sys::{
    CUdeviceptr, CUipcMemHandle, CUmemAllocationHandleType, CUmemGenericAllocationHandle, CUmemRangeHandleType,
};

use super::{
    Context, Gpu, alloc,
    error::GpuError,
    exchange::{Exported, Handle, Part},
    pointer,
    queue::Piece,
};
use crate::memory::Memory;

const DESCRIPTOR: CUmemAllocationHandleType = CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

/// Exports the segments of a pool: legacy handles for memory of `cudaMalloc`, descriptors for memory of the virtual memory
/// functions.
pub(super) fn export(context: &Context, segments: &[(u64, u64)]) -> Result<Exported, GpuError> {
    let mut exported = Exported::default();
    let mut known: HashMap<u64, u32> = HashMap::new();
    for (segment, &(address, len)) in segments.iter().enumerate() {
        let extents = pointer::extents(context.lib, context.raw(), (context.ordinal, segment), address, len)?;
        for e in extents {
            let allocation = match known.get(&e.start) {
                Some(&known) => known,
                None => {
                    let handle = if e.legacy_ipc {
                        Handle::Legacy(legacy(context, e.address)?)
                    } else {
                        exported.files.push(descriptor(context, e.address)?);
                        Handle::Descriptor
                    };
                    let index = exported.allocations.len() as u32;
                    exported.allocations.push((handle, e.size));
                    known.insert(e.start, index);
                    index
                }
            };
            let (at, offset) = (e.address - address, e.address - e.start);
            exported.parts.push(Part { segment: segment as u16, at, len: e.len, allocation, offset });
        }
    }
    Ok(exported)
}

fn legacy(context: &Context, address: u64) -> Result<[u8; 64], GpuError> {
    let mut handle = CUipcMemHandle { reserved: [0; 64] };
    // SAFETY: the function writes one handle.
    context.lib.check("cuIpcGetMemHandle", unsafe { (context.lib.cuIpcGetMemHandle)(&mut handle, address) })?;
    Ok(handle.reserved.map(|c| c as u8))
}

fn descriptor(context: &Context, address: u64) -> Result<OwnedFd, GpuError> {
    let lib = context.lib;
    let mut handle: CUmemGenericAllocationHandle = 0;
    let at: *mut c_void = std::ptr::with_exposed_provenance_mut(address as usize);
    // SAFETY: the function writes one handle; it refuses an address that is not mapped memory.
    lib.check("cuMemRetainAllocationHandle", unsafe { (lib.cuMemRetainAllocationHandle)(&mut handle, at) })?;
    let mut fd: RawFd = -1;
    // SAFETY: the function writes one descriptor.
    let code = unsafe { (lib.cuMemExportToShareableHandle)((&raw mut fd).cast(), handle, DESCRIPTOR, 0) };
    let exported = lib.check("cuMemExportToShareableHandle", code);
    // SAFETY: the handle was retained above.
    let _ = unsafe { (lib.cuMemRelease)(handle) };
    exported?;
    // SAFETY: the driver has opened the descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Exports a range as a dmabuf, and returns the range's offset in it. The range is widened to whole pages, as the driver
/// demands. Flags are 0: the PCIe mapping fails, or breaks at the first READ, with `ibv_reg_dmabuf_mr` (UCX #11571, #11584).
pub(super) fn dmabuf(context: &Context, address: u64, len: u64) -> Result<(OwnedFd, u64), GpuError> {
    let symbol = "cuMemGetHandleForAddressRange";
    let Some(get) = context.lib.cuMemGetHandleForAddressRange else { return Err(GpuError::MissingSymbol { symbol }) };
    let page = rustix::param::page_size() as u64;
    let start = address / page * page;
    let size = (address + len - start).next_multiple_of(page) as usize;
    let mut fd: RawFd = -1;
    let kind = CUmemRangeHandleType::CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD;
    // SAFETY: the function writes one descriptor; it refuses a range that is not all mapped memory.
    context.lib.check(symbol, unsafe { get((&raw mut fd).cast(), start, size, kind, 0) })?;
    // SAFETY: the driver has opened the descriptor for us.
    Ok((unsafe { OwnedFd::from_raw_fd(fd) }, address - start))
}

/// One allocation of another process, mapped here. Dropping it closes it, on the GPU's set-up thread.
pub(super) struct Mapped {
    gpu: Gpu,
    at: CUdeviceptr,
    /// Its bytes, by the driver.
    has: u64,
    /// Bytes of a mapping of the virtual memory functions; `None`: opened by a legacy handle.
    size: Option<usize>,
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let (at, size) = (self.at, self.size);
        self.gpu.set_up(move |context| match size {
            Some(size) => alloc::unmap(context, at, size),
            None => {
                // SAFETY: the mapping is ours, and no copy touches it any more: jobs keep what they touch.
                let code = unsafe { (context.lib.cuIpcCloseMemHandle)(at) };
                if let Err(error) = context.lib.check("cuIpcCloseMemHandle", code) {
                    tracing::warn!(gpu = context.ordinal, %error, "a peer's GPU memory cannot be closed");
                }
            }
        });
    }
}

/// Allocations that a GPU's set-up thread has opened, by their legacy handles: each is opened once. Drivers count a second open or
/// refuse it.
pub(super) type Opened = HashMap<[u8; 64], Weak<Mapped>>;

/// The pool of another process, mapped here. Keep it in a job's `keep` as well: it is closed when the last user is gone.
pub(crate) struct Imported {
    /// For each segment: its parts, ascending by offset, as offset, length and address.
    segments: Vec<Vec<(u64, u64, u64)>>,
    _mapped: Vec<Arc<Mapped>>,
}

impl std::fmt::Debug for Imported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Imported").field("segments", &self.segments.len()).finish_non_exhaustive()
    }
}

/// Opens what [`export`] has exported. `lengths` are the segments' in the peer's layout; the parts must fill them.
pub(super) fn import(context: &Context, gpu: &Gpu, exported: &Exported, lengths: &[u64]) -> Result<Imported, GpuError> {
    let mut files = exported.files.iter();
    let mut mapped = Vec::with_capacity(exported.allocations.len());
    for (handle, size) in &exported.allocations {
        mapped.push(match handle {
            Handle::Legacy(handle) => open(context, gpu, handle, *size)?,
            Handle::Descriptor => {
                let fd = files.next().ok_or_else(|| malformed("a descriptor is missing"))?;
                Arc::new(map(context, gpu, fd, *size)?)
            }
        });
    }
    let mut segments = vec![Vec::new(); lengths.len()];
    for p in &exported.parts {
        let allocation = mapped.get(p.allocation as usize).ok_or_else(|| malformed("a part names no allocation"))?;
        let segment = segments.get_mut(usize::from(p.segment)).ok_or_else(|| malformed("a part names no segment"))?;
        // The parts before this one end within the segment.
        let filled = segment.last().map_or(0, |(at, len, _): &(u64, u64, u64)| at + len);
        let inside = |offset: u64, has: u64| offset.checked_add(p.len).is_some_and(|end| end <= has);
        let len = lengths[usize::from(p.segment)];
        if !inside(p.offset, allocation.has) || !inside(p.at, len) || p.at != filled || p.len == 0 {
            return Err(malformed("a part is out of bounds"));
        }
        segment.push((p.at, p.len, allocation.at + p.offset));
    }
    let full = |(parts, len): (&Vec<(u64, u64, u64)>, &u64)| parts.last().map_or(0, |(at, n, _)| at + n) == *len;
    if !segments.iter().zip(lengths).all(full) {
        return Err(malformed("the parts do not fill the segments"));
    }
    Ok(Imported { segments, _mapped: mapped })
}

fn malformed(what: &str) -> GpuError {
    GpuError::Os { what: "the peer's GPU memory", error: what.into() }
}

fn open(context: &Context, gpu: &Gpu, handle: &[u8; 64], size: u64) -> Result<Arc<Mapped>, GpuError> {
    /// CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, for memory of another GPU.
    const LAZY_PEER_ACCESS: u32 = 1;
    let lib = context.lib;
    let mut opened = context.opened.borrow_mut();
    opened.retain(|_, m| m.strong_count() > 0);
    // The peer says how long its allocation is; the driver knows.
    let checked = |mapped: Arc<Mapped>| match mapped.has >= size {
        true => Ok(mapped),
        false => Err(malformed("an allocation is shorter than its owner says")),
    };
    if let Some(mapped) = opened.get(handle).and_then(Weak::upgrade) {
        return checked(mapped);
    }
    let mut at = 0;
    let raw = CUipcMemHandle { reserved: handle.map(|b| b as c_char) };
    // SAFETY: the function reads the handle and writes one address; it refuses a malformed handle.
    lib.check("cuIpcOpenMemHandle", unsafe { (lib.cuIpcOpenMemHandle_v2)(&mut at, raw, LAZY_PEER_ACCESS) })?;
    let mut mapped = Mapped { gpu: gpu.clone(), at, size: None, has: 0 };
    let (mut start, mut has) = (0, 0);
    // SAFETY: the function writes an address and a size.
    lib.check("cuMemGetAddressRange", unsafe { (lib.cuMemGetAddressRange_v2)(&mut start, &mut has, at) })?;
    mapped.has = if start == at { has as u64 } else { 0 };
    let mapped = Arc::new(mapped);
    opened.insert(*handle, Arc::downgrade(&mapped));
    checked(mapped)
}

fn map(context: &Context, gpu: &Gpu, fd: &OwnedFd, size: u64) -> Result<Mapped, GpuError> {
    let lib = context.lib;
    let size = usize::try_from(size).map_err(|_| malformed("an allocation is too long"))?;
    let mut handle: CUmemGenericAllocationHandle = 0;
    // For this handle type the driver takes the descriptor itself in place of a pointer to it.
    let os: *mut c_void = std::ptr::without_provenance_mut(fd.as_raw_fd() as usize);
    // SAFETY: the function duplicates what it needs of the descriptor, and writes one handle.
    let code = unsafe { (lib.cuMemImportFromShareableHandle)(&mut handle, os, DESCRIPTOR) };
    lib.check("cuMemImportFromShareableHandle", code)?;
    let at = alloc::map(context, handle, size);
    // SAFETY: the handle is ours; the mapping keeps the memory.
    let _ = unsafe { (lib.cuMemRelease)(handle) };
    // The driver has refused to map more than the allocation has.
    Ok(Mapped { gpu: gpu.clone(), at: at?, size: Some(size), has: size as u64 })
}

impl Imported {
    /// Appends the copies of `len` bytes of the peer's segment to local memory: more than one where allocations meet. Fails
    /// when either side does not have them.
    pub(crate) fn pieces(
        &self,
        src: (u16, u64),
        dst: (&Memory, u16, u64),
        len: u64,
        into: &mut Vec<Piece>,
    ) -> io::Result<()> {
        let outside = || io::Error::new(io::ErrorKind::InvalidInput, "outside the peer's segments");
        let parts = self.segments.get(usize::from(src.0)).ok_or_else(outside)?;
        let end = src.1.checked_add(len).ok_or_else(outside)?;
        if parts.last().is_none_or(|(at, n, _)| end > at + n) {
            return Err(outside());
        }
        let first = parts.partition_point(|(at, n, _)| at + n <= src.1);
        let mut from = src.1;
        for (at, n, address) in &parts[first..] {
            if from >= end {
                break;
            }
            let stop = end.min(at + n);
            let to = (dst.0, dst.1, dst.2 + (from - src.1));
            into.push(Piece::from_mapped(address + (from - at), to, stop - from)?);
            from = stop;
        }
        Ok(())
    }
}
