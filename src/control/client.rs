//! A consumer's side of the control plane: one task for each peer address, which runs a [`PeerSession`] and does what it
//! says.
//!
//! Owns the connections to that peer and its session's stream. It decides nothing: when to dial, what to resend and what a
//! broken stream means is the machine's affair. Peers never wait for each other, since nothing is shared between their
//! tasks (promise 7). A new dial leaves the running stream alone until the machine opens a new one on it.

use std::{
    pin::Pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_core::Stream;
use tokio::{
    runtime::Handle,
    sync::mpsc::{self, UnboundedReceiver, UnboundedSender},
    time::Sleep,
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Response, Status, Streaming};

pub use super::{
    call::{CallError, Caller, make_offer, probe, release},
    connect::{Connecting, LaneConnector, Prepared, Preparing},
};
use super::{
    connect::{LaneCall, Skipped},
    dial::{Dialer, Line, said},
    proto,
};
use crate::{
    block::Incarnation,
    config::Config,
    driver::rail::{self, Addr, LaneWish},
    error::{Cause, HelloError},
    lane::Grant,
    protocol::{
        Machine,
        frame::{Release, ServerBody, ServerFrame},
        hello::{Hello, Welcome},
        retry::Backoff,
        session::{self, Health, Out, PeerSession, Want},
    },
};

/// Where a peer's task tells what happened. Called on tokio threads; must not block.
pub type Sink = Arc<dyn Fn(rail::In) + Send + Sync>;

/// A stream that breaks sooner than this was never much of one: such streams are opened again with growing waits.
const SHORT_LIVED: Duration = Duration::from_secs(1);
/// Events of one peer that are dealt with before other tasks have their turn.
const BUDGET: u32 = 64;
/// Between two looks at the clock. Nothing that the machine times is finer than this.
const TICK: Duration = Duration::from_millis(1);

enum Command {
    Claim(Want),
    Release(Incarnation, Release),
    Connect(LaneWish),
    Close,
}

/// Tells a peer's task what is wanted. No call blocks. Dropping it closes the session: claims end with
/// [`Cause::Shutdown`], and the task ends when its releases are acknowledged, or at once when the peer is not there.
pub struct PeerHandle {
    commands: UnboundedSender<Command>,
    up: Arc<AtomicBool>,
}

impl std::fmt::Debug for PeerHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PeerHandle")
    }
}

impl PeerHandle {
    /// Makes a claim; `Granted` or `Lost` comes for it.
    pub fn claim(&self, want: Want) {
        self.tell(Command::Claim(want));
    }

    /// Lets go of a claim or an offer; sent until acknowledged.
    pub fn release(&self, expect: Incarnation, release: Release) {
        self.tell(Command::Release(expect, release));
    }

    /// Connects a lane of the first of these kinds that can be had; `Lane` comes, once.
    pub fn connect_lane(&self, wish: LaneWish) {
        self.tell(Command::Connect(wish));
    }

    /// Whether the session's stream is up, now and later. Dead once the task has ended.
    pub fn up(&self) -> Weak<AtomicBool> {
        Arc::downgrade(&self.up)
    }

    /// Closes the session, as dropping the handle does.
    pub fn close(&self) {
        self.tell(Command::Close);
    }

    fn tell(&self, command: Command) {
        // The task outlives its handles, unless the runtime is gone: then there is nobody to tell any more.
        let _ = self.commands.send(command);
    }
}

