//! The engine: one thread that owns the model, the blocks and all requests, and runs them step by step.
//!
//! [`kvferry::scheduler`] describes a step: handle the ended loads, give each request its turn, admit new ones, run the
//! model once for all, and only then count. The library decides about invalid blocks; this module carries that out.
//!
//! | file | content |
//! | --- | --- |
//! | `schedule` | the requests of a step: turns, admission, preemption |
//! | `loads` | pulls, and the outcome of blocks that did not arrive |
//! | `offers` | the KV of prompts, for other engines |
//! | `step` | the forward pass and its counts |

mod loads;
mod offers;
mod schedule;
mod step;

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    time::Duration,
};

use kvferry::{
    BlockId, Cause, Consumer, Ended, EngineId, Freed, GroupId, OfferId, Producer, PullId, WaitError,
    scheduler::{
        invalid::Policy,
        ledger::{EndReason, Ledger},
        table::GroupSpec,
    },
};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::{
    blocks::Blocks,
    counts::Counts,
    kv::{BLOCK, Kv},
    llama::Llama,
    request::{Event, Id, Job, Refusal, Req},
};

/// Settings of an engine.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The policy for requests whose KV does not arrive.
    pub policy: Policy,
    /// A step waits for its loads, and other requests may count on their blocks at once. Otherwise requests with a running
    /// load are left out of the step.
    pub sync_loads: bool,
    /// Most tokens per step.
    pub budget: u64,
    /// Most running requests, without those that load.
    pub running: usize,
    /// Most requests that wait for their loads.
    pub loading: usize,
    /// Time from the start of a pull to its decision.
    pub deadline: Duration,
    /// The same of a pull whose offer grows: it includes the other engine's queue and computation.
    pub awaited: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            policy: Policy::Recompute,
            sync_loads: false,
            budget: 256,
            running: 64,
            loading: 256,
            deadline: Duration::from_secs(10),
            awaited: Duration::from_secs(300),
        }
    }
}

/// A message to the engine's thread.
enum Msg {
    Job(Box<Job>),
    Ended(Box<Ended>),
    Freed(Freed),
    Status(oneshot::Sender<Status>),
    /// Runs between two steps, when all counts are consistent.
    Between(Box<dyn FnOnce() + Send>),
    /// A request may have become ready: another engine has begun its prompt.
    Begun,
    Stop,
}

/// A running pull.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PullStatus {
    /// The request whose KV it brings.
    pub request: String,
    /// The engine that it comes from.
    pub from: String,
    /// Chunks that have arrived, and the number of chunks (0 until it is known).
    pub loaded: usize,
    pub chunks: usize,
}

/// A prompt that is being computed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptStatus {
    pub request: String,
    /// Tokens that are computed or were found in the prefix cache, and tokens of the prompt.
    pub computed: u64,
    pub tokens: u64,
}

/// The status of an engine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// All blocks, and free blocks.
    pub blocks: usize,
    pub free: usize,
    /// Blocks in the prefix cache.
    pub cached: usize,
    pub running: usize,
    pub waiting: usize,
    /// Offers that are not freed yet.
    pub offers: usize,
    pub pulls: Vec<PullStatus>,
    pub prompts: Vec<PromptStatus>,
    /// Pulls whose blocks are withheld by a wedged lane until the process is restarted.
    pub wedged: usize,
}

/// A handle to an engine, which ends when the last handle is dropped.
#[derive(Clone)]
pub struct Handle(Sender<Msg>);

impl Handle {
    /// Submits a request, whose events come through the job's channel. `false` if the engine has ended.
    pub fn submit(&self, job: Job) -> bool {
        self.0.send(Msg::Job(Box::new(job))).is_ok()
    }

    /// The status of the engine; `None` if it has ended.
    pub async fn status(&self) -> Option<Status> {
        let (tx, rx) = oneshot::channel();
        self.0.send(Msg::Status(tx)).ok()?;
        rx.await.ok()
    }

    /// Runs `f` between two steps, when all counts are consistent. `None` if the engine has ended.
    pub async fn between_steps<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let (tx, rx) = oneshot::channel();
        let run = move || {
            // The caller may have stopped waiting.
            let _ = tx.send(f());
        };
        self.0.send(Msg::Between(Box::new(run))).ok()?;
        rx.await.ok()
    }

    /// Stops the engine. Running requests fail.
    pub fn stop(&self) {
        // It may have ended already.
        let _ = self.0.send(Msg::Stop);
    }
}

/// The engine's ends of kvferry.
#[derive(Default)]
pub struct Link {
    /// For pulls.
    pub consumer: Option<Arc<Consumer>>,
    /// For offers.
    pub producer: Option<Arc<Producer>>,
}

