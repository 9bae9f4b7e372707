//! What a producer serves: Ferry, the standard health and reflection services, and, for `kvferry serve`, Bench.
//!
//! Owns the listening socket, its connections and the sessions' streams. It decides nothing about offers: the producer is
//! asked through [`Desk`]. A peer that breaks a bound, sends rubbish, falls silent or does not read loses its own session,
//! with a text that says why (promise 7).

use std::{
    fmt,
    net::{SocketAddr, TcpListener},
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

use tokio::{runtime::Handle, sync::watch};
use tonic::{Code, Request, Status, service::InterceptorLayer};
use tonic_health::ServingStatus;

use super::{
    DESCRIPTORS,
    guard::{ConnInfo, Guard, Incoming, lock},
    outbox::Outbox,
    proto::{bench_server::BenchServer, ferry_server::FerryServer},
    service::{BenchService, FerryService, Hub},
    ticket::LaneTicket,
    tls,
};
use crate::{
    block::{Incarnation, OfferId},
    config::Config,
    error::StartError,
    lane::{LaneKind, verbs::VerbsRequest},
    model::Mismatch,
    offer::Offer,
    protocol::{
        frame::{ClientFrame, PeerId},
        hello::{Hello, Welcome},
    },
};

/// A session, as the desk numbers them: never used twice in a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u64);

/// Why a producer turns something down; the text goes to the peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// It was meant for another process life of this rank. FAILED_PRECONDITION.
    #[error("this rank is incarnation {here}, not {expected}: it has restarted; say Hello again")]
    OtherIncarnation {
        /// This rank's.
        here: Incarnation,
        /// The one that was asked for.
        expected: Incarnation,
    },
    /// Something that must come before is missing, such as a session. FAILED_PRECONDITION.
    #[error("{0}")]
    Precondition(String),
    /// Not now, but soon: ask again. ABORTED.
    #[error("{0}")]
    NotYet(String),
    /// A limit is reached. RESOURCE_EXHAUSTED.
    #[error("too many {what}: the limit here is {limit}")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// Not served here. UNIMPLEMENTED.
    #[error("{what} is not served here")]
    Unsupported {
        /// What was asked for.
        what: String,
    },
    /// The producer is shutting down. UNAVAILABLE.
    #[error("this producer is shutting down")]
    Stopping,
}

impl Refusal {
    /// The status that the peer gets.
    pub(crate) fn status(&self) -> Status {
        let code = match self {
            Self::OtherIncarnation { .. } | Self::Precondition(_) => Code::FailedPrecondition,
            Self::NotYet(_) => Code::Aborted,
            Self::Limit { .. } => Code::ResourceExhausted,
            Self::Unsupported { .. } => Code::Unimplemented,
            Self::Stopping => Code::Unavailable,
        };
        Status::new(code, self.to_string())
    }
}

/// What the control server asks of a producer. Called on tokio threads: never blocks for long.
pub trait Desk: Send + Sync + 'static {
    /// Somebody says Hello.
    fn hello(&self, hello: &Hello) -> Result<Welcome, Mismatch>;
    /// A session opens; frames for it go into `outbox`. `Opened` is sent by the server, before anything in the outbox.
    fn open(&self, from: &PeerId, expect: Incarnation, outbox: Outbox) -> Result<SessionId, Refusal>;
    /// A frame of an open session; never `Open`.
    fn frame(&self, session: SessionId, from: &PeerId, frame: ClientFrame);
    /// The session is over. Comes once for each that was opened; nothing of it comes after.
    fn closed(&self, session: SessionId, from: &PeerId);
    /// A lane is wanted.
    fn connect_lane(&self, from: &PeerId, expect: Incarnation, kind: LaneKind) -> Result<LaneTicket, Refusal>;
    /// A verbs lane is wanted, between these ends of the consumer and what reaches them here. May block for milliseconds.
    fn connect_verbs(&self, from: &PeerId, expect: Incarnation, ends: &VerbsRequest) -> Result<LaneTicket, Refusal> {
        let _ = (from, expect, ends);
        Err(Refusal::Unsupported { what: format!("lane {}", LaneKind::Verbs) })
    }
    /// An offer is let go without a session; `from` `None`: by whoever it may concern. `true`: it was freed by this.
    fn release(&self, from: Option<PeerId>, offer: OfferId, expect: Option<Incarnation>) -> Result<bool, Refusal>;
}