/// A peer's task.
pub struct PeerTask {
    up: Arc<AtomicBool>,
    addr: Addr,
    me: Arc<Hello>,
    config: Arc<Config>,
    sink: Sink,
    connector: Arc<dyn LaneConnector>,
    machine: PeerSession,
    dialer: Dialer,
    commands: UnboundedReceiver<Command>,
    /// The handle is gone.
    orphan: bool,
    /// `Close` was said.
    closing: bool,
    over: bool,
    dialing: Option<BoxFuture<Result<(Line, Welcome), HelloError>>>,
    /// What the last dial brought, until the machine has decided about it.
    dialled: Option<(Line, Arc<Welcome>)>,
    /// What the stream is on.
    current: Option<(Line, Arc<Welcome>)>,
    opening: Option<(u64, Opening)>,
    stream: Option<(u64, Frames)>,
    frames: Option<UnboundedSender<proto::ClientFrame>>,
    since: Instant,
    /// A stream that broke, and when to say so.
    broken: Option<(u64, Instant)>,
    short_lived: u32,
    patience: Backoff,
    sleep: Pin<Box<Sleep>>,
    wakes: Option<Instant>,
    ticked: Instant,
    commands_first: bool,
    skipped: Skipped,
    last_failure: Option<String>,
}

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;
type Frames = Streaming<proto::ServerFrame>;
type Opening = BoxFuture<Result<Response<Frames>, Status>>;

enum Event {
    Command(Option<Command>),
    Dialled(Result<(Line, Welcome), HelloError>),
    Opened(u64, Result<Frames, Status>),
    Frame(u64, Result<proto::ServerFrame, Option<Status>>),
    Time,
}

/// Random bits for jitter. Without a random source there is none, which does no harm here.
fn random() -> u64 {
    getrandom::u64().unwrap_or(u64::MAX / 2)
}

impl PeerTask {
    /// Starts the task of a peer; nothing is dialled before something is wanted. When nothing was wanted for long,
    /// `Dropped` comes: let go of the handle then, or keep it if something is wanted after all.
    pub fn spawn(
        handle: &Handle,
        addr: Addr,
        me: Arc<Hello>,
        config: Arc<Config>,
        sink: Sink,
        connector: Arc<dyn LaneConnector>,
    ) -> PeerHandle {
        let (tx, commands) = mpsc::unbounded_channel();
        let up = Arc::new(AtomicBool::new(false));
        let says = up.clone();
        handle.spawn(async move {
            let now = Instant::now();
            let machine = PeerSession::new(now, me.peer.clone(), config.session.clone(), Box::new(random));
            let task = Self {
                up: says,
                dialer: Dialer::new(addr.clone(), &config),
                machine,
                commands,
                orphan: false,
                closing: false,
                over: false,
                dialing: None,
                dialled: None,
                current: None,
                opening: None,
                stream: None,
                frames: None,
                since: now,
                broken: None,
                short_lived: 0,
                patience: Backoff::new(config.session.redial_min, config.session.redial_max),
                sleep: Box::pin(tokio::time::sleep(Duration::ZERO)),
                wakes: None,
                ticked: now,
                commands_first: false,
                skipped: Skipped::default(),
                last_failure: None,
                addr,
                me,
                config,
                sink,
                connector,
            };
            task.run().await;
        });
        PeerHandle { commands: tx, up }
    }

    async fn run(mut self) {
        let mut busy = 0;
        while !self.over {
            self.set_alarm();
            let mut waited = false;
            let event = std::future::poll_fn(|cx| {
                let p = self.poll_event(cx);
                waited |= p.is_pending();
                p
            })
            .await;
            self.deal(event);
            self.carry_out();
            self.up.store(!self.over && self.machine.is_up(), Ordering::Relaxed);
            busy = if waited { 0 } else { busy + 1 };
            if busy >= BUDGET {
                busy = 0;
                tokio::task::yield_now().await;
            }
        }
    }

