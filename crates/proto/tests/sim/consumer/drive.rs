//! The driver of a decode rank: carries events and actions between the puller, the sessions and the network, and wakes the
//! machines in time, or a little late.

use std::time::Duration;

use kvferry_proto::{
    Cause, FenceKind, Lane, LaneCaps, LaneKind, Machine,
    puller::{self, LaneWish},
    session::{self, PeerSession},
};

use super::{Gpu, Session};
use crate::{
    fabric::Path,
    lane::{SimLane, StagedLane},
    trace::{Micros, Promise},
    world::{Event, World, say},
};

impl Gpu {
    fn path(&self, kind: LaneKind) -> Path {
        match kind {
            LaneKind::Verbs if self.direct => Path::Direct,
            LaneKind::Local if self.mapped => Path::Mapped,
            _ => Path::Staged,
        }
    }
}

impl World {
    pub(super) fn puller(&mut self, c: usize, event: puller::In<Box<dyn Lane>>) {
        let now = self.clock();
        if let Some(process) = &mut self.consumers[c].process {
            process.puller.handle(now, event);
            self.drain_puller(c);
            let soon = self.now + self.rng.tail(0, 10, 60);
            self.wake_by(c, soon);
        }
    }

    pub(super) fn drain_puller(&mut self, c: usize) {
        while let Some(out) = self.consumers[c].process.as_mut().and_then(|p| p.puller.poll()) {
            match out {
                puller::Out::Claim(..) | puller::Out::Connect(..) => self.queue_for_sessions(c, out),
                puller::Out::Release(ref addr, expect, ref release) => {
                    self.release_issued(c, addr, expect, release);
                    self.queue_for_sessions(c, out);
                }
                puller::Out::Decided(pull) => self.check_decided(c, pull.0),
                puller::Out::Wedged(pull) => {
                    say!(self, "consumer {c}: pull {} wedged", pull.0);
                    if let Some(p) = self.consumers[c].process.as_mut().and_then(|p| p.pulls.get_mut(&pull.0)) {
                        p.wedged = true;
                    }
                }
                puller::Out::Ended(ended) => self.ended(c, *ended),
            }
        }
        self.plan_wake(c);
    }

    fn queue_for_sessions(&mut self, c: usize, out: puller::Out) {
        if let Some(p) = &mut self.consumers[c].process {
            p.drive_sessions.push_back(out);
        }
        self.schedule_sessions(c);
    }

    pub(super) fn schedule_sessions(&mut self, c: usize) {
        let (e, lag) = (self.consumers[c].life, self.rng.tail(0, 20, 500));
        let t = self.now + lag;
        let Some(p) = &mut self.consumers[c].process else { return };
        if !std::mem::replace(&mut p.sessions_due, true) {
            self.at(t, Event::ToSessions { c, e });
        }
    }

    fn queue_for_puller(&mut self, c: usize, event: puller::In<Box<dyn Lane>>) {
        let (e, lag) = (self.consumers[c].life, self.rng.tail(0, 20, 500));
        let t = self.now + lag;
        let Some(p) = &mut self.consumers[c].process else { return };
        p.drive_puller.push_back(event);
        if !std::mem::replace(&mut p.puller_due, true) {
            self.at(t, Event::ToPuller { c, e });
        }
    }

    pub(crate) fn drive_puller(&mut self, c: usize, e: u64) {
        if self.consumers[c].life != e {
            return;
        }
        if let Some(p) = &mut self.consumers[c].process {
            p.puller_due = false;
        }
        while let Some(event) = self.consumers[c].process.as_mut().and_then(|p| p.drive_puller.pop_front()) {
            self.puller(c, event);
        }
    }

    pub(crate) fn drive_sessions(&mut self, c: usize, e: u64) {
        if self.consumers[c].life != e {
            return;
        }
        if let Some(p) = &mut self.consumers[c].process {
            p.sessions_due = false;
        }
        while let Some(out) = self.consumers[c].process.as_mut().and_then(|p| p.drive_sessions.pop_front()) {
            match out {
                puller::Out::Claim(addr, want) => {
                    let Some(p) = self.producer_at(&addr) else { continue };
                    self.meet(c, p);
                    self.session(c, p, session::In::Claim(want));
                }
                puller::Out::Release(addr, expect, release) => {
                    let Some(p) = self.producer_at(&addr) else { continue };
                    self.meet(c, p);
                    self.session(c, p, session::In::Release { expect, release });
                }
                puller::Out::Connect(addr, wish) => {
                    let Some(p) = self.producer_at(&addr) else { continue };
                    let t = self.now + self.delay();
                    self.at(t, Event::LaneUp { c, e, p, wish });
                }
                _ => {}
            }
        }
    }

