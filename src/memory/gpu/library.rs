//! The CUDA driver's library, opened at run time: one binary starts on every host, and says what it found.
//!
//! cudarc's `sys` layer opens the library and brings the types. Its functions are not called: they panic when the library or
//! a symbol is absent, and they return an enum, of which a newer driver may return a value that it does not have (undefined
//! behaviour). So each symbol is looked up here, once, with a plain number as its result.

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void},
    sync::OnceLock,
};

use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdevice_attribute, CUdeviceptr, CUevent, CUfunction, CUipcMemHandle, CUmemAccessDesc,
    CUmemAllocationGranularity_flags, CUmemAllocationHandleType, CUmemAllocationProp, CUmemGenericAllocationHandle,
    CUmemRangeHandleType, CUmemcpyAttributes, CUmodule, CUpointer_attribute, CUstream, CUuuid,
};

use super::error::GpuError;

/// A CUresult; 0 is success.
pub(super) type Code = u32;

/// CUDA_ERROR_NOT_READY: the work is not done yet.
pub(super) const NOT_READY: Code = 600;
/// Errors after which the driver runs nothing more in the context: those that its reference calls the end of the process's
/// use of CUDA, and those of a context or driver that is gone. Any other error concerns its call only.
const FATAL: &[Code] = &[4, 46, 214, 220, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999];
const STUB_LIBRARY: Code = 34;
const NO_DEVICE: Code = 100;

/// CUDA 11.4 (R470) is the first driver with GPU_DIRECT_RDMA_WRITES_ORDERING and the flush.
const OLDEST: i32 = 11_040;

macro_rules! functions {
    (needed { $($need:ident: fn($($n:ty),*);)* } wanted { $($want:ident: fn($($w:ty),*);)* }) => {
        /// The functions that kvferry calls. NVIDIA's driver API reference defines their arguments.
        #[derive(Clone, Copy)]
        #[allow(non_snake_case)]
        #[cfg_attr(not(test), allow(dead_code, reason = "tests ask for free memory"))]
        pub(super) struct Library {
            /// `1000 * major + 10 * minor` of the CUDA version that the driver supports.
            pub(super) version: i32,
            $(pub(super) $need: unsafe extern "C" fn($($n),*) -> Code,)*
            $(pub(super) $want: Option<unsafe extern "C" fn($($w),*) -> Code>,)*
        }

        impl Library {
            fn load() -> Result<Self, GpuError> {
                // SAFETY: opening a CUDA driver runs its initializers, as in every CUDA program.
                if !unsafe { sys::is_culib_present() } {
                    return Err(GpuError::NoLibrary);
                }
                // SAFETY: as above. The library was found, so the call does not panic; it is never closed.
                let lib = unsafe { sys::culib() };
                Ok(Self {
                    version: 0,
                    $($need: {
                        let symbol = stringify!($need);
                        // SAFETY: the symbol has the type that NVIDIA's header declares, and the library is never closed.
                        let found = unsafe { lib.get(symbol.as_bytes()) };
                        *found.map_err(|_| GpuError::MissingSymbol { symbol })?
                    },)*
                    $($want: {
                        // SAFETY: the symbol has the type that NVIDIA's header declares, and the library is never closed.
                        let found = unsafe { lib.get(stringify!($want).as_bytes()) };
                        found.ok().map(|f| *f)
                    },)*
                })
            }
        }
    };
}

