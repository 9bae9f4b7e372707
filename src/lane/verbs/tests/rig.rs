//! A lane between a consumer and a producer in this process, over fake devices.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use kvferry_proto::{Attempt, Grant, Incarnation, Lane, LaneEvent, Limits, Nonce, PoolLayout, Read};

use super::fake::{Control, FakeDevice, LIBRARY};
use crate::{
    config::VerbsConfig,
    lane::verbs::{
        exchange::VerbsRequest,
        lane::VerbsLane,
        opening::Opening,
        rail::{Rail, Role},
        rails::Rails,
        server::Server,
    },
    memory::{FenceWords, Memory},
};

pub(super) const BLOCK: u64 = 512;
pub(super) const BLOCKS: u64 = 256;

/// The second segment is empty.
pub(super) const SEGMENTS: [u64; 2] = [BLOCK * BLOCKS, 0];

pub(super) struct Rig {
    pub(super) lane: VerbsLane,
    /// The reader's devices.
    pub(super) devices: Vec<Arc<Mutex<Control>>>,
    /// The producer's.
    pub(super) served: Vec<Arc<Mutex<Control>>>,
    pub(super) here: Memory,
    pub(super) there: Memory,
    pub(super) words: Arc<FenceWords>,
    pub(super) nonce: Nonce,
    pub(super) events: Vec<LaneEvent>,
    /// Events before the last post of A.
    pub(super) posted: usize,
    pub(super) server: Server,
    pub(super) rails: Arc<Rails>,
    pub(super) incarnation: Incarnation,
}

fn connect(rails: &Arc<Rails>, server: &Server, number: u64, incarnation: Incarnation) -> VerbsLane {
    let opening = Opening::new(rails, None).unwrap();
    let ticket = server.admit(number, opening.request()).unwrap();
    let mut layout = PoolLayout::uniform(BLOCKS as u32, 1, BLOCK, 16);
    layout.segments.push(0);
    opening.finish(&ticket, Arc::new(layout), incarnation).unwrap()
}

/// A server on one fake rail, a request to it, and the number of queue pairs that it has made so far.
pub(crate) fn served() -> (Server, VerbsRequest, impl Fn() -> usize) {
    let Rig { server, rails, served, .. } = Rig::simple();
    let request = Opening::new(&rails, None).unwrap().request().clone();
    (server, request, move || served[0].lock().unwrap().made.len())
}

pub(super) const A: Attempt = Attempt(1);

impl Rig {
    pub(super) fn new(rails: usize, config: VerbsConfig) -> Self {
        Self::between(Memory::alloc(&SEGMENTS).unwrap(), Memory::alloc(&SEGMENTS).unwrap(), rails, config)
    }

    /// Between pools of [`SEGMENTS`].
    pub(super) fn between(here: Memory, there: Memory, rails: usize, config: VerbsConfig) -> Self {
        for b in 0..BLOCKS {
            there.write_from(0, b * BLOCK, &pattern(b)).unwrap();
        }
        let words = Arc::new(FenceWords::new(8).unwrap());
        let nonce = Nonce::random();
        words.set(3, nonce);
        let rail = |name: &str| {
            let s = FakeDevice::new(name);
            let handle = s.handle();
            (Rail::on(s.device, 1, false).unwrap(), handle)
        };
        let (readers, devices): (Vec<_>, Vec<_>) = (0..rails).map(|i| rail(&format!("reader{i}"))).unzip();
        let (rails_there, at_served): (Vec<_>, Vec<_>) = (0..rails).map(|i| rail(&format!("served{i}"))).unzip();
        let readers = Rails::of(&LIBRARY, &config, here.clone(), Role::Reader, readers).unwrap();
        let served = Rails::of(&LIBRARY, &config, there.clone(), Role::Served(words.clone()), rails_there).unwrap();
        let incarnation = Incarnation::random();
        let server = Server::on(served, incarnation, words.len(), &Limits::default());
        let mut lane = connect(&readers, &server, 9, incarnation);
        lane.begin(A, Grant { slot: 3, nonce });
        let (events, posted, rails) = (Vec::new(), 0, readers);
        Self { lane, devices, served: at_served, here, there, words, nonce, events, posted, server, rails, incarnation }
    }

