//! The index of all claims on live offers.

use std::collections::{BTreeSet, HashMap};

use super::entry::ClaimKey;
use crate::{Incarnation, OfferId};

/// The offer of each claim, and the number of claims of each consumer.
#[derive(Default)]
pub(super) struct ClaimIndex {
    offers: HashMap<ClaimKey, OfferId>,
    by_consumer: HashMap<Incarnation, usize>,
    /// Consumers whose number of claims changed since they were last taken.
    changed: BTreeSet<Incarnation>,
}

impl ClaimIndex {
    pub(super) fn len(&self) -> usize {
        self.offers.len()
    }

    pub(super) fn offer(&self, key: ClaimKey) -> Option<OfferId> {
        self.offers.get(&key).copied()
    }

    /// Number of claims of a consumer.
    pub(super) fn of_consumer(&self, consumer: Incarnation) -> usize {
        self.by_consumer.get(&consumer).copied().unwrap_or(0)
    }

    pub(super) fn insert(&mut self, key: ClaimKey, offer: OfferId) {
        if self.offers.insert(key, offer).is_none() {
            *self.by_consumer.entry(key.0).or_default() += 1;
            self.changed.insert(key.0);
        }
    }

    /// A consumer whose number of claims changed, with that number.
    pub(super) fn take_changed(&mut self) -> Option<(Incarnation, usize)> {
        let consumer = self.changed.pop_first()?;
        Some((consumer, self.of_consumer(consumer)))
    }

    pub(super) fn remove(&mut self, key: ClaimKey) {
        if self.offers.remove(&key).is_some()
            && let Some(n) = self.by_consumer.get_mut(&key.0)
        {
            *n -= 1;
            self.changed.insert(key.0);
            if *n == 0 {
                self.by_consumer.remove(&key.0);
            }
        }
    }
}
