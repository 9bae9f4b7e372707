//! What the driver knows about a pointer.

use crate::abi::Out;
use crate::device::driver;
use crate::error::{Error, Result};
use crate::host::{self, Registration};
use crate::space::{self, Kind, Region};
use crate::store::Origin;

/// Memory that the driver knows.
pub(crate) enum Found {
    Device { address: u64, region: Region },
    Host { address: u64, registration: Registration },
}

const MEMORY_HOST: u32 = 1;
const MEMORY_DEVICE: u32 = 2;
const READ_WRITE: u32 = 3;
/// The ordinal of a pointer that the driver does not know.
const NO_DEVICE: i32 = -2;

pub(crate) fn find(address: u64) -> Option<Found> {
    if let Some(region) = space::lock().at(address) {
        return Some(Found::Device { address, region: region.clone() });
    }
    host::at(address).map(|registration| Found::Host { address, registration })
}

/// A result of a size that depends on the attribute.
enum Value {
    Int(i32),
    Long(u64),
}

/// Writes an attribute to `data`, with the zero values of the driver for unknown memory.
pub(crate) fn put(found: Option<&Found>, attribute: u32, data: usize) -> Result {
    let value = match found {
        Some(Found::Device { address, region }) => of_device(*address, region, attribute)?,
        Some(Found::Host { address, registration }) => of_host(*address, registration, attribute)?,
        None => match attribute {
            1 | 3 | 4 | 7 | 11 | 12 | 17..=20 => Value::Long(0),
            9 => Value::Int(NO_DEVICE),
            2 | 6 | 8 | 10 | 13..=16 => Value::Int(0),
            _ => return Err(Error::INVALID_VALUE),
        },
    };
    match value {
        Value::Int(value) => Out::inside(data).put(value),
        Value::Long(value) => Out::inside(data).put(value),
    }
}

fn of_device(address: u64, region: &Region, attribute: u32) -> Result<Value> {
    let backing = &region.backing;
    let mapping = region.kind == Kind::Mapping;
    let (handle_types, rdma_capable) = match backing.origin {
        Origin::Alloc => (0, true),
        Origin::Create { handle_types, rdma_capable } => (handle_types, rdma_capable),
    };
    Ok(match attribute {
        // Memory of `cuMemCreate` belongs to no context.
        1 if mapping => Value::Long(0),
        1 => Value::Long(driver()?.device(region.context)?.context() as u64),
        2 => Value::Int(MEMORY_DEVICE as i32),
        3 => Value::Long(address),
        4 => return Err(Error::INVALID_VALUE),
        6 | 8 => Value::Int(0),
        7 => Value::Long(region.id),
        9 => Value::Int(backing.ordinal),
        10 => Value::Int((region.kind == Kind::Allocation && driver()?.settings.ipc).into()),
        11 | 19 => Value::Long(region.base),
        12 | 18 => Value::Long(region.size),
        13 => Value::Int(1),
        14 => Value::Int(handle_types as i32),
        15 => Value::Int(rdma_capable.into()),
        16 => Value::Int(if region.devices != 0 { READ_WRITE as i32 } else { 0 }),
        17 => Value::Long(0),
        20 => Value::Long(region.id),
        _ => return Err(Error::INVALID_VALUE),
    })
}

fn of_host(address: u64, registration: &Registration, attribute: u32) -> Result<Value> {
    Ok(match attribute {
        1 => Value::Long(driver()?.device(registration.device)?.context() as u64),
        2 => Value::Int(MEMORY_HOST as i32),
        3 | 4 => Value::Long(address),
        6 | 8 | 10 | 14 | 15 => Value::Int(0),
        7 => Value::Long(registration.id),
        9 => Value::Int(registration.device),
        11 => Value::Long(registration.base),
        12 => Value::Long(registration.size),
        13 => Value::Int(1),
        16 => Value::Int(READ_WRITE as i32),
        17..=20 => Value::Long(0),
        _ => return Err(Error::INVALID_VALUE),
    })
}
