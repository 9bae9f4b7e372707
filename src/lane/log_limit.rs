//! A limit on log lines about strangers, who must not fill the log.

use std::time::{Duration, Instant};

/// Shortest time between two lines.
const EVERY: Duration = Duration::from_secs(1);

/// Lets one line a second through.
#[derive(Debug, Default)]
pub(super) struct LogLimit {
    last: Option<Instant>,
    held_back: u64,
}

impl LogLimit {
    /// An event to log: the number of events before it that were not logged, if it may be logged now.
    pub(super) fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now.saturating_duration_since(last) < EVERY) {
            self.held_back += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.held_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_gets_one_line_a_second_with_the_number_of_the_others() {
        let (mut limit, start) = (LogLimit::default(), Instant::now());
        assert_eq!(limit.admit(start), Some(0));
        for _ in 0..1000 {
            assert_eq!(limit.admit(start + EVERY / 2), None);
        }
        assert_eq!(limit.admit(start + EVERY), Some(1000));
        assert_eq!(limit.admit(start + EVERY), None);
        assert_eq!(limit.admit(start + EVERY * 2), Some(1));
    }
}
