//! Which numbered names will never be entered: those that the engine has passed over.
//!
//! A scheduler numbers names as it mints them, and a rank enters them in that order, except where threads and steps of the
//! engine overlap. So a name is passed over once a later one was entered [`LeaseConfig::reorder`](crate::LeaseConfig::reorder)
//! ago. Nothing is known of later names, and of names without a number.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

#[derive(Debug, Default)]
pub(super) struct Order {
    /// Names up to this number have been entered, or never will be.
    passed: u64,
    /// Higher numbers that were entered lately, ascending, and when.
    recent: VecDeque<(Instant, u64)>,
}

impl Order {
    /// A name with this number was entered.
    pub(super) fn entered(&mut self, now: Instant, number: u64, reorder: Duration) {
        self.settle(now, reorder);
        if number > self.recent.back().map_or(self.passed, |(_, n)| *n) {
            self.recent.push_back((now, number));
        }
    }

    /// Whether a name with this number, which was never entered, never will be.
    pub(super) fn has_passed(&mut self, now: Instant, number: u64, reorder: Duration) -> bool {
        self.settle(now, reorder);
        number != 0 && number <= self.passed
    }

    fn settle(&mut self, now: Instant, reorder: Duration) {
        while let Some(&(_, number)) = self.recent.front().filter(|(t, _)| *t + reorder <= now) {
            self.passed = number;
            self.recent.pop_front();
        }
    }
}
