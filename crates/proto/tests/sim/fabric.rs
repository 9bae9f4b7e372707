//! The data plane of a seed: the memory of every process, the reads in flight of every lane, and their failures.
//!
//! A read has a life: its bytes are loaded from the source at one time (or two: torn), stored into local memory later, and
//! reported after that. The limits of a lane are the contract of [`kvferry_proto::Lane`]: nothing is stored after
//! `Quiet`, and everything may be stored until then. The checks that belong to a store are made here.

mod calls;
mod copies;
mod reads;
mod state;
mod teardown;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
};

use kvferry_proto::{Attempt, Cause, FenceKind, LaneCaps, LaneEvent};

pub(crate) use self::state::Path;
use self::state::{DeadMode, LaneCore, LaneState};
use crate::{
    memory::{LocalMem, ProcMem},
    rng::Rng,
    trace::{Micros, Promise, Trace, Violation},
    weather::LaneLuck,
};

/// Work happens next to a read, an attempt or a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Task {
    Load(usize, usize),
    Store(usize, usize),
    Done(usize, usize),
    Quiet(usize, Attempt),
    /// The last teardown stage.
    Killed(usize),
    Down(usize),
    /// After `Down`: cancels the rest, and becomes quiet.
    Cleanup(usize),
    /// A copy job of a staged lane writes local memory.
    Copy(usize, u64),
    /// It is reported as finished.
    Copied(usize, u64),
    /// A killed lane's copies have had their time.
    Overdue(usize),
    /// Words of a lane that writes GPU memory directly become visible without a flush.
    Visible(usize),
}

/// Memory and lanes of a seed.
pub(crate) struct Fabric {
    pub now: Micros,
    pub rng: Rng,
    pub luck: LaneLuck,
    pub procs: Vec<ProcMem>,
    pub locals: Vec<LocalMem>,
    lanes: Vec<LaneCore>,
    /// Loads that wait for a stopped process.
    parked: Vec<(usize, Task)>,
    queue: BinaryHeap<Reverse<(Micros, u64, Task)>>,
    seq: u64,
    /// Consumers whose lanes have events.
    pub ready: Vec<usize>,
    /// Pulls that met a fault that may cost them blocks, by consumer process, and the fault.
    pub excused: BTreeMap<(usize, u64), &'static str>,
    /// Faults of a pull that a retry repairs.
    pub faults: BTreeMap<(usize, u64), u32>,
    pub wedged: Vec<(usize, u64)>,
    /// When a read or a fence of a pull completed last.
    pub moved: BTreeMap<(usize, u64), Micros>,
    pub violation: Option<Violation>,
    pub trace: Trace,
    /// The world is being taken down.
    pub closing: bool,
    pub reads: u64,
    pub copies: u64,
    pub copiers_failed: u64,
    pub copies_wedged: u64,
}

macro_rules! note {
    ($fabric:expr, $($arg:tt)*) => {
        if $fabric.trace.on {
            let now = $fabric.now;
            $fabric.trace.line(now, format_args!($($arg)*));
        }
    };
}

use note;

impl Fabric {
    pub(crate) fn new(rng: Rng, luck: LaneLuck) -> Self {
        Self {
            now: 0,
            rng,
            luck,
            procs: Vec::new(),
            locals: Vec::new(),
            lanes: Vec::new(),
            parked: Vec::new(),
            queue: BinaryHeap::new(),
            seq: 0,
            ready: Vec::new(),
            excused: BTreeMap::new(),
            faults: BTreeMap::new(),
            wedged: Vec::new(),
            moved: BTreeMap::new(),
            violation: None,
            trace: Trace::default(),
            closing: false,
            reads: 0,
            copies: 0,
            copiers_failed: 0,
            copies_wedged: 0,
        }
    }

    pub(crate) fn broken(&mut self, promise: Promise, what: String) {
        if self.violation.is_none() && !self.closing {
            self.violation = Some(Violation { promise, at: self.now, what });
        }
    }

    pub(crate) fn next(&self) -> Option<Micros> {
        self.queue.peek().map(|Reverse((t, ..))| *t)
    }

    fn at(&mut self, t: Micros, task: Task) {
        self.seq += 1;
        self.queue.push(Reverse((t.max(self.now), self.seq, task)));
    }

