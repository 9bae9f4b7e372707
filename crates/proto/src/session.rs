//! A consumer's session with one producer address: dial, Hello, heartbeats, claims, releases, and what becomes of them
//! when the peer dies or comes back as another process.
//!
//! Everything that is kept of a peer belongs to one incarnation of it. A claim names the incarnation that made its offer;
//! when another one answers, the claim is lost and nothing of the old one is used again (promises 2 and 8). A peer that
//! does not answer is `Suspect` first (no new claims), then down: the session dials anew at once, and the answer decides:
//! the same incarnation resumes, another one or a refused connection ends the claims.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use crate::{
    Machine,
    block::{EngineId, Incarnation, OfferId},
    config::SessionConfig,
    error::{Cause, HelloError},
    frame::{ClaimId, ClientBody, ClientFrame, PeerId, Reader, Release, ServerBody, ServerFrame},
    lane::Grant,
    retry::Backoff,
    sabotage::{Bug, planted},
    table::Entropy,
};

/// What happens to a session.
#[derive(Debug, Clone)]
pub enum In {
    /// A pull wants this offer.
    Claim(Want),
    /// A claim's pull has ended; or an offer is let go without a pull.
    Release {
        /// The producer's incarnation that the offer is of.
        expect: Incarnation,
        /// What is let go.
        release: Release,
    },
    /// A dial was answered: Hello went through, and the stream is not open yet.
    Welcomed(PeerId),
    /// A dial failed.
    DialFailed(HelloError),
    /// A frame came on the stream that was opened by dial number `stream`.
    Frame(u64, ServerFrame),
    /// That stream broke.
    Broken(u64),
    /// The consumer is shutting down: send what must be sent, then close.
    Close,
}

/// A claim to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Want {
    /// Its id, never used before in this process.
    pub claim: ClaimId,
    /// The offer.
    pub offer: OfferId,
    /// The engine that offered.
    pub engine: EngineId,
    /// The producer rank's incarnation that the offer is of.
    pub expect: Incarnation,
    /// Which of the engine's readers this is.
    pub reader: Reader,
}

/// What a session wants done, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Out {
    /// Connect and say Hello, also while a stream is open: the peer may be another one by now.
    Dial,
    /// Open the stream `number` on the connection that was dialled last; any older stream is dropped.
    Open(u64),
    /// Send on the open stream.
    Send(ClientFrame),
    /// Drop the stream and the connection.
    HangUp,
    /// The peer is this one now. Anything cached of another incarnation is void.
    Peer(PeerId),
    /// The claim holds: its pull may read.
    Granted {
        /// The claim.
        claim: ClaimId,
        /// Its fence word.
        grant: Grant,
    },
    /// The claim is gone, or was never to be had. Nothing more comes of it.
    Lost {
        /// The claim.
        claim: ClaimId,
        /// Why.
        cause: Cause,
    },
    /// The peer's state changed; for logs, metrics and health.
    Health(Health),
    /// Nothing has been wanted of this session for long: drop it.
    Expired,
}

/// What is known of a peer's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// It answers.
    Up,
    /// It has been silent for a while: no new claims go out.
    Suspect,
    /// Its stream broke, or it has been silent for too long.
    Down,
    /// Another incarnation answers at the address.
    Reborn,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ClaimState {
    /// To be sent when the session can.
    Waiting,
    /// To be sent again then.
    RetryAt(Instant),
    /// Sent, not answered; sent again then.
    Sent(Instant),
    /// Granted.
    Held,
}

#[derive(Debug)]
struct Claim {
    want: Want,
    state: ClaimState,
    /// Dials begun before it. Only the answer to a later one says anything about its offer's process: an earlier dial may
    /// have been answered, or refused, before that process was there.
    dials: u64,
}

