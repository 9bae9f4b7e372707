//! The books, slow and obvious: everything that ever happened to each token of each prompt, in a list.

use std::collections::BTreeMap;

use kvferry::scheduler::tokens::{Parts, Recomputed};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    Hit,
    Promised,
    Loaded,
    Lost,
    Own,
    Other,
    Preempted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Was {
    Local,
    External,
}

/// Cheapest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    Pending,
    Local,
    External,
    Other(Was),
    Own,
    OwnAgain(Was),
}

fn classify(history: &[Event]) -> Class {
    let (mut best, mut now, mut lost, mut promised) = (Class::Pending, Class::Pending, None, false);
    for e in history {
        match e {
            Event::Hit => (now, lost) = (Class::Local, None),
            Event::Promised => promised = true,
            Event::Loaded => (now, lost, promised) = (Class::External, None, false),
            Event::Own => (now, lost) = (lost.map_or(Class::Own, Class::OwnAgain), None),
            Event::Other => (now, lost) = (lost.map_or(Class::Local, Class::Other), None),
            Event::Lost => {
                lost = match now {
                    Class::Local => Some(Was::Local),
                    Class::External => Some(Was::External),
                    Class::Other(w) | Class::OwnAgain(w) => Some(w),
                    Class::Own => None,
                    Class::Pending if promised => Some(Was::External),
                    Class::Pending => lost,
                };
                (now, promised) = (Class::Pending, false);
            }
            Event::Preempted => (best, now, promised) = (best.max(now), Class::Pending, false),
        }
    }
    best.max(now)
}

#[derive(Default)]
pub(crate) struct Books {
    open: BTreeMap<u32, Vec<Vec<Event>>>,
    pub total: Parts,
    /// Prompt tokens that the engine ran through its model.
    pub prefilled: u64,
}

impl Books {
    pub(crate) fn admit(&mut self, id: u32, prompt: u64) {
        self.open.insert(id, vec![Vec::new(); prompt as usize]);
    }

    pub(crate) fn note(&mut self, id: u32, from: u64, to: u64, e: Event) {
        if let Some(tokens) = self.open.get_mut(&id) {
            let to = to.min(tokens.len() as u64) as usize;
            let from = (from as usize).min(to);
            tokens[from..to].iter_mut().for_each(|t| t.push(e));
        }
    }

    pub(crate) fn parts(&self, id: u32) -> Option<Parts> {
        let mut p = Parts::default();
        for t in self.open.get(&id)? {
            let one = |r: &mut Recomputed, w| match w {
                Was::Local => r.local_cache += 1,
                Was::External => r.external += 1,
            };
            match classify(t) {
                Class::Pending => p.pending += 1,
                Class::Local => p.local_cache += 1,
                Class::External => p.external += 1,
                Class::Other(w) => one(&mut p.other, w),
                Class::Own => p.first += 1,
                Class::OwnAgain(w) => one(&mut p.own, w),
            }
        }
        Some(p)
    }

    /// The tokens are final.
    pub(crate) fn settle(&mut self, id: u32) {
        if let Some(p) = self.parts(id) {
            self.total = self.total.plus(&p);
            self.open.remove(&id);
        }
    }
}
