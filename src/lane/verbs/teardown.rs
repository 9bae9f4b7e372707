//! Teardown: how a failed rail of a lane is made quiet when it does not become quiet by itself.
//!
//! The stages are: drain; ERR and drain; destroy; close the device. If none succeeds, the rail is wedged. Each stage has a
//! time limit of its own, which is never the transport's: transports that never report an error are normal. Each outcome is
//! counted, and each teardown is logged once.

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    cleanup,
    device::{Closed, Closing},
    qp::Qp,
    wake::Bell,
};

/// Time limit of ERR. A device flushes posted requests within about a millisecond; an emulated one under load within ten.
pub(crate) const ERR_BOUND: Duration = Duration::from_millis(150);
/// Time limit of destruction. It is a command to the device's firmware: milliseconds, tens of them under load. The next
/// stage takes the device from all other lanes on it, so a loaded machine gets time.
pub(crate) const DESTROY_BOUND: Duration = Duration::from_millis(300);
/// Expected time of closing, which destroys all remaining objects.
pub(crate) const CLOSE_BOUND: Duration = Duration::from_millis(130);
/// Time after which a device that does not close is given up as wedged. It is much longer than the bound: a pull has decided
/// by then, and an early verdict would only cost the engine its blocks. A machine with four builds on two cores took 120 ms
/// to start the thread that closes. A lane to another peer that is being connected holds the device for up to
/// `hello_timeout` (5 s), and a running registration for about as long.
pub(crate) const WEDGED_AFTER: Duration = Duration::from_secs(10);

/// Time limit of all stages after the first (stop posting and drain).
pub(crate) const BOUND: Duration = ERR_BOUND.saturating_add(DESTROY_BOUND).saturating_add(CLOSE_BOUND);

/// How often each stage was the last one, in this process, and the time spent in it.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Drain: an attempt was stopped with reads in flight, and all of them completed.
    pub drained: AtomicU64,
    /// ERR and drain.
    pub error: AtomicU64,
    /// Destroy.
    pub destroyed: AtomicU64,
    /// Close the device.
    pub closed: AtomicU64,
    /// No stage succeeded.
    pub wedged: AtomicU64,
    /// Nanoseconds in which stopped attempts drained.
    pub drain_nanos: AtomicU64,
    /// Nanoseconds in ERR, draining.
    pub error_nanos: AtomicU64,
    /// Nanoseconds of destruction.
    pub destroy_nanos: AtomicU64,
    /// Nanoseconds of closing devices.
    pub close_nanos: AtomicU64,
}

impl Counters {
    /// Each stage's name, how often it was the last one, and the time spent in it.
    pub(crate) fn stages(&self) -> [(&'static str, u64, Option<Duration>); 5] {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let time = |n: &AtomicU64| Some(Duration::from_nanos(get(n)));
        [
            ("drain", get(&self.drained), time(&self.drain_nanos)),
            ("error", get(&self.error), time(&self.error_nanos)),
            ("destroy", get(&self.destroyed), time(&self.destroy_nanos)),
            ("close", get(&self.closed), time(&self.close_nanos)),
            ("wedged", get(&self.wedged), None),
        ]
    }
}

impl Counters {}

/// This process's counters.
pub(crate) static COUNTERS: Counters = Counters {
    drained: AtomicU64::new(0),
    drain_nanos: AtomicU64::new(0),
    error: AtomicU64::new(0),
    destroyed: AtomicU64::new(0),
    closed: AtomicU64::new(0),
    wedged: AtomicU64::new(0),
    error_nanos: AtomicU64::new(0),
    destroy_nanos: AtomicU64::new(0),
    close_nanos: AtomicU64::new(0),
};

/// Counts an attempt that drained by itself.
pub(crate) fn drained(took: Duration) {
    COUNTERS.drained.fetch_add(1, Ordering::Relaxed);
    COUNTERS.drain_nanos.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
}

/// The times of one teardown: its start, and the duration of each completed stage.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Times {
    began: Instant,
    error: Duration,
    destroy: Duration,
}

impl Times {
    /// A teardown begins with ERR.
    pub(crate) fn from(now: Instant) -> Self {
        Self { began: now, error: Duration::ZERO, destroy: Duration::ZERO }
    }

    /// ERR did not drain the rail.
    pub(crate) fn not_drained(self, now: Instant) -> Self {
        Self { error: now.saturating_duration_since(self.began), ..self }
    }

    /// Destruction did not succeed either.
    pub(crate) fn not_destroyed(self, now: Instant) -> Self {
        Self { destroy: now.saturating_duration_since(self.began).saturating_sub(self.error), ..self }
    }

    /// Counts and logs the outcome.
    pub(crate) fn finish(self, rail: &str, peer: &str, outcome: Outcome, now: Instant) {
        let took = now.saturating_duration_since(self.began);
        let (mut error, mut destroy, mut close) = (self.error, self.destroy, Duration::ZERO);
        let left = took.saturating_sub(error).saturating_sub(destroy);
        let counter = match outcome {
            Outcome::Drained => {
                error = left;
                &COUNTERS.error
            }
            Outcome::Destroyed => {
                destroy = left;
                &COUNTERS.destroyed
            }
            Outcome::Closed => {
                close = left;
                &COUNTERS.closed
            }
            Outcome::Wedged => {
                close = left;
                &COUNTERS.wedged
            }
        };
        counter.fetch_add(1, Ordering::Relaxed);
        let times =
            [(&COUNTERS.error_nanos, error), (&COUNTERS.destroy_nanos, destroy), (&COUNTERS.close_nanos, close)];
        for (sum, time) in times {
            sum.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
        match outcome {
            Outcome::Drained => tracing::debug!(rail, peer, ?error, "verbs rail quiet"),
            Outcome::Wedged => tracing::error!(
                rail,
                peer,
                ?error,
                ?destroy,
                ?close,
                "verbs rail wedged: its READs cannot be stopped; restart this process"
            ),
            _ => {
                tracing::warn!(rail, peer, ?error, ?destroy, ?close, "verbs rail quiet, after it did not drain in ERR")
            }
        }
    }
}

/// How a teardown ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// ERR drained it.
    Drained,
    /// Its queue pairs were destroyed.
    Destroyed,
    /// Its device was closed.
    Closed,
    /// Nothing stopped it.
    Wedged,
}

