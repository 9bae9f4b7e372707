//! Every setting, with its default and the reason for it.

use std::{path::PathBuf, time::Duration};

use kvferry_proto::{ChunkSize, EngineId, LaneKind, LeaseConfig, Limits, SealKey, SessionConfig};

use crate::{dial_list::DialList, error::StartError, faults::Faults};

/// What to do when a lane wedges: its last teardown stage failed, so a device may still write local blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnWedge {
    /// Withhold the blocks, and report NOT_SERVING by the gRPC health of this process.
    #[default]
    Withhold,
    /// Exit the process. Only a restart frees the blocks, and an orchestrator may prefer it at once.
    Exit,
}

/// Settings of pulls. A [`Pull`](crate::Pull) can replace its deadline and lanes.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PullConfig {
    /// From the call to the decision.
    pub deadline: Duration,
    /// The size of chunks.
    pub chunk: ChunkSize,
    /// Attempts of one pull, the first included, before it gives up ahead of its deadline. With the default waits, 8
    /// attempts take 0.6 s. Set 11, which take 5 s, to wait out a flapping port rather than recompute the blocks.
    pub attempts: u32,
    /// Wait before the next attempt on a lane of the same kind; doubles with each attempt.
    pub retry_wait: Duration,
    /// How long a peer is read over a lane that is not the best possible (of a kind that is not the first choice, or
    /// without a rail that failed) before the first search for a better lane. Doubles with each search, up to `look_max`.
    pub look_min: Duration,
    /// Longest time between two searches for a better lane. Each costs both sides milliseconds, and a better lane that
    /// fails again costs its pulls more.
    pub look_max: Duration,
    /// Which lanes may be used, best first. Lanes that a peer does not serve are skipped.
    pub lanes: Vec<LaneKind>,
    /// What to do when a lane wedges.
    pub on_wedge: OnWedge,
    /// Break lanes on purpose, for tests.
    pub faults: Option<Faults>,
    /// How long a pull may move nothing from a peer that has been silent for [`SessionConfig::suspect`]. It then ends with
    /// [`Cause::PeerDown`](crate::Cause::PeerDown), ahead of its deadline: two seconds of waiting cost a user less than most
    /// prompts cost an engine. While data moves (over verbs, or out of the mapped pool of a stopped process), a pull goes on.
    /// Longer where engines are known to pause; `Duration::MAX` always waits for the deadline.
    pub patience: Duration,
    /// How long a pull waits for the first block of an offer that grows or is awaited: its request is in the prefill engine's
    /// queue. The peer is alive meanwhile: `patience` is for a silent one.
    pub queued: Duration,
    /// How long a pull waits for the next growth of an offer after that: longer than the longest step of a prefill engine.
    pub stalled: Duration,
}

impl Default for PullConfig {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(30),
            chunk: ChunkSize::default(),
            attempts: 8,
            retry_wait: Duration::from_millis(10),
            look_min: Duration::from_secs(1),
            look_max: Duration::from_secs(60),
            lanes: vec![LaneKind::Verbs, LaneKind::Local, LaneKind::Tcp],
            on_wedge: OnWedge::Withhold,
            faults: None,
            patience: Duration::from_secs(2),
            queued: Duration::from_secs(60),
            stalled: Duration::from_secs(10),
        }
    }
}

/// Settings of the local lane.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LocalConfig {
    /// Users, beside this process's own, whose processes may share local lanes with it: as consumers they may read the whole
    /// pool, and write it if it is GPU memory (the driver's handles have no read-only form); as producers their memory is read.
    /// Root is no exception.
    pub uids: Vec<u32>,
}

/// Settings of the TCP lane.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct TcpConfig {
    /// Connections of one lane, 1 to 64. One is best on a small machine; several help where one core cannot fill the network.
    pub connections: usize,
    /// Most bytes requested and not yet received, over all connections of a lane. The default keeps the network busy.
    pub window: u64,
    /// Checksum the data: a chunk whose bytes were changed on their way (TCP's own checksum misses two words that changed
    /// places) is read again. In force if both ends set it, and not with certificates, since TLS sees every change. Off,
    /// because it takes a sixth of the lane's rate where both cores are busy: see docs/benchmarks.md. Requests and the frames
    /// around data are always checked.
    pub checksum: bool,
}

