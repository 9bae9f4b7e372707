//! The name of an offer, which travels through routers. A few hundred bytes for any prompt: it says where the offer is, and
//! its token proves the right to claim or release it. It holds no block list: only the producer's own table says which
//! blocks an offer covers (see [`Contents`](crate::Contents)).

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};

use crate::{EngineId, Incarnation, OfferId, Rank, Seal, Token, check_address};

/// What an offer's KV was computed from, by the name of each thing: `prompt`, `weights`, … The values are hashes that both
/// engines compute in the same way; kvferry only compares them.
pub type Fingerprints = BTreeMap<String, String>;

/// The name of blocks that a producer engine keeps until they are pulled, released or revoked.
///
/// A name is enough to read the offer and to release it, so treat it as a secret: never log its JSON. `Debug` leaves the
/// token out.
///
/// ```
/// # use kvferry_proto::Offer;
/// let text = r#"{"version":2,"id":"00000000000000010000000000000002","token":"000102030405060708090a0b0c0d0e0f",
///   "engine":"prefill-0","incarnation":"00000000000000aa",
///   "ranks":[{"rank":0,"incarnation":"00000000000000aa","addr":"127.0.0.1:7400"}],
///   "tokens":40,"request":"req-1","fingerprints":{"prompt":"9f86d081"}}"#;
/// let offer = Offer::from_json(text)?;
/// assert_eq!(offer.check(), Ok(()));
/// assert_eq!(Offer::from_json(&offer.to_json())?, offer);
/// # Ok::<(), kvferry_proto::BadOffer>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Offer {
    /// The format's version. A name of a newer version may have fields that this one does not know: they are ignored.
    pub version: u32,
    /// The offer's id. Not a secret: logs and metrics may show it.
    pub id: OfferId,
    /// The secret that a claim and a release show.
    pub token: Token,
    /// The engine that made the offer.
    pub engine: EngineId,
    /// The engine's incarnation, minted from all its ranks'.
    pub incarnation: Incarnation,
    /// The engine's ranks, ascending.
    pub ranks: Vec<OfferRank>,
    /// Tokens that the blocks hold. The last block may be partial.
    pub tokens: u64,
    /// The producer's request id, for logs.
    #[serde(default)]
    pub request: String,
    /// Its place among the names that the engine's scheduler mints, ascending by one or more; 0: not numbered. A rank that has
    /// entered a later name answers that it will never enter this one, instead of waiting for it.
    #[serde(default)]
    pub number: u64,
    /// What the KV was computed from.
    #[serde(default)]
    pub fingerprints: Fingerprints,
    /// The seal over all other fields, where the deployment has a key for it; see [`Offer::seal`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seal: Option<Seal>,
}

/// One rank of the engine that made the offer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferRank {
    /// The rank.
    pub rank: Rank,
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// `HOST:PORT` of its control plane.
    pub addr: String,
}

/// An offer, or the name of one, that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadOffer {
    /// The text is not the JSON of a name.
    #[error("the offer is unreadable: {0}; pass on the producer's offer unchanged")]
    Json(String),
    /// A field is missing, repeated, or out of bounds.
    #[error("the offer is malformed: {0}; pass on the producer's offer unchanged")]
    Malformed(String),
    /// The name was made by a build that put block lists into names.
    #[error("the offer's format is version {0}, and this build reads version 2 and newer: upgrade the producer")]
    Version(u32),
    /// The offer has more blocks than a pull may have.
    #[error(
        "the offer has {blocks} blocks, over the limit of {limit}; raise limits.blocks_per_offer if this is intended"
    )]
    TooManyBlocks {
        /// Blocks in the offer.
        blocks: usize,
        /// The limit.
        limit: usize,
    },
    /// The KV was computed from something else than the caller expects.
    #[error("the offer's {name:?} fingerprint is {there:?}, and {here:?} is expected: it holds another request's KV")]
    Fingerprint {
        /// The name of the fingerprinted thing.
        name: String,
        /// The expected value.
        here: String,
        /// The name's value; empty if it has none.
        there: String,
    },
    /// This side requires a seal, and the name has none.
    #[error("the offer is not sealed, and this engine accepts sealed offers only: give the producer the same seal key")]
    NotSealed,
    /// The seal does not fit the other fields.
    #[error(
        "the offer's seal does not fit: the name was changed on its way, or the producer has another seal key; pass on the \
         producer's offer unchanged, and give both sides the same key"
    )]
    BadSeal,
}

