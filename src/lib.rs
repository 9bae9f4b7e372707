//! kvferry moves KV-cache blocks between LLM serving engines and says, block by block, what arrived.
#![deny(clippy::undocumented_unsafe_blocks)]

pub mod block;
pub mod config;
pub mod error;
pub mod group;
pub mod lane;
pub mod model;
pub mod offer;
pub mod plan;
pub mod protocol;
pub mod scheduler;
pub mod shard;
