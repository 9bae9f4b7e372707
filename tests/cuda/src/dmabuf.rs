//! Exporting a range of device memory as a file descriptor.
//!
//! It is the descriptor of the backing file, not a dma-buf: a stand-in network card can map it, the kernel's RDMA stack
//! cannot. Its file position is where the range begins.

use std::os::fd::IntoRawFd;

use crate::abi::{Out, api};
use crate::device::driver;
use crate::error::{Error, Result};
use crate::space::{self, Kind};

const DMA_BUF_FD: u32 = 1;
const PAGE: u64 = 4096;

/// The descriptor of a range that lies in one allocation. The last page of an allocation counts whole.
fn export(address: u64, size: u64) -> Result<i32> {
    if size == 0 || !address.is_multiple_of(PAGE) || !size.is_multiple_of(PAGE) {
        return Err(Error::INVALID_VALUE);
    }
    let space = space::lock();
    let region = space.at(address).ok_or(Error::INVALID_VALUE)?;
    let mapped = if region.kind == Kind::Mapping { region.size } else { region.backing.size };
    let offset = address - region.base;
    if size > mapped - offset {
        return Err(Error::INVALID_VALUE);
    }
    Ok(region.backing.reopen(offset)?.into_raw_fd())
}

api! {
    InContext fn cuMemGetHandleForAddressRange(fd: Out<i32>, address: u64, size: usize, kind: u32, flags: u64) {
        if !driver()?.settings.dmabuf {
            return Err(Error::NOT_SUPPORTED);
        }
        if kind != DMA_BUF_FD || flags != 0 || fd.is_null() {
            return Err(Error::INVALID_VALUE);
        }
        fd.put(export(address, size as u64)?)
    }
}