#[derive(Debug)]
struct Unacked {
    expect: Incarnation,
    release: Release,
    /// When it goes out again.
    resend: Instant,
    /// As for a claim.
    dials: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stream {
    Closed,
    /// Opened; the first frame's answer is not here yet.
    Opening(u64),
    Up(u64),
}

/// Dead incarnations that a session remembers, to know a late release of theirs without asking. A forgotten one costs a
/// Hello.
const DEAD_KNOWN: usize = 8;

/// A stream that has lived for this long, or for the time that makes a peer down if that is shorter, was a good one. Waits
/// start from the shortest again only after a good one: a peer whose streams break at once is not dialled in a loop.
const PROVEN: Duration = Duration::from_secs(1);

/// A consumer's session with one producer address.
pub struct PeerSession {
    me: PeerId,
    config: SessionConfig,
    entropy: Entropy,
    peer: Option<PeerId>,
    /// Incarnations that another one has replaced, latest last.
    dead: VecDeque<Incarnation>,
    stream: Stream,
    streams: u64,
    dialing: bool,
    /// Dials begun.
    dials: u64,
    redial_at: Option<Instant>,
    backoff: Backoff,
    /// Since when the stream is up, while it has not yet lived for [`PROVEN`].
    unproven: Option<Instant>,
    /// The stream before broke unproven.
    brief: bool,
    claims: BTreeMap<ClaimId, Claim>,
    unacked: BTreeMap<u64, Unacked>,
    next_seq: u64,
    pings: u64,
    next_ping: Instant,
    /// Since when something that the peer should have answered is unanswered.
    silent_since: Option<Instant>,
    health: Health,
    used: Instant,
    closing: bool,
    /// Said once, unless it is used again.
    expired: bool,
    out: VecDeque<Out>,
}

impl PeerSession {
    /// A session that has not dialled. `me` is this consumer rank.
    pub fn new(now: Instant, me: PeerId, config: SessionConfig, entropy: Entropy) -> Self {
        let backoff = Backoff::new(config.redial_min, config.redial_max);
        Self {
            me,
            config,
            entropy,
            peer: None,
            dead: VecDeque::new(),
            stream: Stream::Closed,
            streams: 0,
            dialing: false,
            dials: 0,
            redial_at: None,
            backoff,
            unproven: None,
            brief: false,
            claims: BTreeMap::new(),
            unacked: BTreeMap::new(),
            next_seq: 1,
            pings: 0,
            next_ping: now,
            silent_since: None,
            health: Health::Up,
            used: now,
            closing: false,
            expired: false,
            out: VecDeque::new(),
        }
    }

    /// Who answered last.
    pub fn peer(&self) -> Option<&PeerId> {
        self.peer.as_ref()
    }

    /// What is known of the peer's life.
    pub fn health(&self) -> Health {
        self.health
    }

    /// Whether its stream is open and answers.
    pub fn is_up(&self) -> bool {
        self.up() && self.health == Health::Up
    }

    /// Claims that have not been let go.
    pub fn claims(&self) -> usize {
        self.claims.len()
    }

    /// Releases that are not acknowledged.
    pub fn unacked(&self) -> usize {
        self.unacked.len()
    }

    fn up(&self) -> bool {
        matches!(self.stream, Stream::Up(_))
    }

    fn needed(&self) -> bool {
        !self.claims.is_empty() || !self.unacked.is_empty()
    }

    fn dial(&mut self) {
        if !self.dialing {
            self.dialing = true;
            self.dials += 1;
            self.redial_at = None;
            self.out.push_back(Out::Dial);
        }
    }

    fn send(&mut self, now: Instant, seq: u64, body: ClientBody) {
        // Everything but Renew is answered.
        if !matches!(body, ClientBody::Renew(_)) {
            self.silent_since.get_or_insert(now);
        }
        self.out.push_back(Out::Send(ClientFrame { seq, body }));
    }

    fn set_health(&mut self, health: Health) {
        if self.health != health {
            self.health = health;
            self.out.push_back(Out::Health(health));
        }
    }

    fn lose(&mut self, cause: Cause, which: impl Fn(&Claim) -> bool) {
        let lost: Vec<_> = self.claims.iter().filter(|(_, c)| which(c)).map(|(id, _)| *id).collect();
        for claim in lost {
            self.claims.remove(&claim);
            self.out.push_back(Out::Lost { claim, cause });
        }
    }

