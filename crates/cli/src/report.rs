//! The reports of the commands, as text and as JSON. The JSON's field names are stable: a minor version may add fields, but
//! it renames and removes none.

use std::{collections::BTreeMap, sync::OnceLock, time::Duration};

use kvferry::{Cause, HelloError, Offer, Outcome, PositionSet, WaitError};
use serde::Serialize;

use crate::pool::MemoryRecord;

/// How a command ended: the field `result` of its JSON. The names are stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Ending {
    /// Every block was loaded, with the right bytes.
    Complete,
    /// Some blocks are invalid.
    Incomplete,
    /// A loaded block has a wrong byte.
    Mismatch,
    /// The pull decided and will not end: its lane is wedged.
    Wedged,
    /// The data thread panicked.
    Died,
    /// The peer could not be reached, or did not answer in time.
    Unreachable,
    /// The peer refused: other model, dtype, version, or more blocks than it has.
    Refused,
    /// The offer is unreadable, malformed, or does not fit.
    BadOffer,
    /// The flags are wrong.
    Usage,
    /// Anything else.
    Failed,
}

/// The command that runs, such as `pull`.
static COMMAND: OnceLock<String> = OnceLock::new();

/// Sets the command that [`help`] names.
pub(crate) fn set_command(name: Option<&str>) {
    let _ = COMMAND.set(name.map_or(String::new(), |n| format!(" {n}")));
}

/// Where the flags of the command are explained.
pub(crate) fn help() -> String {
    format!("see `kvferry{} --help`", COMMAND.get().map_or("", String::as_str))
}

/// The failure of a command.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Exit code: 1 if the command failed or was refused, 2 for wrong usage.
    pub code: u8,
    /// The kind of failure.
    pub ending: Ending,
    /// One line with the cause and the next step.
    pub message: String,
}

/// The JSON of a failed command. A failed `pull` has a [`PullRecord`] instead.
#[derive(Debug, Serialize)]
pub(crate) struct FailureRecord {
    result: Ending,
    error: String,
}

impl From<&Failure> for FailureRecord {
    fn from(f: &Failure) -> Self {
        Self { result: f.ending, error: f.message.clone() }
    }
}

impl Failure {
    /// The command failed or was refused.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::of(Ending::Failed, message.into())
    }

    /// The command failed in this way.
    pub(crate) fn of(ending: Ending, error: impl std::fmt::Display) -> Self {
        Self { code: 1, ending, message: error.to_string() }
    }

    /// A pull did not end.
    pub(crate) fn waiting(error: &WaitError) -> Self {
        match error {
            WaitError::Wedged { .. } => Self::of(Ending::Wedged, error),
            WaitError::Died => Self::of(Ending::Died, error),
            _ => Self::of(Ending::Failed, error),
        }
    }

    /// The handshake failed.
    pub(crate) fn dial(error: &HelloError) -> Self {
        let unreachable = matches!(error, HelloError::Unreachable { .. });
        Self::of(if unreachable { Ending::Unreachable } else { Ending::Refused }, error)
    }

    /// The flags are wrong.
    pub(crate) fn usage(message: impl std::fmt::Display) -> Self {
        Self { code: 2, ending: Ending::Usage, message: format!("{message}; {}", help()) }
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
    /// How it ended.
    pub result: Ending,
    /// The line on standard error; `null` if there is none.
    pub error: Option<String>,
    /// Offer id; `null` as long as there is no offer.
    pub offer: Option<String>,
    /// The producer's request id.
    pub request: Option<String>,
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
    /// From the start of the command to the call: Hello and the fresh offer.
    pub setup_us: Option<u64>,
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
    /// The producer; `null` as long as there is no offer.
    pub peer: Option<PeerRecord>,
    /// Where this side's pool lies; `null` as long as there is none.
    pub memory: Option<MemoryRecord>,
    /// Where the producer's pool lies; `null` as long as it has not said.
    pub peer_memory: Option<MemoryRecord>,
}

/// Whole microseconds.
pub(crate) fn us(d: Duration) -> u64 {
    u64::try_from(d.as_micros()).unwrap_or(u64::MAX)
}

impl PullRecord {
    /// A pull that has not begun.
    pub(crate) fn new(deadline: Duration) -> Self {
        Self {
            result: Ending::Failed,
            error: None,
            offer: None,
            request: None,
            lane: None,
            blocks: 0,
            loaded: PositionSet::new(),
            invalid: PositionSet::new(),
            causes: BTreeMap::new(),
            verified_bytes: 0,
            mismatched_bytes: 0,
            bytes: 0,
            setup_us: None,
            hello_us: None,
            claim_us: None,
            first_us: None,
            data_us: None,
            decided_us: None,
            ended_us: None,
            deadline_us: us(deadline),
            retries: 0,
            peer: None,
            memory: None,
            peer_memory: None,
        }
    }

    /// Enters the offer.
    pub(crate) fn offer(&mut self, offer: &Offer) {
        self.offer = Some(offer.id.to_string());
        self.request = Some(offer.request.clone());
        self.peer = Some(PeerRecord { engine: offer.engine.to_string(), incarnation: offer.incarnation.to_string() });
    }

    /// Enters the decision, and the end if there is one.
    pub(crate) fn outcome(&mut self, o: &Outcome) {
        for g in &o.groups {
            self.loaded.insert_ascending(g.loaded.iter());
            self.invalid.insert_ascending(g.invalid.iter());
            for (cause, set) in &g.causes {
                self.causes.entry(*cause).or_default().insert_ascending(set.iter());
            }
        }
        self.lane = o.lanes.last().map(|l| l.as_str());
        (self.blocks, self.bytes, self.retries) = (o.loaded() + o.invalid(), o.bytes, o.retries);
        self.hello_us = o.times.hello.map(us);
        self.claim_us = o.times.claim.map(us);
        self.first_us = o.times.first.map(us);
        self.data_us = o.times.data.map(us);
        self.decided_us = o.times.decided.map(us);
        self.ended_us = o.times.ended.map(us);
    }

    /// Enters the comparison of the loaded bytes with the pattern.
    pub(crate) fn checked(&mut self, verified_bytes: u64, mismatched_bytes: u64) {
        (self.verified_bytes, self.mismatched_bytes) = (verified_bytes, mismatched_bytes);
        self.result = match (mismatched_bytes, self.invalid.is_empty()) {
            (0, true) => Ending::Complete,
            (0, false) => Ending::Incomplete,
            _ => Ending::Mismatch,
        };
    }

    /// Enters a failure.
    pub(crate) fn failed(&mut self, failure: &Failure) {
        (self.result, self.error) = (failure.ending, Some(failure.message.clone()));
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
