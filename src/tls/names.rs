//! The engines that a certificate may speak for: its subject alternative names of the form `kvferry://engine/ID`.

use std::{collections::BTreeSet, fmt};

use kvferry_proto::EngineId;
use rustls::pki_types::CertificateDer;

/// The form of a name, before the engine id.
const PREFIX: &str = "kvferry://engine/";
/// In place of an id: any engine.
const ANY: &str = "*";

/// The complaint about a certificate that names no engine. Its subject is the caller's to add.
pub(crate) const NAMELESS: &str =
    "names no engine: issue it with the URI kvferry://engine/ID as a subject alternative name";

/// The engines that a certificate names.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(crate) struct EngineNames {
    any: bool,
    ids: BTreeSet<String>,
}

/// The engines that the certificate of a verified chain names. Of a malformed certificate or name: none.
pub(crate) fn peer_engines(chain: &[CertificateDer<'_>]) -> EngineNames {
    let mut names = EngineNames::default();
    let Some(Ok(end)) = chain.first().map(webpki::EndEntityCert::try_from) else { return names };
    for name in end.valid_uri_names().filter_map(|uri| uri.strip_prefix(PREFIX)) {
        names.any |= name == ANY;
        // A literal `*` in an id is written `%2A`.
        names.ids.extend((name != ANY).then(|| decoded(name)).flatten());
    }
    names
}

impl EngineNames {
    /// Whether it names no engine.
    pub(crate) fn is_empty(&self) -> bool {
        !self.any && self.ids.is_empty()
    }

    /// Whether it names every engine: a certificate that a deployment shares does not tell its peers apart.
    pub(crate) fn is_any(&self) -> bool {
        self.any
    }

    /// Checks that it names `engine`. The error is a sentence whose subject, the certificate, is the caller's to add.
    pub(crate) fn check(&self, engine: &EngineId) -> Result<(), String> {
        match self {
            _ if self.any || self.ids.contains(engine.as_str()) => Ok(()),
            _ if self.is_empty() => Err(NAMELESS.into()),
            _ => Err(format!("speaks for engine {self}, not {engine:?}")),
        }
    }
}

impl fmt::Display for EngineNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Longest list in a log line.
        const SHOWN: usize = 4;
        for (i, id) in self.ids.iter().take(SHOWN).enumerate() {
            write!(f, "{}{id:?}", if i == 0 { "" } else { ", " })?;
        }
        if self.ids.len() > SHOWN { write!(f, " and {} more", self.ids.len() - SHOWN) } else { Ok(()) }
    }
}

/// An engine id without its percent encoding; `None` if it is not an engine id.
fn decoded(name: &str) -> Option<String> {
    let (mut bytes, mut rest) = (Vec::with_capacity(name.len()), name.as_bytes());
    while let [first, more @ ..] = rest {
        if *first == b'%' {
            let (hex, after) = more.split_at_checked(2)?;
            let hex = std::str::from_utf8(hex).ok().filter(|h| h.bytes().all(|b| b.is_ascii_hexdigit()))?;
            bytes.push(u8::from_str_radix(hex, 16).ok()?);
            rest = after;
        } else {
            bytes.push(*first);
            rest = more;
        }
    }
    let id = String::from_utf8(bytes).ok()?;
    id.parse::<EngineId>().ok().map(|_| id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_decoded_or_names_nothing() {
        for (name, id) in [("a", "a"), ("decode-0", "decode-0"), ("a%20b%2F%C3%A4", "a b/ä"), ("%2A", "*"), ("ä", "ä")]
        {
            assert_eq!(decoded(name).as_deref(), Some(id));
        }
        let long = "x".repeat(EngineId::MAX_BYTES + 1);
        for bad in ["", "%", "%2", "%zz", "%+1", "%ff", "a%00", long.as_str()] {
            assert_eq!(decoded(bad), None, "{bad:?}");
        }
    }
}