    /// Carries out the next task.
    pub(crate) fn step(&mut self) {
        let Some(Reverse((t, _, task))) = self.queue.pop() else { return };
        self.now = self.now.max(t);
        match task {
            Task::Load(l, o) => self.load(l, o),
            Task::Store(l, o) => self.store(l, o),
            Task::Done(l, o) => self.done(l, o),
            Task::Quiet(l, a) => self.quiet(l, a),
            Task::Killed(l) => self.killed(l),
            Task::Down(l) => {
                if self.lanes[l].state == LaneState::Up {
                    let cause = self.lanes[l].down_cause;
                    self.go_down(l, cause);
                }
            }
            Task::Cleanup(l) => self.cleanup(l),
            Task::Copy(l, ticket) => self.copy(l, ticket),
            Task::Copied(l, ticket) => self.copied(l, ticket),
            Task::Overdue(l) => self.ready.push(self.lanes[l].local),
            Task::Visible(l) => self.flush(l),
        }
    }

    pub(crate) fn new_lane(&mut self, local: usize, proc: usize, caps: LaneCaps, path: Path) -> usize {
        // A narrow lane is quick, so that a pull of this size takes about 100 ms.
        let narrow = if self.luck.latency.1 < 200 { 1 } else { 4 };
        let window = self.rng.tail(narrow, 12, 64) as usize;
        let dead_mode = match caps.fence {
            // It hears of its peer's death from the system.
            _ if path == Path::Mapped => DeadMode::Fails,
            FenceKind::Posted if self.rng.chance(200) => DeadMode::Other,
            _ if self.rng.chance(300) => DeadMode::Hangs,
            _ => DeadMode::Fails,
        };
        self.lanes.push(LaneCore::new(local, proc, caps, window, dead_mode, path));
        self.lanes.len() - 1
    }

    fn emit(&mut self, l: usize, event: LaneEvent) {
        note!(self, "lane {l}: {event:?}");
        let lane = &mut self.lanes[l];
        if let (LaneEvent::Done { attempt, chunk, reads }, Some(LaneEvent::Done { attempt: a, chunk: c, reads: r })) =
            (&event, lane.out.back_mut())
            && attempt == a
            && chunk == c
        {
            *r += reads;
        } else {
            lane.out.push_back(event);
        }
        let local = lane.local;
        self.ready.push(local);
    }

    fn excuse(&mut self, l: usize, pull: u64, why: &'static str) {
        let local = self.lanes[l].local;
        self.excused.entry((local, pull)).or_insert(why);
    }

    fn fault(&mut self, l: usize, pull: u64) {
        let local = self.lanes[l].local;
        *self.faults.entry((local, pull)).or_insert(0) += 1;
    }

    // Deaths, stops and the end of the faults.

    pub(crate) fn proc_died(&mut self, proc: usize) {
        self.procs[proc].alive = false;
        self.procs[proc].stopped = false;
        self.procs[proc].died = self.now;
        for l in 0..self.lanes.len() {
            if self.lanes[l].proc == proc
                && self.lanes[l].state == LaneState::Up
                && self.lanes[l].dead_mode == DeadMode::Fails
            {
                self.lanes[l].down_cause = *self.rng.pick(&[Cause::PeerDown, Cause::PeerDown, Cause::LaneFailed]);
                let t = self.now + self.rng.between(20, 2000);
                self.at(t, Task::Down(l));
            }
        }
    }

    pub(crate) fn proc_stopped(&mut self, proc: usize, stopped: bool) {
        self.procs[proc].stopped = stopped;
        if !stopped {
            let (go, stay): (Vec<_>, Vec<_>) =
                std::mem::take(&mut self.parked).into_iter().partition(|(p, _)| *p == proc);
            self.parked = stay;
            for (i, (_, task)) in go.into_iter().enumerate() {
                let t = self.now + i as Micros;
                self.at(t, task);
            }
        }
    }

    pub(crate) fn local_died(&mut self, local: usize) {
        self.locals[local].alive = false;
    }

    /// The faults are over: operations that hung fail now, and streams that make no progress break.
    pub(crate) fn calm(&mut self, luck: LaneLuck) {
        self.luck = luck;
        self.resume_copies();
        for l in 0..self.lanes.len() {
            if self.lanes[l].state != LaneState::Up || !self.locals[self.lanes[l].local].alive {
                continue;
            }
            let dead = !self.procs[self.lanes[l].proc].alive;
            if self.lanes[l].hung || dead {
                let cause = if dead { Cause::PeerDown } else { Cause::LaneFailed };
                self.go_down(l, cause);
                continue;
            }
            for o in 0..self.lanes[l].ops.len() {
                // A task that is still scheduled finds the operation ended.
                if self.lanes[l].ops[o].in_flight && self.lanes[l].ops[o].hung {
                    self.op_failed(l, o, Cause::LaneFailed);
                }
            }
        }
    }

    /// Whether a pull's word was fenced before `decided`.
    pub(crate) fn fenced(&self, local: usize, pull: u64, decided: Micros, segment: usize, at: usize) -> bool {
        let note = self.locals[local].notes[segment][at];
        note.good.0 == pull && note.good.1 < decided
    }
}
