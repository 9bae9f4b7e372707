//! A consumer's session with one producer address: dial, Hello, heartbeats, claims, releases, and their end when
//! the peer dies or another process takes its address.
//!
//! Everything that is known of a peer belongs to one incarnation of it. A claim names the incarnation that made its offer;
//! when another one answers, the claim is lost and nothing of the old one is used again (promises 2 and 8). A silent peer is
//! `Suspect` first (no new claims), then down: the session dials at once, and the answer decides. The same incarnation
//! resumes the claims; another one, or a refused connection, ends them.
//!
//! A connection may be dead while its peer is alive: a router forgot it while it was idle, and drops its packets. So a stream
//! that owes an answer for [`SessionConfig::second_dial`] gets a second dial beside it. If the stream answers first, it stays;
//! if the dial is answered first, the session moves to the new connection and sends its claims again under the same ids. Only
//! the newest stream's frames count, so a claim has one grant.
//!
//! `Link` decides when to dial, `Liveness` whether the peer answers, and `Claims` what to send.

mod claims;
mod link;
mod liveness;

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use self::{claims::Claims, link::Link, liveness::Liveness};
use crate::{
    Cause, ClaimId, ClientBody, ClientFrame, Contents, EngineId, Grant, Growth, HelloError, Incarnation, Machine,
    OfferId, PeerId, Rank, Reader, Release, ServerBody, ServerFrame, SessionConfig, Token,
    sabotage::{Bug, planted},
    table::Entropy,
};

/// An event for a session.
#[derive(Debug, Clone)]
pub enum In {
    /// A pull needs this offer.
    Claim(Want),
    /// A claim's pull has ended, or an offer is released without a pull.
    Release {
        /// The incarnation of the producer that made the offer.
        expect: Incarnation,
        /// The release.
        release: Release,
    },
    /// A dial succeeded: Hello was answered, and no stream is open yet.
    Welcomed(PeerId),
    /// A dial failed.
    DialFailed(HelloError),
    /// A frame of the stream with this number, see [`Out::Open`].
    Frame(u64, ServerFrame),
    /// That stream broke.
    Broken(u64),
    /// The peer refused that stream, and would refuse it again soon.
    Refused(u64, Cause),
    /// The consumer is shutting down: the session sends its releases, then closes.
    Close,
}

/// A claim to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Want {
    /// Its id, never used before in this process.
    pub claim: ClaimId,
    /// The offer.
    pub offer: OfferId,
    /// Its secret.
    pub token: Token,
    /// Its number, see [`Offer::number`](crate::Offer::number); 0: none.
    pub number: u64,
    /// The engine that made the offer.
    pub engine: EngineId,
    /// The engine's rank that the claim is for.
    pub rank: Rank,
    /// The incarnation of the producer rank that made the offer.
    pub expect: Incarnation,
    /// Which of the engine's readers makes the claim.
    pub reader: Reader,
    /// Whether the claim waits for an offer that is not entered yet.
    pub awaited: bool,
}

/// An action of a session. The caller carries them out in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Out {
    /// Connect and say Hello, even while a stream is open: the peer may be another process by now.
    Dial,
    /// Open the stream with this number on the connection that was dialled last, and drop any older stream.
    Open(u64),
    /// Send on the open stream.
    Send(ClientFrame),
    /// Release an offer without a session, on behalf of all readers: the peer is of another model and opens none.
    ReleaseAlone(Incarnation, Release),
    /// Drop the stream and the connection.
    HangUp,
    /// The peer is this process now. Everything cached of another incarnation is void.
    Peer(PeerId),
    /// The claim holds: its pull may read. Comes again with more contents if growths were missed.
    Granted {
        /// The claim.
        claim: ClaimId,
        /// Its fence word.
        grant: Grant,
        /// What it may read.
        contents: Arc<Contents>,
    },
    /// The offer of a granted claim has grown.
    Grown {
        /// The claim.
        claim: ClaimId,
        /// The added blocks, and the new mark.
        growth: Growth,
    },
    /// The claim is gone, or was never granted. No event of it follows.
    Lost {
        /// The claim.
        claim: ClaimId,
        /// Why.
        cause: Cause,
    },
    /// The peer's state changed; for logs, metrics and health.
    Health(Health),
    /// The peer has owed an answer for [`SessionConfig::suspect`], to a frame or to a dial (`true`), or has answered again.
    Silent(bool),
    /// The session has been unused for [`SessionConfig::idle`]: drop it.
    Expired,
}

