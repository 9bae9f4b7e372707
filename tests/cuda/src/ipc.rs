//! Legacy IPC: handles by which another process maps an allocation of `cuMemAlloc`.

use std::sync::atomic::Ordering::Relaxed;

use crate::abi::{Out, api};
use crate::context::current;
use crate::control::tally;
use crate::device::driver;
use crate::error::{Error, Result};
use crate::memory::alignment;
use crate::space::{self, Kind, Region, fresh_id};
use crate::store::Origin;

const MAGIC: [u8; 8] = *b"kvfstand";

/// `CUipcMemHandle`: magic, uuid of the device, size, name of the file, sum of the bytes before.
#[derive(Clone, Copy)]
#[repr(C)]
struct Handle([u8; 64]);

const UUID: std::ops::Range<usize> = 8..24;
const SIZE: std::ops::Range<usize> = 24..32;
const NAME: std::ops::Range<usize> = 32..60;
const SUM: std::ops::Range<usize> = 60..64;

impl Handle {
    fn new(uuid: [u8; 16], size: u64, name: &str) -> Result<Handle> {
        let mut bytes = [0; 64];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[UUID].copy_from_slice(&uuid);
        bytes[SIZE].copy_from_slice(&size.to_le_bytes());
        bytes[NAME].get_mut(..name.len()).ok_or(Error::UNKNOWN)?.copy_from_slice(name.as_bytes());
        let sum = Handle(bytes).sum();
        bytes[SUM].copy_from_slice(&sum.to_le_bytes());
        Ok(Handle(bytes))
    }

    fn sum(&self) -> u32 {
        self.0[..SUM.start].iter().fold(1, |sum: u32, &byte| sum.wrapping_mul(31).wrapping_add(byte.into()))
    }

    /// Size and name, if the handle is well-formed and about a device of this folder.
    fn read(&self) -> Result<(u64, String)> {
        let bytes = &self.0;
        if bytes[..8] != MAGIC || bytes[SUM] != self.sum().to_le_bytes() {
            return Err(Error::INVALID_HANDLE);
        }
        let name = String::from_utf8_lossy(&bytes[NAME]).trim_end_matches('\0').to_owned();
        let size = bytes[SIZE].try_into().map(u64::from_le_bytes).map_err(|_| Error::INVALID_HANDLE)?;
        let driver = driver()?;
        let known = (0..driver.settings.devices).any(|ordinal| bytes[UUID] == driver.store.uuid(ordinal));
        if known { Ok((size, name)) } else { Err(Error::INVALID_VALUE) }
    }
}

/// `CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS`.
const LAZY_PEERS: u32 = 1;

fn supported() -> Result {
    if driver()?.settings.ipc { Ok(()) } else { Err(Error::NOT_SUPPORTED) }
}

fn open(handle: &Handle, flags: u32) -> Result<u64> {
    let (size, name) = handle.read()?;
    let device = current()?;
    let mut space = space::lock();
    if let Some(region) = space.regions.values().find(|r| r.backing.name == name) {
        return Err(if region.backing.own { Error::INVALID_CONTEXT } else { Error::ALREADY_MAPPED });
    }
    let backing = driver()?.store.import(&name)?;
    if backing.origin != Origin::Alloc || size > backing.size {
        return Err(Error::INVALID_HANDLE);
    }
    driver()?.device(backing.ordinal)?;
    let base = space.take(backing.size, alignment(size))?;
    let peers = if flags & LAZY_PEERS != 0 { 1 << device.ordinal } else { 0 };
    let devices = 1 << backing.ordinal | peers;
    let (context, id) = (device.ordinal, fresh_id());
    space.regions.insert(base, Region { base, size, kind: Kind::Import, backing, devices, context, id });
    tally().imports.fetch_add(1, Relaxed);
    Ok(base)
}

api! {
    InContext fn cuIpcGetMemHandle(handle: Out<Handle>, address: u64) {
        supported()?;
        let space = space::lock();
        let region = space.at(address).filter(|r| r.kind == Kind::Allocation).ok_or(Error::INVALID_VALUE)?;
        let uuid = driver()?.store.uuid(region.backing.ordinal);
        handle.put(Handle::new(uuid, region.size, &region.backing.name)?)
    }

    NotInCapture fn cuIpcOpenMemHandle_v2(address: Out<u64>, handle: Handle, flags: u32) {
        supported()?;
        if flags & !LAZY_PEERS != 0 || address.is_null() {
            return Err(Error::INVALID_VALUE);
        }
        address.put(open(&handle, flags)?)
    }

    NotInCapture fn cuIpcCloseMemHandle(address: u64) {
        supported()?;
        let mut space = space::lock();
        if space.regions.get(&address).is_none_or(|r| r.kind != Kind::Import) {
            return Err(Error::INVALID_VALUE);
        }
        let region = space.regions.remove(&address);
        space.give_back(address);
        drop(space);
        drop(region);
        tally().imports.fetch_sub(1, Relaxed);
        Ok(())
    }
}
