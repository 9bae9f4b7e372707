//! The connections of a server: limits on their number, a time limit for the first call of each, and a way to close one.
//! A stranger at the port costs a bounded number of connections for a bounded time (promise 7).

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::{Duration, Instant},
};

use futures_core::Stream;
use kvferry_proto::PeerId;
use parking_lot::Mutex;
use tokio::{
    net::{TcpListener, TcpStream},
    time::Sleep,
};

use super::{
    io::Conn,
    peer::{Counts, PeerKey, RefusalLog},
    refusal::Refusal,
};
use crate::tls::{EngineNames, TlsIdentity};

/// Wait after an accept that failed for lack of descriptors or memory: an immediate retry would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections of a peer over its share that are kept until their first call, which hears the limit. More are closed at once.
const OVER: usize = 16;

/// All connections of one server.
pub(crate) struct Guard {
    limit: usize,
    per_peer: usize,
    held: Mutex<Held>,
    pub(crate) log: RefusalLog,
}

#[derive(Default)]
struct Held {
    next: u64,
    conns: HashMap<u64, Arc<ConnState>>,
    by_peer: Counts,
    /// Connections turned away since the last accepted one.
    turned_away: u64,
}

impl Guard {
    /// `limit`: most connections; `per_peer`: of one peer.
    pub(crate) fn new(limit: usize, per_peer: usize) -> Arc<Self> {
        Arc::new(Self {
            limit: limit.max(1),
            per_peer: per_peer.max(1),
            held: Mutex::default(),
            log: RefusalLog::default(),
        })
    }

    #[cfg(test)]
    pub(crate) fn count(&self) -> usize {
        self.held.lock().conns.len()
    }

    /// Admits a connection; `None`: a limit is reached.
    fn admit(self: &Arc<Self>, from: SocketAddr) -> Option<(u64, Arc<ConnState>)> {
        let peer = PeerKey::new(from.ip(), None);
        let mut held = self.held.lock();
        if held.conns.len() >= self.limit {
            held.turned_away += 1;
            if held.turned_away == 1 {
                tracing::warn!(%from, limit = self.limit, "too many connections: turned one away; raise limits.sessions if they are legitimate");
            }
            return None;
        }
        let of_peer = held.by_peer.of(&peer);
        if of_peer >= self.per_peer {
            self.log.refused(Instant::now(), &peer, "connections", &self.share(&peer));
        }
        if of_peer >= self.per_peer.saturating_add(OVER) {
            return None;
        }
        held.turned_away = 0;
        let number = held.next;
        held.next += 1;
        let state = Arc::new(ConnState::new(from));
        state.over.store(of_peer >= self.per_peer, Ordering::Relaxed);
        held.by_peer.add(&peer);
        held.conns.insert(number, state.clone());
        Some((number, state))
    }

    fn share(&self, peer: &PeerKey) -> Refusal {
        let peer = peer.clone();
        Refusal::Share { what: "connections", peer, limit: self.per_peer, setting: "limits.connections_per_peer" }
    }

    /// The connection's certificate is verified: from now on it counts as its peer's.
    pub(super) fn identified(&self, conn: &ConnState, engines: EngineNames) {
        let mut held = self.held.lock();
        held.by_peer.remove(&conn.peer(), 1);
        // A handshake comes once.
        let _ = conn.engines.set(Arc::new(engines));
        let peer = conn.peer();
        let over = held.by_peer.of(&peer) >= self.per_peer;
        held.by_peer.add(&peer);
        conn.over.store(over, Ordering::Relaxed);
        if over {
            self.log.refused(Instant::now(), &peer, "connections", &self.share(&peer));
        }
    }

    /// The connection is gone.
    pub(super) fn dropped(&self, number: u64) {
        let mut held = self.held.lock();
        if let Some(conn) = held.conns.remove(&number) {
            held.by_peer.remove(&conn.peer(), 1);
        }
    }

    /// Refuses a call on a connection over its peer's share.
    pub(super) fn may_call(&self, conn: &ConnState) -> Result<(), Refusal> {
        if conn.over.load(Ordering::Relaxed) {
            return Err(self.share(&conn.peer()));
        }
        Ok(())
    }

