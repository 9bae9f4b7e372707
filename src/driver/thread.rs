//! The data thread: it runs a consumer's [`Puller`], gives it mail and a clock, carries out its actions, and sleeps when
//! there is nothing to do.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io,
    mem::MaybeUninit,
    panic::AssertUnwindSafe,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use kvferry_proto::{
    Incarnation, Outcome, Release,
    puller::{Addr, Ended, In, LaneWish, Out, PullId, Puller},
    session::Want,
};
use rustix::event::{Timespec, epoll};

use crate::{lane::WakingLane, mailbox::Mailbox};

/// The puller with the lanes of this crate.
pub(crate) type LanePuller = Puller<Box<dyn WakingLane>>;

/// Mail to the data thread.
pub(crate) enum Mail {
    /// An event for the puller.
    Puller(In<Box<dyn WakingLane>>),
    /// Cancel everything, and end when all pulls have ended or this moment has come.
    Stop(Instant),
}

/// Sessions with peers, as the data thread uses them. No call blocks.
pub(crate) trait Peers: Send {
    /// Make a claim.
    fn claim(&mut self, peer: &Addr, want: Want);
    /// Release a claim or an offer.
    fn release(&mut self, peer: &Addr, expect: Incarnation, release: Release);
    /// Connect a lane.
    fn connect(&mut self, peer: &Addr, wish: LaneWish);
    /// This peer was unused for a long time. `false`: it has just been used again, and is kept.
    fn dropped(&mut self, peer: &Addr) -> bool;
}

/// Receives the events of pulls, on the data thread. No call blocks.
pub(crate) trait Reports: Send + Sync {
    /// The pull's sets are frozen, and it has not ended: its lanes are not quiet yet.
    fn decided(&self, pull: PullId, outcome: Outcome);
    /// The pull has ended.
    fn ended(&self, ended: Ended);
    /// The pull's lane wedged: its blocks may be written at any time.
    fn wedged(&self, pull: PullId);
    /// The thread panicked: no pull will end any more, and their blocks may still be written.
    fn died(&self);
    /// The thread was told to stop, and has: no pull will end any more.
    fn stopped(&self);
}

/// How long mail is handled at a time. Events are small, but a peer may send many, and those that list a million blocks take
/// a millisecond each.
const READING: Duration = Duration::from_millis(1);

/// Starts the data thread.
pub(crate) fn spawn(
    puller: LanePuller,
    mailbox: Mailbox<Mail>,
    peers: Box<dyn Peers>,
    reports: Arc<dyn Reports>,
) -> io::Result<JoinHandle<()>> {
    let sleeper = Sleeper::new(&mailbox)?;
    let mut this = Driver { puller, mailbox, peers, reports, sleeper, stop: None, mail: VecDeque::new() };
    std::thread::Builder::new().name("kvferry-data".into()).spawn(move || {
        // After a panic the driver is only dropped, never used: lanes that are not quiet keep their memory.
        match std::panic::catch_unwind(AssertUnwindSafe(|| this.run())) {
            Ok(()) => this.reports.stopped(),
            Err(_) => this.reports.died(),
        }
        // Nobody else reads it: a request for a hold ends it.
        this.mailbox.take(&mut this.mail);
        this.mail.clear();
    })
}

