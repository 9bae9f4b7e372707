//! A handle that can be closed once, in bounded time, while other threads use it.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    time::Duration,
};

use pyo3::{
    exceptions::{PyRuntimeError, PyValueError},
    prelude::*,
};

/// Something of the library that Python holds.
pub struct Handle<T: Send + Sync + 'static> {
    what: &'static str,
    inner: Mutex<Option<Arc<T>>>,
}

impl<T: Send + Sync + 'static> Handle<T> {
    pub fn new(what: &'static str, inner: T) -> Self {
        Self { what, inner: Mutex::new(Some(Arc::new(inner))) }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<T>>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn get(&self) -> PyResult<Arc<T>> {
        self.lock().clone().ok_or_else(|| PyRuntimeError::new_err(format!("this {} was closed", self.what)))
    }

    /// Has another thread do the last things, and waits for it no longer than `limit`. `true`: all is done. `false`: it goes
    /// on alone, and keeps the memory that it may still touch.
    pub fn close(&self, py: Python<'_>, limit: Duration, last: impl FnOnce(Arc<T>) + Send + 'static) -> bool {
        let Some(inner) = self.lock().take() else { return true };
        py.detach(|| {
            let (done, wait) = mpsc::channel();
            let work = move || {
                last(inner);
                // Nobody may be waiting any more.
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
        // An interpreter that ends drops its objects one after the other: none of them may make it wait for a peer. Without
        // a thread to do it, the process is past caring.
        if let Some(inner) = self.inner.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = std::thread::Builder::new().name("kvferry-close".into()).spawn(move || drop(inner));
        }
    }
}

/// Seconds from Python; `None` when they are no duration.
pub fn seconds(s: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(s).map_err(|e| PyValueError::new_err(format!("{s} seconds is no duration: {e}")))
}
