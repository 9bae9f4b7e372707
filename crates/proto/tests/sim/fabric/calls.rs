//! The calls of the `Lane` trait.

use kvferry_proto::{
    Attempt, FenceKind, FenceSlot, Grant, LaneEvent, Read,
    sabotage::{Bug, planted},
};

use super::{
    Fabric, Task, note,
    state::{AttemptState, LaneState, Op, Path, Work},
};
use crate::trace::{Micros, Promise};

impl Fabric {
    pub(crate) fn begin(&mut self, l: usize, a: Attempt, grant: Grant) {
        note!(self, "lane {l}: begin {a:?} slot {}", grant.slot);
        if self.lanes[l].attempts.insert(a, AttemptState::new(grant)).is_some() {
            self.broken(Promise::Sound, format!("{a:?} was begun twice on lane {l}"));
        }
    }

    pub(crate) fn post(&mut self, l: usize, a: Attempt, reads: &[Read]) -> usize {
        let lane = &self.lanes[l];
        if !lane.takes(a) {
            return 0;
        }
        if reads.windows(2).any(|w| w[0].chunk != w[1].chunk) {
            self.broken(Promise::Sound, format!("{a:?} offers reads of two chunks at once"));
        }
        let lane = &self.lanes[l];
        let mut room = lane.window.saturating_sub(lane.in_flight).min(reads.len());
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
            self.launch(l, a, pull, Work::Fence(FenceSlot { chunk, slot }));
        } else if fence == FenceKind::Own && !at_once {
            let chunk = self.lanes[l].unfenced.entry((a, chunk)).or_default();
            *chunk = (chunk.0 + room, chunk.1 | all);
        }
        room
    }

    pub(crate) fn post_fence(&mut self, l: usize, a: Attempt, f: FenceSlot) -> bool {
        let lane = &self.lanes[l];
        if !lane.takes(a) || (lane.in_flight > 0 && self.rng.chance(50)) {
            return false;
        }
        if lane.caps.fence != FenceKind::Posted {
            self.broken(Promise::Sound, format!("a fence was posted on lane {l}, which posts its own fences"));
        }
        let lane = &self.lanes[l];
        let pull = lane.pull_of(a);
        self.launch(l, a, pull, Work::Fence(f));
        true
    }

    fn post_read(&mut self, l: usize, a: Attempt, read: Read) {
        self.reads += 1;
        if self.lanes[l].path == Path::Staged {
            return self.post_to_ring(l, a, read);
        }
        if let Some(pull) = self.check_post(l, a, &read) {
            self.launch(l, a, pull, Work::Read(read));
        }
    }

    /// Checks a read of local memory that a lane accepted. Returns the pull that holds its blocks.
    pub(super) fn check_post(&mut self, l: usize, a: Attempt, read: &Read) -> Option<u64> {
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
            return None;
        }
        Some(pull)
    }

    /// Posts an operation and draws its fate.
    pub(super) fn launch(&mut self, l: usize, a: Attempt, pull: u64, work: Work) {
        let luck = self.luck.clone();
        let now = self.now;
        let stream = self.lanes[l].is_stream();
        let fails = self.rng.chance(luck.fail);
        let hangs = self.rng.chance(luck.hang);
        let lost = self.rng.chance(luck.lost);
        let unread = self.rng.chance(luck.unread) && matches!(work, Work::Read(_));
        let late = self.rng.chance(luck.late);
        let torn = self.rng.chance(luck.torn);
        let (low, usual, high) = luck.latency;
        let mut t = now + self.rng.tail(low, usual, high);
        if late {
            t += self.rng.between(1000, 20_000);
        }
        let tear = if torn { self.rng.tail(1, 50, 3000) } else { 0 };
        if fails || (stream && unread) {
            self.fault(l, pull);
        }
        if hangs || lost {
            self.excuse(l, pull, "a read that never completed");
        }
        let op = Op {
            attempt: a,
            pull,
            work,
            loaded: Vec::new(),
            stored: 0,
            torn,
            in_flight: true,
            fails,
            lost,
            unread,
            hung: hangs || lost,
            second: 0,
        };
        let lane = &mut self.lanes[l];
        let o = lane.launch(op);
        if stream {
            // In order: an operation that hangs blocks all later ones.
            t = t.max(lane.last_load + 1);
            lane.last_load = t + tear;
            lane.hung |= hangs || lost;
            if lane.hung {
                self.excuse(l, pull, "a stream that makes no progress");
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
        // Without an operation in flight, an attempt cannot be stuck.
        s.stuck = stuck && s.in_flight > 0;
        if stuck && s.in_flight > 0 {
            let pull = lane.pull_of(a);
            self.excuse(l, pull, "an attempt that did not drain");
        }
        let bound = self.lanes[l].caps.quiet_bound.as_micros() as Micros;
        // A stream drops all operations or none: a trailer covers its whole chunk.
        let stream = self.lanes[l].is_stream();
        let all = stream && self.rng.chance(500);
        for o in 0..self.lanes[l].ops.len() {
            let op = &self.lanes[l].ops[o];
            if op.attempt != a || !op.in_flight || self.lanes[l].state == LaneState::Wedged {
                continue;
            }
            if late && matches!(op.work, Work::Read(_)) && !stream {
                // It lands again, as late as the contract allows.
                let t = self.now + self.rng.between(0, bound / 3);
                self.at(t, Task::Store(l, o));
            } else if all || (!stream && self.rng.chance(500)) {
                // Removed from the queue in time.
                self.lanes[l].finish(o);
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
            if let LaneEvent::Fence { attempt, chunk, word } = &event
                && self.lanes[l].path != Path::Staged
            {
                self.note_good(l, *attempt, *chunk, *word);
            }
            out.push(event);
        }
        if n < all {
            let local = self.lanes[l].local;
            self.ready.push(local);
        }
    }

    /// The tracker gets a fence that held: from now on the chunk's words are good.
    fn note_good(&mut self, l: usize, a: Attempt, chunk: u32, word: u64) {
        let now = self.now;
        let lane = &self.lanes[l];
        if lane.attempts.get(&a).is_none_or(|s| s.grant.nonce.get() != word) {
            return;
        }
        let local = &mut self.locals[lane.local];
        for op in lane.ops.iter().filter(|o| o.attempt == a) {
            if let Work::Read(r) = op.work
                && r.chunk == chunk
            {
                local.good(&r, op.pull, now);
            }
        }
    }

    pub(crate) fn dropped(&mut self, l: usize) {
        let lane = &self.lanes[l];
        let alive = self.locals[lane.local].alive;
        let busy = lane.attempts.iter().find(|(_, s)| !s.quiet && s.in_flight > 0).map(|(a, _)| *a);
        if let (true, Some(a)) = (alive && lane.state != LaneState::Wedged, busy) {
            self.broken(Promise::Quiet, format!("lane {l} was dropped while reads of {a:?} were in flight"));
        }
        self.check_dropped_copies(l);
        self.close_mapping(l);
        self.lanes[l].state = LaneState::Gone;
    }
}
