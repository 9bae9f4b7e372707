//! The lane against a fake device, and in the virtual machine against soft-RoCE.

mod fake;
mod fences;
#[cfg(feature = "cuda")]
mod gpu;
mod rails;
mod reads;
pub(crate) mod rig;
mod settings;
mod sleep;
mod speed;
mod teardown;
mod wire;
