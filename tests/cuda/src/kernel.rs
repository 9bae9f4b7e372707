//! Modules, and the one kernel: `kvferry_copy` copies entries of `{u64 source, u64 target, u64 length}`.
//!
//! The kernel reads its list when it runs. It faults where the real one does: on addresses or lengths that are not
//! multiples of 16, and on memory that the device does not see. Its entries run last to first: a real kernel promises
//! no order among them.

use std::collections::HashMap;
use std::sync::LazyLock;
use std::sync::atomic::Ordering::Relaxed;

use libc::c_char;
use parking_lot::Mutex;

use crate::abi::{In, Out, api};
use crate::context::current;
use crate::control::tally;
use crate::device::{Device, driver};
use crate::error::{Error, Result};
use crate::space::{self, Access, Piece, fresh_id};
use crate::stream::{self, Work};
use crate::{host, space::is_device};

const NAME: &str = "kvferry_copy";
const ENTRY: usize = 24;
const ALIGNMENT: u64 = 16;

/// Loaded modules and the device of each.
static MODULES: LazyLock<Mutex<HashMap<usize, i32>>> = LazyLock::new(Mutex::default);

/// The function handle of a module lies between its own handle and the next fresh one.
const FUNCTION: usize = 8;

fn load(image: &In<c_char>) -> Result<usize> {
    if !driver()?.settings.kernel {
        return Err(Error::JIT_COMPILER_NOT_FOUND);
    }
    if !image.text()?.contains(&format!(".entry {NAME}")) {
        return Err(Error::INVALID_PTX);
    }
    let id = fresh_id() as usize;
    MODULES.lock().insert(id, current()?.ordinal);
    tally().modules.fetch_add(1, Relaxed);
    Ok(id)
}

/// Memory as the kernel sees it.
fn view(device: &Device, address: u64, len: u64) -> Result<Vec<Piece>> {
    if is_device(address) {
        let access = Access::Kernel(device.ordinal, device.peers());
        return space::resolve(address, len, access).map_err(|_| Error::ILLEGAL_ADDRESS);
    }
    if !host::covers(address, len) {
        return Err(Error::ILLEGAL_ADDRESS);
    }
    Ok(space::host(address, len))
}

fn run(device: &Device, list: u64, count: u32) -> Result {
    if !list.is_multiple_of(8) {
        return Err(Error::MISALIGNED_ADDRESS);
    }
    let mut entries = vec![0; count as usize * ENTRY];
    if count > 0 {
        // SAFETY: the buffer has the length of the list.
        unsafe { space::copy_out(&view(device, list, entries.len() as u64)?, entries.as_mut_ptr()) };
    }
    let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
    for entry in entries.chunks_exact(ENTRY).rev() {
        let (from, to, len) = (word(&entry[..8]), word(&entry[8..16]), word(&entry[16..]));
        if [from, to, len].iter().any(|n| !n.is_multiple_of(ALIGNMENT)) {
            return Err(Error::MISALIGNED_ADDRESS);
        }
        if len > 0 {
            space::copy(&view(device, from, len)?, &view(device, to, len)?);
            tally().kernel_copies.fetch_add(1, Relaxed);
        }
    }
    Ok(())
}

/// The dimensions of a launch.
struct Shape {
    grid: [u32; 3],
    block: [u32; 3],
}

impl Shape {
    fn check(&self) -> Result {
        let threads = self.block.iter().map(|&n| u64::from(n)).product::<u64>();
        let empty = self.grid.contains(&0) || threads == 0;
        if empty || threads > 1024 { Err(Error::INVALID_VALUE) } else { Ok(()) }
    }
}

fn launch(function: usize, shape: &Shape, stream: usize, parameters: &In<usize>) -> Result {
    let device = current()?;
    let module = function.wrapping_sub(FUNCTION);
    if MODULES.lock().get(&module) != Some(&device.ordinal) || stream::device_of(stream)?.ordinal != device.ordinal {
        return Err(Error::INVALID_HANDLE);
    }
    shape.check()?;
    let list = In::<u64>::inside(parameters.get_at(0)?).get()?;
    let count = In::<u32>::inside(parameters.get_at(1)?).get()?;
    stream::submit(stream, Work::Data(Box::new(move || run(device, list, count))))?;
    tally().launches.fetch_add(1, Relaxed);
    Ok(())
}

api! {
    NotInCapture fn cuModuleLoadData(module: Out<usize>, image: In<c_char>) {
        module.put(load(&image)?)
    }

    NotInCapture fn cuModuleLoadDataEx(
        module: Out<usize>,
        image: In<c_char>,
        _count: u32,
        _options: usize,
        _values: usize,
    ) {
        module.put(load(&image)?)
    }

    InContext fn cuModuleUnload(module: usize) {
        MODULES.lock().remove(&module).ok_or(Error::INVALID_HANDLE)?;
        tally().modules.fetch_sub(1, Relaxed);
        Ok(())
    }

    InContext fn cuModuleGetFunction(function: Out<usize>, module: usize, name: In<c_char>) {
        if !MODULES.lock().contains_key(&module) {
            return Err(Error::INVALID_HANDLE);
        }
        if name.text()? != NAME {
            return Err(Error::NOT_FOUND);
        }
        function.put(module + FUNCTION)
    }

    InContext fn cuLaunchKernel(
        function: usize,
        grid_x: u32,
        grid_y: u32,
        grid_z: u32,
        block_x: u32,
        block_y: u32,
        block_z: u32,
        _shared: u32,
        stream: usize,
        parameters: In<usize>,
        extra: usize,
    ) {
        if extra != 0 {
            return Err(Error::INVALID_VALUE);
        }
        let shape = Shape { grid: [grid_x, grid_y, grid_z], block: [block_x, block_y, block_z] };
        launch(function, &shape, stream, &parameters)
    }
}
