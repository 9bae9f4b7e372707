//! Identifiers of engines, ranks, incarnations, groups, blocks and offers; and sets of positions.
//!
//! Every identifier has its own type, so that a block id cannot be passed as a position.

use std::{fmt, num::NonZeroU64, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::sabotage::{Bug, planted};

/// A serving engine: 1 to 128 bytes of text without control characters, chosen by the operator.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EngineId(Arc<str>);

impl EngineId {
    /// Longest engine id, in bytes.
    pub const MAX_BYTES: usize = 128;

    /// The id's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// An engine id that is empty, too long, or has control characters.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("engine id {0:?} is unusable: use 1 to 128 bytes without control characters")]
pub struct BadEngineId(String);

impl TryFrom<String> for EngineId {
    type Error = BadEngineId;
    fn try_from(s: String) -> Result<Self, BadEngineId> {
        s.parse()
    }
}

impl FromStr for EngineId {
    type Err = BadEngineId;
    fn from_str(s: &str) -> Result<Self, BadEngineId> {
        if s.is_empty() || s.len() > Self::MAX_BYTES || s.chars().any(char::is_control) {
            // The text may come from a peer: keep the quote short enough for a log line.
            return Err(BadEngineId(s.chars().take(Self::MAX_BYTES).collect()));
        }
        Ok(Self(s.into()))
    }
}

impl From<EngineId> for String {
    fn from(e: EngineId) -> String {
        e.0.as_ref().to_owned()
    }
}

impl fmt::Display for EngineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for EngineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// One worker of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rank(pub u32);

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One process life of a rank: random, never zero, new at every start.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Incarnation(NonZeroU64);

impl Incarnation {
    /// A new incarnation, from the system's random source.
    pub fn random() -> Self {
        Self(random_nonzero())
    }

    /// An incarnation from the wire; `None` for zero.
    pub fn from_wire(raw: u64) -> Option<Self> {
        NonZeroU64::new(raw).map(Self)
    }

    /// The number itself.
    pub fn get(self) -> u64 {
        self.0.get()
    }

    /// Whether both are the same process life. The one place where a planted bug can confuse them.
    pub(crate) fn is(self, other: Self) -> bool {
        self == other || planted(Bug::IncarnationIgnored)
    }

    /// An engine's incarnation from those of all its ranks, in rank order: a restart of any rank makes a new one. `None`
    /// without ranks.
    pub fn of_engine(ranks: &[Incarnation]) -> Option<Self> {
        match ranks {
            [] => None,
            [one] => Some(*one),
            many => {
                // FNV-1a over the numbers. Each rank adds 64 random bits, so collisions are as rare as between random numbers.
                let mut h = 0xcbf2_9ce4_8422_2325u64;
                for b in many.iter().flat_map(|r| r.get().to_le_bytes()) {
                    h = (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3);
                }
                Some(Self(NonZeroU64::new(h).unwrap_or(NonZeroU64::MIN)))
            }
        }
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.get())
    }
}

impl fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Text that is not a hexadecimal id of the right length.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} must be {digits} hexadecimal digits and not zero")]
pub struct BadHex {
    what: &'static str,
    digits: usize,
}

impl BadHex {
    pub(crate) fn new(what: &'static str, digits: usize) -> Self {
        Self { what, digits }
    }
}

impl TryFrom<String> for Incarnation {
    type Error = BadHex;
    fn try_from(s: String) -> Result<Self, BadHex> {
        let bad = BadHex { what: "an incarnation", digits: 16 };
        if s.len() != 16 {
            return Err(bad);
        }
        u64::from_str_radix(&s, 16).ok().and_then(Self::from_wire).ok_or(bad)
    }
}

impl From<Incarnation> for String {
    fn from(i: Incarnation) -> String {
        i.to_string()
    }
}

/// The value of a fence word while its offer is live: random, never zero. A free word is zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Nonce(NonZeroU64);

impl Nonce {
    /// A new nonce, from the system's random source.
    pub fn random() -> Self {
        Self(random_nonzero())
    }

