//! The HTTP bodies: OpenAI-style completions, with additions for disaggregated serving.
//!
//! A router calls a prefill engine with `kv_transfer_params: {"do_remote_decode": true}` and `max_tokens: 1`, and passes the
//! `kv_transfer_params` of the answer on to a decode engine: `{"do_remote_prefill": true, "offer": {…}}`.
//!
//! With overlap it calls both at the same time, and adds to the parameters of both a `transfer_id` and the prefill engine's
//! [`Source`], which it got from `GET /kvferry`. Each engine makes the offer's name from that and from the prompt.

use kvferry::{EngineId, Fingerprints, Incarnation, Offer, OfferId, OfferRank, Token, scheduler::tokens::Parts};
use serde::{Deserialize, Serialize};

use crate::blocks::Key;

/// What the KV of a prompt is computed from. KV of another prompt would give wrong answers, even to other requests through the
/// prefix cache.
pub fn fingerprints(prompt: &[u32]) -> Fingerprints {
    [("prompt".to_owned(), Key::default().then(prompt).to_string())].into()
}

/// `POST /v1/completions`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Ask {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    pub prompt: Prompt,
    #[serde(default = "sixteen", deserialize_with = "sixteen_if_null")]
    pub max_tokens: usize,
    #[serde(default)]
    pub stream: bool,
    /// Only greedy sampling is supported: 0, or left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// These four are supported only with their default values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop: Option<serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<u32>,
    #[serde(default)]
    pub echo: bool,
    /// Continue after the token that ends an answer.
    #[serde(default)]
    pub ignore_eos: bool,
    /// The name of the request, for logs and offers. Without it, the engine makes one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_transfer_params: Option<Transfer>,
}

fn sixteen() -> usize {
    16
}

fn sixteen_if_null<'de, D: serde::Deserializer<'de>>(d: D) -> Result<usize, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_else(sixteen))
}

impl Ask {
    /// The first unsupported option that would change the answer.
    pub fn unsupported(&self) -> Option<&'static str> {
        let stop =
            self.stop.as_ref().is_some_and(|s| s.as_str().is_none_or(|s| !s.is_empty()) && *s != serde_json::json!([]));
        match self {
            a if a.temperature.is_some_and(|t| t != 0.0) => {
                Some("only greedy sampling is supported: set temperature to 0 or leave it out")
            }
            a if a.n.is_some_and(|n| n != 1) => {
                Some("only one answer per prompt is supported: set n to 1 or leave it out")
            }
            _ if stop => Some("stop is not supported: leave it out"),
            a if a.logprobs.is_some() => Some("logprobs are not supported: leave them out"),
            a if a.echo => Some("echo is not supported: leave it out"),
            _ => None,
        }
    }
}

/// Text, or tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

impl Default for Prompt {
    fn default() -> Self {
        Self::Tokens(Vec::new())
    }
}

/// The transfer of the prompt's KV.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transfer {
    /// Offer the prompt's KV when it is complete.
    #[serde(default)]
    pub do_remote_decode: bool,
    /// Pull the prompt's KV: see `offer`.
    #[serde(default)]
    pub do_remote_prefill: bool,
    /// The offer to pull.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offer: Option<Offer>,
    /// The transfer's id, for an offer that grows while the prompt is computed. A secret, like the offer's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer_id: Option<String>,
    /// The prefill engine of `transfer_id`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
}

impl Transfer {
    /// The name of the offer that grows, if the router asks for one.
    pub fn growing(&self, prompt: &[u32]) -> Option<Offer> {
        Some(self.source.as_ref()?.name(self.transfer_id.as_ref()?, prompt))
    }
}

/// `GET /kvferry`: what a router needs to know about an engine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// It can begin a transfer before the prompt is computed.
    #[serde(default)]
    pub overlap: bool,
    /// The source of its offers, if it makes any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
}

/// A running prefill engine, as the names of its offers describe it. After a restart its source is another one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    pub engine: EngineId,
    pub incarnation: Incarnation,
    pub ranks: Vec<OfferRank>,
}

impl Source {
    /// The name of the offer of this transfer. Both engines make the same one.
    pub fn name(&self, transfer: &str, prompt: &[u32]) -> Offer {
        let (id, tokens) = (OfferId::of_transfer(transfer), prompt.len() as u64);
        let mut name = Offer::new(id, self.engine.clone(), self.incarnation, self.ranks.clone(), tokens);
        name.token = Token::of_transfer(transfer);
        name.fingerprints(fingerprints(prompt))
    }
}

/// An answer, or a piece of one.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Answer {
    pub id: String,
    pub object: String,
    pub model: String,
    pub choices: Vec<Choice>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_transfer_params: Option<Transfer>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub times: Option<Times>,
}

/// When an engine reached the stages of a request, in microseconds of CLOCK_MONOTONIC: comparable between the processes of a
/// host. 0: it did not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Times {
    /// The request was queued.
    pub queued: u64,
    /// It got its blocks.
    pub admitted: u64,
    /// The first chunk of its load arrived.
    pub first_loaded: u64,
    /// The last chunk of its load arrived.
    pub loaded: u64,
    /// The first step with a part of it ended.
    pub first_chunk: u64,
    /// The step ended that computed the rest of the prompt, and with it the first token.
    pub first_token: u64,
    /// The step ended that generated the last token.
    pub last_token: u64,
}

impl Times {
    /// The time now.
    pub fn now() -> u64 {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000
    }
}

/// The one choice.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Choice {
    pub index: u32,
    pub text: String,
    /// The tokens of the text, to compare answers.
    pub token_ids: Vec<u32>,
    /// `length` or `stop`, in the last piece.
    pub finish_reason: Option<String>,
}

/// Tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub total_tokens: u64,
    pub prompt_tokens_details: Sources,
}

/// The sources of the prompt's tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sources {
    /// Tokens that were not computed here: `local_cache + external`.
    pub cached_tokens: u64,
    pub computed: u64,
    pub local_cache: u64,
    pub external: u64,
    /// The part of `computed` that had been a hit or a load and was lost.
    pub recomputed: u64,
}

impl From<Parts> for Sources {
    fn from(p: Parts) -> Self {
        Self {
            cached_tokens: p.local_cache + p.external,
            computed: p.computed(),
            local_cache: p.local_cache,
            external: p.external,
            recomputed: p.recomputed(),
        }
    }
}

/// An error's body.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Problem {
    pub error: Detail,
}

/// The error, as text and as codes.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Detail {
    pub message: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub code: u16,
}

impl Problem {
    /// A problem with this HTTP status.
    pub fn new(code: u16, kind: &str, message: impl Into<String>) -> Self {
        Self { error: Detail { message: message.into(), kind: kind.into(), code } }
    }
}