/// The state of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// It answers.
    Up,
    /// It has been silent for [`SessionConfig::suspect`]: no new claims are sent.
    Suspect,
    /// Its stream broke, or it has been silent for [`SessionConfig::down`].
    Down,
    /// Another incarnation answers at the address.
    Reborn,
}

/// Claims in one renewal: frames stay bounded, however many claims there are.
const RENEWED_AT_ONCE: usize = 4096;

/// A consumer's session with one producer address.
pub struct PeerSession {
    me: PeerId,
    config: SessionConfig,
    limit: usize,
    link: Link,
    liveness: Liveness,
    claims: Claims,
    /// When a pull last used it.
    used: Instant,
    closing: bool,
    /// [`Out::Expired`] is out. A claim or a release revives the session.
    expired: bool,
    out: VecDeque<Out>,
}

impl PeerSession {
    /// A session that has not dialled. `me` is this consumer rank. `limit` bounds the blocks of an offer. `entropy` spreads the
    /// dials of many consumers.
    pub fn new(now: Instant, me: PeerId, config: SessionConfig, limit: usize, entropy: Entropy) -> Self {
        Self {
            me,
            limit,
            link: Link::new(&config, entropy),
            liveness: Liveness::new(now),
            claims: Claims::default(),
            config,
            used: now,
            closing: false,
            expired: false,
            out: VecDeque::new(),
        }
    }

    /// The process that answered last.
    pub fn peer(&self) -> Option<&PeerId> {
        self.link.peer()
    }

    /// The state of the peer.
    pub fn health(&self) -> Health {
        self.liveness.health()
    }

    /// Whether its stream is open and the peer answers.
    pub fn is_up(&self) -> bool {
        self.link.is_up() && self.health() == Health::Up
    }

    /// Number of claims that are neither lost nor released.
    pub fn claims(&self) -> usize {
        self.claims.len()
    }

    /// Number of releases that are not acknowledged.
    pub fn unacked(&self) -> usize {
        self.claims.unacked()
    }

    fn set_health(&mut self, health: Health) {
        self.liveness.set_health(health, &mut self.out);
    }

    fn send(&mut self, now: Instant, body: ClientBody) {
        self.liveness.send(now, 0, body, &mut self.out);
    }

    /// Sends due claims and releases if the session is up, and dials if it is not.
    fn flush(&mut self, now: Instant) {
        let Some(peer) = self.link.peer().filter(|_| self.link.is_up()).cloned() else {
            if self.claims.any() && self.link.is_closed() {
                self.link.dial_unless_scheduled(&mut self.out);
            }
            return;
        };
        // The name says that this process is another engine or rank.
        self.claims.lose(Cause::Refused, &mut self.out, |c| c.want.expect == peer.incarnation && !c.is_for(&peer));
        let peer = peer.incarnation;
        let resend = now + self.config.heartbeat * 2;
        let suspect = self.health() == Health::Suspect;
        let mut carry_out = |due| match due {
            Some((seq, body)) => self.liveness.send(now, seq, body, &mut self.out),
            // Either the offer is of a dead process, or the session is: the next Hello tells.
            None => self.link.dial_unless_scheduled(&mut self.out),
        };
        if !suspect {
            self.claims.due_claims(now, peer, resend).for_each(&mut carry_out);
        }
        self.claims.due_releases(now, peer, resend).for_each(carry_out);
    }

    fn welcomed(&mut self, now: Instant, peer: PeerId) {
        let dials = self.link.dials();
        let same = self.link.peer() == Some(&peer);
        // The stream answered while the dial was under way, or something else than its silence caused the dial: it stays.
        let stays = same && self.link.is_up() && self.liveness.silent_for(now) < self.config.second_dial;
        if self.link.welcomed(peer.clone()) {
            self.set_health(Health::Reborn);
        }
        self.claims.met(&peer, dials, &mut self.out);
        if !stays {
            self.claims.resend_all(now);
            let expect = peer.incarnation;
            self.out.push_back(Out::Peer(peer));
            self.liveness.end_silence(&mut self.out);
            self.link.open(&mut self.out);
            self.send(now, ClientBody::Open { from: self.me.clone(), expect });
        }
        self.flush(now);
    }