    fn set_alarm(&mut self) {
        let broken = self.broken.map(|(_, at)| at);
        let next = [self.machine.next_timeout(), broken].into_iter().flatten().min();
        // A time that has come and has nothing to it must not become a spin.
        let next = next.map(|at| at.max(self.ticked + TICK));
        if next != self.wakes {
            self.wakes = next;
            if let Some(at) = next {
                self.sleep.as_mut().reset(at.into());
            }
        }
    }

    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        // Neither a flood of frames nor one of commands may keep the other waiting.
        self.commands_first = !self.commands_first;
        let first = if self.commands_first { self.poll_commands(cx) } else { self.poll_stream(cx) };
        if first.is_ready() {
            return first;
        }
        let second = if self.commands_first { self.poll_stream(cx) } else { self.poll_commands(cx) };
        if second.is_ready() {
            return second;
        }
        if let Some(dial) = &mut self.dialing
            && let Poll::Ready(r) = dial.as_mut().poll(cx)
        {
            self.dialing = None;
            return Poll::Ready(Event::Dialled(r));
        }
        if self.wakes.is_some() && self.sleep.as_mut().poll(cx).is_ready() {
            self.wakes = None;
            return Poll::Ready(Event::Time);
        }
        Poll::Pending
    }

    fn poll_commands(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        if self.orphan { Poll::Pending } else { self.commands.poll_recv(cx).map(Event::Command) }
    }

    fn poll_stream(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        if let Some((n, open)) = &mut self.opening
            && let Poll::Ready(r) = open.as_mut().poll(cx)
        {
            let n = *n;
            self.opening = None;
            return Poll::Ready(Event::Opened(n, r.map(Response::into_inner)));
        }
        if let Some((n, stream)) = &mut self.stream
            && let Poll::Ready(r) = Pin::new(stream).poll_next(cx)
        {
            let frame = match r {
                Some(Ok(frame)) => Ok(frame),
                Some(Err(status)) => Err(Some(status)),
                None => Err(None),
            };
            return Poll::Ready(Event::Frame(*n, frame));
        }
        Poll::Pending
    }

    fn deal(&mut self, event: Event) {
        let now = Instant::now();
        match event {
            Event::Command(Some(Command::Claim(want))) => self.machine.handle(now, session::In::Claim(want)),
            Event::Command(Some(Command::Release(expect, release))) => {
                self.machine.handle(now, session::In::Release { expect, release });
            }
            Event::Command(Some(Command::Connect(wish))) => self.connect_lane(wish),
            Event::Command(Some(Command::Close)) => {
                self.closing = true;
                self.machine.handle(now, session::In::Close);
            }
            Event::Command(None) => {
                self.orphan = true;
                self.machine.handle(now, session::In::Close);
            }
            Event::Dialled(Ok((line, welcome))) => {
                let peer = welcome.peer.clone();
                self.last_failure = None;
                self.dialled = Some((line, Arc::new(welcome)));
                self.machine.handle(now, session::In::Welcomed(peer));
            }
            Event::Dialled(Err(error)) => {
                self.dial_failed(&error);
                self.machine.handle(now, session::In::DialFailed(error));
            }
            Event::Opened(n, Ok(stream)) => self.stream = Some((n, stream)),
            Event::Opened(n, Err(status)) => self.broke(now, n, Some(&said(&status))),
            Event::Frame(n, Ok(frame)) => match self.check(frame) {
                Ok(frame) => self.machine.handle(now, session::In::Frame(n, frame)),
                Err(what) => self.broke(now, n, Some(&format!("rubbish from the peer: {what}"))),
            },
            Event::Frame(n, Err(status)) => self.broke(now, n, status.as_ref().map(said).as_deref()),
            Event::Time => {
                self.ticked = now;
                if let Some((n, at)) = self.broken
                    && at <= now
                {
                    self.broken = None;
                    self.machine.handle(now, session::In::Broken(n));
                }
                self.machine.tick(now);
            }
        }
    }

    fn check(&self, frame: proto::ServerFrame) -> Result<ServerFrame, String> {
        let frame = ServerFrame::try_from(frame).map_err(|e| e.to_string())?;
        if let Some(ServerBody::Granted { slot, .. }) = &frame.body
            && let Some((_, welcome)) = &self.current
            && *slot >= welcome.fence_slots
        {
            return Err(format!("granted.slot: {slot}, which is not below fence_slots, {}", welcome.fence_slots));
        }
        Ok(frame)
    }

    /// A stream is of no more use. The machine hears of it at once, unless it happens again and again: a peer that
    /// answers Hello and then refuses or drops every session must not be hammered.
    fn broke(&mut self, now: Instant, n: u64, why: Option<&str>) {
        self.stream = None;
        self.frames = None;
        let lived = now.saturating_duration_since(self.since);
        self.short_lived = if lived < SHORT_LIVED { self.short_lived + 1 } else { 0 };
        let wait = if self.short_lived < 2 {
            self.patience.reset();
            Duration::ZERO
        } else {
            self.patience.next(random())
        };
        if self.short_lived <= 2 {
            let peer = self.machine.peer();
            tracing::info!(
                peer = %self.addr, engine = peer.map(|p| p.engine.as_str()), incarnation = ?peer.map(|p| p.incarnation),
                why = why.unwrap_or("the peer ended it"), "session broke"
            );
        }
        if wait.is_zero() {
            self.machine.handle(now, session::In::Broken(n));
        } else {
            self.broken = Some((n, now + wait));
        }
    }

    fn dial_failed(&mut self, error: &HelloError) {
        // One line for each new failure, however often it is tried.
        let text = error.to_string();
        if self.last_failure.as_deref() != Some(&text) {
            tracing::warn!(peer = %self.addr, %error, "dial failed");
            self.last_failure = Some(text);
        }
    }

    fn carry_out(&mut self) {
        while let Some(out) = self.machine.poll() {
            match out {
                Out::Dial => {
                    let (dialer, me) = (self.dialer.clone(), self.me.clone());
                    self.dialing = Some(Box::pin(async move { dialer.hello(&me).await }));
                }
                Out::Open(n) => self.open(n),
                Out::Send(frame) => {
                    if let Some(frames) = &self.frames {
                        // It fails when the stream broke, which its end tells.
                        let _ = frames.send(frame.into());
                    }
                }
                Out::HangUp => self.hang_up(),
                Out::Peer(_) => {
                    if let Some((_, welcome)) = &self.dialled {
                        (self.sink)(rail::In::Peer(self.addr.clone(), welcome.clone()));
                    }
                }
                Out::Granted { claim, slot, nonce } => {
                    (self.sink)(rail::In::Granted(claim, Grant { slot, nonce }));
                }
                Out::Lost { claim, cause } => (self.sink)(rail::In::Lost(claim, cause)),
                Out::Health(health) => self.log(health),
                Out::Expired => {
                    // Whoever let go of the handle knows already, and may have begun anew.
                    if !self.orphan {
                        (self.sink)(rail::In::Dropped(self.addr.clone()));
                    }
                    self.over |= self.orphan || self.closing;
                }
            }
        }
        // A dial that only looked who is there: the stream goes on as it is.
        self.dialled = None;
    }

    fn open(&mut self, n: u64) {
        self.stream = None;
        self.broken = None;
        self.since = Instant::now();
        self.current = self.dialled.take();
        let Some((line, _)) = &self.current else {
            self.broken = Some((n, self.since));
            return;
        };
        let (tx, rx) = mpsc::unbounded_channel();
        self.frames = Some(tx);
        let mut ferry = line.ferry();
        let open = async move { ferry.session(UnboundedReceiverStream::new(rx)).await };
        self.opening = Some((n, Box::pin(open)));
    }

    fn hang_up(&mut self) {
        self.opening = None;
        self.stream = None;
        self.frames = None;
        self.broken = None;
        self.current = None;
    }

    fn connect_lane(&mut self, wish: LaneWish) {
        let (incarnation, need) = (wish.expect, wish.need);
        let lane = match &self.current {
            Some((line, welcome)) if welcome.peer.incarnation == incarnation => Ok((line.clone(), welcome.clone())),
            // The session finds out what became of the peer; the pull may ask again.
            _ => Err(Cause::Unreachable),
        };
        match lane {
            Ok((line, welcome)) => {
                let call = LaneCall {
                    peer: self.addr.clone(),
                    me: self.me.clone(),
                    line,
                    welcome,
                    connector: self.connector.clone(),
                    timeout: self.config.session.hello_timeout,
                    skipped: self.skipped.clone(),
                };
                let sink = self.sink.clone();
                // On its own: a lane that takes long to connect must not delay heartbeats and claims.
                tokio::spawn(async move { sink(call.run(wish).await) });
            }
            Err(cause) => {
                (self.sink)(rail::In::Lane { peer: self.addr.clone(), incarnation, need, lane: Err(cause) });
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
