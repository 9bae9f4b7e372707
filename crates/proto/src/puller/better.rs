//! When to look for a better lane than the one that a peer is read over: one of a kind that is preferred and was not to be
//! had, or one with all of its paths. Never reads a clock, and knows no lane.

use std::time::{Duration, Instant};

/// How long to wait with a look for a better lane.
#[derive(Debug, Clone, Copy)]
pub struct Waits {
    /// After something worse than possible is noticed.
    pub first: Duration,
    /// At most.
    pub longest: Duration,
}

/// The wait for the next look; doubles with each look until all has been well for a while.
#[derive(Debug, Default)]
pub struct Better {
    next: Option<(Instant, Duration)>,
}

impl Better {
    /// What is used is worse than what might be had. `true`: look for it now.
    pub fn look(&mut self, now: Instant, waits: Waits) -> bool {
        match self.next {
            None => {
                self.next = Some((after(now, waits.first), waits.first));
                false
            }
            Some((at, _)) if now < at => false,
            Some((_, wait)) => {
                let wait = wait.saturating_mul(2).min(waits.longest);
                self.next = Some((after(now, wait), wait));
                true
            }
        }
    }

    /// What is used is the best there is.
    pub fn well(&mut self, now: Instant) {
        // For as long again as the wait was: what fails every few seconds is not tried every few seconds.
        if self.next.is_some_and(|(at, wait)| now >= after(at, wait)) {
            self.next = None;
        }
    }
}

/// A wait that no clock can hold is as good as for ever: a year.
fn after(now: Instant, wait: Duration) -> Instant {
    now + wait.min(Duration::from_secs(365 * 86_400))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAITS: Waits = Waits { first: Duration::from_secs(1), longest: Duration::from_secs(60) };

    #[test]
    fn looks_get_rarer_until_all_was_well_for_long() {
        let (mut b, mut now) = (Better::default(), Instant::now());
        assert!(!b.look(now, WAITS), "what failed just now is not tried at once");
        let mut waits = Vec::new();
        for _ in 0..8 {
            let since = now;
            while !b.look(now, WAITS) {
                now += Duration::from_millis(100);
            }
            waits.push((now - since).as_secs());
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
        let never = Waits { first: Duration::MAX, longest: Duration::MAX };
        let mut off = Better::default();
        assert!(!off.look(now, never) && !off.look(now + WAITS.longest, never), "it can be turned off");
        off.well(now);
        b.well(now + WAITS.longest);
        assert!(!b.look(now + WAITS.longest - WAITS.first, WAITS), "it may have been well for a moment only");
        b.well(now + 2 * WAITS.longest);
        assert!(!b.look(now + 2 * WAITS.longest, WAITS));
        assert!(b.look(now + 2 * WAITS.longest + WAITS.first, WAITS));
    }
}
