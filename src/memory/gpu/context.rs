//! The primary context of a GPU, as the GPU's threads and an engine's thread use it.

use std::{
    cell::RefCell,
    ffi::{CStr, c_int},
};

use cudarc::driver::sys::{CUcontext, CUdevice, CUdevice_attribute as Attribute, CUevent, CUstream, CUuuid};

use super::{
    error::GpuError,
    handle::GpuInfo,
    library::{self, Library},
    share::Opened,
    stream::CudaStream,
};

/// CU_STREAM_CAPTURE_MODE_RELAXED: calls of this thread neither fail during nor invalidate another thread's graph capture.
const RELAXED: u32 = 2;
/// CU_EVENT_DISABLE_TIMING: an event without a time stamp is cheaper.
const NO_TIMING: u32 = 2;
/// GPU_DIRECT_RDMA_WRITES_ORDERING from which the owner's kernels see a NIC's writes in order: OWNER.
const ORDERED_FOR_OWNER: c_int = 100;
/// The host's bit of GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS.
const FLUSH_BY_HOST: c_int = 1;

/// A GPU's primary context, retained. Belongs to one of the GPU's threads, where it is current.
pub(crate) struct Context {
    pub(super) lib: &'static Library,
    pub(super) device: CUdevice,
    pub(super) ordinal: u32,
    /// Memory of other processes that its thread has opened.
    pub(super) opened: RefCell<Opened>,
    raw: CUcontext,
}

impl Context {
    /// Retains the primary context, and makes it current in this thread, with a relaxed capture mode.
    pub(super) fn open(ordinal: u32) -> Result<Self, GpuError> {
        let lib = library::init()?;
        let device = device(lib, ordinal)?;
        let mut raw: CUcontext = std::ptr::null_mut();
        // SAFETY: the device exists; the function writes one handle.
        lib.check("cuDevicePrimaryCtxRetain", unsafe { (lib.cuDevicePrimaryCtxRetain)(&mut raw, device) })?;
        let this = Self { lib, device, ordinal, opened: RefCell::default(), raw };
        // SAFETY: the context is retained until `this` is dropped.
        lib.check("cuCtxSetCurrent", unsafe { (lib.cuCtxSetCurrent)(raw) })?;
        let mut mode = RELAXED;
        // SAFETY: the function reads and writes one number.
        let relaxed = unsafe { (lib.cuThreadExchangeStreamCaptureMode)(&mut mode) };
        lib.check("cuThreadExchangeStreamCaptureMode", relaxed)?;
        Ok(this)
    }

    pub(super) fn raw(&self) -> CUcontext {
        self.raw
    }

    /// A new event.
    pub(super) fn event(&self) -> Result<CUevent, GpuError> {
        new_event(self.lib)
    }

    /// Bytes of device memory: free, and in total.
    #[cfg(test)]
    pub(super) fn memory(&self) -> Result<(u64, u64), GpuError> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is current; the function writes two numbers.
        self.lib.check("cuMemGetInfo", unsafe { (self.lib.cuMemGetInfo_v2)(&mut free, &mut total) })?;
        Ok((free as u64, total as u64))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the context was retained once. A failure means that the process or the context ends anyway.
        let _ = unsafe { (self.lib.cuDevicePrimaryCtxRelease_v2)(self.device) };
    }
}

fn new_event(lib: &Library) -> Result<CUevent, GpuError> {
    let mut event: CUevent = std::ptr::null_mut();
    // SAFETY: a context is current; the function writes one handle.
    lib.check("cuEventCreate", unsafe { (lib.cuEventCreate)(&mut event, NO_TIMING) })?;
    Ok(event)
}

fn count(lib: &Library) -> Result<u32, GpuError> {
    let mut n = 0;
    // SAFETY: the function writes one int.
    lib.check("cuDeviceGetCount", unsafe { (lib.cuDeviceGetCount)(&mut n) })?;
    Ok(n.max(0) as u32)
}

pub(super) fn device(lib: &Library, ordinal: u32) -> Result<CUdevice, GpuError> {
    let devices = count(lib)?;
    if ordinal >= devices {
        return Err(GpuError::NoSuchDevice { ordinal, devices });
    }
    let mut device = 0;
    // SAFETY: the ordinal is in range; the function writes one handle.
    lib.check("cuDeviceGet", unsafe { (lib.cuDeviceGet)(&mut device, ordinal as c_int) })?;
    Ok(device)
}

