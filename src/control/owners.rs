//! Which consumers own their incarnation: a session belongs to the connection that said Hello for it.
//!
//! A consumer's Hello shows a secret, random for each process life and producer address. The first session of an incarnation
//! ties the incarnation to that secret. From then on only connections whose Hello showed the same secret may open a session
//! or request a lane for it, so that nobody takes over another consumer's grants. A consumer that lost its connection shows
//! the secret on the next one and is served at once, also while the old connection lingers.

use std::{
    collections::HashMap,
    fmt,
    time::{Duration, Instant},
};

use kvferry_proto::{Incarnation, PeerId};
use subtle::ConstantTimeEq as _;

use super::{peer::PeerKey, refusal::Refusal};

/// A consumer's secret. Compared in constant time, and never printed.
#[derive(Clone, Copy)]
pub(crate) struct Secret([u8; Self::BYTES]);

impl Secret {
    const BYTES: usize = 16;

    /// A new secret; fails if the system's random source does.
    pub(crate) fn random() -> Result<Self, String> {
        let mut bytes = [0; Self::BYTES];
        getrandom::fill(&mut bytes).map_err(|e| format!("the system's random source failed: {e}"))?;
        Ok(Self(bytes))
    }

    /// A secret from the wire.
    pub(crate) fn from_wire(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    fn is(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// Most incarnations without a session that are remembered of one peer. One that opens and closes sessions without end
/// displaces its own.
const IDLE: usize = 256;

/// The incarnations that have, or recently had, a session.
pub(crate) struct Owners {
    /// How long an incarnation stays owned after its last session: until its claims have run out.
    keep: Duration,
    owners: HashMap<Incarnation, Owner>,
}

struct Owner {
    consumer: PeerId,
    secret: Secret,
    peer: PeerKey,
    sessions: usize,
    /// When the last session closed.
    left: Instant,
}

impl Owners {
    pub(crate) fn new(keep: Duration) -> Self {
        Self { keep, owners: HashMap::new() }
    }

    /// Checks that a consumer that shows `secret` may speak for its incarnation.
    pub(crate) fn check(&self, consumer: &PeerId, secret: &Secret) -> Result<(), Refusal> {
        match self.owners.get(&consumer.incarnation) {
            Some(o) if !o.secret.is(secret) || o.consumer != *consumer => Err(Refusal::Denied(format!(
                "incarnation {} belongs to another connection, which said Hello with another secret: only the process \
                 that said it may continue",
                consumer.incarnation
            ))),
            _ => Ok(()),
        }
    }

    /// A session opens.
    pub(crate) fn open(
        &mut self,
        now: Instant,
        consumer: &PeerId,
        secret: Secret,
        peer: &PeerKey,
    ) -> Result<(), Refusal> {
        self.check(consumer, &secret)?;
        let owner = self.owners.entry(consumer.incarnation).or_insert_with(|| Owner {
            consumer: consumer.clone(),
            secret,
            peer: peer.clone(),
            sessions: 0,
            left: now,
        });
        owner.sessions += 1;
        Ok(())
    }

    /// A session is over.
    pub(crate) fn close(&mut self, now: Instant, incarnation: Incarnation) {
        let Some(owner) = self.owners.get_mut(&incarnation) else { return };
        owner.sessions = owner.sessions.saturating_sub(1);
        owner.left = now;
        if owner.sessions > 0 {
            return;
        }
        let peer = owner.peer.clone();
        let idle = self.owners.iter().filter(|(_, o)| o.sessions == 0 && o.peer == peer);
        if idle.clone().count() > IDLE
            && let Some(oldest) = idle.min_by_key(|(_, o)| o.left).map(|(i, _)| *i)
        {
            self.owners.remove(&oldest);
        }
    }

    /// Forgets incarnations whose claims have run out.
    pub(crate) fn sweep(&mut self, now: Instant) {
        self.owners.retain(|_, o| o.sessions > 0 || now.saturating_duration_since(o.left) < self.keep);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvferry_proto::Rank;

    fn consumer() -> PeerId {
        PeerId { engine: "decode".parse().unwrap(), rank: Rank(0), incarnation: Incarnation::random() }
    }

    fn peer() -> PeerKey {
        PeerKey::Address([10, 0, 0, 1].into())
    }

    #[test]
    fn an_incarnation_is_kept_for_its_secret_until_its_claims_have_run_out() {
        let (keep, now) = (Duration::from_secs(10), Instant::now());
        let mut owners = Owners::new(keep);
        let (me, mine, other) = (consumer(), Secret::random().unwrap(), Secret::random().unwrap());
        owners.check(&me, &other).expect("nobody owns it yet");
        owners.open(now, &me, mine, &peer()).unwrap();
        owners.check(&me, &other).expect_err("another secret");
        owners.open(now, &me, other, &peer()).expect_err("another secret");
        let renamed = PeerId { engine: "another".parse().unwrap(), ..me.clone() };
        owners.check(&renamed, &mine).expect_err("another engine");
        // The same consumer on a second connection, before the first one is noticed to be gone.
        owners.open(now, &me, mine, &peer()).unwrap();
        owners.close(now, me.incarnation);
        owners.sweep(now + keep * 2);
        owners.check(&me, &other).expect_err("it still has a session");
        owners.close(now, me.incarnation);
        owners.sweep(now + keep / 2);
        owners.check(&me, &other).expect_err("its claims may still hold");
        owners.sweep(now + keep);
        owners.check(&me, &other).expect("forgotten");
    }

    #[test]
    fn a_peer_that_opens_and_closes_without_end_displaces_its_own_incarnations_only() {
        let now = Instant::now();
        let mut owners = Owners::new(Duration::from_secs(10));
        let (victim, secret) = (consumer(), Secret::random().unwrap());
        owners.open(now, &victim, secret, &peer()).unwrap();
        owners.close(now, victim.incarnation);
        let greedy = PeerKey::Address([10, 0, 0, 2].into());
        for i in 0..2 * IDLE as u32 {
            let me = consumer();
            let at = now + Duration::from_millis(i.into());
            owners.open(at, &me, secret, &greedy).unwrap();
            owners.close(at, me.incarnation);
        }
        assert_eq!(owners.owners.len(), IDLE + 1);
        owners.check(&victim, &Secret::random().unwrap()).expect_err("still remembered");
    }
}
