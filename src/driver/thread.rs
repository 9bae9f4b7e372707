//! The rail's thread: mail in, turns, actions out, and sleep when there is nothing to do.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io,
    mem::MaybeUninit,
    panic::AssertUnwindSafe,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::event::{Timespec, epoll};

use crate::{
    block::Incarnation,
    driver::{
        mailbox::Mailbox,
        rail::{Addr, Ended, In, LaneWish, Out, PullId, Rail},
    },
    protocol::{frame::Release, session::Want},
};

/// What is sent to the rail's thread.
pub enum Mail {
    /// For the rail.
    Rail(In),
    /// Let go of an offer without a pull.
    Release(Addr, Incarnation, Release),
    /// Cancel everything, and end when all pulls have ended or this moment has come.
    Stop(Instant),
}

/// Sessions with peers, as the rail's thread needs them. No call blocks.
pub trait Peers: Send {
    /// Make a claim.
    fn claim(&mut self, peer: &Addr, want: Want);
    /// Let go.
    fn release(&mut self, peer: &Addr, expect: Incarnation, release: Release);
    /// Connect a lane.
    fn connect(&mut self, peer: &Addr, wish: LaneWish);
    /// Nothing was wanted of this peer for long. `false`: something was, just now; keep it.
    fn dropped(&mut self, peer: &Addr) -> bool;
}

/// Who hears of decided and ended pulls. Called on the rail's thread; no call blocks.
pub trait Reports: Send + Sync {
    /// The pull's sets are frozen.
    fn decided(&self, pull: PullId);
    /// The pull has ended.
    fn ended(&self, ended: Ended);
    /// The pull's blocks may be written for ever.
    fn wedged(&self, pull: PullId);
    /// The thread panicked: no pull will end any more, and whether their blocks are still written is not known.
    fn died(&self);
}

/// Starts the thread.
pub fn spawn(
    name: &str,
    rail: Rail,
    mailbox: Mailbox<Mail>,
    peers: Box<dyn Peers>,
    reports: Arc<dyn Reports>,
) -> io::Result<JoinHandle<()>> {
    let sleeper = Sleeper::new(&mailbox)?;
    let mut this = Driver { rail, mailbox, peers, reports, sleeper, stop: None, mail: VecDeque::new() };
    std::thread::Builder::new().name(name.into()).spawn(move || {
        // Everything in it is dropped after a panic, and nothing of it used: lanes that are not quiet keep their memory.
        if std::panic::catch_unwind(AssertUnwindSafe(|| this.run())).is_err() {
            this.reports.died();
        }
    })
}

struct Driver {
    rail: Rail,
    mailbox: Mailbox<Mail>,
    peers: Box<dyn Peers>,
    reports: Arc<dyn Reports>,
    sleeper: Sleeper,
    stop: Option<Instant>,
    mail: VecDeque<Mail>,
}

