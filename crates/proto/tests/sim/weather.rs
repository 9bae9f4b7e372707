//! The faults of a seed. Some seeds have one kind of fault only, so that the other promises can be checked in full.

use std::time::Duration;

use kvferry_proto::{LeaseConfig, Limits, SessionConfig, pull::Retry, puller::better::Waits};

use crate::{rng::Rng, trace::Micros};

/// The kind of a seed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Day {
    /// No faults: everything must be loaded.
    Calm,
    /// Lanes fail, hang, wedge.
    Lanes,
    /// Producers die, stop, restart.
    Deaths,
    /// Engines revoke, cancel, are late, re-use at once.
    Games,
    /// The control network loses, delays, reorders, breaks.
    Network,
    /// The network forgets connections: they carry nothing from then on, without an error. New ones work.
    Holes,
    /// Any of it, together.
    Storm,
}

/// Faults of the control network. Chances are per mille.
#[derive(Debug, Clone, Default)]
pub(crate) struct Net {
    pub delay: (Micros, Micros, Micros),
    pub loss: u64,
    pub dup: u64,
    pub reorder: u64,
    /// A stream breaks after about this long; 0: never.
    pub breaks: Micros,
    /// New streams that carry nothing, without an error.
    pub blackhole: u64,
    pub dial_timeout: u64,
    pub dial_refused: u64,
    /// A stream carries nothing any more after about this long, without an error; 0: never.
    pub forgets: Micros,
}

/// Faults of lanes. Chances are per mille.
#[derive(Debug, Clone, Default)]
pub(crate) struct LaneLuck {
    pub fail: u64,
    pub hang: u64,
    pub lost: u64,
    pub late: u64,
    pub torn: u64,
    /// A read that is reported as done although nothing was read, or other words were. The lane takes the chunk back.
    pub unread: u64,
    /// An attempt that does not drain, once stopped.
    pub stuck: u64,
    /// Reads in flight at a stop land late.
    pub late_after_stop: u64,
    pub wedge: u64,
    pub down: u64,
    pub no_lane: u64,
    pub copies: CopyLuck,
    pub latency: (Micros, Micros, Micros),
}

/// Faults of the copies from a ring to GPU memory. Chances are per mille.
#[derive(Debug, Clone, Default)]
pub(crate) struct CopyLuck {
    pub latency: (Micros, Micros, Micros),
    /// A copy takes some milliseconds.
    pub stall: u64,
    /// A copy takes so long that its lane wedges first, or never ends.
    pub hang: u64,
    /// A copy fails, and its lane's copier with it.
    pub fail: u64,
    /// Of those failures, the ones that make the process's device unusable.
    pub dead: u64,
}

/// Behaviour of engines and routers. Chances are per mille.
#[derive(Debug, Clone, Default)]
pub(crate) struct Games {
    pub revoke: u64,
    pub cancel: u64,
    /// The name overtakes the offer.
    pub early: u64,
    pub late_ready: u64,
    pub late_handover: u64,
    pub twice: u64,
    /// A name is changed on its way: its token, its token count or a fingerprint.
    pub mangle: u64,
    pub unpulled: u64,
    pub short_deadline: u64,
    pub late_local: u64,
    /// A prefill grows its offer while it runs.
    pub grow: u64,
    /// A request waits in the decode engine's queue: its offer is held first.
    pub hold: u64,
    /// The producer's steps stall between one and the next.
    pub stall: u64,
}

/// One seed's weather and settings.
#[derive(Debug, Clone)]
pub(crate) struct Weather {
    pub net: Net,
    pub lanes: LaneLuck,
    pub games: Games,
    pub producer_deaths: u64,
    pub consumer_deaths: u64,
    pub lease: LeaseConfig,
    pub session: SessionConfig,
    pub limits: Limits,
    /// Limits are so small that they are reached.
    pub tight: bool,
    pub retry: Retry,
    /// Waits before a search for a better lane.
    pub looks: Waits,
    pub requests: u64,
    /// The network's only fault is that it forgets connections, which costs no pull a block.
    pub only_holes: bool,
    /// How long the storm lasts.
    pub length: Micros,
    /// Most of a lane's quiet bound.
    pub quiet_bound: (Micros, Micros),
    /// The longest time that copies may take.
    pub copy_bound: Micros,
    /// How likely a consumer's memory is GPU memory.
    pub gpu: u64,
    /// How likely freed blocks are overwritten at once.
    pub reuse: u64,
}

const MS: Micros = 1000;

