//! Tests on the stand-in for libcuda, and GPU memory as engines allocate it: never freed, with a context that is kept.

use std::process::{Command, Stdio};

use cudarc::driver::sys::{
    CUmemAccess_flags, CUmemAccessDesc, CUmemAllocationHandleType, CUmemAllocationProp, CUmemAllocationType,
    CUmemLocation, CUmemLocationType,
};

use kvferry_cuda_standin::Control;

use super::Gpu;

const ROLE: &str = "KVFERRY_TEST_STANDIN";

/// Runs `body` in a process of its own, as the test with this function, and with a driver with these settings: a process has
/// one driver, whose settings and counts are its own.
pub(crate) fn with_driver<T: Fn()>(_: T, settings: &str, body: impl FnOnce(Control)) {
    let test = std::any::type_name::<T>().trim_start_matches("kvferry::");
    if std::env::var(ROLE).is_ok_and(|role| role == test) {
        return body(Control::new().expect("the stand-in is built with the tests"));
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1", "--include-ignored"])
        .env(ROLE, test)
        .env("KVFERRY_STANDIN", settings)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    // A wrong name would run nothing, and succeed.
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    print!("{text}");
}

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
