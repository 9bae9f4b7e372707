//! The staged lane under random interleavings of its owner, its inner lane and its copier.

use std::collections::{BTreeMap, BTreeSet};

use kvferry_proto::{Attempt, Cause, FenceKind, Lane, LaneEvent, Read};
use proptest::prelude::*;

use super::rig::{Rig, SLOT, grant, reads};

#[derive(Debug, Clone)]
enum Step {
    Begin,
    /// The owner offers the rest of an attempt's chunk.
    Post(usize),
    Accepts(Option<usize>),
    Room(Option<usize>),
    Land(usize),
    /// The inner lane reads the fence of a chunk, or takes it back.
    Fence(usize, bool),
    Copy,
    Fail(usize),
    Stop(usize),
    /// The inner lane is quiet for a stopped attempt; reads in flight have landed, or never will.
    Quiet(usize, bool),
    Poll,
    /// Ends the run.
    Last(End),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Kill,
    Down,
    CopierFails,
    Wedge,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => Just(Step::Begin),
        12 => (0..4_usize).prop_map(Step::Post),
        1 => proptest::option::of(0..6_usize).prop_map(Step::Accepts),
        1 => proptest::option::of(0..3_usize).prop_map(Step::Room),
        20 => (0..64_usize).prop_map(Step::Land),
        8 => (0..16_usize, proptest::bool::weighted(0.15)).prop_map(|(n, again)| Step::Fence(n, again)),
        10 => Just(Step::Copy),
        1 => (0..4_usize).prop_map(Step::Fail),
        1 => (0..4_usize).prop_map(Step::Stop),
        2 => (0..4_usize, any::<bool>()).prop_map(|(n, landed)| Step::Quiet(n, landed)),
        20 => Just(Step::Poll),
        1 => prop_oneof![Just(End::Kill), Just(End::Down), Just(End::CopierFails), Just(End::Wedge)]
            .prop_map(Step::Last),
    ]
}

/// What the owner knows of an attempt.
#[derive(Debug, Default)]
struct Owner {
    chunk: u32,
    rest: Vec<Read>,
    /// Reads that were accepted and are not done, by chunk; chunks that were accepted in full.
    open: BTreeMap<u32, u32>,
    complete: BTreeSet<u32>,
    failed: bool,
    stopped: bool,
    quiet: bool,
    inner_quiet: bool,
}

struct Run {
    rig: Rig,
    attempts: BTreeMap<Attempt, Owner>,
    next: u64,
    closed: bool,
    wedged: bool,
}

impl Run {
    fn new(fence: FenceKind) -> Self {
        let rig = Rig::new(fence, 6);
        let attempts = BTreeMap::from([(Attempt(1), Owner::default())]);
        Self { rig, attempts, next: 2, closed: false, wedged: false }
    }

