//! The claims of a session, and its releases that the producer has not acknowledged.
//!
//! Every claim is sent until it is answered, and every release until it is acknowledged or its incarnation is dead.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Out, Want};
use crate::{
    Cause, ClaimId, ClientBody, Contents, Extent, Grant, Growth, Incarnation, PeerId, Release,
    sabotage::{Bug, planted},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ClaimState {
    /// To be sent once the session is up.
    Waiting,
    /// To be sent again at this time.
    RetryAt(Instant),
    /// Sent and not answered; to be sent again at this time.
    Sent(Instant),
    /// Granted.
    Held,
}

/// Most frames of growth for one claim: an engine sends 60,000 in the ten minutes of [`LeaseConfig::hard_cap`], one in 10 ms.
///
/// [`LeaseConfig::hard_cap`]: crate::LeaseConfig::hard_cap
const MOST_GROWTHS: u32 = 1 << 17;

/// How far an offer has grown.
#[derive(Debug)]
struct Open {
    extent: Extent,
    /// Number of its growths.
    growths: u64,
    /// Number of frames of growth received for the claim.
    heard: u32,
}

#[derive(Debug)]
pub(super) struct Claim {
    pub(super) want: Want,
    state: ClaimState,
    /// While its offer grows.
    open: Option<Open>,
    /// Dials begun before the claim. Only the answer to a later dial says anything about the process of its offer: an earlier
    /// dial may have been answered, or refused, before that process existed.
    pub(super) dials: u64,
}

impl Claim {
    /// Whether it is for this engine's rank, in any incarnation.
    pub(super) fn is_for(&self, peer: &PeerId) -> bool {
        self.want.engine == peer.engine && self.want.rank == peer.rank
    }
}

#[derive(Debug)]
struct Unacked {
    expect: Incarnation,
    release: Release,
    /// When it is sent again.
    resend: Instant,
    /// As for a claim.
    dials: u64,
}

/// The claims and releases of a session.
#[derive(Default)]
pub(super) struct Claims {
    claims: BTreeMap<ClaimId, Claim>,
    unacked: BTreeMap<u64, Unacked>,
    last_seq: u64,
}

impl Claims {
    pub(super) fn len(&self) -> usize {
        self.claims.len()
    }

    pub(super) fn unacked(&self) -> usize {
        self.unacked.len()
    }

    /// Whether there is something to send, or to renew.
    pub(super) fn any(&self) -> bool {
        !self.claims.is_empty() || !self.unacked.is_empty()
    }

    pub(super) fn add(&mut self, want: Want, dials: u64) {
        self.claims.entry(want.claim).or_insert(Claim { want, state: ClaimState::Waiting, open: None, dials });
    }

    /// Forgets a claim. `false` when there is no such claim.
    pub(super) fn remove(&mut self, claim: ClaimId) -> bool {
        self.claims.remove(&claim).is_some()
    }

    /// Queues a release until it is acknowledged.
    pub(super) fn release(&mut self, now: Instant, expect: Incarnation, release: Release, dials: u64) {
        self.last_seq += 1;
        self.unacked.insert(self.last_seq, Unacked { expect, release, resend: now, dials });
    }

    /// Every claim and release goes out again on the next stream: the producer may not have heard of it, or may have
    /// forgotten it. Claiming twice does no harm.
    pub(super) fn resend_all(&mut self, now: Instant) {
        for c in self.claims.values_mut() {
            c.state = ClaimState::Waiting;
        }
        for u in self.unacked.values_mut() {
            u.resend = now;
        }
    }

    /// Claims that are due, as frames; each is due again at `resend`. `None`: a claim whose offer another incarnation made.
    pub(super) fn due_claims(
        &mut self,
        now: Instant,
        peer: Incarnation,
        resend: Instant,
    ) -> impl Iterator<Item = Option<(u64, ClientBody)>> + '_ {
        self.claims.values_mut().filter_map(move |c| {
            match c.state {
                ClaimState::Waiting => {}
                ClaimState::RetryAt(t) | ClaimState::Sent(t) if t <= now => {}
                _ => return None,
            }
            if !c.want.expect.is(peer) {
                // Either the offer is of a dead process, or the session is of one: the next Hello tells.
                return Some(None);
            }
            c.state = ClaimState::Sent(resend);
            let Want { claim, offer, token, number, reader, awaited, .. } = c.want;
            Some(Some((0, ClientBody::Claim { claim, offer, token, number, reader, awaited })))
        })
    }

    /// Releases that are due, as frames with their sequence numbers; else like [`Claims::due_claims`].
    pub(super) fn due_releases(
        &mut self,
        now: Instant,
        peer: Incarnation,
        resend: Instant,
    ) -> impl Iterator<Item = Option<(u64, ClientBody)>> + '_ {
        self.unacked.iter_mut().filter_map(move |(&seq, u)| {
            if u.resend > now {
                return None;
            }
            u.resend = resend;
            if !u.expect.is(peer) {
                // Most likely the offer is of a process that the session has not met yet. It is sent once they have met.
                return Some(None);
            }
            Some(Some((seq, ClientBody::Release(u.release.clone()))))
        })
    }

    /// A claim was granted. Ignores a grant that brings nothing new, one that comes after the claim's release, and one that no
    /// claim has asked for: each brings all blocks, so a peer could send more than the data thread can read.
    pub(super) fn granted(
        &mut self,
        claim: ClaimId,
        grant: Grant,
        (contents, growths): (Arc<Contents>, u64),
        out: &mut VecDeque<Out>,
    ) {
        let Some(c) = self.claims.get_mut(&claim) else { return };
        if std::mem::replace(&mut c.state, ClaimState::Held) == ClaimState::Held {
            return;
        }
        let known = c.open.as_ref().map(|open| open.growths);
        // Frames may come late: a grant takes nothing back.
        if known.is_some_and(|known| known >= growths) || (planted(Bug::GrownLost) && known.is_some()) {
            return;
        }
        let heard = c.open.as_ref().map_or(0, |open| open.heard);
        c.open = (!contents.complete).then(|| Open { extent: Extent::of(&contents), growths, heard });
        out.push_back(Out::Granted { claim, grant, contents });
    }

    /// The offer of a claim has grown, from `after` growths to `growths`. `limit` bounds its blocks. If another growth is missing
    /// before these, the claim goes out again, and its grant brings everything. `true`: it goes out.
    pub(super) fn grown(
        &mut self,
        claim: ClaimId,
        (after, growths): (u64, u64),
        growth: Growth,
        limit: usize,
        out: &mut VecDeque<Out>,
    ) -> bool {
        let Some(c) = self.claims.get_mut(&claim).filter(|c| c.state == ClaimState::Held) else { return false };
        let Some(open) = &mut c.open else { return false };
        if open.growths >= growths {
            return false;
        }
        open.heard += 1;
        if open.heard > MOST_GROWTHS {
            self.claims.remove(&claim);
            out.push_back(Out::Lost { claim, cause: Cause::Limit });
            return false;
        }
        if open.growths != after || open.extent.grow(&growth, limit).is_err() {
            c.state = ClaimState::Waiting;
            return true;
        }
        open.growths = growths;
        if growth.complete {
            c.open = None;
        }
        out.push_back(Out::Grown { claim, growth });
        false
    }

    /// The producer asks for the claim again after `wait`, or answers it when the offer is entered. `wait` comes from the peer:
    /// it is bounded by `most`, or by ten times that if the request waits in the prefill engine's queue.
    pub(super) fn not_yet(&mut self, now: Instant, claim: ClaimId, wait: Duration, most: Duration) {
        if let Some(c) = self.claims.get_mut(&claim)
            && matches!(c.state, ClaimState::Sent(_))
        {
            let most = if c.want.awaited { most * 10 } else { most };
            c.state = ClaimState::RetryAt(now + wait.min(most));
        }
    }

    /// Claims that are granted and must be renewed.
    pub(super) fn held(&self) -> Vec<ClaimId> {
        self.claims.iter().filter(|(_, c)| c.state == ClaimState::Held).map(|(id, _)| *id).collect()
    }

    /// A dial found this process: ends the claims and releases of every other one that were made before the dial.
    pub(super) fn met(&mut self, peer: &PeerId, dials: u64, out: &mut VecDeque<Out>) {
        if planted(Bug::IncarnationIgnored) {
            return;
        }
        // Releases of a dead incarnation are void: its memory went with it.
        self.unacked.retain(|_, u| u.expect == peer.incarnation || u.dials >= dials);
        // The name led to the address of another engine or rank.
        self.lose(Cause::Refused, out, |c| !c.is_for(peer) && c.dials < dials);
        self.lose(Cause::PeerRestarted, out, |c| c.want.expect != peer.incarnation && c.dials < dials);
    }

    /// Drops the release with this sequence number.
    pub(super) fn acknowledged(&mut self, seq: u64) {
        self.unacked.remove(&seq);
    }

    /// Removes the releases that were queued before this number of dials.
    pub(super) fn take_releases_before(&mut self, dials: u64) -> Vec<(Incarnation, Release)> {
        let (taken, kept): (BTreeMap<_, _>, _) =
            std::mem::take(&mut self.unacked).into_iter().partition(|(_, u)| u.dials < dials);
        self.unacked = kept;
        taken.into_values().map(|u| (u.expect, u.release)).collect()
    }

    /// Whether a claim was made after the last dial began.
    pub(super) fn any_since(&self, dials: u64) -> bool {
        self.claims.values().any(|c| c.dials >= dials)
    }

    /// Ends some claims.
    pub(super) fn lose(&mut self, cause: Cause, out: &mut VecDeque<Out>, which: impl Fn(&Claim) -> bool) {
        self.claims.retain(|&claim, c| {
            let lost = which(c);
            if lost {
                out.push_back(Out::Lost { claim, cause });
            }
            !lost
        });
    }

    /// The next time at which something is due on a stream that is up.
    pub(super) fn next_timeout(&self, suspect: bool) -> Option<Instant> {
        let releases = self.unacked.values().map(|u| u.resend);
        let claims = self.claims.values().filter(|_| !suspect).filter_map(|c| match c.state {
            ClaimState::RetryAt(t) | ClaimState::Sent(t) => Some(t),
            _ => None,
        });
        releases.chain(claims).min()
    }
}
