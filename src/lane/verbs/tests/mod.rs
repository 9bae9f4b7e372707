//! The lane against a device that is none.

mod fences;
mod settings;
mod sleep;
mod speed;
mod standin;
mod wire;

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use kvferry_proto::{
    block::{Incarnation, Nonce},
    config::Limits,
    error::Cause,
    group::PoolLayout,
    lane::{Attempt, Grant, Lane, LaneEvent},
    plan::Read,
};
use standin::{Control, LIBRARY, Standin};

use super::{
    connect::Opening,
    ladder::{COUNTERS, ERR_BOUND},
    lane::VerbsLane,
    rail::{Rail, Role},
    rails::Rails,
    server::Server,
};
use crate::{
    config::VerbsConfig,
    lane::WakingLane,
    memory::{FenceWords, Memory},
};

const BLOCK: u64 = 512;
const BLOCKS: u64 = 256;

struct Rig {
    lane: VerbsLane,
    /// The reader's devices.
    devices: Vec<Arc<Mutex<Control>>>,
    /// The producer's.
    served: Vec<Arc<Mutex<Control>>>,
    here: Memory,
    there: Memory,
    words: Arc<FenceWords>,
    nonce: Nonce,
    events: Vec<LaneEvent>,
    /// Events that had come when something of A was posted last.
    posted: usize,
    server: Server,
    rails: Arc<Rails>,
    incarnation: Incarnation,
}

fn connect(rails: &Arc<Rails>, server: &Server, number: u64, incarnation: Incarnation) -> VerbsLane {
    let opening = Opening::new(rails, None).unwrap();
    let ticket = server.admit(number, opening.request()).unwrap();
    let mut layout = PoolLayout::uniform(BLOCKS as u32, 1, BLOCK, 16);
    layout.segments.push(0);
    opening.finish(&ticket, Arc::new(layout), incarnation).unwrap()
}

const A: Attempt = Attempt(1);

