//! Breaks any lane on purpose: for disconnect tests, and to show the effect of a bad day on an engine.
//!
//! The wrapped lane moves real bytes; only its events to the owner are changed or delayed. Faults count bytes from the
//! lane's connection on, over all attempts.

use std::{
    collections::{HashMap, VecDeque},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use kvferry_proto::{Attempt, Cause, FenceSlot, Grant, Lane, LaneCaps, LaneEvent, Read};
use rustix::{
    event::epoll,
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime},
};

use crate::{faults::Faults, lane::WakingLane};

/// A lane with faults.
pub(crate) struct Faulty {
    inner: Box<dyn WakingLane>,
    faults: Faults,
    /// The inner lane's descriptor and the timer, in one.
    epoll: OwnedFd,
    timer: OwnedFd,
    watched: bool,
    /// Bytes accepted.
    accepted: u64,
    /// When the throttle accepts the next bytes.
    free_at: Instant,
    /// Whether the throttle refused reads since the owner last slept.
    throttled: bool,
    nonces: HashMap<Attempt, u64>,
    /// Quiet events that are held back until the lane is killed.
    withheld: VecDeque<LaneEvent>,
    down: bool,
    killed: bool,
    wedged: bool,
    events: Vec<LaneEvent>,
}

impl Faulty {
    /// Adds `faults` to `inner`.
    pub(crate) fn new(inner: Box<dyn WakingLane>, faults: Faults) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &timer, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        Ok(Self {
            inner,
            faults,
            epoll,
            timer,
            watched: false,
            accepted: 0,
            free_at: Instant::now(),
            throttled: false,
            nonces: HashMap::new(),
            withheld: VecDeque::new(),
            down: false,
            killed: false,
            wedged: false,
            events: Vec::new(),
        })
    }

    fn past(&self, at: Option<u64>) -> bool {
        at.is_some_and(|at| self.accepted >= at)
    }

    /// Passes an event of the inner lane on to the owner, as the faults change it.
    fn pass(&mut self, event: LaneEvent, out: &mut Vec<LaneEvent>) {
        match event {
            LaneEvent::Quiet { attempt } if self.faults.no_quiet && !self.killed => {
                self.withheld.push_back(LaneEvent::Quiet { attempt });
            }
            LaneEvent::Quiet { attempt } => {
                self.nonces.remove(&attempt);
                if !self.faults.wedge {
                    out.push(LaneEvent::Quiet { attempt });
                }
            }
            LaneEvent::Done { .. } | LaneEvent::Fence { .. } if self.past(self.faults.silent_at) => {}
            LaneEvent::Fence { attempt, chunk, .. } if self.past(self.faults.stale_at) => {
                let word = self.nonces.get(&attempt).map_or(0, |n| !n);
                out.push(LaneEvent::Fence { attempt, chunk, word });
            }
            LaneEvent::Down { .. } if self.faults.wedge => {}
            other => out.push(other),
        }
    }
}

impl Lane for Faulty {
    fn caps(&self) -> LaneCaps {
        // Time for the teardown stages, so that a lane that does not become quiet is killed within a short deadline.
        let inner = self.inner.caps();
        LaneCaps { quiet_bound: inner.quiet_bound.max(Duration::from_millis(50)), ..inner }
    }

    fn degraded(&self) -> bool {
        self.inner.degraded()
    }

    fn begin(&mut self, a: Attempt, grant: Grant) {
        self.nonces.insert(a, grant.nonce.get());
        self.inner.begin(a, grant);
    }

    fn post(&mut self, a: Attempt, reads: &[Read]) -> usize {
        if self.down || self.past(self.faults.down_at) || self.past(self.faults.silent_at) {
            return 0;
        }
        assert!(!self.past(self.faults.panic_at), "the injected fault panic@");
        let now = Instant::now();
        if self.free_at > now {
            self.throttled = true;
            return 0;
        }
        let taken = self.inner.post(a, reads);
        let bytes: u64 = reads[..taken].iter().map(|r| r.len).sum();
        self.accepted += bytes;
        if let Some(rate) = self.faults.throttle {
            self.free_at = now + Duration::from_secs_f64(bytes as f64 / rate as f64);
        }
        taken
    }

    fn post_fence(&mut self, a: Attempt, f: FenceSlot) -> bool {
        self.inner.post_fence(a, f)
    }

    fn stop(&mut self, a: Attempt) {
        self.inner.stop(a);
    }

    fn kill(&mut self) {
        self.killed = true;
        self.inner.kill();
    }

    fn poll(&mut self, out: &mut Vec<LaneEvent>) {
        let mut events = std::mem::take(&mut self.events);
        self.inner.poll(&mut events);
        for event in events.drain(..) {
            self.pass(event, out);
        }
        self.events = events;
        if self.killed {
            if self.faults.wedge {
                if !std::mem::replace(&mut self.wedged, true) {
                    out.push(LaneEvent::Wedged);
                }
            } else {
                for event in std::mem::take(&mut self.withheld) {
                    self.pass(event, out);
                }
            }
        }
        if self.past(self.faults.down_at) && !self.down {
            self.down = true;
            for &attempt in self.nonces.keys() {
                out.push(LaneEvent::Failed { attempt, cause: Cause::LaneFailed });
            }
            out.push(LaneEvent::Down { cause: Cause::LaneFailed });
        }
        let mut expired = [0; 8];
        // Fails while the timer has not run out.
        let _ = rustix::io::read(&self.timer, &mut expired);
    }
}

impl WakingLane for Faulty {
    fn arm(&mut self) -> io::Result<Option<BorrowedFd<'_>>> {
        if let Some(fd) = self.inner.arm()?
            && !self.watched
        {
            epoll::add(&self.epoll, fd, epoll::EventData::new_u64(1), epoll::EventFlags::IN)?;
            self.watched = true;
        }
        if std::mem::take(&mut self.throttled) {
            let left = self.free_at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                // Reads are accepted again by now, so no timer is needed.
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let value = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
            timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        }
        Ok(Some(self.epoll.as_fd()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvferry_proto::{FenceKind, LaneKind};

    /// Accepts every read and reports no event.
    struct Still;

    impl Lane for Still {
        fn caps(&self) -> LaneCaps {
            let (kind, fence) = (LaneKind::Tcp, FenceKind::Trailer);
            LaneCaps { kind, max_read: 1 << 20, quiet_bound: Duration::ZERO, fence }
        }
        fn begin(&mut self, _: Attempt, _: Grant) {}
        fn post(&mut self, _: Attempt, reads: &[Read]) -> usize {
            reads.len()
        }
        fn stop(&mut self, _: Attempt) {}
        fn kill(&mut self) {}
        fn poll(&mut self, _: &mut Vec<LaneEvent>) {}
    }

    impl WakingLane for Still {
        fn arm(&mut self) -> io::Result<Option<BorrowedFd<'_>>> {
            Ok(None)
        }
    }

    #[test]
    fn a_throttle_that_opens_before_its_owner_sleeps_keeps_the_owner_awake() {
        let mut lane = Faulty::new(Box::new(Still), "throttle=1M".parse().unwrap()).unwrap();
        let read = Read::between(0, (0, 0), (0, 0), 64);
        lane.free_at = Instant::now() + Duration::from_secs(3600);
        assert_eq!(lane.post(Attempt(1), &[read]), 0);
        assert!(lane.arm().is_ok(), "it may sleep: the timer wakes it");
        assert_eq!(lane.post(Attempt(1), &[read]), 0);
        lane.free_at = Instant::now();
        assert_eq!(lane.arm().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(lane.post(Attempt(1), &[read]), 1);
    }
}
