//! kvferry moves KV-cache blocks from a prefill engine to a decode engine, and reports, block by block, which ones arrived.
//!
//! One side **offers** blocks, the other **pulls** them: inside one host, over TCP, or over RDMA. A gRPC control plane
//! does the handshake and detects dead peers. It is built for failures in the middle of a transfer: a prefill process
//! restarts, a lease runs out, a link stalls.
//!
//! # The contract
//! 1. **Exact.** Every block of a pull ends in exactly one of two sets, `loaded` or `invalid`. A loaded block holds the
//!    bytes that the producer held in it while the offer was live.
//! 2. **Fresh.** Bytes read under an expired, revoked or reused offer, or from an earlier incarnation of the peer, are
//!    never `loaded`.
//! 3. **Timely.** Every pull *decides* (its two sets are frozen) by its deadline, whatever the network does.
//! 4. **Quiet.** A pull *ends* only when nothing can write its local blocks any more; only then is the engine told.
//! 5. **Frugal.** Blocks that arrived are kept, prefix first; a failed lane is replaced, and only missing blocks are read
//!    again.
//! 6. **Leak-free.** The producer gets its blocks back: released, or revoked at the end of the lease.
//! 7. **Isolated.** A peer's failure, or its bad input, affects that peer's pulls only.
//! 8. **Healing.** A peer that returns at the same address is served again by both sides without a restart.
//!
//! # In one page
//! ```
//! use kvferry::{BlockId, Consumer, GroupId, LocalBlocks, Model, OfferGroup, OfferSpec, PoolLayout, Producer, Pull, Ready};
//! use std::time::Duration;
//!
//! let model = Model { name: "m".into(), dtype: "uint8".into(), scales: "".into(), weights: "".into(), attention: "HND".into(), block_tokens: 16 };
//! let layout = PoolLayout::uniform(8, 2, 4096, 16);   // 8 blocks of 16 tokens, in 2 layers of 4096 bytes a block
//!
//! // The prefill side holds a request's KV in blocks 5 and 2, and offers them.
//! let producer = Producer::builder("prefill".parse()?, model.clone(), layout.clone()).build()?;
//! producer.memory().write_from(0, layout.groups[0].regions[0].block_offset(5), b"KV of the first 16 tokens")?;
//! let blocks = vec![Some(BlockId(5)), Some(BlockId(2))];
//! let groups = vec![OfferGroup { group: GroupId(0), first_position: 0, blocks }];
//! let offer = producer.offer(OfferSpec::new(32, groups), Ready::Now)?;
//!
//! // The offer travels through the router, and the decode side pulls it into its own blocks 0 and 1.
//! let consumer = Consumer::builder("decode".parse()?, model, layout).build()?;
//! let blocks = vec![Some(BlockId(0)), Some(BlockId(1))];
//! let wanted = LocalBlocks { group: GroupId(0), first_position: 0, blocks };
//! consumer.pull(Pull::new(offer, vec![wanted]).deadline(Duration::from_secs(5)))?;
//! let ended = consumer.wait(Duration::from_secs(10)).expect("a pull ends soon after its deadline at the latest");
//! assert!(ended.outcome.complete());
//! let mut bytes = [0; 25];
//! consumer.memory().read_into(0, 0, &mut bytes)?;
//! assert_eq!(&bytes, b"KV of the first 16 tokens");
//!
//! // The producer gets its blocks back.
//! assert!(producer.wait_freed(Duration::from_secs(5)).is_some());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Where to read on
//! - [`Producer`] and [`Consumer`]: the two sides. [`Config`]: every setting.
//! - [`scheduler`]: how a decode scheduler handles invalid blocks, and accounts for the source of prompt tokens.
//! - [`metrics`]: the counters of both sides.

// Every build decodes the messages of the verbs lane; most of their fields are used with the feature only.
#![cfg_attr(not(feature = "verbs"), allow(dead_code, unreachable_pub))]

#[cfg(test)]
mod api;
mod config;
mod consumer;
mod control;
mod dial_list;
mod driver;
mod error;
mod faults;
mod lane;
mod mailbox;
mod memory;
pub mod metrics;
mod producer;
mod repeats;
pub mod scheduler;
mod tls;

pub use config::{
    Config, CopyMethod, GpuConfig, LocalConfig, NameConfig, OnWedge, PullConfig, TcpConfig, TlsConfig, VerbsConfig,
};
pub use consumer::{Builder as ConsumerBuilder, Consumer, Pull};
pub use control::call::{CallError, Caller, probe, release};
pub use error::StartError;
pub use faults::{BadFault, BadSize, Faults, parse_bytes};
pub use kvferry_proto::{
    BadAddress, BadEngineId, BadLayout, BadOffer, Block, BlockId, BlockReport, Cause, ChunkSize, EngineId,
    Fingerprints, Gone, Group, GroupId, GroupKind, GroupOutcome, HelloError, Incarnation, LaneKind, LeaseConfig,
    Limits, LocalBlocks, Mismatch, Model, Offer, OfferError, OfferGroup, OfferId, OfferRank, Outcome, PeerId,
    PlanError, PoolLayout, PositionSet, PullError, Rank, Region, Seal, SealKey, SecretBytes, SessionConfig, Shard,
    Times, Token, WaitError, check_address,
    hello::{Hello, Welcome},
    puller::{Ended, Hold, HoldState, PullId},
    table::Freed,
};
pub use lane::built as built_lanes;
pub use memory::{CudaStream, GpuError, GpuInfo, Memory, Place, Span, survey_gpus};
pub use producer::{Builder as ProducerBuilder, OfferSpec, Producer, Ready};

/// The RDMA devices of this host, and their capabilities.
#[cfg(feature = "verbs")]
pub mod verbs {
    pub use crate::lane::verbs::{
        DeviceLimits, DeviceReport, Dmabuf, Gid, GidEntry, GidType, GpuReach, LinkLayer, Port, PortReport, VerbsError,
        survey,
    };

    /// Checks that the rails of `config` can be opened. Slow: it opens every device that they name.
    pub fn check(config: &crate::VerbsConfig) -> Result<(), VerbsError> {
        crate::lane::verbs::Rails::check(config)
    }

    /// How each rail of `config` reaches this memory, which must be on a GPU: each way of registration is tried with the first
    /// 2 MiB, and withdrawn. Empty for host memory.
    ///
    /// # Errors
    /// There is no libibverbs or no device, or the name of a rail is malformed.
    pub fn gpu_reach(config: &crate::VerbsConfig, memory: &crate::Memory) -> Result<Vec<GpuReach>, VerbsError> {
        crate::lane::verbs::Rails::gpu_reach(config, memory)
    }
}

/// The example of the README is compiled and run with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
