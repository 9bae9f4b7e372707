//! The sockets on which a process listens, from /proc.

use std::collections::HashSet;

/// Inodes of the open sockets of a process.
fn sockets(pid: u32) -> HashSet<String> {
    let links = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors");
    links
        .filter_map(|e| std::fs::read_link(e.ok()?.path()).ok())
        .filter_map(|l| Some(l.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect()
}

/// Applies `read` to the fields of each line of /proc/PID/net/`table` that describes a socket of this process.
fn of_table<T>(pid: u32, table: &str, inode: usize, read: impl Fn(&[&str]) -> Option<T>) -> Vec<T> {
    let own = sockets(pid);
    let text = std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).expect("its sockets");
    let fields = text.lines().skip(1).map(|l| l.split_whitespace().collect::<Vec<_>>());
    fields.filter(|f| f.get(inode).is_some_and(|i| own.contains(*i))).filter_map(|f| read(&f)).collect()
}

/// TCP ports of 127.0.0.1 on which a process listens.
pub(crate) fn listening_ports(pid: u32) -> Vec<u16> {
    // State 0A is LISTEN.
    of_table(pid, "tcp", 9, |f| (f[3] == "0A").then(|| u16::from_str_radix(f[1].split(':').nth(1)?, 16).ok())?)
}

/// Abstract unix names on which a process listens.
pub(crate) fn listening_names(pid: u32) -> Vec<Vec<u8>> {
    // Flags 00010000 mean LISTEN.
    of_table(pid, "unix", 6, |f| Some(f.get(7)?.strip_prefix('@')?.into()).filter(|_| f[3] == "00010000"))
}
