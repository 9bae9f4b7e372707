//! A handle that can be closed once, in bounded time, while other threads use it.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    time::Duration,
};

use pyo3::{
    exceptions::{PyRuntimeError, PyValueError},
    prelude::*,
};

/// A library object that Python holds.
pub struct Handle<T: Send + Sync + 'static> {
    name: &'static str,
    inner: Mutex<Option<Arc<T>>>,
}

impl<T: Send + Sync + 'static> Handle<T> {
    pub fn new(name: &'static str, inner: T) -> Self {
        Self { name, inner: Mutex::new(Some(Arc::new(inner))) }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<T>>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn get(&self) -> PyResult<Arc<T>> {
        self.lock().clone().ok_or_else(|| PyRuntimeError::new_err(format!("this {} was closed", self.name)))
    }

    /// Runs `last` on a thread of its own and waits for it, `limit` at most. Returns `true` if it finished. Otherwise the
    /// thread keeps running, and keeps the memory that it may still touch.
    pub fn close(&self, py: Python<'_>, limit: Duration, last: impl FnOnce(Arc<T>) + Send + 'static) -> bool {
        let Some(inner) = self.lock().take() else { return true };
        py.detach(|| {
            let (done, wait) = mpsc::channel();
            let work = move || {
                last(inner);
                // Fails if the caller stopped waiting.
                let _ = done.send(());
            };
            match std::thread::Builder::new().name("kvferry-close".into()).spawn(work) {
                Ok(_) => wait.recv_timeout(limit).is_ok(),
                Err(_) => false,
            }
        })
    }
}

impl<T: Send + Sync + 'static> Drop for Handle<T> {
    fn drop(&mut self) {
        // An exiting interpreter drops its objects one by one, and none may make it wait for a peer, so a thread does the
        // work. If no thread can be started, `inner` is dropped here.
        if let Some(inner) = self.inner.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = std::thread::Builder::new().name("kvferry-close".into()).spawn(move || drop(inner));
        }
    }
}

/// A duration in seconds from Python; `ValueError` if it is negative, too large or not a number.
pub fn seconds(s: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(s).map_err(|e| PyValueError::new_err(format!("{s} seconds is not a duration: {e}")))
}