    /// Sends what waits, as far as the session is fit for it.
    fn flush(&mut self, now: Instant) {
        let Some(peer) = self.peer.clone() else {
            if self.needed() && self.redial_at.is_none() {
                self.dial();
            }
            return;
        };
        if !self.up() {
            if self.needed() && matches!(self.stream, Stream::Closed) && self.redial_at.is_none() {
                self.dial();
            }
            return;
        }
        let ready: Vec<_> = self
            .claims
            .iter()
            .filter(|(_, c)| match c.state {
                ClaimState::Waiting => self.health != Health::Suspect,
                ClaimState::RetryAt(t) | ClaimState::Sent(t) => t <= now && self.health != Health::Suspect,
                _ => false,
            })
            .map(|(id, _)| *id)
            .collect();
        for id in ready {
            let Some(c) = self.claims.get_mut(&id) else { continue };
            if c.want.expect != peer.incarnation && !planted(Bug::IncarnationIgnored) {
                // Either the offer is of a dead process, or the session is of one: a fresh Hello tells.
                if self.redial_at.is_none() {
                    self.dial();
                }
                continue;
            }
            c.state = ClaimState::Sent(now + self.config.heartbeat * 2);
            let Want { claim, offer, reader, .. } = c.want.clone();
            self.send(now, 0, ClientBody::Claim { claim, offer, reader });
        }
        let resend = now + self.config.heartbeat * 2;
        let due: Vec<_> = self.unacked.iter().filter(|(_, u)| u.resend <= now).map(|(s, _)| *s).collect();
        for seq in due {
            let Some(u) = self.unacked.get_mut(&seq) else { continue };
            u.resend = resend;
            if u.expect != peer.incarnation && !planted(Bug::IncarnationIgnored) {
                // An offer of a process that this session has not met yet, most likely: it goes out once they have met.
                if self.redial_at.is_none() {
                    self.dial();
                }
                continue;
            }
            let release = u.release.clone();
            self.send(now, seq, ClientBody::Release(release));
        }
    }

    fn welcomed(&mut self, now: Instant, peer: PeerId) {
        self.dialing = false;
        self.redial_at = None;
        let dials = self.dials;
        let same = self.peer.as_ref() == Some(&peer);
        if let Some(old) = self.peer.replace(peer.clone()).filter(|old| *old != peer) {
            self.set_health(Health::Reborn);
            self.dead.push_back(old.incarnation);
            if self.dead.len() > DEAD_KNOWN {
                self.dead.pop_front();
            }
        }
        if !planted(Bug::IncarnationIgnored) {
            // Releases of a dead incarnation are void: its memory went with it.
            self.unacked.retain(|_, u| u.expect == peer.incarnation || u.dials >= dials);
            let of = |c: &Claim| c.want.engine == peer.engine;
            // A name that was reached at the wrong engine's address.
            self.lose(Cause::Refused, |c| !of(c) && c.dials < dials);
            self.lose(Cause::PeerRestarted, |c| c.want.expect != peer.incarnation && c.dials < dials);
        }
        if !(same && self.up()) {
            self.out.push_back(Out::Peer(peer.clone()));
            self.streams += 1;
            self.stream = Stream::Opening(self.streams);
            self.unproven = None;
            self.silent_since = None;
            self.out.push_back(Out::Open(self.streams));
            self.send(now, 0, ClientBody::Open { from: self.me.clone(), expect: peer.incarnation });
        }
        self.flush(now);
    }

    fn dial_failed(&mut self, now: Instant, error: &HelloError) {
        self.dialing = false;
        let dials = self.dials;
        let refused = matches!(error, HelloError::Unreachable { refused: true, .. });
        let unreachable = matches!(error, HelloError::Unreachable { .. });
        if !unreachable {
            // It is there, and will not have us: nothing gets better by asking again soon.
            self.lose(error.cause(), |c| c.dials < dials);
            self.unacked.retain(|_, u| u.dials >= dials);
        } else if self.up() {
            // A probe failed while the stream lives: the stream knows better. Ask again later.
        } else if refused {
            // Nobody listens there: the process that made the offers is gone.
            let known = self.peer.is_some();
            self.lose(if known { Cause::PeerDown } else { Cause::Unreachable }, |c| c.dials < dials);
            self.set_health(Health::Down);
        } else {
            self.set_health(Health::Down);
        }
        if self.needed() {
            self.redial(now);
        }
        // Claims that were made meanwhile are not answered by it, and do not wait for long.
        if self.claims.values().any(|c| c.dials >= dials) {
            self.hurry(now);
        }
    }

    /// Dials again after a while.
    fn redial(&mut self, now: Instant) {
        let random = (self.entropy)();
        self.redial_at = Some(now + self.backoff.wait_jittered(random));
    }

