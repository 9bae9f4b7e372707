//! A consumer's side of the control plane: one task for each peer address, which runs a [`PeerSession`] and carries out its
//! actions.
//!
//! Owns the connections to that peer and the session's stream. The machine decides when to dial, what to resend and what a
//! broken stream means. Peers never wait for each other, since their tasks share no state (promise 7). A new dial leaves
//! the running stream alone until the machine opens a new stream on it.

use std::{
    pin::Pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use kvferry_proto::{
    Cause, HelloError, Incarnation, Machine, Release, ServerBody, ServerFrame,
    hello::{Hello, Welcome},
    puller::{Addr, LaneWish},
    session::{self, Health, Out, PeerSession, Want},
};
use tokio::{
    runtime::Handle,
    sync::mpsc::{self, UnboundedReceiver, UnboundedSender},
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Response, Status, Streaming};

use super::{
    dial::{Connection, Dialer, random, said},
    events::{Connected, Events},
    lanes::{LaneCall, LaneConnector, Skipped},
    proto,
    wire::{ReleaseWanted, server_frame},
};
use crate::{config::Config, repeats::Repeats, tls::TlsIdentity};

/// Shortest time between two ticks of the machine, whose times are not finer than this.
const TICK: Duration = Duration::from_millis(1);

enum Command {
    Session(session::In),
    Connect(LaneWish),
}

/// Sends commands to a peer's task. No call blocks. Dropping it closes the session: claims end with
/// [`Cause::Shutdown`], and the task ends when its releases are acknowledged, or at once if the peer is unreachable.
pub(crate) struct PeerHandle {
    commands: UnboundedSender<Command>,
    up: Arc<AtomicBool>,
}

impl std::fmt::Debug for PeerHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PeerHandle")
    }
}

impl PeerHandle {
    /// Makes a claim; [`Events::granted`] or [`Events::lost`] answers it.
    pub(crate) fn claim(&self, want: Want) {
        self.tell(Command::Session(session::In::Claim(want)));
    }

    /// Releases a claim or an offer; sent until acknowledged.
    pub(crate) fn release(&self, expect: Incarnation, release: Release) {
        self.tell(Command::Session(session::In::Release { expect, release }));
    }

    /// Connects a lane of the first of these kinds that works; [`Events::connected`] answers, once.
    pub(crate) fn connect_lane(&self, wish: LaneWish) {
        self.tell(Command::Connect(wish));
    }

    /// Whether the session's stream is up, now and later. Dead once the task has ended.
    pub(crate) fn up(&self) -> Weak<AtomicBool> {
        Arc::downgrade(&self.up)
    }

    fn tell(&self, command: Command) {
        // Fails only when the runtime has ended, and the task with it.
        let _ = self.commands.send(command);
    }
}

/// A peer's task.
pub(crate) struct PeerTask {
    up: Arc<AtomicBool>,
    addr: Addr,
    me: Arc<Hello>,
    config: Arc<Config>,
    events: Arc<dyn Events>,
    connector: Arc<dyn LaneConnector>,
    machine: PeerSession,
    dialer: Dialer,
    commands: UnboundedReceiver<Command>,
    /// The handle is gone: the task ends with its session.
    orphan: bool,
    over: bool,
    dialing: Option<BoxFuture<Dialled>>,
    /// The result of the last dial, until the machine has decided about it.
    dialled: Option<(Connection, Arc<Welcome>)>,
    /// The connection of the stream.
    current: Option<(Connection, Arc<Welcome>)>,
    /// The stream's number, as the machine counts streams.
    number: u64,
    stream: SessionStream,
    frames: Option<UnboundedSender<proto::ClientFrame>>,
    ticked: Instant,
    skipped: Skipped,
    failures: Repeats<String>,
    breaks: Repeats<String>,
}

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;
type Dialled = Result<(Connection, Arc<Welcome>), HelloError>;
type Frames = Streaming<proto::ServerFrame>;

/// The stream of a session, from the producer.
enum SessionStream {
    Closed,
    Opening(BoxFuture<Result<Response<Frames>, Status>>),
    Open(Box<Frames>),
}

impl SessionStream {
    /// The next frame, or the error that ended the stream; `None`: the producer ended it. Waits indefinitely while the
    /// stream is closed. Cancel-safe: dropping the returned future loses no frame.
    async fn next(&mut self) -> Result<proto::ServerFrame, Option<Status>> {
        loop {
            match self {
                Self::Closed => std::future::pending().await,
                Self::Opening(open) => *self = Self::Open(Box::new(open.await?.into_inner())),
                Self::Open(frames) => return frames.message().await?.ok_or(None),
            }
        }
    }
}

enum Event {
    Command(Option<Command>),
    Dialled(Dialled),
    Frame(Result<proto::ServerFrame, Option<Status>>),
    Time,
}

/// The cause for claims of a session that the peer refused to open, if asking again soon changes nothing.
fn refused(status: &Status) -> Option<Cause> {
    match status.code() {
        Code::ResourceExhausted => Some(Cause::Limit),
        Code::PermissionDenied => Some(Cause::Refused),
        _ => None,
    }
}

