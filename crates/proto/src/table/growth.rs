//! The growth of an open offer: which growths wait for their data, and how much of them each claim knows.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use super::entry::ClaimKey;
use crate::{BadOffer, Contents, Extent, Growth};

/// Between two `Grown` frames of a claim; the last one does not wait. A step of an engine takes longer, and a consumer that
/// hears of blocks 10 ms late still reads them before the next step is over.
pub(super) const GROWN_EVERY: Duration = Duration::from_millis(10);

/// The growth of an open offer.
#[derive(Debug)]
pub(super) struct Growing {
    /// Growths that are not applied, in the order of the calls, and whether the data of each is in place. Their numbers ascend.
    queue: VecDeque<(u64, Growth, bool)>,
    applied: u64,
    /// The extent once the queue is applied.
    planned: Extent,
    /// The growth that each claim knows of: the number of growths, and their extent.
    told: BTreeMap<ClaimKey, (u64, Extent)>,
    told_at: Option<Instant>,
    /// When the claims are told.
    due: Option<Instant>,
}

impl Growing {
    pub(super) fn new(contents: &Contents) -> Self {
        Self {
            queue: VecDeque::new(),
            applied: 0,
            planned: Extent::of(contents),
            told: BTreeMap::new(),
            told_at: None,
            due: None,
        }
    }

    /// Queues a growth under a number that is unique in the table. Drops a growth that brings nothing.
    pub(super) fn add(&mut self, number: u64, mut growth: Growth, ready: bool, limit: usize) -> Result<(), BadOffer> {
        growth.groups.retain(|g| !g.blocks.is_empty());
        if growth.is_empty_after(self.planned.tokens()) && !self.planned.is_complete() {
            return Ok(());
        }
        self.planned.grow(&growth, limit)?;
        self.queue.push_back((number, growth, ready));
        Ok(())
    }

    /// The data of the growth with this number is in place.
    pub(super) fn placed(&mut self, number: u64) {
        if let Ok(at) = self.queue.binary_search_by_key(&number, |(number, ..)| *number) {
            self.queue[at].2 = true;
        }
    }

    /// The next growth to apply, if its data and that of all earlier growths is in place. `early`: even if it is not.
    pub(super) fn next(&mut self, early: bool) -> Option<Growth> {
        self.queue.front().filter(|(.., ready)| *ready || early)?;
        let (_, growth, _) = self.queue.pop_front()?;
        self.applied += 1;
        Some(growth)
    }

    /// Whether the last growth waits in the queue.
    pub(super) fn ends(&self) -> bool {
        self.planned.is_complete()
    }

    /// A claim was granted with these contents.
    pub(super) fn granted(&mut self, key: ClaimKey, contents: &Contents) {
        self.told.insert(key, (self.applied, Extent::of(contents)));
    }

    /// Number of growths that were applied.
    pub(super) fn applied(&self) -> u64 {
        self.applied
    }

    /// Growths were applied. Returns when to tell the claims.
    pub(super) fn tell_at(&mut self, now: Instant, complete: bool) -> Instant {
        let at = match self.told_at {
            Some(last) if !complete => now.max(last + GROWN_EVERY),
            _ => now,
        };
        *self.due.insert(self.due.map_or(at, |due| due.min(at)))
    }

    /// When the claims are told next; `None`: they know everything.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// For each claim that is behind: the number of growths that it knows of, and the gain since then.
    pub(super) fn news(
        &mut self,
        at: Instant,
        contents: &Contents,
        claims: impl Iterator<Item = ClaimKey>,
    ) -> Vec<(ClaimKey, u64, Growth)> {
        (self.due, self.told_at) = (None, Some(at));
        let now = (self.applied, Extent::of(contents));
        let mut told = std::mem::take(&mut self.told);
        let mut news = Vec::new();
        for key in claims {
            if let Some((after, known)) = told.remove(&key).filter(|(after, _)| *after != self.applied) {
                news.push((key, after, contents.since(&known)));
            }
            self.told.insert(key, now.clone());
        }
        news
    }
}