/// Describes a GPU. Creates no context.
pub(super) fn describe(lib: &Library, ordinal: u32) -> Result<GpuInfo, GpuError> {
    let device = device(lib, ordinal)?;
    let attribute = |a: Attribute| {
        let mut value = 0;
        // SAFETY: the device exists; the function writes one int. An old driver refuses an attribute that it does not know.
        let code = unsafe { (lib.cuDeviceGetAttribute)(&mut value, a, device) };
        if code == 0 { value } else { 0 }
    };
    let mut text = [0; 256];
    let mut read = |call: &'static str, f: unsafe extern "C" fn(*mut _, c_int, CUdevice) -> u32| {
        // SAFETY: the function writes at most as many bytes as it is told, the zero byte included.
        lib.check(call, unsafe { f(text.as_mut_ptr(), text.len() as c_int, device) })?;
        // SAFETY: the text ends with a zero byte.
        Ok::<_, GpuError>(unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy().into_owned())
    };
    let name = read("cuDeviceGetName", lib.cuDeviceGetName)?;
    let pci = read("cuDeviceGetPCIBusId", lib.cuDeviceGetPCIBusId)?;
    let mut uuid = CUuuid { bytes: [0; 16] };
    // SAFETY: the function writes one UUID.
    lib.check("cuDeviceGetUuid", unsafe { (lib.cuDeviceGetUuid_v2)(&mut uuid, device) })?;
    let mut memory = 0;
    // SAFETY: the function writes one number.
    lib.check("cuDeviceTotalMem", unsafe { (lib.cuDeviceTotalMem_v2)(&mut memory, device) })?;
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
    let is = |a| attribute(a) > 0;
    let flushes = attribute(Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS) & FLUSH_BY_HOST != 0;
    Ok(GpuInfo {
        ordinal,
        name,
        pci,
        uuid: uuid.bytes.map(|b| b as u8),
        memory: memory as u64,
        capability: (major.max(0) as u32, minor.max(0) as u32),
        driver: lib.version.max(0) as u32,
        rdma: is(Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED),
        dmabuf: lib.cuMemGetHandleForAddressRange.is_some() && is(Attribute::CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED),
        ordered: attribute(Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING) >= ORDERED_FOR_OWNER,
        flush: lib.cuFlushGPUDirectRDMAWrites.is_some() && flushes,
        shareable: is(Attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED)
            && is(Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED),
        kernel: None,
        batch: lib.cuMemcpyBatchAsync.is_some(),
    })
}

/// Describes every GPU.
pub(super) fn survey() -> Result<Vec<GpuInfo>, GpuError> {
    let lib = library::init()?;
    (0..count(lib)?).map(|i| describe(lib, i)).collect()
}

/// Records a new event on an engine's stream, in the calling thread, and leaves the thread's current context as it was.
pub(super) fn record(ordinal: u32, stream: CudaStream) -> Result<usize, GpuError> {
    let lib = library::init()?;
    let context = Context::borrow(lib, ordinal)?;
    // SAFETY: the context is retained.
    lib.check("cuCtxPushCurrent", unsafe { (lib.cuCtxPushCurrent_v2)(context.raw) })?;
    let mut mode = RELAXED;
    // SAFETY: the function reads and writes one number; the former mode is restored below.
    let relaxed = unsafe { (lib.cuThreadExchangeStreamCaptureMode)(&mut mode) };
    let recorded = record_here(lib, stream.raw() as CUstream);
    if relaxed == 0 {
        // SAFETY: as above.
        let _ = unsafe { (lib.cuThreadExchangeStreamCaptureMode)(&mut mode) };
    }
    let mut popped: CUcontext = std::ptr::null_mut();
    // SAFETY: the context was pushed above.
    let _ = unsafe { (lib.cuCtxPopCurrent_v2)(&mut popped) };
    recorded.map(|event| event as usize)
}

fn record_here(lib: &Library, stream: CUstream) -> Result<CUevent, GpuError> {
    let mut capturing = 0;
    // SAFETY: the stream exists, by the contract of `CudaStream::from_raw`; the function writes one number.
    lib.check("cuStreamIsCapturing", unsafe { (lib.cuStreamIsCapturing)(stream, &mut capturing) })?;
    if capturing != 0 {
        return Err(GpuError::Capturing);
    }
    let event = new_event(lib)?;
    // SAFETY: both exist, in the current context.
    let recorded = lib.check("cuEventRecord", unsafe { (lib.cuEventRecord)(event, stream) });
    if recorded.is_err() {
        // SAFETY: the event is ours, and was not recorded.
        let _ = unsafe { (lib.cuEventDestroy_v2)(event) };
    }
    recorded.map(|()| event)
}

/// Runs `work` with a primary context that is in use already: of a GPU that holds memory of this process. Creates none.
pub(super) fn in_active<T>(lib: &'static Library, work: impl FnOnce() -> Result<T, GpuError>) -> Result<T, GpuError> {
    for ordinal in 0..count(lib)? {
        let (mut flags, mut active) = (0, 0);
        // SAFETY: the device exists; the function writes two numbers.
        let mut state = |d| unsafe { (lib.cuDevicePrimaryCtxGetState)(d, &mut flags, &mut active) };
        if device(lib, ordinal).is_ok_and(|d| state(d) == 0) && active != 0 {
            let context = Context::borrow(lib, ordinal)?;
            // SAFETY: the context is retained.
            lib.check("cuCtxPushCurrent", unsafe { (lib.cuCtxPushCurrent_v2)(context.raw) })?;
            let done = work();
            let mut popped: CUcontext = std::ptr::null_mut();
            // SAFETY: the context was pushed above.
            let _ = unsafe { (lib.cuCtxPopCurrent_v2)(&mut popped) };
            return done;
        }
    }
    work()
}

impl Context {
    /// Retains the primary context without making it current.
    fn borrow(lib: &'static Library, ordinal: u32) -> Result<Self, GpuError> {
        let device = device(lib, ordinal)?;
        let mut raw: CUcontext = std::ptr::null_mut();
        // SAFETY: the device exists; the function writes one handle.
        lib.check("cuDevicePrimaryCtxRetain", unsafe { (lib.cuDevicePrimaryCtxRetain)(&mut raw, device) })?;
        Ok(Self { lib, device, ordinal, opened: RefCell::default(), raw })
    }
}
