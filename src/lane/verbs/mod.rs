//! The lane over InfiniBand and RoCE: RDMA READ through libibverbs.
//!
//! The producer runs a [`Server`]: it registers the pool and the fence table for remote READ, and gives each lane queue
//! pairs that end with the session. The consumer makes its own queue pairs ([`Opening`]), sends what they are, and connects
//! to what comes back. From then on the producer's CPU has no part in it: blocks are read while it is busy, or stopped.
//!
//! # Safety model
//! `unsafe` is needed for every verbs call, and stays in this folder. Each verbs object has one owner type (`Device`, `Pd`,
//! `Region`, `Cq`, `Qp`) that holds what it depends on, so that they go in the right order whatever is dropped first; no
//! drop panics. A device writes to local memory only through a posted READ: bounds are checked before it is filled, and the
//! registration and the memory are held until its path says that nothing is in flight or the ladder says that nothing can
//! be written any more. When even the ladder cannot say so, the memory is never freed.
//!
//! Without the feature `verbs` only the words of the exchange are compiled, for the control plane.
//!
//! libibverbs is opened at run time. The published `ibverbs` crate cannot READ, so only the types of its FFI layer are used.
//!
//! # Trust
//! A connected queue pair can read the whole pool: verbs peers are one trust domain. Remote access is READ only, and queue
//! pairs are exchanged over the control plane and end with its session.

#[cfg(feature = "verbs")]
mod chain;
#[cfg(feature = "verbs")]
mod connect;
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
mod fences;
mod gid;
#[cfg(feature = "verbs")]
mod ladder;
#[cfg(feature = "verbs")]
mod landing;
#[cfg(feature = "verbs")]
mod lane;
#[cfg(feature = "verbs")]
mod library;
#[cfg(feature = "verbs")]
mod memory;
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
mod wake;

#[cfg(all(test, feature = "verbs"))]
mod tests;

pub(crate) use exchange::{MAX_NAME, MAX_RAILS, QpEnd, RailEnd, Remote, ServedRail, VerbsRequest, VerbsTicket};
#[cfg(feature = "verbs")]
pub(crate) use {connect::Opening, ladder::COUNTERS, rail::Role, rails::Rails, server::Server};
#[cfg(feature = "verbs")]
pub use {
    device::{Limits as DeviceLimits, Port},
    error::VerbsError,
    exchange::LinkLayer,
    gid::{Gid, GidEntry, GidType},
    survey::{DeviceReport, Dmabuf, PortReport, survey},
};
#[cfg(not(feature = "verbs"))]
pub(crate) use {exchange::LinkLayer, gid::Gid};
