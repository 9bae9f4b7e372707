//! Which host a rank runs on, as one string that two ranks compare: equal means that a `local` lane between them can work.
//! It is a hint, not a proof: the lane itself checks credentials and finds out what the kernel permits.

use std::{fs, sync::OnceLock};

/// This host's identity: the boot, and the pid and network namespaces. `process_vm_readv` takes a pid, which means the same
/// process in the same pid namespace only; the lane's socket has an abstract name, which is seen in the same network
/// namespace only. Two hosts, and two boots of one, differ in the boot id.
///
/// Where /proc does not tell, the string is one that no other process has, so that `local` is not tried in vain.
pub(crate) fn identity() -> &'static str {
    static IDENTITY: OnceLock<String> = OnceLock::new();
    IDENTITY.get_or_init(|| read().unwrap_or_else(|| format!("unknown-{}", kvferry_proto::block::OfferId::random())))
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
    fn a_host_is_the_same_one_twice_and_fits_the_wire() {
        assert_eq!(identity(), identity());
        assert!(!identity().is_empty() && identity().len() <= wire::MAX_HOST, "{}", identity());
        assert!(!identity().chars().any(char::is_control));
    }
}