/// What the bench service asks: fresh offers of a pattern pool.
pub trait BenchDesk: Send + Sync + 'static {
    /// Offers `blocks` blocks (0: all), scattered over the pool or in its order, of `block_bytes` (0: as configured).
    /// Returns the offer and the pattern's seed.
    fn make_offer(&self, blocks: u32, scattered: bool, block_bytes: u32) -> Result<(Offer, u64), String>;
}

/// How long sessions have to end by themselves in a shutdown, before their connections are cut.
const GRACE: Duration = Duration::from_millis(500);
/// Streams of one connection at a time. A consumer needs a session and a few calls.
const STREAMS: u32 = 64;
/// HTTP/2 windows. What arrives here is small; a small window bounds what a bad peer can make this side hold.
const STREAM_WINDOW: u32 = 64 << 10;
const CONNECTION_WINDOW: u32 = 128 << 10;

/// A running control server. Dropping it shuts it down.
pub struct Server {
    hub: Arc<Hub>,
    stop: watch::Sender<bool>,
    serving: watch::Sender<bool>,
    addr: SocketAddr,
    stopped: Arc<Stopped>,
}

/// Whether everything of the server is gone; told also when its runtime is dropped under it.
struct Stopped {
    seen: watch::Sender<bool>,
    flag: Mutex<bool>,
    changed: Condvar,
}

impl Drop for Done {
    fn drop(&mut self) {
        *lock(&self.0.flag) = true;
        self.0.changed.notify_all();
        self.0.seen.send_replace(true);
    }
}

struct Done(Arc<Stopped>);

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("addr", &self.addr).finish_non_exhaustive()
    }
}

impl Server {
    /// Serves on `listener`, on the runtime of `handle`. The certificates, limits and times are those of `config`.
    pub fn start(
        handle: &Handle,
        listener: TcpListener,
        desk: Arc<dyn Desk>,
        config: &Config,
        bench: Option<Arc<dyn BenchDesk>>,
    ) -> Result<Self, StartError> {
        let os = |what| move |source| StartError::Os { what, source };
        let addr = listener.local_addr().map_err(os("cannot learn the listening address"))?;
        listener.set_nonblocking(true).map_err(os("cannot make the listening socket non-blocking"))?;
        let listener = {
            let _in_runtime = handle.enter();
            tokio::net::TcpListener::from_std(listener).map_err(os("cannot register the listening socket"))?
        };
        // A consumer that dials anew holds two connections for a moment; health and reflection need a few more.
        let guard = Guard::new(config.limits.sessions.saturating_mul(2).saturating_add(64));
        let hub = Hub::new(desk, guard.clone(), config);

        let mut builder = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(config.session.idle_heartbeat))
            .http2_keepalive_timeout(Some(config.session.down))
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_concurrent_streams(STREAMS)
            .http2_max_header_list_size(16 << 10);
        if let Some(t) = &config.tls {
            let with_tls = tls::server(t, config.session.hello_timeout)?;
            builder = builder.tls_config(with_tls).map_err(|e| StartError::Tls(tls::why(&e)))?;
        }
        let (reporter, health) = tonic_health::server::health_reporter();
        let frame = config.limits.frame_bytes;
        let ferry = FerryServer::new(FerryService(hub.clone()))
            .max_decoding_message_size(frame)
            .max_encoding_message_size(frame);
        let bench = bench.map(|b| {
            BenchServer::new(BenchService(b)).max_decoding_message_size(frame).max_encoding_message_size(frame)
        });
        let reflection = || {
            let r = tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                .with_service_name(FERRY)
                .with_service_name(HEALTH);
            if bench.is_some() { r.with_service_name(BENCH) } else { r }
        };
        let broken =
            |e: tonic_reflection::server::Error| StartError::Config { field: "reflection", why: e.to_string() };
        let v1 = reflection().build_v1().map_err(broken)?;
        let v1alpha = reflection().build_v1alpha().map_err(broken)?;
        let router = builder
            .layer(InterceptorLayer::new(note_call as fn(Request<()>) -> Result<Request<()>, Status>))
            .add_service(ferry)
            .add_service(health)
            .add_service(v1)
            .add_service(v1alpha)
            .add_optional_service(bench);

