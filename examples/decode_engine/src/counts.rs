//! Counts that are independent of the ledger, to check it.
//!
//! Losses come from the reports of pulls and from the block tables, not from the scheduler's outcome. Recomputed tokens are
//! rows that the model ran. If the ledger were wrong, the two would differ.

use std::{collections::HashMap, time::Duration};

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use crate::request::Id;

/// Independent counts.
#[derive(Debug)]
pub struct Counts {
    /// Prompt tokens by position that were lost and are not present again.
    lost: HashMap<Id, Vec<bool>>,
    /// Tokens of settled prompts.
    pub prompt_tokens: Counter,
    /// Prompt tokens that went through the model.
    pub rows: Counter,
    /// The rows of tokens that had been lost.
    pub recomputed: Counter,
    /// Tokens that were kept from failed loads.
    pub salvaged: Counter,
    /// Tokens that loads should bring.
    pub asked: Counter,
    pub generated: Counter,
    pub steps: Counter,
    pub preemptions: Counter,
    pub running: Gauge,
    pub waiting: Gauge,
    pub free_blocks: Gauge,
    pub offers: Gauge,
    pub first_token: Histogram,
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            lost: HashMap::new(),
            prompt_tokens: Counter::default(),
            rows: Counter::default(),
            recomputed: Counter::default(),
            salvaged: Counter::default(),
            asked: Counter::default(),
            generated: Counter::default(),
            steps: Counter::default(),
            preemptions: Counter::default(),
            running: Gauge::default(),
            waiting: Gauge::default(),
            free_blocks: Gauge::default(),
            offers: Gauge::default(),
            first_token: Histogram::new([0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]),
        }
    }
}

impl Counts {
    /// Exports them, under `engine_`.
    pub fn register(&self, registry: &mut Registry) {
        let r = registry.sub_registry_with_prefix("engine");
        r.register("prompt_tokens", "Tokens of settled prompts", self.prompt_tokens.clone());
        r.register("prefill_rows", "Prompt tokens that went through the model", self.rows.clone());
        r.register(
            "recomputed_rows",
            "Prompt tokens that were lost and went through the model",
            self.recomputed.clone(),
        );
        r.register("salvaged_tokens", "Tokens that were kept from failed loads", self.salvaged.clone());
        r.register("load_tokens", "Tokens that loads should bring", self.asked.clone());
        r.register("generated_tokens", "Tokens generated", self.generated.clone());
        r.register("steps", "Forward passes", self.steps.clone());
        r.register("preemptions", "Preempted requests", self.preemptions.clone());
        r.register("running", "Requests that hold blocks", self.running.clone());
        r.register("waiting", "Requests that wait for blocks", self.waiting.clone());
        r.register("free_blocks", "Blocks without a reference", self.free_blocks.clone());
        r.register("offers", "Offers that are not freed yet", self.offers.clone());
        r.register("first_token_seconds", "Time from a request's arrival to its first token", self.first_token.clone());
    }

    /// Tokens `from..to` of a prompt of `prompt` tokens were lost.
    pub fn lost(&mut self, id: Id, prompt: u64, from: u64, to: u64) {
        let marks = self.lost.entry(id).or_default();
        marks.resize(prompt as usize, false);
        marks[from.min(prompt) as usize..to.clamp(from, prompt.max(from)).min(prompt) as usize].fill(true);
    }

    /// The first `to` tokens are present: cached, loaded or adopted.
    pub fn had(&mut self, id: Id, to: u64) {
        if let Some(marks) = self.lost.get_mut(&id) {
            let to = marks.len().min(to as usize);
            marks[..to].fill(false);
        }
    }

    /// Tokens `from..to` went through the model.
    pub fn ran(&mut self, prompt: u64, from: u64, to: u64) {
        self.rows.inc_by(to.min(prompt).saturating_sub(from));
    }

    /// Tokens `from..to` were computed and are valid.
    pub fn good(&mut self, id: Id, from: u64, to: u64) {
        if let Some(marks) = self.lost.get_mut(&id) {
            let end = marks.len();
            let range = &mut marks[end.min(from as usize)..end.min(to as usize)];
            self.recomputed.inc_by(range.iter().filter(|m| **m).count() as u64);
            range.fill(false);
        }
    }

    /// The request has its first token, or ended without one.
    pub fn settled(&mut self, prompt: u64, waited: Option<Duration>) {
        self.prompt_tokens.inc_by(prompt);
        if let Some(waited) = waited {
            self.first_token.observe(waited.as_secs_f64());
        }
    }

    /// The request has ended.
    pub fn forget(&mut self, id: Id) {
        self.lost.remove(&id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_counts_as_recomputed_once_even_if_it_runs_again() {
        let mut c = Counts::default();
        c.lost(1, 40, 16, 48);
        c.good(1, 0, 20);
        c.good(1, 16, 30);
        assert_eq!(c.recomputed.get(), 4 + 10);
        c.had(1, 35);
        c.good(1, 30, 60);
        assert_eq!(c.recomputed.get(), 4 + 10 + 5);
        c.lost(1, 40, 90, 95);
        c.good(2, 0, 10);
        assert_eq!(c.recomputed.get(), 19);
    }
}