impl Offer {
    /// The version of the format that this build writes.
    pub const VERSION: u32 = 2;
    /// Most ranks in a name.
    pub const MAX_RANKS: usize = 1024;
    /// Longest address, in bytes.
    pub const MAX_ADDR: usize = 256;
    /// Longest request id, in bytes.
    pub const MAX_REQUEST: usize = 1024;
    /// Most fingerprints.
    pub const MAX_FINGERPRINTS: usize = 16;
    /// Longest name, and longest value, of a fingerprint, in bytes.
    pub const MAX_FINGERPRINT: usize = 128;
    /// Highest number: every JSON reader of a router keeps it exactly.
    pub const MAX_NUMBER: u64 = (1 << 53) - 1;

    /// A name for an offer of `tokens` tokens, with a new random token.
    pub fn new(id: OfferId, engine: EngineId, incarnation: Incarnation, ranks: Vec<OfferRank>, tokens: u64) -> Self {
        Self {
            version: Self::VERSION,
            id,
            token: Token::random(),
            engine,
            incarnation,
            ranks,
            tokens,
            request: String::new(),
            number: 0,
            fingerprints: Fingerprints::new(),
            seal: None,
        }
    }

    /// Sets the producer's request id, for logs. Control characters become `?`.
    pub fn request(mut self, request: impl Into<String>) -> Self {
        self.request = request.into().replace(char::is_control, "?");
        self
    }

    /// Sets its place among the names that the engine's scheduler mints. A number that is lower than an earlier one means that the
    /// name is passed over, so a scheduler that may restart without its ranks starts from the clock.
    pub fn number(mut self, number: u64) -> Self {
        self.number = number;
        self
    }

    /// Says what the KV is computed from.
    pub fn fingerprints(mut self, fingerprints: Fingerprints) -> Self {
        self.fingerprints = fingerprints;
        self
    }

