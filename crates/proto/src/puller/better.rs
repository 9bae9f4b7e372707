//! When to search for a better lane than the one in use: one of a preferred kind that was unavailable, or one with all of
//! its paths. Never reads a clock, and knows no lane.

use std::time::{Duration, Instant};

use crate::retry::Backoff;

/// How long to wait before each search for a better lane.
#[derive(Debug, Clone, Copy)]
pub struct Waits {
    /// From the first use of a worse lane to the first search.
    pub first: Duration,
    /// The longest wait; each wait is twice the one before.
    pub longest: Duration,
}

/// When the next search is due. Waits double with each search until the best lane has been in use for a while.
#[derive(Debug, Default)]
pub(super) struct Search {
    wait: Option<Wait>,
}

#[derive(Debug)]
struct Wait {
    backoff: Backoff,
    from: Instant,
    until: Instant,
}

impl Search {
    /// A worse lane than possible is in use. `true`: search now.
    pub(super) fn due(&mut self, now: Instant, waits: Waits) -> bool {
        let Some(w) = &mut self.wait else {
            let mut backoff = Backoff::new(waits.first, waits.longest);
            let until = backoff.wait_from(now);
            self.wait = Some(Wait { backoff, from: now, until });
            return false;
        };
        let due = now >= w.until;
        if due {
            (w.from, w.until) = (now, w.backoff.wait_from(now));
        }
        due
    }

    /// The best possible lane is in use.
    pub(super) fn not_needed(&mut self, now: Instant) {
        // Forget the waits only after twice the last one: otherwise a lane that fails every few seconds would be
        // replaced every few seconds.
        if self.wait.as_ref().is_some_and(|w| now.saturating_duration_since(w.until) >= w.until - w.from) {
            self.wait = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAITS: Waits = Waits { first: Duration::from_secs(1), longest: Duration::from_secs(60) };

    #[test]
    fn searches_become_rare_until_the_best_lane_has_worked_for_long() {
        let (mut s, mut now) = (Search::default(), Instant::now());
        assert!(!s.due(now, WAITS), "a kind that failed just now is not tried at once");
        let mut waits = Vec::new();
        for _ in 0..8 {
            let since = now;
            while !s.due(now, WAITS) {
                now += Duration::from_millis(100);
            }
            waits.push((now - since).as_secs());
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
        s.not_needed(now + WAITS.longest);
        assert!(!s.due(now + WAITS.longest - WAITS.first, WAITS), "the lane may have worked for a moment only");
        s.not_needed(now + 2 * WAITS.longest);
        assert!(!s.due(now + 2 * WAITS.longest, WAITS));
        assert!(s.due(now + 2 * WAITS.longest + WAITS.first, WAITS));
    }

    #[test]
    fn the_longest_wait_turns_searches_off() {
        let (mut s, now) = (Search::default(), Instant::now());
        let never = Waits { first: Duration::MAX, longest: Duration::MAX };
        assert!(!s.due(now, never) && !s.due(now + WAITS.longest, never));
        s.not_needed(now);
        assert!(!s.due(now + WAITS.longest, never));
    }
}
