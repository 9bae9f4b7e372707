//! The types and calls of a build without the feature `cuda`: there is no GPU, so none of them has a value.

use std::{io, os::fd::OwnedFd};

use super::{CudaStream, Gpu, error::GpuError, exchange::Exported, queue::Piece};
use crate::memory::Memory;

/// See `context.rs`.
pub(crate) enum Context {}

/// See `alloc.rs`.
pub(crate) enum Allocation {}

/// See `share.rs`.
#[derive(Debug)]
pub(crate) enum Imported {}

/// See `calls.rs`.
pub(crate) enum Pinned {}

impl Allocation {
    pub(crate) fn addresses(&self) -> impl Iterator<Item = u64> {
        std::iter::empty()
    }
}

impl Imported {
    pub(crate) fn pieces(&self, _: (u16, u64), _: (&Memory, u16, u64), _: u64, _: &mut Vec<Piece>) -> io::Result<()> {
        match *self {}
    }
}

impl Gpu {
    pub(crate) fn holding(_: &[(u64, u64)]) -> Result<Self, GpuError> {
        Err(GpuError::NotBuilt)
    }

    pub(crate) fn allocate(&self, _: &[u64]) -> Result<Allocation, GpuError> {
        Err(GpuError::NotBuilt)
    }

    pub(super) fn record(&self, _: CudaStream) -> Result<usize, GpuError> {
        Err(GpuError::NotBuilt)
    }

    pub(crate) async fn export(&self, _: Vec<(u64, u64)>) -> Result<Exported, GpuError> {
        Err(GpuError::NotBuilt)
    }

    pub(crate) async fn import(&self, _: Exported, _: Vec<u64>) -> Result<Imported, GpuError> {
        Err(GpuError::NotBuilt)
    }

    pub(crate) fn dmabuf(&self, _: u64, _: u64) -> Result<(OwnedFd, u64), GpuError> {
        Err(GpuError::NotBuilt)
    }

    pub(crate) fn pin(&self, _: &Memory) -> Result<Pinned, GpuError> {
        Err(GpuError::NotBuilt)
    }
}
