//! The copies of staged lanes: one stream for each lane. A job reads the ring and writes local memory when it runs, in the
//! order of the tickets, and is reported as finished later.

use std::collections::VecDeque;

use kvferry_proto::{
    Attempt, Read,
    sabotage::{Bug, planted},
    staging::{Finished, StagedCopy},
};

use super::{
    Fabric, Task, note,
    state::{LaneState, Work},
};
use crate::trace::{Micros, Promise};

/// A job that is not finished.
#[derive(Debug)]
struct CopyJob {
    ticket: u64,
    copies: Vec<StagedCopy>,
    pull: u64,
    attempt: u64,
    done: bool,
}

/// The stream of a lane.
#[derive(Debug, Default)]
pub(crate) struct CopyQueue {
    jobs: VecDeque<CopyJob>,
    tickets: u64,
    finished: Finished,
    /// It runs no job until then; `None`: it is not stuck.
    stuck: Option<Micros>,
    /// When the last job runs.
    last: Micros,
    last_report: Micros,
    /// The pull that posts reads next.
    pull: u64,
    /// Reads of local memory that the lane accepted, and their pulls.
    accepted: Vec<(Attempt, Read, u64)>,
    /// The lane is wedged because of its copies.
    pub(super) overdue: bool,
}

impl Fabric {
    /// The owner offers reads of local memory to a staged lane.
    pub(crate) fn offers(&mut self, l: usize, reads: &[Read]) {
        let local = &self.locals[self.lanes[l].local];
        let first = reads.first().and_then(|r| {
            let notes = local.notes.get(usize::from(r.dst_segment))?;
            let note = notes.get((r.dst_offset / 8) as usize)?;
            local.holders.get(note.block as usize)
        });
        self.lanes[l].copies.pull = first.copied().unwrap_or(0);
    }

    /// The staged lane accepted them.
    pub(crate) fn accepted(&mut self, l: usize, a: Attempt, reads: &[Read]) {
        for r in reads {
            if let Some(pull) = self.check_post(l, a, r) {
                self.lanes[l].copies.accepted.push((a, *r, pull));
            }
        }
    }

    /// A read into the ring.
    pub(super) fn post_to_ring(&mut self, l: usize, a: Attempt, read: Read) {
        let lane = &self.lanes[l];
        let (pull, o) = (lane.copies.pull, lane.ops.len());
        let (first, n) = ((read.dst_offset / 8) as usize, (read.len / 8) as usize);
        let ring = &mut self.locals[lane.local].ring;
        let Some(places) = ring.get_mut(first..first + n).filter(|_| read.dst_segment == 0) else {
            return self.broken(Promise::Sound, format!("a read posted for {a:?} leaves the ring: {read:?}"));
        };
        places.iter_mut().for_each(|p| p.1 = (l, o));
        self.launch(l, a, pull, Work::Read(read));
    }

    pub(crate) fn submit(&mut self, l: usize, copies: &[StagedCopy]) -> Option<u64> {
        let luck = self.luck.copies.clone();
        let queue = &self.lanes[l].copies;
        if queue.finished.failed || queue.jobs.len() >= 4 || (!queue.jobs.is_empty() && self.rng.chance(100)) {
            return None;
        }
        self.copies += 1;
        let local = self.lanes[l].local;
        let first = copies.first()?;
        let note = self.locals[local].notes[usize::from(first.segment)][(first.offset / 8) as usize];
        let pull = self.locals[local].holders.get(note.block as usize).copied().unwrap_or(0);
        let (stalls, hangs) = (self.rng.chance(luck.stall), self.rng.chance(luck.hang));
        let (low, usual, high) = luck.latency;
        let mut t = self.now + self.rng.tail(low, usual, high);
        if stalls {
            t += self.rng.between(1000, 8000);
        }
        if hangs {
            let never = self.rng.chance(500);
            let until = if never { Micros::MAX } else { self.now + self.rng.between(30_000, 200_000) };
            self.lanes[l].copies.stuck.get_or_insert(until);
        }
        if let Some(until) = self.lanes[l].copies.stuck {
            self.excuse(l, pull, "a copy that does not end");
            t = t.max(until);
        } else if stalls {
            self.fault(l, pull);
        }
        let queue = &mut self.lanes[l].copies;
        t = t.max(queue.last.saturating_add(1));
        queue.last = t;
        queue.tickets += 1;
        let ticket = queue.tickets;
        if planted(Bug::CopyListReused) {
            queue.jobs.iter_mut().filter(|j| !j.done).for_each(|j| j.copies = copies.to_vec());
        }
        queue.jobs.push_back(CopyJob { ticket, copies: copies.to_vec(), pull, attempt: note.attempt, done: false });
        note!(self, "lane {l}: copy {ticket} of Attempt({}), {} reads", note.attempt, copies.len());
        if t < Micros::MAX {
            self.at(t, Task::Copy(l, ticket));
        }
        Some(ticket)
    }

    pub(crate) fn copies_finished(&self, l: usize) -> Finished {
        self.lanes[l].copies.finished
    }

