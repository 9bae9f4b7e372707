//! Virtual memory management: reservations, physical allocations, mappings, and sharing by file descriptor.

use std::collections::HashMap;
use std::os::fd::IntoRawFd;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, LazyLock};

use parking_lot::Mutex;

use crate::abi::{AccessDesc, AllocationProp, In, LOCATION_DEVICE, Location, Out, api};
use crate::control::tally;
use crate::device::driver;
use crate::error::{Error, Result};
use crate::space::{self, Kind, Region, fresh_id};
use crate::store::{Backing, Origin};

const GRANULARITY: u64 = 2 << 20;
const PINNED: u32 = 1;
const POSIX_FD: u32 = 1;
const READ_WRITE: u32 = 3;

/// A handle that the caller holds `count` times.
struct Handle {
    backing: Arc<Backing>,
    count: u32,
}

static HANDLES: LazyLock<Mutex<HashMap<u64, Handle>>> = LazyLock::new(Mutex::default);

fn whole(n: u64) -> Result<u64> {
    if n > 0 && n.is_multiple_of(GRANULARITY) { Ok(n) } else { Err(Error::INVALID_VALUE) }
}

fn device(location: Location) -> Result<i32> {
    if location.kind != LOCATION_DEVICE {
        return Err(Error::INVALID_VALUE);
    }
    Ok(driver()?.device(location.id)?.ordinal)
}

fn check(prop: &AllocationProp) -> Result<i32> {
    if prop.kind != PINNED || prop.handle_types & !POSIX_FD != 0 || prop.reserved != [0; 4] {
        return Err(Error::INVALID_VALUE);
    }
    device(prop.location)
}

fn insert(backing: Arc<Backing>) -> u64 {
    let id = fresh_id();
    HANDLES.lock().insert(id, Handle { backing, count: 1 });
    id
}

fn backing(handle: u64) -> Result<Arc<Backing>> {
    HANDLES.lock().get(&handle).map(|h| h.backing.clone()).ok_or(Error::INVALID_VALUE)
}

fn map(address: u64, size: u64, handle: u64) -> Result {
    let backing = backing(handle)?;
    let end = address.checked_add(whole(size)?).ok_or(Error::INVALID_VALUE)?;
    let mut space = space::lock();
    let reserved = space.reservations.range(..=address).next_back().is_some_and(|(&base, &len)| end <= base + len);
    let overlaps = space.regions.values().any(|r| r.base < end && address < r.end());
    if !reserved || overlaps || !address.is_multiple_of(GRANULARITY) || size > backing.size {
        return Err(Error::INVALID_VALUE);
    }
    let (kind, context, id) = (Kind::Mapping, backing.ordinal, fresh_id());
    space.regions.insert(address, Region { base: address, size, kind, backing, devices: 0, context, id });
    tally().mappings.fetch_add(1, Relaxed);
    Ok(())
}

/// The bases of the mappings that make up exactly this range.
fn mappings(space: &space::Space, address: u64, size: u64) -> Result<Vec<u64>> {
    let regions = space.cover(address, whole(size)?)?;
    let exact = regions[0].base == address && regions[regions.len() - 1].end() == address + size;
    if !exact || regions.iter().any(|r| r.kind != Kind::Mapping) {
        return Err(Error::INVALID_VALUE);
    }
    Ok(regions.into_iter().map(|r| r.base).collect())
}

fn unmap(address: u64, size: u64) -> Result {
    let mut space = space::lock();
    let bases = mappings(&space, address, size)?;
    let removed: Vec<Region> = bases.iter().filter_map(|base| space.regions.remove(base)).collect();
    drop(space);
    tally().mappings.fetch_sub(removed.len() as u64, Relaxed);
    Ok(())
}

fn set_access(address: u64, size: u64, descriptions: &[AccessDesc]) -> Result {
    let mut space = space::lock();
    let bases = mappings(&space, address, size)?;
    for description in descriptions {
        let bit = 1 << device(description.location)?;
        for base in &bases {
            let Some(region) = space.regions.get_mut(base) else { continue };
            match description.flags {
                0 => region.devices &= !bit,
                1 | READ_WRITE => region.devices |= bit,
                _ => return Err(Error::INVALID_VALUE),
            }
        }
    }
    Ok(())
}

fn release(handle: u64) -> Result {
    let mut handles = HANDLES.lock();
    let held = handles.get_mut(&handle).ok_or(Error::INVALID_VALUE)?;
    held.count -= 1;
    if held.count == 0 {
        let removed = handles.remove(&handle);
        drop(handles);
        drop(removed);
    }
    Ok(())
}

/// The handle of the memory mapped at `address`, held once more.
fn retain(address: u64) -> Result<u64> {
    let backing = {
        let space = space::lock();
        let region = space.at(address).filter(|r| r.kind == Kind::Mapping).ok_or(Error::INVALID_VALUE)?;
        region.backing.clone()
    };
    let mut handles = HANDLES.lock();
    if let Some((&id, held)) = handles.iter_mut().find(|(_, h)| Arc::ptr_eq(&h.backing, &backing)) {
        held.count += 1;
        return Ok(id);
    }
    drop(handles);
    Ok(insert(backing))
}

