//! GPU memory that kvferry allocates: with the virtual memory functions, so that it can be shared with another process as a
//! descriptor, and reached by NICs.

use std::ffi::c_uint;

use cudarc::driver::sys::{
    CUdeviceptr, CUmemAccess_flags, CUmemAccessDesc, CUmemAllocationGranularity_flags, CUmemAllocationHandleType,
    CUmemAllocationProp, CUmemAllocationType, CUmemGenericAllocationHandle, CUmemLocation, CUmemLocationType, CUstream,
};

use super::{Context, Gpu, error::GpuError, library::NOT_READY};

/// One allocation for each segment. Dropping it frees them, on the GPU's set-up thread.
pub(crate) struct Allocation {
    gpu: Gpu,
    ranges: Vec<(CUdeviceptr, usize)>,
}

impl Allocation {
    /// Allocates zeroed memory: one range for each segment, of at least its bytes.
    pub(crate) fn new(gpu: &Gpu, segments: &[u64]) -> Result<Self, GpuError> {
        let lengths = segments.to_vec();
        let handle = gpu.clone();
        gpu.call(move |context| {
            let mut this = Self { gpu: handle, ranges: Vec::with_capacity(lengths.len()) };
            for len in lengths {
                let range = if len == 0 { (0, 0) } else { map_new(context, len)? };
                this.ranges.push(range);
            }
            zero(context, &this.ranges)?;
            Ok(this)
        })
    }

    /// The first byte of each segment; 0 for an empty one.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = u64> {
        self.ranges.iter().map(|r| r.0)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let ranges = std::mem::take(&mut self.ranges);
        self.gpu.set_up(move |context| {
            for (at, size) in ranges.into_iter().filter(|r| r.1 > 0) {
                unmap(context, at, size);
            }
        });
    }
}

/// The properties of memory that can be shared as a descriptor.
fn properties(context: &Context, rdma: bool) -> CUmemAllocationProp {
    // SAFETY: a `CUmemAllocationProp` is plain data for which zero bytes are valid.
    let mut properties: CUmemAllocationProp = unsafe { std::mem::zeroed() };
    properties.type_ = CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.requestedHandleTypes = CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    properties.location = location(context);
    // Without it a NIC refuses the memory with "Bad address" (vLLM #29569).
    properties.allocFlags.gpuDirectRDMACapable = rdma.into();
    properties
}

fn location(context: &Context) -> CUmemLocation {
    CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: context.ordinal as i32 }
}

fn map_new(context: &Context, len: u64) -> Result<(CUdeviceptr, usize), GpuError> {
    let lib = context.lib;
    let info = super::context::describe(lib, context.ordinal)?;
    let properties = properties(context, info.rdma);
    let mut granularity = 0;
    let recommended = CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
    // SAFETY: the function reads the properties and writes one number.
    let code = unsafe { (lib.cuMemGetAllocationGranularity)(&mut granularity, &properties, recommended) };
    lib.check("cuMemGetAllocationGranularity", code)?;
    let size = usize::try_from(len).ok().and_then(|n| n.checked_next_multiple_of(granularity.max(1)));
    let size = size.ok_or(GpuError::Call { call: "cuMemCreate", code: 2, text: "out of memory".into() })?;
    let mut handle: CUmemGenericAllocationHandle = 0;
    // SAFETY: the function reads the properties and writes one handle.
    lib.check("cuMemCreate", unsafe { (lib.cuMemCreate)(&mut handle, size, &properties, 0) })?;
    let mapped = map(context, handle, size);
    // The mapping keeps the memory.
    // SAFETY: the handle is ours.
    let _ = unsafe { (lib.cuMemRelease)(handle) };
    mapped.map(|at| (at, size))
}

/// Maps an allocation at an address of the driver's choice, for reads and writes.
pub(super) fn map(
    context: &Context,
    handle: CUmemGenericAllocationHandle,
    size: usize,
) -> Result<CUdeviceptr, GpuError> {
    let lib = context.lib;
    let mut at = 0;
    // SAFETY: the function writes one address.
    lib.check("cuMemAddressReserve", unsafe { (lib.cuMemAddressReserve)(&mut at, size, 0, 0, 0) })?;
    // SAFETY: the range was reserved just now, and the allocation exists.
    let mapped = lib.check("cuMemMap", unsafe { (lib.cuMemMap)(at, size, 0, handle, 0) });
    if let Err(e) = mapped {
        // SAFETY: the range is ours, and empty.
        let _ = unsafe { (lib.cuMemAddressFree)(at, size) };
        return Err(e);
    }
    let access =
        CUmemAccessDesc { location: location(context), flags: CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE };
    // SAFETY: the range is mapped; the function reads one description.
    let set = lib.check("cuMemSetAccess", unsafe { (lib.cuMemSetAccess)(at, size, &access, 1) });
    if let Err(e) = set {
        unmap(context, at, size);
        return Err(e);
    }
    Ok(at)
}

/// Unmaps a range that [`map`] has mapped.
pub(super) fn unmap(context: &Context, at: CUdeviceptr, size: usize) {
    let lib = context.lib;
    // SAFETY: the range is ours, and no copy touches it any more: jobs keep what they touch.
    let unmapped = lib.check("cuMemUnmap", unsafe { (lib.cuMemUnmap)(at, size) });
    // SAFETY: as above.
    let freed = lib.check("cuMemAddressFree", unsafe { (lib.cuMemAddressFree)(at, size) });
    if let Err(error) = unmapped.and(freed) {
        tracing::warn!(gpu = context.ordinal, %error, "GPU memory cannot be unmapped");
    }
}

fn zero(context: &Context, ranges: &[(CUdeviceptr, usize)]) -> Result<(), GpuError> {
    /// CU_STREAM_NON_BLOCKING.
    const NON_BLOCKING: c_uint = 1;
    let lib = context.lib;
    let mut stream: CUstream = std::ptr::null_mut();
    // SAFETY: the context is current; the function writes one handle.
    let code = unsafe { (lib.cuStreamCreateWithPriority)(&mut stream, NON_BLOCKING, 0) };
    lib.check("cuStreamCreateWithPriority", code)?;
    let work = || {
        for &(at, size) in ranges.iter().filter(|r| r.1 > 0) {
            // SAFETY: the range is mapped and ours.
            lib.check("cuMemsetD8Async", unsafe { (lib.cuMemsetD8Async)(at, 0, size, stream) })?;
        }
        let event = context.event()?;
        // SAFETY: both are ours.
        let mut done = lib.check("cuEventRecord", unsafe { (lib.cuEventRecord)(event, stream) });
        while done.is_ok() {
            // SAFETY: the event is ours.
            match unsafe { (lib.cuEventQuery)(event) } {
                NOT_READY => std::thread::yield_now(),
                code => {
                    done = lib.check("cuEventQuery", code);
                    break;
                }
            }
        }
        // SAFETY: the event is ours.
        let _ = unsafe { (lib.cuEventDestroy_v2)(event) };
        done
    };
    let done = work();
    // SAFETY: the stream is ours.
    let _ = unsafe { (lib.cuStreamDestroy_v2)(stream) };
    done
}
