//! Mail to a thread that sleeps in epoll: a queue, and an eventfd that is written only while the reader sleeps.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};

/// A queue into one thread. A clone is another handle to the same queue.
#[derive(Debug)]
pub(crate) struct Mailbox<T>(Arc<Inner<T>>);

#[derive(Debug)]
struct Inner<T> {
    queue: Mutex<VecDeque<T>>,
    asleep: AtomicBool,
    wake: OwnedFd,
}

impl<T> Clone for Mailbox<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Mailbox<T> {
    /// An empty queue.
    pub(crate) fn new() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(Inner { queue: Mutex::new(VecDeque::new()), asleep: AtomicBool::new(false), wake })))
    }

    /// Sends one item, and wakes the reader if it sleeps.
    pub(crate) fn send(&self, mail: T) {
        self.0.queue.lock().push_back(mail);
        if self.0.asleep.swap(false, Ordering::SeqCst) {
            // The counter cannot overflow: it is written once per sleep.
            let _ = rustix::io::write(&self.0.wake, &1u64.to_ne_bytes());
        }
    }

    /// Moves all mail to `into`.
    pub(crate) fn take(&self, into: &mut VecDeque<T>) {
        into.append(&mut self.0.queue.lock());
    }

    /// The reader is about to sleep on [`Mailbox::fd`]. `false`: there is mail, so it must not sleep.
    pub(crate) fn about_to_sleep(&self) -> bool {
        self.0.asleep.store(true, Ordering::SeqCst);
        if self.0.queue.lock().is_empty() {
            return true;
        }
        self.0.asleep.store(false, Ordering::SeqCst);
        false
    }

    /// The reader is awake again.
    pub(crate) fn awake(&self) {
        self.0.asleep.store(false, Ordering::SeqCst);
        let mut count = [0; 8];
        // Fails if another event woke the reader.
        let _ = rustix::io::read(&self.0.wake, &mut count);
    }

    /// Readable when there is mail for a sleeping reader.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.0.wake.as_fd()
    }
}
