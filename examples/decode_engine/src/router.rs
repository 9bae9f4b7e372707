//! The router: sends a prompt to a prefill engine, then to a decode engine with the offer that came back.
//!
//! It owns no request: what it does not know is the decode engine's to find out. A prefill engine that does not answer
//! costs nothing but time: the next one is asked, and in the end the decode engine computes the prompt itself.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
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
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use tokio::net::TcpListener;

use crate::{
    api::{Answer, Ask, Problem, Transfer},
    http::refuse,
    serve::{Ready, follow_parent},
};

/// Flags of `router`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// `HOST:PORT` to listen on; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    pub listen: String,
    /// `HOST:PORT` of each prefill engine.
    #[arg(long, value_delimiter = ',')]
    pub prefill: Vec<String>,
    /// `HOST:PORT` of each decode engine.
    #[arg(long, value_delimiter = ',', required = true)]
    pub decode: Vec<String>,
    /// Seconds that a prefill engine may take.
    #[arg(long, default_value_t = 30.0)]
    pub prefill_timeout: f64,
    /// End when the parent process does.
    #[arg(long, hide = true)]
    pub exit_with_parent: bool,
}

/// An engine that did not answer is left alone for this long: shorter than a restart takes, longer than a burst. Twice as
/// long each time that it does not answer again,
const REST: Duration = Duration::from_millis(200);
/// but no longer than this.
const LONG_REST: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Way {
    prefill: &'static str,
}

struct Peer {
    url: String,
    /// Since when it rests, and how long.
    resting: Mutex<Option<(Instant, Duration)>>,
}

impl Peer {
    fn resting(&self) -> std::sync::MutexGuard<'_, Option<(Instant, Duration)>> {
        self.resting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rests(&self) -> bool {
        self.resting().is_some_and(|(at, long)| at.elapsed() < long)
    }

    fn rest(&self) {
        let mut resting = self.resting();
        // Those that were on their way together count once.
        if resting.is_some_and(|(at, long)| at.elapsed() < long) {
            return;
        }
        let long = resting.map_or(REST, |(_, long)| (long * 2).min(LONG_REST));
        *resting = Some((Instant::now(), long));
    }

    fn answered(&self) {
        *self.resting() = None;
    }
}

struct Desk {
    http: reqwest::Client,
    prefill: Vec<Peer>,
    decode: Vec<Peer>,
    next: AtomicUsize,
    prefill_timeout: Duration,
    requests: Family<Way, Counter>,
    retries: Counter,
    registry: Registry,
}

/// Routes until it is told to end.
pub async fn run(args: Args) -> Result<()> {
    if args.exit_with_parent {
        follow_parent()?;
    }
    let peers = |list: &[String]| {
        list.iter().map(|a| Peer { url: format!("http://{a}/v1/completions"), resting: Mutex::new(None) }).collect()
    };
    let (requests, retries, mut registry) =
        (Family::<Way, Counter>::default(), Counter::default(), Registry::default());
    for prefill in ["remote", "local"] {
        requests.get_or_create(&Way { prefill }).inc_by(0);
    }
    registry.register("router_requests", "Requests, by where their prompt was computed", requests.clone());
    registry.register("router_retries", "Engines that did not answer", retries.clone());
    let desk = Arc::new(Desk {
        http: reqwest::Client::builder().no_proxy().build()?,
        prefill: peers(&args.prefill),
        decode: peers(&args.decode),
        next: AtomicUsize::new(0),
        prefill_timeout: Duration::try_from_secs_f64(args.prefill_timeout).context("--prefill-timeout")?,
        requests,
        retries,
        registry,
    });
    let routes = Router::new()
        .route("/v1/completions", post(complete))
        .route("/metrics", get(metrics))
        .route("/health", get(|| async { "ok" }))
        .with_state(desk);
    let listener =
        TcpListener::bind(&args.listen).await.with_context(|| format!("cannot listen on {}", args.listen))?;
    Ready { listen: listener.local_addr()?.to_string(), kv: String::new(), pid: std::process::id() }.say()?;
    Ok(axum::serve(listener, routes).await?)
}

async fn complete(State(desk): State<Arc<Desk>>, ask: std::result::Result<Json<Ask>, JsonRejection>) -> Response {
    let Json(mut ask) = match ask {
        Ok(ask) => ask,
        Err(e) => return refuse(Problem::new(e.status().as_u16(), "invalid_request_error", e.body_text())),
    };
    let turn = desk.next.fetch_add(1, Ordering::Relaxed);
    ask.kv_transfer_params = desk.prefill(&ask, turn).await;
    let prefill = if ask.kv_transfer_params.is_some() { "remote" } else { "local" };
    desk.requests.get_or_create(&Way { prefill }).inc();
    desk.decode(&ask, turn).await
}

impl Desk {
    /// Has the prompt computed elsewhere. `None`: nobody did.
    async fn prefill(&self, ask: &Ask, turn: usize) -> Option<Transfer> {
        let ask = Ask {
            max_tokens: 1,
            stream: false,
            kv_transfer_params: Some(Transfer { do_remote_decode: true, ..Transfer::default() }),
            ..ask.clone()
        };
        for i in 0..self.prefill.len() {
            let peer = &self.prefill[(turn + i) % self.prefill.len()];
            if peer.rests() {
                continue;
            }
            let sent = self.http.post(&peer.url).timeout(self.prefill_timeout).json(&ask).send().await;
            let answer = match sent {
                Ok(r) if r.status().is_success() => r.json::<Answer>().await.map_err(|e| e.to_string()),
                // What it thinks of the prompt, the decode engine will say too.
                Ok(r) if r.status().is_client_error() => return None,
                Ok(r) => Err(r.status().to_string()),
                Err(e) => Err(e.to_string()),
            };
            match answer {
                Ok(a) => {
                    peer.answered();
                    return a.kv_transfer_params;
                }
                Err(why) => {
                    tracing::warn!(peer = %peer.url, "a prefill engine did not answer: {why}");
                    self.retries.inc();
                    peer.rest();
                }
            }
        }
        None
    }

    /// Has the answer generated, and passes it through as it comes.
    async fn decode(&self, ask: &Ask, turn: usize) -> Response {
        let mut why = String::from("there is no decode engine");
        for i in 0..self.decode.len() {
            let peer = &self.decode[(turn + i) % self.decode.len()];
            match self.http.post(&peer.url).json(ask).send().await {
                Ok(r) if r.status().is_server_error() => {
                    let status = r.status();
                    let body = r.bytes().await.unwrap_or_default();
                    let said = serde_json::from_slice::<Problem>(&body).unwrap_or_default();
                    // What became of the request is its client's to know; what became of the engine, ours.
                    if said.error.kind != "engine_error" {
                        return (status, [(header::CONTENT_TYPE, "application/json")], body).into_response();
                    }
                    tracing::warn!(peer = %peer.url, "a decode engine cannot: {}", said.error.message);
                    self.retries.inc();
                    why = said.error.message;
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
                    tracing::warn!(peer = %peer.url, "a decode engine did not answer: {e}");
                    self.retries.inc();
                    why = e.to_string();
                }
            }
        }
        refuse(Problem::new(502, "no_engine", format!("no decode engine answers: {why}")))
    }
}

async fn metrics(State(desk): State<Arc<Desk>>) -> Response {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &desk.registry) {
        Ok(()) => text.into_response(),
        Err(e) => refuse(Problem::new(500, "router_error", e.to_string())),
    }
}
