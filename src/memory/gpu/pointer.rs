//! What the driver knows about an address: whether it is GPU memory, whose, and how far it reaches.

use std::ffi::c_void;

use cudarc::driver::sys::{CUcontext, CUpointer_attribute as Attribute};

use super::{
    context,
    error::GpuError,
    library::{self, Library},
};

/// CU_MEMORYTYPE_DEVICE.
const DEVICE: u32 = 2;

/// CUDA_ERROR_INVALID_CONTEXT: the calling thread has no current context.
const INVALID_CONTEXT: u32 = 201;

/// What lies at an address.
struct Found {
    memory_type: u32,
    managed: bool,
    ordinal: i32,
    context: CUcontext,
    start: u64,
    size: usize,
    legacy_ipc: bool,
}

fn look(lib: &Library, address: u64) -> Result<Found, GpuError> {
    let (mut memory_type, mut managed, mut ordinal, mut legacy) = (0u32, 0u32, -1i32, 0u32);
    let (mut context, mut start, mut size): (CUcontext, u64, usize) = (std::ptr::null_mut(), 0, 0);
    let attributes = [
        Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
        Attribute::CU_POINTER_ATTRIBUTE_IS_MANAGED,
        Attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
        Attribute::CU_POINTER_ATTRIBUTE_CONTEXT,
        Attribute::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR,
        Attribute::CU_POINTER_ATTRIBUTE_RANGE_SIZE,
        Attribute::CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE,
    ];
    let mut values: [*mut c_void; 7] = [
        (&raw mut memory_type).cast(),
        (&raw mut managed).cast(),
        (&raw mut ordinal).cast(),
        (&raw mut context).cast(),
        (&raw mut start).cast(),
        (&raw mut size).cast(),
        (&raw mut legacy).cast(),
    ];
    // SAFETY: each value has its attribute's type. For an address that is not the driver's, the function writes zeros.
    let code = unsafe {
        (lib.cuPointerGetAttributes)(attributes.len() as u32, attributes.as_ptr(), values.as_mut_ptr(), address)
    };
    lib.check("cuPointerGetAttributes", code)?;
    // Some of the values are written as single bytes.
    let (managed, legacy_ipc) = (managed & 0xff != 0, legacy & 0xff != 0);
    Ok(Found { memory_type, managed, ordinal, context, start, size, legacy_ipc })
}

/// A part of a segment that lies in one allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    /// Its first byte.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// The allocation's first byte.
    pub start: u64,
    /// The allocation's bytes.
    pub size: u64,
    /// It can be shared by a legacy IPC handle; otherwise, perhaps, by a descriptor.
    pub legacy_ipc: bool,
}

/// The GPU that holds an address.
pub(super) fn ordinal(segment: usize, address: u64, len: u64) -> Result<u32, GpuError> {
    let lib = library::init()?;
    let found = match look(lib, address) {
        Err(GpuError::Call { code: INVALID_CONTEXT, .. }) => context::in_active(lib, || look(lib, address)),
        found => found,
    };
    let found = match found {
        Err(GpuError::Call { code: INVALID_CONTEXT, .. }) => {
            let why = "this process has no CUDA context, so it has no GPU memory".into();
            return Err(GpuError::NotGpuMemory { segment, address, len, why });
        }
        found => found?,
    };
    kind(&found).map_err(|why| GpuError::NotGpuMemory { segment, address, len, why: why.into() })?;
    Ok(found.ordinal.max(0) as u32)
}

fn kind(found: &Found) -> Result<(), &'static str> {
    match found {
        Found { memory_type: 0, .. } => Err("the CUDA driver does not know it: it is host memory, or not allocated"),
        Found { managed: true, .. } => Err("it is managed memory, which may move; allocate it with cudaMalloc"),
        Found { memory_type: DEVICE, .. } => Ok(()),
        _ => Err("it is pinned host memory; give it as host memory"),
    }
}

/// The allocations that a segment lies in, in order. `context` is the GPU's primary context.
pub(super) fn extents(
    lib: &Library,
    context: CUcontext,
    (gpu, first): (u32, usize),
    address: u64,
    len: u64,
) -> Result<Vec<Extent>, GpuError> {
    let not = |why: String| GpuError::NotGpuMemory { segment: first, address, len, why };
    let end = address.checked_add(len).ok_or_else(|| not("its end is past the last address".into()))?;
    let (mut found, mut at) = (Vec::new(), address);
    while at < end {
        let here = look(lib, at)?;
        kind(&here).map_err(|why| not(format!("at offset {}, {why}", at - address)))?;
        if here.ordinal != gpu as i32 {
            return Err(GpuError::SeveralDevices { segment: first, has: here.ordinal.max(0) as u32, first: gpu });
        }
        // Memory of the virtual memory functions belongs to no context.
        if !here.context.is_null() && here.context != context {
            return Err(not("it belongs to another context than the GPU's primary one".into()));
        }
        // For memory of the virtual memory functions, drivers name one mapping here and the whole reservation there.
        let (mut start, mut size) = (0, 0);
        // SAFETY: the function writes an address and a size.
        let code = unsafe { (lib.cuMemGetAddressRange_v2)(&mut start, &mut size, at) };
        if code != 0 {
            (start, size) = (here.start, here.size);
        }
        let to = start.saturating_add(size as u64);
        if at < start || to <= at {
            return Err(not(format!("the driver has no range for it at offset {}", at - address)));
        }
        let (stop, legacy_ipc) = (to.min(end), here.legacy_ipc);
        found.push(Extent { address: at, len: stop - at, start, size: size as u64, legacy_ipc });
        at = stop;
    }
    Ok(found)
}
