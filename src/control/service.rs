//! The calls of Ferry, and a session's stream. One task reads a session's frames and writes the answers: a claim's round
//! trip has no hand-over between tasks, and no frame is read from a consumer that does not read its answers.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_core::Stream;
use kvferry_proto::{
    ClientBody, ClientFrame, EngineId, Incarnation, LaneKind, PeerId, ServerBody, ServerFrame, hello::Hello,
};
use parking_lot::Mutex;
use tonic::{Code, Request, Response, Status, Streaming};

use super::{
    desk::{Desk, SessionId},
    guard::{ConnInfo, ConnState, Guard},
    outbox::{FrameQueue, Next, Outbox},
    pauses::{Pauses, WAITING},
    peer::{Counts, PeerKey},
    proto::{self, ferry_server::Ferry},
    refusal::Refusal,
    secret::Secret,
    server::MESSAGE_BYTES,
    wire::{BadMessage, LaneWanted, ReleaseWanted},
};
use crate::{config::Config, tls::NAMELESS};

/// Time between two answers to a peer's releases with a wrong token. A claim with a wrong token is answered at once: it is one
/// frame among those of many clients in a session, and a pause would delay the frames behind it. See `docs/threat-model.md`.
pub(super) const GUESS_PAUSE: Duration = Duration::from_millis(250);
/// Frames of one session that are handled before other sessions have their turn.
const BUDGET: usize = 64;

/// Shared by all calls of a server.
pub(crate) struct Hub {
    desk: Arc<dyn Desk>,
    guard: Arc<Guard>,
    sessions: Mutex<Sessions>,
    pauses: Pauses,
    /// The engines that may speak to this rank; empty: all.
    engines: Vec<EngineId>,
    /// Most session streams, including those without an Open, and most of one peer.
    limit: usize,
    per_peer: usize,
    open_within: Duration,
    silence: Duration,
    linger: Duration,
    stopping: AtomicBool,
}

#[derive(Default)]
struct Sessions {
    next: u64,
    live: HashMap<u64, Arc<FrameQueue>>,
    by_peer: Counts,
}

impl Hub {
    pub(crate) fn new(desk: Arc<dyn Desk>, guard: Arc<Guard>, config: &Config) -> Arc<Self> {
        let open_within = config.session.hello_timeout;
        Arc::new(Self {
            desk,
            guard,
            sessions: Mutex::default(),
            pauses: Pauses::default(),
            engines: config.engines.clone(),
            limit: config.limits.sessions.saturating_mul(2).max(1),
            per_peer: config.limits.sessions_per_peer,
            open_within,
            silence: config.session.silence,
            linger: open_within.min(Duration::from_secs(1)),
            stopping: AtomicBool::new(false),
        })
    }

    #[cfg(test)]
    pub(crate) fn guard(&self) -> &Guard {
        &self.guard
    }

    #[cfg(test)]
    pub(crate) fn sessions(&self) -> usize {
        self.sessions.lock().live.len()
    }

    /// Time between two calls of [`Hub::sweep`]: short enough for the shortest timeout, long enough to cost nothing.
    pub(crate) fn sweep_every(&self) -> Duration {
        (self.silence.min(self.open_within) / 4).clamp(Duration::from_millis(10), Duration::from_secs(1))
    }

    /// Ends sessions and connections that are silent, half open or not read.
    pub(crate) fn sweep(&self, now: Instant) {
        self.guard.sweep(now, self.open_within);
        for q in self.queues() {
            q.sweep(now, self.open_within, self.silence, self.linger);
        }
    }