impl Weather {
    pub(crate) fn new(rng: &mut Rng) -> Self {
        let day = *rng.pick(&[
            Day::Calm,
            Day::Lanes,
            Day::Lanes,
            Day::Deaths,
            Day::Deaths,
            Day::Games,
            Day::Games,
            Day::Network,
            Day::Holes,
            Day::Storm,
            Day::Storm,
            Day::Storm,
            Day::Storm,
        ]);
        let storm = day == Day::Storm;
        let mut on = |d: Day| day == d || (storm && rng.chance(700));
        let (lanes, deaths, games, network) = (on(Day::Lanes), on(Day::Deaths), on(Day::Games), on(Day::Network));
        let holes = day == Day::Holes || (network && rng.chance(300));
        let tight = storm && rng.chance(120);
        let claimed = rng.between(60, 300) * MS;
        let length = rng.between(60, 300) * MS;
        let heartbeat = rng.between(8, 18) * MS;
        let mut w = Self {
            net: Net { delay: (10, rng.between(50, 400), 400), ..Net::default() },
            lanes: LaneLuck {
                latency: (5, rng.between(20, 800), 1000),
                torn: 300,
                copies: CopyLuck { latency: (5, rng.between(10, 500), 1000), ..CopyLuck::default() },
                ..LaneLuck::default()
            },
            games: Games { short_deadline: 0, stall: 50, ..Games::default() },
            producer_deaths: 0,
            consumer_deaths: 0,
            lease: {
                let mut lease = LeaseConfig::default();
                lease.unclaimed = micros(rng.between(40, 200) * MS);
                lease.claimed = micros(claimed);
                lease.hard_cap = micros(length + rng.between(200, 600) * MS);
                lease.early_grace = micros(30 * MS);
                lease.awaited = micros(300 * MS);
                // Offers that are entered later than 20 ms are excused.
                lease.reorder = micros(21 * MS);
                lease.tombstone = micros(rng.between(50, 500) * MS);
                lease
            },
            session: {
                let mut session = SessionConfig::default();
                session.heartbeat = micros(heartbeat);
                session.idle_heartbeat = micros(rng.between(30, 100) * MS);
                session.silence = micros(400 * MS);
                session.suspect = micros(heartbeat * rng.between(2, 3));
                session.second_dial = micros(heartbeat);
                session.down = micros(heartbeat * rng.between(4, 6));
                session.hello_timeout = micros(50 * MS);
                session.redial_min = micros(MS);
                session.redial_max = micros(rng.between(5, 40) * MS);
                session.idle = micros(if rng.chance(300) { 20 * MS } else { 3000 * MS });
                session
            },
            limits: {
                let mut limits = Limits::default();
                limits.offers = 256;
                limits
            },
            tight,
            retry: Retry {
                attempts: rng.between(3, 10) as u32,
                wait: micros(rng.between(100, 4000)),
                ..Retry::new(0, Duration::ZERO, micros(heartbeat * rng.between(2, 3)))
            },
            looks: Waits { first: micros(rng.between(0, 20) * MS), longest: micros(100 * MS) },
            requests: rng.between(4, 14),
            length,
            only_holes: day == Day::Holes,
            quiet_bound: (2 * MS, rng.between(4, 30) * MS),
            copy_bound: rng.between(4, 10) * MS,
            gpu: *rng.pick(&[0, 500, 1000]),
            reuse: rng.between(300, 1000),
        };
        if tight {
            w.limits.offers = rng.between(1, 4) as usize;
            w.limits.claims_per_offer = rng.between(1, 2) as usize;
            w.limits.claims_per_session = rng.between(1, 3) as usize;
            w.limits.remembered = rng.between(1, 4) as usize;
        }
        // A macro, since a closure would keep `rng` borrowed.
        macro_rules! some {
            ($most:expr) => {
                if rng.chance(600) { rng.between(1, $most) } else { 0 }
            };
        }
        if lanes {
            w.lanes.fail = some!(40);
            w.lanes.unread = some!(40);
            w.lanes.hang = some!(8);
            w.lanes.lost = some!(8);
            w.lanes.late = some!(100);
            w.lanes.stuck = some!(400);
            w.lanes.late_after_stop = some!(800);
            w.lanes.wedge = some!(300);
            w.lanes.down = some!(8);
            w.lanes.no_lane = some!(200);
            w.lanes.copies.stall = some!(100);
            w.lanes.copies.hang = some!(8);
            w.lanes.copies.fail = some!(15);
            w.lanes.copies.dead = some!(200);
        }
        if deaths {
            w.producer_deaths = 1 + some!(2);
        }
        if storm {
            w.consumer_deaths = some!(2);
        }
        if games {
            w.games.revoke = some!(500);
            w.games.cancel = some!(300);
            w.games.early = some!(400);
            w.games.late_ready = some!(500);
            w.games.late_handover = some!(200);
            w.games.twice = some!(500);
            w.games.mangle = some!(150);
            w.games.unpulled = some!(400);
            w.games.short_deadline = some!(500);
            w.games.late_local = some!(300);
            w.games.stall = some!(600);
            w.games.hold = some!(400);
            w.games.grow = some!(700);
        }
        if games && rng.chance(150) {
            w.lease.hard_cap = micros(rng.between(10, 100) * MS);
        }
        if holes {
            w.net.forgets = rng.between(5, 100) * MS;
        }
        if network {
            w.net.loss = some!(80);
            w.net.dup = some!(80);
            w.net.reorder = some!(150);
            w.net.breaks = some!(2) * 40 * MS;
            w.net.blackhole = some!(200);
            w.net.dial_timeout = some!(200);
            w.net.dial_refused = some!(100);
            w.net.delay.2 = 1 + some!(15) * MS;
        }
        w
    }

    /// The faults are over.
    pub(crate) fn calm(&mut self) {
        self.net = Net { delay: self.net.delay, ..Net::default() };
        self.net.delay.2 = 400;
        let copies = CopyLuck { latency: self.lanes.copies.latency, ..CopyLuck::default() };
        self.lanes = LaneLuck { latency: self.lanes.latency, torn: self.lanes.torn, copies, ..LaneLuck::default() };
        self.games = Games { stall: 50, grow: self.games.grow, ..Games::default() };
    }

    /// Whether frames get through, in order.
    pub(crate) fn sure_network(&self) -> bool {
        self.net.loss + self.net.dup + self.net.reorder + self.net.blackhole + self.net.dial_timeout == 0
            && self.net.dial_refused == 0
            && (self.net.forgets == 0 || self.only_holes)
            && self.net.delay.2 <= 400
    }
}

pub(crate) fn micros(n: Micros) -> Duration {
    Duration::from_micros(n)
}
