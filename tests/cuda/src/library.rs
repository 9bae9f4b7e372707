//! Opens the stand-in for a test process, and controls it.

use std::ffi::{CStr, CString, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use crate::control::Counts;

const FILE: &str = "libkvferry_cuda_standin.so";

/// The file of the stand-in that belongs to the running executable. It need not exist.
///
/// Cargo puts it beside the test binaries, in `target/<profile>/deps`; other executables lie one folder up or in
/// `target/<profile>/examples`.
#[must_use]
pub fn library() -> PathBuf {
    let executable = std::env::current_exe().unwrap_or_default();
    let folder = executable.parent().unwrap_or(Path::new("."));
    let above = folder.parent().unwrap_or(folder);
    let places = [folder.to_owned(), folder.join("deps"), above.join("deps"), above.to_owned()];
    let files = places.map(|place| place.join(FILE));
    files.iter().find(|file| file.exists()).unwrap_or(&files[0]).clone()
}

/// Opens the stand-in, so that a later `dlopen("libcuda.so")` of this process returns it. It stays open.
///
/// # Errors
/// The text of the dynamic linker, or that another `libcuda.so` is open already.
pub fn load() -> Result<(), String> {
    handle().map(drop)
}

fn handle() -> Result<usize, String> {
    static HANDLE: OnceLock<Result<usize, String>> = OnceLock::new();
    HANDLE.get_or_init(|| open(&library())).clone()
}

fn open(file: &Path) -> Result<usize, String> {
    let path = CString::new(file.as_os_str().as_bytes()).map_err(|error| error.to_string())?;
    // SAFETY: a string that ends with a zero; the library's initialisers only set up Rust's runtime.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if handle.is_null() {
        // SAFETY: the text of the failure above, valid until this thread calls the linker again.
        return Err(unsafe { CStr::from_ptr(libc::dlerror()) }.to_string_lossy().into_owned());
    }
    // SAFETY: as above, and with NOLOAD nothing is loaded.
    let named = unsafe { libc::dlopen(c"libcuda.so".as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD) };
    if named != handle {
        return Err(format!("another libcuda.so is open in this process, so {} would not be used", file.display()));
    }
    Ok(handle as usize)
}

/// Steers and observes the loaded library, not the copy that a test links. Its calls are not counted in
/// [`Counts::calls`].
#[derive(Clone, Copy, Debug)]
pub struct Control {
    handle: usize,
}

macro_rules! symbol {
    ($self:ident, $name:literal, fn($($type:ty),*)) => {{
        // SAFETY: the handle of a library that is never closed, and a string that ends with a zero.
        let symbol = unsafe { libc::dlsym($self.handle as *mut c_void, $name.as_ptr()) };
        assert!(!symbol.is_null(), "the loaded stand-in lacks {:?}: it was built from another source", $name);
        // SAFETY: `control.rs`, from which the library was built, exports the symbol with this type.
        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) -> i32>(symbol) }
    }};
}

impl Control {
    /// Loads the library if it is not loaded.
    ///
    /// # Errors
    /// As [`load`].
    pub fn new() -> Result<Control, String> {
        Ok(Control { handle: handle()? })
    }

    /// What the library has done so far.
    #[must_use]
    pub fn counts(self) -> Counts {
        let mut counts = Counts::default();
        let call = symbol!(self, c"kvferry_standin_counts", fn(*mut Counts));
        // SAFETY: the pointer is to a value of that type.
        unsafe { call(&mut counts) };
        counts
    }

    /// Every stream operation starts at least this long after its submission and after the one before it.
    pub fn set_delay(self, delay: Duration) {
        let nanoseconds = u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX);
        let call = symbol!(self, c"kvferry_standin_set_delay", fn(u64));
        // SAFETY: no pointers.
        unsafe { call(nanoseconds) };
    }

    /// The next `count` allocations fail for lack of memory.
    pub fn fail_allocations(self, count: u64) {
        let call = symbol!(self, c"kvferry_standin_fail_allocations", fn(u64));
        // SAFETY: no pointers.
        unsafe { call(count) };
    }

    /// After `operations` more data operations of the device its context fails with the sticky `error`; with 0, now.
    /// Without effect before `cuInit`.
    pub fn raise(self, device: i32, error: i32, operations: u64) {
        let call = symbol!(self, c"kvferry_standin_raise", fn(i32, i32, u64));
        // SAFETY: no pointers.
        unsafe { call(device, error, operations) };
    }

    /// While on, no stream operation starts. Off also cancels `hang_after` of the environment.
    pub fn hang(self, on: bool) {
        let call = symbol!(self, c"kvferry_standin_hang", fn(i32));
        // SAFETY: no pointers.
        unsafe { call(on.into()) };
    }

    /// While on, calls that submit work to a stream block.
    pub fn hang_calls(self, on: bool) {
        let call = symbol!(self, c"kvferry_standin_hang_calls", fn(i32));
        // SAFETY: no pointers.
        unsafe { call(on.into()) };
    }

    /// After `after` more calls of a function, by the name of its symbol, `count` calls of it fail with `error`, and do
    /// nothing.
    pub fn fail_calls(self, symbol: &CStr, error: i32, after: u64, count: u64) {
        let call = symbol!(self, c"kvferry_standin_fail_calls", fn(*const c_char, i32, u64, u64));
        // SAFETY: a string that ends with a zero.
        unsafe { call(symbol.as_ptr(), error, after, count) };
    }

    /// While on, calls of a function, by the name of its symbol, block.
    pub fn block_calls(self, symbol: &CStr, on: bool) {
        let call = symbol!(self, c"kvferry_standin_block_calls", fn(*const c_char, i32));
        // SAFETY: a string that ends with a zero.
        unsafe { call(symbol.as_ptr(), on.into()) };
    }

    /// Number of calls of a function that [`Control::fail_calls`] and [`Control::block_calls`] have met so far.
    #[must_use]
    pub fn caught(self, symbol: &CStr) -> u64 {
        let mut calls = 0;
        let call = symbol!(self, c"kvferry_standin_caught", fn(*const c_char, *mut u64));
        // SAFETY: a string that ends with a zero, and a pointer to a number.
        unsafe { call(symbol.as_ptr(), &mut calls) };
        calls
    }

    /// Reads device memory behind the driver's back, now, without a stream.
    ///
    /// # Errors
    /// The driver's code for a range that is not mapped.
    pub fn read(self, address: u64, buffer: &mut [u8]) -> Result<(), i32> {
        let call = symbol!(self, c"kvferry_standin_read", fn(u64, *mut u8, usize));
        // SAFETY: the buffer has the length that is passed.
        match unsafe { call(address, buffer.as_mut_ptr(), buffer.len()) } {
            0 => Ok(()),
            code => Err(code),
        }
    }

    /// Writes device memory behind the driver's back, as a network card does.
    ///
    /// # Errors
    /// The driver's code for a range that is not mapped.
    pub fn write(self, address: u64, bytes: &[u8]) -> Result<(), i32> {
        let call = symbol!(self, c"kvferry_standin_write", fn(u64, *const u8, usize));
        // SAFETY: the bytes have the length that is passed.
        match unsafe { call(address, bytes.as_ptr(), bytes.len()) } {
            0 => Ok(()),
            code => Err(code),
        }
    }
}