    /// Ends all sessions and accepts no new ones.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        for q in self.queues() {
            q.end(Refusal::Stopping.status());
        }
    }

    fn queues(&self) -> Vec<Arc<FrameQueue>> {
        self.sessions.lock().live.values().cloned().collect()
    }

    fn enter(
        self: &Arc<Self>,
        inbound: Streaming<proto::ClientFrame>,
        conn: Arc<ConnState>,
    ) -> Result<Session, Status> {
        let mut sessions = self.sessions.lock();
        if self.stopping.load(Ordering::Acquire) {
            return Err(Refusal::Stopping.status());
        }
        let peer = conn.peer();
        let (held, limit) = (sessions.by_peer.of(&peer), self.per_peer);
        if held >= limit {
            let setting = "limits.sessions_per_peer";
            return Err(self.refuse(&conn, Refusal::Share { what: "sessions", peer, limit, setting }));
        }
        if sessions.live.len() >= self.limit {
            return Err(self.refuse(&conn, Refusal::Limit { what: "sessions", limit: self.limit }));
        }
        let number = sessions.next;
        sessions.next += 1;
        let queue = FrameQueue::new(conn.clone());
        sessions.live.insert(number, queue.clone());
        sessions.by_peer.add(&peer);
        Ok(Session { inbound: Some(inbound), queue, number, conn, peer, opened: None, hub: self.clone() })
    }

    /// Logs a refusal once a minute for each peer and kind.
    fn refuse(&self, conn: &ConnState, refusal: Refusal) -> Status {
        if let Some(kind) = refusal.logged_as() {
            self.guard.log.refused(Instant::now(), &conn.peer(), kind, &refusal);
        }
        refusal.status()
    }

    /// Checks that the peer behind a connection may speak for an engine (`None`: for any one), and that the engine is allowed
    /// here.
    fn check_engine(&self, conn: &ConnState, engine: Option<&EngineId>) -> Result<(), Refusal> {
        if let Some(names) = conn.engines() {
            let named = match engine {
                Some(engine) => names.check(engine),
                None if names.is_empty() => Err(NAMELESS.into()),
                None => Ok(()),
            };
            named.map_err(|why| Refusal::Denied(format!("this certificate {why}")))?;
        }
        match engine {
            Some(engine) if !self.engines.is_empty() && !self.engines.contains(engine) => {
                Err(Refusal::Denied(format!("engine {engine:?} is not in this rank's list of engines")))
            }
            _ => Ok(()),
        }
    }

    /// Checks that a consumer may open a session or request a lane on a connection: it said Hello on it. Returns the consumer
    /// as the desk knows it.
    fn check_consumer(&self, conn: &ConnState, from: &PeerId) -> Result<PeerId, Refusal> {
        self.check_engine(conn, Some(&from.engine))?;
        conn.known(from).ok_or_else(|| {
            Refusal::Denied(format!(
                "incarnation {} of engine {:?} has not said Hello on this connection: a session and its lanes belong to \
                 the connection that did",
                from.incarnation, from.engine
            ))
        })
    }
}

/// The connection of a request.
fn conn<T>(request: &Request<T>) -> Result<Arc<ConnState>, Status> {
    let info = request.extensions().get::<ConnInfo>();
    info.map(|i| i.state.clone()).ok_or_else(|| Status::internal("unknown connection"))
}

fn invalid(e: BadMessage) -> Status {
    Status::invalid_argument(e.to_string())
}

pub(crate) struct FerryService(pub(crate) Arc<Hub>);

#[tonic::async_trait]
impl Ferry for FerryService {
    async fn hello(&self, request: Request<proto::HelloRequest>) -> Result<Response<proto::HelloReply>, Status> {
        let conn = conn(&request)?;
        let request = request.into_inner();
        let secret = match &*request.secret {
            // Only this connection will ever show it.
            [] => Secret::random().map_err(Status::internal)?,
            bytes => {
                Secret::from_wire(bytes).ok_or_else(|| Status::invalid_argument("secret: is not 16 bytes long"))?
            }
        };
        let hello = Hello::try_from(request).map_err(invalid)?;
        let allowed = self.0.check_engine(&conn, Some(&hello.peer.engine));
        allowed.map_err(|r| self.0.refuse(&conn, r))?;
        let result = match self.0.desk.hello(&hello, &conn.peer()) {
            Ok(welcome) => {
                conn.greeted(secret.known_as(&hello.peer), hello.peer);
                proto::hello_reply::Result::Welcome((&welcome).into())
            }
            Err(mismatch) => {
                let why = format_args!("engine {:?}: {mismatch}", hello.peer.engine);
                self.0.guard.log.refused(Instant::now(), &conn.peer(), "mismatch", &why);
                proto::hello_reply::Result::Mismatch(mismatch.into())
            }
        };
        Ok(Response::new(proto::HelloReply { result: Some(result) }))
    }