    /// Another lane between the same ends, dismissed already.
    pub(super) fn another(&self) -> VerbsLane {
        let lane = connect(&self.rails, &self.server, 10, self.incarnation);
        self.server.dismiss(10);
        lane
    }

    pub(super) fn simple() -> Self {
        Self::new(1, VerbsConfig { queue_pairs: 1, depth: 16, signal_every: 4, ..VerbsConfig::default() })
    }

    pub(super) fn device(&self) -> std::sync::MutexGuard<'_, Control> {
        self.devices[0].lock().unwrap()
    }

    pub(super) fn post(&mut self, a: Attempt, blocks: std::ops::Range<u64>) -> usize {
        let reads: Vec<Read> = blocks.map(read).collect();
        if a == A {
            self.posted = self.events.len();
        }
        self.lane.post(a, &reads)
    }

    pub(super) fn poll(&mut self) -> Vec<LaneEvent> {
        let from = self.events.len();
        self.lane.poll(&mut self.events);
        self.events[from..].to_vec()
    }

    /// Polls until an event satisfies `f`.
    pub(super) fn until(&mut self, f: impl Fn(&LaneEvent) -> bool) {
        let limit = Instant::now() + Duration::from_secs(20);
        while !self.poll().iter().any(&f) {
            assert!(Instant::now() < limit, "{:?}", self.events);
            std::thread::yield_now();
        }
    }

    pub(super) fn done(&self) -> u32 {
        let reads = |e: &LaneEvent| if let LaneEvent::Done { reads, .. } = e { *reads } else { 0 };
        self.events.iter().map(reads).sum()
    }

    pub(super) fn quiet(&self) -> usize {
        self.events.iter().filter(|e| matches!(e, LaneEvent::Quiet { .. })).count()
    }

    /// Executes all requests, queue pairs in the order that `turn` gives.
    pub(super) fn execute(&self, turn: impl Fn(&mut Vec<u32>)) {
        for d in &self.devices {
            let mut d = d.lock().unwrap();
            let mut numbers = d.numbers();
            turn(&mut numbers);
            for n in numbers {
                d.complete(n, 1 << 20);
            }
        }
    }

    /// Executes requests until the chunk that was posted last is fenced or unverified, and returns that event.
    pub(super) fn fence(&mut self) -> LaneEvent {
        let limit = Instant::now() + Duration::from_secs(20);
        loop {
            let answer =
                |e: &&LaneEvent| matches!(e, LaneEvent::Fence { attempt: A, .. } | LaneEvent::Again { attempt: A, .. });
            if let Some(e) = self.events[self.posted..].iter().find(answer) {
                return e.clone();
            }
            assert!(Instant::now() < limit, "{:?}", self.events);
            self.execute(|_| ());
            self.poll();
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.devices.iter().map(|d| d.lock().unwrap().in_flight()).sum()
    }

    pub(super) fn check(&self, blocks: std::ops::Range<u64>) {
        for b in blocks {
            let mut got = vec![0; BLOCK as usize];
            // Backwards, to reveal mixed-up addresses.
            self.here.read_into(0, (BLOCKS - 1 - b) * BLOCK, &mut got).unwrap();
            assert!(got == pattern(b), "block {b}");
        }
    }
}

pub(super) fn pattern(b: u64) -> Vec<u8> {
    (0..BLOCK).map(|i| (b * 31 + i * 7 + 1) as u8).collect()
}

pub(super) fn read(b: u64) -> Read {
    Read { position: b as u32, ..Read::between(0, (0, b * BLOCK), (0, (BLOCKS - 1 - b) * BLOCK), BLOCK) }
}