    /// The name as JSON, on one line. It contains the token.
    pub fn to_json(&self) -> String {
        // Every field is a number, a string or a collection of them: serialising cannot fail.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Parses the text of [`Offer::to_json`]. Does not check the bounds, see [`Offer::check`].
    ///
    /// # Errors
    /// The text is not the JSON of a name.
    pub fn from_json(text: &str) -> Result<Self, BadOffer> {
        serde_json::from_str(text).map_err(|e| {
            #[derive(Deserialize)]
            struct Old {
                #[serde(default = "first")]
                version: u32,
                #[serde(rename = "groups")]
                _groups: serde::de::IgnoredAny,
            }
            fn first() -> u32 {
                1
            }
            match serde_json::from_str::<Old>(text) {
                Ok(old) if old.version < Self::VERSION => BadOffer::Version(old.version),
                _ => BadOffer::Json(unreadable(&e)),
            }
        })
    }

    /// Checks all bounds. A name may come from any source.
    ///
    /// # Errors
    /// A field is missing, repeated, or out of bounds.
    pub fn check(&self) -> Result<(), BadOffer> {
        let bad = |what: String| Err(BadOffer::Malformed(what));
        if self.version < Self::VERSION {
            return Err(BadOffer::Version(self.version));
        }
        if self.ranks.is_empty() || self.ranks.len() > Self::MAX_RANKS {
            return bad(format!("{} ranks, not 1 to {}", self.ranks.len(), Self::MAX_RANKS));
        }
        if !self.ranks.windows(2).all(|w| w[0].rank < w[1].rank) {
            return bad("ranks do not ascend".into());
        }
        if let Some(r) = self.ranks.iter().find(|r| r.addr.is_empty() || r.addr.len() > Self::MAX_ADDR) {
            return bad(format!("rank {} has no address, or one longer than {} bytes", r.rank, Self::MAX_ADDR));
        }
        // Refuse a bad address here: otherwise the pull fails only at its deadline.
        for r in &self.ranks {
            if let Err(why) = check_address(&r.addr) {
                return bad(format!("the address {:?} of rank {} is unusable: {why}", r.addr, r.rank));
            }
        }
        // One process is one rank: else its part of each block would be read as another rank's.
        let (mut addrs, mut incarnations) = (HashSet::new(), HashSet::new());
        if self.ranks.len() > 1
            && !self.ranks.iter().all(|r| addrs.insert(r.addr.as_str()) && incarnations.insert(r.incarnation))
        {
            return bad("two ranks have the same address or incarnation".into());
        }
        if self.request.len() > Self::MAX_REQUEST || self.request.chars().any(char::is_control) {
            return bad(format!(
                "the request id is longer than {} bytes, or has control characters",
                Self::MAX_REQUEST
            ));
        }
        if self.number > Self::MAX_NUMBER {
            return bad(format!("its number {} is over {}", self.number, Self::MAX_NUMBER));
        }
        check_fingerprints(&self.fingerprints).or_else(bad)
    }

    /// Checks that the KV was computed from what the caller expects: each expected fingerprint must be in the name, with the
    /// same value.
    ///
    /// # Errors
    /// A fingerprint differs or is missing.
    pub fn expect(&self, expected: &Fingerprints) -> Result<(), BadOffer> {
        for (name, here) in expected {
            let there = self.fingerprints.get(name);
            if there != Some(here) {
                let (name, here, there) = (name.clone(), here.clone(), there.cloned().unwrap_or_default());
                return Err(BadOffer::Fingerprint { name, here, there });
            }
        }
        Ok(())
    }
}

/// What is wrong with the text. The library's own message quotes values, and any of them may be the token.
fn unreadable(e: &serde_json::Error) -> String {
    let text = e.to_string();
    // These name a field of this format, and no value.
    let what = match text.split(" at line ").next() {
        Some(missing) if missing.starts_with("missing field") => missing,
        _ if e.is_data() => "a field has a value of the wrong kind",
        _ => "it is not JSON",
    };
    format!("{what}, at line {} column {}", e.line(), e.column())
}

/// Checks the bounds of fingerprints.
pub(crate) fn check_fingerprints(all: &Fingerprints) -> Result<(), String> {
    let (most, longest) = (Offer::MAX_FINGERPRINTS, Offer::MAX_FINGERPRINT);
    if all.len() > most {
        return Err(format!("{} fingerprints, over the limit of {most}", all.len()));
    }
    let fits = |text: &str| text.len() <= longest && !text.chars().any(char::is_control);
    if all.iter().any(|(name, value)| name.is_empty() || !fits(name) || !fits(value)) {
        return Err(format!("a fingerprint has no name, control characters, or over {longest} bytes"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};

    #[test]
    fn a_malformed_address_is_refused_at_once() {
        let offer = |addr: &str| {
            let incarnation = Incarnation::random();
            let ranks = vec![OfferRank { rank: Rank(0), incarnation, addr: addr.into() }];
            Offer::new(OfferId::random(), "prefill".parse().unwrap(), incarnation, ranks, 1)
        };
        for good in ["10.0.0.1:7400", "prefill-3.rack:1", "[fd00::1]:65535"] {
            assert_eq!(offer(good).check(), Ok(()), "{good}");
        }
        for bad in [
            "",
            "10.0.0.1",
            "10.0.0.1:",
            ":7400",
            "a:0",
            "a:65536",
            "not an address",
            "[fe80::1",
            "a\nb:1",
            "a\u{1b}:1",
        ] {
            assert!(matches!(offer(bad).check(), Err(BadOffer::Malformed(_))), "{bad}");
        }
        let mut forging = offer("a:1");
        forging.request = "r\nERROR".into();
        assert!(matches!(forging.check(), Err(BadOffer::Malformed(_))));
        assert_eq!(offer("a:1").request("r\nERROR").check(), Ok(()), "a producer's own request id is cleaned");
        let mut twice = offer("a:1");
        twice.ranks.push(OfferRank { rank: Rank(1), ..twice.ranks[0].clone() });
        assert!(matches!(twice.check(), Err(BadOffer::Malformed(_))), "one process for two ranks");
    }

    #[test]
    fn a_name_of_a_newer_version_is_read_and_one_with_block_lists_is_refused_by_its_version() {
        let text = r#"{"version":7,"id":"00000000000000010000000000000002","token":"000102030405060708090a0b0c0d0e0f",
          "engine":"e","incarnation":"00000000000000aa","colour":"red",
          "ranks":[{"rank":0,"incarnation":"00000000000000aa","addr":"127.0.0.1:7400","zone":"b"}],"tokens":16}"#;
        let offer = Offer::from_json(text).unwrap();
        assert_eq!((offer.version, offer.check()), (7, Ok(())));
        assert_eq!(Offer::from_json(&text.replace(":7,", ":1,")).unwrap().check(), Err(BadOffer::Version(1)));
        let old = r#"{"id":"00000000000000010000000000000002","engine":"e","incarnation":"00000000000000aa","ranks":[],
          "groups":[{"group":0,"first_position":0,"blocks":[3]}],"tokens":16}"#;
        assert_eq!(Offer::from_json(old), Err(BadOffer::Version(1)));
    }

    #[test]
    fn neither_the_debug_text_of_a_name_nor_an_error_shows_its_token() {
        let incarnation = Incarnation::random();
        let ranks = vec![OfferRank { rank: Rank(0), incarnation, addr: "h:1".into() }];
        let offer = Offer::new(OfferId::random(), "e".parse().unwrap(), incarnation, ranks, 1);
        let json = offer.to_json();
        let hex = String::from(offer.token);
        assert!(json.contains(&hex));
        assert!(!format!("{offer:?}").contains(&hex));
        for cut in 0..json.len() {
            if let Err(e) = Offer::from_json(&json[..cut]) {
                assert!(!e.to_string().contains(&hex), "{e}");
            }
        }
        let wrong = Offer::from_json(&json.replace(&hex, &format!("{hex}0"))).unwrap_err();
        assert!(!wrong.to_string().contains(&hex), "{wrong}");
        // With any part left out, the token must not become a quoted value of another field.
        for from in 0..json.len() {
            for to in from + 1..json.len() {
                let text = format!("{}{}", &json[..from], &json[to..]);
                if let Err(e) = Offer::from_json(&text) {
                    assert!(!e.to_string().contains(&hex), "{text}: {e}");
                }
            }
        }
    }

    #[test]
    fn an_expected_fingerprint_must_be_there_and_equal() {
        let map = |all: &[(&str, &str)]| all.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect::<Fingerprints>();
        let incarnation = Incarnation::random();
        let offer = Offer::new(OfferId::random(), "e".parse().unwrap(), incarnation, vec![], 1)
            .fingerprints(map(&[("prompt", "a"), ("weights", "b")]));
        assert_eq!(offer.expect(&map(&[])), Ok(()));
        assert_eq!(offer.expect(&map(&[("prompt", "a")])), Ok(()));
        assert!(matches!(offer.expect(&map(&[("prompt", "b")])), Err(BadOffer::Fingerprint { .. })));
        assert!(matches!(offer.expect(&map(&[("adapter", "")])), Err(BadOffer::Fingerprint { .. })));
    }

    fn offers() -> impl Strategy<Value = Offer> {
        let ranks = vec((any::<u64>(), "[a-z][a-z0-9]{0,9}([.][a-z]{1,9})?:[1-9][0-9]{0,3}"), 1..4);
        let prints = proptest::collection::btree_map("[a-z]{1,8}", "[0-9a-f]{0,32}", 0..4);
        ("[a-z0-9-]{1,20}", ranks, any::<u64>(), "[a-z0-9 ]{0,20}", prints).prop_map(
            |(engine, ranks, tokens, request, prints)| {
                let rank = |(i, (incarnation, addr)): (usize, (u64, String))| OfferRank {
                    rank: Rank(i as u32),
                    incarnation: Incarnation::from_wire(incarnation.max(1)).unwrap(),
                    addr,
                };
                let ranks = ranks.into_iter().enumerate().map(rank).collect();
                Offer::new(OfferId::random(), engine.parse().unwrap(), Incarnation::random(), ranks, tokens)
                    .request(request)
                    .fingerprints(prints)
            },
        )
    }

    proptest! {
        #[test]
        fn a_name_survives_json_and_a_changed_byte_never_panics(
            offer in offers(), at in any::<prop::sample::Index>(), byte in any::<u8>(),
        ) {
            let text = offer.to_json();
            prop_assert!(text.len() < 1000, "a few hundred bytes: {}", text.len());
            prop_assert_eq!(Offer::from_json(&text), Ok(offer));
            let mut bytes = text.into_bytes();
            let i = at.index(bytes.len());
            bytes[i] = byte;
            if let Ok(o) = Offer::from_json(&String::from_utf8_lossy(&bytes)) {
                let _ = o.check();
            }
        }

        #[test]
        fn a_sealed_name_is_accepted_and_any_change_to_it_is_not(
            offer in offers(), at in any::<prop::sample::Index>(), byte in any::<u8>(),
        ) {
            let key = crate::SealKey::new(b"0123456789abcdef0123456789abcdef").unwrap();
            let other = crate::SealKey::new(b"0123456789abcdef0123456789abcdeF").unwrap();
            prop_assert_eq!(offer.check_seal(std::slice::from_ref(&key)), Err(BadOffer::NotSealed));
            let sealed = offer.sealed(&other).sealed(&key);
            prop_assert_eq!(sealed.check_seal(&[other.clone(), key.clone()]), Ok(()));
            prop_assert_eq!(sealed.check_seal(&[other]), Err(BadOffer::BadSeal));
            let text = sealed.to_json();
            let mut bytes = text.into_bytes();
            let i = at.index(bytes.len());
            bytes[i] = byte;
            if let Ok(o) = Offer::from_json(&String::from_utf8_lossy(&bytes)) && o != sealed {
                prop_assert!(o.check_seal(&[key]).is_err());
            }
        }
    }
}
