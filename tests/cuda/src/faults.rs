//! Calls that fail or block because a test wants it, by the name of the function, as it is exported.

use std::collections::HashMap;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use parking_lot::{Condvar, Mutex};

use crate::error::{Error, Result};

/// The fate of the calls of one function.
#[derive(Default)]
struct Fault {
    blocked: bool,
    /// Calls that were blocked, or failed, so far.
    caught: u64,
    /// Calls that succeed before the first that fails, calls that fail then, and their error.
    fails: Option<(u64, u64, i32)>,
}

static FAULTS: LazyLock<Mutex<HashMap<String, Fault>>> = LazyLock::new(Mutex::default);
static CHANGE: Condvar = Condvar::new();

/// Whether a test has asked for anything, so that other processes look no further.
static ANY: AtomicBool = AtomicBool::new(false);

pub(crate) fn fail(name: &str, error: i32, after: u64, count: u64) {
    FAULTS.lock().entry(name.into()).or_default().fails = Some((after, count, error));
    ANY.store(true, Relaxed);
}

pub(crate) fn block(name: &str, on: bool) {
    FAULTS.lock().entry(name.into()).or_default().blocked = on;
    ANY.store(true, Relaxed);
    CHANGE.notify_all();
}

/// Calls of the function that were blocked, or failed, so far.
pub(crate) fn caught(name: &str) -> u64 {
    FAULTS.lock().get(name).map_or(0, |f| f.caught)
}

/// Blocks as long as a test wants it, or fails.
pub(crate) fn call(name: &str) -> Result {
    if !ANY.load(Relaxed) {
        return Ok(());
    }
    let mut faults = FAULTS.lock();
    if let Some(fault) = faults.get_mut(name).filter(|f| f.blocked) {
        fault.caught += 1;
        while faults.get(name).is_some_and(|f| f.blocked) {
            CHANGE.wait(&mut faults);
        }
    }
    let Some(fault) = faults.get_mut(name) else { return Ok(()) };
    match &mut fault.fails {
        Some((after @ 1.., ..)) => *after -= 1,
        Some((_, count @ 1.., error)) => {
            *count -= 1;
            fault.caught += 1;
            return Err(Error(*error));
        }
        _ => {}
    }
    Ok(())
}
