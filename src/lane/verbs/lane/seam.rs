//! The seam that every lane has, for verbs: what the owner asks, and when it may sleep.

use std::{io, os::fd::BorrowedFd, time::Instant};

use kvferry_proto::{
    error::Cause,
    lane::{Attempt, FenceKind, Grant, Lane, LaneCaps, LaneEvent, LaneKind},
    plan::Read,
};

use super::{Try, VerbsLane};
use crate::lane::{
    WakingLane,
    verbs::path::{Path, What},
};

impl Lane for VerbsLane {
    fn caps(&self) -> LaneCaps {
        LaneCaps {
            kind: LaneKind::Verbs,
            max_read: u64::from(self.max_read),
            quiet_bound: self.quiet_bound,
            fence: FenceKind::Own,
        }
    }

    fn degraded(&self) -> bool {
        self.degraded || self.paths.iter().any(|p| !p.rung.is_live())
    }

    fn begin(&mut self, a: Attempt, grant: Grant) {
        if let Some(cause) = self.closing {
            self.pending.push(LaneEvent::Failed { attempt: a, cause });
            // It never has anything in flight.
            self.pending.push(LaneEvent::Quiet { attempt: a });
        } else if self.find(a).is_none() {
            let t = Try {
                attempt: a,
                nonce: grant.nonce.get(),
                slot: grant.slot,
                in_flight: 0,
                failed: false,
                stopped: None,
            };
            let i = self.tries.iter().position(Option::is_none).unwrap_or(self.tries.len());
            if i == self.tries.len() {
                self.tries.push(None);
            }
            self.tries[i] = Some(t);
            self.fences.begin(i);
            if grant.slot >= self.fence_slots {
                self.fail(i, Cause::BadOffer);
            }
        }
    }

    fn post(&mut self, a: Attempt, reads: &[Read]) -> usize {
        let Some(i) = self.open(a) else { return reads.len() };
        let idle = self.again.is_empty() && self.paths.iter().all(|p| p.in_flight() == 0);
        // Asked at every turn while the window is full: it costs little then.
        if self.paths.iter().all(|p| p.best().is_none()) {
            return 0;
        }
        self.post_again();
        if !self.again.is_empty() {
            return 0;
        }
        let mut taken = reads.len();
        for (n, r) in reads.iter().enumerate() {
            if !self.fits(r) {
                self.fail(i, Cause::BadOffer);
                break;
            }
            let w = What {
                src: r.src_offset,
                dst: r.dst_offset,
                len: r.len as u32,
                attempt: i as u32,
                chunk: r.chunk,
                src_segment: r.src_segment,
                dst_segment: r.dst_segment,
                ..What::default()
            };
            if !self.place(w) {
                taken = n;
                break;
            }
        }
        if let Some(r) = reads.first() {
            self.fences.accepted(i, r.chunk, taken as u32, taken == reads.len());
        }
        self.flush();
        if idle {
            // What was not waited for cannot be late.
            let now = Instant::now();
            self.paths.iter_mut().for_each(|p| p.rested(now));
        }
        taken
    }

    fn stop(&mut self, a: Attempt) {
        let Some(i) = self.find(a) else { return };
        if let Some(t) = &mut self.tries[i] {
            t.stopped.get_or_insert_with(Instant::now);
        }
        self.purge();
        self.settle(i);
    }

    fn kill(&mut self) {
        let now = Instant::now();
        self.close(Cause::LaneFailed, now);
        self.climb(now);
    }

    fn poll(&mut self, out: &mut Vec<LaneEvent>) {
        let now = Instant::now();
        // Whoever uses it arms it before every sleep. A lane that nobody uses is polled when its descriptor is readable only.
        if std::mem::take(&mut self.slept) || self.down.is_some() || self.tries.iter().all(Option::is_none) {
            self.wake.woken(now);
            self.paths.iter_mut().for_each(Path::woken);
        }
        out.append(&mut self.pending);
        if self.down.is_some() {
            return;
        }
        let mut looks = self.spin.looks(self.bytes());
        while !self.reap(now, out) && looks > 0 {
            looks -= 1;
        }
        // Before anything else: the wire waits for it.
        self.post_fences();
        self.climb(now);
        self.post_again();
        self.conclude_fences();
        self.nudge();
        out.append(&mut self.pending);
    }
}

impl WakingLane for VerbsLane {
    fn arm(&mut self) -> io::Result<Option<BorrowedFd<'_>>> {
        if !self.pending.is_empty() || self.must_spin() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if self.down.is_some() {
            return Ok(None);
        }
        if self.nearly_there() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let now = Instant::now();
        for path in &mut self.paths {
            path.arm(now);
        }
        // What came before the queues were armed wakes nobody.
        let mut seen = std::mem::take(&mut self.pending);
        let any = self.reap(now, &mut seen);
        self.pending = seen;
        if any || self.fences.any_back() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let until = self.paths.iter().enumerate().filter_map(|(p, path)| path.until(self.waits_for(p))).min();
        if until.is_some_and(|t| t <= now) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.wake.wake_at(until, now)?;
        self.slept = true;
        Ok(Some(self.wake.fd()))
    }
}

#[cfg(test)]
impl VerbsLane {
    /// As if nothing had been wanted of it, and nobody had looked, for so long.
    pub(crate) fn slept_for(&mut self, time: std::time::Duration) {
        let then = Instant::now().checked_sub(time).expect("the clock can say that");
        self.paths.iter_mut().for_each(|p| p.rested(then));
    }

    /// What its owner sleeps on.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.wake.fd()
    }
}
