//! A request, from its arrival to its last token.

use std::time::Instant;

use kvferry::{
    BlockId, Offer, PullId,
    scheduler::{
        table::{Held, Request as View},
        tokens::Parts,
    },
};
use tokio::sync::mpsc::UnboundedSender;

use crate::{blocks::Key, kv::BLOCK};

/// The engine's number for a request.
pub type Id = u64;

/// What somebody wants.
#[derive(Debug)]
pub struct Job {
    /// The request's name, for logs and offers.
    pub name: String,
    /// Its prompt; not empty.
    pub prompt: Vec<u32>,
    /// Tokens to generate; at least one.
    pub max_tokens: usize,
    /// Go on past the token that ends an answer.
    pub ignore_eos: bool,
    /// Offer the prompt's KV when it is there, for another engine to decode.
    pub produce: bool,
    /// Where the prompt's KV can be had.
    pub offer: Option<Offer>,
    /// Where its tokens go. Closed by a client that goes away.
    pub out: UnboundedSender<Event>,
}

/// What becomes of a request, event by event; the last one is `Done` or `Failed`.
#[derive(Debug)]
pub enum Event {
    /// A token.
    Token(u32),
    /// No more tokens.
    Done {
        /// The last token was one that ends answers.
        stopped: bool,
        /// Where the prompt's tokens came from.
        parts: Parts,
        /// The prompt's KV, if it was to be offered.
        offer: Option<Box<Offer>>,
    },
    /// There will be no answer.
    Failed(Refusal),
}

/// Why there will be no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It asks for what this engine cannot do.
    #[error("{0}")]
    Bad(String),
    /// KV that it counted on did not arrive.
    #[error("{0}")]
    KvLost(String),
    /// Something else here went wrong.
    #[error("{0}")]
    Engine(String),
}

/// A pull under way.
#[derive(Debug)]
pub struct Load {
    pub pull: Option<PullId>,
    /// It has ended in this step, or could not even begin.
    pub ended: bool,
}

/// A request in the engine.
#[derive(Debug)]
pub struct Req {
    pub id: Id,
    pub job: Job,
    /// The prompt, and what was generated.
    pub tokens: Vec<u32>,
    /// The keys of its full blocks.
    pub keys: Vec<Key>,
    /// Its blocks by position: the one group's table.
    pub tables: Vec<Vec<Option<BlockId>>>,
    pub held: Held,
    pub load: Option<Load>,
    /// Tokens to run in this step.
    pub scheduled: u64,
    /// Its client is gone; it stays until its load is quiet.
    pub gone: bool,
    /// It had its first token: where its prompt came from.
    pub settled: Option<Parts>,
    pub arrived: Instant,
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
            scheduled: 0,
            gone: false,
            settled: None,
            arrived: Instant::now(),
        }
    }

    /// Tokens of the prompt.
    pub fn prompt(&self) -> u64 {
        self.job.prompt.len() as u64
    }

    /// Tokens that are known: prompt and generated.
    pub fn known(&self) -> u64 {
        self.tokens.len() as u64
    }

    /// Tokens generated.
    pub fn made(&self) -> usize {
        self.tokens.len() - self.job.prompt.len()
    }

    /// The longest prefix that need not be computed: whole blocks, and one token must run to have logits.
    pub fn most(&self) -> u64 {
        (self.known() - 1) / BLOCK as u64 * BLOCK as u64
    }

    /// Tokens that a load could bring.
    pub fn external(&self) -> u64 {
        self.job.offer.as_ref().map_or(0, |o| o.tokens.min(self.prompt() - 1))
    }

    /// Where the step ends.
    pub fn ran_to(&self) -> u64 {
        self.held.total() + self.scheduled
    }

    /// Its blocks.
    pub fn table(&self) -> &Vec<Option<BlockId>> {
        &self.tables[0]
    }

    /// Extends the keys to all full blocks of known tokens.
    pub fn name_blocks(&mut self) {
        for block in self.tokens.chunks_exact(BLOCK).skip(self.keys.len()) {
            let before = self.keys.last().copied().unwrap_or_default();
            self.keys.push(before.then(block));
        }
    }

    /// As the scheduler's functions see it.
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
