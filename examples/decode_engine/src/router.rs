//! The router: sends a prompt to a prefill engine, then to a decode engine with the returned offer.
//!
//! With `--overlap` it sends the prompt to both at the same time, if both can do that. The decode engine then loads the KV while
//! it is computed, and computes what it cannot load.
//!
//! It owns no request and checks no prompt; the decode engine does. A prefill engine that does not answer only costs time:
//! the router tries the next one, and without any the decode engine computes the prompt itself.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use axum::{
    Json, Router,
    body::Body,
    extract::{State, rejection::JsonRejection},
    http::header,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures_util::StreamExt as _;
use kvferry::Token;
use parking_lot::Mutex;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use tokio::net::TcpListener;

use crate::{
    api::{Answer, Ask, Identity, Problem, Transfer},
    http::refuse,
    serve::{Ready, follow_parent},
};

/// Flags of `router`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Listening address `HOST:PORT`. Port 0 selects a free port.
    #[arg(long, default_value = "127.0.0.1:0")]
    pub listen: String,
    /// `HOST:PORT` of each prefill engine.
    #[arg(long, value_delimiter = ',')]
    pub prefill: Vec<String>,
    /// `HOST:PORT` of each decode engine.
    #[arg(long, value_delimiter = ',', required = true)]
    pub decode: Vec<String>,
    /// Time limit for a prefill engine, in seconds.
    #[arg(long, default_value_t = 30.0)]
    pub prefill_timeout: f64,
    /// Send each prompt to both engines at the same time.
    #[arg(long)]
    pub overlap: bool,
    /// End when the parent process does.
    #[arg(long, hide = true)]
    pub exit_with_parent: bool,
}

/// The router skips an engine that did not answer for this time, which is shorter than a restart and longer than a burst.
/// The time doubles with each further failure.
const REST: Duration = Duration::from_millis(200);
/// Longest time for which the router skips an engine.
const LONGEST_REST: Duration = Duration::from_secs(10);
/// Time limit for an engine's identity, which it can give at once.
const ASK: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    prefill: &'static str,
}

struct Peer {
    addr: String,
    /// Its description of itself; `None`: it was not asked since it failed.
    identity: Mutex<Option<Identity>>,
    /// The start and the length of the current rest.
    resting: Mutex<Option<(Instant, Duration)>>,
}

impl Peer {
    fn new(addr: &str) -> Self {
        Self { addr: addr.to_owned(), identity: Mutex::new(None), resting: Mutex::new(None) }
    }

    fn url(&self) -> String {
        format!("http://{}/v1/completions", self.addr)
    }

    /// Its description of itself. An engine that does not know this path does not support overlap.
    async fn identity(&self, http: &reqwest::Client) -> Identity {
        if let Some(known) = self.identity.lock().clone() {
            return known;
        }
        let Ok(r) = http.get(format!("http://{}/kvferry", self.addr)).timeout(ASK).send().await else {
            return Identity::default();
        };
        let said: Identity = r.json().await.unwrap_or_default();
        *self.identity.lock() = Some(said.clone());
        said
    }

    /// It failed: it may be another process by now.
    fn forget(&self) {
        *self.identity.lock() = None;
    }

    fn rests(&self) -> bool {
        self.resting.lock().is_some_and(|(at, long)| at.elapsed() < long)
    }

    fn rest(&self) {
        self.forget();
        let mut resting = self.resting.lock();
        // Requests that failed at the same time count once.
        if resting.is_some_and(|(at, long)| at.elapsed() < long) {
            return;
        }
        let long = resting.map_or(REST, |(_, long)| (long * 2).min(LONGEST_REST));
        *resting = Some((Instant::now(), long));
    }

    fn answered(&self) {
        *self.resting.lock() = None;
    }
}

struct Engines {
    http: reqwest::Client,
    prefill: Vec<Peer>,
    decode: Vec<Peer>,
    next: AtomicUsize,
    overlap: bool,
    prefill_timeout: Duration,
    requests: Family<Labels, Counter>,
    retries: Counter,
    registry: Registry,
}