impl Default for TcpConfig {
    fn default() -> Self {
        Self { connections: 1, window: 8 << 20, checksum: false }
    }
}

impl TcpConfig {
    /// Most connections of one lane. More do not help, since the producer serves all of a rank on one thread. It refuses more,
    /// so that a consumer with one lane cannot take all of `limits.lanes`.
    pub(crate) const MOST_CONNECTIONS: usize = 64;
}

/// Settings of the verbs lane.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct VerbsConfig {
    /// Rails to use, each `DEVICE` or `DEVICE:PORT`; empty: every port that is up.
    pub rails: Vec<String>,
    /// Index of the GID to use on every rail; `None`: the best one, by type and scope.
    pub gid_index: Option<u8>,
    /// Queue pairs to a peer on each rail, 1 to 4. Two keep a NIC's engines busy; more only cost memory.
    pub queue_pairs: usize,
    /// Requests of a queue pair that may be in flight: a power of two, at most 4096.
    pub depth: u32,
    /// One of this many requests reports its completion; of long requests, one every 256 KiB.
    pub signal_every: u32,
    /// Most bytes in flight on a rail. The default is more than 400 Gbit/s carry in 100 us, and drains in time.
    pub window: u64,
    /// Longest READ, in bytes. Longer reads are cut, so that several are in flight and a lost packet costs little.
    pub max_read: u32,
    /// How long the data thread spins for the completion of little data (64 KiB at most) before it sleeps, since the last
    /// completion or post. A wake-up takes longer than a short READ. Zero sleeps at once. A NIC answers in a few
    /// microseconds; soft-RoCE in an emulated machine takes up to half a millisecond, so the default is longer than that.
    pub spin: Duration,
    /// READs that a queue pair has in flight on the wire, if both devices support as many.
    pub rd_atomic: u8,
    /// Transport timeout, 1 to 20: the device waits 4.096 us * 2^timeout for an answer. 0 would wait indefinitely.
    pub timeout: u8,
    /// How often a request is sent again, 0 to 6. 7 means without limit on some devices.
    pub retry: u8,
    /// The wait that a receiver requests while it is not ready, as a code of the specification; 12 is 0.64 ms.
    pub min_rnr_timer: u8,
    /// Service level, InfiniBand only.
    pub service_level: u8,
    /// Traffic class of packets with a global header: DSCP and ECN on RoCE.
    pub traffic_class: u8,
    /// Let devices write in any order, where they support it. Never used for the fence table.
    pub relaxed_ordering: bool,
}

impl Default for VerbsConfig {
    fn default() -> Self {
        Self {
            rails: Vec::new(),
            gid_index: None,
            queue_pairs: 2,
            depth: 128,
            signal_every: 16,
            window: 8 << 20,
            max_read: 1 << 20,
            spin: Duration::from_millis(1),
            rd_atomic: 16,
            timeout: 14,
            retry: 3,
            min_rnr_timer: 12,
            service_level: 0,
            traffic_class: 0,
            relaxed_ordering: true,
        }
    }
}

impl VerbsConfig {
    /// How long the transport takes, at most, to fail a request.
    pub fn gives_up_after(&self) -> Duration {
        Duration::from_nanos(4096 << self.timeout.min(31)) * (u32::from(self.retry) + 1)
    }

