//! The health of this process. It turns bad when local memory may be written at any time: a lane wedged, or the data thread
//! panicked. Only a restart helps then, so it never turns good again. Every control server in the process reports it by the
//! gRPC health service, as SERVING or NOT_SERVING.

use std::sync::LazyLock;

use tokio::sync::watch;

static GOOD: LazyLock<watch::Sender<bool>> = LazyLock::new(|| watch::Sender::new(true));

/// Turns the health of this process bad.
pub(crate) fn turn_bad() {
    GOOD.send_replace(false);
}

/// Whether the health is good; notifies of a change.
pub(crate) fn watch() -> watch::Receiver<bool> {
    GOOD.subscribe()
}
