//! Producers in processes of their own, and what the tests need around them.

mod consumer;
mod producer;
mod role;
mod sockets;
mod taken;

use std::time::Duration;

use kvferry::Model;

pub use consumer::*;
pub use producer::*;
pub use role::play;
pub use sockets::{listening_names, listening_ports};

/// Longest that a test waits for something that should happen soon. A loaded machine is slow, not broken.
pub const SOON: Duration = Duration::from_secs(20);

/// The model of tests: bytes without a meaning, in blocks of 16 tokens.
pub fn model(name: &str, dtype: &str) -> Model {
    Model { name: name.into(), dtype: dtype.into(), scales: String::new(), attention: "HND".into(), block_tokens: 16 }
}
