//! Whether the peer of a session answers: heartbeats, silence, and the health that follows from them.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::{Health, Out};
use crate::{ClientBody, ClientFrame, SessionConfig};

/// Whether the peer answers.
pub(super) struct Liveness {
    health: Health,
    pings: u64,
    next_ping: Instant,
    /// Since when a frame or a dial that the peer must answer is unanswered.
    silent_since: Option<Instant>,
    /// [`Out::Silent`] is out.
    told: bool,
}

impl Liveness {
    pub(super) fn new(now: Instant) -> Self {
        Self { health: Health::Up, pings: 0, next_ping: now, silent_since: None, told: false }
    }

    pub(super) fn health(&self) -> Health {
        self.health
    }

    pub(super) fn set_health(&mut self, health: Health, out: &mut VecDeque<Out>) {
        if self.health != health {
            self.health = health;
            out.push_back(Out::Health(health));
        }
    }

    /// Sends a frame. The silence until its answer counts from here.
    pub(super) fn send(&mut self, now: Instant, seq: u64, body: ClientBody, out: &mut VecDeque<Out>) {
        // Every frame but Renew is answered.
        if !matches!(body, ClientBody::Renew(_)) {
            self.owe(now);
        }
        out.push_back(Out::Send(ClientFrame { seq, body }));
    }

    /// From now on the peer owes an answer, unless it did already.
    pub(super) fn owe(&mut self, now: Instant) {
        self.silent_since.get_or_insert(now);
    }

    /// The peer answered, or owes no answer any more.
    pub(super) fn end_silence(&mut self, out: &mut VecDeque<Out>) {
        self.silent_since = None;
        if std::mem::take(&mut self.told) {
            out.push_back(Out::Silent(false));
        }
    }

    /// How long the peer has owed an answer.
    pub(super) fn silent_for(&self, now: Instant) -> Duration {
        self.silent_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    /// When the peer has owed an answer for this long.
    pub(super) fn silent_at(&self, after: Duration) -> Option<Instant> {
        self.silent_since?.checked_add(after)
    }

    /// Says once that the peer is silent, if it has been for [`SessionConfig::suspect`].
    pub(super) fn tell_silence(&mut self, now: Instant, config: &SessionConfig, out: &mut VecDeque<Out>) {
        if !self.told && self.silent_at(config.suspect).is_some_and(|t| t <= now) {
            self.told = true;
            out.push_back(Out::Silent(true));
        }
    }

    pub(super) fn next_ping(&self) -> Instant {
        self.next_ping
    }

    /// Moves the next ping forward.
    pub(super) fn ping_by(&mut self, latest: Instant) {
        self.next_ping = self.next_ping.min(latest);
    }

    pub(super) fn ping_at(&mut self, at: Instant) {
        self.next_ping = at;
    }

    /// Pings, and schedules the next ping.
    pub(super) fn ping(&mut self, now: Instant, next: Instant, out: &mut VecDeque<Out>) {
        self.next_ping = next;
        self.pings += 1;
        self.send(now, 0, ClientBody::Ping(self.pings), out);
    }

    /// The state that the present silence amounts to, if it is over a limit.
    pub(super) fn silence(&self, now: Instant, config: &SessionConfig) -> Option<Health> {
        self.silent_since?;
        match self.silent_for(now) {
            silent if silent < config.suspect => None,
            silent if silent < config.down => Some(Health::Suspect),
            _ => Some(Health::Down),
        }
    }

    /// When the present silence reaches its next limit. While a stream is opening, only `down` counts.
    pub(super) fn silence_ends_at(&self, up: bool, config: &SessionConfig) -> Option<Instant> {
        let limit = if self.health == Health::Suspect || !up { config.down } else { config.suspect };
        self.silent_at(limit)
    }

    /// When [`Liveness::tell_silence`] has something to say.
    pub(super) fn tells_at(&self, config: &SessionConfig) -> Option<Instant> {
        self.silent_at(config.suspect).filter(|_| !self.told)
    }
}
