//! The stand-in, through the library that a process opens. Each test runs in a process with its own settings.
#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "every call of the driver API is unsafe; the pointers are locals"
)]

mod captures;
mod kernels;
mod memory;
mod process;
mod rig;
mod sharing;
mod streams;
