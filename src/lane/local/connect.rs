//! Sets up the consumer's end: finds the producer's process, checks that this process answers, and maps its memory.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use kvferry_proto::{Incarnation, PoolLayout};
use rustix::{
    fs::SealFlags,
    io::Errno,
    net::{SendFlags, SocketAddrUnix},
};
use tokio::io::Interest;

use super::{
    gpu::GpuLane,
    owner::Owner,
    reader::LocalLane,
    socket::{self, Credentials, Packet},
    source::{Source, WordTable},
    wire::{self, Refusal, Reply, Request},
};
use crate::{
    config::GpuConfig,
    lane::{LaneError, WakingLane},
    memory::{
        Mapping, Memory,
        gpu::{CopyQueue, Exported, Gpu, uuid_text},
    },
};

/// How long the producer has to answer. Its answer comes from a thread that never waits for the engine.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// Wait before connecting again while the producer's backlog is full.
const BACKLOG_PAUSE: Duration = Duration::from_millis(2);

/// Sets up a local lane into `memory`, which must lie in the same kind of memory as the producer's pool: `name`, `lane` and
/// its key come from the producer's answer to ConnectLane, `incarnation` and `remote` from its Hello. `uids` are the users
/// that may own the producer beside this process's own. Runs on a tokio runtime; the lane itself needs none.
pub(crate) async fn connect(
    name: &[u8],
    ticket: (u64, [u8; 32]),
    incarnation: Incarnation,
    remote: Arc<PoolLayout>,
    memory: Memory,
    uids: &[u32],
    config: &GpuConfig,
) -> Result<Box<dyn WakingLane>, LaneError> {
    Ok(match memory.gpu().cloned() {
        None => Box::new(connect_host(name, ticket, incarnation, remote, memory, uids).await?),
        Some(gpu) => Box::new(connect_gpu(name, ticket, incarnation, remote, (memory, gpu), uids, config).await?),
    })
}

/// Sets up a lane between pools in host memory.
pub(super) async fn connect_host(
    name: &[u8],
    (lane, key): (u64, [u8; 32]),
    incarnation: Incarnation,
    remote: Arc<PoolLayout>,
    memory: Memory,
    uids: &[u32],
) -> Result<LocalLane, LaneError> {
    let request = Request { lane, incarnation: incarnation.get(), key, gpu: None };
    let (owner, pid, packet, reply) = open(name, request, &remote, uids).await?;
    let Reply::Granted { words, slots, files, segments, .. } = reply else {
        return Err(LaneError::protocol("it describes GPU memory to a pool in host memory"));
    };
    let mapped = if files { map(packet.files, slots, &remote)? } else { None };
    let source = match mapped {
        Some(mapped) => mapped,
        None => {
            let source = Source::Process { pid, segments, words, slots };
            probe(pid, &source)?;
            source
        }
    };
    if !source.fits(&remote) {
        return Err(LaneError::protocol("its segments differ from its Hello"));
    }
    Ok(LocalLane::new(owner, source, remote, memory))
}

/// Sets up a lane between pools in GPU memory.
pub(super) async fn connect_gpu(
    name: &[u8],
    (lane, key): (u64, [u8; 32]),
    incarnation: Incarnation,
    remote: Arc<PoolLayout>,
    (memory, gpu): (Memory, Gpu),
    uids: &[u32],
    config: &GpuConfig,
) -> Result<GpuLane, LaneError> {
    let here = gpu.info().uuid;
    let request = Request { lane, incarnation: incarnation.get(), key, gpu: Some(here) };
    let (owner, _, packet, reply) = open(name, request, &remote, uids).await?;
    let Reply::GrantedGpu { slots, segments, pool, .. } = reply else {
        return Err(LaneError::protocol("it describes host memory to a pool in GPU memory"));
    };
    if segments as usize != remote.segments.len() {
        return Err(LaneError::protocol("its segments differ from its Hello"));
    }
    let (table, files) = descriptors(packet.files, pool.descriptors(), slots)?;
    let exported = Exported { allocations: pool.allocations, parts: pool.parts, files };
    let imported = gpu.import(exported, remote.segments.clone()).await;
    let imported =
        imported.map_err(|source| LaneError::Gpu { here: uuid_text(here), there: uuid_text(pool.uuid), source })?;
    let queue = CopyQueue::new(&gpu, config.copy).map_err(LaneError::io("eventfd"))?;
    GpuLane::new(owner, table, (imported, memory), queue, config.copy_bound).map_err(LaneError::io("epoll"))
}