    /// A new claim speaks of a process that was there a moment ago: a long wait for the next dial is cut short.
    fn hurry(&mut self, now: Instant) {
        let soon = now + self.config.redial_min;
        self.redial_at = self.redial_at.map(|t| t.min(soon));
    }

    /// The stream is of no more use: dial anew at once, and let the answer decide.
    fn down(&mut self, now: Instant) {
        let was_up = self.up();
        self.out.push_back(Out::HangUp);
        self.stream = Stream::Closed;
        self.silent_since = None;
        self.set_health(Health::Down);
        for c in self.claims.values_mut() {
            // The producer may not have heard of it, or may have forgotten; claiming twice does no harm.
            c.state = ClaimState::Waiting;
        }
        for u in self.unacked.values_mut() {
            u.resend = now;
        }
        let brief = self.unproven.take().is_some();
        let again = was_up && std::mem::replace(&mut self.brief, brief) && brief;
        if !self.needed() {
        } else if was_up && !again {
            self.dial();
        } else if !self.dialing {
            // It says Hello and opens no stream, or none that lasts: asking faster does not help.
            self.redial(now);
        }
    }

    /// Forgets earlier failures once the stream has lived for a while.
    fn prove(&mut self, now: Instant) {
        let enough = PROVEN.min(self.config.down);
        if self.unproven.is_some_and(|since| now.saturating_duration_since(since) >= enough) {
            self.unproven = None;
            self.brief = false;
            self.backoff.reset();
        }
    }

    fn frame(&mut self, now: Instant, frame: ServerFrame) {
        // A stream that is opening waits for its one answer: nothing else ends that silence.
        if self.up() || matches!(frame.body, Some(ServerBody::Opened(_))) {
            self.silent_since = None;
        }
        self.unacked.remove(&frame.ack);
        if self.up() && matches!(self.health, Health::Suspect) {
            self.set_health(Health::Up);
        }
        match frame.body {
            None | Some(ServerBody::Pong(_) | ServerBody::Draining) => {}
            Some(ServerBody::Opened(incarnation)) => {
                let Stream::Opening(n) = self.stream else { return };
                if self.peer.as_ref().is_some_and(|p| p.incarnation != incarnation) && !planted(Bug::IncarnationIgnored)
                {
                    return self.down(now);
                }
                self.stream = Stream::Up(n);
                self.unproven = Some(now);
                self.next_ping = now + self.config.heartbeat;
                self.set_health(Health::Up);
            }
            Some(ServerBody::Granted { claim, grant, .. }) => match self.claims.get_mut(&claim) {
                Some(c) if c.state != ClaimState::Held => {
                    c.state = ClaimState::Held;
                    self.out.push_back(Out::Granted { claim, grant });
                }
                // A late or repeated grant: the release that followed is resent by itself.
                _ => {}
            },
            Some(ServerBody::NotYet { claim, retry }) => {
                if let Some(c) = self.claims.get_mut(&claim)
                    && matches!(c.state, ClaimState::Sent(_))
                {
                    // A peer's word is bounded: no claim sleeps past a heartbeat.
                    c.state = ClaimState::RetryAt(now + retry.min(self.config.heartbeat));
                }
            }
            Some(ServerBody::Gone { claim, why }) => {
                if self.claims.remove(&claim).is_some() {
                    self.out.push_back(Out::Lost { claim, cause: why.cause() });
                }
            }
            Some(ServerBody::Revoked { offer, why }) => {
                self.lose(why.cause(), |c| c.want.offer == offer);
            }
        }
    }

    fn heartbeat(&mut self, now: Instant) {
        if !self.up() || self.next_ping > now {
            return;
        }
        let held: Vec<_> = self.claims.iter().filter(|(_, c)| c.state == ClaimState::Held).map(|(id, _)| *id).collect();
        let every = if self.needed() { self.config.heartbeat } else { self.config.idle_heartbeat };
        self.next_ping = now + every;
        self.pings += 1;
        let n = self.pings;
        self.send(now, 0, ClientBody::Ping(n));
        // Bounded frames, however many claims there are.
        for part in held.chunks(4096) {
            self.send(now, 0, ClientBody::Renew(part.to_vec()));
        }
    }

