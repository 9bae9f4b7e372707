//! The client's side: asks, times, and reads what engines say of themselves.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::StreamExt as _;

use crate::{
    api::{Answer, Ask, Problem, Usage},
    engine::Status,
};

/// An answer, and when it came.
#[derive(Debug, Clone, Default)]
pub struct Reply {
    pub tokens: Vec<u32>,
    pub text: String,
    pub usage: Usage,
    /// From the question to the first token.
    pub first: Duration,
    /// And to the last.
    pub whole: Duration,
}

/// No answer, and why.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// The engine said so.
    #[error("{} ({}): {}", .0.error.code, .0.error.kind, .0.error.message)]
    Said(Problem),
    /// Nothing sensible came back.
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

    /// Asks `HOST:PORT`, and takes the answer in as it comes.
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
            }
        }
        Err(Trouble::Lost("the answer ended in the middle".into()))
    }

    /// The whole answer at once, with its transfer parameters: what a router asks for.
    pub async fn whole(&self, addr: &str, ask: &Ask) -> Result<Answer> {
        let r = self.0.post(format!("http://{addr}/v1/completions")).json(ask).send().await?;
        let (status, text) = (r.status(), r.text().await?);
        ensure!(status.is_success(), "{status}: {text}");
        Ok(serde_json::from_str(&text)?)
    }

    /// How an engine is.
    pub async fn status(&self, addr: &str) -> Result<Status> {
        let r = self.0.get(format!("http://{addr}/v1/status")).send().await?;
        Ok(r.error_for_status()?.json().await?)
    }

    /// What an engine or router counts.
    pub async fn metrics(&self, addr: &str) -> Result<Metrics> {
        let text = self.0.get(format!("http://{addr}/metrics")).send().await?.error_for_status()?.text().await?;
        Metrics::parse(&text)
    }

    /// Waits until `look` is content with an engine's status.
    pub async fn wait(&self, addr: &str, limit: Duration, look: impl Fn(&Status) -> bool) -> Result<Status> {
        let started = Instant::now();
        loop {
            let s = self.status(addr).await?;
            if look(&s) {
                return Ok(s);
            }
            if started.elapsed() > limit {
                bail!("{addr} is not there after {limit:?}: {s:?}");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// A scrape.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metrics(pub BTreeMap<String, f64>);

impl Metrics {
    /// From the text format.
    pub fn parse(text: &str) -> Result<Self> {
        let mut all = BTreeMap::new();
        for line in text.lines().filter(|l| !l.starts_with('#')) {
            let (name, n) = line.rsplit_once(' ').with_context(|| format!("no sample: {line}"))?;
            all.insert(name.to_owned(), n.parse().with_context(|| format!("no number: {line}"))?);
        }
        Ok(Self(all))
    }

    /// The sum of all series of this name whose labels have all of these parts.
    pub fn sum(&self, name: &str, labels: &[&str]) -> u64 {
        let of = |series: &str| {
            series == name
                || series.strip_prefix(name).is_some_and(|l| l.starts_with('{') && labels.iter().all(|p| l.contains(p)))
        };
        self.0.iter().filter(|(series, _)| of(series)).map(|(_, n)| *n as u64).sum()
    }

    /// Series of counters that are smaller than they were.
    pub fn shrunk<'a>(&'a self, before: &'a Metrics) -> impl Iterator<Item = &'a String> {
        let counters = before.0.iter().filter(|(name, _)| name.contains("_total"));
        counters.filter(|(name, n)| self.0.get(*name).is_none_or(|now| now < n)).map(|(name, _)| name)
    }

    /// What must hold of an engine's books when nothing is under way, to the token.
    pub fn balanced(&self) -> Result<()> {
        let sources = self.sum("kvferry_prompt_tokens_total", &[]);
        let prompts = self.sum("engine_prompt_tokens_total", &[]);
        ensure!(sources == prompts, "the sources add up to {sources} tokens, the prompts have {prompts}");
        let own = self.sum("kvferry_prompt_tokens_recomputed_total", &["by=\"own\""]);
        let really = self.sum("engine_recomputed_rows_total", &[]);
        ensure!(own == really, "{own} tokens recomputed by the books, {really} really");
        let prefilled = self.sum("kvferry_prefill_tokens_total", &[]);
        let rows = self.sum("engine_prefill_rows_total", &[]);
        ensure!(prefilled == rows, "{prefilled} prompt tokens ran by the books, {rows} really");
        Ok(())
    }
}
