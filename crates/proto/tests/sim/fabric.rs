//! The data plane of a seed: every process's memory, every lane's reads in flight, and what goes wrong with them.
//!
//! A read has a life: its bytes are loaded from the source at one time (or two: torn), stored into local memory at a later
//! one, and reported at a third. What a lane may do and what not is the contract of [`kvferry_proto::lane::Lane`]: nothing is
//! stored after `Quiet`, and everything may be until then. The checks that belong to a store are made here.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque},
};

use kvferry_proto::{
    error::Cause,
    lane::{Attempt, FenceKind, FenceSlot, Grant, LaneCaps, LaneEvent},
    plan::Read,
    sabotage::{Bug, planted},
};

use crate::{
    memory::{LocalMem, ProcMem},
    rng::Rng,
    trace::{Micros, Promise, Trace, Violation},
    weather::LaneLuck,
};

/// What happens next to a read, an attempt or a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Task {
    Load(usize, usize),
    Store(usize, usize),
    Done(usize, usize),
    Quiet(usize, Attempt),
    /// The ladder's end.
    Killed(usize),
    Down(usize),
    /// After `Down`: the rest is cancelled, and quiet.
    Cleanup(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LaneState {
    Up,
    Killing,
    /// Said to be down; `Quiet` of its attempts is on the way.
    Down,
    Wedged,
    Gone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Read(Read),
    Fence(FenceSlot),
}

#[derive(Debug)]
struct Op {
    attempt: Attempt,
    pull: u64,
    what: What,
    loaded: Vec<u64>,
    stored: usize,
    torn: bool,
    flying: bool,
    /// It will fail rather than be done.
    fails: bool,
    /// It lands, but nobody says so.
    lost: bool,
    /// It is reported as done, and nothing of it was read.
    slips: bool,
    /// It does not go on by itself.
    hung: bool,
    /// When the second half of a torn read is loaded.
    second: Micros,
}

#[derive(Debug)]
struct AttemptState {
    grant: Grant,
    flying: usize,
    stopped: bool,
    failed: bool,
    stuck: bool,
    quiet: bool,
}

/// How a lane shows that its peer's process is dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DeadMode {
    Fails,
    Hangs,
    /// Its address space is another process's now.
    Other,
}

#[derive(Debug)]
pub(crate) struct LaneCore {
    pub local: usize,
    pub proc: usize,
    pub caps: LaneCaps,
    window: usize,
    flying: usize,
    attempts: BTreeMap<Attempt, AttemptState>,
    ops: Vec<Op>,
    out: VecDeque<LaneEvent>,
    pub state: LaneState,
    dead_mode: DeadMode,
    down_cause: Cause,
    last_load: Micros,
    last_store: Micros,
    last_done: Micros,
    /// Chunks whose fences the lane posts: reads that are not done, and whether all were accepted.
    unfenced: BTreeMap<(Attempt, u32), (usize, bool)>,
    /// Chunks with a read that slipped.
    doubts: BTreeSet<(Attempt, u32)>,
    /// A stream that does not go on.
    hung: bool,
}

/// Memory and lanes of a seed.
pub(crate) struct Fabric {
    pub now: Micros,
    pub rng: Rng,
    pub luck: LaneLuck,
    pub procs: Vec<ProcMem>,
    pub locals: Vec<LocalMem>,
    pub lanes: Vec<LaneCore>,
    /// Loads that wait for a stopped process.
    parked: Vec<(usize, Task)>,
    queue: BinaryHeap<Reverse<(Micros, u64, Task)>>,
    seq: u64,
    /// Consumers whose lanes have something to say.
    pub stirred: Vec<usize>,
    /// Pulls that met a fault which may cost them blocks, by consumer process.
    pub excused: BTreeMap<(usize, u64), &'static str>,
    /// Faults of a pull that a retry makes good.
    pub faults: BTreeMap<(usize, u64), u32>,
    pub wedged: Vec<(usize, u64)>,
    pub violation: Option<Violation>,
    pub trace: Trace,
    /// The world is being taken down.
    pub closing: bool,
    pub reads: u64,
}