functions! {
    needed {
        cuInit: fn(c_uint);
        cuDriverGetVersion: fn(*mut c_int);
        cuGetErrorString: fn(Code, *mut *const c_char);
        cuDeviceGet: fn(*mut CUdevice, c_int);
        cuDeviceGetCount: fn(*mut c_int);
        cuDeviceGetName: fn(*mut c_char, c_int, CUdevice);
        cuDeviceGetUuid_v2: fn(*mut CUuuid, CUdevice);
        cuDeviceGetAttribute: fn(*mut c_int, CUdevice_attribute, CUdevice);
        cuDeviceTotalMem_v2: fn(*mut usize, CUdevice);
        cuDeviceGetPCIBusId: fn(*mut c_char, c_int, CUdevice);
        cuDevicePrimaryCtxRetain: fn(*mut CUcontext, CUdevice);
        cuDevicePrimaryCtxRelease_v2: fn(CUdevice);
        cuDevicePrimaryCtxGetState: fn(CUdevice, *mut c_uint, *mut c_int);
        cuCtxSetCurrent: fn(CUcontext);
        cuCtxPushCurrent_v2: fn(CUcontext);
        cuCtxPopCurrent_v2: fn(*mut CUcontext);
        cuCtxGetStreamPriorityRange: fn(*mut c_int, *mut c_int);
        cuThreadExchangeStreamCaptureMode: fn(*mut c_uint);
        cuStreamCreateWithPriority: fn(*mut CUstream, c_uint, c_int);
        cuStreamDestroy_v2: fn(CUstream);
        cuStreamIsCapturing: fn(CUstream, *mut c_uint);
        cuEventCreate: fn(*mut CUevent, c_uint);
        cuEventRecord: fn(CUevent, CUstream);
        cuEventQuery: fn(CUevent);
        cuEventDestroy_v2: fn(CUevent);
        cuMemcpyHtoDAsync_v2: fn(CUdeviceptr, *const c_void, usize, CUstream);
        cuMemcpyDtoHAsync_v2: fn(*mut c_void, CUdeviceptr, usize, CUstream);
        cuMemcpyDtoDAsync_v2: fn(CUdeviceptr, CUdeviceptr, usize, CUstream);
        cuMemsetD8Async: fn(CUdeviceptr, u8, usize, CUstream);
        cuMemHostRegister_v2: fn(*mut c_void, usize, c_uint);
        cuMemHostUnregister: fn(*mut c_void);
        cuMemAlloc_v2: fn(*mut CUdeviceptr, usize);
        cuMemFree_v2: fn(CUdeviceptr);
        cuMemGetInfo_v2: fn(*mut usize, *mut usize);
        cuPointerGetAttributes: fn(c_uint, *const CUpointer_attribute, *mut *mut c_void, CUdeviceptr);
        cuMemGetAddressRange_v2: fn(*mut CUdeviceptr, *mut usize, CUdeviceptr);
        cuIpcGetMemHandle: fn(*mut CUipcMemHandle, CUdeviceptr);
        cuIpcOpenMemHandle_v2: fn(*mut CUdeviceptr, CUipcMemHandle, c_uint);
        cuIpcCloseMemHandle: fn(CUdeviceptr);
        cuMemAddressReserve: fn(*mut CUdeviceptr, usize, usize, CUdeviceptr, c_ulonglong);
        cuMemAddressFree: fn(CUdeviceptr, usize);
        cuMemCreate: fn(*mut CUmemGenericAllocationHandle, usize, *const CUmemAllocationProp, c_ulonglong);
        cuMemRelease: fn(CUmemGenericAllocationHandle);
        cuMemMap: fn(CUdeviceptr, usize, usize, CUmemGenericAllocationHandle, c_ulonglong);
        cuMemUnmap: fn(CUdeviceptr, usize);
        cuMemSetAccess: fn(CUdeviceptr, usize, *const CUmemAccessDesc, usize);
        cuMemGetAllocationGranularity: fn(*mut usize, *const CUmemAllocationProp, CUmemAllocationGranularity_flags);
        cuMemRetainAllocationHandle: fn(*mut CUmemGenericAllocationHandle, *mut c_void);
        cuMemExportToShareableHandle: fn(*mut c_void, CUmemGenericAllocationHandle, CUmemAllocationHandleType, c_ulonglong);
        cuMemImportFromShareableHandle: fn(*mut CUmemGenericAllocationHandle, *mut c_void, CUmemAllocationHandleType);
    }
    wanted {
        cuModuleLoadData: fn(*mut CUmodule, *const c_void);
        cuModuleUnload: fn(CUmodule);
        cuModuleGetFunction: fn(*mut CUfunction, CUmodule, *const c_char);
        cuLaunchKernel: fn(CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, CUstream, *mut *mut c_void, *mut *mut c_void);
        cuMemcpyBatchAsync: fn(*mut CUdeviceptr, *mut CUdeviceptr, *mut usize, usize, *mut CUmemcpyAttributes, *mut usize, usize, *mut usize, CUstream);
        cuMemGetHandleForAddressRange: fn(*mut c_void, CUdeviceptr, usize, CUmemRangeHandleType, c_ulonglong);
        cuFlushGPUDirectRDMAWrites: fn(c_uint, c_uint);
    }
}

/// Looks for the driver. Makes no call but `cuDriverGetVersion`, which needs no initialization.
pub(super) fn find() -> Result<&'static Library, GpuError> {
    static FOUND: OnceLock<Result<Library, GpuError>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let mut lib = Library::load()?;
        let mut version = 0;
        // SAFETY: the function writes one int.
        let found = unsafe { (lib.cuDriverGetVersion)(&mut version) };
        lib.check("cuDriverGetVersion", found)?;
        lib.version = version;
        if version < OLDEST { Err(GpuError::OldDriver { has: version }) } else { Ok(lib) }
    });
    found.as_ref().map_err(Clone::clone)
}

/// Finds and initializes the driver, once. A child that is forked afterwards has no usable CUDA, so this is called only for
/// a GPU pool.
pub(super) fn init() -> Result<&'static Library, GpuError> {
    static INITIALIZED: OnceLock<()> = OnceLock::new();
    let lib = find()?;
    if INITIALIZED.get().is_some() {
        return Ok(lib);
    }
    // SAFETY: 0 is the function's only valid argument; a second call does nothing.
    match unsafe { (lib.cuInit)(0) } {
        STUB_LIBRARY => return Err(GpuError::StubLibrary),
        NO_DEVICE => return Err(GpuError::NoDevice),
        // Some failures pass, such as that of a machine whose fabric manager is still starting: it is tried again.
        code => lib.check("cuInit", code)?,
    }
    let _ = INITIALIZED.set(());
    Ok(lib)
}

/// Whether the context is unusable after this error.
pub(super) fn is_fatal(error: &GpuError) -> bool {
    matches!(error, GpuError::Call { code, .. } if FATAL.contains(code))
}

impl Library {
    /// The error of a call, if it failed.
    pub(super) fn check(&self, call: &'static str, code: Code) -> Result<(), GpuError> {
        if code == 0 {
            return Ok(());
        }
        let mut text: *const c_char = std::ptr::null();
        // SAFETY: the function writes one pointer: a static string's, or null for an unknown code.
        let named = unsafe { (self.cuGetErrorString)(code, &mut text) };
        let text = if named == 0 && !text.is_null() {
            // SAFETY: the driver returned a static string that ends with a zero byte.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        } else {
            "unknown error".into()
        };
        Err(GpuError::Call { call, code, text })
    }
}
