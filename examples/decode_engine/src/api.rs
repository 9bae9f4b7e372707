//! The HTTP bodies: OpenAI-style completions, with what disaggregated serving adds to them.
//!
//! A router asks a prefill engine with `kv_transfer_params: {"do_remote_decode": true}` and `max_tokens: 1`, and passes the
//! `kv_transfer_params` of the answer on to a decode engine: `{"do_remote_prefill": true, "offer": {…}}`.

use kvferry::{Offer, scheduler::tokens::Parts};
use serde::{Deserialize, Serialize};

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
    /// Only greedy sampling is there: 0, or left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// These three as they are left out, or nothing: what they ask for is not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop: Option<serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<u32>,
    #[serde(default)]
    pub echo: bool,
    /// Go on past the token that ends an answer.
    #[serde(default)]
    pub ignore_eos: bool,
    /// The request's name, for logs and offers; a new one if left out.
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
    /// What it asks for that is not there, and would change the answer.
    pub fn cannot(&self) -> Option<&'static str> {
        let stop =
            self.stop.as_ref().is_some_and(|s| s.as_str().is_none_or(|s| !s.is_empty()) && *s != serde_json::json!([]));
        match self {
            a if a.temperature.is_some_and(|t| t != 0.0) => {
                Some("only greedy sampling is there: leave temperature out, or at 0")
            }
            a if a.n.is_some_and(|n| n != 1) => Some("there is one answer to a prompt: leave n out, or at 1"),
            _ if stop => Some("stop is not there: leave it out"),
            a if a.logprobs.is_some() => Some("logprobs are not there: leave them out"),
            a if a.echo => Some("echo is not there: leave it out"),
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

/// Where the prompt's KV comes from, or goes to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transfer {
    /// Offer the prompt's KV when it is there.
    #[serde(default)]
    pub do_remote_decode: bool,
    /// The prompt's KV can be had from elsewhere: see `offer`.
    #[serde(default)]
    pub do_remote_prefill: bool,
    /// What to pull.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offer: Option<Offer>,
    /// A hash of the tokens that the offer is of. KV of another prompt would give wrong answers, to others too once the
    /// prefix cache has it: without this hash, or with another, an offer is not used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
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
}

/// The one choice.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Choice {
    pub index: u32,
    pub text: String,
    /// The tokens of the text: what answers are compared by.
    pub token_ids: Vec<u32>,
    /// `length` or `stop`, with the last piece.
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

/// Where the prompt's tokens came from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sources {
    /// Those that need not be computed here: `local_cache + external`.
    pub cached_tokens: u64,
    pub computed: u64,
    pub local_cache: u64,
    pub external: u64,
    /// Of `computed`, those that had been expected from elsewhere and were lost.
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

/// What is wrong, for people and for programs.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Detail {
    pub message: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub code: u16,
}

impl Problem {
    /// With this HTTP status.
    pub fn new(code: u16, kind: &str, message: impl Into<String>) -> Self {
        Self { error: Detail { message: message.into(), kind: kind.into(), code } }
    }
}