    async fn connect_lane(&self, request: Request<proto::LaneRequest>) -> Result<Response<proto::LaneReply>, Status> {
        let conn = conn(&request)?;
        let wanted = LaneWanted::try_from(request.into_inner()).map_err(invalid)?;
        let known = self.0.check_consumer(&conn, &wanted.from).map_err(|r| self.0.refuse(&conn, r))?;
        let by = conn.peer();
        let Some(kind) = wanted.kind else {
            return Err(Refusal::Unsupported { what: "a lane of this kind".into() }.status());
        };
        let ticket = match wanted.verbs {
            Some(ends) if kind == LaneKind::Verbs => {
                let desk = self.0.desk.clone();
                let make = move || desk.connect_verbs(&known, wanted.expect, &ends, &by);
                // The device's firmware creates queue pairs slowly: other calls go on meanwhile.
                tokio::task::spawn_blocking(make)
                    .await
                    .map_err(|_| Status::internal("the thread that creates the lane panicked"))?
            }
            _ => self.0.desk.connect_lane(&known, wanted.expect, kind, &by),
        };
        let ticket = ticket.map_err(|r| self.0.refuse(&conn, r))?;
        Ok(Response::new(ticket.into()))
    }

    type SessionStream = Session;

    async fn session(&self, request: Request<Streaming<proto::ClientFrame>>) -> Result<Response<Session>, Status> {
        let conn = conn(&request)?;
        Ok(Response::new(self.0.enter(request.into_inner(), conn)?))
    }

    async fn release(&self, request: Request<proto::ReleaseRequest>) -> Result<Response<proto::ReleaseReply>, Status> {
        let conn = conn(&request)?;
        let r = ReleaseWanted::try_from(request.into_inner()).map_err(invalid)?;
        let allowed = self.0.check_engine(&conn, r.from.as_ref().map(|p| &p.engine));
        let offer = (r.offer, r.token);
        let freed = allowed.and_then(|()| self.0.desk.release(r.from, offer, r.expect, &conn.peer()));
        if matches!(freed, Err(Refusal::Token)) {
            let Some(queued) = self.0.pauses.queue(&conn.peer()) else {
                return Err(self
                    .0
                    .refuse(&conn, Refusal::Limit { what: "releases with a wrong token", limit: WAITING }));
            };
            queued.wait(GUESS_PAUSE).await;
        }
        let freed = freed.map_err(|r| self.0.refuse(&conn, r))?;
        Ok(Response::new(proto::ReleaseReply { freed }))
    }
}

/// The stream of one session. Polling it for the next frame to the consumer also handles the frames from the consumer.
pub(crate) struct Session {
    inbound: Option<Streaming<proto::ClientFrame>>,
    queue: Arc<FrameQueue>,
    number: u64,
    conn: Arc<ConnState>,
    /// The peer that it counts for.
    peer: PeerKey,
    opened: Option<OpenSession>,
    hub: Arc<Hub>,
}

/// A session after its Open.
struct OpenSession {
    id: SessionId,
    from: PeerId,
    /// The same consumer as the desk knows it, see [`Secret::known_as`].
    known: PeerId,
}

