//! A network namespace without a name, and `ip`, which sets up devices in the namespace of the thread that runs it.

use std::{
    fs::File,
    io,
    os::fd::AsFd as _,
    process::{Command, Output},
};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use super::unavailable::Unavailable;

/// The kernel keeps it for as long as this value or a process in it exists.
#[derive(Debug)]
pub(super) struct Namespace(File);

impl Namespace {
    pub(super) fn new() -> Result<Self, Unavailable> {
        // Making a namespace moves the calling thread into it, so this needs a thread of its own.
        on_a_thread(|| {
            // SAFETY: the danger of unshare is `UnshareFlags::FILES`. This flag moves only the calling thread, and only
            // its network namespace; descriptors and memory stay shared.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
            Ok(Self(File::open("/proc/thread-self/ns/net")?))
        })
        .map_err(|e| Unavailable::new("making a network namespace", "root (CAP_SYS_ADMIN)", e))
    }

    /// Runs `work` on a thread in this namespace. Its panic continues in the caller.
    pub(super) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        on_a_thread(|| {
            move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network))
                .expect("the maker of a namespace may enter it");
            work()
        })
    }
}

fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|s| s.spawn(work).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Runs `ip` in the calling thread's namespace.
pub(super) fn ip(args: &[&str]) -> Result<(), Unavailable> {
    let out = run_ip(args).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => Unavailable("`ip` is missing: install iproute2".into()),
        _ => Unavailable(format!("`ip` cannot be run: {e}")),
    })?;
    if out.status.success() {
        return Ok(());
    }
    Err(Unavailable(format!("`ip {}` failed: {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim())))
}

/// Also tries the usual folders: the PATH of a user who became root may not name them.
fn run_ip(args: &[&str]) -> io::Result<Output> {
    let mut last = io::ErrorKind::NotFound.into();
    for program in ["ip", "/usr/sbin/ip", "/sbin/ip"] {
        match Command::new(program).args(args).output() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => last = e,
            done => return done,
        }
    }
    Err(last)
}
