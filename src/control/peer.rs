//! The peer behind a connection: its certificate or its address, and its share of this producer.
//!
//! Every limit is also one of each peer, so that a greedy or broken one takes its share and no more (promise 7).

use std::{
    collections::HashMap,
    fmt,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::tls::EngineNames;

/// What tells peers apart: limits and counts are kept by it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum PeerKey {
    /// The engines that its certificate names. Stays the same when the certificate is renewed.
    Engines(Arc<EngineNames>),
    /// Its source address, without a certificate or with one that a deployment shares. Of IPv6 the first 64 bits: one host
    /// may use all addresses behind them.
    Address(IpAddr),
}

impl PeerKey {
    /// The peer at an address, with the engines of its certificate.
    pub(crate) fn new(from: IpAddr, engines: Option<&Arc<EngineNames>>) -> Self {
        match engines {
            Some(names) if !names.is_any() && !names.is_empty() => Self::Engines(names.clone()),
            _ => Self::Address(match from.to_canonical() {
                IpAddr::V6(ip) => IpAddr::V6((ip.to_bits() >> 64 << 64).into()),
                ip => ip,
            }),
        }
    }
}

impl fmt::Display for PeerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Engines(names) => write!(f, "engine {names}"),
            Self::Address(IpAddr::V6(ip)) => write!(f, "{ip}/64"),
            Self::Address(ip) => ip.fmt(f),
        }
    }
}

/// Things that peers hold, counted.
#[derive(Debug, Default)]
pub(crate) struct Counts(HashMap<PeerKey, usize>);

impl Counts {
    /// Number of things that this peer holds.
    pub(crate) fn of(&self, peer: &PeerKey) -> usize {
        self.0.get(peer).copied().unwrap_or(0)
    }

    pub(crate) fn add(&mut self, peer: &PeerKey) {
        self.add_many(peer, 1);
    }

    pub(crate) fn add_many(&mut self, peer: &PeerKey, n: usize) {
        if n > 0 {
            *self.0.entry(peer.clone()).or_default() += n;
        }
    }

    pub(crate) fn remove(&mut self, peer: &PeerKey, n: usize) {
        if let Some(held) = self.0.get_mut(peer) {
            *held = held.saturating_sub(n);
            if *held == 0 {
                self.0.remove(peer);
            }
        }
    }
}

/// Time between two log lines about one peer and one kind of refusal.
const QUIET: Duration = Duration::from_secs(60);
/// Most peers and kinds of refusal in the log's memory. Others are not logged while it is full.
const REMEMBERED: usize = 1024;

/// Logs refusals: at once, then one line a minute with their number.
#[derive(Default)]
pub(crate) struct RefusalLog(Mutex<HashMap<(PeerKey, &'static str), Told>>);

struct Told {
    at: Instant,
    /// Refusals since then, and the last one's text.
    more: u64,
    why: String,
}

impl RefusalLog {
    /// A refusal of `peer`. `kind`: refusals of one kind share their lines.
    pub(crate) fn refused(&self, now: Instant, peer: &PeerKey, kind: &'static str, why: &dyn fmt::Display) {
        let mut told = self.0.lock();
        let is_full = told.len() >= REMEMBERED;
        let key = (peer.clone(), kind);
        match told.get_mut(&key) {
            Some(t) => {
                t.more += 1;
                t.why = why.to_string();
            }
            None if !is_full => {
                tracing::warn!(%peer, why = %why, "refused a peer");
                told.insert(key, Told { at: now, more: 0, why: String::new() });
            }
            None => {}
        }
    }

    /// Logs the refusals of the past minute, and forgets peers without any. Called from time to time.
    pub(crate) fn sweep(&self, now: Instant) {
        self.0.lock().retain(|(peer, _), told| {
            if now.saturating_duration_since(told.at) < QUIET {
                return true;
            }
            let more = std::mem::take(&mut told.more);
            if more > 0 {
                tracing::warn!(%peer, refused = more, why = told.why, "refused a peer, in the past minute");
                told.at = now;
            }
            more > 0
        });
    }

    #[cfg(test)]
    pub(crate) fn told(&self, peer: &PeerKey, kind: &'static str) -> Option<u64> {
        self.0.lock().get(&(peer.clone(), kind)).map(|t| t.more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ip: &str) -> PeerKey {
        PeerKey::new(ip.parse().unwrap(), None)
    }

    #[test]
    fn an_address_is_one_peer_in_every_form() {
        assert_eq!(at("10.0.0.1"), at("::ffff:10.0.0.1"));
        assert_ne!(at("10.0.0.1"), at("10.0.0.2"));
        assert_eq!(at("fd00:0:0:1::1"), at("fd00:0:0:1:ffff::2"), "one host has all of them");
        assert_ne!(at("fd00:0:0:1::1"), at("fd00:0:0:2::1"));
    }

    #[test]
    fn refusals_are_logged_once_a_minute_with_their_number() {
        let (log, now, peer) = (RefusalLog::default(), Instant::now(), at("10.0.0.1"));
        for _ in 0..5 {
            log.refused(now, &peer, "sessions", &"too many");
        }
        assert_eq!(log.told(&peer, "sessions"), Some(4), "the first one was logged");
        log.sweep(now + QUIET / 2);
        assert_eq!(log.told(&peer, "sessions"), Some(4));
        log.sweep(now + QUIET);
        assert_eq!(log.told(&peer, "sessions"), Some(0), "logged with their number");
        log.sweep(now + QUIET * 2);
        assert_eq!(log.told(&peer, "sessions"), None, "forgotten after a minute without any");
        for i in 0..2 * REMEMBERED as u32 {
            log.refused(now, &PeerKey::Address(IpAddr::V4(i.into())), "sessions", &"too many");
        }
        assert_eq!(log.0.lock().len(), REMEMBERED);
    }
}
