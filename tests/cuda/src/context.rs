//! Primary contexts: their lifetime, and the stack of current contexts of each thread.

use std::cell::RefCell;

use crate::abi::{Out, api};
use crate::device::{self, Device, driver};
use crate::error::{Error, Result};
use crate::{event, host, memory, stream};

thread_local! {
    static STACK: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

fn top() -> usize {
    STACK.with_borrow(|stack| stack.last().copied().unwrap_or(0))
}

/// The device whose context is current on this thread.
pub(crate) fn current() -> Result<&'static Device> {
    driver()?;
    match top() {
        0 => Err(Error::INVALID_CONTEXT),
        handle => device::of_context(handle).and_then(active),
    }
}

fn active(device: &Device) -> Result<&Device> {
    if device.is_active() { Ok(device) } else { Err(Error::INVALID_CONTEXT) }
}

/// Checks a handle that a caller passes; null is allowed.
fn checked(context: usize) -> Result<usize> {
    if context != 0 {
        device::of_context(context).and_then(active)?;
    }
    Ok(context)
}

/// Frees the resources of a context that nobody retains any more.
fn destroy(device: &'static Device) {
    // Fails for a context with a sticky error, whose operations never run.
    let _ = stream::wait_for_all(device);
    stream::destroy_all(device);
    event::destroy_all(device);
    host::unregister_all(device);
    memory::free_all(device);
    device.reset();
}

api! {
    AfterInit fn cuDevicePrimaryCtxRetain(context: Out<usize>, device: i32) {
        let device = driver()?.device(device)?;
        let _alone = device.lifetime.lock();
        context.put(device.context())?;
        *device.retained.lock() += 1;
        Ok(())
    }

    AfterInit fn cuDevicePrimaryCtxRelease_v2(device: i32) {
        let device = driver()?.device(device)?;
        let _alone = device.lifetime.lock();
        let mut retained = device.retained.lock();
        match *retained {
            0 => Err(Error::INVALID_CONTEXT),
            1 => {
                *retained = 0;
                drop(retained);
                destroy(device);
                Ok(())
            }
            _ => {
                *retained -= 1;
                Ok(())
            }
        }
    }

    AfterInit fn cuDevicePrimaryCtxGetState(device: i32, flags: Out<u32>, active: Out<i32>) {
        let device = driver()?.device(device)?;
        flags.put(0)?;
        active.put(device.is_active().into())
    }

    AfterInit fn cuCtxSetCurrent(context: usize) {
        let context = checked(context)?;
        STACK.with_borrow_mut(|stack| {
            stack.pop();
            if context != 0 {
                stack.push(context);
            }
        });
        Ok(())
    }

    AfterInit fn cuCtxGetCurrent(context: Out<usize>) {
        context.put(top())
    }

    AfterInit fn cuCtxPushCurrent_v2(context: usize) {
        let context = checked(context)?;
        if context == 0 {
            return Err(Error::INVALID_CONTEXT);
        }
        STACK.with_borrow_mut(|stack| stack.push(context));
        Ok(())
    }

    AfterInit fn cuCtxPopCurrent_v2(context: Out<usize>) {
        let popped = STACK.with_borrow_mut(Vec::pop).ok_or(Error::INVALID_CONTEXT)?;
        context.put_if_wanted(popped);
        Ok(())
    }

    InContext fn cuCtxGetDevice(device: Out<i32>) {
        device.put(current()?.ordinal)
    }

    NotInCapture fn cuCtxSynchronize() {
        stream::wait_for_all(current()?)
    }

    InContext fn cuCtxGetStreamPriorityRange(least: Out<i32>, greatest: Out<i32>) {
        least.put_if_wanted(0);
        greatest.put_if_wanted(stream::GREATEST_PRIORITY);
        Ok(())
    }

    InContext fn cuCtxEnablePeerAccess(peer: usize, flags: u32) {
        let peer = device::of_context(peer)?;
        if flags != 0 {
            return Err(Error::INVALID_VALUE);
        }
        let device = current()?;
        if peer.ordinal == device.ordinal {
            return Err(Error::INVALID_DEVICE);
        }
        if device.add_peer(peer.ordinal) { Ok(()) } else { Err(Error::PEER_ACCESS_ALREADY_ENABLED) }
    }
}
