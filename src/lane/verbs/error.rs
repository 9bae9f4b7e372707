//! What can be wrong with verbs on a host. Each message names the cause and the fix; the pull goes on over another lane.

use std::io;

use kvferry_proto::error::Cause;

use crate::lane::LaneError;

/// Why verbs cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerbsError {
    /// The library is not on this host.
    #[error("libibverbs.so.1 cannot be opened ({why}): install libibverbs1 and ibverbs-providers (rdma-core)")]
    NoLibrary {
        /// What the loader said.
        why: String,
    },
    /// The library is too old.
    #[error("libibverbs.so.1 has no {symbol}: install rdma-core 28 or newer")]
    OldLibrary {
        /// The missing function.
        symbol: &'static str,
    },
    /// No device at all.
    #[error(
        "this host has no RDMA device: is the NIC's driver loaded (`rdma link`), and does the container see \
         /dev/infiniband and /sys/class/infiniband?"
    )]
    NoDevice,
    /// Not that device.
    #[error("there is no RDMA device {name:?}; there are: {have}")]
    NoSuchDevice {
        /// As asked for.
        name: String,
        /// Those that there are.
        have: String,
    },
    /// A rail's name that is not one.
    #[error("{name:?} is not a rail: write DEVICE or DEVICE:PORT, such as mlx5_0:1")]
    BadRail {
        /// As asked for.
        name: String,
    },
    /// The device may not be opened.
    #[error(
        "device {device} may not be opened: let this user open /dev/infiniband/uverbs* (in a container: --device /dev/infiniband)"
    )]
    NotPermitted {
        /// The device.
        device: String,
    },
    /// The library knows no such hardware.
    #[error("libibverbs has no driver for {device}: install ibverbs-providers, or the one of the NIC's vendor")]
    NoProvider {
        /// The device.
        device: String,
    },
    /// Its link is down.
    #[error("port {port} of {device} is {state}, not ACTIVE: check cable, switch and `ip link`, or use another rail")]
    PortDown {
        /// The device.
        device: String,
        /// The port.
        port: u8,
        /// Its state.
        state: &'static str,
    },
    /// No such port.
    #[error("{device} has no port {port}; its ports are 1 to {ports}")]
    NoSuchPort {
        /// The device.
        device: String,
        /// As asked for.
        port: u8,
        /// How many it has.
        ports: u8,
    },
    /// A segment of the pool is longer than a region of the device may be.
    #[error("{device} registers at most {most} bytes at once, and a segment of the pool has {bytes}: divide it")]
    TooLarge {
        /// The device.
        device: String,
        /// The segment's bytes.
        bytes: u64,
        /// The device's limit.
        most: u64,
    },
    /// Neither InfiniBand nor Ethernet.
    #[error("port {port} of {device} is neither InfiniBand nor Ethernet (RoCE): use another rail")]
    LinkLayer {
        /// The device.
        device: String,
        /// The port.
        port: u8,
    },
    /// Another protocol over Ethernet.
    #[error("{device} speaks iWARP, and kvferry InfiniBand and RoCE: use another rail")]
    Iwarp {
        /// The device.
        device: String,
    },
    /// No address that a peer can reach.
    #[error(
        "port {port} of {device} has no RoCE v2 GID that a peer could reach: give its network interface an IP address \
         (`ip addr`), or name a GID with --gid-index"
    )]
    NoGid {
        /// The device.
        device: String,
        /// The port.
        port: u8,
    },
    /// The GID that was asked for is empty.
    #[error("port {port} of {device} has no GID at index {index}: see `kvferry doctor` for those it has")]
    BadGid {
        /// The device.
        device: String,
        /// The port.
        port: u8,
        /// As asked for.
        index: u32,
    },
    /// RLIMIT_MEMLOCK.
    #[error(
        "registering this would lock {need} bytes, and this process may lock {limit}: raise RLIMIT_MEMLOCK (`ulimit -l unlimited`, \
         LimitMEMLOCK=infinity, or --ulimit memlock=-1), or give it CAP_IPC_LOCK"
    )]
    Memlock {
        /// Bytes that would be locked, those that are locked already included.
        need: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// This kind of memory cannot be registered here.
    #[error("{device} cannot register {what}: {source}")]
    Register {
        /// The device.
        device: String,
        /// What was to be registered, and what to do.
        what: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// The pool is still being registered.
    #[error("the pool is still being registered ({done} of {all} bytes): try again, or use another lane meanwhile")]
    NotYet {
        /// Bytes registered.
        done: u64,
        /// Bytes to register.
        all: u64,
    },
    /// No rail is usable.
    #[error("no rail can be used: {why}")]
    NoRail {
        /// Each rail's reason.
        why: String,
    },
    /// The two ends have no rail in common.
    #[error(
        "no rail of one end reaches one of the other: {why}; both need InfiniBand, or RoCE v2 addresses of one family"
    )]
    NoPath {
        /// What was tried.
        why: String,
    },
    /// The peer's part of the exchange makes no sense.
    #[error("the peer's queue pairs make no sense: {what}; are both ends kvferry of the same version?")]
    Protocol {
        /// What is wrong.
        what: &'static str,
    },
    /// A limit of lanes.
    #[error("at its limit of {limit} lanes (limits.lanes)")]
    Full {
        /// The limit.
        limit: usize,
    },
    /// A call failed.
    #[error("{what} on {device}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The device.
        device: String,
        /// The system's error.
        source: io::Error,
    },
}

impl VerbsError {
    /// The cause that a pull's blocks get when no other lane is left.
    pub fn cause(&self) -> Cause {
        match self {
            Self::NoPath { .. } | Self::PortDown { .. } => Cause::Unreachable,
            _ => Cause::LaneFailed,
        }
    }
}

impl From<VerbsError> for LaneError {
    fn from(e: VerbsError) -> Self {
        match e {
            VerbsError::NoPath { .. } => Self::NoPath { what: e.to_string() },
            VerbsError::NotYet { .. } => Self::NotYet { what: e.to_string() },
            VerbsError::Protocol { what } => Self::Protocol { what: what.into() },
            e => Self::Io { what: "verbs", source: io::Error::other(e) },
        }
    }
}
