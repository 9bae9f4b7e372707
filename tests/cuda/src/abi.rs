//! The border to C: pointers that callers pass, the driver's structures, and what every call checks first.
//!
//! No panic crosses the border: it becomes `CUDA_ERROR_UNKNOWN`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::Relaxed;

use crate::control::tally;
use crate::error::{Error, Result};
use crate::{capture, context, device, faults};

/// A pointer that a C caller passes for a result. It exists only as a parameter of an exported function, or inside an
/// array that such a parameter points to, so it is null or points to writable memory for `T`s: that is the driver's
/// contract with its callers.
#[repr(transparent)]
pub(crate) struct Out<T>(*mut T);

impl<T> Out<T> {
    /// A pointer that the caller passed inside an array.
    pub(crate) fn inside(address: usize) -> Out<T> {
        Out(address as *mut T)
    }

    pub(crate) fn put(&self, value: T) -> Result {
        self.put_at(0, value)
    }

    /// Writes element `i` of an array whose length the caller promised.
    pub(crate) fn put_at(&self, i: usize, value: T) -> Result {
        if self.0.is_null() {
            return Err(Error::INVALID_VALUE);
        }
        // SAFETY: not null, so the C caller promised writable memory; unaligned writes cover packed callers.
        unsafe { self.0.add(i).write_unaligned(value) };
        Ok(())
    }

    /// For results that a caller may leave out.
    pub(crate) fn put_if_wanted(&self, value: T) {
        let _ = self.put(value);
    }

    pub(crate) fn is_null(&self) -> bool {
        self.0.is_null()
    }
}

impl Out<u32> {
    /// The value before, of a parameter that goes both ways.
    pub(crate) fn read(&self) -> Result<u32> {
        In(self.0.cast_const()).get()
    }
}

impl Out<libc::c_char> {
    /// Writes `text` with its final zero, cut to `len` bytes.
    pub(crate) fn put_text(&self, text: &str, len: i32) -> Result {
        let len = usize::try_from(len).ok().filter(|&len| len > 0).ok_or(Error::INVALID_VALUE)?;
        let bytes = text.bytes().take(len - 1).chain([0]);
        bytes.enumerate().try_for_each(|(i, byte)| self.put_at(i, byte as libc::c_char))
    }
}

/// A pointer that a C caller passes for input, with the same contract as [`Out`].
#[repr(transparent)]
pub(crate) struct In<T>(*const T);

impl<T: Copy> In<T> {
    /// A pointer that the caller passed inside an array.
    pub(crate) fn inside(address: usize) -> In<T> {
        In(address as *const T)
    }

    pub(crate) fn get(&self) -> Result<T> {
        self.get_at(0)
    }

    /// Reads element `i` of an array whose length the caller promised.
    pub(crate) fn get_at(&self, i: usize) -> Result<T> {
        if self.0.is_null() {
            return Err(Error::INVALID_VALUE);
        }
        // SAFETY: not null, so the C caller promised initialised memory of plain C data.
        Ok(unsafe { self.0.add(i).read_unaligned() })
    }

    pub(crate) fn list(&self, count: usize) -> Result<Vec<T>> {
        (0..count).map(|i| self.get_at(i)).collect()
    }
}

impl In<libc::c_char> {
    pub(crate) fn text(&self) -> Result<String> {
        if self.0.is_null() {
            return Err(Error::INVALID_VALUE);
        }
        // SAFETY: not null, so the C caller promised a string that ends with a zero.
        Ok(unsafe { std::ffi::CStr::from_ptr(self.0) }.to_string_lossy().into_owned())
    }
}

/// `CUmemLocation`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Location {
    pub(crate) kind: u32,
    pub(crate) id: i32,
}

/// `CUmemLocationType`: device memory.
pub(crate) const LOCATION_DEVICE: u32 = 1;

/// `CUmemAllocationProp`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct AllocationProp {
    pub(crate) kind: u32,
    pub(crate) handle_types: u32,
    pub(crate) location: Location,
    pub(crate) win32: usize,
    pub(crate) compression: u8,
    pub(crate) rdma_capable: u8,
    pub(crate) usage: u16,
    pub(crate) reserved: [u8; 4],
}

/// `CUmemAccessDesc`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct AccessDesc {
    pub(crate) location: Location,
    pub(crate) flags: u32,
}

/// `CUmemcpyAttributes`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct CopyAttributes {
    pub(crate) source_order: u32,
    pub(crate) source: Location,
    pub(crate) destination: Location,
    pub(crate) flags: u32,
}

/// What must hold before a call does its work.
pub(crate) enum Rule {
    /// Nothing: the call works before `cuInit`.
    Always,
    /// `cuInit` has succeeded in this process.
    AfterInit,
    /// The thread has a current context, and no sticky error is set on it.
    InContext,
    /// As `InContext`; and the call invalidates stream captures that do not allow it.
    NotInCapture,
}

impl Rule {
    fn check(&self) -> Result {
        match self {
            Rule::Always => Ok(()),
            Rule::AfterInit => device::driver().map(drop),
            Rule::InContext => context::current()?.healthy(),
            Rule::NotInCapture => {
                context::current()?.healthy()?;
                capture::unsafe_call()
            }
        }
    }
}

/// Runs the body of an exported function.
pub(crate) fn enter(name: &str, rule: Rule, body: impl FnOnce() -> Result) -> i32 {
    tally().calls.fetch_add(1, Relaxed);
    match catch_unwind(AssertUnwindSafe(|| faults::call(name).and_then(|()| rule.check()).and_then(|()| body()))) {
        Ok(Ok(())) => 0,
        Ok(Err(error)) => error.0,
        Err(_) => Error::UNKNOWN.0,
    }
}

/// Exports functions of the driver API, each with the rule that it checks first.
macro_rules! api {
    ($($rule:ident fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block)*) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $name($($arg: $type),*) -> i32 {
            crate::abi::enter(stringify!($name), crate::abi::Rule::$rule, || -> crate::error::Result { $body })
        }
    )*};
}

pub(crate) use api;
