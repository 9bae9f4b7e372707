//! Checks on single fields, and the error that names the field.

use std::time::Duration;

use kvferry_proto::{ClaimId, Incarnation, OfferId, PeerId, Reader, Token};

use crate::control::proto;

/// Most readers of an offer in one engine.
pub(crate) const MAX_READERS: u32 = 1 << 16;
/// Longest text of a mismatch, in bytes; a longer one is cut.
pub(super) const MAX_SAID: usize = 1024;
/// Longest accepted time; a longer one is cut. Keeps sums of times far from overflow.
const MAX_TIME: Duration = Duration::from_secs(86_400);

/// A message that breaks a bound of the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {what}")]
pub struct BadMessage {
    /// The field's path: `welcome.pool.groups`.
    pub field: String,
    /// What is wrong with it.
    pub what: String,
}

pub(super) type Checked<T> = Result<T, BadMessage>;

pub(super) fn bad<T>(field: &str, what: impl Into<String>) -> Checked<T> {
    Err(BadMessage { field: field.into(), what: what.into() })
}

/// Prefixes the error's field with the outer field's name.
pub(super) fn within<T>(outer: &str, inner: Checked<T>) -> Checked<T> {
    inner.map_err(|e| BadMessage { field: format!("{outer}.{}", e.field), what: e.what })
}

pub(super) fn present<T>(field: &str, value: Option<T>) -> Checked<T> {
    value.map_or_else(|| bad(field, "is missing"), Ok)
}

pub(super) fn text(field: &str, value: String, max: usize) -> Checked<String> {
    if value.len() > max {
        return bad(field, format!("{} bytes, over the limit of {max}", value.len()));
    }
    if value.chars().any(char::is_control) {
        return bad(field, "has control characters");
    }
    Ok(value)
}

/// Text for logs only: cut rather than refused, and without control characters.
pub(super) fn shortened(value: String) -> String {
    let mut value = value.replace(char::is_control, "?");
    if value.len() > MAX_SAID {
        let end = (0..=MAX_SAID).rev().find(|&i| value.is_char_boundary(i)).unwrap_or(0);
        value.truncate(end);
    }
    value
}

pub(super) fn incarnation(field: &str, raw: u64) -> Checked<Incarnation> {
    Incarnation::from_wire(raw).map_or_else(|| bad(field, "is zero"), Ok)
}

pub(super) fn claim_id(field: &str, raw: u64) -> Checked<ClaimId> {
    if raw == 0 { bad(field, "is zero") } else { Ok(ClaimId(raw)) }
}

pub(super) fn offer_id(field: &str, raw: Option<proto::OfferId>) -> Checked<OfferId> {
    let proto::OfferId { high, low } = present(field, raw)?;
    if low == 0 { bad(field, "its lower half is zero") } else { Ok(OfferId { high, low }) }
}

pub(super) fn token(field: &str, raw: &[u8]) -> Checked<Token> {
    raw.try_into().map(Token::from_bytes).or_else(|_| bad(field, format!("{} bytes, not 16", raw.len())))
}

pub(super) fn narrow<T: TryFrom<u32>>(field: &str, raw: u32) -> Checked<T> {
    T::try_from(raw).or_else(|_| bad(field, format!("{raw} is too large")))
}

pub(super) fn reader(index: u32, of: u32) -> Checked<Reader> {
    if of == 0 || of > MAX_READERS {
        return bad("readers", format!("{of}, where 1 to {MAX_READERS} are possible"));
    }
    if index >= of {
        return bad("reader", format!("{index}, which is not below readers, {of}"));
    }
    Ok(Reader { index, of })
}

pub(super) fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn time(ms: u64) -> Duration {
    Duration::from_millis(ms).min(MAX_TIME)
}

/// A required peer.
pub(super) fn peer(field: &str, p: Option<proto::Peer>) -> Checked<PeerId> {
    within(field, present(field, p)?.try_into())
}
