//! The verbs lane's side of the interface of all lanes: requests of the owner, and its sleep.

use std::{io, os::fd::BorrowedFd, time::Instant};

use kvferry_proto::{Attempt, Cause, FenceKind, Grant, Lane, LaneCaps, LaneEvent, LaneKind, Read};

use super::{AttemptState, VerbsLane};
use crate::lane::{
    WakingLane,
    verbs::path::{Path, Work},
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
        self.degraded || self.paths.iter().any(|p| !p.stage.is_live())
    }

    fn begin(&mut self, a: Attempt, grant: Grant) {
        if let Some(cause) = self.closing {
            self.pending.push(LaneEvent::Failed { attempt: a, cause });
            // It will never have anything in flight.
            self.pending.push(LaneEvent::Quiet { attempt: a });
        } else if self.find(a).is_none() {
            let t = AttemptState {
                attempt: a,
                nonce: grant.nonce.get(),
                slot: grant.slot,
                in_flight: 0,
                failed: false,
                stopped: None,
            };
            let i = self.attempts.iter().position(Option::is_none).unwrap_or(self.attempts.len());
            if i == self.attempts.len() {
                self.attempts.push(None);
            }
            self.attempts[i] = Some(t);
            self.fences.begin(i);
            if grant.slot >= self.fence_slots {
                self.fail(i, Cause::BadOffer);
            }
        }
    }

    fn post(&mut self, a: Attempt, reads: &[Read]) -> usize {
        let Some(i) = self.open(a) else { return reads.len() };
        // Asked in every turn while the window is full: it must be cheap then.
        if self.paths.iter().all(|p| p.best().is_none()) {
            return 0;
        }
        self.post_lost();
        if !self.unposted.is_empty() {
            return 0;
        }
        let mut taken = reads.len();
        for (n, r) in reads.iter().enumerate() {
            if !self.fits(r) {
                self.fail(i, Cause::BadOffer);
                break;
            }
            let w = Work {
                src: r.src_offset,
                dst: r.dst_offset,
                len: r.len as u32,
                attempt: i as u32,
                chunk: r.chunk,
                src_segment: r.src_segment,
                dst_segment: r.dst_segment,
                fence: false,
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
        taken
    }

    fn stop(&mut self, a: Attempt) {
        let Some(i) = self.find(a) else { return };
        if let Some(t) = &mut self.attempts[i] {
            t.stopped.get_or_insert_with(Instant::now);
        }
        self.purge();
        self.settle(i);
    }

    fn kill(&mut self) {
        let now = Instant::now();
        self.close(Cause::LaneFailed, now);
        self.tend_rails(now);
    }

    fn poll(&mut self, out: &mut Vec<LaneEvent>) {
        let now = Instant::now();
        // An owner that uses the lane arms it before every sleep. A lane without attempts is polled only when its descriptor is
        // readable.
        if std::mem::take(&mut self.slept) || self.down.is_some() || self.attempts.iter().all(Option::is_none) {
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
        // First, since the wire is idle until then.
        self.post_fences();
        self.tend_rails(now);
        self.post_lost();
        self.conclude_fences();
        self.advance_flushes(now);
        out.append(&mut self.pending);
    }
}

impl WakingLane for VerbsLane {
    fn arm(&mut self) -> io::Result<Option<BorrowedFd<'_>>> {
        if !self.pending.is_empty() || self.must_poll() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if self.down.is_some() {
            return Ok(None);
        }
        if self.spin.goes_on(self.bytes(), Instant::now) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let now = Instant::now();
        for path in &mut self.paths {
            path.arm(now);
        }
        // Completions from before the queues were armed wake no one.
        let mut seen = std::mem::take(&mut self.pending);
        let any = self.reap(now, &mut seen);
        self.pending = seen;
        if any || self.fences.any_complete() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if self.flushes.as_ref().is_some_and(|f| !f.may_sleep()) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let until = self.paths.iter().filter_map(Path::until).min();
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
    /// The descriptor that its owner sleeps on.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.wake.fd()
    }
}
