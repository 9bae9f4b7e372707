//! How many bytes a socket must hold before it is readable.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// Makes a stream socket readable only when it holds `bytes` or more, or is at its end. The kernel limits the value to the
/// socket's buffer. It lies in this module because the call needs unsafe code; no crate in use wraps it.
pub(crate) fn set_low_water(socket: BorrowedFd<'_>, bytes: u32) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    // SAFETY: the kernel reads one int at the pointer, which is a local variable's, and does not keep the pointer.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const bytes).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use std::{io::Write, os::fd::AsFd};

    #[test]
    fn a_socket_is_readable_from_its_low_water_on_or_at_the_end() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut a = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let b = listener.accept().unwrap().0;
        let readable = |wait| {
            let mut fds = [PollFd::new(&b, PollFlags::IN)];
            poll(&mut fds, Some(&Timespec { tv_sec: wait, tv_nsec: 0 })).unwrap() == 1
        };
        set_low_water(b.as_fd(), 1000).unwrap();
        a.write_all(&[0; 999]).unwrap();
        assert!(!readable(0));
        a.write_all(&[0; 1]).unwrap();
        assert!(readable(20));
        set_low_water(b.as_fd(), 2000).unwrap();
        assert!(!readable(0));
        drop(a);
        assert!(readable(20), "the end counts");
    }
}
