//! The ladder: how a rail of a lane is made quiet when it does not become so by itself.
//!
//! Drain, then ERR and drain, then destroy, then close the device; what even that does not stop is wedged. Each rung has
//! its own limit, which is never the transport's: transports that never report an error are normal. Each is counted, and
//! the whole climb is logged once.

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    cq::Cq,
    device::{Closed, Closing},
    qp::Qp,
    wake::{Bell, undertake},
};

/// After ERR a device flushes what is posted within a millisecond or so; an emulated one under load in ten.
pub(crate) const ERR_BOUND: Duration = Duration::from_millis(150);
/// Destroying is a command to the device's firmware: milliseconds, tens of them when it is busy. The next rung takes the
/// device from all other lanes on it, so a loaded machine gets time.
pub(crate) const DESTROY_BOUND: Duration = Duration::from_millis(300);
/// Closing destroys whatever is left.
pub(crate) const CLOSE_BOUND: Duration = Duration::from_millis(130);
/// When one that does not close is given up as wedged. Long after the bound: a pull has decided by then, and nothing is
/// gained by an early verdict that costs the engine its blocks. A machine with four builds on two cores took 120 ms to
/// run the thread that closes; a lane to another peer that is just being connected holds the device for up to
/// `hello_timeout` (5 s), and a registration that is under way for about as long.
pub(crate) const WEDGED_AFTER: Duration = Duration::from_secs(10);

/// All of it, once the first rung (to stop posting and let it drain) has had its time.
pub(crate) const BOUND: Duration = ERR_BOUND.saturating_add(DESTROY_BOUND).saturating_add(CLOSE_BOUND);

/// How often each rung was what made something quiet, in this process, and how long it took.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Drain: an attempt that was stopped with reads in flight, which all came back.
    pub drained: AtomicU64,
    /// ERR and drain.
    pub error: AtomicU64,
    /// Destroy.
    pub destroyed: AtomicU64,
    /// Close the device.
    pub closed: AtomicU64,
    /// Nothing did.
    pub wedged: AtomicU64,
    /// Nanoseconds that stopped attempts took to drain.
    pub drain_nanos: AtomicU64,
    /// Nanoseconds in ERR, draining.
    pub error_nanos: AtomicU64,
    /// Nanoseconds being destroyed.
    pub destroy_nanos: AtomicU64,
    /// Nanoseconds in which the device was being closed.
    pub close_nanos: AtomicU64,
}

