//! The process at the other end of a lane, as the consumer watches it.

use std::{io, os::fd::OwnedFd};

use kvferry_proto::Cause;
use rustix::{
    event::{PollFd, PollFlags, Timespec, epoll},
    io::Errno,
    net::RecvFlags,
};

/// The process at the other end.
#[derive(Debug)]
pub(super) struct Owner {
    /// Closed by either side to end the lane.
    pub socket: OwnedFd,
    /// The pidfd of the process that answered on `socket`.
    pub pidfd: OwnedFd,
    /// Readable when one of both is.
    pub either: OwnedFd,
}

impl Owner {
    pub(super) fn new(socket: OwnedFd, pidfd: OwnedFd) -> io::Result<Self> {
        let either = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for fd in [&socket, &pidfd] {
            epoll::add(&either, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        }
        Ok(Self { socket, pidfd, either })
    }

    /// Why the lane has ended, if it has: the process died, or the producer closed the lane.
    pub(super) fn ended(&self) -> Option<Cause> {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN), PollFd::new(&self.socket, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let seen = loop {
            match rustix::event::poll(&mut fds, Some(&now)) {
                Err(Errno::INTR) => {}
                seen => break seen,
            }
        };
        if seen.is_err() {
            // Without an answer the owner must not count as alive.
            return Some(Cause::LaneFailed);
        }
        if !fds[0].revents().is_empty() {
            return Some(Cause::PeerDown);
        }
        if fds[1].revents().is_empty() {
            return None;
        }
        match rustix::net::recv(&self.socket, &mut [0u8; 8], RecvFlags::DONTWAIT) {
            // The message that announces the close.
            Ok((_, 1..)) => Some(Cause::LaneFailed),
            Err(Errno::AGAIN | Errno::INTR) => None,
            // A dying process closes its sockets a moment before its pidfd becomes readable.
            Ok(_) | Err(_) => Some(Cause::PeerDown),
        }
    }
}
