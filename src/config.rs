//! Every setting, with its default and the reason for it.

use std::time::Duration;

use kvferry_proto::{
    config::{LeaseConfig, Limits, SessionConfig},
    lane::LaneKind,
    plan::ChunkSize,
};

use crate::{error::StartError, faults::Faults};

/// What to do when the ladder's last rung fails and blocks stay in quarantine for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnWedge {
    /// Keep them out of use, and turn the health red.
    #[default]
    Withhold,
    /// End the process: a restart is the only cure, and an orchestrator may prefer it at once.
    Exit,
}

/// Settings of a pull that a consumer uses unless the pull says otherwise.
#[derive(Debug, Clone)]
pub struct PullConfig {
    /// From the call to the decision.
    pub deadline: Duration,
    /// How chunks are cut.
    pub chunk: ChunkSize,
    /// Tries on lanes of one pull, the first included, before it gives up ahead of its deadline.
    /// With the usual waits 8 of them take 0.6 s: who would rather wait for a port that flaps than compute takes 11, for 5 s.
    pub attempts: u32,
    /// Wait before a lane of the same kind is tried again; doubles with each try.
    pub retry_wait: Duration,
    /// How long a peer is read over a worse lane than might be had (one of a kind that is not the first choice, one that
    /// lost a rail) before a better one is looked for; doubles with each look up to `look_max`.
    pub look_min: Duration,
    /// Longest time between two looks for a better lane. Each costs both sides milliseconds, and a path that is looked for in
    /// vain, or fails again, costs those who read over it more.
    pub look_max: Duration,
    /// Which lanes may be used, best first. Those that a peer does not offer are left out.
    pub lanes: Vec<LaneKind>,
    /// See [`OnWedge`].
    pub on_wedge: OnWedge,
    /// Break lanes on purpose: for disconnect tests.
    pub faults: Option<Faults>,
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
        }
    }
}

/// Settings of the TCP lane.
#[derive(Debug, Clone)]
pub struct TcpConfig {
    /// Connections of one lane. One is best on a small machine; several pay where one core cannot fill the wire.
    pub connections: usize,
    /// Bytes asked for and not yet received, over all connections of a lane. Enough to keep the wire full.
    pub window: u64,
}

impl Default for TcpConfig {
    fn default() -> Self {
        Self { connections: 1, window: 8 << 20 }
    }
}

/// Settings of the verbs lane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerbsConfig {
    /// Rails to use, each `DEVICE` or `DEVICE:PORT`; empty: every port that is up.
    pub rails: Vec<String>,
    /// Index of the GID to use on every rail; `None`: the best one, by type and reach.
    pub gid_index: Option<u8>,
    /// Queue pairs to a peer on each rail, 1 to 4. Two keep a NIC's engines busy; more only cost.
    pub queue_pairs: usize,
    /// Requests of a queue pair that may be in flight: a power of two, at most 4096.
    pub depth: u32,
    /// Every how many requests one reports its completion, long ones at every 256 KiB.
    pub signal_every: u32,
    /// Bytes in flight on a rail. More than 400 Gbit/s hold in 100 us, and little enough to drain in time.
    pub window: u64,
    /// Longest READ, in bytes. Longer ones are cut, so that several are in flight and a lost packet costs little.
    pub max_read: u32,
    /// How long the end of little data (64 KiB at most) is looked for before the thread sleeps, from when something of it
    /// last came or was posted: to be woken takes longer than a short READ. Zero sleeps at once. A NIC answers in some
    /// microseconds; soft-RoCE in an emulated machine takes up to half a millisecond, and so the default is more than that.
    pub spin: Duration,
    /// READs that a queue pair has in flight on the wire; what the devices take is less at times.
    pub rd_atomic: u8,
    /// Transport timeout: an answer is waited for 4.096 us * 2^timeout; 1 to 20. 0 would be for ever.
    pub timeout: u8,
    /// How often a request is sent again, 0 to 6. 7 is for ever on some devices.
    pub retry: u8,
    /// The wait that a receiver that is not ready asks for: a code of the specification; 12 is 0.64 ms.
    pub min_rnr_timer: u8,
    /// InfiniBand's service level.
    pub service_level: u8,
    /// Traffic class of packets with a global header: DSCP and ECN on RoCE.
    pub traffic_class: u8,
    /// Let devices write in any order where they can. Never used for the fence table.
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
    /// The longest that the transport takes to give a request up.
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
            Self { timeout: 0 | 21.., .. } => Err("timeout must be 1 to 20: 0 waits for ever"),
            Self { retry: 7.., .. } => Err("retry must be 0 to 6: 7 is for ever on some devices"),
            Self { min_rnr_timer: 32.., .. } => Err("min_rnr_timer must be 0 to 31"),
            Self { service_level: 16.., .. } => Err("service_level must be 0 to 15"),
            _ => Ok(()),
        }
    }
}

/// All settings of one rank, as producer and as consumer.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// Leases of offers.
    pub lease: LeaseConfig,
    /// Sessions.
    pub session: SessionConfig,
    /// Bounds.
    pub limits: Limits,
    /// Pulls.
    pub pull: PullConfig,
    /// The TCP lane.
    pub tcp: TcpConfig,
    /// The verbs lane.
    pub verbs: VerbsConfig,
    /// Certificates of the control plane; `None`: plain text.
    pub tls: Option<TlsConfig>,
}

/// Certificates and keys, PEM, of one rank. With a client CA both sides prove who they are.
#[derive(Clone)]
pub struct TlsConfig {
    /// This rank's certificate chain.
    pub certificate: Vec<u8>,
    /// Its private key.
    pub key: Vec<u8>,
    /// The authority that peers' certificates must come from, in both directions.
    pub ca: Vec<u8>,
    /// Name that producers' certificates carry, whatever address they are reached at.
    pub server_name: String,
}

impl std::fmt::Debug for TlsConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsConfig").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}

impl Config {
    /// Checks what cannot work.
    pub fn check(&self) -> Result<(), StartError> {
        let bad = |field, why: &str| Err(StartError::Config { field, why: why.into() });
        let s = &self.session;
        if s.heartbeat.is_zero() || s.idle_heartbeat.is_zero() {
            return bad("session.heartbeat", "must be longer than zero");
        }
        if s.suspect < s.heartbeat || s.down < s.suspect {
            return bad("session.suspect", "must lie between heartbeat and down");
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
        if self.pull.lanes.is_empty() {
            return bad("pull.lanes", "must name at least one lane");
        }
        if self.pull.look_min.is_zero() {
            return bad("pull.look_min", "must not be 0: every pull would look; Duration::MAX turns looking off");
        }
        if self.pull.look_max < self.pull.look_min {
            return bad("pull.look_max", "must not be shorter than look_min");
        }
        if self.pull.attempts == 0 {
            return bad("pull.attempts", "must be at least 1");
        }
        if self.tcp.connections == 0 || self.tcp.window == 0 {
            return bad("tcp", "needs a connection and a window");
        }
        if let Err(why) = self.verbs.check() {
            return bad("verbs", why);
        }
        Ok(())
    }
}
