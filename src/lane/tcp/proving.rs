//! Connections without a proof: their deadlines, and each address's share of them.
//!
//! Strangers may connect and stay silent. The newest connection always gets its chance, and an address that connects more
//! than its share displaces its own connections, never those of another address (promise 7, Isolated). No I/O and no clock.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    time::Instant,
};

/// An address may hold one of this many parts of all places: three more addresses can do the same, and a fourth one displaces
/// the connections of these four.
const SHARE: usize = 4;

/// Connections that have not proven themselves.
pub(super) struct Proving {
    /// Oldest first. Some may have proven themselves, or be gone, by now.
    queue: VecDeque<Waiting>,
    most: usize,
}

struct Waiting {
    by: Instant,
    token: u64,
    from: IpAddr,
}

impl Proving {
    /// At most `most` connections.
    pub(super) fn new(most: usize) -> Self {
        Self { queue: VecDeque::new(), most }
    }

    /// The first deadline.
    pub(super) fn next(&self) -> Option<Instant> {
        self.queue.front().map(|w| w.by)
    }

    /// Removes and returns a connection that is past its deadline.
    pub(super) fn expired(&mut self, now: Instant, mut is_proving: impl FnMut(u64) -> bool) -> Option<u64> {
        while let Some(first) = self.queue.front() {
            let (token, proving) = (first.token, is_proving(first.token));
            if proving && first.by > now {
                return None;
            }
            self.queue.pop_front();
            if proving {
                return Some(token);
            }
        }
        None
    }

    /// Adds a connection; `by` is never before that of the last one. Removes and returns the connection that has to close
    /// for it, if there is one: the oldest of this address if that has its share, else, if every place is taken, the oldest
    /// of the address with the most.
    #[must_use]
    pub(super) fn add(
        &mut self,
        by: Instant,
        token: u64,
        from: IpAddr,
        mut is_proving: impl FnMut(u64) -> bool,
    ) -> Option<u64> {
        let from = host(from);
        self.queue.retain(|w| is_proving(w.token));
        let held = self.queue.iter().filter(|w| w.from == from).count();
        let payer = if held >= (self.most / SHARE).max(1) {
            Some(from)
        } else if self.queue.len() >= self.most {
            self.greediest()
        } else {
            None
        };
        let at = payer.and_then(|payer| self.queue.iter().position(|w| w.from == payer));
        let displaced = at.and_then(|at| self.queue.remove(at)).map(|w| w.token);
        self.queue.push_back(Waiting { by, token, from });
        displaced
    }

    /// The address with the most connections.
    fn greediest(&self) -> Option<IpAddr> {
        let mut held = HashMap::<IpAddr, usize>::new();
        self.queue.iter().for_each(|w| *held.entry(w.from).or_default() += 1);
        held.into_iter().max_by_key(|(_, n)| *n).map(|(from, _)| from)
    }
}

/// The host behind an address. Of IPv6 the first 64 bits: one host may use all addresses behind them.
fn host(from: IpAddr) -> IpAddr {
    match from.to_canonical() {
        IpAddr::V6(ip) => IpAddr::V6((ip.to_bits() >> 64 << 64).into()),
        ip => ip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::HashSet, time::Duration};

    fn ip(n: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, n])
    }

    #[test]
    fn an_address_over_its_share_displaces_its_own_oldest() {
        let (mut p, now) = (Proving::new(16), Instant::now());
        assert_eq!(p.add(now, 100, ip(1), |_| true), None);
        for token in 0..4 {
            assert_eq!(p.add(now, token, ip(2), |_| true), None);
        }
        for token in 4..1000 {
            assert_eq!(p.add(now, token, ip(2), |_| true), Some(token - 4));
        }
        assert_eq!(p.expired(now, |_| true), Some(100), "the other address kept its place");
    }

    #[test]
    fn strangers_from_many_addresses_do_not_displace_an_address_with_one_connection() {
        let (mut p, now) = (Proving::new(16), Instant::now());
        assert_eq!(p.add(now, 0, ip(0), |_| true), None);
        let mut displaced = HashSet::new();
        for token in 1..1000u64 {
            displaced.extend(p.add(now, token, ip(1 + (token % 5) as u8), |_| true));
            assert!(p.queue.len() <= 16);
        }
        assert!(displaced.len() > 900 && !displaced.contains(&0));
    }

    #[test]
    fn proven_connections_take_no_place() {
        let (mut p, now) = (Proving::new(4), Instant::now());
        for token in 0..100 {
            assert_eq!(p.add(now, token, ip(1), |t| t + 1 > token), None);
        }
    }

    #[test]
    fn one_host_has_all_addresses_of_its_network() {
        let ip = |text: &str| host(text.parse().unwrap());
        assert_eq!(ip("fd00:0:0:1::1"), ip("fd00:0:0:1:ffff::2"));
        assert_ne!(ip("fd00:0:0:1::1"), ip("fd00:0:0:2::1"));
        assert_eq!(ip("::ffff:10.0.0.1"), ip("10.0.0.1"));
    }

    #[test]
    fn only_silent_connections_expire_and_only_at_their_deadline() {
        let (mut p, now) = (Proving::new(16), Instant::now());
        let later = now + Duration::from_secs(1);
        for (by, token) in [(now, 1), (now, 2), (later, 3)] {
            assert_eq!(p.add(by, token, ip(1), |_| true), None);
        }
        assert_eq!(p.next(), Some(now));
        assert_eq!(p.expired(now, |t| t != 1), Some(2), "the first one is proven");
        assert_eq!(p.expired(now, |_| true), None);
        assert_eq!(p.expired(later, |_| true), Some(3));
        assert_eq!(p.next(), None);
    }
}
