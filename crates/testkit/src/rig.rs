//! Producers in processes of their own, and consumers of them.

mod consumer;
mod producer;
mod role;
mod spec;
mod taken;

pub use consumer::*;
pub use producer::*;
pub use role::play;
pub use spec::*;
