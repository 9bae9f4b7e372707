//! The descriptor that a lane's owner sleeps on, readable on completions, at the lane's deadlines, and when another thread
//! rings; and the decision to poll instead of sleeping.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    event::{EventfdFlags, epoll, eventfd},
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime},
};

/// Wakes a lane from another thread. Ringing twice has the effect of ringing once.
#[derive(Debug, Clone)]
pub(crate) struct Bell(Arc<OwnedFd>);

impl Bell {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    pub(crate) fn ring(&self) {
        // It can fail only if it rings already.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    pub(crate) fn silence(&self) {
        let _ = rustix::io::read(&*self.0, &mut [0u8; 8]);
    }

    /// Whether it has another owner.
    pub(crate) fn shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The descriptor to sleep on.
#[derive(Debug)]
pub(crate) struct Wake {
    all: OwnedFd,
    timer: OwnedFd,
    pub(crate) bell: Bell,
    /// The time at which the timer expires, if it is set.
    set: Option<Instant>,
}

impl Wake {
    pub(crate) fn new() -> io::Result<Self> {
        let all = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        let it = Self { all, timer, bell: Bell::new()?, set: None };
        it.watch(it.timer.as_fd())?;
        it.watch(it.bell.fd())?;
        Ok(it)
    }

    /// Wakes when this descriptor is readable. Closing the descriptor removes it.
    pub(crate) fn watch(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(epoll::add(&self.all, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?)
    }

    /// Wakes at `when` at the latest. An earlier time that is set stays: waking too early costs one poll.
    pub(crate) fn wake_at(&mut self, when: Option<Instant>, now: Instant) -> io::Result<()> {
        let Some(when) = when else { return Ok(()) };
        if self.set.is_some_and(|set| set <= when) {
            return Ok(());
        }
        // Zero would turn the timer off.
        let left = when.saturating_duration_since(now).max(Duration::from_nanos(1));
        let it_value = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        self.set = Some(when);
        Ok(())
    }

    /// After a sleep: makes it unreadable again.
    pub(crate) fn woken(&mut self, now: Instant) {
        self.bell.silence();
        if self.set.is_some_and(|set| set <= now) {
            let _ = rustix::io::read(&self.timer, &mut [0u8; 8]);
            self.set = None;
        }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.all.as_fd()
    }
}

/// Whether a lane polls for the end of a small transfer before it sleeps: see
/// [`VerbsConfig::spin`](crate::config::VerbsConfig::spin).
#[derive(Debug)]
pub(crate) struct Spin {
    /// How long to poll after the last post or completion.
    span: Duration,
    /// A request was posted or completed since `goes_on` was last called.
    moved: bool,
    until: Option<Instant>,
}

impl Spin {
    /// Most bytes in flight of a small transfer.
    const SMALL: u64 = 64 << 10;
    /// Repetitions in one poll. Each takes about 10 ns for each rail, and a turn 180 ns (`speed_of_a_turn`): with one rail,
    /// other lanes wait half a microsecond at most.
    const LOOKS: u32 = 32;

    pub(crate) fn new(span: Duration) -> Self {
        Self { span, moved: false, until: None }
    }

    /// A request was posted or completed.
    #[inline]
    pub(crate) fn moved(&mut self) {
        self.moved = true;
    }

    /// How often one poll repeats with so many bytes in flight until a completion comes: it is then seen sooner than once a
    /// turn.
    pub(crate) fn looks(&self, bytes: Option<u64>) -> u32 {
        if self.until.is_some() && bytes.is_some_and(|b| b <= Self::SMALL) { Self::LOOKS } else { 0 }
    }

    /// Whether to go on polling with so many bytes in flight; `None`: nothing is in flight.
    pub(crate) fn goes_on(&mut self, bytes: Option<u64>, clock: impl FnOnce() -> Instant) -> bool {
        if self.span.is_zero() || bytes.is_none_or(|b| b > Self::SMALL) {
            self.until = None;
            return false;
        }
        let now = clock();
        if std::mem::take(&mut self.moved) {
            self.until = now.checked_add(self.span);
        }
        self.until = self.until.filter(|t| now < *t);
        self.until.is_some()
    }
}
