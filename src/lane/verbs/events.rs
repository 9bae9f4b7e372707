//! Asynchronous events of a device: ports that go down and come up, queue pairs and devices that fail.
//!
//! Owns one thread for each open device, which sleeps until an event comes. It logs events that an operator acts on, records
//! whether the device failed, wakes lanes, and tells subscribers. It touches no queue pair.

use std::{
    io,
    mem::MaybeUninit,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use ibverbs_sys as sys;
use rustix::event::{PollFd, PollFlags, poll};

use super::{cleanup, device::Device, wake::Bell};

/// An owner of objects on a device, which must release them when the device has failed: it cannot be closed before.
pub(crate) trait Subscriber: Send + Sync {
    /// Releases objects of failed devices. Called on a thread that may block.
    fn device_failed(&self);
}

/// The state of a device, by its events.
#[derive(Default)]
pub(crate) struct State {
    /// The device is unusable.
    fatal: AtomicBool,
    bells: Mutex<Vec<Bell>>,
    subscribers: Mutex<Vec<Weak<dyn Subscriber>>>,
}

impl State {
    /// Whether the device is unusable.
    pub(crate) fn fatal(&self) -> bool {
        self.fatal.load(Ordering::Acquire)
    }

    /// Rings this bell at every event, until its other owners are gone.
    pub(crate) fn wake(&self, bell: Bell) {
        let mut bells = lock(&self.bells);
        bells.retain(Bell::shared);
        bells.push(bell);
    }

    /// Tells this owner, once, when the device has failed. Subscribing twice has no further effect.
    pub(crate) fn subscribe(&self, subscriber: Weak<dyn Subscriber>) {
        let mut all = lock(&self.subscribers);
        all.retain(|s| s.strong_count() > 0);
        if !all.iter().any(|s| std::ptr::addr_eq(s.as_ptr(), subscriber.as_ptr())) {
            all.push(subscriber);
        }
    }

    /// Marks the device as failed, independently of its events.
    pub(crate) fn mark_fatal(&self) {
        self.fatal.store(true, Ordering::Release);
        self.ring();
        let subscribers = std::mem::take(&mut *lock(&self.subscribers));
        if !subscribers.is_empty() {
            // On another thread: a subscriber's list may be locked while a device is being opened.
            cleanup::spawn("kvferry-release", move || {
                subscribers.iter().filter_map(Weak::upgrade).for_each(|s| s.device_failed());
            });
        }
    }

    fn ring(&self) {
        lock(&self.bells).iter().for_each(Bell::ring);
    }

    /// Handles one event. `port` has a meaning in events of ports only.
    fn heard(&self, device: &str, event: u32, port: u8) {
        match event {
            sys::IBV_EVENT_PORT_ERR => {
                tracing::warn!(device, port, "link down: pulls on this rail fail over until it is up again");
            }
            sys::IBV_EVENT_PORT_ACTIVE => {
                tracing::info!(device, port, "link up");
            }
            sys::IBV_EVENT_DEVICE_FATAL => {
                tracing::error!(device, "the device failed or was removed: its lanes are closed");
                return self.mark_fatal();
            }
            sys::IBV_EVENT_GID_CHANGE | sys::IBV_EVENT_LID_CHANGE => {
                tracing::warn!(device, port, "the port's address changed: its lanes may fail, and are connected again");
            }
            // Events of queue pairs and completion queues: their completions tell the right lane as well.
            _ => tracing::debug!(device, event, "event"),
        }
        self.ring();
    }
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("fatal", &self.fatal()).finish_non_exhaustive()
    }
}

fn lock<T>(list: &Mutex<Vec<T>>) -> MutexGuard<'_, Vec<T>> {
    // A list is consistent after any panic.
    list.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The thread. Dropping this ends it.
#[derive(Debug)]
pub(crate) struct Watch {
    stop: Bell,
}

impl Watch {
    pub(crate) fn start(device: Arc<Device>, state: Arc<State>) -> io::Result<Self> {
        let stop = Bell::new()?;
        let end = stop.clone();
        rustix::io::ioctl_fionbio(device.async_events(), true)?;
        std::thread::Builder::new().name("kvferry-verbs".into()).spawn(move || listen(&device, &state, &end))?;
        Ok(Self { stop })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.ring();
    }
}

fn listen(device: &Device, state: &State, stop: &Bell) {
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
        // SAFETY: the context is open while `device` lives, and `event` is a valid place for the answer.
        if unsafe { (device.lib().get_async_event)(device.context(), event.as_mut_ptr()) } != 0 {
            let e = io::Error::last_os_error();
            if e.kind() == io::ErrorKind::WouldBlock || e.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            // A removed device has no events any more.
            state.mark_fatal();
            return;
        }
        // SAFETY: the call above succeeded and filled it in; all bytes were zero before.
        let mut event = unsafe { event.assume_init() };
        // SAFETY: every member of the union is plain data, and members that this event does not use are zero.
        let port = unsafe { event.element.port_num };
        state.heard(device.name(), event.event_type, u8::try_from(port).unwrap_or(0));
        // SAFETY: the event was taken and is acknowledged once.
        unsafe { (device.lib().ack_async_event)(&mut event) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Told(std::sync::atomic::AtomicU32);

    impl Subscriber for Told {
        fn device_failed(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn events_wake_remaining_lanes_and_only_a_failed_device_is_fatal() {
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

    #[test]
    fn a_subscriber_is_told_once_that_the_device_failed() {
        let (state, told, gone) = (State::default(), Arc::<Told>::default(), Arc::<Told>::default());
        let weak =
            |told: &Arc<Told>| -> Weak<dyn Subscriber> { Arc::downgrade(&(told.clone() as Arc<dyn Subscriber>)) };
        state.subscribe(weak(&told));
        state.subscribe(weak(&told));
        state.subscribe(weak(&gone));
        drop(gone);
        state.heard("dev0", sys::IBV_EVENT_PORT_ERR, 1);
        state.mark_fatal();
        state.mark_fatal();
        let limit = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while told.0.load(Ordering::SeqCst) == 0 {
            assert!(std::time::Instant::now() < limit);
            std::thread::yield_now();
        }
        // The thread that told it holds it until it is done.
        while Arc::strong_count(&told) > 1 {
            assert!(std::time::Instant::now() < limit);
            std::thread::yield_now();
        }
        assert_eq!(told.0.load(Ordering::SeqCst), 1);
    }
}
