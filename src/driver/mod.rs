//! The rail: one thread that owns a consumer's lanes and pull trackers, and the queues between it and the sessions.
//!
//! [`rail`] is the part without a thread: it is told what happened and what time it is, like the protocol's machines, and
//! the simulation runs it as it is. [`thread`] gives it a clock, a place to sleep, and its mail.

pub(crate) mod mailbox;
pub(crate) mod runtime;
pub(crate) mod thread;
