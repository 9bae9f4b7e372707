//! Asynchronous events of a device: ports that go down and come up, queue pairs and devices that die.
//!
//! Owns one thread for each open device, asleep but for an event. It logs what an operator acts on, keeps what a lane must
//! know, and wakes the lanes. It touches no queue pair.

use std::{
    io,
    mem::MaybeUninit,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use ibverbs_sys as sys;
use rustix::event::{PollFd, PollFlags, poll};

use super::{device::Device, wake::Bell};

/// What events have said so far.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// The device is of no more use.
    fatal: AtomicBool,
    bells: Mutex<Vec<Bell>>,
}

impl State {
    /// Whether the device is of no more use.
    pub(crate) fn fatal(&self) -> bool {
        self.fatal.load(Ordering::Acquire)
    }

    /// Rings this bell with every event, until nobody else has it.
    pub(crate) fn wake(&self, bell: Bell) {
        let mut bells = self.bells.lock().unwrap_or_else(PoisonError::into_inner);
        bells.retain(Bell::shared);
        bells.push(bell);
    }

    /// Takes the device for dead, whatever its events say.
    pub(crate) fn condemn(&self) {
        self.fatal.store(true, Ordering::Release);
        self.ring();
    }

    fn ring(&self) {
        self.bells.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(Bell::ring);
    }

    /// One event; `port` is meant only by events of ports.
    fn heard(&self, device: &str, event: u32, port: u8) {
        match event {
            sys::IBV_EVENT_PORT_ERR => {
                tracing::warn!(device, port, "link down: pulls on this rail fail over until it is up again");
            }
            sys::IBV_EVENT_PORT_ACTIVE => {
                tracing::info!(device, port, "link up");
            }
            sys::IBV_EVENT_DEVICE_FATAL => {
                self.fatal.store(true, Ordering::Release);
                tracing::error!(device, "the device failed or was removed: its lanes are closed");
            }
            sys::IBV_EVENT_GID_CHANGE | sys::IBV_EVENT_LID_CHANGE => {
                tracing::warn!(device, port, "the port's address changed: lanes over it may fail, and are made anew");
            }
            // Of queue pairs and completion queues: their completions say it too, and to the right lane.
            _ => tracing::debug!(device, event, "event"),
        }
        self.ring();
    }
}

/// The thread. Dropping this ends it.
#[derive(Debug)]
pub(crate) struct Watch {
    stop: Bell,
}

impl Watch {
    /// `died` is called when the device turns out to be of no more use.
    pub(crate) fn start(device: Arc<Device>, state: Arc<State>, died: impl Fn() + Send + 'static) -> io::Result<Self> {
        let stop = Bell::new()?;
        let end = stop.clone();
        rustix::io::ioctl_fionbio(device.async_events(), true)?;
        std::thread::Builder::new().name("kvferry-verbs".into()).spawn(move || listen(&device, &state, &end, died))?;
        Ok(Self { stop })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.ring();
    }
}

fn listen(device: &Device, state: &State, stop: &Bell, died: impl Fn()) {
    let events = device.async_events();
    let stop = stop.fd();
    loop {
        let mut fds = [PollFd::new(&stop, PollFlags::IN), PollFd::new(&events, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return,
        }
        if !fds[0].revents().is_empty() {
            return;
        }
        let mut event = MaybeUninit::<sys::ibv_async_event>::zeroed();
        // SAFETY: the context is open while `device` lives, and the place is valid.
        if unsafe { (device.lib().get_async_event)(device.context(), event.as_mut_ptr()) } != 0 {
            let e = io::Error::last_os_error();
            if e.kind() == io::ErrorKind::WouldBlock || e.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            // A removed device has no events any more.
            state.condemn();
            died();
            return;
        }
        // SAFETY: the call above succeeded and filled it in; all bytes were zero before.
        let mut event = unsafe { event.assume_init() };
        // SAFETY: every member of the union is plain data, and zero bytes were there for those that are not meant.
        let port = unsafe { event.element.port_num };
        state.heard(device.name(), event.event_type, u8::try_from(port).unwrap_or(0));
        // SAFETY: the event was taken and is acknowledged once.
        unsafe { (device.lib().ack_async_event)(&mut event) };
        if state.fatal() {
            died();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_wake_whoever_is_left_and_only_a_dead_device_is_fatal() {
        let state = State::default();
        let bell = Bell::new().unwrap();
        state.wake(bell.clone());
        state.heard("dev0", sys::IBV_EVENT_PORT_ERR, 1);
        assert!(!state.fatal(), "a port that is down comes up again");
        assert!(rustix::io::read(bell.fd(), &mut [0u8; 8]).is_ok());
        state.heard("dev0", sys::IBV_EVENT_PORT_ACTIVE, 1);
        assert!(!state.fatal());
        state.heard("dev0", sys::IBV_EVENT_DEVICE_FATAL, 77);
        assert!(state.fatal());
        drop(bell);
        state.wake(Bell::new().unwrap());
        assert_eq!(state.bells.lock().unwrap().len(), 1);
    }
}
