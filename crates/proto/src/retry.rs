//! When to try again: the one back-off of the project.
//!
//! Deterministic, and without a clock: the caller passes the time, and a random number where many processes would otherwise
//! try again in step.

use std::time::{Duration, Instant};

/// Waits that double from `min` to `max` with each failure, until [`Backoff::reset`].
///
/// ```
/// # use std::time::Duration;
/// # use kvferry_proto::retry::Backoff;
/// let ms = Duration::from_millis;
/// let mut backoff = Backoff::new(ms(20), ms(100));
/// assert_eq!([(); 4].map(|()| backoff.wait()), [ms(20), ms(40), ms(80), ms(100)]);
/// backoff.reset();
/// let jittered = backoff.wait_jittered(u64::MAX / 2);
/// assert!(ms(10) <= jittered && jittered <= ms(20));
/// ```
#[derive(Debug, Clone)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    /// The next wait, before `max` bounds it.
    next: Duration,
}

impl Backoff {
    /// A back-off without a failure yet. `min` is the first wait and `max` the longest; a `min` above `max` counts as `max`.
    pub const fn new(min: Duration, max: Duration) -> Self {
        Self { min, max, next: min }
    }

    /// The wait after one more failure, exactly.
    pub fn wait(&mut self) -> Duration {
        let wait = self.next.min(self.max);
        self.next = wait.saturating_mul(2);
        wait
    }

    /// The wait after one more failure, shortened by up to a half. `random` is any 64-bit number. For waits for a shared
    /// peer: a thousand consumers of a restarted producer must not dial at the same moment.
    pub fn wait_jittered(&mut self, random: u64) -> Duration {
        let half = self.wait() / 2;
        half + half.mul_f64((random >> 11) as f64 / (1u64 << 53) as f64)
    }

    /// The end of [`Backoff::wait`] from `now` on. A wait that [`Instant`] cannot express counts as a year.
    pub fn wait_from(&mut self, now: Instant) -> Instant {
        const YEAR: Duration = Duration::from_secs(365 * 86_400);
        now + self.wait().min(YEAR)
    }

    /// A success: the next wait is the shortest again.
    pub fn reset(&mut self) {
        self.next = self.min;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIN: Duration = Duration::from_millis(20);
    const MAX: Duration = Duration::from_secs(2);

    #[test]
    fn waits_double_to_the_longest_and_never_exceed_it() {
        let mut b = Backoff::new(MIN, MAX);
        let waits: Vec<_> = (0..9).map(|_| b.wait().as_millis()).collect();
        assert_eq!(waits, [20, 40, 80, 160, 320, 640, 1280, 2000, 2000]);
        b.reset();
        assert_eq!(b.wait(), MIN);
        assert_eq!(Backoff::new(MAX, MIN).wait(), MIN, "max bounds the first wait too");
    }

    #[test]
    fn jitter_cuts_up_to_a_half_and_keeps_the_order() {
        for random in [0, u64::MAX, 1 << 63] {
            let (mut exact, mut b) = (Backoff::new(MIN, MAX), Backoff::new(MIN, MAX));
            let waits: Vec<_> = (0..100).map(|_| (exact.wait(), b.wait_jittered(random))).collect();
            assert!(waits.iter().all(|(e, w)| *w >= *e / 2 && w <= e), "{waits:?}");
            assert!(waits.windows(2).all(|w| w[0].1 <= w[1].1), "{waits:?}");
        }
        let (mut low, mut high) = (Backoff::new(MIN, MAX), Backoff::new(MIN, MAX));
        assert!(low.wait_jittered(0) < high.wait_jittered(u64::MAX));
    }

    #[test]
    fn a_wait_that_no_clock_can_hold_is_a_year() {
        let now = Instant::now();
        let mut b = Backoff::new(Duration::MAX, Duration::MAX);
        assert_eq!(b.wait_from(now) - now, Duration::from_secs(365 * 86_400));
        assert_eq!(b.wait(), Duration::MAX);
    }
}
