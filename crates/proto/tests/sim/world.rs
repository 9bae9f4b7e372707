//! The world of a seed: its processes, its clock, and its event queue.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    sync::Arc,
    time::{Duration, Instant},
};

use kvferry_proto::{ClientFrame, Incarnation, Model, OfferId, ServerFrame, Token, puller::LaneWish, table::Entropy};

use crate::{
    checks::PendingKey,
    consumer::Consumer,
    fabric::Fabric,
    lane::Shared,
    memory::Shape,
    network::{Answer, Conn},
    producer::{Engine, Proc, Producer, Request},
    rng::Rng,
    trace::{Micros, Promise, Violation},
    weather::Weather,
};

/// An event. Numbers: `p` a producer's address, `q` a producer's process, `c` a consumer, `e` its life, `r` a request,
/// `k` a rank of the request's engine.
#[derive(Debug, Clone)]
pub(crate) enum Event {
    Request,
    Register { r: usize, k: usize },
    Ready { r: usize, k: usize },
    Grow { r: usize, k: usize },
    Grown { r: usize, k: usize, number: u64, step: usize },
    Revoke { r: usize },
    Forget { r: usize, k: usize },
    ReleaseAlone { p: usize, expect: Incarnation, offer: OfferId, token: Token },
    Handover { r: usize, c: usize, pull: bool },
    WakeProc { q: usize },
    Outs { q: usize },
    Crash { p: usize },
    Restart { p: usize },
    Stop { p: usize },
    Continue { p: usize },
    Drain { p: usize },
    WakeConsumer { c: usize, e: u64 },
    ToSessions { c: usize, e: u64 },
    ToPuller { c: usize, e: u64 },
    Cancel { c: usize, e: u64, pull: u64 },
    LocalReady { c: usize, e: u64, pull: u64 },
    CrashConsumer { c: usize },
    RestartConsumer { c: usize },
    ToServer { conn: usize, frame: ClientFrame },
    ToClient { conn: usize, frame: ServerFrame },
    Break { conn: usize },
    Hello { c: usize, e: u64, p: usize, since: Micros },
    Dialed { c: usize, e: u64, p: usize, answer: Answer },
    LaneUp { c: usize, e: u64, p: usize, wish: LaneWish },
    Audit,
    Calm,
    Heal { c: usize, engine: usize },
}

struct Timed(Micros, u64, Event);

impl PartialEq for Timed {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Timed {}
impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Timed {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

pub(crate) struct World {
    pub rng: Rng,
    pub weather: Weather,
    pub shape: Shape,
    pub model: Model,
    pub now: Micros,
    start: Instant,
    heap: BinaryHeap<Reverse<Timed>>,
    seq: u64,
    pub fabric: Shared,
    pub tracing: bool,
    pub engines: Vec<Engine>,
    pub producers: Vec<Producer>,
    pub procs: Vec<Proc>,
    pub consumers: Vec<Consumer>,
    pub requests: Vec<Request>,
    pub conns: Vec<Conn>,
    pub versions: u32,
    /// Releases on their way, and since when.
    pub pending: BTreeMap<PendingKey, Micros>,
    /// Why the news of a death may not get through.
    pub unsure: Option<&'static str>,
    /// When the faults ended.
    pub calm: Option<Micros>,
    pub healing: usize,
    pub finished: bool,
    pub stats: Stats,
}

/// Counts of a seed. Their sums over seeds show that the checks have work to do.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Stats {
    pub events: u64,
    pub reads: u64,
    pub copies: u64,
    pub copiers_failed: u64,
    pub copies_wedged: u64,
    pub pulls: u64,
    pub complete: u64,
    pub partial: u64,
    pub empty: u64,
    pub must_complete: u64,
    pub retried: u64,
    pub healed: u64,
    pub wedged: u64,
    pub offers: u64,
    pub grown: u64,
    pub expired: u64,
    pub capped: u64,
    pub revoked: u64,
    pub released: u64,
}

impl Stats {
    pub(crate) fn add(&mut self, o: &Stats) {
        let pairs = [
            (&mut self.events, o.events),
            (&mut self.reads, o.reads),
            (&mut self.copies, o.copies),
            (&mut self.copiers_failed, o.copiers_failed),
            (&mut self.copies_wedged, o.copies_wedged),
            (&mut self.pulls, o.pulls),
            (&mut self.complete, o.complete),
            (&mut self.partial, o.partial),
            (&mut self.empty, o.empty),
            (&mut self.must_complete, o.must_complete),
            (&mut self.retried, o.retried),
            (&mut self.healed, o.healed),
            (&mut self.wedged, o.wedged),
            (&mut self.offers, o.offers),
            (&mut self.grown, o.grown),
            (&mut self.expired, o.expired),
            (&mut self.capped, o.capped),
            (&mut self.revoked, o.revoked),
            (&mut self.released, o.released),
        ];
        for (a, b) in pairs {
            *a += b;
        }
    }
}

macro_rules! say {
    ($world:expr, $($arg:tt)*) => {
        if $world.tracing {
            let now = $world.now;
            $world.fabric.get().trace.line(now, format_args!($($arg)*));
        }
    };
}

pub(crate) use say;

impl World {
    /// Runs a seed to its end. `Err`: the broken promise.
    pub(crate) fn run(seed: u64, fabric_out: &mut Option<Shared>, tracing: bool) -> Result<Stats, Violation> {
        let mut rng = Rng::new(seed);
        let weather = Weather::new(&mut rng);
        let shape = Shape::new(&mut rng);
        let fabric = Shared::new(Fabric::new(rng.fork(), weather.lanes.clone()));
        {
            let mut f = fabric.get();
            f.trace.on = tracing;
            f.trace.keep = 4000;
        }
        *fabric_out = Some(fabric.clone());
        let model = Model {
            name: "m".into(),
            dtype: "u64".into(),
            scales: String::new(),
            weights: String::new(),
            attention: "HND".into(),
            block_tokens: shape.groups[0].tokens,
        };
        let mut world = World {
            rng,
            weather,
            shape,
            model,
            now: 0,
            start: base(),
            heap: BinaryHeap::new(),
            seq: 0,
            fabric,
            tracing,
            engines: Vec::new(),
            producers: Vec::new(),
            procs: Vec::new(),
            consumers: Vec::new(),
            requests: Vec::new(),
            conns: Vec::new(),
            versions: 0,
            pending: BTreeMap::new(),
            unsure: None,
            calm: None,
            healing: 0,
            finished: false,
            stats: Stats::default(),
        };
        world.unsure = (!world.weather.sure_network()).then_some("the network");
        world.populate();
        let result = world.go();
        world.fabric.get().closing = true;
        result.map(|()| world.stats)
    }