    fn dial_failed(&mut self, now: Instant, error: &HelloError) {
        self.link.dial_failed();
        let dials = self.link.dials();
        let silent = self.liveness.silent_for(now) >= self.config.second_dial;
        if self.link.is_closed() && !matches!(error, HelloError::Unreachable { refused: false, .. }) {
            self.liveness.end_silence(&mut self.out);
        }
        match error {
            // A probe failed while the stream lives: trust the stream, and ask again later. Do not trust a silent stream to an
            // address where no process listens.
            HelloError::Unreachable { refused, .. } if self.link.is_up() && !(*refused && silent) => {}
            HelloError::Unreachable { refused, .. } => {
                if *refused {
                    // No process listens there: the one that made the offers is gone.
                    let cause = if self.link.peer().is_some() { Cause::PeerDown } else { Cause::Unreachable };
                    self.claims.lose(cause, &mut self.out, |c| c.dials < dials);
                }
                if self.link.is_up() {
                    self.down(now);
                }
                self.set_health(Health::Down);
            }
            // The peer is there and refuses this consumer: asking again soon changes nothing.
            error => {
                self.claims.lose(error.cause(), &mut self.out, |c| c.dials < dials);
                // Refused offers must not fill the peer's memory until their leases run out.
                let alone = matches!(error, HelloError::Mismatch(_));
                for (expect, release) in self.claims.take_releases_before(dials) {
                    if alone {
                        self.out.push_back(Out::ReleaseAlone(expect, release));
                    }
                }
            }
        }
        if self.claims.any() {
            self.link.redial(now);
        }
        // The dial says nothing about claims that were made after it began; they need not wait long for the next one.
        if self.claims.any_since(dials) {
            self.link.redial_by(now + self.config.redial_min);
        }
    }

    /// The stream is unusable: closes it and dials at once. The answer decides about the claims.
    fn down(&mut self, now: Instant) {
        self.out.push_back(Out::HangUp);
        self.set_health(Health::Down);
        self.claims.resend_all(now);
        self.link.down(now, self.claims.any(), &mut self.out);
        if !self.claims.any() {
            self.liveness.end_silence(&mut self.out);
        }
    }

    /// Handles a frame. `false`: it made nothing due for sending.
    fn frame(&mut self, now: Instant, frame: ServerFrame) -> bool {
        // While a stream is opening, only its one answer ends the silence.
        if self.link.is_up() || matches!(frame.body, Some(ServerBody::Opened(_))) {
            self.liveness.end_silence(&mut self.out);
        }
        self.claims.acknowledged(frame.ack);
        let suspect = self.link.is_up() && self.health() == Health::Suspect;
        if suspect {
            self.set_health(Health::Up);
        }
        match frame.body {
            None | Some(ServerBody::Pong(_) | ServerBody::Draining) => {}
            Some(ServerBody::Opened(incarnation)) => match self.link.opened(now, incarnation) {
                None => {}
                Some(false) => self.down(now),
                Some(true) => {
                    self.liveness.ping_at(now + self.config.heartbeat);
                    self.set_health(Health::Up);
                }
            },
            Some(ServerBody::Granted { claim, grant, contents, growths, .. }) => {
                self.claims.granted(claim, grant, (contents, growths), &mut self.out);
            }
            Some(ServerBody::Grown { claim, after, growths, growth }) => {
                return self.claims.grown(claim, (after, growths), growth, self.limit, &mut self.out) || suspect;
            }
            Some(ServerBody::NotYet { claim, retry }) => {
                self.claims.not_yet(now, claim, retry, self.config.heartbeat);
            }
            Some(ServerBody::Gone { claim, why }) => {
                if self.claims.remove(claim) {
                    self.out.push_back(Out::Lost { claim, cause: why.cause() });
                }
            }
            Some(ServerBody::Revoked { offer, why }) => {
                self.claims.lose(why.cause(), &mut self.out, |c| c.want.offer == offer);
            }
        }
        true
    }

    /// Pings when a ping is due, and renews the held claims.
    fn heartbeat(&mut self, now: Instant) {
        if !self.link.is_up() || self.liveness.next_ping() > now {
            return;
        }
        let every = if self.claims.any() { self.config.heartbeat } else { self.config.idle_heartbeat };
        self.liveness.ping(now, now + every, &mut self.out);
        for claims in self.claims.held().chunks(RENEWED_AT_ONCE) {
            self.send(now, ClientBody::Renew(claims.to_vec()));
        }
    }

    /// Acts on the peer's silence once it is over a limit.
    fn check_silence(&mut self, now: Instant) {
        self.liveness.tell_silence(now, &self.config, &mut self.out);
        if self.link.is_closed() {
            return;
        }
        match self.liveness.silence(now, &self.config) {
            Some(Health::Down) => self.down(now),
            Some(health) if self.link.is_up() => self.set_health(health),
            _ => {}
        }
    }