/// The fence table, and the descriptors of `allocations` allocations.
fn descriptors(
    mut files: Vec<OwnedFd>,
    allocations: usize,
    slots: u32,
) -> Result<(WordTable, Vec<OwnedFd>), LaneError> {
    if files.len() > allocations + 1 {
        return Err(LaneError::protocol("it sent more files than its pool has allocations"));
    }
    let Some(table) = files.pop().filter(|_| files.len() == allocations) else {
        let what = "receiving the descriptors of the peer's GPU memory, for which the limit of open files is too low";
        return Err(LaneError::io(what)(Errno::MFILE.into()));
    };
    check_file(&table, WordTable::bytes(slots))?;
    let table = WordTable::new(table.as_fd(), slots).map_err(LaneError::io("mmap"))?;
    Ok((table, files))
}

/// Requests the lane. Returns the process that answered, its pid, its packet, and the answer that the packet held: a grant.
async fn open(
    name: &[u8],
    request: Request,
    remote: &PoolLayout,
    uids: &[u32],
) -> Result<(Owner, i32, Packet, Reply), LaneError> {
    remote.check().map_err(|e| LaneError::protocol(format!("its pool is malformed: {e}")))?;
    let work = shake_hands(name, request, uids);
    let (owner, pid, packet, bytes) = match tokio::time::timeout(ANSWER_TIMEOUT, work).await {
        Ok(done) => done?,
        Err(_) => return Err(LaneError::Silent { after: ANSWER_TIMEOUT }),
    };
    if packet.cut {
        return Err(LaneError::protocol("its answer is too long"));
    }
    let reply = Reply::decode(&bytes).map_err(LaneError::protocol)?;
    match &reply {
        Reply::Granted { incarnation, .. } | Reply::GrantedGpu { incarnation, .. }
            if incarnation.get() == request.incarnation =>
        {
            Ok((owner, pid, packet, reply))
        }
        Reply::Refused { refusal: Refusal::Other, why } => Err(LaneError::Refused { why: why.clone() }),
        _ => Err(LaneError::Restarted),
    }
}