/// An engine.
pub struct Engine {
    model: Arc<Llama>,
    kv: Kv,
    settings: Settings,
    groups: [GroupSpec; 1],
    blocks: Blocks,
    running: Vec<Req>,
    waiting: VecDeque<Req>,
    ledger: Ledger<Id>,
    counts: Counts,
    link: Link,
    inbox: Receiver<Msg>,
    /// For news of held offers.
    news: Option<Sender<Msg>>,
    /// Pulls that have ended and are not reported yet.
    ends: Vec<Ended>,
    /// Loads that could not start and are not reported yet.
    refused: Vec<(Id, Cause)>,
    /// Running pulls, with their request and the engine that they read.
    pulls: HashMap<PullId, (Id, EngineId)>,
    /// Blocks of live offers.
    offers: HashMap<OfferId, Vec<BlockId>>,
    next: Id,
    stopping: bool,
}

impl Engine {
    /// An engine that is not running yet.
    pub fn new(model: Arc<Llama>, kv: Kv, settings: Settings, link: Link) -> anyhow::Result<(Self, Handle)> {
        let (tx, inbox) = channel();
        let news = link.consumer.is_some().then(|| tx.clone());
        if let Some(c) = &link.consumer {
            let (consumer, tx) = (Arc::downgrade(c), tx.clone());
            watch("pull-ends", move || {
                let Some(c) = consumer.upgrade() else { return false };
                match c.wait(Duration::from_secs(1)) {
                    Ok(e) => tx.send(Msg::Ended(Box::new(e))).is_ok(),
                    Err(e) => !matches!(e, WaitError::Died | WaitError::Shutdown),
                }
            })?;
        }
        if let Some(p) = &link.producer {
            let (producer, tx) = (Arc::downgrade(p), tx.clone());
            watch("freed-offers", move || {
                let Some(p) = producer.upgrade() else { return false };
                p.wait_freed(Duration::from_secs(1)).is_none_or(|f| tx.send(Msg::Freed(f)).is_ok())
            })?;
        }
        let group = GroupSpec::full(GroupId(0), BLOCK as u32).ok_or_else(|| anyhow::anyhow!("a block needs tokens"))?;
        let engine = Self {
            blocks: Blocks::new(kv.blocks()),
            model,
            kv,
            settings,
            groups: [group],
            running: Vec::new(),
            waiting: VecDeque::new(),
            ledger: Ledger::new(),
            counts: Counts::default(),
            link,
            inbox,
            news,
            ends: Vec::new(),
            refused: Vec::new(),
            pulls: HashMap::new(),
            offers: HashMap::new(),
            next: 1,
            stopping: false,
        };
        Ok((engine, Handle(tx)))
    }

    /// The ledger, and the engine's own counts, to register.
    pub fn register(&self, registry: &mut prometheus_client::registry::Registry) {
        self.ledger.register(registry);
        self.counts.register(registry);
        if let Some(c) = &self.link.consumer {
            c.metrics().register(registry);
        }
        if let Some(p) = &self.link.producer {
            p.metrics().register(registry);
        }
    }

    /// Runs until it is stopped.
    pub fn run(mut self) {
        let mut moved = true;
        while self.receive(moved) && !self.stopping {
            moved = self.step();
            self.gauge();
            // Threads that send the step's tokens may wait for this core.
            std::thread::yield_now();
        }
        for mut r in std::mem::take(&mut self.running).into_iter().chain(std::mem::take(&mut self.waiting)) {
            r.fail(Refusal::Engine("the engine is shutting down".into()));
        }
    }