impl Rig {
    fn new(rails: usize, config: VerbsConfig) -> Self {
        // The second one is empty: it takes nothing from the first.
        let segments = [BLOCK * BLOCKS, 0];
        let (here, there) = (Memory::alloc(&segments).unwrap(), Memory::alloc(&segments).unwrap());
        for b in 0..BLOCKS {
            there.write_from(0, b * BLOCK, &pattern(b)).unwrap();
        }
        let words = Arc::new(FenceWords::new(8).unwrap());
        let nonce = Nonce::random();
        words.set(3, nonce);
        let rail = |name: &str| {
            let s = Standin::new(name);
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

    /// Another lane between the same two, which ends with the statement.
    fn another(&self) -> VerbsLane {
        let lane = connect(&self.rails, &self.server, 10, self.incarnation);
        self.server.dismiss(10);
        lane
    }

    fn simple() -> Self {
        Self::new(1, VerbsConfig { queue_pairs: 1, depth: 16, signal_every: 4, ..VerbsConfig::default() })
    }

    fn device(&self) -> std::sync::MutexGuard<'_, Control> {
        self.devices[0].lock().unwrap()
    }

    fn post(&mut self, a: Attempt, blocks: std::ops::Range<u64>) -> usize {
        let reads: Vec<Read> = blocks.map(read).collect();
        if a == A {
            self.posted = self.events.len();
        }
        self.lane.post(a, &reads)
    }

    fn poll(&mut self) -> Vec<LaneEvent> {
        let from = self.events.len();
        self.lane.poll(&mut self.events);
        self.events[from..].to_vec()
    }

    /// Polls until an event satisfies `f`.
    fn until(&mut self, f: impl Fn(&LaneEvent) -> bool) {
        let limit = Instant::now() + Duration::from_secs(20);
        while !self.poll().iter().any(&f) {
            assert!(Instant::now() < limit, "{:?}", self.events);
            std::thread::yield_now();
        }
    }

    fn done(&self) -> u32 {
        let reads = |e: &LaneEvent| if let LaneEvent::Done { reads, .. } = e { *reads } else { 0 };
        self.events.iter().map(reads).sum()
    }

    fn quiet(&self) -> usize {
        self.events.iter().filter(|e| matches!(e, LaneEvent::Quiet { .. })).count()
    }

    /// Carries everything out, pairs in the order that `turn` gives.
    fn carry_out(&self, turn: impl Fn(&mut Vec<u32>)) {
        for d in &self.devices {
            let mut d = d.lock().unwrap();
            let mut numbers = d.numbers();
            turn(&mut numbers);
            for n in numbers {
                d.complete(n, 1 << 20);
            }
        }
    }

    /// Carries out what is in flight until the chunk that was posted last is fenced, or in doubt, and says which.
    fn fence(&mut self) -> LaneEvent {
        let limit = Instant::now() + Duration::from_secs(20);
        loop {
            let answer =
                |e: &&LaneEvent| matches!(e, LaneEvent::Fence { attempt: A, .. } | LaneEvent::Again { attempt: A, .. });
            if let Some(e) = self.events[self.posted..].iter().find(answer) {
                return e.clone();
            }
            assert!(Instant::now() < limit, "{:?}", self.events);
            self.carry_out(|_| ());
            self.poll();
        }
    }

    fn in_flight(&self) -> usize {
        self.devices.iter().map(|d| d.lock().unwrap().in_flight()).sum()
    }

    fn check(&self, blocks: std::ops::Range<u64>) {
        for b in blocks {
            let mut got = vec![0; BLOCK as usize];
            // Backwards, so that an address that is mixed up shows.
            self.here.read_into(0, (BLOCKS - 1 - b) * BLOCK, &mut got).unwrap();
            assert!(got == pattern(b), "block {b}");
        }
    }
}

fn pattern(b: u64) -> Vec<u8> {
    (0..BLOCK).map(|i| (b * 31 + i * 7 + 1) as u8).collect()
}

fn read(b: u64) -> Read {
    Read { position: b as u32, ..Read::between(0, (0, b * BLOCK), (0, (BLOCKS - 1 - b) * BLOCK), BLOCK) }
}

#[test]
fn blocks_and_the_fence_word_land_where_they_belong() {
    let mut r = Rig::new(2, VerbsConfig { queue_pairs: 3, depth: 32, ..VerbsConfig::default() });
    assert_eq!(r.post(A, 0..90), 90);
    assert_eq!(r.devices.iter().map(|d| d.lock().unwrap().in_flight()).sum::<usize>(), 90, "spread over all pairs");
    r.carry_out(|_| ());
    r.poll();
    assert_eq!(r.done(), 90);
    r.check(0..90);
    let word = r.nonce.get();
    assert_eq!(r.fence(), LaneEvent::Fence { attempt: A, chunk: 0, word });
    r.words.clear(3);
    assert_eq!(r.post(A, 0..90), 90);
    r.carry_out(|_| ());
    r.poll();
    assert_eq!(r.fence(), LaneEvent::Fence { attempt: A, chunk: 0, word: 0 });
    r.lane.stop(A);
    assert_eq!(r.poll(), [LaneEvent::Quiet { attempt: A }]);
}

#[test]
fn a_producer_lets_go_of_a_device_that_died_and_of_no_other() {
    let r = Rig::new(2, VerbsConfig { queue_pairs: 1, ..VerbsConfig::default() });
    let pairs = |at: usize| r.served[at].lock().unwrap().numbers().len();
    assert_eq!((pairs(0), pairs(1)), (1, 1));
    let rails = r.server.rails().usable(None).unwrap();
    rails.iter().find(|(rail, ..)| rail.name() == "served0:1").unwrap().0.condemn();
    // Nobody asks for a lane, and no session ends.
    let limit = Instant::now() + Duration::from_secs(20);
    while pairs(0) > 0 {
        assert!(Instant::now() < limit, "its device could not be closed");
        std::thread::yield_now();
    }
    assert_eq!((pairs(1), r.server.lanes_served()), (1, 1));
}

#[test]
fn a_full_queue_refuses_anywhere_and_every_read_is_done_once() {
    for at in 0..14 {
        for error in [libc::ENOMEM] {
            let mut r = Rig::simple();
            r.device().refuse = Some((at, error));
            assert_eq!(r.post(A, 0..14), 14, "accepted, whatever the device does with it now");
            assert_eq!(r.device().in_flight(), at);
            for _ in 0..40 {
                r.carry_out(|_| ());
                r.poll();
            }
            assert_eq!(r.done(), 14, "refused at {at}");
            r.check(0..14);
            r.lane.stop(A);
            r.poll();
            assert_eq!(r.quiet(), 1);
        }
    }
}

#[test]
fn what_a_full_queue_took_without_a_report_is_reported_by_the_next_request_on_it() {
    for at in 1..8 {
        // Two pairs share the reads; one report every eight requests, so that a part of a chain has none.
        let config = VerbsConfig { queue_pairs: 2, depth: 16, signal_every: 8, ..VerbsConfig::default() };
        let mut r = Rig::new(1, config);
        r.device().refuse = Some((at, libc::ENOMEM));
        assert_eq!(r.post(A, 0..16), 16);
        for _ in 0..10 {
            r.carry_out(|_| ());
            r.poll();
        }
        assert_eq!(r.done(), 16, "refused at {at}");
        r.check(0..16);
    }
}

#[test]
fn an_attempt_that_is_stopped_when_a_full_queue_took_a_part_of_it_drains() {
    for at in 1..8 {
        let config = VerbsConfig { queue_pairs: 2, depth: 16, signal_every: 8, ..VerbsConfig::default() };
        let mut r = Rig::new(1, config);
        r.device().refuse = Some((at, libc::ENOMEM));
        assert_eq!(r.post(A, 0..16), 16);
        r.lane.stop(A);
        for _ in 0..10 {
            r.carry_out(|_| ());
            r.poll();
        }
        assert_eq!(r.quiet(), 1, "refused at {at}");
        assert!(!r.events.iter().any(|e| matches!(e, LaneEvent::Down { .. })), "and the lane goes on");
        assert_eq!(r.post(A, 0..0), 0);
    }
}

#[test]
fn a_device_that_refuses_for_good_takes_the_lane_down_and_leaves_nothing_in_flight() {
    for mute in [false, true] {
        for at in 0..8 {
            let mut r = Rig::simple();
            r.device().mute = mute;
            r.device().refuse = Some((at, libc::EINVAL));
            assert_eq!(r.post(A, 0..8), 8);
            r.until(|e| matches!(e, LaneEvent::Down { .. }));
            assert_eq!(r.quiet(), 1);
            assert_eq!(r.done(), 0);
            assert!(r.events.contains(&LaneEvent::Failed { attempt: A, cause: Cause::LaneFailed }));
        }
    }
}

#[test]
fn a_flush_storm_full_of_rubbish_fails_what_failed_and_nothing_else() {
    for rubbish in [0, u32::MAX, 0xdead_beef] {
        for good in 0..14 {
            let mut r = Rig::simple();
            r.device().rubbish = rubbish;
            assert_eq!(r.post(A, 0..14), 14);
            let n = r.device().numbers()[0];
            // Completions that belong to nothing: other ids, other pairs, failures among them.
            for (id, number) in [(u64::MAX, n), (1 << 56, n), (16, n), (3, n + 1), (u64::from(rubbish), n + 7)] {
                r.device().forge(id, rubbish & 7, number);
            }
            r.device().complete(n, good);
            r.device().fail(n, 12);
            r.until(|e| matches!(e, LaneEvent::Down { .. }));
            assert_eq!(r.done() as usize, good, "what completed before the failure did so without a report of its own");
            assert!(r.events.contains(&LaneEvent::Failed { attempt: A, cause: Cause::Unreachable }));
            assert_eq!(r.events.iter().filter(|e| matches!(e, LaneEvent::Failed { .. })).count(), 1);
            assert_eq!(r.quiet(), 1);
            r.check(0..good as u64);
        }
    }
}

#[test]
fn queue_pairs_may_complete_in_any_order() {
    for turn in [|_: &mut Vec<u32>| (), |n: &mut Vec<u32>| n.reverse(), |n: &mut Vec<u32>| n.rotate_left(2)] {
        let mut r = Rig::new(1, VerbsConfig { queue_pairs: 4, depth: 8, signal_every: 3, ..VerbsConfig::default() });
        let mut from = 0;
        while from < 200 {
            from += r.post(A, from..200) as u64;
            r.carry_out(turn);
            r.poll();
        }
        r.carry_out(turn);
        r.poll();
        assert_eq!(r.done(), 200);
        r.check(0..200);
    }
}

#[test]
fn a_stopped_attempt_is_quiet_only_when_nothing_of_it_is_in_flight() {
    let mut r = Rig::simple();
    let b = Attempt(2);
    r.lane.begin(b, Grant { slot: 3, nonce: r.nonce });
    assert_eq!(r.post(A, 0..8), 8);
    assert_eq!(r.post(b, 8..12), 4);
    r.lane.stop(A);
    assert_eq!(r.post(A, 12..16), 4, "taken, and forgotten");
    assert_eq!(r.device().in_flight(), 12);
    assert_eq!(r.poll(), []);
    let n = r.device().numbers()[0];
    r.device().complete(n, 7);
    assert_eq!(r.poll(), []);
    r.device().complete(n, 1);
    assert_eq!(r.poll(), [LaneEvent::Quiet { attempt: A }]);
    r.device().complete(n, 4);
    assert_eq!(r.poll(), [LaneEvent::Done { attempt: b, chunk: 0, reads: 4 }]);
}

#[test]
fn completions_that_come_after_the_end_change_nothing() {
    let mut r = Rig::simple();
    assert_eq!(r.post(A, 0..8), 8);
    let n = r.device().numbers()[0];
    let ids: Vec<u64> = r.device().pairs[&n].ops.iter().map(|o| o.wr_id).collect();
    r.lane.kill();
    // Still in the queue when the lane looks: flushed ones, and then the same again as if they had succeeded.
    for &id in &ids {
        r.device().forge(id, 0, n);
    }
    r.until(|e| matches!(e, LaneEvent::Down { .. }));
    assert_eq!((r.done(), r.quiet()), (0, 1));
    let before = r.events.len();
    for _ in 0..10 {
        r.poll();
    }
    assert_eq!(r.events.len(), before);
    assert!(matches!(r.lane.arm(), Ok(None)));
}

#[test]
fn what_drains_by_itself_is_counted_as_such() {
    let mut r = Rig::simple();
    assert_eq!(r.post(A, 0..8), 8);
    let count = || COUNTERS.rungs()[0];
    let before = count();
    r.lane.stop(A);
    r.poll();
    assert_eq!(r.quiet(), 0);
    r.carry_out(|_| ());
    r.until(|e| matches!(e, LaneEvent::Quiet { .. }));
    let after = count();
    assert!(after.0 == "drain" && after.1 > before.1 && after.2 > before.2);
}

#[test]
fn pairs_that_do_not_flush_are_destroyed() {
    let mut r = Rig::simple();
    assert_eq!(r.post(A, 0..8), 8);
    r.device().no_flush = true;
    let count = || COUNTERS.rungs().map(|(_, n, time)| (n, time));
    let before = count();
    r.lane.kill();
    assert_eq!(r.poll(), [LaneEvent::Failed { attempt: A, cause: Cause::LaneFailed }]);
    r.until(|e| matches!(e, LaneEvent::Quiet { .. }));
    assert_eq!(r.device().destroyed, 1);
    let after = count();
    assert!(after[2].0 > before[2].0, "it was destroying that did it");
    let drained = after[1].1.unwrap() - before[1].1.unwrap();
    assert!(drained >= ERR_BOUND, "and all of the time for draining went by before: {drained:?}");
}

#[test]
fn pairs_that_cannot_be_destroyed_take_their_device_along_or_wedge() {
    for close in [0, libc::EBUSY] {
        let mut r = Rig::simple();
        assert_eq!(r.post(A, 0..8), 8);
        {
            let mut d = r.device();
            (d.no_flush, d.destroy, d.close) = (true, libc::EBUSY, close);
        }
        r.lane.kill();
        if close == 0 {
            r.until(|e| matches!(e, LaneEvent::Quiet { .. }));
            assert_eq!(r.device().closed, 1);
        } else {
            r.until(|e| matches!(e, LaneEvent::Wedged));
            for _ in 0..10 {
                r.poll();
            }
            assert_eq!(r.quiet(), 0, "what may be written for ever is never quiet");
        }
    }
}

#[test]
fn a_removed_device_has_destroyed_everything_by_itself() {
    let mut r = Rig::simple();
    assert_eq!(r.post(A, 0..8), 8);
    {
        let mut d = r.device();
        (d.no_flush, d.destroy) = (true, libc::EIO);
    }
    r.lane.kill();
    r.until(|e| matches!(e, LaneEvent::Quiet { .. }));
}

#[test]
fn a_device_that_loses_requests_is_not_waited_for() {
    let mut r = Rig::new(1, VerbsConfig { timeout: 1, retry: 0, ..VerbsConfig::default() });
    assert_eq!(r.post(A, 0..8), 8);
    r.until(|e| matches!(e, LaneEvent::Down { cause: Cause::Unreachable }));
    assert_eq!(r.quiet(), 1);
}

#[test]
fn a_queue_pair_that_is_stuck_is_noticed_while_its_neighbour_goes_on() {
    let mut r = Rig::new(1, VerbsConfig { queue_pairs: 2, timeout: 1, retry: 0, ..VerbsConfig::default() });
    assert_eq!(r.post(A, 0..8), 8);
    let goes_on = r.device().numbers()[0];
    let limit = Instant::now() + Duration::from_secs(20);
    while !r.poll().contains(&LaneEvent::Down { cause: Cause::Unreachable }) {
        r.device().complete(goes_on, 100);
        r.post(A, 8..9);
        assert!(Instant::now() < limit, "{} reads are done", r.done());
        std::thread::yield_now();
    }
    assert!(r.done() > 8, "the other one did go on");
    assert_eq!(r.quiet(), 1);
}

#[test]
fn a_lane_with_a_rail_less_than_there_were_says_so() {
    let config = VerbsConfig { queue_pairs: 1, ..VerbsConfig::default() };
    let mut r = Rig::new(2, config);
    assert!(!r.lane.degraded());
    assert_eq!(r.post(A, 0..8), 8);
    let number = r.device().numbers()[0];
    r.device().fail(number, 12);
    r.poll();
    assert!(r.lane.degraded());
    assert_eq!(r.lane.rails().collect::<Vec<_>>(), ["reader1:1"]);
    // One that is made while the rail is left out has less, too; a later one has both.
    let new = r.another();
    assert!(new.degraded() && new.rails().count() == 1, "{:?}", new.rails().collect::<Vec<_>>());
    let limit = Instant::now() + Duration::from_secs(20);
    while r.another().degraded() {
        assert!(Instant::now() < limit);
        std::thread::yield_now();
    }
    assert_eq!(r.another().rails().count(), 2);
}

#[test]
fn a_rail_whose_pool_is_still_being_registered_is_one_less() {
    let r = Rig::new(2, VerbsConfig { queue_pairs: 1, ..VerbsConfig::default() });
    assert_eq!((r.another().degraded(), r.rails.progress().0), (false, 2 * BLOCK * BLOCKS));
    for rails in [&r.rails, r.server.rails()] {
        let usable = rails.usable(None).unwrap();
        let slow = &usable[1].0;
        let pool = rails.not_yet(slow);
        assert!(r.another().degraded(), "a better lane is to be had soon");
        slow.put_pool(pool);
        assert!(!r.another().degraded());
    }
}

#[test]
fn what_one_rail_loses_goes_over_the_other_and_not_before_the_first_is_quiet() {
    let config = VerbsConfig { queue_pairs: 1, depth: 32, signal_every: 8, ..VerbsConfig::default() };
    let mut r = Rig::new(2, config);
    assert_eq!(r.post(A, 0..40), 40);
    let (lost, other) = (r.devices[0].clone(), r.devices[1].clone());
    assert_eq!((lost.lock().unwrap().in_flight(), other.lock().unwrap().in_flight()), (20, 20));
    {
        let mut d = lost.lock().unwrap();
        let n = d.numbers()[0];
        d.complete(n, 5);
        // The failing request alone: the flush comes later.
        d.no_flush = true;
        let rest = d.pairs.get_mut(&n).unwrap().ops.split_off(1);
        d.fail(n, 12);
        d.pairs.get_mut(&n).unwrap().ops = rest;
    }
    r.poll();
    assert_eq!(other.lock().unwrap().in_flight(), 20, "nothing moves over while the lost rail may still write");
    let limit = Instant::now() + Duration::from_secs(20);
    while other.lock().unwrap().in_flight() == 20 {
        r.poll();
        assert!(Instant::now() < limit, "{:?}", r.events);
    }
    assert_eq!(lost.lock().unwrap().destroyed, 1, "it did not flush, so it was destroyed first");
    while r.done() < 40 {
        let mut d = other.lock().unwrap();
        for n in d.numbers() {
            d.complete(n, 100);
        }
        drop(d);
        r.poll();
        assert!(Instant::now() < limit, "{:?}", r.events);
    }
    r.check(0..40);
    assert_eq!(r.lane.rails().collect::<Vec<_>>(), ["reader1:1"]);
    // Five of the chunk's reads came over the rail that has failed since.
    assert_eq!(r.fence(), LaneEvent::Again { attempt: A, chunk: 0 });
    let mut from = 0;
    while from < 40 {
        from += r.post(A, from..40) as u64;
        r.carry_out(|_| ());
        r.poll();
    }
    let word = r.nonce.get();
    assert_eq!(r.fence(), LaneEvent::Fence { attempt: A, chunk: 0, word });
    assert!(!r.events.iter().any(|e| matches!(e, LaneEvent::Failed { .. } | LaneEvent::Down { .. })));
}

#[test]
fn a_read_that_leaves_its_memory_fails_its_attempt_and_is_never_posted() {
    let bad: [fn(&mut Read); 6] = [
        |r| r.src_offset = BLOCK * BLOCKS,
        |r| r.src_offset = u64::MAX,
        |r| r.dst_offset = u64::MAX - 3,
        |r| r.len = 0,
        |r| r.src_segment = 1,
        |r| r.dst_segment = 1,
    ];
    for f in bad {
        let mut r = Rig::simple();
        let mut read = read(1);
        f(&mut read);
        assert_eq!(r.lane.post(A, &[read]), 1);
        assert_eq!(r.poll(), [LaneEvent::Failed { attempt: A, cause: Cause::BadOffer }]);
        assert_eq!(r.device().in_flight(), 0);
        r.lane.stop(A);
        assert_eq!(r.poll(), [LaneEvent::Quiet { attempt: A }]);
    }
    // A fence word beyond the table.
    let mut r = Rig::simple();
    let b = Attempt(2);
    r.lane.begin(b, Grant { slot: 8, nonce: r.nonce });
    assert_eq!(r.post(b, 0..4), 4);
    assert_eq!(r.poll(), [LaneEvent::Failed { attempt: b, cause: Cause::BadOffer }]);
    assert_eq!(r.device().in_flight(), 0);
    r.lane.stop(b);
    assert_eq!(r.poll(), [LaneEvent::Quiet { attempt: b }]);
}

#[test]
fn a_lane_that_is_dropped_in_the_middle_is_taken_down_first() {
    let mut r = Rig::simple();
    assert_eq!(r.post(A, 0..8), 8);
    let device = r.devices[0].clone();
    let keep = (r.here.clone(), r.there.clone());
    drop(r);
    let limit = Instant::now() + Duration::from_secs(20);
    while device.lock().unwrap().destroyed == 0 {
        assert!(Instant::now() < limit);
        std::thread::yield_now();
    }
    drop(keep);
}

#[test]
fn a_dismissed_lane_has_no_queue_pairs_any_more() {
    let r = Rig::simple();
    assert_eq!(r.server.lanes_served(), 1);
    r.server.dismiss(9);
    r.server.dismiss(9);
    assert_eq!(r.server.lanes_served(), 0);
}
