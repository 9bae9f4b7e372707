//! The reports of the commands, as text and as JSON. The JSON's field names are stable: a minor version may add fields, but
//! it renames and removes none.

use std::{collections::BTreeMap, time::Duration};

use kvferry::{Cause, Ended, PositionSet};
use serde::Serialize;

/// The failure of a command.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Exit code: 1 if the command failed or was refused, 2 for wrong usage.
    pub code: u8,
    /// One line with the cause and the next step.
    pub message: String,
}

impl Failure {
    /// The command failed or was refused.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self { code: 1, message: message.into() }
    }

    /// The flags are wrong.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self { code: 2, message: message.into() }
    }
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(e: E) -> Self {
        Self::failed(e.to_string())
    }
}

/// The producer of a pull.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct PeerRecord {
    /// Engine id.
    pub engine: String,
    /// Incarnation, 16 hexadecimal digits.
    pub incarnation: String,
}

/// One pull. Positions count blocks from the start of the prompt. Times are in microseconds since the call; `null` means
/// that the event did not happen.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct PullRecord {
    /// Offer id.
    pub offer: String,
    /// The producer's request id.
    pub request: String,
    /// The last lane; `null` if there was none.
    pub lane: Option<&'static str>,
    /// Blocks wanted.
    pub blocks: u64,
    /// Positions loaded, as `[first, last]`.
    pub loaded: PositionSet,
    /// Positions invalid, as `[first, last]`.
    pub invalid: PositionSet,
    /// The invalid positions by cause.
    pub causes: BTreeMap<Cause, PositionSet>,
    /// Bytes of loaded blocks that hold the pattern.
    pub verified_bytes: u64,
    /// Bytes of loaded blocks that differ from the pattern; always 0.
    pub mismatched_bytes: u64,
    /// Bytes of the loaded blocks.
    pub bytes: u64,
    /// The handshake was complete.
    pub hello_us: Option<u64>,
    /// The claim was granted.
    pub claim_us: Option<u64>,
    /// The first chunk was fenced.
    pub first_us: Option<u64>,
    /// The last chunk was fenced.
    pub data_us: Option<u64>,
    /// The two sets were frozen.
    pub decided_us: Option<u64>,
    /// Nothing could write local memory any more.
    pub ended_us: Option<u64>,
    /// The deadline.
    pub deadline_us: u64,
    /// Attempts after the first.
    pub retries: u32,
    /// The producer.
    pub peer: PeerRecord,
}

/// Whole microseconds.
pub(crate) fn us(d: Duration) -> u64 {
    u64::try_from(d.as_micros()).unwrap_or(u64::MAX)
}

impl PullRecord {
    /// The record of an ended pull whose bytes were compared with the pattern.
    pub(crate) fn new(ended: &Ended, verified_bytes: u64, mismatched_bytes: u64) -> Self {
        let o = &ended.outcome;
        let mut causes = BTreeMap::new();
        let (mut loaded, mut invalid) = (PositionSet::new(), PositionSet::new());
        for g in &o.groups {
            loaded.insert_ascending(g.loaded.iter());
            invalid.insert_ascending(g.invalid.iter());
            for (cause, set) in &g.causes {
                causes.entry(*cause).or_insert_with(PositionSet::new).insert_ascending(set.iter());
            }
        }
        Self {
            offer: ended.offer.id.to_string(),
            request: ended.offer.request.clone(),
            lane: o.lanes.last().map(|l| l.as_str()),
            blocks: o.loaded() + o.invalid(),
            loaded,
            invalid,
            causes,
            verified_bytes,
            mismatched_bytes,
            bytes: o.bytes,
            hello_us: o.times.hello.map(us),
            claim_us: o.times.claim.map(us),
            first_us: o.times.first.map(us),
            data_us: o.times.data.map(us),
            decided_us: o.times.decided.map(us),
            ended_us: o.times.ended.map(us),
            deadline_us: us(o.times.deadline),
            retries: o.retries,
            peer: PeerRecord {
                engine: ended.offer.engine.to_string(),
                incarnation: ended.offer.incarnation.to_string(),
            },
        }
    }
}

/// A set of positions as text: `0-63, 70`.
pub(crate) fn ranges(set: &PositionSet) -> String {
    let one = |r: &[u32; 2]| if r[0] == r[1] { r[0].to_string() } else { format!("{}-{}", r[0], r[1]) };
    match set.ranges() {
        [] => "none".into(),
        [many @ .., last] if many.len() > 4 => {
            format!("{}, … ({} ranges), {}", one(&many[0]), many.len() + 1, one(last))
        }
        all => all.iter().map(one).collect::<Vec<_>>().join(", "),
    }
}

/// A number of bytes as text.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        b if b >= 1 << 30 => format!("{:.2} GiB", b as f64 / (1u64 << 30) as f64),
        b if b >= 1 << 20 => format!("{:.1} MiB", b as f64 / (1u64 << 20) as f64),
        b if b >= 1 << 10 => format!("{:.1} KiB", b as f64 / 1024.0),
        b => format!("{b} B"),
    }
}
