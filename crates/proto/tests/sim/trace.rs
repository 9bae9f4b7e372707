//! The trace of a seed for a reader, and the violation that ended it.

use std::{collections::VecDeque, fmt};

/// Microseconds of virtual time.
pub(crate) type Micros = u64;

/// The promises that are checked, named as in the contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Promise {
    Exact,
    Fresh,
    Timely,
    Quiet,
    Frugal,
    LeakFree,
    Isolated,
    Healing,
    /// A machine panicked, span, or broke its interface.
    Sound,
}

/// A promise that was broken.
#[derive(Debug, Clone)]
pub(crate) struct Violation {
    pub promise: Promise,
    pub at: Micros,
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} broken at {}: {}", self.promise, Stamp(self.at), self.what)
    }
}

/// The last events. Costs nothing while it is off.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    pub on: bool,
    lines: VecDeque<String>,
    pub keep: usize,
}

impl Trace {
    pub(crate) fn line(&mut self, now: Micros, text: fmt::Arguments<'_>) {
        if self.lines.len() >= self.keep {
            self.lines.pop_front();
        }
        self.lines.push_back(format!("{} {text}", Stamp(now)));
    }

    pub(crate) fn lines(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().map(String::as_str)
    }
}

/// A time, readable.
struct Stamp(Micros);

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>6}.{:03} ms", self.0 / 1000, self.0 % 1000)
    }
}
