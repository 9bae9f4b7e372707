//! What tests steer and count in the loaded library: exported C functions, which `Control` calls.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use crate::abi::{In, Out};
use crate::device::driver;
use crate::error::Error;
use crate::settings::{Settings, settings};
use crate::{faults, space, stream};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What the loaded library has done in this process so far.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[repr(C)]
        pub struct Counts { $($(#[$doc])* pub $name: u64,)* }

        #[derive(Default)]
        pub(crate) struct Tally { $(pub(crate) $name: AtomicU64,)* }

        impl Tally {
            fn counts(&self) -> Counts {
                Counts { $($name: self.$name.load(Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Calls of the driver API. An idle process makes none.
    calls,
    /// `cuFlushGPUDirectRDMAWrites` calls that succeeded.
    flushes,
    /// Kernel launches that were queued.
    launches,
    /// Entries that kernels have copied.
    kernel_copies,
    /// Queued copies from host to device.
    host_to_device,
    /// Queued copies from device to host.
    device_to_host,
    /// Queued copies from device to device.
    device_to_device,
    /// Queued copies from host to host.
    host_to_host,
    /// Calls of `cuMemcpyBatchAsync` that were queued. Their copies count by kind too.
    batches,
    /// Queued memsets.
    memsets,
    /// Data operations that have started: copies, batches, memsets and launches.
    operations,
    /// Stream captures that a call invalidated.
    invalidated_captures,
    /// Live allocations of `cuMemAlloc`.
    allocations,
    /// Live physical allocations of `cuMemCreate`, held by a handle or a mapping.
    physical,
    /// Live imports: legacy handles that are open, and shareable handles that were imported.
    imports,
    /// Live mappings of `cuMemMap`.
    mappings,
    /// Live address reservations of `cuMemAddressReserve`.
    reservations,
    /// Live registrations of host memory.
    registrations,
    /// Live streams, the default ones excluded.
    streams,
    /// Live events.
    events,
    /// Loaded modules.
    modules,
}

/// Settings that change while the process runs.
pub(crate) struct Knobs {
    pub(crate) delay: AtomicU64,
    pub(crate) failing_allocations: AtomicU64,
    /// Bytes that may still be allocated; see `oom_after`.
    pub(crate) allowance: AtomicU64,
}

struct State {
    tally: Tally,
    knobs: Knobs,
}

static STATE: std::sync::LazyLock<State> = std::sync::LazyLock::new(|| {
    let s = settings().clone().unwrap_or_else(|_| Settings::default());
    let delay = u64::try_from(s.delay.as_nanos()).unwrap_or(u64::MAX);
    State {
        tally: Tally::default(),
        knobs: Knobs {
            delay: AtomicU64::new(delay),
            failing_allocations: AtomicU64::new(0),
            allowance: AtomicU64::new(s.oom_after.unwrap_or(u64::MAX)),
        },
    }
});

pub(crate) fn tally() -> &'static Tally {
    &STATE.tally
}

pub(crate) fn knobs() -> &'static Knobs {
    &STATE.knobs
}

impl Knobs {
    pub(crate) fn delay(&self) -> Duration {
        Duration::from_nanos(self.delay.load(Relaxed))
    }

    /// Decides whether an allocation of `size` bytes must fail as asked by a test.
    pub(crate) fn allocate(&self, size: u64) -> Result<(), Error> {
        let one_less = |n: u64| n.checked_sub(1);
        if self.failing_allocations.fetch_update(Relaxed, Relaxed, one_less).is_ok() {
            return Err(Error::OUT_OF_MEMORY);
        }
        let allowed = |left: u64| if left == u64::MAX { Some(left) } else { left.checked_sub(size) };
        self.allowance.fetch_update(Relaxed, Relaxed, allowed).map(drop).map_err(|_| Error::OUT_OF_MEMORY)
    }
}

/// Runs a control function. Unlike `abi::enter` it counts nothing, so tests can look without disturbing the counts.
fn guarded(body: impl FnOnce() -> crate::error::Result) -> i32 {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)) {
        Ok(Ok(())) => 0,
        Ok(Err(error)) => error.0,
        Err(_) => Error::UNKNOWN.0,
    }
}

#[unsafe(no_mangle)]
extern "C" fn kvferry_standin_counts(counts: Out<Counts>) -> i32 {
    guarded(|| counts.put(tally().counts()))
}

#[unsafe(no_mangle)]
extern "C" fn kvferry_standin_set_delay(nanoseconds: u64) -> i32 {
    guarded(|| {
        knobs().delay.store(nanoseconds, Relaxed);
        stream::wake();
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn kvferry_standin_fail_allocations(count: u64) -> i32 {
    guarded(|| {
        knobs().failing_allocations.store(count, Relaxed);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn kvferry_standin_raise(device: i32, error: i32, after: u64) -> i32 {
    guarded(|| {
        driver()?.device(device)?.raise_after(Error(error), after);
        stream::wake();
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn kvferry_standin_hang(on: i32) -> i32 {
    guarded(|| {
        stream::hang(on != 0);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn kvferry_standin_hang_calls(on: i32) -> i32 {
    guarded(|| {
        stream::hang_calls(on != 0);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn kvferry_standin_fail_calls(name: In<libc::c_char>, error: i32, after: u64, count: u64) -> i32 {
    guarded(|| {
        faults::fail(&name.text()?, error, after, count);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn kvferry_standin_block_calls(name: In<libc::c_char>, on: i32) -> i32 {
    guarded(|| {
        faults::block(&name.text()?, on != 0);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn kvferry_standin_caught(name: In<libc::c_char>, calls: Out<u64>) -> i32 {
    guarded(|| calls.put(faults::caught(&name.text()?)))
}

#[unsafe(no_mangle)]
extern "C" fn kvferry_standin_read(address: u64, buffer: *mut u8, len: usize) -> i32 {
    guarded(|| {
        let pieces = space::resolve(address, len as u64, space::Access::Any)?;
        // SAFETY: `Control` passes a buffer of `len` bytes.
        unsafe { space::copy_out(&pieces, buffer) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn kvferry_standin_write(address: u64, bytes: *const u8, len: usize) -> i32 {
    guarded(|| {
        let pieces = space::resolve(address, len as u64, space::Access::Any)?;
        // SAFETY: `Control` passes a slice of `len` bytes.
        unsafe { space::copy_in(&pieces, bytes) };
        Ok(())
    })
}
