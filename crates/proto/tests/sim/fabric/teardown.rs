//! The end of attempts and of lanes: quiet, killed, down.

use kvferry_proto::{
    Attempt, Cause, LaneEvent,
    sabotage::{Bug, planted},
};

use super::{Fabric, Task, state::LaneState};
use crate::trace::{Micros, Promise};

impl Fabric {
    pub(super) fn check_quiet(&mut self, l: usize, a: Attempt) {
        let Some(s) = self.lanes[l].attempts.get(&a) else { return };
        let state = self.lanes[l].state;
        let without_teardown = matches!(state, LaneState::Up | LaneState::Gone | LaneState::Wedged);
        if s.stopped && !s.quiet && s.in_flight == 0 && !s.stuck && without_teardown {
            let t = self.now + self.rng.tail(0, 30, 500);
            self.at(t, Task::Quiet(l, a));
        }
    }

    pub(super) fn quiet(&mut self, l: usize, a: Attempt) {
        let Some(s) = self.lanes[l].attempts.get_mut(&a) else { return };
        if !s.quiet && s.in_flight == 0 {
            s.quiet = true;
            if !planted(Bug::FlushSkipped) {
                self.flush(l);
            }
            self.emit(l, LaneEvent::Quiet { attempt: a });
        }
    }

    pub(super) fn killed(&mut self, l: usize) {
        if self.lanes[l].state != LaneState::Killing {
            return;
        }
        let busy = self.lanes[l].in_flight > 0;
        let wedge = self.luck.wedge;
        if busy && self.rng.chance(wedge) {
            self.lanes[l].state = LaneState::Wedged;
            let local = self.lanes[l].local;
            // Attempts without operations in flight are quiet; the others never will be.
            self.all_quiet(l);
            for o in 0..self.lanes[l].ops.len() {
                if self.lanes[l].ops[o].in_flight {
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
        self.lanes[l].cancel_all();
        let early = self.rng.chance(500);
        if early {
            self.emit(l, LaneEvent::Down { cause: Cause::LaneFailed });
        }
        self.all_quiet(l);
        if !early {
            self.emit(l, LaneEvent::Down { cause: Cause::LaneFailed });
        }
        self.close_mapping(l);
        self.lanes[l].state = LaneState::Gone;
    }

    fn all_quiet(&mut self, l: usize) {
        let mut all: Vec<_> = self.lanes[l].attempts.iter().filter(|(_, s)| !s.quiet).map(|(a, _)| *a).collect();
        self.rng.shuffle(&mut all);
        for a in all {
            self.quiet(l, a);
        }
    }

    /// The lane breaks, in one of several ways.
    pub(super) fn go_down(&mut self, l: usize, cause: Cause) {
        // Work a broken stream has not carried, it never will, even if the lane is being killed already.
        self.lanes[l].hung |= self.lanes[l].is_stream();
        if self.lanes[l].state != LaneState::Up {
            return;
        }
        let mut hit: Vec<u64> = self.lanes[l].ops.iter().filter(|o| o.in_flight).map(|o| o.pull).collect();
        hit.dedup();
        for pull in hit {
            self.fault(l, pull);
        }
        if self.rng.chance(300) {
            // All attempts are quiet before `Down` is out.
            self.lanes[l].cancel_all();
            self.all_quiet(l);
            self.emit(l, LaneEvent::Down { cause });
            self.close_mapping(l);
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

    pub(super) fn cleanup(&mut self, l: usize) {
        if self.lanes[l].state == LaneState::Down {
            self.lanes[l].cancel_all();
            self.all_quiet(l);
            self.close_mapping(l);
            self.lanes[l].state = LaneState::Gone;
        }
    }

    /// Closes the mapping of the peer's memory.
    pub(super) fn close_mapping(&mut self, l: usize) {
        let lane = &mut self.lanes[l];
        // Without the mapping, a wedged lane's reads would have no source; the driver keeps it.
        if lane.state != LaneState::Wedged && !planted(Bug::MappedAfterDown) {
            lane.mapped = false;
        }
    }

    /// Words that were written become visible.
    pub(super) fn flush(&mut self, l: usize) {
        let local = self.lanes[l].local;
        if !self.locals[local].alive {
            return;
        }
        for (segment, at, word, of) in std::mem::take(&mut self.lanes[l].unseen) {
            if let Err(bad) = self.locals[local].store(segment, at, word, of) {
                self.broken(Promise::Quiet, format!("Attempt({}) on lane {l} wrote {bad}", of.1));
            }
        }
    }

    /// A dead process whose memory a live one still maps, though the lane that maps it is not wedged.
    pub(crate) fn pinned(&self, bound: Micros) -> Option<String> {
        self.lanes.iter().enumerate().find_map(|(l, lane)| {
            let died = self.procs[lane.proc].died;
            let dead = !self.procs[lane.proc].alive && self.now > died + bound;
            let here = self.locals[lane.local].alive && lane.mapped && lane.state != LaneState::Wedged;
            (dead && here).then(|| format!("lane {l} maps memory of process {}, which died at {died} us", lane.proc))
        })
    }
}
