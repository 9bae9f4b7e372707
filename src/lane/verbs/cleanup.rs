//! Threads for work that may block: destroying verbs objects waits for the device.

use std::sync::{Arc, Mutex, PoisonError};

use super::{cq::Cq, qp::Qp};

/// Runs `work` on a thread of its own. If no thread can be made, it runs here: late, but done.
pub(crate) fn spawn(name: &str, work: impl FnOnce() + Send + 'static) {
    let slot = Arc::new(Mutex::new(Some(work)));
    let theirs = slot.clone();
    let take = |s: &Mutex<Option<_>>| s.lock().unwrap_or_else(PoisonError::into_inner).take();
    let run = move || {
        if let Some(work) = take(&theirs) {
            work();
        }
    };
    if std::thread::Builder::new().name(name.into()).spawn(run).is_err()
        && let Some(work) = take(&slot)
    {
        work();
    }
}

/// Gives quiet queue pairs back to the device, then their completion queue, then the objects that both used.
pub(crate) fn give_back(
    pairs: impl FnOnce() -> Vec<Qp> + Send + 'static,
    queue: Option<Cq>,
    rest: impl Send + 'static,
) {
    spawn("kvferry-cleanup", move || {
        drop(pairs());
        drop(queue);
        drop(rest);
    });
}