    /// A nonce from the wire; `None` for zero.
    pub fn from_wire(raw: u64) -> Option<Self> {
        NonZeroU64::new(raw).map(Self)
    }

    /// The number itself.
    pub fn get(self) -> u64 {
        self.0.get()
    }
}

impl fmt::Debug for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A nonce proves a claim, so it is never printed.
        f.write_str("Nonce(..)")
    }
}

/// An offer's id: 128 random bits, so that two producers never mint the same one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct OfferId {
    /// Random bits.
    pub high: u64,
    /// Random bits, never zero.
    pub low: u64,
}

impl OfferId {
    /// A new id. A scheduler may mint it before the worker that enters the offer has heard of the request.
    pub fn random() -> Self {
        Self { high: random_nonzero().get(), low: random_nonzero().get() }
    }

    /// The id of the offer that a router calls by this transfer id, see [`Token::of_transfer`](crate::Token::of_transfer).
    pub fn of_transfer(transfer: &str) -> Self {
        let bits = u128::from_be_bytes(crate::token::derived(b"kvferry transfer offer\0", transfer));
        Self { high: (bits >> 64) as u64, low: (bits as u64).max(1) }
    }
}

impl fmt::Display for OfferId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}{:016x}", self.high, self.low)
    }
}

impl fmt::Debug for OfferId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl TryFrom<String> for OfferId {
    type Error = BadHex;
    fn try_from(s: String) -> Result<Self, BadHex> {
        let bad = BadHex { what: "an offer id", digits: 32 };
        if s.len() != 32 || !s.is_ascii() {
            return Err(bad);
        }
        let half = |t: &str| u64::from_str_radix(t, 16).map_err(|_| bad.clone());
        let id = Self { high: half(&s[..16])?, low: half(&s[16..])? };
        if id.low == 0 { Err(bad) } else { Ok(id) }
    }
}

impl From<OfferId> for String {
    fn from(i: OfferId) -> String {
        i.to_string()
    }
}

/// A group of layers that share a block table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct GroupId(pub u16);

/// A block's number in its group's pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BlockId(pub u32);

impl BlockId {
    /// On the wire: no block at this position (it is before a sliding window).
    pub const NULL: u32 = u32::MAX;
}

/// A block: the unit of reporting. Loaded when all its pieces from all source ranks are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Block {
    /// The group.
    pub group: GroupId,
    /// The block in the group's pool.
    pub id: BlockId,
}

/// A set of block positions, kept as sorted, disjoint, inclusive ranges: loaded blocks are nearly always a prefix.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PositionSet(Vec<[u32; 2]>);

impl PositionSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one position. Takes constant time at the end of the set, linear time elsewhere.
    pub fn insert(&mut self, p: u32) {
        self.insert_range(p, p);
    }

    /// Adds `first..=last`. An empty range (`first > last`) adds nothing.
    pub fn insert_range(&mut self, first: u32, last: u32) {
        if first > last {
            return;
        }
        // [from, to) are the ranges that touch or overlap the new one.
        let from = self.0.partition_point(|r| r[1] < first.saturating_sub(u32::from(first > 0)));
        let to = self.0.partition_point(|r| r[0] <= last.saturating_add(1));
        if from >= to {
            self.0.insert(from, [first, last]);
        } else {
            let merged = [first.min(self.0[from][0]), last.max(self.0[to - 1][1])];
            self.0.splice(from..to, [merged]);
        }
    }

    /// Adds ascending positions, run by run.
    pub fn insert_ascending(&mut self, positions: impl Iterator<Item = u32>) {
        let mut run: Option<(u32, u32)> = None;
        for p in positions {
            match &mut run {
                Some((_, last)) if last.checked_add(1) == Some(p) => *last = p,
                _ => {
                    if let Some((a, b)) = run.replace((p, p)) {
                        self.insert_range(a, b);
                    }
                }
            }
        }
        if let Some((a, b)) = run {
            self.insert_range(a, b);
        }
    }

    /// Whether `p` is in the set.
    pub fn contains(&self, p: u32) -> bool {
        let i = self.0.partition_point(|r| r[1] < p);
        self.0.get(i).is_some_and(|r| r[0] <= p)
    }

    /// Number of positions.
    pub fn len(&self) -> u64 {
        self.0.iter().map(|r| u64::from(r[1] - r[0]) + 1).sum()
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ranges `[first, last]`, in order.
    pub fn ranges(&self) -> &[[u32; 2]] {
        &self.0
    }

    /// Every position, in order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().flat_map(|r| r[0]..=r[1])
    }
}

