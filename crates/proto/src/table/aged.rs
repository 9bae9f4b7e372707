//! A bounded memory of offers that are not live: tombstones, and names that were used early.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    time::{Duration, Instant},
};

use crate::OfferId;

/// Values by offer. Forgets the oldest when it is full, and each one after a time.
pub(super) struct Aged<V> {
    by_id: HashMap<OfferId, V>,
    /// Oldest first; may list ids that were removed since.
    ages: VecDeque<(Instant, OfferId)>,
    limit: usize,
}

impl<V> Aged<V> {
    pub(super) fn new(limit: usize) -> Self {
        Self { by_id: HashMap::new(), ages: VecDeque::new(), limit: limit.max(1) }
    }

    pub(super) fn get(&self, id: OfferId) -> Option<&V> {
        self.by_id.get(&id)
    }

    /// The value of an id, which is `new` unless it had one.
    pub(super) fn insert(&mut self, now: Instant, id: OfferId, new: V) -> &mut V {
        while self.by_id.len() >= self.limit {
            let Some((_, old)) = self.ages.pop_front() else { break };
            self.by_id.remove(&old);
        }
        match self.by_id.entry(id) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(free) => {
                self.ages.push_back((now, id));
                free.insert(new)
            }
        }
    }

    pub(super) fn remove(&mut self, id: OfferId) -> Option<V> {
        self.by_id.remove(&id)
    }

    /// Forgets values older than `keep`.
    pub(super) fn age(&mut self, now: Instant, keep: Duration) {
        while let Some((_, id)) = self.ages.front().filter(|(t, _)| *t + keep <= now) {
            self.by_id.remove(id);
            self.ages.pop_front();
        }
    }
}
