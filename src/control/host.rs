//! The identity of a rank's host, as one string. If the strings of two ranks are equal, a `local` lane between them can
//! work. It is a hint, not a proof: the lane itself checks credentials and what the kernel permits.

use std::{fs, sync::OnceLock};

/// This host's identity: the boot id, and the pid and network namespaces. `process_vm_readv` takes a pid, which names the
/// same process only within one pid namespace; the lane's socket has an abstract name, which is visible only within one
/// network namespace. Two hosts, and two boots of one host, differ in the boot id.
///
/// If /proc is unreadable, the string is unique to this process, so that no `local` lane is tried that cannot work.
pub(crate) fn identity() -> &'static str {
    static IDENTITY: OnceLock<String> = OnceLock::new();
    IDENTITY.get_or_init(|| read().unwrap_or_else(|| format!("unknown-{}", kvferry_proto::OfferId::random())))
}

fn read() -> Option<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let namespace = |kind: &str| Some(fs::read_link(format!("/proc/self/ns/{kind}")).ok()?.to_str()?.to_owned());
    Some(format!("{} {} {}", boot.trim(), namespace("pid")?, namespace("net")?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::wire;

    #[test]
    fn a_host_identity_is_stable_and_fits_the_wire() {
        assert_eq!(identity(), identity());
        assert!(!identity().is_empty() && identity().len() <= wire::MAX_HOST, "{}", identity());
        assert!(!identity().chars().any(char::is_control));
    }
}
