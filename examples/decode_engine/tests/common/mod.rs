//! Engines in the test's process, with the tiny model and without HTTP.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::{
    sync::{
        Arc,
        mpsc::{Sender, channel},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use decode_engine::{
    api::{Source, Times},
    client::Metrics,
    engine::{Engine, Handle, Link, Settings, Status},
    request::{Event, Job, Refusal},
    serve::{self, Role, link},
    weights,
};
use kvferry::{Config, Offer, Token, scheduler::tokens::Parts};
use prometheus_client::registry::Registry;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// Longest time that a test waits for an event.
pub const LIMIT: Duration = Duration::from_secs(60);

/// An engine on its own thread. It ends when this is dropped.
pub struct Rig {
    pub handle: Handle,
    /// Where its offers are, for a prefill engine.
    pub source: Option<Source>,
    registry: Registry,
}

/// The result of a request.
#[derive(Debug)]
pub struct Done {
    pub tokens: Vec<u32>,
    pub parts: Parts,
    pub offer: Option<Offer>,
    pub times: Times,
}

impl Rig {
    /// An engine without kvferry.
    pub fn new(blocks: u32, settings: Settings) -> Result<Self> {
        Self::linked(blocks, settings, None, &Config::default())
    }

    /// An engine with its ends of kvferry.
    pub fn linked(blocks: u32, settings: Settings, role: Option<Role>, config: &Config) -> Result<Self> {
        let model = Arc::new(weights::tiny(1)?.0);
        let kv = model.cache(blocks)?;
        let link = match role {
            Some(role) => link(role, "rig", &model, &kv, "127.0.0.1:0", config)?,
            None => Link::default(),
        };
        let source = link.producer.as_deref().map(serve::source);
        let (engine, handle) = Engine::new(model, kv, settings, link)?;
        let mut registry = Registry::default();
        engine.register(&mut registry);
        std::thread::spawn(move || engine.run());
        Ok(Self { handle, source, registry })
    }

    /// Submits a request, and returns its events.
    pub fn submit(
        &self,
        prompt: &[u32],
        max_tokens: usize,
        produce: bool,
        offer: Option<Offer>,
    ) -> UnboundedReceiver<Event> {
        self.run(Job { produce, offer, ..job(prompt, max_tokens) })
    }

    /// Computes a prompt, and makes this offer meanwhile.
    pub fn compute(&self, prompt: &[u32], max_tokens: usize, name: &Offer) -> UnboundedReceiver<Event> {
        self.run(Job { growing: Some(name.clone()), ..job(prompt, max_tokens) })
    }

    /// Submits a request that loads what another engine computes now.
    pub fn follow(&self, prompt: &[u32], max_tokens: usize, name: &Offer) -> UnboundedReceiver<Event> {
        self.run(Job { offer: Some(name.clone()), awaited: true, ..job(prompt, max_tokens) })
    }

    /// The name of a new offer of this engine's that grows.
    pub fn name(&self, prompt: &[u32]) -> Offer {
        let transfer = String::from(Token::random());
        self.source.as_ref().expect("it makes offers").name(&transfer, prompt)
    }

    fn run(&self, mut job: Job) -> UnboundedReceiver<Event> {
        let (out, events) = unbounded_channel();
        job.out = out;
        assert!(self.handle.submit(job), "the engine has ended");
        events
    }

    /// Submits a request, and waits for the answer.
    pub fn ask(&self, prompt: &[u32], max_tokens: usize) -> Result<Done> {
        answer(self.submit(prompt, max_tokens, false, None))
    }

    /// Stops the engine between two steps, until the returned end is dropped.
    pub fn pause(&self) -> Result<Sender<()>> {
        let ((held, release), (began, begins)) = (channel::<()>(), channel());
        let handle = self.handle.clone();
        std::thread::spawn(move || -> Result<()> {
            let wait = move || {
                // The test may have ended.
                let _ = began.send(());
                let _ = release.recv();
            };
            tokio::runtime::Builder::new_current_thread().build()?.block_on(handle.between_steps(wait));
            Ok(())
        });
        begins.recv_timeout(LIMIT)?;
        Ok(held)
    }

    pub fn metrics(&self) -> Result<Metrics> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Metrics::parse(&text)
    }

    pub fn count(&self, name: &str) -> Result<u64> {
        Ok(self.metrics()?.sum(name, &[]))
    }

    /// Waits until `done` accepts the status.
    pub fn wait(&self, done: impl Fn(&Status) -> bool) -> Result<Status> {
        let started = Instant::now();
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        loop {
            let s = runtime.block_on(self.handle.status()).context("the engine has ended")?;
            if done(&s) {
                return Ok(s);
            }
            if started.elapsed() > LIMIT {
                bail!("the status was not reached within {LIMIT:?}: {s:?}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until the engine is idle, and checks its blocks and its ledger.
    pub fn settled(&self) -> Result<()> {
        let s = self.wait(|s| s.running + s.waiting + s.pulls.len() + s.offers == 0)?;
        anyhow::ensure!(s.free == s.blocks, "{} blocks leaked", s.blocks - s.free);
        self.metrics()?.balanced()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.handle.stop();
    }
}

fn job(prompt: &[u32], max_tokens: usize) -> Job {
    Job {
        name: "test".into(),
        prompt: prompt.to_vec(),
        max_tokens,
        ignore_eos: true,
        produce: false,
        growing: None,
        offer: None,
        awaited: false,
        out: unbounded_channel().0,
    }
}

/// Waits for an answer.
pub fn answer(events: UnboundedReceiver<Event>) -> Result<Done> {
    match outcome(events)? {
        Ok(done) => Ok(done),
        Err(reason) => bail!("{reason}"),
    }
}

/// Waits for an answer, or for the reason why there is none.
pub fn outcome(mut events: UnboundedReceiver<Event>) -> Result<Result<Done, Refusal>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    runtime.block_on(async {
        let mut tokens = Vec::new();
        loop {
            match tokio::time::timeout(LIMIT, events.recv()).await?.context("the engine has ended")? {
                Event::Token(t) => tokens.push(t),
                Event::Failed(reason) => return Ok(Err(reason)),
                Event::Done { parts, offer, times, .. } => {
                    return Ok(Ok(Done { tokens, parts, offer: offer.map(|o| *o), times }));
                }
            }
        }
    })
}

/// Prompts of bytes; see [`decode_engine::prompts::prompts`].
pub fn prompts(n: usize, groups: usize, shared: usize, own: usize, seed: u64) -> Vec<Vec<u32>> {
    let texts = decode_engine::prompts::prompts(n, groups, shared, own, seed);
    texts.iter().map(|t| t.bytes().map(u32::from).collect()).collect()
}