/// The result of the running dial. Waits indefinitely while no dial is running.
async fn dialled<T>(dialing: &mut Option<BoxFuture<T>>) -> T {
    let Some(dial) = dialing else { return std::future::pending().await };
    let end = dial.await;
    *dialing = None;
    end
}

impl PeerTask {
    /// Starts the task of a peer. The first command dials. After a long time without commands the task calls
    /// [`Events::dropped`]: drop the handle then, or keep it if it is about to be used again.
    pub(crate) fn spawn(
        handle: &Handle,
        addr: Addr,
        me: Arc<Hello>,
        config: Arc<Config>,
        events: Arc<dyn Events>,
        connector: Arc<dyn LaneConnector>,
        tls: Option<Arc<TlsIdentity>>,
    ) -> PeerHandle {
        let (tx, commands) = mpsc::unbounded_channel();
        let up = Arc::new(AtomicBool::new(false));
        let says = up.clone();
        handle.spawn(async move {
            let now = Instant::now();
            let limit = config.limits.blocks_per_offer;
            let machine = PeerSession::new(now, me.peer.clone(), config.session.clone(), limit, Box::new(random));
            let task = Self {
                up: says,
                dialer: Dialer::new(addr.clone(), &config, tls),
                machine,
                commands,
                orphan: false,
                over: false,
                dialing: None,
                dialled: None,
                current: None,
                number: 0,
                stream: SessionStream::Closed,
                frames: None,
                ticked: now,
                skipped: Skipped::default(),
                failures: Repeats::default(),
                breaks: Repeats::default(),
                addr,
                me,
                config,
                events,
                connector,
            };
            task.run().await;
        });
        PeerHandle { commands: tx, up }
    }

    async fn run(mut self) {
        while !self.over {
            // A timeout in the past must not make this loop spin.
            let wakes = self.machine.next_timeout().map(|at| at.max(self.ticked + TICK));
            let event = tokio::select! {
                command = self.commands.recv(), if !self.orphan => Event::Command(command),
                frame = self.stream.next() => Event::Frame(frame),
                end = dialled(&mut self.dialing) => Event::Dialled(end),
                () = tokio::time::sleep_until(wakes.unwrap_or_else(Instant::now).into()), if wakes.is_some() => Event::Time,
            };
            self.handle(event);
            self.carry_out();
            self.up.store(!self.over && self.machine.is_up(), Ordering::Relaxed);
        }
    }

    fn handle(&mut self, event: Event) {
        let now = Instant::now();
        match event {
            Event::Command(Some(Command::Session(event))) => self.machine.handle(now, event),
            Event::Command(Some(Command::Connect(wish))) => self.connect_lane(wish),
            Event::Command(None) => {
                self.orphan = true;
                self.machine.handle(now, session::In::Close);
            }
            Event::Dialled(Ok((connection, welcome))) => {
                let peer = welcome.peer.clone();
                self.dialled = Some((connection, welcome));
                self.machine.handle(now, session::In::Welcomed(peer));
            }
            Event::Dialled(Err(error)) => {
                if let Some(unlogged) = self.failures.is_news(now, error.to_string()) {
                    tracing::warn!(peer = %self.addr, %error, unlogged, "dial failed");
                }
                self.machine.handle(now, session::In::DialFailed(error));
            }
            Event::Frame(Ok(frame)) => match self.check(frame) {
                Ok(frame) => self.machine.handle(now, session::In::Frame(self.number, frame)),
                Err(what) => self.broke(now, &format!("malformed message from the peer: {what}")),
            },
            Event::Frame(Err(Some(status))) => match refused(&status) {
                Some(cause) if !self.machine.is_up() => {
                    self.note_break(now, &said(&status));
                    self.machine.handle(now, session::In::Refused(self.number, cause));
                }
                _ => self.broke(now, &said(&status)),
            },
            Event::Frame(Err(None)) => self.broke(now, "the peer ended it"),
            Event::Time => {
                self.ticked = now;
                self.machine.tick(now);
            }
        }
    }

    fn check(&self, frame: proto::ServerFrame) -> Result<ServerFrame, String> {
        let frame = server_frame(frame, self.config.limits.blocks_per_offer).map_err(|e| e.to_string())?;
        if let Some(ServerBody::Granted { grant, .. }) = &frame.body
            && let Some((_, welcome)) = &self.current
            && grant.slot >= welcome.fence_slots
        {
            return Err(format!(
                "granted.slot: {}, which is not below fence_slots, {}",
                grant.slot, welcome.fence_slots
            ));
        }
        Ok(frame)
    }

    fn broke(&mut self, now: Instant, why: &str) {
        self.note_break(now, why);
        self.machine.handle(now, session::In::Broken(self.number));
    }

    fn note_break(&mut self, now: Instant, why: &str) {
        self.stream = SessionStream::Closed;
        self.frames = None;
        if let Some(unlogged) = self.breaks.is_news(now, why.to_owned()) {
            let peer = self.machine.peer();
            tracing::info!(
                peer = %self.addr, engine = peer.map(|p| p.engine.as_str()), incarnation = ?peer.map(|p| p.incarnation),
                why, unlogged, "session broke"
            );
        }
    }

