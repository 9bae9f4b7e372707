//! The forward pass and its counts.

use std::collections::HashMap;

use kvferry::scheduler::ledger::EndReason;

use super::Engine;
use crate::{
    api::Times,
    kv::BLOCK,
    llama::{Batch, Span, greedy},
    request::{Event, Id, Refusal},
};

impl Engine {
    /// Runs one step. `false` if there was nothing to do.
    pub(super) fn step(&mut self) -> bool {
        self.drop_gone();
        self.end_loads();
        let budget = self.take_turns();
        self.admit(budget);
        if self.settings.sync_loads {
            self.wait_for_loads();
        } else {
            // Prefix hits. With synchronous loads, they may lie in blocks whose load has failed.
            self.grow_offers();
        }
        let tokens = match self.run_model() {
            Ok(tokens) => tokens,
            Err(e) => {
                self.fail_all(&e.to_string());
                return true;
            }
        };
        if self.settings.sync_loads {
            self.end_sync_loads();
        }
        let moved = self.running.iter().any(|r| r.scheduled > 0);
        self.count(&tokens);
        moved || !self.ends.is_empty() || !self.refused.is_empty()
    }

    /// Runs the scheduled tokens, and returns the next token of each request whose known tokens have all run.
    fn run_model(&mut self) -> candle_core::Result<HashMap<Id, u32>> {
        let mut batch = Batch::default();
        let mut ids = Vec::new();
        for r in self.running.iter().filter(|r| r.scheduled > 0) {
            let (from, to) = (r.held.total() as usize, r.ran_to() as usize);
            let start = batch.tokens.len();
            batch.tokens.extend(&r.tokens[from..to]);
            let table = r.table().iter().copied().flatten().take(to.div_ceil(BLOCK)).collect();
            let logits = to == r.tokens.len();
            batch.spans.push(Span { rows: start..batch.tokens.len(), first: from, table, logits });
            ids.extend(logits.then_some(r.id));
            self.counts.ran(r.prompt(), from as u64, to as u64);
        }
        if batch.spans.is_empty() {
            return Ok(HashMap::new());
        }
        self.counts.steps.inc();
        let logits = self.model.forward(&batch, &self.kv)?;
        Ok(ids.into_iter().zip(logits.iter().map(|l| greedy(l))).collect())
    }

    /// Counts the step, emits tokens, and removes finished requests.
    fn count(&mut self, tokens: &HashMap<Id, u32>) {
        let now = Times::now();
        for r in self.running.iter_mut().filter(|r| r.scheduled > 0) {
            let (from, to) = (r.held.total(), r.ran_to());
            self.ledger.computed(&r.id, to);
            self.counts.good(r.id, from, to);
            r.held.computed += std::mem::take(&mut r.scheduled);
            first(&mut r.times.first_chunk, now);
        }
        self.grow_offers();
        for i in (0..self.running.len()).rev() {
            let r = &mut self.running[i];
            let Some(&token) = tokens.get(&r.id).filter(|_| r.held.total() == r.known()) else { continue };
            r.tokens.push(token);
            self.counts.generated.inc();
            first(&mut r.times.first_token, now);
            r.times.last_token = now;
            if r.settled.is_none() {
                self.ledger.first_token(&r.id);
                r.settled = self.ledger.request(&r.id);
                self.counts.settled(r.prompt(), Some(r.arrived.elapsed()));
            }
            // A closed channel is noticed before the next step.
            let _ = r.job.out.send(Event::Token(token));
            let stopped = self.model.config.eos == Some(token) && !r.job.ignore_eos;
            if stopped || r.made() >= r.job.max_tokens {
                self.finish(i, stopped);
            }
        }
    }

    fn finish(&mut self, i: usize, stopped: bool) {
        let mut r = self.running.remove(i);
        let offer = self.offer(&mut r);
        let parts = r.settled.unwrap_or_default();
        let closed = r.job.out.send(Event::Done { stopped, parts, offer: offer.clone(), times: r.times }).is_err();
        if let (true, Some(offer), Some(producer)) = (closed, offer, &self.link.producer) {
            // No client knows the offer.
            producer.revoke(offer.id);
        }
        self.close(r, EndReason::Aborted);
    }

    /// Fails all running requests, because the model failed. Their unfilled blocks leave the cache.
    fn fail_all(&mut self, reason: &str) {
        tracing::error!("the model failed: {reason}");
        for mut r in std::mem::take(&mut self.running) {
            r.tables[0].iter().skip(r.held.total() as usize / BLOCK).flatten().for_each(|b| self.blocks.uncache(*b));
            r.fail(Refusal::Engine(format!("the model failed: {reason}")));
            r.gone = true;
            if r.load.is_some() {
                self.running.push(r);
            } else {
                self.close(r, EndReason::Failed);
            }
        }
    }
}

/// Sets the time of an event that was not seen before.
fn first(time: &mut u64, now: u64) {
    if *time == 0 {
        *time = now;
    }
}
