//! Secrets in a name: the token, and the seal over the name.

use std::fmt;

use hmac::{Hmac, KeyInit as _, Mac as _};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use crate::{BadHex, BadOffer, Offer};

/// `N` secret bytes. Compared in constant time, and never printed; hexadecimal digits in JSON.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SecretBytes<const N: usize>([u8; N]);

/// The secret of one offer, 128 random bits: a claim and a release show it, so knowing an offer's id opens nothing.
pub type Token = SecretBytes<16>;

/// An HMAC-SHA256 over a name, see [`Offer::sealed`].
pub type Seal = SecretBytes<32>;

impl<const N: usize> SecretBytes<N> {
    /// A new secret, from the system's random source.
    pub fn random() -> Self {
        let mut bytes = [0; N];
        // Without a random source no secret is safe, and no caller can continue.
        getrandom::fill(&mut bytes).expect("the system's random source failed");
        Self(bytes)
    }

    /// The secret of these bytes.
    pub fn from_bytes(bytes: [u8; N]) -> Self {
        Self(bytes)
    }

    /// Its bytes, for the wire.
    pub fn to_bytes(self) -> [u8; N] {
        self.0
    }
}

impl Token {
    /// The token of the offer that a router calls by this transfer id. The router gives both engines the id and knows nothing of
    /// kvferry; each of them derives the same token from it. It is as hard to guess as the transfer id is.
    pub fn of_transfer(transfer: &str) -> Self {
        Self(derived(b"kvferry transfer token\0", transfer))
    }
}

/// 16 bytes of a SHA-256 over a label and a transfer id.
pub(crate) fn derived(label: &[u8], transfer: &str) -> [u8; 16] {
    let hash = Sha256::new().chain_update(label).chain_update(transfer.as_bytes()).finalize();
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash[..16]);
    bytes
}

impl<const N: usize> PartialEq for SecretBytes<N> {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl<const N: usize> Eq for SecretBytes<N> {}

impl<const N: usize> fmt::Debug for SecretBytes<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretBytes(..)")
    }
}

impl<const N: usize> TryFrom<String> for SecretBytes<N> {
    type Error = BadHex;
    fn try_from(s: String) -> Result<Self, BadHex> {
        from_hex(&s).map(Self).ok_or(BadHex::new("a token or seal", 2 * N))
    }
}

impl<const N: usize> From<SecretBytes<N>> for String {
    fn from(s: SecretBytes<N>) -> String {
        to_hex(&s.0)
    }
}

/// The key that a deployment's engines share to seal names. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct SealKey(Vec<u8>);

impl SealKey {
    /// Shortest key, in bytes: as long as the hash, as RFC 2104 asks.
    pub const MIN: usize = 32;

    /// The key of a file's content; white space at its end does not count.
    ///
    /// # Errors
    /// It is shorter than [`SealKey::MIN`].
    pub fn new(content: &[u8]) -> Result<Self, String> {
        let key = content.trim_ascii_end();
        if key.len() < Self::MIN {
            return Err(format!(
                "a seal key needs at least {} bytes, and this one has {}: make one with `openssl rand -hex 32`",
                Self::MIN,
                key.len()
            ));
        }
        Ok(Self(key.to_vec()))
    }

    fn mac(&self, offer: &Offer) -> Hmac<Sha256> {
        // HMAC takes keys of any length.
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("a key of any length");
        mac.update(b"kvferry name\0");
        // Each part has its length before it, so that no two names have the same bytes.
        let mut part = |bytes: &[u8]| {
            mac.update(&(bytes.len() as u64).to_le_bytes());
            mac.update(bytes);
        };
        part(&offer.version.to_le_bytes());
        part(&offer.id.high.to_le_bytes());
        part(&offer.id.low.to_le_bytes());
        part(&offer.token.to_bytes());
        part(offer.engine.as_str().as_bytes());
        part(&offer.incarnation.get().to_le_bytes());
        part(&offer.tokens.to_le_bytes());
        part(&offer.number.to_le_bytes());
        part(offer.request.as_bytes());
        part(&(offer.ranks.len() as u64).to_le_bytes());
        for r in &offer.ranks {
            part(&r.rank.0.to_le_bytes());
            part(&r.incarnation.get().to_le_bytes());
            part(r.addr.as_bytes());
        }
        part(&(offer.fingerprints.len() as u64).to_le_bytes());
        for (name, value) in &offer.fingerprints {
            part(name.as_bytes());
            part(value.as_bytes());
        }
        mac
    }
}

impl fmt::Debug for SealKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SealKey(..)")
    }
}

impl Offer {
    /// The name with a seal over all its fields. An engine that has the key accepts only names with a fitting seal, so
    /// names can be made and changed with the key only.
    pub fn sealed(mut self, key: &SealKey) -> Self {
        self.seal = Some(Seal::from_bytes(key.mac(&self).finalize().into_bytes().into()));
        self
    }

    /// Checks the seal against each of these keys; without keys any name will do.
    ///
    /// # Errors
    /// There is no seal, or it fits none of the keys.
    pub fn check_seal(&self, keys: &[SealKey]) -> Result<(), BadOffer> {
        if keys.is_empty() {
            return Ok(());
        }
        let seal = self.seal.ok_or(BadOffer::NotSealed)?;
        let fits = |k: &SealKey| k.mac(self).verify_slice(&seal.0).is_ok();
        if keys.iter().any(fits) { Ok(()) } else { Err(BadOffer::BadSeal) }
    }
}

fn to_hex(bytes: &[u8]) -> String {
    let digit = |n: u8| char::from_digit(n.into(), 16).unwrap_or('0');
    bytes.iter().flat_map(|b| [digit(b >> 4), digit(b & 15)]).collect()
}

/// Exactly `N` bytes in lower or upper case.
fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits: Option<Vec<u8>> = text.chars().map(|c| c.to_digit(16).map(|d| d as u8)).collect();
    let digits = digits.filter(|d| d.len() == 2 * N)?;
    Some(std::array::from_fn(|i| digits[2 * i] << 4 | digits[2 * i + 1]))
}