    /// When the stream has been silent for long enough to try a second connection. `None` without a use for one, and while a
    /// dial is running or scheduled.
    fn second_dial_at(&self) -> Option<Instant> {
        let idle = !self.link.is_dialing() && self.link.redial_at().is_none();
        let useful = !self.link.is_closed() && self.claims.any() && idle && !planted(Bug::OneConnection);
        self.liveness.silent_at(self.link.may_be_silent(self.config.second_dial)).filter(|_| useful)
    }

    /// A dial without a stream beside it is a question that the peer must answer.
    fn owe_dial(&mut self, now: Instant) {
        if self.link.is_dialing() && self.link.is_closed() {
            self.liveness.owe(now);
        }
    }

    /// A pull uses the session.
    fn touch(&mut self, now: Instant) {
        self.used = now;
        self.expired = false;
    }

    /// When the session expires. Releases alone keep it only while it is up: once it has been down for as long as
    /// [`SessionConfig::idle`], the leases have run out anyway.
    fn expires_at(&self) -> Option<Instant> {
        let idle = if self.closing { Duration::ZERO } else { self.config.idle };
        let wanted =
            self.claims.len() > 0 || self.link.is_dialing() || (self.link.is_up() && self.claims.unacked() > 0);
        (!wanted && !self.expired).then(|| self.used + idle)
    }

    fn expire(&mut self, now: Instant) {
        if self.expires_at().is_some_and(|t| t <= now) {
            self.out.push_back(Out::HangUp);
            self.out.push_back(Out::Expired);
            self.link.close();
            self.liveness.end_silence(&mut self.out);
            drop(self.claims.take_releases_before(u64::MAX));
            self.expired = true;
        }
    }
}

impl Machine for PeerSession {
    type In = In;
    type Out = Out;

    fn handle(&mut self, now: Instant, event: In) {
        self.link.prove(now, self.config.down);
        match event {
            In::Claim(want) => {
                self.touch(now);
                if self.link.is_dead(want.expect) && !planted(Bug::IncarnationIgnored) {
                    return self.out.push_back(Out::Lost { claim: want.claim, cause: Cause::PeerRestarted });
                }
                // The claim names a process that was there a moment ago, so dial soon, even if a long wait has begun.
                self.link.redial_by(now + self.config.redial_min);
                // An idle session pings slowly; a claim needs quick pings again.
                self.liveness.ping_by(now + self.config.heartbeat);
                self.claims.add(want, self.link.dials());
                self.flush(now);
            }
            In::Release { expect, release } => {
                self.touch(now);
                if let Some(claim) = release.claim {
                    self.claims.remove(claim);
                }
                if !self.link.is_dead(expect) {
                    self.claims.release(now, expect, release, self.link.dials());
                    self.liveness.ping_by(now + self.config.heartbeat);
                }
                self.flush(now);
            }
            In::Welcomed(peer) => self.welcomed(now, peer),
            In::DialFailed(error) => self.dial_failed(now, &error),
            In::Frame(stream, frame) => {
                if self.link.is_stream(stream) && self.frame(now, frame) {
                    self.flush(now);
                }
            }
            In::Broken(stream) => {
                if self.link.is_stream(stream) {
                    self.down(now);
                }
            }
            In::Refused(stream, cause) => {
                if self.link.is_stream(stream) {
                    self.claims.lose(cause, &mut self.out, |_| true);
                    self.down(now);
                }
            }
            In::Close => {
                self.closing = true;
                self.claims.lose(Cause::Shutdown, &mut self.out, |_| true);
                self.used = self.used.min(now);
                self.expire(now);
            }
        }
        self.owe_dial(now);
    }

    fn tick(&mut self, now: Instant) {
        self.link.prove(now, self.config.down);
        if self.link.redial_due(now) && self.claims.any() {
            self.link.dial(&mut self.out);
        }
        self.check_silence(now);
        self.heartbeat(now);
        if self.second_dial_at().is_some_and(|t| t <= now) {
            self.link.dial(&mut self.out);
        }
        self.flush(now);
        self.expire(now);
        self.owe_dial(now);
    }

    fn poll(&mut self) -> Option<Out> {
        self.out.pop_front()
    }

    fn next_timeout(&self) -> Option<Instant> {
        let up = self.link.is_up();
        let suspect = self.health() == Health::Suspect;
        let on_stream =
            if up { [Some(self.liveness.next_ping()), self.claims.next_timeout(suspect)] } else { [None; 2] };
        let silence = if self.link.is_closed() { None } else { self.liveness.silence_ends_at(up, &self.config) };
        let (tells, second) = (self.liveness.tells_at(&self.config), self.second_dial_at());
        on_stream.into_iter().chain([self.link.redial_at(), silence, tells, second, self.expires_at()]).flatten().min()
    }
}
