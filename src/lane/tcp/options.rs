//! The socket options of a data connection.

use std::{io, os::fd::AsFd, time::Duration};

use rustix::net::sockopt;

/// How long a peer may leave sent bytes unacknowledged. The session notices a dead peer long before; this closes connections
/// that outlive their session.
const UNACKNOWLEDGED: Duration = Duration::from_secs(30);

/// Sets the options of a data connection, on both sides. Not the buffer sizes: the kernel grows them as needed.
pub(super) fn tune(socket: impl AsFd) -> io::Result<()> {
    let socket = socket.as_fd();
    // Without this, a trailer waits for more data.
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, Duration::from_secs(10))?;
    sockopt::set_tcp_keepintvl(socket, Duration::from_secs(5))?;
    sockopt::set_tcp_keepcnt(socket, 4)?;
    sockopt::set_tcp_user_timeout(socket, UNACKNOWLEDGED.as_millis() as u32)?;
    Ok(())
}
