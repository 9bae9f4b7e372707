//! The TCP lane: bytes from the producer's pool into the consumer's blocks over sockets, and over TLS 1.3 where there are
//! certificates.
//!
//! Owns the data connections of both sides: [`TcpLane`] is the consumer's, [`Server`] the producer's. Without TLS the kernel
//! gathers from the pool and scatters into the blocks: no byte is copied in user space. A pool in GPU memory is copied into a
//! pinned ring first, by the GPU ([`readahead`]). Requests name blocks by offer, group and
//! position, never by address, so a peer can read only blocks that were offered to it (promise 7, Isolated). Each reply
//! ends with the fence word as it was after the last byte had been copied out of the pool (promise 2, Fresh), and a stopped
//! attempt writes nothing from that moment on (promise 4, Quiet).
//!
//! # Frames
//! All numbers are little endian. With TLS, it carries these frames. A connection begins with a handshake, which both sides
//! bound in time:
//!
//! | from | frame | bytes |
//! | --- | --- | --- |
//! | producer | challenge | `"KVFd"`, version u32 (2), options u32 (1: checksum data), random \[32\] |
//! | consumer | proof | lane u64, options u32, random \[32\], mac \[32\] |
//! | producer | answer | `"KVFd"`, verdict u32 (0 welcome, 1 refused, 2 full, 3 too late), mac \[32\] |
//!
//! A mac is HMAC-SHA256 under the lane's key over a label (`"kvferry data 2 consumer\0"` or `"kvferry data 2 producer\0"`),
//! the producer's options and random bytes, the consumer's, the lane and the producer's incarnation. An option is in force if
//! both sides sent it. Then come requests, as many as the consumer likes without waiting, and a reply to each, in order:
//!
//! | from | frame | bytes |
//! | --- | --- | --- |
//! | consumer | request | `"KVFq"`, entries u32, tag u64, nonce u64, slot u32, 0 u32 |
//! | | each entry | group u16, region u16, position u32, blocks u32, 0 u32, within u64, piece u64 |
//! | | | sum u64 |
//! | producer | reply | `"KVFr"`, status u32 (0 ok, 1 stale, 2 out of bounds), tag u64, total u64, sum u64 |
//! | | if ok | the data, `total` bytes |
//! | | if ok | tag u64, word u64, sum of the data u64 (0 unless data is checksummed), sum u64 |
//!
//! An entry requests bytes `[within, within + piece)` of each of `blocks` blocks, from `position` on. Data comes in the order
//! of the entries. `word` is the nonce if the offer was still live after the last byte had been copied, and 0 otherwise.
//! A peer that breaks this protocol loses the connection, and nothing else.
//!
//! A sum covers the bytes of its frame before it; those of a reply are seeded with the request's, so they hold for one request
//! only. TCP's own checksum does not see two 16-bit words that changed places. A chunk whose data or trailer does not match is
//! read again.

mod client;
mod connection;
mod dial;
mod frames;
mod gather;
mod handshake;
mod link;
mod options;
mod proving;
mod readahead;
mod server;
mod slots;
mod sum;
mod tls;

pub(crate) use client::TcpLane;
pub(crate) use server::Server;

#[cfg(test)]
mod tests;
