//! The protocol: no I/O, no clock, no unsafe.
//!
//! A state machine takes events and the time, and returns actions. Sockets, threads and memory are in another crate, so a
//! failure is a unit test, and the simulation runs these machines through thousands of seeded failures a second.

mod address;
mod block;
mod config;
mod contents;
mod error;
pub mod fence;
mod frame;
mod group;
pub mod hello;
mod lane;
mod model;
mod offer;
mod outcome;
mod plan;
pub mod pull;
pub mod puller;
pub mod quarantine;
pub mod retry;
pub mod sabotage;
pub mod session;
mod shard;
mod source;
pub mod staging;
pub mod table;
mod token;

use std::time::Instant;

pub use self::{
    address::*, block::*, config::*, contents::*, error::*, frame::*, group::*, lane::*, model::*, offer::*,
    outcome::*, plan::*, shard::*, token::*,
};

/// A state machine that is fed events and asked for actions.
pub trait Machine {
    /// An event.
    type In;
    /// An action.
    type Out;

    /// Takes an event. A timeout is not an event, see [`Machine::tick`].
    fn handle(&mut self, now: Instant, event: Self::In);

    /// Takes the time. Calling it early, late or often does no harm.
    fn tick(&mut self, now: Instant);

    /// The next action, in order; `None` until the next event.
    fn poll(&mut self) -> Option<Self::Out>;

    /// The time of the next [`Machine::tick`] if no event comes before it.
    fn next_timeout(&self) -> Option<Instant>;
}
