//! The client: sends prompts, measures times, and reads the status and the metrics of engines.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::StreamExt as _;

use crate::{
    api::{Answer, Ask, Identity, Problem, Times, Usage},
    engine::Status,
};

/// An answer with its times.
#[derive(Debug, Clone, Default)]
pub struct Reply {
    pub tokens: Vec<u32>,
    pub text: String,
    pub usage: Usage,
    /// From the request to the first token.
    pub first: Duration,
    /// From the request to the last token.
    pub whole: Duration,
    /// The engine's own times.
    pub times: Option<Times>,
}

/// The reason why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// The engine refused or failed, and said why.
    #[error("{} ({}): {}", .0.error.code, .0.error.kind, .0.error.message)]
    Said(Problem),
    /// The connection failed, or the answer was malformed.
    #[error("{0}")]
    Lost(String),
}

impl From<reqwest::Error> for Trouble {
    fn from(e: reqwest::Error) -> Self {
        Self::Lost(format!("{e}: {:?}", std::error::Error::source(&e).map(ToString::to_string)))
    }
}

/// A client of engines and routers.
#[derive(Debug, Clone)]
pub struct Client(reqwest::Client);

impl Client {
    pub fn new() -> Result<Self> {
        Ok(Self(reqwest::Client::builder().no_proxy().build()?))
    }

    /// Sends a prompt to `HOST:PORT`, and reads the streamed answer.
    pub async fn ask(&self, addr: &str, ask: &Ask) -> std::result::Result<Reply, Trouble> {
        let started = Instant::now();
        let ask = Ask { stream: true, ..ask.clone() };
        let r = self.0.post(format!("http://{addr}/v1/completions")).json(&ask).send().await?;
        let status = r.status();
        if !status.is_success() {
            let text = r.text().await?;
            return Err(match serde_json::from_str(&text) {
                Ok(p) => Trouble::Said(p),
                Err(_) => Trouble::Lost(format!("{status}: {text}")),
            });
        }
        let mut reply = Reply::default();
        let mut rest = Vec::new();
        let mut body = r.bytes_stream();
        while let Some(bytes) = body.next().await {
            rest.extend_from_slice(&bytes?);
            while let Some(end) = rest.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = rest.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line);
                let Some(data) = line.trim_end().strip_prefix("data: ") else { continue };
                if data == "[DONE]" {
                    reply.whole = started.elapsed();
                    return Ok(reply);
                }
                if let Ok(p) = serde_json::from_str::<Problem>(data) {
                    return Err(Trouble::Said(p));
                }
                let answer: Answer = serde_json::from_str(data).map_err(|e| Trouble::Lost(format!("{e}: {data}")))?;
                if reply.tokens.is_empty() {
                    reply.first = started.elapsed();
                }
                for c in answer.choices {
                    reply.text.push_str(&c.text);
                    reply.tokens.extend(c.token_ids);
                }
                reply.usage = answer.usage.unwrap_or(reply.usage);
                reply.times = answer.times.or(reply.times);
            }
        }
        Err(Trouble::Lost("the answer is incomplete".into()))
    }

    /// The complete answer in one piece, with its transfer parameters, as a router requests it.
    pub async fn whole(&self, addr: &str, ask: &Ask) -> Result<Answer> {
        let r = self.0.post(format!("http://{addr}/v1/completions")).json(ask).send().await?;
        let (status, text) = (r.status(), r.text().await?);
        ensure!(status.is_success(), "{status}: {text}");
        Ok(serde_json::from_str(&text)?)
    }

    /// An engine's description of itself.
    pub async fn identity(&self, addr: &str) -> Result<Identity> {
        let r = self.0.get(format!("http://{addr}/kvferry")).send().await?;
        Ok(r.error_for_status()?.json().await?)
    }

    /// The status of an engine.
    pub async fn status(&self, addr: &str) -> Result<Status> {
        let r = self.0.get(format!("http://{addr}/v1/status")).send().await?;
        Ok(r.error_for_status()?.json().await?)
    }

    /// The metrics of an engine or router.
    pub async fn metrics(&self, addr: &str) -> Result<Metrics> {
        let text = self.0.get(format!("http://{addr}/metrics")).send().await?.error_for_status()?.text().await?;
        Metrics::parse(&text)
    }

    /// Waits until `done` accepts an engine's status.
    pub async fn wait(&self, addr: &str, limit: Duration, done: impl Fn(&Status) -> bool) -> Result<Status> {
        let started = Instant::now();
        loop {
            let s = self.status(addr).await?;
            if done(&s) {
                return Ok(s);
            }
            if started.elapsed() > limit {
                bail!("{addr} did not reach the status within {limit:?}: {s:?}");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// The metrics of one scrape.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metrics(pub BTreeMap<String, f64>);

impl Metrics {
    /// Parses the text format.
    pub fn parse(text: &str) -> Result<Self> {
        let mut all = BTreeMap::new();
        for line in text.lines().filter(|l| !l.starts_with('#')) {
            let (name, n) = line.rsplit_once(' ').with_context(|| format!("not a sample: {line}"))?;
            all.insert(name.to_owned(), n.parse().with_context(|| format!("not a number: {line}"))?);
        }
        Ok(Self(all))
    }

    /// The sum of all series of this name whose labels contain all of these parts.
    pub fn sum(&self, name: &str, labels: &[&str]) -> u64 {
        let of = |series: &str| {
            series == name
                || series.strip_prefix(name).is_some_and(|l| l.starts_with('{') && labels.iter().all(|p| l.contains(p)))
        };
        self.0.iter().filter(|(series, _)| of(series)).map(|(_, n)| *n as u64).sum()
    }

    /// The counters that have decreased.
    pub fn decreased<'a>(&'a self, before: &'a Metrics) -> impl Iterator<Item = &'a String> {
        let counters = before.0.iter().filter(|(name, _)| name.contains("_total"));
        counters.filter(|(name, n)| self.0.get(*name).is_none_or(|now| now < n)).map(|(name, _)| name)
    }

    /// Checks that an idle engine's ledger agrees with the engine's own counts, to the token.
    pub fn balanced(&self) -> Result<()> {
        let sources = self.sum("kvferry_prompt_tokens_total", &[]);
        let prompts = self.sum("engine_prompt_tokens_total", &[]);
        ensure!(sources == prompts, "the sources add up to {sources} tokens, but the prompts have {prompts}");
        let own = self.sum("kvferry_prompt_tokens_recomputed_total", &["by=\"own\""]);
        let rows = self.sum("engine_recomputed_rows_total", &[]);
        ensure!(own == rows, "the ledger counts {own} recomputed tokens, the engine {rows}");
        let prefilled = self.sum("kvferry_prefill_tokens_total", &[]);
        let rows = self.sum("engine_prefill_rows_total", &[]);
        ensure!(prefilled == rows, "the ledger counts {prefilled} prompt tokens that ran, the engine {rows}");
        Ok(())
    }
}
