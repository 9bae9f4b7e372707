//! The threads of a consumer or producer: the data thread, which owns a consumer's lanes and pull trackers, and the control
//! thread, which runs a rank's gRPC sessions.
//!
//! [`kvferry_proto::puller::Puller`] is the data thread's logic, without a thread or a clock: the simulation runs it
//! unchanged. [`thread`] gives it a clock, mail, and sleep.

pub(crate) mod runtime;
pub(crate) mod thread;