api! {
    AfterInit fn cuMemGetAllocationGranularity(granularity: Out<usize>, prop: In<AllocationProp>, option: u32) {
        check(&prop.get()?)?;
        if option > 1 {
            return Err(Error::INVALID_VALUE);
        }
        granularity.put(GRANULARITY as usize)
    }

    AfterInit fn cuMemAddressReserve(address: Out<u64>, size: usize, alignment: usize, _wish: u64, flags: u64) {
        let alignment = (alignment as u64).max(GRANULARITY);
        let size = whole(size as u64)?;
        if flags != 0 || !alignment.is_power_of_two() {
            return Err(Error::INVALID_VALUE);
        }
        let mut space = space::lock();
        let base = space.take(size, alignment)?;
        space.reservations.insert(base, size);
        tally().reservations.fetch_add(1, Relaxed);
        address.put(base)
    }

    AfterInit fn cuMemAddressFree(address: u64, size: usize) {
        let mut space = space::lock();
        let size = size as u64;
        let mapped = space.regions.range(address..address.saturating_add(size)).next().is_some();
        if space.reservations.get(&address) != Some(&size) || mapped {
            return Err(Error::INVALID_VALUE);
        }
        space.reservations.remove(&address);
        space.give_back(address);
        tally().reservations.fetch_sub(1, Relaxed);
        Ok(())
    }

    NotInCapture fn cuMemCreate(handle: Out<u64>, size: usize, prop: In<AllocationProp>, flags: u64) {
        let prop = prop.get()?;
        let ordinal = check(&prop)?;
        let size = whole(size as u64)?;
        if flags != 0 || handle.is_null() {
            return Err(Error::INVALID_VALUE);
        }
        let origin = Origin::Create { handle_types: prop.handle_types, rdma_capable: prop.rdma_capable != 0 };
        let backing = driver()?.store.create(ordinal, size, origin, driver()?.settings.memory)?;
        handle.put(insert(backing))
    }

    AfterInit fn cuMemRelease(handle: u64) {
        release(handle)
    }

    NotInCapture fn cuMemMap(address: u64, size: usize, offset: usize, handle: u64, flags: u64) {
        if offset != 0 || flags != 0 {
            return Err(Error::INVALID_VALUE);
        }
        map(address, size as u64, handle)
    }

    NotInCapture fn cuMemUnmap(address: u64, size: usize) {
        unmap(address, size as u64)
    }

    NotInCapture fn cuMemSetAccess(address: u64, size: usize, descriptions: In<AccessDesc>, count: usize) {
        set_access(address, size as u64, &descriptions.list(count)?)
    }

    AfterInit fn cuMemGetAccess(flags: Out<u64>, location: In<Location>, address: u64) {
        let bit = 1 << device(location.get()?)?;
        let space = space::lock();
        let region = space.at(address).filter(|r| r.kind == Kind::Mapping).ok_or(Error::INVALID_VALUE)?;
        flags.put(if region.devices & bit != 0 { READ_WRITE.into() } else { 0 })
    }

    AfterInit fn cuMemRetainAllocationHandle(handle: Out<u64>, address: u64) {
        handle.put(retain(address)?)
    }

    AfterInit fn cuMemGetAllocationPropertiesFromHandle(prop: Out<AllocationProp>, handle: u64) {
        let backing = backing(handle)?;
        let Origin::Create { handle_types, rdma_capable } = backing.origin else { return Err(Error::INVALID_VALUE) };
        prop.put(AllocationProp {
            kind: PINNED,
            handle_types,
            location: Location { kind: LOCATION_DEVICE, id: backing.ordinal },
            win32: 0,
            compression: 0,
            rdma_capable: rdma_capable.into(),
            usage: 0,
            reserved: [0; 4],
        })
    }

    AfterInit fn cuMemExportToShareableHandle(fd: Out<i32>, handle: u64, kind: u32, flags: u64) {
        let backing = backing(handle)?;
        let shareable = matches!(backing.origin, Origin::Create { handle_types, .. } if handle_types & POSIX_FD != 0);
        if kind != POSIX_FD || flags != 0 || !shareable || fd.is_null() {
            return Err(Error::INVALID_VALUE);
        }
        fd.put(backing.share()?.into_raw_fd())
    }

    // The descriptor itself is passed as the pointer.
    AfterInit fn cuMemImportFromShareableHandle(handle: Out<u64>, fd: usize, kind: u32) {
        if kind != POSIX_FD || handle.is_null() {
            return Err(Error::INVALID_VALUE);
        }
        let fd = i32::try_from(fd).map_err(|_| Error::INVALID_VALUE)?;
        let backing = driver()?.store.adopt(fd)?;
        if !matches!(backing.origin, Origin::Create { .. }) {
            return Err(Error::INVALID_VALUE);
        }
        driver()?.device(backing.ordinal)?;
        handle.put(insert(backing))
    }
}
