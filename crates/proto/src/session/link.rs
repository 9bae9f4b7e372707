//! The connection of a session: dials, the stream, and the process that answers.
//!
//! Owns every decision about when to dial. At most one dial and one stream exist at a time. Waits between dials grow until a
//! stream has lived for [`PROVEN`].

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::Out;
use crate::{Incarnation, PeerId, SessionConfig, retry::Backoff, table::Entropy};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stream {
    Closed,
    /// Opened; the first frame is not answered yet.
    Opening(u64),
    Up(u64),
}

/// Dead incarnations that a session remembers, to recognise their late releases without a question. A forgotten one costs
/// a Hello.
const DEAD_KNOWN: usize = 8;

/// A stream that has lived for this long, or for the time that makes a peer down if that is shorter, was a good one. Waits
/// restart from the shortest only after a good one: a peer whose streams break at once is not dialled in a loop.
const PROVEN: Duration = Duration::from_secs(1);

/// The connection of a session.
pub(super) struct Link {
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
    entropy: Entropy,
    /// Since when the stream is up, while it has not yet lived for [`PROVEN`].
    unproven: Option<Instant>,
    /// The previous stream broke before it was proven.
    brief: bool,
    /// Streams opened since one was answered.
    unanswered: u32,
}

impl Link {
    pub(super) fn new(config: &SessionConfig, entropy: Entropy) -> Self {
        Self {
            peer: None,
            dead: VecDeque::new(),
            stream: Stream::Closed,
            streams: 0,
            dialing: false,
            dials: 0,
            redial_at: None,
            backoff: Backoff::new(config.redial_min, config.redial_max),
            entropy,
            unproven: None,
            brief: false,
            unanswered: 0,
        }
    }

    pub(super) fn peer(&self) -> Option<&PeerId> {
        self.peer.as_ref()
    }

    pub(super) fn is_up(&self) -> bool {
        matches!(self.stream, Stream::Up(_))
    }

    pub(super) fn is_closed(&self) -> bool {
        self.stream == Stream::Closed
    }

    /// Whether this is the number of the open stream.
    pub(super) fn is_stream(&self, n: u64) -> bool {
        matches!(self.stream, Stream::Opening(s) | Stream::Up(s) if s == n)
    }

    /// How long the stream may be silent before a second connection is dialled, where `first` is that time for a stream that
    /// was answered. It doubles with each stream in a row that was not: a busy peer must get to answer one of them.
    pub(super) fn may_be_silent(&self, first: Duration) -> Duration {
        first.saturating_mul(1 << self.unanswered.saturating_sub(1).min(16))
    }

    pub(super) fn is_dialing(&self) -> bool {
        self.dialing
    }

    /// Number of dials begun. See `Claim::dials`.
    pub(super) fn dials(&self) -> u64 {
        self.dials
    }

    /// Whether another incarnation has replaced this one.
    pub(super) fn is_dead(&self, incarnation: Incarnation) -> bool {
        self.dead.contains(&incarnation)
    }

    pub(super) fn dial(&mut self, out: &mut VecDeque<Out>) {
        if !self.dialing {
            self.dialing = true;
            self.dials += 1;
            self.redial_at = None;
            out.push_back(Out::Dial);
        }
    }

    /// Dials unless a later dial is scheduled.
    pub(super) fn dial_unless_scheduled(&mut self, out: &mut VecDeque<Out>) {
        if self.redial_at.is_none() {
            self.dial(out);
        }
    }

    /// Schedules the next dial.
    pub(super) fn redial(&mut self, now: Instant) {
        let random = (self.entropy)();
        self.redial_at = Some(now + self.backoff.wait_jittered(random));
    }

    /// Moves a scheduled dial forward.
    pub(super) fn redial_by(&mut self, latest: Instant) {
        self.redial_at = self.redial_at.map(|t| t.min(latest));
    }

    pub(super) fn redial_at(&self) -> Option<Instant> {
        self.redial_at
    }

    /// Whether a scheduled dial is due. Says so once.
    pub(super) fn redial_due(&mut self, now: Instant) -> bool {
        self.redial_at.take_if(|t| *t <= now).is_some()
    }

    /// The dial failed.
    pub(super) fn dial_failed(&mut self) {
        self.dialing = false;
    }

    /// The dial succeeded: `peer` answers. `true` when it replaces another process.
    pub(super) fn welcomed(&mut self, peer: PeerId) -> bool {
        self.dialing = false;
        self.redial_at = None;
        let Some(old) = self.peer.replace(peer).filter(|old| self.peer.as_ref() != Some(old)) else { return false };
        self.dead.push_back(old.incarnation);
        if self.dead.len() > DEAD_KNOWN {
            self.dead.pop_front();
        }
        true
    }

    /// Opens a stream in place of an older one.
    pub(super) fn open(&mut self, out: &mut VecDeque<Out>) {
        self.streams += 1;
        self.unanswered = self.unanswered.saturating_add(1);
        self.stream = Stream::Opening(self.streams);
        self.unproven = None;
        out.push_back(Out::Open(self.streams));
    }

    /// The peer answered the stream's first frame. `None` when no stream was opening; `Some(false)` when it is another
    /// process.
    pub(super) fn opened(&mut self, now: Instant, incarnation: Incarnation) -> Option<bool> {
        let Stream::Opening(n) = self.stream else { return None };
        if self.peer.as_ref().is_some_and(|p| !p.incarnation.is(incarnation)) {
            return Some(false);
        }
        self.stream = Stream::Up(n);
        self.unanswered = 0;
        self.unproven = Some(now);
        Some(true)
    }

    /// Closes the stream. `needed` dials again: at once after a stream that was up, later if two streams in a row broke
    /// before they were proven, or if none came up.
    pub(super) fn down(&mut self, now: Instant, needed: bool, out: &mut VecDeque<Out>) {
        let was_up = self.is_up();
        self.stream = Stream::Closed;
        let brief = self.unproven.take().is_some();
        let again = was_up && std::mem::replace(&mut self.brief, brief) && brief;
        if !needed {
        } else if was_up && !again {
            self.dial(out);
        } else if !self.dialing {
            // The peer answers Hello, but opens no stream or none that lasts: dialling faster does not help.
            self.redial(now);
        }
    }

    /// Closes the stream and schedules nothing.
    pub(super) fn close(&mut self) {
        self.stream = Stream::Closed;
        self.redial_at = None;
    }

    /// Forgets earlier failures once the stream has lived long enough.
    pub(super) fn prove(&mut self, now: Instant, down: Duration) {
        let enough = PROVEN.min(down);
        if self.unproven.is_some_and(|since| now.saturating_duration_since(since) >= enough) {
            self.unproven = None;
            self.brief = false;
            self.backoff.reset();
        }
    }
}
