//! Claims that wait for an offer that is not entered yet, or not ready. A claim lasts for a bounded time, and no longer than its
//! consumer's sessions: in a new session the consumer claims again.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use super::entry::ClaimKey;
use crate::{Incarnation, OfferId, Token};

/// Most claims of one consumer that wait for one offer. It needs one; the others may be of pulls that it has given up.
const MOST: usize = 8;

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
    by_consumer: BTreeMap<Incarnation, BTreeSet<(OfferId, ClaimKey)>>,
    /// Oldest first, without the claims that [`Awaiting::since`] has returned.
    ages: BTreeSet<(Instant, OfferId, ClaimKey)>,
}

impl Awaiting {
    /// Adds a claim, or finds it. `false`: too many claims of its consumer already wait for the offer.
    pub(super) fn add(&mut self, now: Instant, id: OfferId, (key, token): (ClaimKey, Token)) -> bool {
        let waits = self.by_offer.entry(id).or_default();
        if let Some(wait) = waits.iter_mut().find(|w| w.key == key) {
            wait.token = token;
            return true;
        }
        if waits.iter().filter(|w| w.key.0 == key.0).count() >= MOST {
            return false;
        }
        waits.push(Wait { key, token, since: now });
        self.by_consumer.entry(key.0).or_default().insert((id, key));
        self.ages.insert((now, id, key));
        true
    }

    /// Removes a claim. `true` when it waited.
    pub(super) fn remove(&mut self, id: OfferId, key: ClaimKey) -> bool {
        !self.take_if(id, |w| w.key == key).is_empty()
    }

    /// Takes the claims that wait for an offer, in their order.
    pub(super) fn take(&mut self, id: OfferId) -> Vec<Wait> {
        self.take_if(id, |_| true)
    }

    /// Takes the claims that show this token.
    pub(super) fn take_with(&mut self, id: OfferId, token: Token) -> Vec<ClaimKey> {
        self.take_if(id, |w| w.token == token).into_iter().map(|w| w.key).collect()
    }

    /// Takes the claims of a consumer.
    pub(super) fn take_of(&mut self, consumer: Incarnation) -> Vec<ClaimKey> {
        let all = self.by_consumer.get(&consumer).cloned().unwrap_or_default();
        for &(id, key) in &all {
            self.remove(id, key);
        }
        all.into_iter().map(|(_, key)| key).collect()
    }

    /// The offers that claims wait for.
    pub(super) fn offers(&self) -> Vec<OfferId> {
        self.by_offer.keys().copied().collect()
    }

    /// The claims that have waited since then or longer. Returns each claim once.
    pub(super) fn since(&mut self, then: Instant) -> Vec<(OfferId, ClaimKey)> {
        let mut old = Vec::new();
        while let Some(&(since, id, key)) = self.ages.first().filter(|(since, ..)| *since <= then) {
            self.ages.remove(&(since, id, key));
            old.push((id, key));
        }
        old
    }

    /// Since when the oldest claim has waited.
    pub(super) fn first(&self) -> Option<Instant> {
        self.ages.first().map(|(since, ..)| *since)
    }

    fn take_if(&mut self, id: OfferId, which: impl Fn(&Wait) -> bool) -> Vec<Wait> {
        let Some(waits) = self.by_offer.get_mut(&id) else { return Vec::new() };
        let (taken, kept): (Vec<_>, Vec<_>) = std::mem::take(waits).into_iter().partition(which);
        match kept.is_empty() {
            true => drop(self.by_offer.remove(&id)),
            false => *waits = kept,
        }
        for w in &taken {
            self.ages.remove(&(w.since, id, w.key));
            if let Some(all) = self.by_consumer.get_mut(&w.key.0) {
                all.remove(&(id, w.key));
                if all.is_empty() {
                    self.by_consumer.remove(&w.key.0);
                }
            }
        }
        taken
    }
}