struct Driver {
    puller: LanePuller,
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
            let unread = self.read_mail();
            let now = Instant::now();
            let more = self.puller.turn(now);
            let acted = self.act();
            if self.stop.is_some_and(|t| self.puller.pulls() == 0 || t <= now) {
                return;
            }
            if more || acted || unread {
                continue;
            }
            let timeout = [self.puller.next_timeout(), self.stop].into_iter().flatten().min();
            if let Err(error) = self.sleeper.sleep(&mut self.puller, &self.mailbox, timeout) {
                // Go on slowly: deadlines still hold.
                tracing::error!(%error, "epoll failed");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// Handles mail for `READING` at most, since lanes and deadlines wait meanwhile. Returns whether there is more.
    fn read_mail(&mut self) -> bool {
        self.mailbox.take(&mut self.mail);
        let began = Instant::now();
        let mut now = began;
        while now.saturating_duration_since(began) < READING
            && let Some(mail) = self.mail.pop_front()
        {
            match mail {
                Mail::Puller(In::Dropped(peer)) => {
                    if self.peers.dropped(&peer) {
                        self.puller.handle(now, In::Dropped(peer));
                    }
                }
                Mail::Puller(event) => self.puller.handle(now, event),
                Mail::Stop(until) => {
                    self.stop = Some(until);
                    self.puller.handle(now, In::Shutdown);
                }
            }
            self.act();
            now = Instant::now();
        }
        !self.mail.is_empty()
    }

    fn act(&mut self) -> bool {
        let mut acted = false;
        while let Some(out) = self.puller.poll() {
            acted = true;
            match out {
                Out::Claim(peer, want) => self.peers.claim(&peer, want),
                Out::Release(peer, expect, release) => self.peers.release(&peer, expect, release),
                Out::Connect(peer, wish) => self.peers.connect(&peer, wish),
                Out::Decided(pull) => {
                    // Without an outcome it has ended in the same turn, and `Ended` follows.
                    if let Some(outcome) = self.puller.outcome(pull) {
                        self.reports.decided(pull, outcome.clone());
                    }
                }
                Out::Ended(ended) => self.reports.ended(*ended),
                Out::Wedged(pull) => self.reports.wedged(pull),
            }
        }
        acted
    }
}

/// Sleeps until mail arrives, a lane has something to do, or a time has come.
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

    fn sleep(&mut self, puller: &mut LanePuller, mailbox: &Mailbox<Mail>, until: Option<Instant>) -> io::Result<()> {
        if !self.arm(puller) || !mailbox.about_to_sleep() {
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
                    puller.mark_ready(lane);
                }
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }

    /// Arms every lane that has work, and every new lane. `false` when one can go on at once.
    fn arm(&mut self, puller: &mut LanePuller) -> bool {
        self.lanes.clear();
        self.lanes.extend(puller.busy_lanes());
        if !self.arm_each(puller) {
            return false;
        }
        self.lanes.clear();
        self.lanes.extend(puller.idle_lanes().filter(|n| !self.known.contains(n)));
        let sleep = self.arm_each(puller);
        if self.known.len() > 64 + 2 * puller.lanes().count() {
            let alive: HashSet<_> = puller.busy_lanes().chain(puller.idle_lanes()).collect();
            self.known.retain(|n| alive.contains(n));
            self.failures.retain(|n, _| alive.contains(n));
        }
        sleep
    }

    /// Arms the lanes in `self.lanes`; `false` when one can go on at once, and then not all are armed.
    fn arm_each(&mut self, puller: &mut LanePuller) -> bool {
        let mut sleep = true;
        for &n in &self.lanes {
            let Some(lane) = puller.lane_mut(n) else { continue };
            match lane.arm() {
                Ok(Some(fd)) => {
                    if !self.known.contains(&n) {
                        match epoll::add(&self.epoll, fd, epoll::EventData::new_u64(n), epoll::EventFlags::IN) {
                            Ok(()) | Err(rustix::io::Errno::EXIST) => {
                                self.known.insert(n);
                            }
                            Err(error) => {
                                tracing::error!(lane = n, %error, "cannot wait for a lane: closing it");
                                lane.kill();
                                sleep = false;
                            }
                        }
                    }
                }
                Ok(None) => {}
                // No sleep will follow, so the other lanes need not be armed.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    puller.mark_ready(n);
                    return false;
                }
                Err(error) => {
                    let seen = self.failures.entry(n).or_default();
                    *seen += 1;
                    if *seen == 1 {
                        tracing::error!(lane = n, %error, "cannot arm a lane: closing it");
                        lane.kill();
                        puller.mark_ready(n);
                        sleep = false;
                    }
                }
            }
        }
        sleep
    }
}