impl FromIterator<u32> for PositionSet {
    fn from_iter<T: IntoIterator<Item = u32>>(iter: T) -> Self {
        let mut s = Self::new();
        for p in iter {
            s.insert(p);
        }
        s
    }
}

impl fmt::Debug for PositionSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|r| (r[0], r[1]))).finish()
    }
}

/// Marks on the blocks of a pool, one bit each. Finds a block that is listed twice, at a nanosecond a block.
#[derive(Debug)]
pub struct Marks(Vec<u64>);

impl Marks {
    /// No marks, for blocks `0..blocks`.
    pub fn new(blocks: u32) -> Self {
        Self(vec![0; (blocks as usize).div_ceil(64)])
    }

    /// Marks a block. `false` when it was marked before or is not in the pool.
    pub fn insert(&mut self, block: BlockId) -> bool {
        let Some(word) = self.0.get_mut(block.0 as usize / 64) else { return false };
        let bit = 1 << (block.0 % 64);
        let fresh = *word & bit == 0;
        *word |= bit;
        fresh
    }
}

fn random_nonzero() -> NonZeroU64 {
    loop {
        // Without a random source neither ids nor nonces are safe, and no caller can continue.
        let raw = getrandom::u64().expect("the system's random source failed");
        if let Some(n) = NonZeroU64::new(raw) {
            return n;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn a_position_set_equals_a_plain_set(ops in proptest::collection::vec((0u32..60, 0u32..6), 0..40)) {
            let mut plain = BTreeSet::new();
            let mut set = PositionSet::new();
            for (first, n) in ops {
                plain.extend(first..=first + n);
                set.insert_range(first, first + n);
            }
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), plain.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.len(), plain.len() as u64);
            prop_assert!((0..80).all(|p| set.contains(p) == plain.contains(&p)));
            prop_assert!(set.ranges().windows(2).all(|w| w[0][1] + 1 < w[1][0]), "ranges neither touch nor overlap: {:?}", set);
        }
    }

    #[test]
    fn a_position_set_holds_both_ends_of_the_range() {
        let mut set = PositionSet::new();
        set.insert(u32::MAX);
        set.insert(0);
        set.insert_range(1, u32::MAX - 1);
        assert_eq!(set.ranges(), &[[0, u32::MAX]]);
    }

    #[test]
    fn an_engine_with_one_restarted_rank_has_a_new_incarnation() {
        let [a, b, c] = [Incarnation::random(), Incarnation::random(), Incarnation::random()];
        assert_ne!(Incarnation::of_engine(&[a, b]), Incarnation::of_engine(&[a, c]));
        assert_ne!(Incarnation::of_engine(&[a, b]), Incarnation::of_engine(&[b, a]));
        assert_eq!(Incarnation::of_engine(&[a]), Some(a));
    }

    #[test]
    fn ids_survive_json() {
        let (i, o) = (Incarnation::random(), OfferId::random());
        let (i2, o2): (Incarnation, OfferId) = serde_json::from_str(&serde_json::to_string(&(i, o)).unwrap()).unwrap();
        assert_eq!((i, o), (i2, o2));
        assert!(serde_json::from_str::<Incarnation>("\"0000000000000000\"").is_err());
        assert!(serde_json::from_str::<OfferId>("\"zz\"").is_err());
    }
}