    fn pick(&self, n: usize, f: impl Fn(&Owner) -> bool) -> Option<Attempt> {
        let all: Vec<_> = self.attempts.iter().filter(|(_, o)| f(o)).map(|(a, _)| *a).collect();
        (!all.is_empty()).then(|| all[n % all.len()])
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Begin => {
                let a = Attempt(self.next);
                self.next += 1;
                self.attempts.insert(a, Owner::default());
                self.rig.lane.begin(a, grant());
            }
            Step::Post(n) => self.post(n),
            Step::Accepts(n) => self.rig.s().accepts = n,
            Step::Room(n) => self.rig.s().room = n,
            Step::Land(n) => {
                let all = self.rig.s().in_flight.len();
                if all > 0 {
                    self.rig.s().land(n % all);
                }
            }
            Step::Fence(n, again) => self.fence(n, again),
            Step::Copy => {
                self.rig.s().copy();
            }
            Step::Fail(n) => {
                if let Some(attempt) = self.pick(n, |o| !o.stopped && !o.inner_quiet) {
                    self.rig.s().events.push(LaneEvent::Failed { attempt, cause: Cause::LaneFailed });
                }
            }
            Step::Stop(n) => {
                if let Some(a) = self.pick(n, |o| !o.stopped && !o.quiet) {
                    self.attempts.get_mut(&a).unwrap().stopped = true;
                    self.rig.lane.stop(a);
                }
            }
            Step::Quiet(n, landed) => {
                if let Some(a) = self.pick(n, |o| o.stopped && !o.inner_quiet) {
                    self.inner_quiet(a, landed);
                }
            }
            Step::Poll => self.poll(),
            Step::Last(_) => {}
        }
    }

    fn post(&mut self, n: usize) {
        let Some(a) = self.pick(n, |o| !o.stopped && !o.quiet && !o.failed) else { return };
        let o = self.attempts.get_mut(&a).unwrap();
        if o.rest.is_empty() {
            let chunk = a.0 as u32 * 1000 + o.chunk;
            o.chunk += 1;
            // Whole slots, thirds of one, and short reads; some chunks are larger than the ring.
            let (count, len) = [(1, SLOT), (9, SLOT), (7, SLOT / 3), (12, 100)][chunk as usize % 4];
            o.rest = reads(chunk, count, len);
        }
        let taken = self.rig.lane.post(a, &o.rest);
        let chunk = o.rest[0].chunk;
        if taken > 0 {
            *o.open.entry(chunk).or_default() += taken as u32;
        }
        o.rest.drain(..taken);
        if o.rest.is_empty() {
            o.complete.insert(chunk);
        }
    }

    fn fence(&mut self, n: usize, again: bool) {
        let mut s = self.rig.s();
        if s.fence == Some(FenceKind::Posted) || s.complete.is_empty() {
            return;
        }
        let n = n % s.complete.len();
        let (attempt, chunk) = s.complete[n];
        if s.in_flight.iter().any(|(a, r)| (*a, r.chunk) == (attempt, chunk)) {
            return;
        }
        s.complete.remove(n);
        let event =
            if again { LaneEvent::Again { attempt, chunk } } else { LaneEvent::Fence { attempt, chunk, word: 77 } };
        s.events.push(event);
    }

    fn inner_quiet(&mut self, a: Attempt, landed: bool) {
        self.attempts.get_mut(&a).unwrap().inner_quiet = true;
        let mut s = self.rig.s();
        while let Some(n) = s.in_flight.iter().position(|(of, _)| *of == a) {
            if landed {
                s.land(n);
            } else {
                s.in_flight.remove(n);
            }
        }
        s.complete.retain(|(of, _)| *of != a);
        s.events.push(LaneEvent::Quiet { attempt: a });
    }

    fn poll(&mut self) {
        let free = self.rig.ring.free();
        let events = self.rig.poll();
        let (jobs_left, wedged) = (self.rig.s().jobs.len(), self.wedged);
        let slots_came = self.rig.ring.free() > free;
        assert!(!slots_came || !events.is_empty() || jobs_left > 0, "slots came without an event");
        for e in events {
            let Some(a) = e.attempt() else {
                match e {
                    LaneEvent::Wedged => assert!(!std::mem::replace(&mut self.wedged, true), "wedged twice"),
                    _ => self.closed = true,
                }
                continue;
            };
            let o = self.attempts.get_mut(&a).unwrap();
            assert!(!o.quiet, "{e:?} after Quiet");
            match e {
                LaneEvent::Done { chunk, reads, .. } => {
                    let open = o.open.get_mut(&chunk).expect("a chunk with reads");
                    *open = open.checked_sub(reads).expect("reads that were posted");
                    if *open == 0 && o.complete.contains(&chunk) {
                        let s = self.rig.s();
                        let base = u64::from(chunk) * (64 << 20);
                        let (count, len) = [(1, SLOT), (9, SLOT), (7, SLOT / 3), (12, 100)][chunk as usize % 4];
                        for i in 0..count {
                            let at = base + i * len;
                            assert_eq!(s.local.get(&at), Some(&at), "done before it was copied");
                        }
                    }
                }
                LaneEvent::Fence { chunk, word, .. } => {
                    assert_eq!((o.open[&chunk], word), (0, 77), "a fence before the copies");
                    assert!(o.complete.contains(&chunk));
                }
                LaneEvent::Again { chunk, .. } => {
                    assert_eq!(o.open[&chunk], 0, "taken back before the copies");
                    assert!(o.complete.contains(&chunk));
                }
                LaneEvent::Failed { .. } => assert!(!std::mem::replace(&mut o.failed, true), "failed twice"),
                LaneEvent::Quiet { .. } => {
                    o.quiet = true;
                    assert!(o.inner_quiet || self.closed || wedged, "quiet before the inner lane");
                    let s = self.rig.s();
                    let base = a.0 * 1000 * (64 << 20);
                    let mine = |at: u64| (base..base + 1000 * (64 << 20)).contains(&at);
                    assert!(
                        s.finished.failed || !s.jobs.iter().any(|(_, c)| c.iter().any(|c| mine(c.offset))),
                        "quiet before the copies"
                    );
                }
                _ => {}
            }
        }
    }

    /// Lets everything finish that can, and checks that nothing is left.
    fn end(mut self, end: Option<End>) {
        {
            let mut s = self.rig.s();
            (s.accepts, s.room) = (None, None);
        }
        let mut stuck = false;
        match end {
            None => {
                // Every read that was posted is done in the end.
                for _ in 0..3 {
                    self.rig.s().land_all();
                    self.rig.s().fence_all(77);
                    self.poll();
                    self.rig.s().copy_all();
                    self.poll();
                }
                for (a, o) in self.attempts.iter().filter(|(_, o)| !o.stopped && !o.failed && !o.quiet) {
                    assert!(o.open.values().all(|n| *n == 0), "{a:?} has reads that are not done: {o:?}");
                }
            }
            Some(End::Kill) => self.rig.lane.kill(),
            Some(End::Down) => {}
            Some(End::CopierFails) => self.rig.s().finished.failed = true,
            Some(End::Wedge) => {
                self.rig.lane.kill();
                stuck = self.rig.lane.copies_outstanding();
                self.rig.lane.wedge();
                self.poll();
                assert_eq!(self.wedged, stuck);
            }
        }
        self.poll();
        let down = matches!(end, Some(End::Kill | End::Down | End::CopierFails));
        for a in self.attempts.keys().copied().collect::<Vec<_>>() {
            let o = self.attempts.get_mut(&a).unwrap();
            if !o.stopped && !down {
                o.stopped = true;
                self.rig.lane.stop(a);
            }
            if !o.inner_quiet {
                self.inner_quiet(a, a.0 % 2 == 0);
            }
        }
        if down {
            self.rig.s().events.push(LaneEvent::Down { cause: Cause::LaneFailed });
        }
        self.poll();
        self.rig.s().copy_all();
        self.poll();
        self.poll();
        for (a, o) in &self.attempts {
            assert!(o.quiet, "{a:?} is not quiet");
        }
        assert!(!self.rig.lane.copies_outstanding() && !self.rig.lane.has_events());
        let ring = self.rig.ring.clone();
        assert!(stuck || ring.lost() == 0);
        assert_eq!(ring.free() + ring.lost(), ring.slots(), "slots leak");
        drop(self.rig);
        assert_eq!(ring.free() + ring.lost(), ring.slots());
        assert!(stuck || ring.lost() == 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_staged_lane_keeps_the_contract_of_lanes(
        kind in prop_oneof![Just(FenceKind::Posted), Just(FenceKind::Own), Just(FenceKind::Trailer)],
        steps in proptest::collection::vec(step(), 1..200),
    ) {
        let mut run = Run::new(kind);
        let mut end = None;
        for s in steps {
            if let Step::Last(e) = s {
                end = Some(e);
                break;
            }
            run.step(s);
        }
        run.end(end);
    }
}
