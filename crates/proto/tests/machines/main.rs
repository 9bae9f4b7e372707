//! The protocol's machines one at a time, with a clock that the test moves by hand: what each must hold, readable alone.
//! The simulation (`tests/sim`) runs them together through bad days.

mod offers;
mod plans;
mod pullers;
mod pulls;
mod sessions;
