//! Claims that wait for an offer: it is not entered yet, or not ready. They last no longer than the session that made them, whose
//! consumer claims again in its next one.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use super::entry::ClaimKey;
use crate::{Incarnation, OfferId, Token};

/// A claim that waits.
#[derive(Debug)]
pub(super) struct Wait {
    pub(super) key: ClaimKey,
    pub(super) token: Token,
    since: Instant,
}

/// The claims that wait.
#[derive(Default)]
pub(super) struct Awaiting {
    by_offer: BTreeMap<OfferId, Vec<Wait>>,
    by_consumer: BTreeMap<Incarnation, BTreeSet<OfferId>>,
}

impl Awaiting {
    /// Adds a claim, or finds it. Returns since when it waits; `None`: `limit` claims wait for the offer already.
    pub(super) fn add(
        &mut self,
        now: Instant,
        id: OfferId,
        (key, token): (ClaimKey, Token),
        limit: usize,
    ) -> Option<Instant> {
        let waits = self.by_offer.entry(id).or_default();
        if let Some(wait) = waits.iter_mut().find(|w| w.key == key) {
            wait.token = token;
            return Some(wait.since);
        }
        if waits.len() >= limit {
            return None;
        }
        waits.push(Wait { key, token, since: now });
        self.by_consumer.entry(key.0).or_default().insert(id);
        Some(now)
    }

    /// Removes a claim. `true` when it waited.
    pub(super) fn remove(&mut self, id: OfferId, key: ClaimKey) -> bool {
        let Some(waits) = self.by_offer.get_mut(&id) else { return false };
        let before = waits.len();
        waits.retain(|w| w.key != key);
        let (removed, empty) = (waits.len() < before, waits.is_empty());
        let last = waits.iter().all(|w| w.key.0 != key.0);
        if empty {
            self.by_offer.remove(&id);
        }
        if last {
            self.forget(key.0, id);
        }
        removed
    }

    /// Takes the claims that wait for an offer, in their order.
    pub(super) fn take(&mut self, id: OfferId) -> Vec<Wait> {
        let waits = self.by_offer.remove(&id).unwrap_or_default();
        for w in &waits {
            self.forget(w.key.0, id);
        }
        waits
    }

    /// Takes the claims of a consumer.
    pub(super) fn take_of(&mut self, consumer: Incarnation) -> Vec<ClaimKey> {
        let mut taken = Vec::new();
        for id in self.by_consumer.remove(&consumer).unwrap_or_default() {
            let Some(waits) = self.by_offer.get_mut(&id) else { continue };
            taken.extend(waits.iter().map(|w| w.key).filter(|key| key.0 == consumer));
            waits.retain(|w| w.key.0 != consumer);
            if waits.is_empty() {
                self.by_offer.remove(&id);
            }
        }
        taken
    }

    /// The offers that claims wait for.
    pub(super) fn offers(&self) -> Vec<OfferId> {
        self.by_offer.keys().copied().collect()
    }

    fn forget(&mut self, consumer: Incarnation, id: OfferId) {
        if let Some(offers) = self.by_consumer.get_mut(&consumer) {
            offers.remove(&id);
            if offers.is_empty() {
                self.by_consumer.remove(&consumer);
            }
        }
    }
}
