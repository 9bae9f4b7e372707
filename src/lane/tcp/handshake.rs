//! The identity of the two ends of a data connection. Each side proves that it has the lane's key, which the control plane
//! gave to both, without sending the key. Both proofs include the producer's incarnation, so an earlier or later process at
//! the same address fails them (promise 2, Fresh). The proofs do not encrypt: the bytes of the cache travel in the clear,
//! inside one trust domain.

use hmac::{Hmac, KeyInit, Mac};
use kvferry_proto::Incarnation;
use sha2::Sha256;

use super::frames::{Challenge, Options};

/// Key of one lane.
pub(super) type Key = [u8; 32];

/// The input of both proofs of a connection.
pub(super) struct Keyed<'a> {
    /// The lane's key.
    pub key: &'a Key,
    /// The producer's challenge.
    pub challenge: &'a Challenge,
    /// What the consumer wants.
    pub options: Options,
    /// The consumer's random bytes.
    pub random: &'a [u8; 32],
    /// The lane.
    pub lane: u64,
    /// The producer's incarnation.
    pub incarnation: Incarnation,
}

impl Keyed<'_> {
    /// The consumer's proof: HMAC-SHA256 under the key, over a label, both sides' options and random bytes, lane
    /// and incarnation.
    pub(super) fn consumer(&self) -> [u8; 32] {
        self.mac(CONSUMER).finalize().into_bytes().into()
    }

    /// The producer's proof, under another label, so that neither proof can serve as the other.
    pub(super) fn producer(&self) -> [u8; 32] {
        self.mac(PRODUCER).finalize().into_bytes().into()
    }

    /// Whether this is the consumer's proof, in constant time.
    pub(super) fn is_consumer(&self, mac: &[u8; 32]) -> bool {
        self.mac(CONSUMER).verify_slice(mac).is_ok()
    }

    /// Whether this is the producer's proof, in constant time.
    pub(super) fn is_producer(&self, mac: &[u8; 32]) -> bool {
        self.mac(PRODUCER).verify_slice(mac).is_ok()
    }

    fn mac(&self, label: &[u8]) -> Hmac<Sha256> {
        // HMAC itself pads a short key with zeros to a block. A key of a whole block is always accepted, so there is no
        // error to handle.
        let mut block = [0; 64];
        block[..32].copy_from_slice(self.key);
        let mut mac = Hmac::<Sha256>::new(&block.into());
        mac.update(label);
        mac.update(&self.challenge.options.to_le_bytes());
        mac.update(&self.challenge.random);
        mac.update(&self.options.to_le_bytes());
        mac.update(self.random);
        mac.update(&self.lane.to_le_bytes());
        mac.update(&self.incarnation.get().to_le_bytes());
        mac
    }
}

// Of equal length, so that no following byte can pass for a part of a label.
const CONSUMER: &[u8] = b"kvferry data 2 consumer\0";
const PRODUCER: &[u8] = b"kvferry data 2 producer\0";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_holds_for_its_own_connection_only() {
        let (key, other) = ([1; 32], [2; 32]);
        let (want, none) = (Options::new(true), Options::new(false));
        let c1 = Challenge { options: want, random: [3; 32] };
        let (here, reborn) = (Incarnation::random(), Incarnation::random());
        let good = Keyed { key: &key, challenge: &c1, options: want, random: &[5; 32], lane: 7, incarnation: here };
        assert!(good.is_consumer(&good.consumer()) && good.is_producer(&good.producer()));
        assert!(!good.is_producer(&good.consumer()), "the consumer's proof sent back proves nothing");
        for bad in [
            Keyed { key: &other, ..good },
            Keyed { challenge: &Challenge { random: [4; 32], ..c1 }, ..good },
            Keyed { challenge: &Challenge { options: none, ..c1 }, ..good },
            Keyed { options: none, ..good },
            Keyed { random: &[6; 32], ..good },
            Keyed { lane: 8, ..good },
            Keyed { incarnation: reborn, ..good },
        ] {
            assert!(!good.is_consumer(&bad.consumer()));
            assert!(!good.is_producer(&bad.producer()));
        }
    }

    #[test]
    fn the_proof_is_plain_hmac_sha256() {
        // The crate tests RFC 4231 itself; this test catches a change of the proof's input.
        let key = [0x0b; 32];
        let challenge = Challenge { options: Options::new(true), random: [1; 32] };
        let Some(incarnation) = Incarnation::from_wire(9) else { unreachable!() };
        let options = Options::default();
        let keyed = Keyed { key: &key, challenge: &challenge, options, random: &[2; 32], lane: 3, incarnation };
        let mut plain = Hmac::<Sha256>::new_from_slice(&key).unwrap();
        plain.update(b"kvferry data 2 consumer\0");
        plain.update(&[1, 0, 0, 0]);
        plain.update(&[1; 32]);
        plain.update(&[0; 4]);
        plain.update(&[2; 32]);
        plain.update(&[3, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
        assert!(plain.verify_slice(&keyed.consumer()).is_ok());
    }
}