    fn populate(&mut self) {
        say!(self, "weather: {:?}", self.weather);
        self.make_engines();
        self.make_consumers();
        let length = self.weather.length;
        for _ in 0..self.weather.requests {
            let t = self.rng.below(length);
            self.at(t, Event::Request);
        }
        for _ in 0..self.weather.producer_deaths {
            let p = self.rng.below(self.producers.len() as u64) as usize;
            let t = self.rng.below(length);
            let back = t + self.rng.tail(200, 20_000, length);
            if self.rng.chance(300) {
                self.at(t, Event::Stop { p });
                // Some pulls are on their way then.
                for _ in 0..3 {
                    let before = t.saturating_sub(self.rng.below(1500));
                    self.at(before, Event::Request);
                }
                // Some stay stopped until the faults are over: no pull waits that long.
                if self.rng.chance(500) {
                    self.at(back, Event::Continue { p });
                }
            } else {
                if self.rng.chance(200) {
                    self.at(t.saturating_sub(5000), Event::Drain { p });
                }
                self.at(t, Event::Crash { p });
                self.at(back, Event::Restart { p });
            }
        }
        for _ in 0..self.weather.consumer_deaths {
            let c = self.rng.below(self.consumers.len() as u64) as usize;
            let t = self.rng.below(length);
            let back = t + self.rng.tail(200, 20_000, length);
            self.at(t, Event::CrashConsumer { c });
            self.at(back, Event::RestartConsumer { c });
        }
        self.at(length, Event::Calm);
        self.at(1000, Event::Audit);
    }

