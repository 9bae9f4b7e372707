//! The addresses that offers name. Another host reads them, so they must mean the same host there.

use std::net::{IpAddr, Ipv6Addr};

/// The reason why no consumer can use an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadAddress {
    /// There is no port, or it is out of range.
    #[error("it does not end in a port from 1 to 65535: write HOST:PORT")]
    Port,
    /// The host is neither an address nor a host name.
    #[error("its host is neither an address nor a host name: write HOST:PORT, and an IPv6 address in brackets")]
    Host,
    /// It has a zone.
    #[error("it has a zone (%), which means nothing on another host: use an address without one, or a host name")]
    Zone,
    /// It is an IPv6 link-local address.
    #[error(
        "it is link-local (fe80::/10), which other hosts reach only with a zone of their own: use a global or unique local \
         address, or a host name"
    )]
    LinkLocal,
    /// It is `0.0.0.0` or `[::]`.
    #[error("it means every address of a host: name one that consumers reach")]
    Unspecified,
}

/// Checks that consumers on any host can connect to `HOST:PORT`: an IPv4 address, an IPv6 address in brackets, or a host name.
///
/// # Errors
/// It is malformed, or means another host, or none, elsewhere.
pub fn check_address(addr: &str) -> Result<(), BadAddress> {
    if addr.contains('%') {
        return Err(BadAddress::Zone);
    }
    let (host, port) = addr.rsplit_once(':').ok_or(BadAddress::Port)?;
    let digits = port.bytes().all(|b| b.is_ascii_digit());
    if !digits || port.parse::<u16>().unwrap_or(0) == 0 {
        return Err(BadAddress::Port);
    }
    check_host(host)
}

/// Checks the host of an address, see [`check_address`].
///
/// # Errors
/// As for [`check_address`].
pub fn check_host(host: &str) -> Result<(), BadAddress> {
    if host.contains('%') {
        return Err(BadAddress::Zone);
    }
    let ip = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
        Some(v6) => Some(IpAddr::V6(v6.parse::<Ipv6Addr>().map_err(|_| BadAddress::Host)?)),
        None => host.parse::<IpAddr>().ok().filter(IpAddr::is_ipv4),
    };
    match ip.map(|ip| ip.to_canonical()) {
        Some(ip) if ip.is_unspecified() => Err(BadAddress::Unspecified),
        Some(IpAddr::V6(v6)) if v6.is_unicast_link_local() => Err(BadAddress::LinkLocal),
        Some(_) => Ok(()),
        None if is_name(host) => Ok(()),
        None => Err(BadAddress::Host),
    }
}

/// Whether this is a host name. A name that ends in a number would be an address in an old form, such as 127.1.
fn is_name(host: &str) -> bool {
    let name = host.strip_suffix('.').unwrap_or(host);
    let label = |l: &str| !l.is_empty() && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    let last = name.rsplit('.').next().unwrap_or_default();
    name.len() <= 253 && name.split('.').all(label) && !last.bytes().all(|b| b.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_must_mean_the_same_host_everywhere() {
        for good in ["10.0.0.1:7400", "prefill-3.rack:1", "[fd00::1]:65535", "[::1]:7400", "a_b:1", "host.:7400"] {
            assert_eq!(check_address(good), Ok(()), "{good}");
        }
        for (bad, why) in [
            ("", BadAddress::Port),
            ("foo", BadAddress::Port),
            ("10.0.0.1:", BadAddress::Port),
            ("a:0", BadAddress::Port),
            ("a:65536", BadAddress::Port),
            ("a:+1", BadAddress::Port),
            (":7400", BadAddress::Host),
            ("a@host:1", BadAddress::Host),
            ("http://host:1", BadAddress::Host),
            ("a b:1", BadAddress::Host),
            ("a\nb:1", BadAddress::Host),
            ("a..b:1", BadAddress::Host),
            ("10.0.0.300:1", BadAddress::Host),
            ("127.1:1", BadAddress::Host),
            ("fd00::1:7400", BadAddress::Host),
            ("[fd00::1:7400", BadAddress::Host),
            ("[10.0.0.1]:7400", BadAddress::Host),
            ("[fe80::1%eth0]:1", BadAddress::Zone),
            ("fe80::1%eth0", BadAddress::Zone),
            ("[fe80::1]:1", BadAddress::LinkLocal),
            ("0.0.0.0:1", BadAddress::Unspecified),
            ("[::]:1", BadAddress::Unspecified),
            ("[::ffff:0.0.0.0]:1", BadAddress::Unspecified),
        ] {
            assert_eq!(check_address(bad), Err(why), "{bad}");
        }
    }
}
