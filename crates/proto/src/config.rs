//! Settings of the machines, each with its default and the reason for it.

use std::time::Duration;

/// How a producer rank keeps offers.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct LeaseConfig {
    /// Lifetime of an offer without a claim. Covers the queues of the router and the decode side.
    pub unclaimed: Duration,
    /// A claim holds for this long after its last renewal. Several heartbeats, so that a lost one does no harm.
    pub claimed: Duration,
    /// Longest lifetime of an offer, however often it is renewed.
    pub hard_cap: Duration,
    /// How long a claim of an unknown offer is answered `NotYet`: the name may overtake the offer.
    pub early_grace: Duration,
    /// How long an awaited claim waits for its offer: its request is in the prefill engine's queue.
    pub awaited: Duration,
    /// How long a producer remembers why an offer is gone.
    pub tombstone: Duration,
    /// How much later than its successors a numbered name may be entered. After that it is unknown at once, without
    /// `early_grace`. An engine enters the names of one step together, and steps overlap by one or two: a step takes 10 to
    /// 100 ms.
    pub reorder: Duration,
}

impl Default for LeaseConfig {
    fn default() -> Self {
        Self {
            unclaimed: Duration::from_secs(30),
            claimed: Duration::from_secs(10),
            hard_cap: Duration::from_secs(600),
            early_grace: Duration::from_secs(2),
            awaited: Duration::from_secs(120),
            tombstone: Duration::from_secs(120),
            reorder: Duration::from_millis(250),
        }
    }
}

/// How a session notices that its peer died, and how it reconnects.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SessionConfig {
    /// Time between two pings while claims are held.
    pub heartbeat: Duration,
    /// Time between two pings of an idle session, which must cost next to nothing.
    pub idle_heartbeat: Duration,
    /// A producer ends a session after this much silence.
    pub silence: Duration,
    /// Silence after which a peer is suspect and gets no new claims.
    pub suspect: Duration,
    /// Silence after which a peer is down.
    pub down: Duration,
    /// Longest time for a dial and Hello.
    pub hello_timeout: Duration,
    /// First wait before a new dial; doubles up to `redial_max`, with jitter.
    pub redial_min: Duration,
    /// Longest wait before a new dial.
    pub redial_max: Duration,
    /// A session without a pull for this long is closed.
    pub idle: Duration,
    /// Silence of a stream after which a second connection is dialled beside it, while claims or releases wait: the network
    /// may have forgotten the first. Two heartbeats, so that a slow answer costs no dial; half of `suspect`, so that
    /// the new connection answers before a pull loses its patience.
    pub second_dial: Duration,
}

impl Default for SessionConfig {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(500),
            idle_heartbeat: Duration::from_secs(10),
            silence: Duration::from_secs(60),
            suspect: Duration::from_millis(2000),
            down: Duration::from_secs(10),
            hello_timeout: Duration::from_secs(5),
            redial_min: Duration::from_millis(20),
            redial_max: Duration::from_secs(2),
            idle: Duration::from_secs(300),
            second_dial: Duration::from_millis(1000),
        }
    }
}

/// Bounds on the demands of peers and callers. A request or a session over a bound ends with a clear error.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Limits {
    /// Largest control frame to a consumer, in bytes. A grant of 1,000,000 scattered blocks takes about 6 MB, one of
    /// consecutive blocks a few bytes. A frame to a producer has at most 128 KiB.
    pub frame_bytes: usize,
    /// Blocks in an offer or a pull.
    pub blocks_per_offer: usize,
    /// Live offers of a producer: words in its fence table.
    pub offers: usize,
    /// Claims on one offer.
    pub claims_per_offer: usize,
    /// Claims of one session.
    pub claims_per_session: usize,
    /// Sessions of a producer.
    pub sessions: usize,
    /// Data connections of a producer, over all sessions.
    pub lanes: usize,
    /// Pulls of a consumer that have not ended.
    pub pulls: usize,
    /// Peers that a consumer keeps at once.
    pub peers: usize,
    /// Most tombstones that a producer remembers, and most early claims.
    pub remembered: usize,
    /// Connections of one peer to a producer's control plane, and below its sessions, data connections and claims. A peer
    /// is the set of engines in a certificate, else a source address (of IPv6 the first 64 bits), so many pods behind one
    /// address are one peer. The default is twice the sessions, since a consumer that dials again holds two for a moment.
    pub connections_per_peer: usize,
    /// Each rank of a consumer holds one. The default serves 64 pods of 8 ranks behind one address, and is a sixteenth of
    /// all sessions.
    pub sessions_per_peer: usize,
    /// A rank keeps 1 to 8 of each kind. The default is an eighth of all.
    pub lanes_per_peer: usize,
    /// A rank holds one for each pull. The default is four full sessions.
    pub claims_per_peer: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            frame_bytes: 16 << 20,
            blocks_per_offer: 1 << 20,
            offers: 1 << 16,
            claims_per_offer: 256,
            claims_per_session: 1 << 16,
            sessions: 8192,
            lanes: 16384,
            pulls: 1 << 16,
            peers: 8192,
            remembered: 1 << 16,
            connections_per_peer: 1024,
            sessions_per_peer: 512,
            lanes_per_peer: 2048,
            claims_per_peer: 1 << 18,
        }
    }
}