    /// Handles all messages. If the last step did nothing, waits for one; with requests at hand only briefly, since a
    /// client may disconnect without a message.
    fn receive(&mut self, moved: bool) -> bool {
        if !moved {
            let idle = self.running.is_empty() && self.waiting.is_empty();
            let limit = Duration::from_millis(if idle { 60_000 } else { 20 });
            match self.inbox.recv_timeout(limit) {
                Ok(msg) => self.handle(msg),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
        while let Ok(msg) = self.inbox.try_recv() {
            self.handle(msg);
        }
        true
    }

    fn handle(&mut self, msg: Msg) {
        match msg {
            Msg::Job(job) => self.arrive(*job),
            Msg::Ended(e) => self.ends.push(*e),
            Msg::Freed(f) => self.take_back(f.offer),
            Msg::Status(tx) => {
                // The caller may have stopped waiting.
                let _ = tx.send(self.status());
            }
            Msg::Between(f) => f(),
            Msg::Begun => {}
            Msg::Stop => self.stopping = true,
        }
    }

    fn status(&self) -> Status {
        let consumer = self.link.consumer.as_ref();
        let pulls = self.pulls.iter().filter_map(|(pull, id)| {
            let (loaded, chunks) = consumer?.progress(*pull)?;
            let r = self.running.iter().find(|r| r.id == id.0)?;
            Some(PullStatus { request: r.job.name.clone(), from: id.1.to_string(), loaded, chunks })
        });
        let prompts = self.running.iter().filter(|r| r.load.is_none() && r.made() == 0).map(|r| PromptStatus {
            request: r.job.name.clone(),
            computed: r.held.total(),
            tokens: r.prompt(),
        });
        Status {
            blocks: self.blocks.len(),
            free: self.blocks.free(),
            cached: self.blocks.cached(),
            running: self.running.len(),
            waiting: self.waiting.len(),
            offers: self.offers.len(),
            pulls: pulls.collect(),
            prompts: prompts.collect(),
            wedged: consumer.map_or(0, |c| c.wedged()),
        }
    }

    fn gauge(&self) {
        self.counts.running.set(self.running.len() as i64);
        self.counts.waiting.set(self.waiting.len() as i64);
        self.counts.free_blocks.set(self.blocks.free() as i64);
        self.counts.offers.set(self.offers.len() as i64);
    }

    fn arrive(&mut self, job: Job) {
        let id = self.next;
        self.next += 1;
        let tokens = job.prompt.len().saturating_add(job.max_tokens);
        let longest = tokens.div_ceil(BLOCK);
        let c = &self.model.config;
        let bad = if job.prompt.is_empty() || job.max_tokens == 0 {
            Some("the prompt needs at least one token, and max_tokens must be at least 1".into())
        } else if job.prompt.iter().any(|t| *t as usize >= c.vocab) {
            Some(format!("a token is not in the vocabulary of {}", c.vocab))
        } else if tokens > c.context || longest > self.blocks.len() {
            let room = c.context.min(self.blocks.len() * BLOCK);
            Some(format!(
                "{} tokens of prompt and {} to generate: this engine has room for {room} in all",
                job.prompt.len(),
                job.max_tokens
            ))
        } else {
            None
        };
        let mut r = Req::new(id, job);
        if let Some(name) = &r.job.growing {
            let mut others = self.running.iter().chain(&self.waiting).filter_map(|o| o.job.growing.as_ref());
            if self.offers.contains_key(&name.id) || others.any(|o| o.id == name.id) {
                // The name belongs to another request.
                r.job.growing = None;
            }
        }
        if let Some(reason) = bad {
            self.withdraw(&mut r);
            self.release_offer(&mut r);
            return r.fail(Refusal::Bad(reason));
        }
        if let (true, Some(offer), Some(c)) = (r.job.awaited, &r.job.offer, &self.link.consumer) {
            // Otherwise its pull says why there is none.
            r.hold = c.hold_awaited(offer).ok();
            if let (Some(hold), Some(tx)) = (&r.hold, self.news.clone()) {
                hold.on_change(move |_| drop(tx.send(Msg::Begun)));
            }
        }
        self.ledger.admit(id, r.prompt());
        self.waiting.push_back(r);
    }

    /// Releases a request's blocks. Its load, if it had one, is quiet.
    fn release(&mut self, r: &mut Req) {
        // Last block first, so that the prefix stays in the cache longest.
        for b in r.tables[0].drain(..).rev().flatten() {
            self.blocks.release(b);
        }
        r.held = Default::default();
        r.scheduled = 0;
    }

    /// Ends a request, with or without an answer.
    fn close(&mut self, mut r: Req, reason: EndReason) {
        self.withdraw(&mut r);
        self.release(&mut r);
        self.release_offer(&mut r);
        if r.settled.is_none() {
            self.counts.settled(r.prompt(), None);
        }
        self.ledger.ended(&r.id, reason);
        self.counts.forget(r.id);
    }

    /// Removes requests whose clients have disconnected. A request with a running load stays until the load is quiet.
    fn drop_gone(&mut self) {
        for i in (0..self.waiting.len()).rev() {
            if self.waiting[i].job.out.is_closed()
                && let Some(r) = self.waiting.remove(i)
            {
                self.close(r, EndReason::Aborted);
            }
        }
        for i in (0..self.running.len()).rev() {
            if self.running[i].gone || !self.running[i].job.out.is_closed() {
                continue;
            }
            self.running[i].gone = true;
            match self.running[i].load.as_ref().and_then(|l| l.pull) {
                Some(pull) => {
                    if let Some(c) = &self.link.consumer {
                        c.cancel(pull);
                    }
                }
                None if self.running[i].load.is_none() => {
                    let r = self.running.remove(i);
                    self.close(r, EndReason::Aborted);
                }
                None => {}
            }
        }
    }

    fn release_offer(&mut self, r: &mut Req) {
        if let (Some(offer), Some(c)) = (r.job.offer.take(), &self.link.consumer) {
            loads::give_back(c, &offer);
        }
    }
}

impl Req {
    fn fail(&mut self, reason: Refusal) {
        // Its client may have disconnected.
        let _ = self.job.out.send(Event::Failed(reason));
    }
}

/// A thread that calls `f` until it returns `false`.
fn watch(name: &str, mut f: impl FnMut() -> bool + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new().name(name.into()).spawn(move || while f() {})?;
    Ok(())
}
