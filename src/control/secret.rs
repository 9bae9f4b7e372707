//! The secret that a consumer shows in its Hello: it ties a consumer's sessions together.
//!
//! A consumer's Hello shows a secret, random for each process life and producer address. The producer knows a consumer by its
//! incarnation and that secret together ([`Secret::known_as`]): a session that shows another secret is another
//! consumer's, and neither takes the first one's grants nor keeps it from opening its own. A consumer that lost its
//! connection shows the secret on the next one and resumes its claims at once, also while the old connection lingers. One
//! that reaches this producer at two addresses has two sessions.

use std::fmt;

use hmac::{Hmac, KeyInit as _, Mac as _};
use kvferry_proto::{Incarnation, PeerId};
use sha2::Sha256;

/// A consumer's secret. Never printed.
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

    /// The consumer as the producer's tables know it: with an incarnation that is a keyed hash of its identity. It is the same
    /// for each connection that shows the secret, and cannot be guessed without it.
    pub(crate) fn known_as(&self, consumer: &PeerId) -> PeerId {
        // HMAC takes keys of any length.
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("a key of any length");
        mac.update(consumer.engine.as_str().as_bytes());
        mac.update(&consumer.rank.0.to_le_bytes());
        mac.update(&consumer.incarnation.get().to_le_bytes());
        let hash = mac.finalize().into_bytes();
        let raw = hash.first_chunk().map_or(0, |c| u64::from_le_bytes(*c));
        let incarnation = Incarnation::from_wire(raw).unwrap_or(consumer.incarnation);
        PeerId { incarnation, ..consumer.clone() }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvferry_proto::Rank;

    #[test]
    fn a_consumer_is_known_by_its_identity_and_its_secret_together() {
        let me = PeerId { engine: "decode".parse().unwrap(), rank: Rank(0), incarnation: Incarnation::random() };
        let secret = Secret::random().unwrap();
        let known = secret.known_as(&me);
        assert_eq!(secret.known_as(&me), known, "on each of its connections");
        assert_eq!((&known.engine, known.rank), (&me.engine, me.rank));
        assert_ne!(Secret::random().unwrap().known_as(&me).incarnation, known.incarnation);
        let other_rank = PeerId { rank: Rank(1), ..me.clone() };
        assert_ne!(secret.known_as(&other_rank).incarnation, known.incarnation);
        assert_ne!(known.incarnation, me.incarnation);
    }
}
