//! The protocol: no I/O, no clock, no unsafe.
//!
//! Everything here is told what happened and what time it is, and answers what to do. Sockets, threads and memory live
//! elsewhere, so a bad day is a unit test, and the simulation runs these machines through thousands of them a second.

pub mod block;
pub mod config;
pub mod error;
pub mod fence;
pub mod frame;
pub mod group;
pub mod hello;
pub mod lane;
pub mod model;
pub mod offer;
pub mod outcome;
pub mod plan;
pub mod pull;
pub mod puller;
pub mod quarantine;
pub mod retry;
pub mod sabotage;
pub mod session;
pub mod shard;
mod source;
pub mod table;

use std::time::Instant;

/// A state machine that is fed events and asked for actions.
pub trait Machine {
    /// What happens to it.
    type In;
    /// What it wants done.
    type Out;

    /// Tells it what happened. A timeout is told by [`Machine::tick`].
    fn handle(&mut self, now: Instant, event: Self::In);

    /// Tells it what time it is. Calling it early, late or often does no harm.
    fn tick(&mut self, now: Instant);

    /// The next thing to do, in order; `None` until something happens again.
    fn poll(&mut self) -> Option<Self::Out>;

    /// When to call [`Machine::tick`], if nothing happens before.
    fn next_timeout(&self) -> Option<Instant>;
}