impl Counters {
    /// Each rung's name, how often it was the last one, and how long it was stood on.
    pub(crate) fn rungs(&self) -> [(&'static str, u64, Option<Duration>); 5] {
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

/// A climb: when it began, and how long the rungs before this one took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Climb {
    began: Instant,
    error: Duration,
    destroy: Duration,
}

impl Climb {
    /// On the first rung.
    pub(crate) fn from(now: Instant) -> Self {
        Self { began: now, error: Duration::ZERO, destroy: Duration::ZERO }
    }

    /// ERR did not do it.
    pub(crate) fn not_drained(self, now: Instant) -> Self {
        Self { error: now.saturating_duration_since(self.began), ..self }
    }

    /// Neither did destroying.
    pub(crate) fn not_destroyed(self, now: Instant) -> Self {
        Self { destroy: now.saturating_duration_since(self.began).saturating_sub(self.error), ..self }
    }

    /// Counts and logs the end of it; `rung` is the one that it ended on.
    pub(crate) fn end(self, rail: &str, peer: &str, rung: Last, now: Instant) {
        let took = now.saturating_duration_since(self.began);
        let (mut error, mut destroy, mut close) = (self.error, self.destroy, Duration::ZERO);
        let left = took.saturating_sub(error).saturating_sub(destroy);
        let counter = match rung {
            Last::Error => {
                error = left;
                &COUNTERS.error
            }
            Last::Destroy => {
                destroy = left;
                &COUNTERS.destroyed
            }
            Last::Close => {
                close = left;
                &COUNTERS.closed
            }
            Last::Wedged => {
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
        match rung {
            Last::Error => tracing::debug!(rail, peer, ?error, "verbs rail quiet"),
            Last::Wedged => tracing::error!(
                rail,
                peer,
                ?error,
                ?destroy,
                ?close,
                "verbs rail wedged: nothing stops it; restart this process"
            ),
            _ => {
                tracing::warn!(rail, peer, ?error, ?destroy, ?close, "verbs rail quiet, after it did not drain in ERR")
            }
        }
    }
}

/// The rung that a climb ended on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Last {
    Error,
    Destroy,
    Close,
    Wedged,
}

/// Where a rail of a lane stands.
#[derive(Debug)]
pub(crate) enum Rung {
    /// In use.
    Live,
    /// In ERR, or on the way there; its flushed requests are awaited.
    Error { since: Instant, climb: Climb, pairs: Erring },
    /// Being destroyed on another thread.
    Destroying { since: Instant, climb: Climb, job: Job },
    /// Its device is being closed.
    Closing { since: Instant, climb: Climb, closing: Closing },
    /// Nothing of it can write memory any more.
    Quiet,
    /// It may write memory for ever.
    Wedged,
}

impl Rung {
    /// When this rung's time is over.
    pub(crate) fn until(&self) -> Option<Instant> {
        match self {
            Self::Error { since, .. } => Some(*since + ERR_BOUND),
            Self::Destroying { since, .. } => Some(*since + DESTROY_BOUND),
            // There is nobody who rings when a device has closed: look often.
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

/// Queue pairs that another thread moves to ERR: that is a command to the device's firmware, and one that hangs must not
/// keep the thread that all lanes are driven by.
#[derive(Debug, Clone)]
pub(crate) struct Erring(Arc<(Mutex<Option<Vec<Qp>>>, Condvar)>);

impl Erring {
    /// Begins.
    pub(crate) fn begin(pairs: Vec<Qp>, rail: &str) -> Self {
        let it = Self(Arc::default());
        let (theirs, rail) = (it.clone(), rail.to_owned());
        undertake("kvferry-err", move || {
            // One that is in ERR already stays there. One that cannot be moved does not flush, and is destroyed.
            for error in pairs.iter().filter_map(|qp| qp.fail().err()) {
                tracing::debug!(rail, %error, "queue pair cannot be moved to ERR");
            }
            *theirs.pairs() = Some(pairs);
            theirs.0.1.notify_all();
        });
        it
    }

    fn pairs(&self) -> MutexGuard<'_, Option<Vec<Qp>>> {
        // The list is whole at any time.
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
pub(crate) struct Job(Arc<AtomicU8>);

impl Job {
    /// Begins. `bell` is rung when it is done. Completions of the pairs that are not polled by then never matter.
    pub(crate) fn destroy(pairs: Erring, bell: Bell) -> Self {
        let state = Arc::new(AtomicU8::new(0));
        let theirs = state.clone();
        undertake("kvferry-destroy", move || {
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

    /// `None`: not yet.
    pub(crate) fn done(&self) -> Option<bool> {
        match self.0.load(Ordering::Acquire) {
            0 => None,
            n => Some(n == 1),
        }
    }
}

/// Gives queue pairs that are quiet back to the device, on another thread, and then what they used.
pub(crate) fn bury(pairs: impl FnOnce() -> Vec<Qp> + Send + 'static, queue: Option<Cq>, rest: impl Send + 'static) {
    undertake("kvferry-bury", move || {
        drop(pairs());
        drop(queue);
        drop(rest);
    });
}

/// What came out of a rung.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing yet.
    Wait,
    /// Quiet.
    Quiet,
    /// The next rung.
    Next,
}

/// Looks at the destroying rung.
pub(crate) fn destroying(job: &Job, since: Instant, now: Instant) -> Step {
    match job.done() {
        Some(true) => Step::Quiet,
        Some(false) => Step::Next,
        None if now >= since + DESTROY_BOUND => Step::Next,
        None => Step::Wait,
    }
}

/// Looks at the closing rung.
pub(crate) fn closing(closing: &Closing, since: Instant, now: Instant) -> Step {
    match closing.state() {
        Closed::Well => Step::Quiet,
        Closed::Badly => Step::Next,
        Closed::Not if now >= since + WEDGED_AFTER => Step::Next,
        Closed::Not => Step::Wait,
    }
}
