//! A port's GIDs, and which one to use.
//!
//! On RoCE a GID encodes an IP address. A wrong GID is the most common failure: the queue pair connects and every READ times
//! out. So it is chosen by type and reachability, never by its index, which differs from host to host. The table is read from
//! /sys, which every kernel since 4.5 fills in.

use std::{
    fmt, fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

/// A GID: 16 bytes, as they go over the wire.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Gid(pub [u8; 16]);

impl Gid {
    /// Its IP address on RoCE.
    pub fn ip(&self) -> IpAddr {
        let v6 = Ipv6Addr::from(self.0);
        v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
    }

    /// Whether it is empty.
    pub fn is_zero(&self) -> bool {
        self.0 == [0; 16]
    }

    /// Length of the common prefix with another GID, in bits; 0 if only one of them is an IPv4 address.
    pub fn shared_prefix(&self, other: &Gid) -> u32 {
        match (self.ip(), other.ip()) {
            (IpAddr::V4(a), IpAddr::V4(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
            (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
            _ => 0,
        }
    }
}

impl fmt::Debug for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Ipv6Addr::from(self.0))
    }
}

impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Ipv6Addr::from(self.0))
    }
}

/// The type of a GID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GidType {
    /// InfiniBand, or RoCE v1, which is not routed and obsolete. The kernel has one name for both.
    IbOrRoceV1,
    /// RoCE v2, over UDP.
    RoceV2,
}

/// One row of a port's table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GidEntry {
    /// Its index.
    pub index: u8,
    /// The GID.
    pub gid: Gid,
    /// Its type.
    pub kind: GidType,
    /// Its network interface; empty on InfiniBand.
    pub netdev: String,
}

impl fmt::Display for GidEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            GidType::IbOrRoceV1 => "IB/RoCE v1",
            GidType::RoceV2 => "RoCE v2",
        };
        write!(f, "{} {} ({kind}", self.index, self.gid.ip())?;
        if !self.netdev.is_empty() {
            write!(f, ", {}", self.netdev)?;
        }
        f.write_str(")")
    }
}

/// The GIDs of a port that are not empty. `sys` is /sys/class/infiniband.
pub(super) fn table(sys: &Path, device: &str, port: u8) -> Vec<GidEntry> {
    let at = at(sys, device, port);
    let there = |i: &u8| at.join("gids").join(i.to_string()).exists();
    rows(sys, device, port, (0..=255).take_while(there))
}

/// The rows among these that are not empty. Each takes three files, and tables have 256 rows and more: pass the used rows if
/// they are known.
pub(super) fn rows(sys: &Path, device: &str, port: u8, indices: impl Iterator<Item = u8>) -> Vec<GidEntry> {
    let at = at(sys, device, port);
    // A GID that was withdrawn leaves an empty row.
    let row = |index: u8| {
        let read = |part: &str| {
            let text = fs::read_to_string(at.join(part).join(index.to_string())).ok()?;
            Some(text.trim().to_owned())
        };
        let gid = Some(Gid(read("gids")?.parse::<Ipv6Addr>().ok()?.octets())).filter(|g| !g.is_zero())?;
        let kind = match read("gid_attrs/types") {
            Some(t) if t == "RoCE v2" => GidType::RoceV2,
            _ => GidType::IbOrRoceV1,
        };
        let netdev = read("gid_attrs/ndevs").unwrap_or_default();
        Some(GidEntry { index, gid, kind, netdev })
    };
    indices.filter_map(row).collect()
}

fn at(sys: &Path, device: &str, port: u8) -> PathBuf {
    sys.join(device).join("ports").join(port.to_string())
}

/// The best GID of a RoCE port: RoCE v2 only; if `peer` is known, of its family and nearest to it; IPv4 before global IPv6
/// before link-local. Link-local GIDs reach peers on the same link only, and containers lack the address.
// Without the feature only tests use it, which need no device.
#[cfg_attr(not(feature = "verbs"), allow(dead_code))]
pub(super) fn choose<'a>(table: &'a [GidEntry], peer: Option<&Gid>) -> Option<&'a GidEntry> {
    let family = |g: &Gid| match g.ip() {
        IpAddr::V4(a) if a.is_link_local() || a == Ipv4Addr::UNSPECIFIED => 1,
        IpAddr::V4(_) => 3,
        IpAddr::V6(a) if a.is_unicast_link_local() => 0,
        IpAddr::V6(_) => 2,
    };
    table
        .iter()
        .filter(|e| e.kind == GidType::RoceV2)
        .filter(|e| peer.is_none_or(|p| p.ip().is_ipv4() == e.gid.ip().is_ipv4()))
        // The first of equals: `max_by_key` would take the last.
        .rev()
        .max_by_key(|e| (peer.map_or(0, |p| p.shared_prefix(&e.gid)), family(&e.gid)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u8, ip: &str, kind: GidType) -> GidEntry {
        let v6 = match ip.parse().unwrap() {
            IpAddr::V4(a) => a.to_ipv6_mapped(),
            IpAddr::V6(a) => a,
        };
        GidEntry { index, gid: Gid(v6.octets()), kind, netdev: "eth0".into() }
    }

    #[test]
    fn a_gid_is_chosen_by_type_and_reach_and_never_by_index() {
        use GidType::{IbOrRoceV1, RoceV2};
        let rows = [
            entry(0, "fe80::1", IbOrRoceV1),
            entry(1, "fe80::1", RoceV2),
            entry(2, "10.0.0.1", IbOrRoceV1),
            entry(3, "fd00::1", RoceV2),
            entry(4, "10.0.0.1", RoceV2),
            entry(5, "10.1.0.1", RoceV2),
        ];
        let index = |rows: &[GidEntry], peer: Option<&str>| {
            let peer = peer.map(|p| entry(0, p, RoceV2).gid);
            choose(rows, peer.as_ref()).map(|e| e.index)
        };
        assert_eq!(index(&rows, None), Some(4));
        assert_eq!(index(&rows, Some("10.1.0.9")), Some(5));
        assert_eq!(index(&rows, Some("fd00::9")), Some(3));
        assert_eq!(index(&rows, Some("fe80::9")), Some(1));
        assert_eq!(index(&rows[..3], Some("10.0.0.2")), None, "RoCE v1 is never used");
        assert_eq!(index(&rows[..1], None), None);
        let mut turned = rows.to_vec();
        turned.reverse();
        assert_eq!(index(&turned, Some("10.1.0.9")), Some(5));
    }

    #[test]
    fn a_table_with_holes_is_read_to_its_end() {
        let dir = std::env::temp_dir().join(format!("kvferry-gid-{}", std::process::id()));
        let port = dir.join("dev0/ports/1");
        for part in ["gids", "gid_attrs/types", "gid_attrs/ndevs"] {
            fs::create_dir_all(port.join(part)).unwrap();
        }
        let rows = ["fe80::1", "::", "::ffff:10.9.8.7"];
        for (i, ip) in rows.iter().enumerate() {
            fs::write(port.join("gids").join(i.to_string()), ip).unwrap();
        }
        fs::write(port.join("gid_attrs/types/2"), "RoCE v2\n").unwrap();
        fs::write(port.join("gid_attrs/ndevs/2"), "eth1\n").unwrap();
        let read = table(&dir, "dev0", 1);
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(read.len(), 2);
        assert_eq!((read[1].index, read[1].kind, &read[1].netdev[..]), (2, GidType::RoceV2, "eth1"));
        assert_eq!(read[1].gid.ip().to_string(), "10.9.8.7");
    }
}
