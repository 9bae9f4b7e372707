//! The life of an operation after its post: loaded from the source, stored into local memory, reported.

use kvferry_proto::{
    Attempt, Cause, FenceSlot, LaneEvent,
    sabotage::{Bug, planted},
};

use super::{
    Fabric, Task,
    state::{DeadMode, LaneState, Path, Work},
};
use crate::trace::Promise;

/// Changed chunks that a stream takes back of one attempt, before it fails the attempt.
const MOST_CORRUPT: u32 = 3;

impl Fabric {
    pub(super) fn load(&mut self, l: usize, o: usize) {
        let lane = &self.lanes[l];
        let op = &lane.ops[o];
        if !op.in_flight || !self.locals[lane.local].alive {
            return;
        }
        let stream = lane.is_stream();
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
            let fence = matches!(op.work, Work::Fence(_));
            let other = self.procs.iter().rposition(|p| p.addr == proc.addr && p.alive);
            match (lane.dead_mode, other) {
                // The pid belongs to another process: its bytes are read, and the check after them fails.
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
        if op.unread
            && let Work::Read(r) = op.work
        {
            let chunk = (op.attempt, r.chunk);
            self.lanes[l].unverified.insert(chunk);
            if !stream {
                return self.at(self.now + 1, Task::Done(l, o));
            }
        }
        let lane = &mut self.lanes[l];
        let op = &mut lane.ops[o];
        let proc = &self.procs[from];
        match op.work {
            Work::Fence(f) => {
                let grant = lane.attempts.get(&op.attempt).map(|s| s.grant);
                let slot = if stream { grant.map_or(0, |g| g.slot) } else { f.slot };
                op.loaded = vec![proc.word(slot)];
            }
            Work::Read(r) => {
                let (first, n) = ((r.src_offset / 8) as usize, (r.len / 8) as usize);
                let all = proc.memory.0.get(usize::from(r.src_segment)).and_then(|s| s.get(first..first + n));
                let Some(all) = all else {
                    if from != lane.proc {
                        // The other process has no such memory.
                        return self.op_failed(l, o, Cause::PeerDown);
                    }
                    let what = format!("a read does not fit the layout of its source: {r:?}");
                    return self.broken(Promise::Fresh, what);
                };
                let to = if op.torn && op.loaded.is_empty() { n.div_ceil(2) } else { n };
                let have = op.loaded.len();
                op.loaded.extend(all[have..to].iter().map(|w| if op.unread { !w } else { *w }));
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

    pub(super) fn store(&mut self, l: usize, o: usize) {
        let now = self.now;
        let lane = &mut self.lanes[l];
        let local_no = lane.local;
        // A wedged lane may store indefinitely, but not for an attempt that was quiet before it wedged.
        let quiet = lane.attempts.get(&lane.ops[o].attempt).is_some_and(|s| s.quiet);
        let wedged = lane.state == LaneState::Wedged && !quiet;
        let stream = lane.is_stream();
        let op = &mut lane.ops[o];
        if !(op.in_flight || wedged) || !self.locals[local_no].alive {
            return;
        }
        if let Work::Read(r) = op.work {
            let half = if op.torn && op.stored == 0 && !stream { op.loaded.len().div_ceil(2) } else { op.loaded.len() };
            let from = if op.stored >= half { 0 } else { op.stored };
            let (attempt, pull) = (op.attempt, op.pull);
            let first = (r.dst_offset / 8) as usize;
            let local = &mut self.locals[local_no];
            let mut bad = None;
            let mut late = false;
            for (i, &word) in op.loaded[..half].iter().enumerate().skip(from) {
                let (segment, at) = (usize::from(r.dst_segment), first + i);
                match lane.path {
                    Path::Staged => {
                        let place = &mut local.ring[at];
                        place.0 = word;
                        if place.1 != (l, o) {
                            bad = Some(format!("a place in the ring that lane {} reads into since", place.1.0));
                        }
                    }
                    Path::Direct if self.rng.chance(500) => {
                        lane.unseen.push((segment, at, word, (pull, attempt.0)));
                        late = true;
                    }
                    _ => bad = local.store(segment, at, word, (pull, attempt.0)).err().or(bad),
                }
            }
            op.stored = half;
            let whole = (r.len / 8) as usize;
            if late {
                let t = now + self.rng.tail(1, 1000, 20_000);
                self.at(t, Task::Visible(l));
            }
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
        if !self.lanes[l].ops[o].in_flight {
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

    pub(super) fn done(&mut self, l: usize, o: usize) {
        let lane = &self.lanes[l];
        let op = &lane.ops[o];
        // A wedged lane never reports a completion.
        if !op.in_flight || !self.locals[lane.local].alive || lane.state == LaneState::Wedged {
            return;
        }
        let (attempt, work) = (op.attempt, op.work);
        if op.fails {
            return self.op_failed(l, o, Cause::LaneFailed);
        }
        if let Work::Fence(f) = work
            && lane.is_stream()
            && lane.unverified.contains(&(attempt, f.chunk))
            && let Some(s) = self.lanes[l].attempts.get_mut(&attempt)
        {
            s.corrupt += 1;
            if s.corrupt > MOST_CORRUPT {
                return self.op_failed(l, o, Cause::Corrupt);
            }
        }
        if matches!(work, Work::Fence(_)) && !planted(Bug::FlushSkipped) {
            self.flush(l);
        }
        let lane = &self.lanes[l];
        let op = &lane.ops[o];
        let event = match work {
            Work::Read(r) => LaneEvent::Done { attempt, chunk: r.chunk, reads: 1 },
            Work::Fence(f) if lane.unverified.contains(&(attempt, f.chunk)) => {
                LaneEvent::Again { attempt, chunk: f.chunk }
            }
            Work::Fence(f) => {
                LaneEvent::Fence { attempt, chunk: f.chunk, word: op.loaded.first().copied().unwrap_or(0) }
            }
        };
        let told = lane.attempts.get(&attempt).is_some_and(|s| !s.quiet);
        if let LaneEvent::Again { chunk, .. } = event {
            self.lanes[l].unverified.remove(&(attempt, chunk));
        }
        if told {
            let of = (self.lanes[l].local, self.lanes[l].ops[o].pull);
            self.moved.insert(of, self.now);
            self.emit(l, event);
        }
        self.lanes[l].finish(o);
        if let Work::Read(r) = work {
            self.own_fence(l, attempt, r.chunk);
        }
        self.check_quiet(l, attempt);
    }

    /// A read of the chunk is done: after the last one, a lane with `FenceKind::Own` posts the fence.
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
            let pull = lane.pull_of(attempt);
            self.launch(l, attempt, pull, Work::Fence(f));
        }
    }

    pub(super) fn op_failed(&mut self, l: usize, o: usize, cause: Cause) {
        let attempt = self.lanes[l].ops[o].attempt;
        let Some(s) = self.lanes[l].attempts.get_mut(&attempt) else { return };
        if !std::mem::replace(&mut s.failed, true) && !s.quiet {
            self.emit(l, LaneEvent::Failed { attempt, cause });
        }
        self.lanes[l].finish(o);
        self.check_quiet(l, attempt);
    }
}
