//! A request: its prompt, its block tables, and its load.

use std::collections::VecDeque;

use kvferry::{
    BlockId,
    scheduler::table::{Held, Request},
};

use crate::pool::Stamp;

#[derive(Debug, Clone)]
pub(crate) struct Arrival {
    /// Requests of a family have a common prefix of `shared` tokens.
    pub family: u32,
    pub shared: u64,
    pub tail: u64,
    /// Tokens to generate.
    pub out: u64,
    /// Tokens that the prefill engine has.
    pub external: u64,
    pub asynchronous: bool,
    /// Skips the prefix cache, and so makes second copies of blocks.
    pub skip_cache: bool,
    /// Shares running loads.
    pub share_load: bool,
    /// Repeats a failed load once.
    pub retry: bool,
    /// The blocks of its loads that fail. All bits set: the whole load fails without naming blocks.
    pub fails: u16,
}

pub(crate) struct Req {
    pub id: u32,
    pub a: Arrival,
    pub made: u64,
    pub tables: Vec<Vec<Option<BlockId>>>,
    pub held: Held,
    /// Blocks that its running load has not brought yet; `None` without a running load.
    pub load: Option<VecDeque<(usize, u64)>>,
    /// Blocks that its load brings in this step.
    pub sync: Vec<(usize, u64)>,
    pub load_failed: bool,
    pub scheduled: u64,
    pub settled: bool,
    pub retried: bool,
    /// Admitted in this step, so that it may count on blocks that others compute in the same step.
    pub fresh: bool,
}

impl Req {
    pub(crate) fn prompt(&self) -> u64 {
        self.a.shared + self.a.tail
    }

    pub(crate) fn known(&self) -> u64 {
        self.prompt() + self.made
    }

    pub(crate) fn stamp(&self, token: u64) -> Stamp {
        if token < self.a.shared { (self.a.family, token) } else { (1000 + self.id, token) }
    }

    pub(crate) fn view(&self) -> Request<'_, u32> {
        Request {
            id: self.id,
            blocks: &self.tables,
            held: self.held,
            loading: self.load.is_some(),
            scheduled: self.scheduled,
        }
    }

    pub(crate) fn ran_to(&self) -> u64 {
        self.held.total() + self.scheduled
    }

    pub(crate) fn block(&self, g: usize, p: u64) -> Option<BlockId> {
        self.tables[g].get(p as usize).copied().flatten()
    }

    pub(crate) fn fails(&self, nth: usize) -> bool {
        self.a.fails >> (nth % 16) & 1 == 1
    }
}