    fn listen(&mut self, now: Instant) {
        let Some(since) = self.silent_since else { return };
        let silent = now.saturating_duration_since(since);
        if matches!(self.stream, Stream::Closed) {
            return;
        }
        if silent >= self.config.down {
            self.down(now);
        } else if silent >= self.config.suspect && self.up() {
            self.set_health(Health::Suspect);
        }
    }

    /// When it is dropped, if nothing happens before. Releases alone keep a session only while it is up: once it has been
    /// down for as long as this, the leases have run out anyway.
    fn rests_at(&self) -> Option<Instant> {
        let idle = if self.closing { Duration::ZERO } else { self.config.idle };
        let wanted = !self.claims.is_empty() || self.dialing || (self.up() && !self.unacked.is_empty());
        (!wanted && !self.expired).then(|| self.used + idle)
    }

    fn rest(&mut self, now: Instant) {
        if self.rests_at().is_some_and(|t| t <= now) {
            self.out.push_back(Out::HangUp);
            self.out.push_back(Out::Expired);
            self.stream = Stream::Closed;
            self.redial_at = None;
            self.unacked.clear();
            self.expired = true;
        }
    }
}

impl Machine for PeerSession {
    type In = In;
    type Out = Out;

    fn handle(&mut self, now: Instant, event: In) {
        self.prove(now);
        match event {
            In::Claim(want) => {
                self.used = now;
                self.expired = false;
                let id = want.claim;
                if self.dead.contains(&want.expect) && !planted(Bug::IncarnationIgnored) {
                    return self.out.push_back(Out::Lost { claim: id, cause: Cause::PeerRestarted });
                }
                self.hurry(now);
                // An idle session's ping is slow: a claim makes it quick again.
                self.next_ping = self.next_ping.min(now + self.config.heartbeat);
                self.claims.entry(id).or_insert(Claim { want, state: ClaimState::Waiting, dials: self.dials });
                self.flush(now);
            }
            In::Release { expect, release } => {
                self.used = now;
                self.expired = false;
                if let Some(claim) = release.claim {
                    self.claims.remove(&claim);
                }
                if !self.dead.contains(&expect) {
                    let seq = self.next_seq;
                    self.next_seq += 1;
                    self.unacked.insert(seq, Unacked { expect, release, resend: now, dials: self.dials });
                    self.next_ping = self.next_ping.min(now + self.config.heartbeat);
                }
                self.flush(now);
            }
            In::Welcomed(peer) => self.welcomed(now, peer),
            In::DialFailed(error) => self.dial_failed(now, &error),
            In::Frame(stream, frame) => {
                if matches!(self.stream, Stream::Opening(n) | Stream::Up(n) if n == stream) {
                    self.frame(now, frame);
                    self.flush(now);
                }
            }
            In::Broken(stream) => {
                if matches!(self.stream, Stream::Opening(n) | Stream::Up(n) if n == stream) {
                    self.down(now);
                }
            }
            In::Close => {
                self.closing = true;
                self.lose(Cause::Shutdown, |_| true);
                self.used = self.used.min(now);
                self.rest(now);
            }
        }
    }

    fn tick(&mut self, now: Instant) {
        self.prove(now);
        if self.redial_at.is_some_and(|t| t <= now) {
            self.redial_at = None;
            if self.needed() {
                self.dial();
            }
        }
        self.listen(now);
        self.heartbeat(now);
        self.flush(now);
        self.rest(now);
    }

    fn poll(&mut self) -> Option<Out> {
        self.out.pop_front()
    }

    fn next_timeout(&self) -> Option<Instant> {
        let mut next: Option<Instant> = None;
        let mut at = |t: Instant| next = Some(next.map_or(t, |n| n.min(t)));
        if let Some(t) = self.redial_at {
            at(t);
        }
        if self.up() {
            at(self.next_ping);
            for u in self.unacked.values() {
                at(u.resend);
            }
            if self.health != Health::Suspect {
                for c in self.claims.values() {
                    if let ClaimState::RetryAt(t) | ClaimState::Sent(t) = c.state {
                        at(t);
                    }
                }
            }
        }
        if let (Some(since), false) = (self.silent_since, matches!(self.stream, Stream::Closed)) {
            let limit =
                if self.health == Health::Suspect || !self.up() { self.config.down } else { self.config.suspect };
            at(since + limit);
        }
        if let Some(t) = self.rests_at() {
            at(t);
        }
        next
    }
}
