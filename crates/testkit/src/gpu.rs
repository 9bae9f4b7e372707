//! GPU memory in tests: on the stand-in for libcuda, or on a real GPU.

use std::sync::OnceLock;

use kvferry::{Memory, PoolLayout};
use kvferry_cuda_standin::Control;

/// The environment variable that says which driver tests use: unset for the stand-in, `real` for the machine's.
pub const DRIVER: &str = "KVFERRY_TEST_CUDA";

/// Whether tests run on a real GPU.
pub fn is_real() -> bool {
    std::env::var(DRIVER).is_ok_and(|d| d == "real")
}

/// Makes the driver ready for this process: loads the stand-in, unless tests run on a real GPU. Call it before anything
/// touches GPU memory.
pub fn driver() -> Option<Control> {
    static LOADED: OnceLock<Option<Control>> = OnceLock::new();
    *LOADED.get_or_init(|| {
        let standin = (!is_real()).then(Control::new);
        standin.map(|loaded| loaded.expect("the stand-in for libcuda is built with the tests"))
    })
}

/// Settings of the stand-in for a child process that shares this process's devices: memory that both can map.
pub fn settings_for_child() -> Option<(&'static str, String)> {
    const SETTINGS: &str = "KVFERRY_STANDIN";
    // The folder that the stand-in makes for a process that is given none.
    let (user, pid) = (rustix::process::getuid().as_raw(), std::process::id());
    let unset = !is_real() && std::env::var_os(SETTINGS).is_none();
    unset.then(|| (SETTINGS, format!("dir=/dev/shm/kvferry-standin-{user}-{pid}")))
}

/// Memory for this layout on GPU 0.
pub fn memory(layout: &PoolLayout) -> Memory {
    driver();
    Memory::alloc_gpu(0, &layout.segments).expect("the GPU has memory")
}
