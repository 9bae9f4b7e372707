//! The protocol's machines one at a time, with a clock that the test moves by hand.
//! The simulation (`tests/sim`) runs them together through seeded failures.

mod offers;
mod plans;
mod pullers;
mod pulls;
mod sessions;
mod staging;
