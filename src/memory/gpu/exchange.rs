//! What an owner of GPU memory tells another process of the host, so that it can map the memory.

use std::os::fd::OwnedFd;

/// How an allocation is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Handle {
    /// By a legacy IPC handle: memory of `cudaMalloc`.
    Legacy([u8; 64]),
    /// By the next of the descriptors: memory of the virtual memory functions.
    Descriptor,
}

/// A part of a segment that lies in one allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    /// The segment.
    pub segment: u16,
    /// Offset in the segment, in bytes.
    pub at: u64,
    /// Bytes.
    pub len: u64,
    /// Index of the allocation.
    pub allocation: u32,
    /// Offset in the allocation, in bytes.
    pub offset: u64,
}

/// The memory of a pool, for another process.
#[derive(Debug, Default)]
pub(crate) struct Exported {
    /// The allocations, with their sizes in bytes.
    pub allocations: Vec<(Handle, u64)>,
    /// Parts, by segment and offset.
    pub parts: Vec<Part>,
    /// A descriptor for each allocation that needs one, in order.
    pub files: Vec<OwnedFd>,
}
