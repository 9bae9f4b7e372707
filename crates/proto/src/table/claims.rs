//! The index of all claims on live offers.

use std::collections::HashMap;

use super::entry::ClaimKey;
use crate::{Incarnation, OfferId};

/// The offer of each claim, and the number of claims of each consumer.
#[derive(Default)]
pub(super) struct ClaimIndex {
    offers: HashMap<ClaimKey, OfferId>,
    by_consumer: HashMap<Incarnation, usize>,
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
        }
    }

    pub(super) fn remove(&mut self, key: ClaimKey) {
        if self.offers.remove(&key).is_some()
            && let Some(n) = self.by_consumer.get_mut(&key.0)
        {
            *n -= 1;
            if *n == 0 {
                self.by_consumer.remove(&key.0);
            }
        }
    }
}
