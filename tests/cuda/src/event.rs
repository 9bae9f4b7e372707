//! Events: marks in streams. A record replaces the record before it; a wait is for the record at the time of its call.

use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, LazyLock};

use parking_lot::Mutex;

use crate::abi::{Out, api};
use crate::capture::Capture;
use crate::context::current;
use crate::control::tally;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::space::fresh_id;
use crate::stream::{self, Position, Work};

#[derive(Clone)]
struct Event {
    device: i32,
    last: Last,
}

/// The last record of an event.
#[derive(Clone)]
enum Last {
    Never,
    At(Position),
    Captured(Arc<Capture>),
}

static EVENTS: LazyLock<Mutex<HashMap<usize, Event>>> = LazyLock::new(Mutex::default);

/// `CU_EVENT_BLOCKING_SYNC` and `CU_EVENT_DISABLE_TIMING`.
const FLAGS: u32 = 1 | 2;
const INTERPROCESS: u32 = 4;

pub(crate) fn destroy_all(device: &Device) {
    EVENTS.lock().retain(|_, event| {
        let other = event.device != device.ordinal;
        if !other {
            tally().events.fetch_sub(1, Relaxed);
        }
        other
    });
}

fn get(event: usize) -> Result<Event> {
    EVENTS.lock().get(&event).cloned().ok_or(Error::INVALID_HANDLE)
}

/// The position to query or to wait for on the host.
fn position(event: usize) -> Result<Option<Position>> {
    match get(event)?.last {
        Last::Never => Ok(None),
        Last::At(position) => Ok(Some(position)),
        Last::Captured(capture) => {
            capture.invalidate();
            Err(Error::CAPTURED_EVENT)
        }
    }
}

fn record(event: usize, stream: usize) -> Result {
    if stream::device_of(stream)?.ordinal != get(event)?.device {
        return Err(Error::INVALID_HANDLE);
    }
    let capture = stream::capture_of(stream)?;
    let position = stream::submit(stream, Work::Record)?;
    let last = capture.map_or(Last::At(position), Last::Captured);
    EVENTS.lock().get_mut(&event).ok_or(Error::INVALID_HANDLE)?.last = last;
    Ok(())
}

fn wait(stream: usize, event: usize) -> Result {
    let last = get(event)?.last;
    match (stream::capture_of(stream)?, last) {
        (None, Last::Never) => Ok(()),
        (None, Last::At(position)) => stream::submit(stream, Work::Wait(position)).map(drop),
        (None, Last::Captured(capture)) => {
            capture.check()?;
            stream::join_capture(stream, &capture)
        }
        (Some(own), Last::Captured(other)) if Arc::ptr_eq(&own, &other) => own.check(),
        (Some(own), _) => {
            own.invalidate();
            Err(Error::STREAM_CAPTURE_ISOLATION)
        }
    }
}

api! {
    InContext fn cuEventCreate(event: Out<usize>, flags: u32) {
        if flags & INTERPROCESS != 0 {
            return Err(Error::NOT_SUPPORTED);
        }
        if flags & !FLAGS != 0 {
            return Err(Error::INVALID_VALUE);
        }
        let id = fresh_id() as usize;
        event.put(id)?;
        EVENTS.lock().insert(id, Event { device: current()?.ordinal, last: Last::Never });
        tally().events.fetch_add(1, Relaxed);
        Ok(())
    }

    InContext fn cuEventDestroy_v2(event: usize) {
        EVENTS.lock().remove(&event).ok_or(Error::INVALID_HANDLE)?;
        tally().events.fetch_sub(1, Relaxed);
        Ok(())
    }

    InContext fn cuEventRecord(event: usize, stream: usize) {
        record(event, stream)
    }

    NotInCapture fn cuEventQuery(event: usize) {
        position(event)?.map_or(Ok(()), Position::query)
    }

    NotInCapture fn cuEventSynchronize(event: usize) {
        position(event)?.map_or(Ok(()), Position::wait)
    }

    InContext fn cuStreamWaitEvent(stream: usize, event: usize, flags: u32) {
        if flags > 1 {
            return Err(Error::INVALID_VALUE);
        }
        wait(stream, event)
    }
}