    fn check(&self) -> Result<(), &'static str> {
        match self {
            Self { queue_pairs: 0 | 5.., .. } => Err("queue_pairs must be 1 to 4"),
            Self { depth, .. } if !depth.is_power_of_two() || *depth > 4096 => {
                Err("depth must be a power of two, at most 4096")
            }
            Self { signal_every: 0, .. } => Err("signal_every must be at least 1"),
            Self { window: 0, .. } | Self { max_read: 0, .. } => Err("window and max_read must not be 0"),
            Self { rd_atomic: 0, .. } => Err("rd_atomic must be at least 1"),
            Self { timeout: 0 | 21.., .. } => Err("timeout must be 1 to 20: 0 waits indefinitely"),
            Self { retry: 7.., .. } => Err("retry must be 0 to 6: 7 has no limit on some devices"),
            Self { min_rnr_timer: 32.., .. } => Err("min_rnr_timer must be 0 to 31"),
            Self { service_level: 16.., .. } => Err("service_level must be 0 to 15"),
            _ => Ok(()),
        }
    }
}

/// How ranges are copied between GPU memory and the pinned ring, or between GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum CopyMethod {
    /// By their length: long ranges one by one; short ones by a kernel through a buffer on the GPU, or in one batch where the
    /// kernel cannot be loaded.
    #[default]
    Auto,
    /// One copy for each range.
    Copies,
    /// One batch (`cuMemcpyBatchAsync`); one copy for each range where the driver has none.
    Batch,
    /// The kernel, also for long ranges. It needs multiprocessors, which a busy engine may not have to spare.
    Kernel,
}

/// Settings of GPU memory. They matter only where the pool is GPU memory.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct GpuConfig {
    /// How ranges are copied.
    pub copy: CopyMethod,
    /// Bytes of the pinned ring in host memory that data passes through where it cannot go into GPU memory, or out of it,
    /// directly; 1 MiB to 4 GiB. A producer and a consumer have one each.
    pub ring: u64,
    /// How long copies may take to end once a pull has stopped. Pulls stop that much earlier before their deadline; copies
    /// that take longer wedge their lane.
    pub copy_bound: Duration,
}

impl Default for GpuConfig {
    fn default() -> Self {
        Self { copy: CopyMethod::Auto, ring: 64 << 20, copy_bound: Duration::from_millis(250) }
    }
}

/// All settings of one rank, as producer and as consumer. A new version may add settings, so start from the defaults:
///
/// ```
/// let mut config = kvferry::Config::default();
/// config.pull.attempts = 11;
/// config.tcp.connections = 4;
/// # config.check()?;
/// # Ok::<(), kvferry::StartError>(())
/// ```
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Config {
    /// Leases of offers.
    pub lease: LeaseConfig,
    /// Sessions.
    pub session: SessionConfig,
    /// Bounds.
    pub limits: Limits,
    /// Pulls.
    pub pull: PullConfig,
    /// The local lane.
    pub local: LocalConfig,
    /// The TCP lane.
    pub tcp: TcpConfig,
    /// The verbs lane.
    pub verbs: VerbsConfig,
    /// GPU memory.
    pub gpu: GpuConfig,
    /// Certificates; `None`: plain text.
    pub tls: Option<TlsConfig>,
    /// Names of offers.
    pub names: NameConfig,
    /// The engines that this rank offers to and pulls from; empty, the default: every engine. With [`Config::tls`] it is
    /// enforced, by the engines that a peer's certificate names. Without, it is advice: a peer may claim any engine id.
    pub engines: Vec<EngineId>,
    /// The hosts that this rank connects to as a consumer, data servers included; empty, the default: every host. Each is a
    /// network (`10.1.0.0/16`, `fd00::/8`), an address, a host name, or the end of host names (`.prefill.example`). A host
    /// name must be listed by name: it is not resolved to see whether its address is. Set it wherever clients reach the
    /// engine, since a name can come from anywhere: a name that leads elsewhere is refused without a packet.
    pub dial: Vec<String>,
}

/// Settings of names.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct NameConfig {
    /// Keys that this deployment's engines share. A producer seals its names with the first one, and a consumer accepts only
    /// names that one of them has sealed. A client, which has no key, can then neither change a name nor make the consumer
    /// connect anywhere. Several keys make it possible to replace a key without a pause. Empty: names are not sealed, and
    /// any name is accepted.
    pub seal_keys: Vec<SealKey>,
}

