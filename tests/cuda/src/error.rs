//! The driver's result codes, and the calls that describe them.

use crate::abi::{Out, api};

/// A `CUresult` other than success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Error(pub(crate) i32);

pub(crate) type Result<T = ()> = std::result::Result<T, Error>;

macro_rules! errors {
    ($($name:ident = $code:literal, $text:literal;)*) => {
        #[allow(dead_code, reason = "the table is that of the driver; not every error is raised here")]
        impl Error {
            $(pub(crate) const $name: Error = Error($code);)*
        }

        /// The C strings of a code: its name, then its description.
        fn strings(code: i32) -> Option<(&'static std::ffi::CStr, &'static std::ffi::CStr)> {
            let text = |s: &'static str| std::ffi::CStr::from_bytes_with_nul(s.as_bytes()).unwrap_or(c"");
            match code {
                0 => Some((c"CUDA_SUCCESS", c"no error")),
                $($code => Some((
                    text(concat!("CUDA_ERROR_", stringify!($name), "\0")),
                    text(concat!($text, "\0")),
                )),)*
                _ => None,
            }
        }
    };
}

errors! {
    INVALID_VALUE = 1, "invalid argument";
    OUT_OF_MEMORY = 2, "out of memory";
    NOT_INITIALIZED = 3, "initialization error";
    STUB_LIBRARY = 34, "CUDA driver is a stub library";
    NO_DEVICE = 100, "no CUDA-capable device is detected";
    INVALID_DEVICE = 101, "invalid device ordinal";
    INVALID_IMAGE = 200, "device kernel image is invalid";
    INVALID_CONTEXT = 201, "invalid device context";
    ALREADY_MAPPED = 208, "resource already mapped";
    INVALID_PTX = 218, "a PTX JIT compilation failed";
    JIT_COMPILER_NOT_FOUND = 221, "PTX JIT compiler library not found";
    INVALID_HANDLE = 400, "invalid resource handle";
    ILLEGAL_STATE = 401, "the operation cannot be performed in the present state";
    NOT_FOUND = 500, "named symbol not found";
    NOT_READY = 600, "device not ready";
    ILLEGAL_ADDRESS = 700, "an illegal memory access was encountered";
    PEER_ACCESS_ALREADY_ENABLED = 704, "peer access is already enabled";
    HOST_MEMORY_ALREADY_REGISTERED = 712, "part or all of the requested memory range is already mapped";
    HOST_MEMORY_NOT_REGISTERED = 713, "pointer does not correspond to a registered memory region";
    MISALIGNED_ADDRESS = 716, "misaligned address";
    LAUNCH_FAILED = 719, "unspecified launch failure";
    NOT_SUPPORTED = 801, "operation not supported";
    STREAM_CAPTURE_UNSUPPORTED = 900, "operation not permitted when stream is capturing";
    STREAM_CAPTURE_INVALIDATED = 901, "operation failed due to a previous error during capture";
    STREAM_CAPTURE_UNMATCHED = 903, "the capture was not initiated in this stream";
    STREAM_CAPTURE_ISOLATION = 905, "dependency created on uncaptured work in another stream";
    CAPTURED_EVENT = 907, "operation not permitted on an event last recorded in a capturing stream";
    STREAM_CAPTURE_WRONG_THREAD = 908, "attempt to terminate a thread-local capture sequence from another thread";
    UNKNOWN = 999, "unknown error";
}

api! {
    Always fn cuGetErrorString(code: i32, text: Out<*const libc::c_char>) {
        match strings(code) {
            Some((_, description)) => text.put(description.as_ptr()),
            None => text.put(std::ptr::null()).and(Err(Error::INVALID_VALUE)),
        }
    }

    Always fn cuGetErrorName(code: i32, text: Out<*const libc::c_char>) {
        match strings(code) {
            Some((name, _)) => text.put(name.as_ptr()),
            None => text.put(std::ptr::null()).and(Err(Error::INVALID_VALUE)),
        }
    }
}