macro_rules! note {
    ($fabric:expr, $($arg:tt)*) => {
        if $fabric.trace.on {
            let now = $fabric.now;
            $fabric.trace.line(now, format_args!($($arg)*));
        }
    };
}

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
            stirred: Vec::new(),
            excused: BTreeMap::new(),
            faults: BTreeMap::new(),
            wedged: Vec::new(),
            violation: None,
            trace: Trace::default(),
            closing: false,
            reads: 0,
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

    /// Does the next thing.
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
        }
    }

    pub(crate) fn new_lane(&mut self, local: usize, proc: usize, caps: LaneCaps) -> usize {
        // A narrow lane is a quick one: a pull of this size is through in some 100 ms.
        let narrow = if self.luck.latency.1 < 200 { 1 } else { 4 };
        let window = self.rng.tail(narrow, 12, 64) as usize;
        let dead_mode = match caps.fence {
            FenceKind::Posted if self.rng.chance(200) => DeadMode::Other,
            _ if self.rng.chance(300) => DeadMode::Hangs,
            _ => DeadMode::Fails,
        };
        self.lanes.push(LaneCore {
            local,
            proc,
            caps,
            window,
            flying: 0,
            attempts: BTreeMap::new(),
            ops: Vec::new(),
            out: VecDeque::new(),
            state: LaneState::Up,
            dead_mode,
            down_cause: Cause::LaneFailed,
            last_load: 0,
            last_store: 0,
            last_done: 0,
            unfenced: BTreeMap::new(),
            doubts: BTreeSet::new(),
            hung: false,
        });
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
        self.stirred.push(local);
    }

    fn excuse(&mut self, l: usize, pull: u64, why: &'static str) {
        let local = self.lanes[l].local;
        self.excused.entry((local, pull)).or_insert(why);
    }

    fn fault(&mut self, l: usize, pull: u64) {
        let local = self.lanes[l].local;
        *self.faults.entry((local, pull)).or_insert(0) += 1;
    }

    // What the lane is told.

    pub(crate) fn begin(&mut self, l: usize, a: Attempt, grant: Grant) {
        note!(self, "lane {l}: begin {a:?} slot {}", grant.slot);
        let fresh = AttemptState { grant, flying: 0, stopped: false, failed: false, stuck: false, quiet: false };
        if self.lanes[l].attempts.insert(a, fresh).is_some() {
            self.broken(Promise::Sound, format!("{a:?} was begun twice on lane {l}"));
        }
    }

    pub(crate) fn post(&mut self, l: usize, a: Attempt, reads: &[Read]) -> usize {
        let lane = &self.lanes[l];
        let usable = lane.attempts.get(&a).is_some_and(|s| !s.stopped && !s.failed && !s.quiet);
        if !usable || lane.state != LaneState::Up {
            return 0;
        }
        if reads.windows(2).any(|w| w[0].chunk != w[1].chunk) {
            self.broken(Promise::Sound, format!("{a:?} offers reads of two chunks at once"));
        }
        let lane = &self.lanes[l];
        let mut room = lane.window.saturating_sub(lane.flying).min(reads.len());
        if room > 1 && self.rng.chance(100) {
            room = self.rng.between(1, room as u64) as usize;
        }
        for read in &reads[..room] {
            self.post_read(l, a, *read);
        }
        let all = room == reads.len();
        let (fence, chunk) = (self.lanes[l].caps.fence, reads[0].chunk);
        let at_once = fence == FenceKind::Trailer || (fence == FenceKind::Own && planted(Bug::FenceBeforeData));
        if at_once && all {
            let slot = self.lanes[l].attempts[&a].grant.slot;
            let pull = self.lanes[l].ops.last().map_or(0, |o| o.pull);
            self.launch(l, a, pull, What::Fence(FenceSlot { chunk, slot }));
        } else if fence == FenceKind::Own && !at_once {
            let chunk = self.lanes[l].unfenced.entry((a, chunk)).or_default();
            *chunk = (chunk.0 + room, chunk.1 | all);
        }
        room
    }

    pub(crate) fn post_fence(&mut self, l: usize, a: Attempt, f: FenceSlot) -> bool {
        let lane = &self.lanes[l];
        let usable = lane.attempts.get(&a).is_some_and(|s| !s.stopped && !s.failed && !s.quiet);
        if !usable || lane.state != LaneState::Up || (lane.flying > 0 && self.rng.chance(50)) {
            return false;
        }
        if lane.caps.fence != FenceKind::Posted {
            self.broken(Promise::Sound, format!("a fence was posted on lane {l}, whose fences come by themselves"));
        }
        let lane = &self.lanes[l];
        let pull = lane.ops.iter().rev().find(|o| o.attempt == a).map_or(0, |o| o.pull);
        self.launch(l, a, pull, What::Fence(f));
        true
    }

    fn post_read(&mut self, l: usize, a: Attempt, read: Read) {
        self.reads += 1;
        let local_no = self.lanes[l].local;
        let now = self.now;
        let local = &mut self.locals[local_no];
        let (first, n) = ((read.dst_offset / 8) as usize, (read.len / 8) as usize);
        let mut bad = None;
        let mut pull = 0;
        match local.notes.get_mut(usize::from(read.dst_segment)).and_then(|s| s.get_mut(first..first + n)) {
            None => bad = Some((Promise::Sound, "leaves local memory".to_owned())),
            Some(notes) => {
                for note in notes {
                    let Some(&holder) = local.holders.get(note.block as usize) else {
                        bad = Some((Promise::Exact, "writes between blocks".to_owned()));
                        break;
                    };
                    pull = holder;
                    if holder == 0 {
                        bad = Some((Promise::Quiet, format!("writes block {}, which no pull holds", note.block)));
                    }
                    if note.good.0 == holder && note.good.1 < now && holder != 0 {
                        bad = Some((Promise::Frugal, format!("reads block {} of pull {holder} again", note.block)));
                    }
                    note.attempt = note.attempt.max(a.0);
                }
            }
        }
        if let Some((promise, what)) = bad {
            self.broken(promise, format!("a read posted for {a:?} {what}: {read:?}"));
            return;
        }
        self.launch(l, a, pull, What::Read(read));
    }

    /// An operation takes off, and its fate is drawn.
    fn launch(&mut self, l: usize, a: Attempt, pull: u64, what: What) {
        let luck = self.luck.clone();
        let now = self.now;
        let stream = self.lanes[l].caps.fence == FenceKind::Trailer;
        let fails = self.rng.chance(luck.fail);
        let hangs = self.rng.chance(luck.hang);
        let lost = self.rng.chance(luck.lost);
        let slips = self.rng.chance(luck.slip) && !stream && matches!(what, What::Read(_));
        let late = self.rng.chance(luck.late);
        let torn = self.rng.chance(luck.torn);
        let (low, usual, high) = luck.latency;
        let mut t = now + self.rng.tail(low, usual, high);
        if late {
            t += self.rng.between(1000, 20_000);
        }
        let tear = if torn { self.rng.tail(1, 50, 3000) } else { 0 };
        if fails {
            self.fault(l, pull);
        }
        if hangs || lost {
            self.excuse(l, pull, "a read that never completed");
        }
        let op = Op {
            attempt: a,
            pull,
            what,
            loaded: Vec::new(),
            stored: 0,
            torn,
            flying: true,
            fails,
            lost,
            slips,
            hung: hangs || lost,
            second: 0,
        };
        let lane = &mut self.lanes[l];
        let o = lane.ops.len();
        lane.ops.push(op);
        lane.flying += 1;
        if let Some(s) = lane.attempts.get_mut(&a) {
            s.flying += 1;
        }
        if stream {
            // In order, and what hangs, hangs for all that follow.
            t = t.max(lane.last_load + 1);
            lane.last_load = t + tear;
            lane.hung |= hangs || lost;
            if lane.hung {
                self.excuse(l, pull, "a stream that does not go on");
                return;
            }
        } else if hangs {
            return;
        }
        self.lanes[l].ops[o].second = t + tear;
        if self.rng.chance(luck.down) {
            let d = self.rng.between(0, 3000);
            self.fault(l, pull);
            self.at(now + d, Task::Down(l));
        }
        self.at(t, Task::Load(l, o));
    }

    pub(crate) fn stop(&mut self, l: usize, a: Attempt) {
        note!(self, "lane {l}: stop {a:?}");
        let (stuck, late) = (self.luck.stuck, self.luck.late_after_stop);
        let stuck = self.rng.chance(stuck);
        let late = self.rng.chance(late);
        let lane = &mut self.lanes[l];
        let Some(s) = lane.attempts.get_mut(&a) else { return };
        if s.quiet || std::mem::replace(&mut s.stopped, true) {
            return;
        }
        // With nothing in flight there is nothing to be stuck on.
        s.stuck = stuck && s.flying > 0;
        if stuck && s.flying > 0 {
            let pull = lane.ops.iter().rev().find(|o| o.attempt == a).map_or(0, |o| o.pull);
            self.excuse(l, pull, "an attempt that did not drain");
        }
        let bound = self.lanes[l].caps.quiet_bound.as_micros() as Micros;
        // A stream drops what was asked for as a whole, or not at all: a trailer speaks for all of its chunk.
        let stream = self.lanes[l].caps.fence == FenceKind::Trailer;
        let all = stream && self.rng.chance(500);
        for o in 0..self.lanes[l].ops.len() {
            let op = &self.lanes[l].ops[o];
            if op.attempt != a || !op.flying || self.lanes[l].state == LaneState::Wedged {
                continue;
            }
            if late && matches!(op.what, What::Read(_)) && !stream {
                // It lands once more, as late as it may.
                let t = self.now + self.rng.between(0, bound / 3);
                self.at(t, Task::Store(l, o));
            } else if all || (!stream && self.rng.chance(500)) {
                // Taken off the queue in time.
                self.finish(l, o);
            }
        }
        self.check_quiet(l, a);
    }

    pub(crate) fn kill(&mut self, l: usize) {
        note!(self, "lane {l}: kill");
        let lane = &mut self.lanes[l];
        if lane.state == LaneState::Up {
            lane.state = LaneState::Killing;
            let bound = lane.caps.quiet_bound.as_micros() as Micros;
            let t = self.now + self.rng.between(0, bound * 2 / 5);
            self.at(t, Task::Killed(l));
        }
    }

    /// The next events, all or some of them.
    pub(crate) fn poll(&mut self, l: usize, out: &mut Vec<LaneEvent>) {
        let all = self.lanes[l].out.len();
        let n = if all > 1 && self.rng.chance(300) { self.rng.between(1, all as u64) as usize } else { all };
        for _ in 0..n {
            let Some(event) = self.lanes[l].out.pop_front() else { break };
            if let LaneEvent::Fence { attempt, chunk, word } = &event {
                self.note_good(l, *attempt, *chunk, *word);
            }
            out.push(event);
        }
        if n < all {
            let local = self.lanes[l].local;
            self.stirred.push(local);
        }
    }

    /// A fence that held is told to the tracker: from now on the chunk's words are good.
    fn note_good(&mut self, l: usize, a: Attempt, chunk: u32, word: u64) {
        let now = self.now;
        let lane = &self.lanes[l];
        if lane.attempts.get(&a).is_none_or(|s| s.grant.nonce.get() != word) {
            return;
        }
        let local = &mut self.locals[lane.local];
        for op in lane.ops.iter().filter(|o| o.attempt == a) {
            if let What::Read(r) = op.what
                && r.chunk == chunk
            {
                let (first, n) = ((r.dst_offset / 8) as usize, (r.len / 8) as usize);
                for note in &mut local.notes[usize::from(r.dst_segment)][first..first + n] {
                    if note.good.0 != op.pull {
                        note.good = (op.pull, now);
                    }
                }
            }
        }
    }

    pub(crate) fn dropped(&mut self, l: usize) {
        let lane = &self.lanes[l];
        let alive = self.locals[lane.local].alive;
        let busy = lane.attempts.iter().find(|(_, s)| !s.quiet && s.flying > 0).map(|(a, _)| *a);
        if let (true, Some(a)) = (alive && lane.state != LaneState::Wedged, busy) {
            self.broken(Promise::Quiet, format!("lane {l} was dropped while reads of {a:?} were in flight"));
        }
        self.lanes[l].state = LaneState::Gone;
    }

    // What happens by itself.

    fn load(&mut self, l: usize, o: usize) {
        let lane = &self.lanes[l];
        let op = &lane.ops[o];
        if !op.flying || !self.locals[lane.local].alive {
            return;
        }
        let stream = lane.caps.fence == FenceKind::Trailer;
        if stream && lane.hung {
            return;
        }
        let proc = &self.procs[lane.proc];
        if proc.alive && proc.stopped && stream {
            self.parked.push((lane.proc, Task::Load(l, o)));
            return;
        }
        let mut from = lane.proc;
        if !proc.alive {
            let fence = matches!(op.what, What::Fence(_));
            let other = self.procs.iter().rposition(|p| p.addr == proc.addr && p.alive);
            match (lane.dead_mode, other) {
                // The pid is another's: its bytes are read, but the check after them sees it.
                (DeadMode::Other, Some(p)) if !fence => from = p,
                (DeadMode::Hangs, _) => return,
                _ => return self.op_failed(l, o, Cause::PeerDown),
            }
        }
        if lane.state == LaneState::Wedged {
            return;
        }
        if op.fails && (stream || self.rng.chance(500)) {
            if stream {
                return self.go_down(l, Cause::LaneFailed);
            }
            return self.op_failed(l, o, Cause::LaneFailed);
        }
        if op.slips
            && let What::Read(r) = op.what
        {
            let doubt = (op.attempt, r.chunk);
            self.lanes[l].doubts.insert(doubt);
            return self.at(self.now + 1, Task::Done(l, o));
        }
        let lane = &mut self.lanes[l];
        let op = &mut lane.ops[o];
        let proc = &self.procs[from];
        match op.what {
            What::Fence(f) => {
                let grant = lane.attempts.get(&op.attempt).map(|s| s.grant);
                let slot = if stream { grant.map_or(0, |g| g.slot) } else { f.slot };
                op.loaded = vec![proc.word(slot)];
            }
            What::Read(r) => {
                let (first, n) = ((r.src_offset / 8) as usize, (r.len / 8) as usize);
                let all = proc.memory.0.get(usize::from(r.src_segment)).and_then(|s| s.get(first..first + n));
                let Some(all) = all else {
                    if from != lane.proc {
                        // The other process has no such memory.
                        return self.op_failed(l, o, Cause::PeerDown);
                    }
                    let what = format!("a read is of another layout than its source's: {r:?}");
                    return self.broken(Promise::Fresh, what);
                };
                let to = if op.torn && op.loaded.is_empty() { n.div_ceil(2) } else { n };
                let have = op.loaded.len();
                op.loaded.extend_from_slice(&all[have..to]);
                if to < n {
                    let t = op.second;
                    return self.at(t, Task::Load(l, o));
                }
            }
        }
        let mut t = self.now + self.rng.tail(1, 30, 600);
        if stream {
            t = t.max(self.lanes[l].last_store + 1);
            self.lanes[l].last_store = t;
        }
        self.at(t, Task::Store(l, o));
    }

    fn store(&mut self, l: usize, o: usize) {
        let now = self.now;
        let lane = &mut self.lanes[l];
        let local_no = lane.local;
        let wedged = lane.state == LaneState::Wedged;
        let op = &mut lane.ops[o];
        if !(op.flying || wedged) || !self.locals[local_no].alive {
            return;
        }
        let stream = lane.caps.fence == FenceKind::Trailer;
        if let What::Read(r) = op.what {
            let half = if op.torn && op.stored == 0 && !stream { op.loaded.len().div_ceil(2) } else { op.loaded.len() };
            let from = if op.stored >= half { 0 } else { op.stored };
            let (attempt, pull) = (op.attempt, op.pull);
            let first = (r.dst_offset / 8) as usize;
            let local = &mut self.locals[local_no];
            let mut bad = None;
            for (i, &word) in op.loaded[..half].iter().enumerate().skip(from) {
                let (segment, at) = (usize::from(r.dst_segment), first + i);
                let note = local.notes[segment][at];
                let holder = local.holders.get(note.block as usize).copied().unwrap_or(0);
                if holder != pull {
                    bad = Some(format!("block {} of pull {pull}, which has ended (held by {holder} now)", note.block));
                }
                if note.attempt > attempt.0 {
                    bad = Some(format!("block {}, which Attempt({}) reads since", note.block, note.attempt));
                }
                local.memory.0[segment][at] = word;
            }
            op.stored = half;
            let whole = (r.len / 8) as usize;
            if let Some(bad) = bad {
                self.broken(Promise::Quiet, format!("{attempt:?} on lane {l} wrote {bad}"));
                return;
            }
            let op = &self.lanes[l].ops[o];
            if half < op.loaded.len() {
                let t = now + self.rng.tail(1, 50, 1500);
                return self.at(t, Task::Store(l, o));
            }
            if half < whole {
                // A late landing of a read that was not loaded in full.
                return;
            }
        }
        if !self.lanes[l].ops[o].flying {
            return;
        }
        if self.lanes[l].ops[o].lost && !stream {
            return;
        }
        let mut t = now + self.rng.tail(0, 20, 400);
        if stream {
            t = t.max(self.lanes[l].last_done + 1);
            self.lanes[l].last_done = t;
        }
        self.at(t, Task::Done(l, o));
    }

    fn done(&mut self, l: usize, o: usize) {
        let lane = &self.lanes[l];
        let op = &lane.ops[o];
        // On a wedged lane nothing is ever known to be over.
        if !op.flying || !self.locals[lane.local].alive || lane.state == LaneState::Wedged {
            return;
        }
        let (attempt, what) = (op.attempt, op.what);
        if op.fails {
            return self.op_failed(l, o, Cause::LaneFailed);
        }
        let event = match what {
            What::Read(r) => LaneEvent::Done { attempt, chunk: r.chunk, reads: 1 },
            What::Fence(f) if lane.doubts.contains(&(attempt, f.chunk)) => LaneEvent::Again { attempt, chunk: f.chunk },
            What::Fence(f) => {
                LaneEvent::Fence { attempt, chunk: f.chunk, word: op.loaded.first().copied().unwrap_or(0) }
            }
        };
        let heard = lane.attempts.get(&attempt).is_some_and(|s| !s.quiet);
        if let LaneEvent::Again { chunk, .. } = event {
            self.lanes[l].doubts.remove(&(attempt, chunk));
        }
        if heard {
            self.emit(l, event);
        }
        self.finish(l, o);
        if let What::Read(r) = what {
            self.own_fence(l, attempt, r.chunk);
        }
        self.check_quiet(l, attempt);
    }

    /// A read of the chunk is done: after the last one a lane that posts fences by itself does.
    fn own_fence(&mut self, l: usize, attempt: Attempt, chunk: u32) {
        let lane = &mut self.lanes[l];
        let Some((open, all)) = lane.unfenced.get_mut(&(attempt, chunk)) else { return };
        *open -= 1;
        if *open > 0 || !*all {
            return;
        }
        lane.unfenced.remove(&(attempt, chunk));
        if let Some(s) = lane.attempts.get(&attempt).filter(|s| !s.stopped && !s.failed) {
            let f = FenceSlot { chunk, slot: s.grant.slot };
            let pull = lane.ops.iter().rev().find(|o| o.attempt == attempt).map_or(0, |o| o.pull);
            self.launch(l, attempt, pull, What::Fence(f));
        }
    }

    fn op_failed(&mut self, l: usize, o: usize, cause: Cause) {
        let attempt = self.lanes[l].ops[o].attempt;
        let Some(s) = self.lanes[l].attempts.get_mut(&attempt) else { return };
        if !std::mem::replace(&mut s.failed, true) && !s.quiet {
            self.emit(l, LaneEvent::Failed { attempt, cause });
        }
        self.finish(l, o);
        self.check_quiet(l, attempt);
    }

    /// The operation is over: nothing more comes of it.
    fn finish(&mut self, l: usize, o: usize) {
        let lane = &mut self.lanes[l];
        let op = &mut lane.ops[o];
        if std::mem::replace(&mut op.flying, false) {
            lane.flying -= 1;
            if let Some(s) = lane.attempts.get_mut(&op.attempt) {
                s.flying -= 1;
            }
        }
    }

    fn check_quiet(&mut self, l: usize, a: Attempt) {
        let Some(s) = self.lanes[l].attempts.get(&a) else { return };
        let state = self.lanes[l].state;
        let by_itself = matches!(state, LaneState::Up | LaneState::Gone | LaneState::Wedged);
        if s.stopped && !s.quiet && s.flying == 0 && !s.stuck && by_itself {
            let t = self.now + self.rng.tail(0, 30, 500);
            self.at(t, Task::Quiet(l, a));
        }
    }

    fn quiet(&mut self, l: usize, a: Attempt) {
        let Some(s) = self.lanes[l].attempts.get_mut(&a) else { return };
        if !s.quiet && s.flying == 0 {
            s.quiet = true;
            self.emit(l, LaneEvent::Quiet { attempt: a });
        }
    }

    fn killed(&mut self, l: usize) {
        if self.lanes[l].state != LaneState::Killing {
            return;
        }
        let busy = self.lanes[l].flying > 0;
        let wedge = self.luck.wedge;
        if busy && self.rng.chance(wedge) {
            self.lanes[l].state = LaneState::Wedged;
            let local = self.lanes[l].local;
            // Those with nothing in flight are quiet; the others never will be.
            self.all_quiet(l);
            for o in 0..self.lanes[l].ops.len() {
                if self.lanes[l].ops[o].flying {
                    let pull = self.lanes[l].ops[o].pull;
                    if !self.wedged.contains(&(local, pull)) {
                        self.wedged.push((local, pull));
                    }
                    self.excuse(l, pull, "a wedge");
                    let t = self.now + self.rng.between(0, 300_000);
                    self.at(t, Task::Store(l, o));
                }
            }
            self.emit(l, LaneEvent::Wedged);
            return;
        }
        self.cancel_all(l);
        let early = self.rng.chance(500);
        if early {
            self.emit(l, LaneEvent::Down { cause: Cause::LaneFailed });
        }
        self.all_quiet(l);
        if !early {
            self.emit(l, LaneEvent::Down { cause: Cause::LaneFailed });
        }
        self.lanes[l].state = LaneState::Gone;
    }

    fn cancel_all(&mut self, l: usize) {
        for o in 0..self.lanes[l].ops.len() {
            self.finish(l, o);
        }
    }

    fn all_quiet(&mut self, l: usize) {
        let mut all: Vec<_> = self.lanes[l].attempts.iter().filter(|(_, s)| !s.quiet).map(|(a, _)| *a).collect();
        self.rng.shuffle(&mut all);
        for a in all {
            self.quiet(l, a);
        }
    }

    /// The lane breaks, in one of the ways that lanes break.
    fn go_down(&mut self, l: usize, cause: Cause) {
        if self.lanes[l].state != LaneState::Up {
            return;
        }
        // What a broken stream has not carried, it never will.
        self.lanes[l].hung = self.lanes[l].caps.fence == FenceKind::Trailer;
        let mut hit: Vec<u64> = self.lanes[l].ops.iter().filter(|o| o.flying).map(|o| o.pull).collect();
        hit.dedup();
        for pull in hit {
            self.fault(l, pull);
        }
        if self.rng.chance(300) {
            // Everything is over before it is said.
            self.cancel_all(l);
            self.all_quiet(l);
            self.emit(l, LaneEvent::Down { cause });
            self.lanes[l].state = LaneState::Gone;
            return;
        }
        if self.rng.chance(500) {
            let all: Vec<_> =
                self.lanes[l].attempts.iter().filter(|(_, s)| !s.quiet && !s.failed).map(|(a, _)| *a).collect();
            for attempt in all {
                if let Some(s) = self.lanes[l].attempts.get_mut(&attempt) {
                    s.failed = true;
                }
                self.emit(l, LaneEvent::Failed { attempt, cause });
            }
        }
        self.emit(l, LaneEvent::Down { cause });
        self.lanes[l].state = LaneState::Down;
        let bound = self.lanes[l].caps.quiet_bound.as_micros() as Micros;
        let t = self.now + self.rng.between(0, bound / 3);
        self.at(t, Task::Cleanup(l));
    }

    fn cleanup(&mut self, l: usize) {
        if self.lanes[l].state == LaneState::Down {
            self.cancel_all(l);
            self.all_quiet(l);
            self.lanes[l].state = LaneState::Gone;
        }
    }

    // What the world does to processes.

    pub(crate) fn proc_died(&mut self, proc: usize) {
        self.procs[proc].alive = false;
        self.procs[proc].stopped = false;
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

    /// Faults are over: what hung fails now, and streams that stand still break.
    pub(crate) fn calm(&mut self, luck: LaneLuck) {
        self.luck = luck;
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
                // Whatever is still scheduled finds it over.
                if self.lanes[l].ops[o].flying && self.lanes[l].ops[o].hung {
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
