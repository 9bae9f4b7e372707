//! A thread with a tokio runtime for the control plane of one rank. One thread is enough: it carries heartbeats and claims,
//! never KV blocks.

use std::{
    io,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::event::{EventfdFlags, eventfd};
use tokio::{runtime::Handle, sync::oneshot};

/// Descriptors that must be free before a runtime is built. tokio needs six: epoll and its copy, a waker, two sockets for
/// signals and a copy.
const SPARE: usize = 8;

/// A running runtime. Dropping it ends all its tasks.
#[derive(Debug)]
pub(crate) struct Runtime {
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Runtime {
    /// Starts a runtime on a thread of this name.
    pub(crate) fn start(name: &str) -> io::Result<Self> {
        // tokio panics if it gets no descriptor for its signal sockets.
        let spare = (0..SPARE).map(|_| eventfd(0, EventfdFlags::CLOEXEC)).collect::<Result<Vec<_>, _>>()?;
        drop(spare);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            // Ends when the sender is dropped.
            let _ = runtime.block_on(stopped);
            runtime.shutdown_background();
        })?;
        Ok(Self { handle, stop: Some(stop), thread: Some(thread) })
    }

    /// Waits until its tasks have ended by themselves, for `limit` at most.
    pub(crate) fn wait_idle(&self, limit: Duration) {
        let until = Instant::now() + limit;
        // Polled every millisecond, during a shutdown only: tokio has no event for the end of the last task.
        while self.handle.metrics().num_alive_tasks() > 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// To spawn tasks on it.
    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(t) = self.thread.take()
            && t.thread().id() != std::thread::current().id()
        {
            // The panic hook has already printed a panic of that thread.
            let _ = t.join();
        }
    }
}