    fn carry_out(&mut self) {
        while let Some(out) = self.machine.poll() {
            match out {
                Out::Dial => {
                    let (dialer, me) = (self.dialer.clone(), self.me.clone());
                    self.dialing = Some(Box::pin(async move {
                        let (connection, welcome) = dialer.hello(&me).await?;
                        Ok((connection, Arc::new(welcome)))
                    }));
                }
                Out::Open(n) => self.open(n),
                Out::Send(frame) => {
                    if let Some(frames) = &self.frames {
                        // Fails only when the stream broke, which `SessionStream::next` reports.
                        let _ = frames.send(frame.into());
                    }
                }
                Out::ReleaseAlone(expect, release) => self.release_alone(expect, &release),
                Out::HangUp => {
                    self.stream = SessionStream::Closed;
                    self.frames = None;
                    self.current = None;
                }
                Out::Peer(_) => {
                    if let Some((_, welcome)) = &self.dialled {
                        self.events.welcomed(&self.addr, welcome.clone());
                    }
                }
                Out::Granted { claim, grant, contents } => self.events.granted(claim, grant, contents),
                Out::Grown { claim, growth } => self.events.grown(claim, growth),
                Out::Lost { claim, cause } => self.events.lost(claim, cause),
                Out::Health(health) => self.log(health),
                Out::Silent(silent) => self.events.silent(&self.addr, silent),
                Out::Expired => {
                    self.over |= self.orphan;
                    if !self.orphan {
                        self.events.dropped(&self.addr);
                    }
                }
            }
        }
        // This dial only checked the peer's identity: the stream stays as it is.
        self.dialled = None;
    }

    fn open(&mut self, n: u64) {
        self.number = n;
        self.current = self.dialled.take();
        let Some((connection, _)) = &self.current else {
            // The machine opens a stream after a dial. Without its connection the stream is broken from the start.
            self.stream = SessionStream::Opening(Box::pin(async { Err(Status::unavailable("no connection")) }));
            return;
        };
        let (tx, rx) = mpsc::unbounded_channel();
        self.frames = Some(tx);
        let mut ferry = connection.ferry();
        let open = async move { ferry.session(UnboundedReceiverStream::new(rx)).await };
        self.stream = SessionStream::Opening(Box::pin(open));
    }

    fn release_alone(&self, expect: Incarnation, release: &Release) {
        let wanted = ReleaseWanted { from: None, offer: release.offer, token: release.token, expect: Some(expect) };
        let (dialer, timeout) = (self.dialer.clone(), self.config.session.hello_timeout);
        let release = async move {
            let connection = dialer.connect().await.map_err(|e| e.to_string())?;
            connection.ferry().release(proto::ReleaseRequest::from(&wanted)).await.map_err(|s| said(&s))
        };
        let peer = self.addr.clone();
        tokio::spawn(async move {
            match tokio::time::timeout(timeout, release).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => tracing::debug!(%peer, error, "an offer was not released; its lease ends it"),
                Err(_) => tracing::debug!(%peer, "an offer was not released in time; its lease ends it"),
            }
        });
    }

    fn connect_lane(&mut self, wish: LaneWish) {
        let (incarnation, need) = (wish.expect, wish.need);
        let lane = match &self.current {
            Some((connection, welcome)) if welcome.peer.incarnation == incarnation => {
                Ok((connection.clone(), welcome.clone()))
            }
            // The session finds out what became of the peer; the pull may try again.
            _ => Err(Cause::Unreachable),
        };
        match lane {
            Ok((connection, welcome)) => {
                let call = LaneCall {
                    peer: self.addr.clone(),
                    me: self.me.clone(),
                    connection,
                    welcome,
                    connector: self.connector.clone(),
                    timeout: self.config.session.hello_timeout,
                    skipped: self.skipped.clone(),
                };
                let events = self.events.clone();
                // A task of its own: a lane that takes long to connect must not delay heartbeats and claims.
                tokio::spawn(async move { events.connected(&call.peer.clone(), call.run(wish).await) });
            }
            Err(cause) => {
                self.events.connected(&self.addr, Connected { incarnation, need, lane: Err(cause) });
            }
        }
    }

    fn log(&self, health: Health) {
        let peer = self.machine.peer();
        let (engine, incarnation) = (peer.map(|p| p.engine.as_str()), peer.map(|p| p.incarnation));
        let claims = self.machine.claims();
        match health {
            Health::Up => tracing::info!(peer = %self.addr, engine, ?incarnation, "peer up"),
            Health::Suspect => {
                tracing::warn!(peer = %self.addr, engine, ?incarnation, claims, "peer silent: no new claims");
            }
            Health::Down => tracing::warn!(peer = %self.addr, engine, ?incarnation, claims, "peer down"),
            // `incarnation` is still the old one here; the new one comes with `peer up`.
            Health::Reborn => {
                tracing::warn!(peer = %self.addr, engine, old = ?incarnation, claims, "peer restarted");
            }
        }
    }
}
