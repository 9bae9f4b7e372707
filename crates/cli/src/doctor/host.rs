//! Whether the `local` lane can work between two processes on one machine, perhaps in two containers: both must see the same
//! socket names (network namespace), the same process ids (pid namespace) and the same users. Memory is shared through
//! descriptors, or read with process_vm_readv, so ipc and mount namespaces may differ.

use std::{collections::BTreeMap, fs};

use super::{Finding, Status};

const CHECK: &str = "local lane, this side";

/// This side's identifiers, as one word for each.
fn identifiers() -> Result<String, String> {
    let unreadable = |path: &str, e: std::io::Error| format!("cannot read {path}: {e}");
    let boot = "/proc/sys/kernel/random/boot_id";
    let boot = fs::read_to_string(boot).map_err(|e| unreadable(boot, e))?;
    let mut all = vec![format!("boot={}", boot.trim())];
    for kind in ["net", "pid", "user"] {
        let path = format!("/proc/self/ns/{kind}");
        let link = fs::read_link(&path).map_err(|e| unreadable(&path, e))?;
        // It reads `net:[4026531840]`.
        let number = link.to_string_lossy().chars().filter(char::is_ascii_digit).collect::<String>();
        all.push(format!("{kind}={number}"));
    }
    all.push(format!("uid={}", rustix::process::geteuid().as_raw()));
    Ok(all.join(","))
}

/// The remedy where an identifier differs.
fn remedy(name: &str) -> &'static str {
    match name {
        "boot" => "the two run on different machines: use tcp or verbs",
        "net" => "share the network namespace: one pod, hostNetwork, or `--network container:NAME`",
        "pid" => "share the pid namespace: shareProcessNamespace or hostPID, or `--pid container:NAME`",
        "user" => "use one user namespace for both: the same runtime and user mapping",
        _ => "run both as one user, or list the other user in `Config::local.uids`",
    }
}

/// The names whose values differ, in the order of importance. Fails if `other` lacks one.
fn differences(here: &str, other: &str) -> Result<Vec<String>, String> {
    let pairs = |text: &str| -> BTreeMap<String, String> {
        text.split(',').filter_map(|p| p.trim().split_once('=')).map(|(k, v)| (k.into(), v.into())).collect()
    };
    let (here, other) = (pairs(here), pairs(other));
    let mut differ = Vec::new();
    for name in ["boot", "net", "pid", "user", "uid"] {
        let theirs = other.get(name).ok_or_else(|| {
            format!("--other lacks {name}=: copy the line {CHECK:?} of `kvferry doctor` in the other container")
        })?;
        if here.get(name) != Some(theirs) {
            differ.push(name.to_owned());
        }
    }
    Ok(differ)
}

/// Checks that `--other` can be compared.
pub(super) fn parse(other: &str) -> Result<String, String> {
    differences("", other).map(|_| other.to_owned())
}

/// This side's identifiers, and how the other side's differ.
pub(super) fn findings(other: Option<&str>) -> Vec<Finding> {
    let here = match identifiers() {
        Ok(here) => here,
        Err(why) => {
            let advice = "the local lane is not used without /proc: mount it (`mount -t proc proc /proc`)";
            return vec![Finding::new(CHECK, Status::Warn, why, advice)];
        }
    };
    let mut all = vec![Finding::new(CHECK, Status::Ok, here.clone(), "")];
    if let Some(differ) = other.and_then(|other| differences(&here, other).ok()) {
        let name = "local lane, both sides";
        all.push(match differ.first() {
            None => Finding::new(name, Status::Ok, "can work: all identifiers are equal", ""),
            // Processes on two machines have nothing else to share.
            Some(boot) if boot == "boot" => Finding::new(name, Status::Warn, "cannot work: boot differs", remedy(boot)),
            Some(_) => {
                let advice: Vec<_> = differ.iter().map(|n| remedy(n)).collect();
                Finding::new(
                    name,
                    Status::Warn,
                    format!("cannot work: {} differ", differ.join(", ")),
                    &advice.join("; "),
                )
            }
        });
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_difference_is_named_with_its_remedy() {
        let here = identifiers().unwrap();
        let of = |other: &str| findings(Some(other)).pop().unwrap();
        assert_eq!(of(&here).status, Status::Ok);
        for (name, word) in
            [("boot", "machines"), ("net", "hostNetwork"), ("pid", "hostPID"), ("user", "user"), ("uid", "uids")]
        {
            let other = here.replace(&format!("{name}="), &format!("{name}=9"));
            let found = of(&other);
            assert_eq!(found.status, Status::Warn);
            assert!(found.found.contains(&format!("{name} differ")), "{found:?}");
            assert!(found.advice.contains(word), "{found:?}");
        }
        assert!(parse("boot=1,net=2").unwrap_err().contains("pid="));
        assert_eq!(parse(&here).as_deref(), Ok(&*here));
    }
}
