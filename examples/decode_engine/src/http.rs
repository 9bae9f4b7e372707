//! An engine's HTTP front. Translates; decides nothing.

use std::{
    collections::hash_map::RandomState,
    convert::Infallible,
    hash::BuildHasher as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use axum::{
    Json, Router,
    extract::{State, rejection::JsonRejection},
    http::{StatusCode, header},
    response::{
        IntoResponse, Response,
        sse::{self, Sse},
    },
    routing::{get, post},
};
use prometheus_client::registry::Registry;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::{
    api::{Answer, Ask, Choice, Identity, Problem, Prompt, Transfer, Usage, fingerprints},
    engine::{Handle, Status},
    request::{Event, Job, Refusal},
    text::Text,
};

/// The state that all handlers share.
pub struct Front {
    pub engine: Handle,
    pub text: Text,
    pub model: String,
    pub registry: Arc<Registry>,
    pub identity: Identity,
    asked: AtomicU64,
    /// Tells names of this process from those of others.
    salt: u64,
}

impl Front {
    pub fn new(engine: Handle, text: Text, model: String, registry: Arc<Registry>, identity: Identity) -> Self {
        let salt = RandomState::new().hash_one(std::process::id());
        Self { engine, text, model, registry, identity, asked: AtomicU64::new(1), salt }
    }
}

type Shared = State<Arc<Front>>;

/// The routes.
pub fn routes(front: Arc<Front>) -> Router {
    Router::new()
        .route("/v1/completions", post(complete))
        .route("/v1/status", get(status))
        .route("/kvferry", get(async |State(front): Shared| Json(front.identity.clone())))
        .route("/metrics", get(metrics))
        .route("/health", get(health))
        .with_state(front)
}

/// A problem as a response.
pub fn refuse(p: Problem) -> Response {
    let code = StatusCode::from_u16(p.error.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (code, Json(p)).into_response()
}

fn problem(r: &Refusal) -> Problem {
    match r {
        Refusal::Bad(reason) => Problem::new(400, "invalid_request_error", reason),
        // The request is sound, and may do better at the next try.
        Refusal::KvLost(reason) => Problem::new(503, "kv_load_failed", reason),
        Refusal::Engine(reason) => Problem::new(500, "engine_error", reason),
    }
}

async fn complete(State(front): Shared, ask: Result<Json<Ask>, JsonRejection>) -> Response {
    let bad = |reason: String| refuse(Problem::new(400, "invalid_request_error", reason));
    let Json(ask) = match ask {
        Ok(ask) => ask,
        Err(e) => return refuse(Problem::new(e.status().as_u16(), "invalid_request_error", e.body_text())),
    };
    if let Some(reason) = ask.unsupported() {
        return bad(reason.into());
    }
    if let Some(other) = ask.model.as_ref().filter(|m| **m != front.model) {
        let reason = format!("there is no model {other:?} here: this is {:?}", front.model);
        return refuse(Problem::new(404, "model_not_found", reason));
    }
    let prompt = match ask.prompt {
        Prompt::Tokens(t) => t,
        Prompt::Text(t) => match front.text.encode(&t) {
            Ok(t) => t,
            Err(e) => return bad(e.to_string()),
        },
    };
    let mut transfer = ask.kv_transfer_params.unwrap_or_default();
    if let Some(Err(e)) = transfer.offer.as_ref().map(|o| o.expect(&fingerprints(&prompt))) {
        tracing::warn!("an offer is not used: {e}");
        transfer.offer = None;
    }
    let growing = transfer.growing(&prompt).filter(|_| front.identity.overlap);
    let (produce, consume) = (transfer.do_remote_decode, transfer.do_remote_prefill);
    if produce && growing.is_some() && transfer.source != front.identity.source {
        let reason = "the transfer names another incarnation of this engine: read GET /kvferry again";
        return refuse(Problem::new(409, "other_incarnation", reason));
    }
    let number = front.asked.fetch_add(1, Ordering::Relaxed);
    let name = ask.request_id.unwrap_or_else(|| format!("cmpl-{:08x}-{number}", front.salt as u32));
    let (out, events) = unbounded_channel();
    let prompt_tokens = prompt.len() as u64;
    let job = Job {
        name: name.clone(),
        prompt,
        max_tokens: ask.max_tokens,
        ignore_eos: ask.ignore_eos,
        produce: produce && growing.is_none(),
        awaited: consume && growing.is_some(),
        offer: growing.clone().or(transfer.offer).filter(|_| consume),
        growing: growing.filter(|_| produce && !consume),
        out,
    };
    if !front.engine.submit(job) {
        return refuse(Problem::new(503, "engine_error", "the engine has ended"));
    }
    let answer = Answers { front, name, events, prompt_tokens, tokens: Vec::new(), said: 0 };
    if ask.stream { answer.stream().await } else { answer.whole().await }
}

/// The answer to one request, as it comes.
struct Answers {
    front: Arc<Front>,
    name: String,
    events: UnboundedReceiver<Event>,
    prompt_tokens: u64,
    tokens: Vec<u32>,
    /// Bytes of text that were given out.
    said: usize,
}

impl Answers {
    async fn next(&mut self) -> Event {
        let ended = || Event::Failed(Refusal::Engine("the engine has ended".into()));
        self.events.recv().await.unwrap_or_else(ended)
    }

    fn answer(&self, text: String, token_ids: Vec<u32>, finish: Option<&str>) -> Answer {
        let choice = Choice { index: 0, text, token_ids, finish_reason: finish.map(str::to_owned) };
        Answer {
            id: self.name.clone(),
            object: "text_completion".into(),
            model: self.front.model.clone(),
            choices: vec![choice],
            usage: None,
            kv_transfer_params: None,
            times: None,
        }
    }

    /// The last piece of an answer, with everything that is known at its end.
    fn last(&self, mut answer: Answer, end: &Event) -> Answer {
        if let Event::Done { parts, offer, times, .. } = end {
            answer.times = Some(*times);
            let completion_tokens = self.tokens.len() as u64;
            answer.usage = Some(Usage {
                prompt_tokens: self.prompt_tokens,
                completion_tokens,
                total_tokens: self.prompt_tokens + completion_tokens,
                prompt_tokens_details: (*parts).into(),
            });
            let transfer = |o: &kvferry::Offer| Transfer {
                do_remote_prefill: true,
                offer: Some(o.clone()),
                ..Transfer::default()
            };
            answer.kv_transfer_params = offer.as_deref().map(transfer);
        }
        answer
    }

    async fn whole(mut self) -> Response {
        loop {
            match self.next().await {
                Event::Token(t) => self.tokens.push(t),
                Event::Failed(reason) => return refuse(problem(&reason)),
                end @ Event::Done { stopped, .. } => {
                    let text = self.front.text.decode(&self.tokens).unwrap_or_default();
                    let finish = if stopped { "stop" } else { "length" };
                    let answer = self.answer(text, self.tokens.clone(), Some(finish));
                    return Json(self.last(answer, &end)).into_response();
                }
            }
        }
    }

    /// Server-sent events. Headers wait for the first word, so that a request that fails earlier gets its own HTTP status.
    async fn stream(mut self) -> Response {
        let first = self.next().await;
        if let Event::Failed(reason) = &first {
            return refuse(problem(reason));
        }
        let pieces = futures_util::stream::unfold((self, Some(first), false), |(mut a, first, over)| async move {
            if over {
                return None;
            }
            let event = match first {
                Some(e) => e,
                None => a.next().await,
            };
            let (text, over) = a.piece(event);
            Some((text, (a, None, over)))
        });
        let pieces = futures_util::StreamExt::flat_map(pieces, |texts| {
            let events = texts.into_iter().map(|t| Ok::<_, Infallible>(sse::Event::default().data(t)));
            futures_util::stream::iter(events)
        });
        Sse::new(pieces).into_response()
    }

    /// What to send for an event, and whether it was the last one.
    fn piece(&mut self, event: Event) -> (Vec<String>, bool) {
        let json = |a: &Answer| serde_json::to_string(a).unwrap_or_default();
        match event {
            Event::Token(t) => {
                self.tokens.push(t);
                let text = self.more(false);
                (vec![json(&self.answer(text, vec![t], None))], false)
            }
            end @ Event::Done { stopped, .. } => {
                let text = self.more(true);
                let answer = self.answer(text, Vec::new(), Some(if stopped { "stop" } else { "length" }));
                (vec![json(&self.last(answer, &end)), "[DONE]".into()], true)
            }
            Event::Failed(reason) => (vec![serde_json::to_string(&problem(&reason)).unwrap_or_default()], true),
        }
    }

    /// Text that was not given out yet. An incomplete character waits, unless this is the end.
    fn more(&mut self, end: bool) -> String {
        let text = self.front.text.decode(&self.tokens).unwrap_or_default();
        let whole = if end { &text[..] } else { text.trim_end_matches(char::REPLACEMENT_CHARACTER) };
        let new = whole.get(self.said..).unwrap_or_default().to_owned();
        self.said += new.len();
        new
    }
}

async fn status(State(front): Shared) -> Response {
    match front.engine.status().await {
        Some(s) => Json(s).into_response(),
        None => refuse(Problem::new(503, "engine_error", "the engine has ended")),
    }
}

async fn health(State(front): Shared) -> Response {
    match front.engine.status().await {
        Some(Status { wedged: 0, .. }) => "ok".into_response(),
        Some(s) => {
            let reason = format!("blocks of {} pulls are withheld: restart this process to get them back", s.wedged);
            refuse(Problem::new(503, "engine_error", reason))
        }
        None => refuse(Problem::new(503, "engine_error", "the engine has ended")),
    }
}

async fn metrics(State(front): Shared) -> Response {
    let registry = front.registry.clone();
    let encode = move || {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).map(|()| text)
    };
    // Between steps, so that a scrape adds up. The numbers of an engine that has ended do not change any more.
    let text = match front.engine.between_steps(encode.clone()).await {
        Some(text) => text,
        None => encode(),
    };
    match text {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(e) => refuse(Problem::new(500, "engine_error", e.to_string())),
    }
}