/// Connects, opens a pidfd, and only then sends the request: the answer comes from the process of that pidfd.
async fn shake_hands(name: &[u8], request: Request, uids: &[u32]) -> Result<(Owner, i32, Packet, Vec<u8>), LaneError> {
    let address = match name {
        [0, rest @ ..] => SocketAddrUnix::new_abstract_name(rest),
        path => SocketAddrUnix::new(path),
    }
    .map_err(|_| LaneError::protocol("its socket name is malformed"))?;
    let fd = socket::new().map_err(LaneError::io("socket"))?;
    rustix::net::sockopt::set_socket_passcred(&fd, true).map_err(|e| LaneError::io("SO_PASSCRED")(e.into()))?;
    loop {
        match rustix::net::connect(&fd, &address) {
            Ok(()) => break,
            Err(Errno::AGAIN) => tokio::time::sleep(BACKLOG_PAUSE).await,
            Err(Errno::INTR) => {}
            Err(Errno::CONNREFUSED | Errno::NOENT) => {
                return Err(LaneError::Elsewhere {
                    what:
                        "no process listens on its socket here; for the local lane both processes must run on one host \
                           and share the network namespace (hostNetwork, or one pod)"
                            .into(),
                });
            }
            Err(e) => return Err(LaneError::Connect { to: "the producer's socket".into(), source: e.into() }),
        }
    }
    let peer = socket::peer(fd.as_fd()).map_err(LaneError::io("SO_PEERCRED"))?;
    if !peer.may_share(uids) {
        let here = rustix::process::geteuid().as_raw();
        let why = format!(
            "it runs as user {}, this process as user {here}; use one user for both, or list {} in this side's local.uids",
            peer.uid, peer.uid
        );
        return Err(LaneError::Forbidden { why });
    }
    let pidfd = match socket::peer_pidfd(fd.as_fd(), peer.pid) {
        Ok(pidfd) => pidfd,
        Err(_) if peer.pid == 0 => return Err(elsewhere()),
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Err(LaneError::Died),
        Err(e) => return Err(LaneError::io("pidfd_open")(e)),
    };
    // Fails if the producer has refused and closed already: then its answer names the reason.
    let _ = rustix::net::send(&fd, &request.encode(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
    let fd = socket::watch(fd).map_err(LaneError::io("epoll"))?;
    let mut bytes = vec![0; wire::MAX_REPLY];
    let packet = match fd.async_io(Interest::READABLE, |s| socket::receive(s.as_fd(), &mut bytes)).await {
        Ok(packet) if packet.len > 0 => packet,
        Err(e) if e.kind() != io::ErrorKind::ConnectionReset => {
            return Err(LaneError::Connect { to: "the producer's socket".into(), source: e });
        }
        // Closed, with or without having read the request.
        Ok(_) | Err(_) => {
            let why = "it closed the connection: it may be at its limit of lanes (limits.lanes)".into();
            return Err(LaneError::Refused { why });
        }
    };
    bytes.truncate(packet.len);
    // The pid that answered must be the pid that listened, and still belong to the process of the pidfd.
    let same = packet.from.is_some_and(|c: Credentials| c.pid == peer.pid);
    if !same {
        return Err(LaneError::protocol("another process answers on its socket"));
    }
    let owner = Owner::new(fd.into_inner(), pidfd).map_err(LaneError::io("epoll"))?;
    if alive(&owner) { Ok((owner, peer.pid, packet, bytes)) } else { Err(LaneError::Died) }
}

fn alive(owner: &Owner) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(&owner.pidfd, PollFlags::IN)];
    matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(0))
}

/// Maps the peer's segments and words; `None` if this process may not open or map as many files. Refuses a file that can
/// still shrink: a read past its end would kill this process.
fn map(files: Vec<OwnedFd>, slots: u32, remote: &PoolLayout) -> Result<Option<Source>, LaneError> {
    if files.len() < remote.segments.len() + 1 {
        tracing::warn!("this process may not open as many files as the peer's pool has: copying with process_vm_readv");
        return Ok(None);
    }
    if files.len() > remote.segments.len() + 1 {
        return Err(LaneError::protocol("it sent more files than its pool has segments"));
    }
    let lengths = remote.segments.iter().copied().chain([WordTable::bytes(slots)]);
    for (fd, len) in files.iter().zip(lengths) {
        check_file(fd, len)?;
    }
    let Some((table, segments)) = files.split_last() else { return Ok(None) };
    let segments = segments.iter().zip(&remote.segments);
    let mapped = || {
        let segments = segments.map(|(fd, &len)| Mapping::new(fd.as_fd(), len, false)).collect::<io::Result<_>>()?;
        Ok::<_, io::Error>(Source::Mapped { segments, table: WordTable::new(table.as_fd(), slots)? })
    };
    match mapped() {
        Ok(source) => Ok(Some(source)),
        Err(error) => {
            tracing::warn!(%error, "cannot map the peer's pool: copying with process_vm_readv");
            Ok(None)
        }
    }
}

