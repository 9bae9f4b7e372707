//! Token accounting in the simplest way: a list of all events of each token of each prompt.

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
enum LostSource {
    Local,
    External,
}

/// The parts, cheapest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Pending,
    Local,
    External,
    Other(LostSource),
    Own,
    OwnAgain(LostSource),
}

fn classify(history: &[Event]) -> Part {
    let (mut best, mut now, mut lost, mut promised) = (Part::Pending, Part::Pending, None, false);
    for e in history {
        match e {
            Event::Hit => (now, lost) = (Part::Local, None),
            Event::Promised => promised = true,
            Event::Loaded => (now, lost, promised) = (Part::External, None, false),
            Event::Own => (now, lost) = (lost.map_or(Part::Own, Part::OwnAgain), None),
            Event::Other => (now, lost) = (lost.map_or(Part::Local, Part::Other), None),
            Event::Lost => {
                lost = match now {
                    Part::Local => Some(LostSource::Local),
                    Part::External => Some(LostSource::External),
                    Part::Other(w) | Part::OwnAgain(w) => Some(w),
                    Part::Own => None,
                    Part::Pending if promised => Some(LostSource::External),
                    Part::Pending => lost,
                };
                (now, promised) = (Part::Pending, false);
            }
            Event::Preempted => (best, now, promised) = (best.max(now), Part::Pending, false),
        }
    }
    best.max(now)
}

#[derive(Default)]
pub(crate) struct Histories {
    open: BTreeMap<u32, Vec<Vec<Event>>>,
    pub total: Parts,
    /// Prompt tokens that ran through the model.
    pub prefilled: u64,
}

impl Histories {
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
                LostSource::Local => r.local_cache += 1,
                LostSource::External => r.external += 1,
            };
            match classify(t) {
                Part::Pending => p.pending += 1,
                Part::Local => p.local_cache += 1,
                Part::External => p.external += 1,
                Part::Other(w) => one(&mut p.other, w),
                Part::Own => p.first += 1,
                Part::OwnAgain(w) => one(&mut p.own, w),
            }
        }
        Some(p)
    }

    /// Adds the tokens of a request to the total: they are final.
    pub(crate) fn settle(&mut self, id: u32) {
        if let Some(p) = self.parts(id) {
            self.total = self.total.plus(&p);
            self.open.remove(&id);
        }
    }
}
