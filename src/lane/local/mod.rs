//! The lane between two processes of one host: bytes are copied straight out of the producer's memory, by the consumer.
//!
//! The producer runs a [`Server`]: a unix socket that hands out where its pool and fence words are, to processes of the
//! same user. The consumer [`connect`]s and reads: pools that kvferry allocated are memfds, which it maps read-only and
//! copies without a system call; any other memory is read by `process_vm_readv`. The socket then stays open without
//! traffic, and closing it ends the lane.
//!
//! The fence word is read the same way as the data. That is not enough: memory that is mapped here outlives its owner, and
//! so does the word in it. So after the word the owner's pidfd is asked whether the process still lives, and a dead
//! owner's fence fails (promise *fresh*). Copies are synchronous: between two polls nothing writes local memory, so
//! `Quiet` comes at once (promise *quiet*).
//!
//! Whoever may connect can read the whole pool, as with `process_vm_readv` itself: the lane protects against mistakes and
//! other users, not against one's own processes.

mod connect;
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
