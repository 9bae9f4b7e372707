//! System calls on the unix socket for which no crate has a form that handles every answer: credentials of a process in
//! another pid namespace (pid 0), and received files.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use rustix::net::{AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType};
use tokio::io::{Interest, unix::AsyncFd};

use super::wire;

/// The process at the other end. `pid` is 0 if it is outside this pid namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Credentials {
    pub pid: i32,
    pub uid: u32,
}

impl Credentials {
    /// Whether that process may share a lane with this one: it runs as the same user, or as one of `uids`. Root is a user
    /// like any other: a container mostly runs as root, and must not open its pool to every user of the host.
    pub(super) fn may_share(self, uids: &[u32]) -> bool {
        self.uid == rustix::process::geteuid().as_raw() || uids.contains(&self.uid)
    }
}

/// A new socket of type SEQPACKET, which preserves packet boundaries.
pub(super) fn new() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// Registers with the current tokio runtime. Panics outside of a runtime with an I/O driver.
pub(super) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` owns a valid descriptor, and nothing replaces or closes it while `AsyncFd` holds it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE)? })
}

fn option<T>(fd: BorrowedFd<'_>, name: libc::c_int) -> io::Result<T> {
    let mut value = MaybeUninit::<T>::uninit();
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` has room for `len` bytes.
    let rc = unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, value.as_mut_ptr().cast(), &mut len) };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    if len as usize != size_of::<T>() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    // SAFETY: the kernel has written all of it, and `T` is a plain integer or a struct of integers at every caller.
    Ok(unsafe { value.assume_init() })
}

/// Credentials of the process at the other end, at the time of its listen or connect.
pub(super) fn peer(fd: BorrowedFd<'_>) -> io::Result<Credentials> {
    let c: libc::ucred = option(fd, libc::SO_PEERCRED)?;
    Ok(Credentials { pid: c.pid, uid: c.uid })
}

/// A pidfd of the peer. Kernels from 6.5 on keep the process with the socket; earlier ones know only its pid.
pub(super) fn peer_pidfd(fd: BorrowedFd<'_>, pid: i32) -> io::Result<OwnedFd> {
    const SO_PEERPIDFD: libc::c_int = 77;
    match option::<RawFd>(fd, SO_PEERPIDFD) {
        // SAFETY: the kernel has just created this descriptor for this process.
        Ok(raw) if raw >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(raw) }),
        _ => {
            let pid = rustix::process::Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?;
            Ok(rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?)
        }
    }
}

/// Sends one packet, with files.
pub(super) fn send(fd: BorrowedFd<'_>, packet: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(files.len()))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    rustix::net::sendmsg(fd, &[io::IoSlice::new(packet)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// A received packet.
#[derive(Debug)]
pub(super) struct Packet {
    /// Number of its bytes in the buffer.
    pub len: usize,
    /// The packet was longer than the buffer.
    pub cut: bool,
    /// Its files. Fewer than were sent if this process may not open more.
    pub files: Vec<OwnedFd>,
    /// Its sender, if the socket passes credentials.
    pub from: Option<Credentials>,
}

/// Receives one packet. A length of 0 means that the other end has closed.
pub(super) fn receive(fd: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<Packet> {
    // Room for 253 files and the credentials, aligned as control messages must be.
    let mut control = [0u64; 160];
    let mut piece = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    // SAFETY: a `msghdr` is plain data for which zero bytes are valid.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = &mut piece;
    msg.msg_iovlen = 1;
    msg.msg_control = control.as_mut_ptr().cast();
    msg.msg_controllen = size_of_val(&control) as _;
    // SAFETY: the message names `into` and `control`, both writable and alive over the call.
    let len = unsafe { libc::recvmsg(fd.as_raw_fd(), &mut msg, libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT) };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    let mut packet = Packet { len, cut: msg.msg_flags & libc::MSG_TRUNC != 0, files: Vec::new(), from: None };
    // SAFETY: `msg` was filled in by the kernel, and `control` is alive and aligned for headers.
    let mut at = unsafe { libc::CMSG_FIRSTHDR(&msg) };
    while !at.is_null() {
        // SAFETY: `at` came from CMSG_FIRSTHDR or CMSG_NXTHDR: it points at a whole header in `control`.
        let header = unsafe { at.read() };
        // SAFETY: as above; the data follows the header.
        let data = unsafe { libc::CMSG_DATA(at) };
        // SAFETY: CMSG_LEN only computes a number.
        let bytes = (header.cmsg_len as usize).saturating_sub(unsafe { libc::CMSG_LEN(0) } as usize);
        if header.cmsg_level == libc::SOL_SOCKET && header.cmsg_type == libc::SCM_RIGHTS {
            for i in 0..bytes / size_of::<RawFd>() {
                // SAFETY: the kernel put `bytes` bytes of descriptors here, which this process owns from now on.
                packet.files.push(unsafe { OwnedFd::from_raw_fd(data.cast::<RawFd>().add(i).read_unaligned()) });
            }
        } else if header.cmsg_level == libc::SOL_SOCKET
            && header.cmsg_type == libc::SCM_CREDENTIALS
            && bytes >= size_of::<libc::ucred>()
        {
            // SAFETY: the kernel put a `ucred` here.
            let c = unsafe { data.cast::<libc::ucred>().read_unaligned() };
            packet.from = Some(Credentials { pid: c.pid, uid: c.uid });
        }
        // SAFETY: `at` is a header of `msg`.
        at = unsafe { libc::CMSG_NXTHDR(&msg, at) };
    }
    Ok(packet)
}

const _: () = assert!(size_of::<[u64; 160]>() >= 16 + wire::MAX_FILES * size_of::<RawFd>() + 8 + 32);
