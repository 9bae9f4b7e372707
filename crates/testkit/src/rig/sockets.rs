//! What a process listens on.

/// Inodes of the sockets that a process has open.
fn sockets(pid: u32) -> std::collections::HashSet<String> {
    let links = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors");
    links
        .filter_map(|e| std::fs::read_link(e.ok()?.path()).ok())
        .filter_map(|l| Some(l.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect()
}

/// TCP ports of 127.0.0.1 that a process listens on.
pub fn listening_ports(pid: u32) -> Vec<u16> {
    let mine = sockets(pid);
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/tcp")).expect("its sockets");
    table
        .lines()
        .skip(1)
        .filter_map(|l| {
            let f: Vec<_> = l.split_whitespace().collect();
            // State 0A is LISTEN; field 9 is the inode.
            (f.get(3) == Some(&"0A") && mine.contains(*f.get(9)?))
                .then(|| u16::from_str_radix(f[1].split(':').nth(1)?, 16).ok())?
        })
        .collect()
}

/// Abstract unix names that a process listens on.
pub fn listening_names(pid: u32) -> Vec<Vec<u8>> {
    let mine = sockets(pid);
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/unix")).expect("its sockets");
    table
        .lines()
        .skip(1)
        .filter_map(|l| {
            let f: Vec<_> = l.split_whitespace().collect();
            // Flags 00010000 mean that it listens; field 6 is the inode, field 7 the name.
            let name = f.get(7)?.strip_prefix('@')?;
            (f.get(3) == Some(&"00010000") && mine.contains(*f.get(6)?)).then(|| name.as_bytes().to_vec())
        })
        .collect()
}