impl Driver {
    fn run(&mut self) {
        loop {
            self.read_mail();
            let now = Instant::now();
            let more = self.rail.turn(now);
            let acted = self.act();
            if self.stop.is_some_and(|t| self.rail.pulls() == 0 || t <= now) {
                return;
            }
            if more || acted {
                continue;
            }
            let timeout = [self.rail.next_timeout(), self.stop].into_iter().flatten().min();
            if let Err(error) = self.sleeper.sleep(&mut self.rail, &self.mailbox, timeout) {
                // Nothing to be done about it but to go on slowly: deadlines still hold.
                tracing::error!(%error, "epoll failed");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    fn read_mail(&mut self) {
        self.mailbox.take(&mut self.mail);
        while let Some(mail) = self.mail.pop_front() {
            let now = Instant::now();
            match mail {
                Mail::Rail(In::Dropped(peer)) => {
                    if self.peers.dropped(&peer) {
                        self.rail.handle(now, In::Dropped(peer));
                    }
                }
                Mail::Rail(event) => self.rail.handle(now, event),
                Mail::Release(peer, expect, release) => self.peers.release(&peer, expect, release),
                Mail::Stop(until) => {
                    self.stop = Some(until);
                    self.rail.handle(now, In::Shutdown);
                }
            }
            self.act();
        }
    }

    fn act(&mut self) -> bool {
        let mut acted = false;
        while let Some(out) = self.rail.poll() {
            acted = true;
            match out {
                Out::Claim(peer, want) => self.peers.claim(&peer, want),
                Out::Release(peer, expect, release) => self.peers.release(&peer, expect, release),
                Out::Connect(peer, wish) => self.peers.connect(&peer, wish),
                Out::Decided(pull) => self.reports.decided(pull),
                Out::Ended(ended) => self.reports.ended(*ended),
                Out::Wedged(pull) => self.reports.wedged(pull),
            }
        }
        acted
    }
}

/// Where the thread sleeps: on its mail, and on every lane that can wake it.
struct Sleeper {
    epoll: std::os::fd::OwnedFd,
    /// Lanes in the epoll set. A closed descriptor leaves the set by itself.
    known: HashSet<u64>,
    lanes: Vec<u64>,
    failures: HashMap<u64, u32>,
}

const MAIL: u64 = 0;

impl Sleeper {
    fn new(mailbox: &Mailbox<Mail>) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, mailbox.fd(), epoll::EventData::new_u64(MAIL), epoll::EventFlags::IN)?;
        Ok(Self { epoll, known: HashSet::new(), lanes: Vec::new(), failures: HashMap::new() })
    }

    fn sleep(&mut self, rail: &mut Rail, mailbox: &Mailbox<Mail>, until: Option<Instant>) -> io::Result<()> {
        if !self.arm(rail) || !mailbox.about_to_sleep() {
            return Ok(());
        }
        let timeout = until.map(|t| {
            let left = t.saturating_duration_since(Instant::now());
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
        });
        let mut space = [const { MaybeUninit::<epoll::Event>::uninit() }; 64];
        let woken = epoll::wait(&self.epoll, &mut space, timeout.as_ref());
        mailbox.awake();
        match woken {
            Ok((events, _)) => {
                for lane in events.iter().map(|e| e.data.u64()).filter(|n| *n != MAIL) {
                    rail.stir(lane);
                }
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }

    /// Arms every lane that has work, and those that are new. `false` when one can go on at once.
    fn arm(&mut self, rail: &mut Rail) -> bool {
        self.lanes.clear();
        self.lanes.extend(rail.busy_lanes());
        if !self.arm_each(rail) {
            return false;
        }
        self.lanes.clear();
        self.lanes.extend(rail.idle_lanes().filter(|n| !self.known.contains(n)));
        let sleep = self.arm_each(rail);
        if self.known.len() > 64 + 2 * rail.lanes().count() {
            let alive: HashSet<_> = rail.busy_lanes().chain(rail.idle_lanes()).collect();
            self.known.retain(|n| alive.contains(n));
            self.failures.retain(|n, _| alive.contains(n));
        }
        sleep
    }

    /// Arms the lanes in `self.lanes`; `false` when one can go on at once, and then not all are armed.
    fn arm_each(&mut self, rail: &mut Rail) -> bool {
        let mut sleep = true;
        for &n in &self.lanes {
            let Some(lane) = rail.lane_mut(n) else { continue };
            match lane.arm() {
                Ok(Some(fd)) => {
                    if !self.known.contains(&n) {
                        match epoll::add(&self.epoll, fd, epoll::EventData::new_u64(n), epoll::EventFlags::IN) {
                            Ok(()) | Err(rustix::io::Errno::EXIST) => {
                                self.known.insert(n);
                            }
                            Err(error) => {
                                tracing::error!(lane = n, %error, "lane cannot be waited for: closing it");
                                lane.kill();
                                sleep = false;
                            }
                        }
                    }
                }
                Ok(None) => {}
                // To arm the others would be for nothing.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    rail.stir(n);
                    return false;
                }
                Err(error) => {
                    let seen = self.failures.entry(n).or_default();
                    *seen += 1;
                    if *seen == 1 {
                        tracing::error!(lane = n, %error, "lane cannot be armed: closing it");
                        lane.kill();
                        rail.stir(n);
                        sleep = false;
                    }
                }
            }
        }
        sleep
    }
}
