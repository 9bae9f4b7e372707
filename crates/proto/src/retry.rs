//! When to try again: exponential backoff with jitter, so that a thousand consumers of a restarted peer do not come at once.

use std::time::Duration;

/// Waits that double from `min` to `max`, each cut by up to a half at random.
#[derive(Debug, Clone)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    tries: u32,
}

impl Backoff {
    /// A backoff that has not failed yet.
    pub fn new(min: Duration, max: Duration) -> Self {
        Self { min, max, tries: 0 }
    }

    /// The wait after one more failure. `random` is any 64-bit number.
    pub fn next(&mut self, random: u64) -> Duration {
        let full = self.min.saturating_mul(1 << self.tries.min(20)).min(self.max);
        self.tries = self.tries.saturating_add(1);
        // Half of it for sure, the other half at random.
        let half = full / 2;
        half + half.mul_f64((random >> 11) as f64 / (1u64 << 53) as f64)
    }

    /// It worked: start from the shortest wait again.
    pub fn reset(&mut self) {
        self.tries = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_longest_and_never_beyond() {
        let (min, max) = (Duration::from_millis(20), Duration::from_secs(2));
        for random in [0, u64::MAX, 1 << 63] {
            let mut b = Backoff::new(min, max);
            let waits: Vec<_> = (0..100).map(|_| b.next(random)).collect();
            assert!(waits.iter().all(|w| *w >= min / 2 && *w <= max), "{waits:?}");
            assert!(waits.windows(2).all(|w| w[0] <= w[1]), "{waits:?}");
            assert!(waits[99] >= max / 2);
            b.reset();
            assert_eq!(b.next(random), waits[0]);
        }
    }
}
