//! A request, from its arrival to its last token.

use std::time::Instant;

use kvferry::{
    BlockId, Hold, HoldState, Offer, PullId,
    scheduler::{
        table::{Held, Request as View},
        tokens::Parts,
    },
};
use tokio::sync::mpsc::UnboundedSender;

use crate::{api::Times, blocks::Key, kv::BLOCK};

/// The engine's number for a request.
pub type Id = u64;

/// A request as the client sent it.
#[derive(Debug)]
pub struct Job {
    /// The name of the request, for logs and offers.
    pub name: String,
    /// The prompt; not empty.
    pub prompt: Vec<u32>,
    /// Tokens to generate; at least one.
    pub max_tokens: usize,
    /// Continue after the token that ends an answer.
    pub ignore_eos: bool,
    /// Offer the prompt's KV to another engine when it is complete.
    pub produce: bool,
    /// The name of an offer of the prompt's KV to make while it is computed.
    pub growing: Option<Offer>,
    /// An offer of the prompt's KV.
    pub offer: Option<Offer>,
    /// The offer may be made later, and grows while the other engine computes.
    pub awaited: bool,
    /// The channel for its events. It is closed when the client disconnects.
    pub out: UnboundedSender<Event>,
}

/// An event of a request. The last one is `Done` or `Failed`.
#[derive(Debug)]
pub enum Event {
    /// A token.
    Token(u32),
    /// No more tokens.
    Done {
        /// The last token ended the answer.
        stopped: bool,
        /// The sources of the prompt's tokens.
        parts: Parts,
        /// The offer of the prompt's KV, if requested.
        offer: Option<Box<Offer>>,
        times: Times,
    },
    /// There will be no answer.
    Failed(Refusal),
}

/// The reason why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The request is not supported.
    #[error("{0}")]
    Bad(String),
    /// KV did not arrive.
    #[error("{0}")]
    KvLost(String),
    /// The engine failed.
    #[error("{0}")]
    Engine(String),
}

/// A running load.
#[derive(Debug)]
pub struct Load {
    pub pull: Option<PullId>,
    /// See [`Times::now`].
    pub started: u64,
    /// It has ended in this step, or could not start.
    pub ended: bool,
}

/// A request in the engine.
#[derive(Debug)]
pub struct Req {
    pub id: Id,
    pub job: Job,
    /// The tokens of the prompt and the generated ones.
    pub tokens: Vec<u32>,
    /// The keys of its full blocks.
    pub keys: Vec<Key>,
    /// Its blocks by position: the one group's table.
    pub tables: Vec<Vec<Option<BlockId>>>,
    pub held: Held,
    pub load: Option<Load>,
    /// Its claim on an offer that may be made later.
    pub hold: Option<Hold>,
    /// Blocks in its growing offer; `None` before that is open.
    pub listed: Option<usize>,
    /// Tokens to run in this step.
    pub scheduled: u64,
    /// Its client has disconnected; it stays until its load is quiet.
    pub gone: bool,
    /// The sources of its prompt's tokens, after its first token.
    pub settled: Option<Parts>,
    pub arrived: Instant,
    pub times: Times,
}

impl Req {
    pub fn new(id: Id, job: Job) -> Self {
        let tokens = job.prompt.clone();
        Self {
            id,
            tokens,
            job,
            keys: Vec::new(),
            tables: vec![Vec::new()],
            held: Held::default(),
            load: None,
            hold: None,
            listed: None,
            scheduled: 0,
            gone: false,
            settled: None,
            arrived: Instant::now(),
            times: Times { queued: Times::now(), ..Times::default() },
        }
    }

    /// Tokens of the prompt.
    pub fn prompt(&self) -> u64 {
        self.job.prompt.len() as u64
    }

    /// Whether it may get blocks: the other engine has begun its prompt, or never will.
    pub fn is_ready(&self) -> bool {
        self.hold.as_ref().is_none_or(|h| h.state() != HoldState::Waiting)
    }

    /// Known tokens: the prompt and the generated ones.
    pub fn known(&self) -> u64 {
        self.tokens.len() as u64
    }

    /// Tokens generated.
    pub fn made(&self) -> usize {
        self.tokens.len() - self.job.prompt.len()
    }

    /// The longest useful prefix hit: whole blocks, without the last token, which must run to give logits.
    pub fn longest_hit(&self) -> u64 {
        (self.known() - 1) / BLOCK as u64 * BLOCK as u64
    }

    /// Tokens that a load could bring.
    pub fn external(&self) -> u64 {
        self.job.offer.as_ref().map_or(0, |o| o.tokens.min(self.prompt() - 1))
    }

    /// The end of the step.
    pub fn ran_to(&self) -> u64 {
        self.held.total() + self.scheduled
    }

    /// Its blocks.
    pub fn table(&self) -> &Vec<Option<BlockId>> {
        &self.tables[0]
    }

    /// Extends the keys to all full blocks of known tokens.
    pub fn update_keys(&mut self) {
        for block in self.tokens.chunks_exact(BLOCK).skip(self.keys.len()) {
            let before = self.keys.last().copied().unwrap_or_default();
            self.keys.push(before.then(block));
        }
    }

    /// The request as the scheduler's functions see it.
    pub fn view(&self) -> View<'_, Id> {
        View {
            id: self.id,
            blocks: &self.tables,
            held: self.held,
            loading: self.load.is_some(),
            scheduled: self.scheduled,
        }
    }
}
