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

/// Memory for this layout on GPU 0.
pub fn memory(layout: &PoolLayout) -> Memory {
    driver();
    Memory::alloc_gpu(0, &layout.segments).expect("the GPU has memory")
}
