//! Whether the peer of a session answers: heartbeats, silence, and the health that follows from them.

use std::{collections::VecDeque, time::Instant};

use super::{Health, Out};
use crate::{ClientBody, ClientFrame, SessionConfig};

/// Whether the peer answers.
pub(super) struct Liveness {
    health: Health,
    pings: u64,
    next_ping: Instant,
    /// Since when a frame that the peer must answer is unanswered.
    silent_since: Option<Instant>,
}

impl Liveness {
    pub(super) fn new(now: Instant) -> Self {
        Self { health: Health::Up, pings: 0, next_ping: now, silent_since: None }
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
            self.silent_since.get_or_insert(now);
        }
        out.push_back(Out::Send(ClientFrame { seq, body }));
    }

    /// The peer answered, or its stream is gone.
    pub(super) fn end_silence(&mut self) {
        self.silent_since = None;
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
        let silent = now.saturating_duration_since(self.silent_since?);
        match silent {
            _ if silent >= config.down => Some(Health::Down),
            _ if silent >= config.suspect => Some(Health::Suspect),
            _ => None,
        }
    }

    /// When the present silence reaches its next limit. While a stream is opening, only `down` counts.
    pub(super) fn silence_ends_at(&self, up: bool, config: &SessionConfig) -> Option<Instant> {
        let limit = if self.health == Health::Suspect || !up { config.down } else { config.suspect };
        Some(self.silent_since? + limit)
    }
}
