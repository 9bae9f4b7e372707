//! `cuMemAlloc` and its opposite, and the memory that is left.

use std::sync::atomic::Ordering::Relaxed;

use crate::abi::{In, Out, api};
use crate::context::current;
use crate::control::tally;
use crate::device::{Device, driver};
use crate::error::{Error, Result};
use crate::space::{self, Kind, Region, fresh_id};
use crate::store::Origin;
use crate::stream;

/// Large allocations start at a large page, small ones do not, as in the real driver.
pub(crate) fn alignment(size: u64) -> u64 {
    if size >= 2 << 20 { 2 << 20 } else { 64 << 10 }
}

/// Frees what the context allocated and imported.
pub(crate) fn free_all(device: &Device) {
    let mut space = space::lock();
    let legacy = |r: &&Region| r.kind != Kind::Mapping && r.context == device.ordinal;
    let bases: Vec<u64> = space.regions.values().filter(legacy).map(|r| r.base).collect();
    for base in bases {
        if let Some(region) = space.regions.remove(&base) {
            let count = if region.kind == Kind::Import { &tally().imports } else { &tally().allocations };
            count.fetch_sub(1, Relaxed);
        }
        space.give_back(base);
    }
}

fn allocate(size: usize) -> Result<u64> {
    if size == 0 {
        return Err(Error::INVALID_VALUE);
    }
    let (device, driver) = (current()?, driver()?);
    let size = size as u64;
    let backing = driver.store.create(device.ordinal, size, Origin::Alloc, driver.settings.memory)?;
    let mut space = space::lock();
    // The gap covers the whole pages of the backing.
    let base = space.take(backing.size, alignment(size))?;
    let (devices, context, id) = (1 << device.ordinal, device.ordinal, fresh_id());
    space.regions.insert(base, Region { base, size, kind: Kind::Allocation, backing, devices, context, id });
    tally().allocations.fetch_add(1, Relaxed);
    Ok(base)
}

fn free(address: u64) -> Result {
    if address == 0 {
        return Ok(());
    }
    let is_allocation = |kind| kind == Kind::Allocation;
    if space::lock().regions.get(&address).is_none_or(|r| !is_allocation(r.kind)) {
        return Err(Error::INVALID_VALUE);
    }
    stream::wait_for_all(current()?)?;
    let mut space = space::lock();
    let region = space.regions.remove(&address).ok_or(Error::INVALID_VALUE)?;
    space.give_back(address);
    drop(space);
    drop(region);
    tally().allocations.fetch_sub(1, Relaxed);
    Ok(())
}

api! {
    NotInCapture fn cuMemAlloc_v2(address: Out<u64>, size: usize) {
        if address.is_null() {
            return Err(Error::INVALID_VALUE);
        }
        address.put(allocate(size)?)
    }

    NotInCapture fn cuMemFree_v2(address: u64) {
        free(address)
    }

    InContext fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) {
        let driver = driver()?;
        let used = driver.store.used(current()?.ordinal).map_err(|_| Error::UNKNOWN)?;
        let memory = driver.settings.memory;
        free.put_if_wanted(memory.saturating_sub(used) as usize);
        total.put_if_wanted(memory as usize);
        Ok(())
    }

    NotInCapture fn cuMemsetD8_v2(address: u64, value: u8, len: usize) {
        crate::copy::set(0, address, value, len)?.wait()
    }

    InContext fn cuMemsetD8Async(address: u64, value: u8, len: usize, stream: usize) {
        crate::copy::set(stream, address, value, len).map(drop)
    }

    InContext fn cuFlushGPUDirectRDMAWrites(target: u32, scope: u32) {
        if target != 0 || !matches!(scope, 100 | 200) {
            return Err(Error::INVALID_VALUE);
        }
        if !driver()?.settings.flush {
            return Err(Error::NOT_SUPPORTED);
        }
        tally().flushes.fetch_add(1, Relaxed);
        Ok(())
    }

    InContext fn cuMemGetAddressRange_v2(base: Out<u64>, size: Out<usize>, address: u64) {
        let space = space::lock();
        let region = space.at(address).ok_or(Error::NOT_FOUND)?;
        base.put_if_wanted(region.base);
        size.put_if_wanted(region.size as usize);
        Ok(())
    }

    InContext fn cuPointerGetAttributes(count: u32, attributes: In<u32>, data: In<usize>, address: u64) {
        let found = crate::pointer::find(address);
        for i in 0..count as usize {
            crate::pointer::put(found.as_ref(), attributes.get_at(i)?, data.get_at(i)?)?;
        }
        Ok(())
    }

    InContext fn cuPointerGetAttribute(data: usize, attribute: u32, address: u64) {
        let found = crate::pointer::find(address).ok_or(Error::INVALID_VALUE)?;
        crate::pointer::put(Some(&found), attribute, data)
    }
}
