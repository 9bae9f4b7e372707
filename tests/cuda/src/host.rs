//! Host memory that is registered with the driver. Kernels may touch no other host memory.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;

use parking_lot::Mutex;

use crate::abi::{Out, api};
use crate::context::current;
use crate::control::tally;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::space::{self, fresh_id};

#[derive(Clone, Copy, Debug)]
pub(crate) struct Registration {
    pub(crate) base: u64,
    pub(crate) size: u64,
    pub(crate) device: i32,
    pub(crate) id: u64,
}

static REGISTRATIONS: Mutex<BTreeMap<u64, Registration>> = Mutex::new(BTreeMap::new());

/// The registration that contains `address`.
pub(crate) fn at(address: u64) -> Option<Registration> {
    let registrations = REGISTRATIONS.lock();
    let (_, found) = registrations.range(..=address).next_back()?;
    (address < found.base + found.size).then_some(*found)
}

/// Whether one registration covers the range.
pub(crate) fn covers(address: u64, len: u64) -> bool {
    at(address).is_some_and(|r| address.checked_add(len).is_some_and(|end| end <= r.base + r.size))
}

pub(crate) fn unregister_all(device: &Device) {
    REGISTRATIONS.lock().retain(|_, r| {
        let other = r.device != device.ordinal;
        if !other {
            tally().registrations.fetch_sub(1, Relaxed);
        }
        other
    });
}

/// Whether all pages of the range are mapped, as pinning them needs.
fn mapped(base: u64, size: u64) -> bool {
    let page = 4096;
    let start = base / page * page;
    let len = (base + size - start) as usize;
    let mut resident = vec![0; len.div_ceil(page as usize)];
    // SAFETY: `mincore` checks the range itself, and writes one byte for each page.
    unsafe { libc::mincore(start as *mut libc::c_void, len, resident.as_mut_ptr()) == 0 }
}

fn register(base: u64, size: u64) -> Result {
    let end = base.checked_add(size).ok_or(Error::INVALID_VALUE)?;
    if base == 0 || size == 0 || space::is_device(base) || !mapped(base, size) {
        return Err(Error::INVALID_VALUE);
    }
    let device = current()?.ordinal;
    let mut registrations = REGISTRATIONS.lock();
    if registrations.values().any(|r| r.base < end && base < r.base + r.size) {
        return Err(Error::HOST_MEMORY_ALREADY_REGISTERED);
    }
    registrations.insert(base, Registration { base, size, device, id: fresh_id() });
    tally().registrations.fetch_add(1, Relaxed);
    Ok(())
}

/// `CU_MEMHOSTREGISTER_PORTABLE`, `DEVICEMAP` and `READ_ONLY`.
const FLAGS: u32 = 1 | 2 | 8;

api! {
    NotInCapture fn cuMemHostRegister_v2(base: u64, size: usize, flags: u32) {
        if flags & !FLAGS != 0 {
            return Err(Error::INVALID_VALUE);
        }
        register(base, size as u64)
    }

    NotInCapture fn cuMemHostUnregister(base: u64) {
        REGISTRATIONS.lock().remove(&base).ok_or(Error::HOST_MEMORY_NOT_REGISTERED)?;
        tally().registrations.fetch_sub(1, Relaxed);
        Ok(())
    }

    InContext fn cuMemHostGetDevicePointer_v2(device: Out<u64>, address: u64, flags: u32) {
        if flags != 0 || at(address).is_none() {
            return Err(Error::INVALID_VALUE);
        }
        device.put(address)
    }
}