impl Session {
    fn frame(&mut self, frame: proto::ClientFrame) -> Result<(), Status> {
        let frame = ClientFrame::try_from(frame).map_err(invalid)?;
        match (&self.opened, frame.body) {
            (None, ClientBody::Open { from, expect }) => {
                let (id, known) = self.open(&from, expect).map_err(|r| self.hub.refuse(&self.conn, r))?;
                self.queue.send_first(ServerFrame { ack: 0, body: Some(ServerBody::Opened(expect)) });
                self.queue.opened();
                tracing::debug!(peer = %from.engine, rank = %from.rank, incarnation = %from.incarnation, "session opened");
                self.opened = Some(OpenSession { id, from, known });
                Ok(())
            }
            (None, _) => Err(Status::invalid_argument("frame: a session begins with Open")),
            (Some(_), ClientBody::Open { .. }) => Err(Status::invalid_argument("frame: Open comes once")),
            (Some(OpenSession { id, known, .. }), body) => {
                if let Err(refusal) = self.hub.desk.frame(*id, known, ClientFrame { seq: frame.seq, body }, &self.peer)
                {
                    self.hub.refuse(&self.conn, refusal);
                }
                Ok(())
            }
        }
    }

    fn open(&self, from: &PeerId, expect: Incarnation) -> Result<(SessionId, PeerId), Refusal> {
        let known = self.hub.check_consumer(&self.conn, from)?;
        let id = self.hub.desk.open(&known, expect, Outbox::new(self.queue.clone()), &self.peer)?;
        Ok((id, known))
    }

    /// The status for a stream that broke or carried a malformed frame.
    fn unreadable(&self, status: Status) -> Status {
        match status.code() {
            Code::OutOfRange => {
                Status::resource_exhausted(format!("a frame of over {MESSAGE_BYTES} bytes: {}", status.message()))
            }
            Code::Internal => Status::invalid_argument(format!("frame: {}", status.message())),
            _ => status,
        }
    }

    /// Logs a frame that ends the session, once a minute for each peer.
    fn log_frame(&self, status: &Status) {
        if let Some(OpenSession { from, .. }) = &self.opened {
            let why = format_args!("engine {:?}: {}: closed its session", from.engine, status.message());
            self.hub.guard.log.refused(Instant::now(), &self.conn.peer(), "frame", &why);
        }
    }

    /// Ends the session; tells the desk once.
    fn close(&mut self) {
        self.inbound = None;
        self.queue.close();
        let mut sessions = self.hub.sessions.lock();
        if sessions.live.remove(&self.number).is_some() {
            sessions.by_peer.remove(&self.peer, 1);
        }
        drop(sessions);
        if let Some(OpenSession { id, from, known }) = self.opened.take() {
            tracing::debug!(peer = %from.engine, rank = %from.rank, incarnation = %from.incarnation, "session closed");
            self.hub.desk.closed(id, &known);
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.close();
    }
}

impl Stream for Session {
    type Item = Result<proto::ServerFrame, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        for _ in 0..BUDGET {
            match this.queue.next() {
                Next::Frame(frame) => return Poll::Ready(Some(Ok(frame.into()))),
                Next::End(status) => {
                    this.close();
                    return Poll::Ready(Some(Err(status)));
                }
                Next::Nothing => {}
            }
            let Some(inbound) = &mut this.inbound else { return Poll::Ready(None) };
            match Pin::new(inbound).poll_next(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    this.queue.heard();
                    if let Err(status) = this.frame(frame) {
                        this.log_frame(&status);
                        this.queue.end(status);
                    }
                }
                Poll::Ready(Some(Err(status))) => {
                    let status = this.unreadable(status);
                    if matches!(status.code(), Code::ResourceExhausted | Code::InvalidArgument) {
                        this.log_frame(&status);
                    }
                    this.queue.end(status);
                }
                Poll::Ready(None) => {
                    this.close();
                    return Poll::Ready(None);
                }
                Poll::Pending => {
                    if this.queue.park(cx) {
                        return Poll::Pending;
                    }
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}