        let stopped =
            Arc::new(Stopped { seen: watch::Sender::new(false), flag: Mutex::new(false), changed: Condvar::new() });
        let (stop, mut stopping) = watch::channel(false);
        let (serving, mut health) = watch::channel(true);
        let done = Done(stopped.clone());
        let inner = hub.clone();
        let incoming = Incoming { listener, guard: guard.clone(), pause: None };
        let mut signal = stop.subscribe();
        handle.spawn(async move {
            let _done = done;
            report(&reporter, true).await;
            let serve = router.serve_with_incoming_shutdown(incoming, async move {
                // An error means that the server was dropped, which is a stop too.
                let _ = signal.wait_for(|s| *s).await;
            });
            tokio::pin!(serve);
            let mut sweep = tokio::time::interval(inner.sweep_every());
            sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            let mut cut = std::pin::pin!(None);
            loop {
                tokio::select! {
                    served = &mut serve => {
                        if let Err(e) = served {
                            tracing::error!(%addr, error = tls::why(&e), "the control server failed");
                        }
                        break;
                    }
                    _ = sweep.tick() => inner.sweep(Instant::now()),
                    Ok(()) = health.changed() => {
                        let good = *health.borrow_and_update();
                        report(&reporter, good).await;
                    }
                    r = stopping.changed(), if cut.is_none() => {
                        if r.is_err() || *stopping.borrow() {
                            report(&reporter, false).await;
                            inner.stop();
                            cut.set(Some(tokio::time::sleep(GRACE)));
                        }
                    }
                    Some(()) = async { match cut.as_mut().as_pin_mut() { Some(c) => { c.await; Some(()) } None => None } },
                        if cut.is_some() => {
                        guard.kill_all();
                        cut.set(Some(tokio::time::sleep(GRACE)));
                    }
                }
            }
        });
        tracing::info!(%addr, tls = config.tls.is_some(), "control plane listens");
        Ok(Self { hub, stop, serving, addr, stopped })
    }

    /// The address that it listens on.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Turns the health service green or red, for `""` and for `kvferry.v1.Ferry`.
    pub fn set_serving(&self, good: bool) {
        self.serving.send_replace(good);
    }

    /// Session streams that are on, those included that did not say Open yet.
    pub fn sessions(&self) -> usize {
        self.hub.sessions()
    }

    /// Connections that are on.
    pub fn connections(&self) -> usize {
        self.hub.guard().count()
    }

    /// Begins to shut down, and returns at once: the port closes, sessions end with UNAVAILABLE, and what is left after
    /// half a second is cut off.
    pub fn shutdown(&self) {
        self.stop.send_replace(true);
    }

    /// Waits until a shutdown is complete.
    pub async fn stopped(&self) {
        let _ = self.stopped.seen.subscribe().wait_for(|s| *s).await;
    }

    /// Blocks until a shutdown is complete, at most for `limit`; `false`: it is not. Not for tokio threads.
    pub fn wait_stopped(&self, limit: Duration) -> bool {
        let flag = lock(&self.stopped.flag);
        self.stopped.changed.wait_timeout_while(flag, limit, |f| !*f).map_or_else(|e| *e.into_inner().0, |(f, _)| *f)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown();
    }
}

const FERRY: &str = "kvferry.v1.Ferry";
const BENCH: &str = "kvferry.v1.Bench";
const HEALTH: &str = "grpc.health.v1.Health";

async fn report(reporter: &tonic_health::server::HealthReporter, good: bool) {
    let status = if good { ServingStatus::Serving } else { ServingStatus::NotServing };
    reporter.set_service_status("", status).await;
    reporter.set_service_status(FERRY, status).await;
}

/// A call was made on the connection: it is no half-open one.
fn note_call(request: Request<()>) -> Result<Request<()>, Status> {
    if let Some(ConnInfo(conn)) = request.extensions().get() {
        conn.asked();
    }
    Ok(request)
}
