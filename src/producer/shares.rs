//! Each peer's claims, counted as the offer table grants and ends them.
//!
//! A consumer counts for the peer that opened its first session, for as long as it has sessions or claims. Further sessions,
//! closed sessions and sessions from another address change nothing.

use std::collections::{HashMap, hash_map::Entry};

use kvferry_proto::Incarnation;

use crate::control::peer::{Counts, PeerKey};

/// The claims of all peers.
#[derive(Debug, Default)]
pub(super) struct Shares {
    consumers: HashMap<Incarnation, Consumer>,
    claims: Counts,
}

#[derive(Debug)]
struct Consumer {
    peer: PeerKey,
    sessions: usize,
    claims: usize,
}

impl Shares {
    /// A consumer opens a session from a peer.
    pub(super) fn opened(&mut self, consumer: Incarnation, peer: &PeerKey) {
        let new = || Consumer { peer: peer.clone(), sessions: 0, claims: 0 };
        self.consumers.entry(consumer).or_insert_with(new).sessions += 1;
    }

    /// A session of a consumer ended. Its claims hold until they run out. `true`: it was the last one.
    pub(super) fn closed(&mut self, consumer: Incarnation) -> bool {
        let Entry::Occupied(mut c) = self.consumers.entry(consumer) else { return true };
        c.get_mut().sessions = c.get().sessions.saturating_sub(1);
        let last = c.get().sessions == 0;
        if last && c.get().claims == 0 {
            c.remove();
        }
        last
    }

    /// A consumer has this many claims now.
    pub(super) fn holds(&mut self, consumer: Incarnation, claims: usize) {
        let Entry::Occupied(mut c) = self.consumers.entry(consumer) else { return };
        let before = std::mem::replace(&mut c.get_mut().claims, claims);
        match claims.checked_sub(before) {
            Some(more) => self.claims.add_many(&c.get().peer, more),
            None => self.claims.remove(&c.get().peer, before - claims),
        }
        if c.get().sessions == 0 && claims == 0 {
            c.remove();
        }
    }

    /// The peer that a consumer counts for, and the claims of that peer.
    pub(super) fn of(&self, consumer: Incarnation) -> Option<(&PeerKey, usize)> {
        self.consumers.get(&consumer).map(|c| (&c.peer, self.claims.of(&c.peer)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ip: [u8; 4]) -> PeerKey {
        PeerKey::new(ip.into(), None)
    }

    #[test]
    fn a_consumer_counts_once_for_its_first_peer_until_its_claims_end() {
        let (mut shares, one, two) = (Shares::default(), Incarnation::random(), Incarnation::random());
        let (here, there) = (at([10, 0, 0, 1]), at([10, 0, 0, 2]));
        shares.opened(one, &here);
        shares.opened(one, &there);
        shares.opened(two, &here);
        shares.holds(one, 3);
        shares.holds(two, 1);
        assert_eq!(shares.of(one), Some((&here, 4)), "the second session counts for no other peer");
        shares.closed(one);
        shares.closed(one);
        assert_eq!(shares.of(two), Some((&here, 4)), "claims of closed sessions count");
        shares.opened(one, &there);
        assert_eq!(shares.of(one), Some((&here, 4)), "another address does not move them");
        shares.closed(one);
        shares.holds(one, 2);
        shares.holds(one, 0);
        shares.holds(two, 0);
        shares.closed(two);
        assert!(shares.consumers.is_empty() && shares.claims.of(&here) == 0, "nothing is left: {shares:?}");
    }
}