    fn go(&mut self) -> Result<(), Violation> {
        while !self.finished {
            let world_next = self.heap.peek().map(|Reverse(t)| t.0);
            let mut fabric = self.fabric.get();
            let fabric_first = fabric.next().is_some_and(|t| world_next.is_none_or(|w| t <= w));
            if fabric_first {
                fabric.step();
                self.now = fabric.now;
            } else {
                drop(fabric);
                let Some(Reverse(Timed(t, _, event))) = self.heap.pop() else { break };
                self.now = self.now.max(t);
                self.fabric.get().now = self.now;
                self.happen(event);
                fabric = self.fabric.get();
            }
            self.stats.events += 1;
            let ready = std::mem::take(&mut fabric.ready);
            drop(fabric);
            for local in ready {
                self.lanes_ready(local);
            }
            if let Some(v) = self.fabric.get().violation.clone() {
                return Err(v);
            }
            if self.stats.events > 2_000_000 {
                return Err(Violation { promise: Promise::Sound, at: self.now, what: "the run does not end".into() });
            }
        }
        let fabric = self.fabric.get();
        self.stats.reads = fabric.reads;
        self.stats.copies = fabric.copies;
        self.stats.copiers_failed = fabric.copiers_failed;
        self.stats.copies_wedged = fabric.copies_wedged;
        match fabric.violation.clone() {
            Some(v) => Err(v),
            None => Ok(()),
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Request => self.request(None),
            Event::Register { r, k } => self.register(r, k),
            Event::Ready { r, k } => self.ready(r, k),
            Event::Grow { r, k } => self.grow(r, k),
            Event::Grown { r, k, number, step } => self.grown(r, k, number, step),
            Event::Revoke { r } => self.revoke(r),
            Event::Forget { r, k } => self.forget(r, k),
            Event::ReleaseAlone { p, expect, offer, token } => self.release_alone(p, expect, offer, token),
            Event::Handover { r, c, pull } => self.handover(r, c, pull, false),
            Event::WakeProc { q } => self.wake_proc(q),
            Event::Outs { q } => self.do_outs(q),
            Event::Crash { p } => self.crash(p),
            Event::Restart { p } => self.restart(p),
            Event::Stop { p } => self.stop_proc(p),
            Event::Continue { p } => self.continue_proc(p),
            Event::Drain { p } => self.drain_proc(p),
            Event::WakeConsumer { c, e } => self.wake_consumer(c, e),
            Event::ToSessions { c, e } => self.drive_sessions(c, e),
            Event::ToPuller { c, e } => self.drive_puller(c, e),
            Event::Cancel { c, e, pull } => self.cancel(c, e, pull),
            Event::LocalReady { c, e, pull } => self.local_ready(c, e, pull),
            Event::CrashConsumer { c } => self.crash_consumer(c),
            Event::RestartConsumer { c } => self.restart_consumer(c),
            Event::ToServer { conn, frame } => self.reach_server(conn, frame),
            Event::ToClient { conn, frame } => self.reach_client(conn, frame),
            Event::Break { conn } => self.break_conn(conn),
            Event::Hello { c, e, p, since } => self.hello(c, e, p, since),
            Event::Dialed { c, e, p, answer } => self.dialed(c, e, p, answer),
            Event::LaneUp { c, e, p, wish } => self.lane_up(c, e, p, &wish),
            Event::Audit => self.audit(),
            Event::Calm => self.all_calm(),
            Event::Heal { c, engine } => self.heal(c, engine),
        }
    }

    /// The faults are over: dead processes return, and every consumer pulls from every engine.
    fn all_calm(&mut self) {
        say!(self, "---- the faults are over ----");
        self.weather.calm();
        self.calm = Some(self.now);
        self.fabric.get().calm(self.weather.lanes.clone());
        for p in 0..self.producers.len() {
            self.come_back(p);
        }
        for c in 0..self.consumers.len() {
            // A process whose device is unusable, or whose ring is mostly lost, serves no pull any more: it is restarted.
            if self.consumers[c].process.as_ref().is_some_and(|p| p.device_lost(&self.fabric.get())) {
                self.crash_consumer(c);
            }
            self.restart_consumer(c);
        }
        let wait = *self.rng.pick(&[0, 0, 1000, 20_000, 150_000]);
        for c in 0..self.consumers.len() {
            for engine in 0..self.engines.len() {
                self.healing += 1;
                let t = self.now + wait + self.rng.below(3000);
                self.at(t, Event::Heal { c, engine });
            }
        }
    }

    pub(crate) fn at(&mut self, t: Micros, event: Event) {
        self.seq += 1;
        self.heap.push(Reverse(Timed(t.max(self.now), self.seq, event)));
    }

    pub(crate) fn instant(&self, t: Micros) -> Instant {
        self.start + Duration::from_micros(t)
    }

    pub(crate) fn clock(&self) -> Instant {
        self.instant(self.now)
    }

    /// The first microsecond at or after an instant.
    pub(crate) fn micros(&self, t: Instant) -> Micros {
        let nanos = t.saturating_duration_since(self.start).as_nanos();
        nanos.div_ceil(1000) as Micros
    }

    pub(crate) fn broken(&self, promise: Promise, what: String) {
        let mut f = self.fabric.get();
        f.now = self.now;
        f.broken(promise, what);
    }

    pub(crate) fn entropy(&mut self) -> Entropy {
        let mut r = self.rng.fork();
        Box::new(move || r.next())
    }

    pub(crate) fn incarnation(&mut self) -> Incarnation {
        Incarnation::from_wire(self.rng.id()).expect("not zero")
    }

    pub(crate) fn offer_id(&mut self) -> OfferId {
        OfferId { high: self.rng.next(), low: self.rng.id() }
    }

    pub(crate) fn version(&mut self) -> u32 {
        self.versions += 1;
        self.versions
    }

    /// The delay of a frame or a dial.
    pub(crate) fn delay(&mut self) -> Micros {
        let (low, usual, high) = self.weather.net.delay;
        self.rng.tail(low, usual, high.max(usual))
    }

    pub(crate) fn addr(&self, p: usize) -> Arc<str> {
        self.producers[p].addr.clone()
    }

    pub(crate) fn producer_at(&self, addr: &str) -> Option<usize> {
        self.producers.iter().position(|p| *p.addr == *addr)
    }
}

/// One instant for the whole process: virtual times are offsets from it.
fn base() -> Instant {
    static BASE: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    *BASE.get_or_init(Instant::now)
}