    /// A session with an address, new or old.
    fn meet(&mut self, c: usize, p: usize) {
        let (now, entropy, config) = (self.clock(), self.entropy(), self.weather.session.clone());
        if let Some(process) = &mut self.consumers[c].process {
            process.sessions.entry(p).or_insert_with(|| Session {
                machine: PeerSession::new(now, process.me.clone(), config, 1 << 20, entropy),
                conn: None,
                dialing: None,
                welcome: None,
            });
        }
    }

    pub(crate) fn session(&mut self, c: usize, p: usize, event: session::In) {
        let now = self.clock();
        let Some(s) = self.consumers[c].session(p) else { return };
        s.machine.handle(now, event);
        self.drain_session(c, p);
        self.plan_wake(c);
    }

    fn drain_session(&mut self, c: usize, p: usize) {
        while let Some(out) = self.consumers[c].session(p).and_then(|s| s.machine.poll()) {
            match out {
                session::Out::Dial => {
                    say!(self, "consumer {c}: dials {}", self.producers[p].addr);
                    self.dial(c, p);
                }
                session::Out::Open(stream) => self.open(c, p, stream),
                session::Out::Send(frame) => {
                    if let Some(conn) = self.consumers[c].session(p).and_then(|s| s.conn) {
                        self.send_to_server(conn, frame);
                    }
                }
                session::Out::HangUp => self.hang_up(c, p),
                session::Out::ReleaseAlone(expect, release) => {
                    let t = self.now + self.delay();
                    self.at(t, Event::ReleaseAlone { p, expect, offer: release.offer, token: release.token });
                }
                session::Out::Peer(peer) => {
                    let Some((_, welcome)) = self.consumers[c].session(p).and_then(|s| s.welcome.clone()) else {
                        self.broken(Promise::Sound, format!("consumer {c} knows {peer:?}, which never answered"));
                        continue;
                    };
                    let addr = self.addr(p);
                    self.queue_for_puller(c, puller::In::Peer(addr, welcome));
                }
                session::Out::Grown { claim, growth } => self.queue_for_puller(c, puller::In::Grown(claim, growth)),
                session::Out::Granted { claim, grant, contents } => {
                    self.queue_for_puller(c, puller::In::Granted(claim, grant, contents));
                }
                session::Out::Lost { claim, cause } => {
                    say!(self, "consumer {c}: {claim:?} is lost: {cause}");
                    self.queue_for_puller(c, puller::In::Lost(claim, cause));
                }
                session::Out::Health(health) => {
                    say!(self, "consumer {c}: {} is {health:?}", self.producers[p].addr);
                }
                session::Out::Silent(silent) => {
                    let addr = self.addr(p);
                    self.queue_for_puller(c, puller::In::Silent(addr, silent));
                }
                session::Out::Expired => {
                    say!(self, "consumer {c}: drops its session with {}", self.producers[p].addr);
                    self.check_expired(c, p);
                    let addr = self.addr(p);
                    if let Some(process) = &mut self.consumers[c].process {
                        process.sessions.remove(&p);
                    }
                    self.queue_for_puller(c, puller::In::Dropped(addr));
                }
            }
        }
    }