/// Refuses a file that can still shrink, or is shorter than the mapping that is to be made of it.
fn check_file(fd: &OwnedFd, len: u64) -> Result<(), LaneError> {
    let seals = rustix::fs::fcntl_get_seals(fd).unwrap_or(SealFlags::empty());
    if !seals.contains(SealFlags::SHRINK) {
        return Err(LaneError::protocol("it sent a file that is not sealed against shrinking"));
    }
    let size = rustix::fs::fstat(fd).map_err(|e| LaneError::io("fstat")(e.into()))?.st_size;
    if u64::try_from(size).is_ok_and(|size| size >= len) {
        Ok(())
    } else {
        Err(LaneError::protocol("it sent a file that is shorter than its segment"))
    }
}

/// Reads a fence word once, so that a lane without the permission is never used.
fn probe(pid: i32, source: &Source) -> Result<(), LaneError> {
    if pid == 0 {
        return Err(elsewhere());
    }
    if source.slots() == 0 {
        return Ok(());
    }
    source.words([0].into_iter(), &mut [0]).map_err(|e| match e.raw_os_error() {
        Some(libc::EPERM | libc::EACCES | libc::ENOSYS) => LaneError::Forbidden { why: forbidden() },
        Some(libc::ESRCH) => LaneError::Died,
        Some(libc::EFAULT) => LaneError::protocol("its fence table is not in its memory"),
        _ => LaneError::io("process_vm_readv")(e),
    })
}

fn elsewhere() -> LaneError {
    LaneError::Elsewhere {
        what: "its process is not visible from this pid namespace; share it between both containers \
               (shareProcessNamespace, or --pid=container:NAME), or let kvferry allocate the producer's pool"
            .into(),
    }
}

fn forbidden() -> String {
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    let first = match scope.trim() {
        "" | "0" => {
            "run both as the same user in the same user namespace, allow process_vm_readv in the container's seccomp \
             profile, or give this process CAP_SYS_PTRACE"
                .to_string()
        }
        n => format!("kernel.yama.ptrace_scope is {n}: set it to 0, or give this process CAP_SYS_PTRACE"),
    };
    format!("{first}; or let kvferry allocate the producer's pool, which needs no such permission")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::MemfdFlags;

    fn file(len: u64, seals: SealFlags) -> OwnedFd {
        let fd = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&fd, len).unwrap();
        rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
        fd
    }

    #[test]
    fn a_file_that_could_shrink_or_is_too_short_is_refused() {
        let layout = PoolLayout::uniform(4, 1, 4096, 16);
        let good = || file(4 * 4096, SealFlags::SHRINK);
        let words = || file(4096, SealFlags::SHRINK);
        let refused = |files: Vec<OwnedFd>| matches!(map(files, 8, &layout), Err(LaneError::Protocol { .. }));
        assert!(matches!(map(vec![good(), words()], 8, &layout), Ok(Some(Source::Mapped { .. }))));
        assert!(refused(vec![file(4 * 4096, SealFlags::empty()), words()]), "not sealed");
        assert!(refused(vec![file(4 * 4096, SealFlags::GROW), words()]), "sealed the wrong way");
        assert!(refused(vec![file(4 * 4096 - 1, SealFlags::SHRINK), words()]), "too short");
        assert!(refused(vec![good(), file(63, SealFlags::SHRINK)]), "words too short");
        assert!(refused(vec![good(), good(), words()]), "too many");
        assert!(matches!(map(vec![words()], 8, &layout), Ok(None)), "some files were not received");
        let disk: OwnedFd = std::fs::File::open("/proc/self/exe").unwrap().into();
        assert!(refused(vec![disk, words()]), "a file on disk cannot be sealed");
    }

    #[test]
    fn a_refused_permission_says_what_to_set() {
        let said = forbidden();
        assert!(said.contains("CAP_SYS_PTRACE") && said.contains("let kvferry allocate"), "{said}");
    }

    #[test]
    fn system_errors_keep_their_source() {
        let e = LaneError::io("fstat")(io::Error::from_raw_os_error(libc::EBADF));
        assert!(e.to_string().starts_with("fstat: Bad file descriptor"), "{e}");
    }
}