    pub(super) fn copy(&mut self, l: usize, ticket: u64) {
        let local_no = self.lanes[l].local;
        if !self.locals[local_no].alive || self.lanes[l].copies.finished.failed {
            return;
        }
        let luck = self.luck.copies.clone();
        let fails = self.rng.chance(luck.fail);
        let dies = fails && self.rng.chance(luck.dead);
        let local = &mut self.locals[local_no];
        local.dead_device |= dies;
        let dead = local.dead_device;
        let Some(job) = self.lanes[l].copies.jobs.iter_mut().find(|j| j.ticket == ticket && !j.done) else { return };
        // A job that fails has written a part.
        let n = if fails || dead { self.rng.below(job.copies.len() as u64 + 1) as usize } else { job.copies.len() };
        let mut bad = None;
        for c in &job.copies[..n] {
            for i in 0..(c.len / 8) as usize {
                let word = local.ring[(c.ring_offset / 8) as usize + i].0;
                let at = (c.offset / 8) as usize + i;
                let stored = local.store(usize::from(c.segment), at, word, (job.pull, job.attempt));
                bad = stored.err().or(bad);
            }
        }
        job.done = true;
        let attempt = job.attempt;
        if let Some(bad) = bad {
            return self.broken(Promise::Quiet, format!("a copy of Attempt({attempt}) on lane {l} wrote {bad}"));
        }
        if fails || dead {
            return self.copier_fails(l);
        }
        let lag = self.rng.tail(0, 20, 400);
        let queue = &mut self.lanes[l].copies;
        let t = (self.now + lag).max(queue.last_report + 1);
        queue.last_report = t;
        self.at(t, Task::Copied(l, ticket));
    }

    pub(super) fn copied(&mut self, l: usize, ticket: u64) {
        let local = self.lanes[l].local;
        let queue = &mut self.lanes[l].copies;
        if queue.finished.failed {
            return;
        }
        queue.finished.up_to = ticket;
        while queue.jobs.front().is_some_and(|j| j.ticket <= ticket)
            && let Some(job) = queue.jobs.pop_front()
        {
            self.moved.insert((local, job.pull), self.now);
        }
        self.ready.push(local);
    }

    fn copier_fails(&mut self, l: usize) {
        let lane = &self.lanes[l];
        let dead = self.locals[lane.local].dead_device;
        let attempts: Vec<_> = lane.attempts.iter().filter(|(_, s)| !s.quiet).map(|(a, _)| *a).collect();
        let mut pulls: Vec<u64> = attempts.into_iter().map(|a| lane.pull_of(a)).collect();
        pulls.extend(lane.copies.jobs.iter().map(|j| j.pull));
        pulls.sort_unstable();
        pulls.dedup();
        note!(self, "lane {l}: its copier fails{}", if dead { ", and its device is dead" } else { "" });
        pulls.into_iter().for_each(|pull| self.fault(l, pull));
        let queue = &mut self.lanes[l].copies;
        queue.finished.failed = true;
        self.copiers_failed += 1;
        queue.jobs.clear();
        self.ready.push(self.lanes[l].local);
    }

    /// Streams that are stuck go on.
    pub(super) fn resume_copies(&mut self) {
        for l in 0..self.lanes.len() {
            if self.lanes[l].copies.stuck.take().is_none() {
                continue;
            }
            let tickets: Vec<u64> = self.lanes[l].copies.jobs.iter().filter(|j| !j.done).map(|j| j.ticket).collect();
            for (i, ticket) in tickets.into_iter().enumerate() {
                // The later task of a job finds it done.
                self.lanes[l].copies.last = self.now + i as Micros;
                self.at(self.now + i as Micros, Task::Copy(l, ticket));
            }
        }
    }

    /// A killed lane's copies get this much time.
    pub(crate) fn copies_due(&mut self, l: usize, after: Micros) -> Micros {
        let t = self.now + after;
        self.at(t, Task::Overdue(l));
        t
    }

    /// The lane gives up waiting for its copies.
    pub(crate) fn copies_overdue(&mut self, l: usize) {
        note!(self, "lane {l}: its copies do not end");
        self.lanes[l].copies.overdue = true;
        self.copies_wedged += 1;
        let mut pulls: Vec<u64> = self.lanes[l].copies.jobs.iter().map(|j| j.pull).collect();
        pulls.dedup();
        pulls.into_iter().for_each(|pull| self.excuse(l, pull, "copies that did not end"));
    }

    pub(super) fn check_dropped_copies(&mut self, l: usize) {
        let lane = &self.lanes[l];
        let busy = self.locals[lane.local].alive && lane.state != LaneState::Wedged && !lane.copies.overdue;
        if let Some(job) = lane.copies.jobs.front().filter(|_| busy) {
            let what = format!("lane {l} was dropped while a copy of Attempt({}) was running", job.attempt);
            self.broken(Promise::Quiet, what);
        }
    }

    /// The tracker gets a fence of a staged lane that held: from now on the chunk's words are good.
    pub(crate) fn staged_fence(&mut self, l: usize, a: Attempt, chunk: u32, word: u64) {
        let lane = &self.lanes[l];
        if lane.attempts.get(&a).is_none_or(|s| s.grant.nonce.get() != word) {
            return;
        }
        for (_, r, pull) in lane.copies.accepted.iter().filter(|(of, r, _)| *of == a && r.chunk == chunk) {
            self.locals[lane.local].good(r, *pull, self.now);
        }
    }
}
