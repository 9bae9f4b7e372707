//! What a lane's owner sleeps on: one descriptor for completions, for the lane's own deadlines, and for other threads;
//! and whether it sleeps at all.

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

/// Wakes a lane from another thread. Ringing twice is as good as once.
#[derive(Debug, Clone)]
pub(crate) struct Bell(Arc<OwnedFd>);

impl Bell {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    pub(crate) fn ring(&self) {
        // It can only fail when it rings already.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    pub(crate) fn silence(&self) {
        let _ = rustix::io::read(&*self.0, &mut [0u8; 8]);
    }

    /// Whether anybody else could still ring it.
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
    /// When the timer goes off, if it is set.
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

    /// Wakes when this one is readable. It leaves by itself when it is closed.
    pub(crate) fn watch(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(epoll::add(&self.all, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?)
    }

    /// Wakes at `when` at the latest. One that is set earlier stays: to wake too early costs one poll.
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

/// Whether a lane looks for the end of little data before it sleeps: see
/// [`VerbsConfig::spin`](crate::config::VerbsConfig::spin).
#[derive(Debug)]
pub(crate) struct Spin {
    /// How long, from when something moved last.
    span: Duration,
    /// Something was posted, or came back, since this was last asked for.
    moved: bool,
    until: Option<Instant>,
}

impl Spin {
    /// What counts as little, in bytes.
    const LITTLE: u64 = 64 << 10;
    /// Looks of one poll. One takes some 10 ns for each rail and a turn 180 (`speed_of_a_turn`), so that with one rail other
    /// lanes wait half a microsecond at most.
    const LOOKS: u32 = 32;

    pub(crate) fn new(span: Duration) -> Self {
        Self { span, moved: false, until: None }
    }

    /// Something was posted, or came back.
    #[inline]
    pub(crate) fn moved(&mut self) {
        self.moved = true;
    }

    /// How often to look again at once where nothing has come of so many bytes in flight: what is looked for is then found
    /// sooner than once a turn.
    pub(crate) fn looks(&self, bytes: Option<u64>) -> u32 {
        if self.until.is_some() && bytes.is_some_and(|b| b <= Self::LITTLE) { Self::LOOKS } else { 0 }
    }

    /// Whether to look on, with this many bytes in flight; `None`: nothing is in flight.
    pub(crate) fn goes_on(&mut self, bytes: Option<u64>, clock: impl FnOnce() -> Instant) -> bool {
        if self.span.is_zero() || bytes.is_none_or(|b| b > Self::LITTLE) {
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

/// Runs `work` on a thread of its own, which may block: destroying verbs objects waits for the device. Without a thread it
/// runs here, which is late but right.
pub(crate) fn undertake(name: &str, work: impl FnOnce() + Send + 'static) {
    let slot = Arc::new(std::sync::Mutex::new(Some(work)));
    let theirs = slot.clone();
    let take = |s: &std::sync::Mutex<Option<_>>| s.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
    let run = move || {
        if let Some(work) = take(&theirs) {
            work();
        }
    };
    if std::thread::Builder::new().name(name.into()).spawn(run).is_err()
        && let Some(work) = take(&slot)
    {
        work();
    }
}
