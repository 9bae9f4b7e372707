//! Errors of verbs on a host. Each message names the cause and the fix; the pull goes on over another lane.

use std::io;

use kvferry_proto::Cause;

use crate::lane::LaneError;

/// The reason for which verbs cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerbsError {
    /// The library is not on this host.
    #[error("libibverbs.so.1 cannot be opened ({why}): install libibverbs1 and ibverbs-providers (rdma-core)")]
    NoLibrary {
        /// The loader's message.
        why: String,
    },
    /// The library is too old.
    #[error("libibverbs.so.1 has no {symbol}: install rdma-core 28 or newer")]
    OldLibrary {
        /// The missing function.
        symbol: &'static str,
    },
    /// This host has no device.
    #[error(
        "this host has no RDMA device: is the NIC's driver loaded (`rdma link`), and does the container see \
         /dev/infiniband and /sys/class/infiniband?"
    )]
    NoDevice,
    /// No device of this name.
    #[error("there is no RDMA device {name:?}; this host has: {have}")]
    NoSuchDevice {
        /// The configured name.
        name: String,
        /// The names of this host's devices.
        have: String,
    },
    /// A malformed name of a rail.
    #[error("{name:?} is not a rail: write DEVICE or DEVICE:PORT, such as mlx5_0:1")]
    BadRail {
        /// The configured name.
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
    /// The library has no driver for the device.
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
        /// The configured port.
        port: u8,
        /// How many ports it has.
        ports: u8,
    },
    /// A segment of the pool is longer than the device's limit for a region.
    #[error(
        "{device} registers at most {most} bytes at once, and a segment of the pool has {bytes}: split the segment"
    )]
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
    /// iWARP, another protocol over Ethernet.
    #[error("{device} speaks iWARP, which kvferry does not support: use an InfiniBand or RoCE rail")]
    Iwarp {
        /// The device.
        device: String,
    },
    /// The port has no address that a peer can reach.
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
    /// The configured GID is empty.
    #[error("port {port} of {device} has no GID at index {index}: `kvferry doctor` lists its GIDs")]
    BadGid {
        /// The device.
        device: String,
        /// The port.
        port: u8,
        /// The configured index.
        index: u32,
    },
    /// RLIMIT_MEMLOCK.
    #[error(
        "registering this would lock {need} bytes, and this process may lock {limit}: raise RLIMIT_MEMLOCK (`ulimit -l unlimited`, \
         LimitMEMLOCK=infinity, or --ulimit memlock=-1), or give it CAP_IPC_LOCK"
    )]
    Memlock {
        /// Bytes that would be locked, including those that are locked already.
        need: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// This kind of memory cannot be registered here.
    #[error("{device} cannot register {what}: {source}")]
    Register {
        /// The device.
        device: String,
        /// The kind of memory, and the fix.
        what: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// The device does not reach the GPU's memory.
    #[error("{device} does not reach the GPU's memory: as a dmabuf: {dmabuf}; by address: {peermem}")]
    GpuMemory {
        /// The device.
        device: String,
        /// Why it cannot be registered as a dmabuf.
        dmabuf: String,
        /// Why it cannot be registered by address, which needs nvidia-peermem.
        peermem: String,
    },
    /// Writes of NICs would not be visible in time.
    #[error("{why}")]
    Unordered {
        /// The reason.
        why: String,
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
    #[error("no rail is usable: {why}")]
    NoRail {
        /// Each rail's reason.
        why: String,
    },
    /// No rail of one end reaches a rail of the other.
    #[error(
        "no rail of one end reaches one of the other: {why}; both need InfiniBand, or RoCE v2 addresses of one family"
    )]
    NoPath {
        /// The addresses that were tried.
        why: String,
    },
    /// The peer's part of the exchange is malformed.
    #[error("the peer's queue pairs are malformed: {what}; are both ends kvferry of the same version?")]
    Protocol {
        /// The malformed part.
        what: &'static str,
    },
    /// The limit of lanes is reached.
    #[error("at the limit of {limit} lanes (limits.lanes)")]
    Full {
        /// The limit.
        limit: usize,
    },
    /// A call failed.
    #[error("{what} on {device}: {source}")]
    Os {
        /// The call.
        what: &'static str,
        /// The device.
        device: String,
        /// The system's error.
        source: io::Error,
    },
}

impl VerbsError {
    /// The cause of a pull's invalid blocks when no other lane is left.
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
