//! Errors of GPU memory. Each message says the cause and the next step.

/// GPU memory that cannot be used, or a CUDA call that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GpuError {
    /// This build has no GPU support.
    #[error("this build has no GPU support: build with the feature `cuda`")]
    NotBuilt,
    /// The driver's library is absent.
    #[error("no CUDA driver here (libcuda.so.1 is absent): install NVIDIA's driver, or use host memory")]
    NoLibrary,
    /// The library is the stub that a CUDA toolkit brings for linking.
    #[error(
        "libcuda.so is a CUDA toolkit's stub, not a driver: remove the toolkit's `stubs` folder from LD_LIBRARY_PATH, \
         or install NVIDIA's driver"
    )]
    StubLibrary,
    /// The driver lacks a function.
    #[error("the CUDA driver has no {symbol}: install a driver of CUDA 11.4 (R470) or newer")]
    MissingSymbol {
        /// The function.
        symbol: &'static str,
    },
    /// The driver is too old.
    #[error("the CUDA driver supports CUDA {}.{}: install a driver of CUDA 11.4 (R470) or newer", has / 1000, has % 1000 / 10)]
    OldDriver {
        /// The driver's version, `1000 * major + 10 * minor`.
        has: i32,
    },
    /// The driver finds no GPU.
    #[error("the CUDA driver finds no GPU: check `nvidia-smi`, CUDA_VISIBLE_DEVICES, and the container's devices")]
    NoDevice,
    /// There is no GPU of this number.
    #[error("there is no GPU {ordinal}: {devices} are visible; check CUDA_VISIBLE_DEVICES")]
    NoSuchDevice {
        /// The number.
        ordinal: u32,
        /// How many there are.
        devices: u32,
    },
    /// The memory is not one GPU's.
    #[error("segment {segment} (address {address:#x}, {len} bytes) is not GPU memory: {why}")]
    NotGpuMemory {
        /// Index of the segment.
        segment: usize,
        /// Its address.
        address: u64,
        /// Its length in bytes.
        len: u64,
        /// What it is instead.
        why: String,
    },
    /// The memory of one pool lies on several GPUs.
    #[error(
        "segment {segment} lies on GPU {has}, the ones before on GPU {first}: give each GPU a pool and a rank of its own"
    )]
    SeveralDevices {
        /// Index of the segment.
        segment: usize,
        /// Its GPU.
        has: u32,
        /// The GPU of the first segment.
        first: u32,
    },
    /// The stream records a CUDA graph.
    #[error("the stream is capturing a CUDA graph: mark it before the capture begins, or after it ends")]
    Capturing,
    /// A call failed.
    #[error("{call} failed with {code} ({text})")]
    Call {
        /// The function.
        call: &'static str,
        /// CUresult.
        code: u32,
        /// The driver's text for it.
        text: String,
    },
    /// The GPU's context is unusable after this earlier error. Only a restart of the process helps.
    #[error("GPU {ordinal} is unusable in this process since {first}; restart the process")]
    Unusable {
        /// The GPU.
        ordinal: u32,
        /// The first error.
        first: String,
    },
    /// The driver does not answer.
    #[error("the CUDA driver has not answered for {seconds} s: see dmesg for Xid errors; restart the process")]
    Hung {
        /// Seconds that the caller waited.
        seconds: u64,
    },
    /// A system call failed.
    #[error("{what}: {error}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The system's text.
        error: String,
    },
}

impl GpuError {
    pub(crate) fn os(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |error| Self::Os { what, error: error.to_string() }
    }
}

impl From<GpuError> for std::io::Error {
    fn from(e: GpuError) -> Self {
        std::io::Error::other(e)
    }
}
