//! The hosts that a consumer may connect to. An address comes with a name, from outside.

use std::net::IpAddr;

/// A parsed [`Config::dial`](crate::Config::dial).
#[derive(Debug, Clone, Default)]
pub(crate) struct DialList {
    networks: Vec<(IpAddr, u8)>,
    /// In lower case; the end of host names if it begins with a dot.
    hosts: Vec<String>,
}

impl DialList {
    /// Parses the entries. The error is a sentence.
    pub(crate) fn new(entries: &[String]) -> Result<Self, String> {
        let mut list = Self::default();
        for entry in entries {
            let bad = || format!("{entry:?} is not a network, an address, a host name or .SUFFIX");
            let (host, bits) = match entry.split_once('/') {
                Some((host, bits)) => (host, Some(bits.parse::<u8>().map_err(|_| bad())?)),
                None => (entry.as_str(), None),
            };
            match (address(host), bits) {
                (Some(ip), None) => list.networks.push((ip, width(ip))),
                (Some(ip), Some(bits)) if bits <= width(ip) => list.networks.push((ip, bits)),
                (None, None) if is_host(host.strip_prefix('.').unwrap_or(host)) => {
                    list.hosts.push(host.to_ascii_lowercase());
                }
                _ => return Err(bad()),
            }
        }
        Ok(list)
    }

    /// Whether this host may be connected to: a name, or an address with or without brackets.
    pub(crate) fn allows(&self, host: &str) -> bool {
        if self.networks.is_empty() && self.hosts.is_empty() {
            return true;
        }
        match address(host) {
            Some(ip) => self.networks.iter().any(|(net, bits)| is_in(ip, *net, *bits)),
            None => {
                let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
                let fits = |h: &String| *h == host || (h.starts_with('.') && host.len() > h.len() && host.ends_with(h));
                is_host(&host) && self.hosts.iter().any(fits)
            }
        }
    }

    /// [`DialList::allows`] for `HOST:PORT`.
    pub(crate) fn allows_addr(&self, addr: &str) -> bool {
        self.allows(addr.rsplit_once(':').map_or(addr, |(host, _)| host))
    }
}

/// An address. An IPv4-mapped IPv6 address is the same host.
fn address(host: &str) -> Option<IpAddr> {
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    bare.parse::<IpAddr>().ok().map(|ip| ip.to_canonical())
}

fn width(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

fn is_in(ip: IpAddr, net: IpAddr, bits: u8) -> bool {
    let differs = match (ip, net) {
        (IpAddr::V4(a), IpAddr::V4(b)) => u128::from(a.to_bits() ^ b.to_bits()) << 96,
        (IpAddr::V6(a), IpAddr::V6(b)) => a.to_bits() ^ b.to_bits(),
        _ => return false,
    };
    differs.leading_zeros() >= bits.into()
}

fn is_host(name: &str) -> bool {
    // A name that ends in a number is an address in an old form, such as 127.1.
    let last = name.rsplit('.').next().unwrap_or_default();
    !last.is_empty()
        && !last.bytes().all(|b| b.is_ascii_digit())
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(entries: &[&str]) -> DialList {
        DialList::new(&entries.iter().map(|e| (*e).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn only_listed_hosts_and_networks_are_allowed() {
        let l = list(&["10.1.0.0/16", "192.0.2.7", "fd00::/8", "Prefill-0", ".pods.example"]);
        for yes in [
            "10.1.255.3:7400",
            "192.0.2.7:1",
            "[fd12::1]:7400",
            "[::ffff:10.1.2.3]:7400",
            "prefill-0:7400",
            "PREFILL-0.:7400",
            "a.pods.example:7400",
            "a.b.pods.example.:7400",
        ] {
            assert!(l.allows_addr(yes), "{yes}");
        }
        for no in [
            "10.2.0.1:7400",
            "192.0.2.8:1",
            "[fe80::1]:7400",
            "[::ffff:10.2.2.3]:7400",
            "prefill-1:7400",
            "prefill-0.evil.example:7400",
            ".pods.example:7400",
            "pods.example:7400",
            "evilpods.example:7400",
            "10.1:7400",
            "0x0a010001:7400",
            "167837697:7400",
            "localhost:7400",
            ":7400",
            "",
        ] {
            assert!(!l.allows_addr(no), "{no}");
        }
    }

    #[test]
    fn an_empty_list_allows_every_host() {
        assert!(list(&[]).allows_addr("anything:1"));
    }

    #[test]
    fn one_bit_and_no_bit_networks_are_exact() {
        assert!(list(&["0.0.0.0/0"]).allows("203.0.113.9") && !list(&["0.0.0.0/0"]).allows("::1"));
        assert!(list(&["128.0.0.0/1"]).allows("200.0.0.1") && !list(&["128.0.0.0/1"]).allows("100.0.0.1"));
        assert!(list(&["::/0"]).allows("::1") && !list(&["::1/128"]).allows("::2"));
    }

    #[test]
    fn a_malformed_entry_is_named() {
        for bad in
            ["", ".", "10.0.0.0/33", "::/129", "host/8", "10.0.0.0/x", "a b", "10.1", "http://x", "..a", "host:80"]
        {
            let error = DialList::new(&[bad.to_owned()]).expect_err(bad);
            assert!(error.contains(&format!("{bad:?}")), "{error}");
        }
    }
}