/// Certificates and keys of one rank, in PEM. Both sides prove their identity. Every field is required, each of the first
/// three as bytes or as a file; the default is empty.
///
/// A certificate names the engines that it may speak for, as subject alternative names: the URI `kvferry://engine/ID` (`ID`
/// percent-encoded), or `kvferry://engine/*` for a certificate that a deployment shares. One that names none is refused.
#[derive(Clone, Default)]
#[non_exhaustive]
pub struct TlsConfig {
    /// This rank's certificate chain.
    pub certificate: Vec<u8>,
    /// Its private key.
    pub key: Vec<u8>,
    /// The authority that must have signed the peers' certificates, in both directions.
    pub ca: Vec<u8>,
    /// The name in producers' certificates (a DNS name or an address), whatever their address is.
    pub server_name: String,
    /// In place of `certificate`: its file. Files are read again within a second of a change, or when the next connection is
    /// made. Open connections go on. Unusable new files are logged once, and the old ones stay in force.
    pub certificate_file: Option<PathBuf>,
    /// In place of `key`: its file.
    pub key_file: Option<PathBuf>,
    /// In place of `ca`: its file. It may hold several authorities, so that one can be replaced by another.
    pub ca_file: Option<PathBuf>,
}

impl std::fmt::Debug for TlsConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsConfig").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}

impl Config {
    /// Checks every setting; the error names the first bad one.
    pub fn check(&self) -> Result<(), StartError> {
        let bad = |field, why: &str| Err(StartError::Config { field, why: why.into() });
        let s = &self.session;
        if s.heartbeat.is_zero() || s.idle_heartbeat.is_zero() {
            return bad("session.heartbeat", "must be longer than zero");
        }
        if s.suspect < s.heartbeat || s.down < s.suspect {
            return bad("session.suspect", "must lie between heartbeat and down");
        }
        if s.second_dial.is_zero() {
            return bad("session.second_dial", "must not be 0: every frame would dial; Duration::MAX turns it off");
        }
        if s.silence < s.idle_heartbeat * 2 {
            return bad("session.silence", "must be at least two idle heartbeats, or idle sessions end");
        }
        if self.lease.claimed < s.heartbeat * 2 {
            return bad("lease.claimed", "must be at least two heartbeats, or live claims run out");
        }
        if self.lease.hard_cap < self.lease.claimed {
            return bad("lease.hard_cap", "must not be shorter than a claim's lease");
        }
        if self.limits.offers == 0 || self.limits.offers > 1 << 24 {
            return bad("limits.offers", "must be 1 to 16777216");
        }
        // Runs of scattered blocks take 6 bytes a block at most: 5 for the block's number, 1 for the run's length.
        if self.limits.frame_bytes < self.limits.blocks_per_offer.saturating_mul(6).saturating_add(64 << 10) {
            return bad(
                "limits.frame_bytes",
                "must be at least 6 bytes a block of limits.blocks_per_offer, plus 64 KiB",
            );
        }
        if self.pull.lanes.is_empty() {
            return bad("pull.lanes", "must name at least one lane");
        }
        if self.pull.look_min.is_zero() {
            return bad("pull.look_min", "must not be 0: every pull would search; Duration::MAX turns the search off");
        }
        if self.pull.look_max < self.pull.look_min {
            return bad("pull.look_max", "must not be shorter than look_min");
        }
        if self.pull.attempts == 0 {
            return bad("pull.attempts", "must be at least 1");
        }
        if !(1..=TcpConfig::MOST_CONNECTIONS).contains(&self.tcp.connections) {
            return bad("tcp.connections", "must be 1 to 64");
        }
        if self.tcp.window == 0 {
            return bad("tcp.window", "must not be 0");
        }
        if let Err(why) = self.verbs.check() {
            return bad("verbs", why);
        }
        if !(1 << 20..=4 << 30).contains(&self.gpu.ring) {
            return bad("gpu.ring", "must be 1 MiB to 4 GiB");
        }
        if let Err(why) = DialList::new(&self.dial) {
            return bad("dial", &why);
        }
        Ok(())
    }
}