/// Routes requests until the process ends.
pub async fn run(args: Args) -> Result<()> {
    if args.exit_with_parent {
        follow_parent()?;
    }
    let peers = |list: &[String]| list.iter().map(|a| Peer::new(a)).collect();
    let (requests, retries, mut registry) =
        (Family::<Labels, Counter>::default(), Counter::default(), Registry::default());
    for prefill in ["remote", "overlap", "local"] {
        requests.get_or_create(&Labels { prefill }).inc_by(0);
    }
    registry.register("router_requests", "Requests, by the place of their prefill", requests.clone());
    registry.register("router_retries", "Requests to engines that did not answer", retries.clone());
    let engines = Arc::new(Engines {
        http: reqwest::Client::builder().no_proxy().build()?,
        prefill: peers(&args.prefill),
        decode: peers(&args.decode),
        next: AtomicUsize::new(0),
        overlap: args.overlap,
        prefill_timeout: Duration::try_from_secs_f64(args.prefill_timeout).context("--prefill-timeout")?,
        requests,
        retries,
        registry,
    });
    let routes = Router::new()
        .route("/v1/completions", post(complete))
        .route("/metrics", get(metrics))
        .route("/health", get(|| async { "ok" }))
        .with_state(engines);
    let listener =
        TcpListener::bind(&args.listen).await.with_context(|| format!("cannot listen on {}", args.listen))?;
    Ready { listen: listener.local_addr()?.to_string(), kv: String::new(), pid: std::process::id() }.say()?;
    Ok(axum::serve(listener, routes).await?)
}

async fn complete(State(engines): State<Arc<Engines>>, ask: std::result::Result<Json<Ask>, JsonRejection>) -> Response {
    let Json(mut ask) = match ask {
        Ok(ask) => ask,
        Err(e) => return refuse(Problem::new(e.status().as_u16(), "invalid_request_error", e.body_text())),
    };
    let turn = engines.next.fetch_add(1, Ordering::Relaxed);
    if let Some((peer, transfer)) = engines.transfer(turn).await {
        engines.requests.get_or_create(&Labels { prefill: "overlap" }).inc();
        let prefill =
            Ask { kv_transfer_params: Some(Transfer { do_remote_decode: true, ..transfer.clone() }), ..ask.clone() };
        let computing = {
            let engines = engines.clone();
            AbortOnDrop(tokio::spawn(async move { drop(engines.compute(peer, &prefill).await) }))
        };
        ask.kv_transfer_params = Some(Transfer { do_remote_prefill: true, ..transfer });
        let (parts, body) = engines.decode(&ask, turn).await.into_parts();
        // Without its reader the prompt need not be computed.
        let body = body.into_data_stream().map(move |piece| {
            let _until_the_end = &computing;
            piece
        });
        return Response::from_parts(parts, Body::from_stream(body));
    }
    ask.kv_transfer_params = engines.prefill(&ask, turn).await;
    let prefill = if ask.kv_transfer_params.is_some() { "remote" } else { "local" };
    engines.requests.get_or_create(&Labels { prefill }).inc();
    engines.decode(&ask, turn).await
}

/// The result of a prompt at a prefill engine.
enum Computed {
    Yes(Option<Box<Transfer>>),
    /// It refused the prompt.
    Refused,
    /// It did not answer.
    Failed,
}

