//! The lane between two processes of one host: bytes are copied straight out of the producer's memory, by the consumer.
//!
//! The producer runs a [`Server`]: a unix socket that tells processes of the same user where its pool and fence words are.
//! The consumer [`connect`]s and reads: pools that kvferry allocated are memfds, which it maps read-only and copies without
//! a system call; other memory is read with `process_vm_readv`. The socket then stays open without traffic, and closing it
//! ends the lane.
//!
//! The fence word is read the same way as the data. That is not enough: mapped memory outlives its owner, and so does the
//! word in it. So after the word the lane checks by the owner's pidfd that the process is alive; a dead owner's fence fails
//! (promise *fresh*). Copies between host memory are synchronous: between two polls nothing writes local memory, so `Quiet`
//! comes at once (promise *quiet*).
//!
//! Pools in GPU memory are shared by the driver's handles, which the socket carries, and the driver copies them: see
//! [`GpuLane`](gpu::GpuLane). There, copies are in flight between two polls, and `Quiet` waits for them. The fence words stay
//! in host memory.
//!
//! A process that may connect can read the whole pool, as with `process_vm_readv` itself: the lane protects against
//! mistakes and other users, not against processes of the same user.

mod connect;
mod exported;
mod gpu;
mod owner;
mod reader;
mod server;
mod socket;
mod source;
mod wire;

#[cfg(test)]
mod tests;

pub(crate) use connect::connect;
#[cfg(test)]
pub(crate) use reader::LocalLane;
pub(crate) use server::Server;
