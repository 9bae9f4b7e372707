//! The lane over InfiniBand and RoCE: RDMA READ through libibverbs.
//!
//! The producer runs a [`Server`]: it registers the pool and the fence table for remote READ, and makes queue pairs for each
//! lane, which end with the session. The consumer makes its own queue pairs ([`Opening`]), sends their description, and
//! connects to the queue pairs of the answer. After that the producer's CPU has no part in a read: blocks are read while it
//! is busy, or stopped.
//!
//! # Safety model
//! Every verbs call is `unsafe`, and all of them are in this folder. Each verbs object has one owner type (`Device`, `Pd`,
//! `Region`, `Cq`, `Qp`) that holds the objects it depends on, so that all are destroyed in the right order; no drop panics.
//! A device writes to local memory only through a posted READ. Its bounds are checked before it is filled, and the
//! registration and the memory are held until its path has nothing in flight, or teardown has made the path unable to write.
//! If teardown fails, the memory is never freed.
//!
//! Without the feature `verbs` only the messages of the exchange are compiled, for the control plane.
//!
//! libibverbs is opened at run time. The published `ibverbs` crate has no READ, so only the types of its FFI layer are used.
//!
//! # Trust
//! A connected queue pair can read the whole pool: verbs peers are one trust domain. Remote access is READ only, and queue
//! pairs are exchanged over the control plane and end with its session.

#[cfg(feature = "verbs")]
mod chain;
#[cfg(feature = "verbs")]
mod cleanup;
#[cfg(feature = "verbs")]
mod cq;
#[cfg(feature = "verbs")]
mod device;
#[cfg(feature = "verbs")]
mod error;
#[cfg(feature = "verbs")]
mod events;
mod exchange;
#[cfg(feature = "verbs")]
mod failure;
#[cfg(feature = "verbs")]
mod fences;
mod gid;
#[cfg(feature = "verbs")]
mod gpu;
#[cfg(feature = "verbs")]
mod landing;
#[cfg(feature = "verbs")]
mod lane;
#[cfg(feature = "verbs")]
mod library;
#[cfg(feature = "verbs")]
mod memory;
#[cfg(feature = "verbs")]
mod opening;
#[cfg(feature = "verbs")]
mod path;
#[cfg(feature = "verbs")]
mod qp;
#[cfg(feature = "verbs")]
mod rail;
#[cfg(feature = "verbs")]
mod rails;
#[cfg(feature = "verbs")]
mod server;
#[cfg(feature = "verbs")]
mod survey;
#[cfg(feature = "verbs")]
mod teardown;
#[cfg(feature = "verbs")]
mod wake;

#[cfg(all(test, feature = "verbs"))]
pub(crate) mod tests;

pub(crate) use exchange::{MAX_NAME, MAX_RAILS, QpEnd, RailEnd, Remote, ServedRail, VerbsRequest, VerbsTicket};
#[cfg(feature = "verbs")]
pub use {
    device::{Limits as DeviceLimits, Port},
    error::VerbsError,
    exchange::LinkLayer,
    gid::{Gid, GidEntry, GidType},
    gpu::GpuReach,
    survey::{DeviceReport, Dmabuf, PortReport, survey},
};
#[cfg(not(feature = "verbs"))]
pub(crate) use {exchange::LinkLayer, gid::Gid};
#[cfg(feature = "verbs")]
pub(crate) use {opening::Opening, rail::Role, rails::Rails, server::Server, teardown::COUNTERS};