/// A task that is aborted when nobody waits for it.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Engines {
    /// The prefill engines that do not rest, beginning with the one whose turn it is.
    fn awake(&self, turn: usize) -> impl Iterator<Item = usize> {
        let n = self.prefill.len();
        (0..n).map(move |i| (turn + i) % n).filter(|p| !self.prefill[*p].rests())
    }

    /// A new transfer, and its prefill engine. `None`: this prompt goes to one engine after the other.
    async fn transfer(&self, turn: usize) -> Option<(usize, Transfer)> {
        let peer = self.awake(turn).next().filter(|_| self.overlap)?;
        let source = self.prefill[peer].identity(&self.http).await;
        let decode = self.decode[turn % self.decode.len()].identity(&self.http).await;
        if !(source.overlap && decode.overlap && source.source.is_some()) {
            return None;
        }
        // As hard to guess as an offer's own token.
        let transfer_id = Some(Token::random().into());
        Some((peer, Transfer { transfer_id, source: source.source, ..Transfer::default() }))
    }

    /// Sends the prompt to a prefill engine. `None` if none computed it.
    async fn prefill(&self, ask: &Ask, turn: usize) -> Option<Transfer> {
        let transfer = Transfer { do_remote_decode: true, ..Transfer::default() };
        let ask = Ask { kv_transfer_params: Some(transfer), ..ask.clone() };
        for peer in self.awake(turn) {
            match self.compute(peer, &ask).await {
                Computed::Yes(transfer) => return transfer.map(|t| *t),
                Computed::Refused => return None,
                Computed::Failed => {}
            }
        }
        None
    }

    /// Lets a prefill engine compute the prompt.
    async fn compute(&self, peer: usize, ask: &Ask) -> Computed {
        let peer = &self.prefill[peer];
        let ask = Ask { max_tokens: 1, stream: false, ..ask.clone() };
        let sent = self.http.post(peer.url()).timeout(self.prefill_timeout).json(&ask).send().await;
        let answer = match sent {
            Ok(r) if r.status().is_success() => r.json::<Answer>().await.map_err(|e| e.to_string()),
            // The decode engine will refuse the prompt too, and tell the client. Or the prefill engine was restarted.
            Ok(r) if r.status().is_client_error() => {
                peer.forget();
                return Computed::Refused;
            }
            Ok(r) => Err(r.status().to_string()),
            Err(e) => Err(e.to_string()),
        };
        match answer {
            Ok(a) => {
                peer.answered();
                Computed::Yes(a.kv_transfer_params.map(Box::new))
            }
            Err(reason) => {
                tracing::warn!(peer = %peer.addr, "a prefill engine did not answer: {reason}");
                self.retries.inc();
                peer.rest();
                Computed::Failed
            }
        }
    }

    /// Sends the prompt to a decode engine, and streams the answer through.
    async fn decode(&self, ask: &Ask, turn: usize) -> Response {
        let mut reason = String::from("there is no decode engine");
        for i in 0..self.decode.len() {
            let peer = &self.decode[(turn + i) % self.decode.len()];
            match self.http.post(peer.url()).json(ask).send().await {
                Ok(r) if r.status().is_server_error() => {
                    let status = r.status();
                    let body = r.bytes().await.unwrap_or_default();
                    let problem = serde_json::from_slice::<Problem>(&body).unwrap_or_default();
                    // The client gets an error of its request. For an error of the engine, another one is tried.
                    if problem.error.kind != "engine_error" {
                        return (status, [(header::CONTENT_TYPE, "application/json")], body).into_response();
                    }
                    tracing::warn!(peer = %peer.addr, "a decode engine failed: {}", problem.error.message);
                    self.retries.inc();
                    peer.forget();
                    reason = problem.error.message;
                }
                Ok(r) => {
                    let status = r.status();
                    let kind = r.headers().get(header::CONTENT_TYPE).cloned();
                    let mut response = Response::new(Body::from_stream(r.bytes_stream()));
                    *response.status_mut() = status;
                    if let Some(kind) = kind {
                        response.headers_mut().insert(header::CONTENT_TYPE, kind);
                    }
                    return response;
                }
                Err(e) => {
                    tracing::warn!(peer = %peer.addr, "a decode engine did not answer: {e}");
                    self.retries.inc();
                    peer.forget();
                    reason = e.to_string();
                }
            }
        }
        refuse(Problem::new(502, "no_engine", format!("no decode engine answers: {reason}")))
    }
}

async fn metrics(State(engines): State<Arc<Engines>>) -> Response {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &engines.registry) {
        Ok(()) => text.into_response(),
        Err(e) => refuse(Problem::new(500, "router_error", e.to_string())),
    }
}