/// The stage of a rail of a lane.
#[derive(Debug)]
pub(crate) enum Stage {
    /// In use.
    Live,
    /// Its queue pairs are in ERR, or on the way there, and their requests are being flushed.
    Error { since: Instant, times: Times, pairs: FailingPairs },
    /// Its queue pairs are being destroyed on another thread.
    Destroying { since: Instant, times: Times, destruction: Destruction },
    /// Its device is being closed.
    Closing { since: Instant, times: Times, closing: Closing },
    /// It cannot write memory any more.
    Quiet,
    /// It may write memory at any later time.
    Wedged,
}

impl Stage {
    /// When the rail must be looked at again.
    pub(crate) fn until(&self) -> Option<Instant> {
        match self {
            Self::Error { since, .. } => Some(*since + ERR_BOUND),
            Self::Destroying { since, .. } => Some(*since + DESTROY_BOUND),
            // No bell rings when a device has closed: look often.
            Self::Closing { since, .. } => Some((*since + WEDGED_AFTER).min(Instant::now() + Duration::from_millis(2))),
            Self::Live | Self::Quiet | Self::Wedged => None,
        }
    }

    pub(crate) fn is_live(&self) -> bool {
        matches!(self, Self::Live)
    }

    pub(crate) fn is_quiet(&self) -> bool {
        matches!(self, Self::Quiet)
    }
}

/// Queue pairs that another thread moves to ERR. That is a command to the device's firmware; if it hangs, the thread that
/// drives all lanes must go on.
#[derive(Debug, Clone)]
pub(crate) struct FailingPairs(Arc<(Mutex<Option<Vec<Qp>>>, Condvar)>);

impl FailingPairs {
    /// Begins to move them.
    pub(crate) fn begin(pairs: Vec<Qp>, rail: &str) -> Self {
        let it = Self(Arc::default());
        let (theirs, rail) = (it.clone(), rail.to_owned());
        cleanup::spawn("kvferry-err", move || {
            // A pair that is in ERR already stays there. A pair that cannot be moved does not flush, and is destroyed.
            for error in pairs.iter().filter_map(|qp| qp.fail().err()) {
                tracing::debug!(rail, %error, "queue pair cannot be moved to ERR");
            }
            *theirs.pairs() = Some(pairs);
            theirs.0.1.notify_all();
        });
        it
    }

    fn pairs(&self) -> MutexGuard<'_, Option<Vec<Qp>>> {
        // The list is consistent after any panic: it is only set and taken as a whole.
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for them, and takes them. Called once, on a thread that may block.
    pub(crate) fn wait(&self) -> Vec<Qp> {
        let mut pairs = self.pairs();
        loop {
            match pairs.take() {
                Some(pairs) => return pairs,
                None => pairs = self.0.1.wait(pairs).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// The destruction of a rail's queue pairs, on another thread.
#[derive(Debug, Clone)]
pub(crate) struct Destruction(Arc<AtomicU8>);

impl Destruction {
    /// Begins, and rings `bell` at the end. Completions of the pairs that were not polled by then have no effect.
    pub(crate) fn begin(pairs: FailingPairs, bell: Bell) -> Self {
        let state = Arc::new(AtomicU8::new(0));
        let theirs = state.clone();
        cleanup::spawn("kvferry-destroy", move || {
            let mut good = true;
            for qp in pairs.wait() {
                if let Err(error) = qp.destroy() {
                    tracing::error!(%error, "a queue pair cannot be destroyed");
                    good = false;
                }
            }
            theirs.store(if good { 1 } else { 2 }, Ordering::Release);
            bell.ring();
        });
        Self(state)
    }

    /// Whether it succeeded; `None` while it runs.
    fn result(&self) -> Option<bool> {
        match self.0.load(Ordering::Acquire) {
            0 => None,
            n => Some(n == 1),
        }
    }

    /// The next step.
    pub(crate) fn step(&self, since: Instant, now: Instant) -> Step {
        match self.result() {
            Some(true) => Step::Quiet,
            Some(false) => Step::Escalate,
            None if now >= since + DESTROY_BOUND => Step::Escalate,
            None => Step::Wait,
        }
    }
}

/// The next step of a teardown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Look again later.
    Wait,
    /// The stage made the rail quiet.
    Quiet,
    /// Go on to the next stage.
    Escalate,
}

/// The next step while a device is being closed.
pub(crate) fn closing(closing: &Closing, since: Instant, now: Instant) -> Step {
    match closing.state() {
        Closed::Yes => Step::Quiet,
        Closed::Failed => Step::Escalate,
        Closed::NotYet if now >= since + WEDGED_AFTER => Step::Escalate,
        Closed::NotYet => Step::Wait,
    }
}
