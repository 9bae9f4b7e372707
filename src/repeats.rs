//! Log lines that repeat: the first of a kind is logged, then at most one a minute, with the number of those in between.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// Shortest time between two lines of a kind.
const EVERY: Duration = Duration::from_secs(60);

/// Kinds that are remembered. Peers choose some of them, so there is a bound; past it, old kinds are forgotten.
const KINDS: usize = 1024;

/// The kinds of lines that were logged lately.
pub(crate) struct Repeats<K>(Mutex<HashMap<K, (Instant, u64)>>);

impl<K> Default for Repeats<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Hash + Eq> Repeats<K> {
    /// Whether to log an event of this kind now, and how many of its kind were not logged since the last line.
    pub(crate) fn is_news(&self, now: Instant, kind: K) -> Option<u64> {
        let mut kinds = self.0.lock();
        if kinds.len() >= KINDS && !kinds.contains_key(&kind) {
            kinds.retain(|_, (at, _)| now < *at + EVERY);
            if kinds.len() >= KINDS {
                kinds.clear();
            }
        }
        match kinds.get_mut(&kind) {
            Some((at, silent)) if now < *at + EVERY => {
                *silent += 1;
                None
            }
            Some(known) => {
                let silent = known.1;
                *known = (now, 0);
                Some(silent)
            }
            None => {
                kinds.insert(kind, (now, 0));
                Some(0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_news_once_a_minute_and_says_how_many_were_not() {
        let (repeats, start) = (Repeats::default(), Instant::now());
        assert_eq!(repeats.is_news(start, "a"), Some(0));
        assert_eq!(repeats.is_news(start, "b"), Some(0));
        for _ in 0..3 {
            assert_eq!(repeats.is_news(start + EVERY / 2, "a"), None);
        }
        assert_eq!(repeats.is_news(start + EVERY, "a"), Some(3));
        assert_eq!(repeats.is_news(start + EVERY, "a"), None);
    }

    #[test]
    fn the_number_of_kinds_is_bounded() {
        let (repeats, now) = (Repeats::default(), Instant::now());
        for kind in 0..3 * KINDS {
            repeats.is_news(now, kind);
        }
        assert!(repeats.0.lock().len() <= KINDS);
    }
}
