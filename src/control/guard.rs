//! The connections of a server: a limit on their number, a time limit for the first call of each, and a way to close one.
//! A stranger at the port costs a bounded number of connections for a bounded time (promise 7).

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::{Duration, Instant},
};

use futures_core::Stream;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    time::Sleep,
};
use tonic::transport::server::Connected;

/// Wait after an accept that failed for lack of descriptors or memory: an immediate retry would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// All connections of one server.
pub(crate) struct Guard {
    limit: usize,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    next: u64,
    conns: HashMap<u64, Arc<ConnState>>,
    /// Connections turned away since the last accepted one.
    turned_away: u64,
}

impl Guard {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit: limit.max(1), held: Mutex::default() })
    }

    #[cfg(test)]
    pub(crate) fn count(&self) -> usize {
        self.held.lock().conns.len()
    }

    /// Admits a connection; `None`: the limit is reached.
    fn admit(self: &Arc<Self>, io: TcpStream, from: SocketAddr) -> Option<Conn> {
        let mut held = self.held.lock();
        if held.conns.len() >= self.limit {
            held.turned_away += 1;
            if held.turned_away == 1 {
                tracing::warn!(%from, limit = self.limit, "too many connections: turned one away; raise limits.sessions if they are legitimate");
            }
            return None;
        }
        held.turned_away = 0;
        let number = held.next;
        held.next += 1;
        let state = Arc::new(ConnState {
            from,
            accepted: Instant::now(),
            called: AtomicBool::new(false),
            dead: AtomicBool::new(false),
            reader: Mutex::new(None),
        });
        held.conns.insert(number, state.clone());
        Some(Conn { io, number, state, guard: self.clone() })
    }

    /// Closes connections that have made no call within `limit` of their accept.
    pub(crate) fn sweep(&self, now: Instant, limit: Duration) {
        for c in self.all() {
            if !c.called.load(Ordering::Relaxed) && now.saturating_duration_since(c.accepted) >= limit {
                tracing::debug!(from = %c.from, "no call on this connection in time: closed");
                c.kill();
            }
        }
    }

    pub(crate) fn kill_all(&self) {
        self.all().iter().for_each(|c| c.kill());
    }

    /// A copy, so that wakers run outside the lock.
    fn all(&self) -> Vec<Arc<ConnState>> {
        self.held.lock().conns.values().cloned().collect()
    }
}

/// The state of one connection. A request's extensions hold it.
pub(crate) struct ConnState {
    from: SocketAddr,
    accepted: Instant,
    called: AtomicBool,
    dead: AtomicBool,
    reader: Mutex<Option<Waker>>,
}

impl ConnState {
    /// The connection made a call: its peer speaks the protocol.
    pub(crate) fn called(&self) {
        self.called.store(true, Ordering::Relaxed);
    }

    pub(crate) fn from(&self) -> SocketAddr {
        self.from
    }

    /// Closes the connection and every stream on it.
    pub(crate) fn kill(&self) {
        self.dead.store(true, Ordering::Release);
        let waker = self.reader.lock().take();
        if let Some(w) = waker {
            w.wake();
        }
    }

    fn check(&self) -> io::Result<()> {
        if self.dead.load(Ordering::Acquire) {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "closed by this side"));
        }
        Ok(())
    }
}

#[derive(Clone)]
pub(crate) struct ConnInfo(pub(crate) Arc<ConnState>);

/// An accepted connection.
pub(crate) struct Conn {
    io: TcpStream,
    number: u64,
    state: Arc<ConnState>,
    guard: Arc<Guard>,
}

impl Drop for Conn {
    fn drop(&mut self) {
        self.guard.held.lock().conns.remove(&self.number);
    }
}

impl Connected for Conn {
    type ConnectInfo = ConnInfo;
    fn connect_info(&self) -> ConnInfo {
        ConnInfo(self.state.clone())
    }
}

impl AsyncRead for Conn {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.state.check()?;
        let read = Pin::new(&mut self.io).poll_read(cx, buf);
        if read.is_pending() {
            let mut reader = self.state.reader.lock();
            match &mut *reader {
                Some(w) => w.clone_from(cx.waker()),
                none => *none = Some(cx.waker().clone()),
            }
            drop(reader);
            // `kill` may have come before the waker.
            self.state.check()?;
        }
        read
    }
}

impl AsyncWrite for Conn {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.state.check()?;
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.state.check()?;
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// Accepts connections for a server. Never ends by itself, and never spins on a failing accept.
pub(crate) struct Incoming {
    pub(crate) listener: TcpListener,
    pub(crate) guard: Arc<Guard>,
    pub(crate) pause: Option<Pin<Box<Sleep>>>,
}

impl Stream for Incoming {
    type Item = io::Result<Conn>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(cx));
                self.pause = None;
            }
            match ready!(self.listener.poll_accept(cx)) {
                Ok((io, from)) => {
                    // Without this, small frames wait for each other.
                    let _ = io.set_nodelay(true);
                    if let Some(conn) = self.guard.admit(io, from) {
                        return Poll::Ready(Some(Ok(conn)));
                    }
                }
                Err(e) if matches!(e.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection: trying again; raise the limit of open files if it is reached");
                    self.pause = Some(Box::pin(tokio::time::sleep(ACCEPT_PAUSE)));
                }
            }
        }
    }
}

#[cfg(test)]
impl ConnState {
    pub(crate) fn for_test() -> Arc<Self> {
        Arc::new(Self {
            from: SocketAddr::from(([127, 0, 0, 1], 1)),
            accepted: Instant::now(),
            called: AtomicBool::new(false),
            dead: AtomicBool::new(false),
            reader: Mutex::new(None),
        })
    }
}
