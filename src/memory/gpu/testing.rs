//! GPU memory as engines allocate it, for tests. It is never freed, and its context is kept.

use cudarc::driver::sys::{
    CUmemAccess_flags, CUmemAccessDesc, CUmemAllocationHandleType, CUmemAllocationProp, CUmemAllocationType,
    CUmemLocation, CUmemLocationType,
};

use super::Gpu;

/// A GPU whose context outlives every pool, as an engine's does.
fn engine(ordinal: u32) -> &'static Gpu {
    Box::leak(Box::new(Gpu::open(ordinal).expect("a GPU")))
}

/// An allocation of `cudaMalloc`.
pub(crate) fn malloc(ordinal: u32, len: u64) -> u64 {
    engine(ordinal)
        .call(move |c| {
            let mut at = 0;
            // SAFETY: the context is current; the function writes one address.
            c.lib.check("cuMemAlloc", unsafe { (c.lib.cuMemAlloc_v2)(&mut at, len as usize) })?;
            Ok(at)
        })
        .expect("memory")
}

/// One range of `pieces` allocations of `piece` bytes each, as PyTorch's expandable segments are.
pub(crate) fn expandable(ordinal: u32, piece: u64, pieces: u64) -> u64 {
    engine(ordinal)
        .call(move |c| {
            let (lib, size) = (c.lib, piece as usize);
            let location = CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: ordinal as i32 };
            // SAFETY: a `CUmemAllocationProp` is plain data for which zero bytes are valid.
            let mut properties: CUmemAllocationProp = unsafe { std::mem::zeroed() };
            properties.type_ = CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
            properties.requestedHandleTypes = CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
            properties.location = location;
            let access = CUmemAccessDesc { location, flags: CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE };
            let whole = size * pieces as usize;
            let mut at = 0;
            // SAFETY: the function writes one address.
            lib.check("cuMemAddressReserve", unsafe { (lib.cuMemAddressReserve)(&mut at, whole, 0, 0, 0) })?;
            for i in 0..pieces {
                let mut handle = 0;
                // SAFETY: the function reads the properties and writes one handle.
                lib.check("cuMemCreate", unsafe { (lib.cuMemCreate)(&mut handle, size, &properties, 0) })?;
                // SAFETY: the range was reserved above, and the allocation exists.
                lib.check("cuMemMap", unsafe { (lib.cuMemMap)(at + i * piece, size, 0, handle, 0) })?;
                // SAFETY: the handle is ours; the mapping keeps the memory.
                lib.check("cuMemRelease", unsafe { (lib.cuMemRelease)(handle) })?;
            }
            // SAFETY: the range is mapped; the function reads one description.
            lib.check("cuMemSetAccess", unsafe { (lib.cuMemSetAccess)(at, whole, &access, 1) })?;
            Ok(at)
        })
        .expect("memory")
}
