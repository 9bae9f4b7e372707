//! A live offer: its lease, its claims, and the readers that released it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use super::growth::Growing;
use crate::{ClaimId, Contents, EngineId, Incarnation, LeaseConfig, Nonce, PeerId, Release, Token};

/// A claim's key: the consumer's incarnation, and the claim in it.
pub(super) type ClaimKey = (Incarnation, ClaimId);

/// A live offer.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) slot: u32,
    pub(super) nonce: Nonce,
    pub(super) token: Token,
    pub(super) contents: Arc<Contents>,
    pub(super) ready: bool,
    /// While it grows.
    pub(super) growing: Option<Box<Growing>>,
    /// Number of its growths when it became complete.
    pub(super) growths: u64,
    /// The time under which the table's timers list it; its true end may be later.
    pub(super) timer: Instant,
    cap: Instant,
    unclaimed_until: Instant,
    /// Until when each claim holds without a renewal.
    claims: BTreeMap<ClaimKey, Instant>,
    /// Released claims: a late frame of an old stream must not bring one back.
    ended_claims: BTreeSet<ClaimKey>,
    /// Readers that released the offer, by engine.
    released_by: HashMap<EngineId, HashSet<u32>>,
    /// All readers of some engine released it: free it once its last claim is gone.
    done: bool,
}

impl Entry {
    pub(super) fn new(
        now: Instant,
        (slot, nonce): (u32, Nonce),
        token: Token,
        contents: Arc<Contents>,
        ready: bool,
        lease: &LeaseConfig,
    ) -> Self {
        let growing = (!contents.complete).then(|| Box::new(Growing::new(&contents)));
        let mut entry = Self {
            slot,
            nonce,
            token,
            contents,
            ready,
            growing,
            growths: 0,
            timer: now,
            cap: now + lease.hard_cap,
            unclaimed_until: now + lease.unclaimed,
            claims: BTreeMap::new(),
            ended_claims: BTreeSet::new(),
            released_by: HashMap::new(),
            done: false,
        };
        entry.timer = entry.end();
        entry
    }

    /// When it ends if nothing happens before.
    pub(super) fn end(&self) -> Instant {
        let filling = !self.ready || self.growing.is_some();
        // While the engine writes the blocks, no lease runs without a claim.
        let unclaimed = if filling { self.cap } else { self.unclaimed_until };
        self.claims.values().copied().max().unwrap_or(unclaimed).min(self.cap)
    }

    /// The blocks are filled. The time for that was the engine's, so the unclaimed time starts now.
    pub(super) fn set_ready(&mut self, now: Instant, unclaimed: Duration) {
        self.ready = true;
        self.unclaimed_until = now + unclaimed;
    }

    /// The offer is complete.
    pub(super) fn set_complete(&mut self, now: Instant, unclaimed: Duration) {
        self.growths = self.growing.take().map_or(0, |growing| growing.applied());
        self.unclaimed_until = self.unclaimed_until.max(now + unclaimed);
    }

    pub(super) fn claims(&self) -> impl ExactSizeIterator<Item = ClaimKey> + '_ {
        self.claims.keys().copied()
    }

    pub(super) fn is_claimed_by(&self, key: ClaimKey) -> bool {
        self.claims.contains_key(&key)
    }

    pub(super) fn has_ended(&self, key: ClaimKey) -> bool {
        self.ended_claims.contains(&key)
    }

    /// Adds or renews a claim. Returns until when it holds.
    pub(super) fn claim(&mut self, now: Instant, key: ClaimKey, claimed: Duration) -> Instant {
        let until = (now + claimed).min(self.cap);
        self.claims.insert(key, until);
        until
    }

    /// Renews a claim that still holds.
    pub(super) fn renew(&mut self, now: Instant, key: ClaimKey, claimed: Duration) {
        if self.claims.get(&key).is_some_and(|until| *until > now) {
            self.claim(now, key, claimed);
        }
    }

    /// Ends a claim for good. `remembered` bounds the ended claims that are kept. `true` when the claim held.
    pub(super) fn end_claim(&mut self, key: ClaimKey, remembered: usize) -> bool {
        self.ended_claims.insert(key);
        if self.ended_claims.len() > remembered {
            self.ended_claims.pop_first();
        }
        self.claims.remove(&key).is_some()
    }

    /// A reader released the offer; without a peer, every reader did.
    pub(super) fn release(&mut self, now: Instant, from: Option<PeerId>, r: &Release, unclaimed: Duration) {
        match from {
            Some(from) if !r.all => {
                let seen = self.released_by.entry(from.engine).or_default();
                if r.reader.index < r.reader.of {
                    seen.insert(r.reader.index);
                }
                self.done |= seen.len() >= r.reader.of as usize;
            }
            _ => self.done = true,
        }
        // The engine's other readers still have to come.
        self.unclaimed_until = self.unclaimed_until.max(now + unclaimed);
    }

    /// Whether the offer is released and has no readers.
    pub(super) fn is_released(&self) -> bool {
        self.done && self.claims.is_empty()
    }

    /// Removes the claims that ran out.
    pub(super) fn take_lapsed(&mut self, now: Instant) -> Vec<ClaimKey> {
        let lapsed: Vec<_> = self.claims.iter().filter(|(_, until)| **until <= now).map(|(k, _)| *k).collect();
        self.claims.retain(|_, until| *until > now);
        lapsed
    }

    pub(super) fn is_over_cap(&self, now: Instant) -> bool {
        self.cap <= now
    }

    /// Whether the unclaimed offer must end. `lapsed`: its last claims just ran out. A consumer that claimed and went silent
    /// does not give the offer back to others: its lease was the offer's. Only readers of the same engine that still have to
    /// come keep it until the unclaimed time is over.
    pub(super) fn is_expired(&self, now: Instant, lapsed: bool) -> bool {
        let waits_for_readers = self.released_by.values().any(|s| !s.is_empty());
        let unclaimed = self.growing.is_none() && self.unclaimed_until <= now;
        self.claims.is_empty() && (unclaimed || (lapsed && !waits_for_readers))
    }
}
