//! The health of this process: good until local memory may be written at any time (a lane wedged, or the data thread
//! panicked). Only a restart helps then, so it never turns good again, and every control server in the process reports it.

use std::sync::LazyLock;

use tokio::sync::watch;

static GOOD: LazyLock<watch::Sender<bool>> = LazyLock::new(|| watch::Sender::new(true));

/// Turns the health of this process bad.
pub(crate) fn turn_bad() {
    GOOD.send_replace(false);
}

/// Whether the health is good, now and later.
pub(crate) fn watch() -> watch::Receiver<bool> {
    GOOD.subscribe()
}