    /// The answer to a lane request.
    pub(crate) fn lane_up(&mut self, c: usize, e: u64, p: usize, wish: &LaneWish) {
        if self.consumers[c].life != e {
            return;
        }
        let no_lane = self.weather.lanes.no_lane;
        let addr = self.addr(p);
        let there = self.producers[p].proc.filter(|&q| !self.procs[q].stopped);
        let mut lane: Result<Box<dyn Lane>, Cause> = Err(match there {
            None => *self.rng.pick(&[Cause::Unreachable, Cause::LaneFailed, Cause::PeerDown]),
            Some(_) => Cause::LaneFailed,
        });
        let mut incarnation = wish.expect;
        let local = self.consumers[c].process.as_ref().map_or(0, |p| p.local);
        if let Some(q) = there {
            // The process that listens now answers.
            incarnation = self.procs[q].id.incarnation;
            for &kind in &wish.kinds {
                if self.rng.chance(no_lane) {
                    continue;
                }
                let (low, high) = self.weather.quiet_bound;
                let caps = LaneCaps {
                    kind,
                    max_read: 8 * self.rng.between(8, 100),
                    quiet_bound: Duration::from_micros(self.rng.between(low, high)),
                    fence: match kind {
                        LaneKind::Tcp => FenceKind::Trailer,
                        LaneKind::Verbs => FenceKind::Own,
                        _ => FenceKind::Posted,
                    },
                };
                let gpu = self.consumers[c].process.as_ref().and_then(|p| p.gpu.as_ref());
                let (path, ring) = gpu.map_or((Path::Host, None), |gpu| (gpu.path(kind), Some(gpu.ring.clone())));
                let new = SimLane::connect(&self.fabric, local, q, caps, self.rng.chance(300), path);
                say!(self, "consumer {c}: lane {} is {kind} to process {q}, {path:?}", new.number());
                lane = Ok(match ring.filter(|_| path == Path::Staged) {
                    Some(ring) => {
                        let bound = Duration::from_micros(self.weather.copy_bound);
                        Box::new(StagedLane::new(new, local, ring, bound))
                    }
                    None => Box::new(new),
                });
                break;
            }
        }
        if lane.is_err() {
            let process = self.consumers[c].process.as_ref();
            let mut f = self.fabric.get();
            for (id, pull) in process.into_iter().flat_map(|p| &p.pulls) {
                if pull.producers.contains(&p) {
                    *f.faults.entry((local, *id)).or_insert(0) += 1;
                }
            }
        }
        self.queue_for_puller(c, puller::In::Lane { peer: addr, incarnation, need: wish.need, lane });
    }

    pub(crate) fn lanes_ready(&mut self, local: usize) {
        let at = self.consumers.iter().position(|c| c.process.as_ref().is_some_and(|p| p.local == local));
        if let Some(c) = at {
            // As the driver does when an idle lane's descriptor is readable.
            if let Some(p) = &mut self.consumers[c].process {
                let idle: Vec<_> = p.puller.idle_lanes().collect();
                idle.into_iter().for_each(|n| p.puller.mark_ready(n));
            }
            let soon = self.now + self.rng.tail(0, 10, 80);
            self.wake_by(c, soon);
        }
    }

    fn wake_by(&mut self, c: usize, t: Micros) {
        let e = self.consumers[c].life;
        let Some(p) = &mut self.consumers[c].process else { return };
        if p.wake_at.is_none_or(|w| t < w) {
            p.wake_at = Some(t);
            self.at(t, Event::WakeConsumer { c, e });
        }
    }

    /// Wakes a consumer in time for its machines, or a little late.
    fn plan_wake(&mut self, c: usize) {
        let Some(p) = &self.consumers[c].process else { return };
        let sessions = p.sessions.values().filter_map(|s| s.machine.next_timeout());
        if let Some(next) = sessions.chain(p.puller.next_timeout()).min() {
            let t = self.micros(next).max(self.now + 1) + self.rng.tail(0, 20, 300);
            self.wake_by(c, t);
        }
    }

    pub(crate) fn wake_consumer(&mut self, c: usize, e: u64) {
        if self.consumers[c].life != e {
            return;
        }
        let now = self.clock();
        let Some(p) = &mut self.consumers[c].process else { return };
        if p.wake_at.is_some_and(|t| t <= self.now) {
            p.wake_at = None;
        }
        let mut turns = 0;
        while p.puller.turn(now) && turns < 4 {
            turns += 1;
        }
        if turns == 4 {
            let t = self.now + 1;
            self.wake_by(c, t);
        }
        self.drain_puller(c);
        let all: Vec<usize> =
            self.consumers[c].process.as_ref().map_or(Vec::new(), |p| p.sessions.keys().copied().collect());
        for p in all {
            if let Some(s) = self.consumers[c].session(p) {
                s.machine.tick(now);
                if let Some(t) = s.machine.next_timeout().filter(|t| *t <= now) {
                    let ago = now.saturating_duration_since(t);
                    self.broken(
                        Promise::Sound,
                        format!("consumer {c}'s session with {p} wants a tick {ago:?} ago, after a tick"),
                    );
                }
            }
            self.drain_session(c, p);
        }
        self.check_deadlines(c);
        if let Some(p) = &mut self.consumers[c].process {
            let past = p.puller.next_timeout().is_some_and(|t| t <= now);
            p.spins = if past { p.spins + 1 } else { 0 };
            if p.spins > 1000 {
                self.broken(Promise::Sound, format!("consumer {c}'s puller wants a turn in the past, again and again"));
            }
        }
        self.plan_wake(c);
    }
}