    /// Closes connections on which no call's request has arrived whole within `limit` of their accept.
    pub(crate) fn sweep(&self, now: Instant, limit: Duration) {
        for c in self.all() {
            if !c.called.load(Ordering::Relaxed) && now.saturating_duration_since(c.accepted) >= limit {
                tracing::debug!(from = %c.from, "no call on this connection in time: closed");
                c.kill();
            }
        }
        self.log.sweep(now);
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
    /// The whole request of a call came: its peer speaks the protocol.
    called: AtomicBool,
    /// It is over its peer's share.
    over: AtomicBool,
    dead: AtomicBool,
    /// The engines that its certificate names, once that is verified.
    engines: OnceLock<Arc<EngineNames>>,
    /// The consumer whose Hello came on it: as the desk knows it, and as it calls itself.
    hello: Mutex<Option<(PeerId, PeerId)>>,
    pub(super) reader: Mutex<Option<Waker>>,
}

impl ConnState {
    fn new(from: SocketAddr) -> Self {
        Self {
            from,
            accepted: Instant::now(),
            called: AtomicBool::new(false),
            over: AtomicBool::new(false),
            dead: AtomicBool::new(false),
            engines: OnceLock::new(),
            hello: Mutex::default(),
            reader: Mutex::default(),
        }
    }

    #[cfg(test)]
    pub(crate) fn for_test() -> Arc<Self> {
        Arc::new(Self::new(SocketAddr::from(([127, 0, 0, 1], 1))))
    }

    pub(crate) fn from(&self) -> SocketAddr {
        self.from
    }

    /// The peer that it counts for.
    pub(crate) fn peer(&self) -> PeerKey {
        PeerKey::new(self.from.ip(), self.engines.get())
    }

    /// The engines that its certificate names; `None`: it is not encrypted.
    pub(crate) fn engines(&self) -> Option<&EngineNames> {
        self.engines.get().map(Arc::as_ref)
    }

    /// The whole request of a call came on it.
    pub(super) fn called(&self) {
        self.called.store(true, Ordering::Relaxed);
    }

    /// A consumer said Hello on it. See [`super::secret`].
    pub(crate) fn greeted(&self, known: PeerId, consumer: PeerId) {
        *self.hello.lock() = Some((known, consumer));
    }

    /// The consumer as the desk knows it, if it said Hello on this connection.
    pub(crate) fn known(&self, consumer: &PeerId) -> Option<PeerId> {
        self.hello.lock().as_ref().filter(|(_, c)| c == consumer).map(|(known, _)| known.clone())
    }

    /// Closes the connection and every stream on it.
    pub(crate) fn kill(&self) {
        self.dead.store(true, Ordering::Release);
        let waker = self.reader.lock().take();
        if let Some(w) = waker {
            w.wake();
        }
    }

    pub(super) fn check(&self) -> io::Result<()> {
        if self.dead.load(Ordering::Acquire) {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "closed by this side"));
        }
        Ok(())
    }
}

#[derive(Clone)]
pub(crate) struct ConnInfo {
    pub(crate) state: Arc<ConnState>,
    pub(crate) guard: Arc<Guard>,
}

/// Accepts connections for a server. Never ends by itself, and never spins on a failing accept.
pub(crate) struct Incoming {
    listener: TcpListener,
    guard: Arc<Guard>,
    tls: Option<Arc<TlsIdentity>>,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Incoming {
    pub(crate) fn new(listener: TcpListener, guard: Arc<Guard>, tls: Option<Arc<TlsIdentity>>) -> Self {
        Self { listener, guard, tls, pause: None }
    }

    fn accepted(&self, io: TcpStream, from: SocketAddr) -> Option<Conn> {
        // Without this, small frames wait for each other.
        let _ = io.set_nodelay(true);
        let (number, state) = self.guard.admit(from)?;
        Some(Conn::new(io, self.tls.as_deref(), number, ConnInfo { state, guard: self.guard.clone() }))
    }
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
                    if let Some(conn) = self.accepted(io, from) {
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
