//! The books: where the prompt tokens of all requests came from, and the counters that say so.
//!
//! Owns the tokens of each request that has not ended, and the totals. A token is counted in the totals once, when it
//! is final: when its request has its first token, or ends without one. Until then it can still be lost, and moves
//! between the parts of its request alone. So no correction ever subtracts from a counter, and what is exported only
//! grows; a scrape is true to the token for every prompt that is done, and silent about the others.

use std::{collections::HashMap, hash::Hash};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

use super::{
    invalid::Outcome,
    sabotage::{Bug, planted},
    tokens::{Parts, PromptTokens},
};

/// How a request ended that had no first token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[non_exhaustive]
pub enum End {
    /// Its client went away, or the engine gave it up.
    Aborted,
    /// It failed.
    Failed,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceLabels {
    source: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RecomputedLabels {
    was: &'static str,
    by: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
}

#[derive(Debug)]
struct Entry {
    tokens: PromptTokens,
    /// Its tokens are in the totals.
    settled: bool,
}

/// The books of an engine. `R` is its name for a request.
///
/// Calls about requests that it does not know (ended ones, for instance) do nothing: a late word about a request is
/// normal.
#[derive(Debug)]
pub struct Ledger<R> {
    requests: HashMap<R, Entry>,
    /// What is final. The counters that follow grow with it, in one place.
    totals: Parts,
    tokens: Family<SourceLabels, Counter>,
    recomputed: Family<RecomputedLabels, Counter>,
    prefilled: Counter,
    prompts: Family<OutcomeLabels, Counter>,
}

impl<R> Default for Ledger<R> {
    fn default() -> Self {
        Self {
            requests: HashMap::new(),
            totals: Parts::default(),
            tokens: Family::default(),
            recomputed: Family::default(),
            prefilled: Counter::default(),
            prompts: Family::default(),
        }
    }
}

impl<R: Eq + Hash> Ledger<R> {
    /// Empty books.
    pub fn new() -> Self {
        let mut ledger = Self::default();
        // Every series is there from the start, at 0: a rate over one that appears later misses its first step.
        ledger.count(&Parts::default());
        for outcome in ["first_token", "aborted", "failed"] {
            ledger.prompts.get_or_create(&OutcomeLabels { outcome }).inc_by(0);
        }
        ledger
    }

    /// Exports the counters, all in tokens but the last:
    ///
    /// - `kvferry_prompt_tokens_total{source}`: final prompt tokens by `source`: `computed`, `local_cache`, `external`,
    ///   and `none` for those of requests that ended before they had them. They add up to the prompts.
    /// - `kvferry_prompt_tokens_recomputed_total{was,by}`: the part of `computed` that had been a hit or a load (`was`:
    ///   `local_cache`, `external`), was lost, and was computed again, `by` the request itself (`own`) or by one that
    ///   shares the blocks (`other`). What this engine really recomputed is `by="own"`.
    /// - `kvferry_prefill_tokens_total`: prompt tokens that ran through the model, in vain or again after a preemption
    ///   too. Counted as they run.
    /// - `kvferry_prompts_total{outcome}`: prompts whose tokens are counted: `first_token`, `aborted`, `failed`.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("kvferry_prompt_tokens", "Prompt tokens by source", self.tokens.clone());
        registry.register(
            "kvferry_prompt_tokens_recomputed",
            "Prompt tokens that were lost and computed again",
            self.recomputed.clone(),
        );
        registry.register("kvferry_prefill_tokens", "Prompt tokens that ran through the model", self.prefilled.clone());
        registry.register("kvferry_prompts", "Prompts whose tokens are counted", self.prompts.clone());
    }

    /// A request comes in. One of the same name that has not ended is aborted first.
    pub fn admit(&mut self, request: R, prompt_tokens: u64) {
        self.ended(&request, End::Aborted);
        self.requests.insert(request, Entry { tokens: PromptTokens::new(prompt_tokens), settled: false });
    }

    /// See [`PromptTokens::lookup`]. Also after a preemption, and for another try at a load.
    pub fn lookup(&mut self, request: &R, local: u64, external: u64) {
        self.with(request, |t| t.lookup(local, external));
    }

    /// See [`PromptTokens::load_ended`]. It does not matter whether the report of what was lost comes before or after.
    pub fn load_ended(&mut self, request: &R) {
        self.with(request, PromptTokens::load_ended);
    }

    /// See [`PromptTokens::lost`]. [`apply`](Self::apply) calls it for every affected request. An engine calls it itself
    /// to give up what it holds, for instance the last token of a full hit, which must run to have logits.
    pub fn lost(&mut self, request: &R, from: u64) {
        self.with(request, |t| t.lost(from));
    }

    /// The request's tokens ran up to `to`, and are good.
    pub fn computed(&mut self, request: &R, to: u64) {
        if let Some(e) = self.requests.get_mut(request) {
            let before = e.tokens.held();
            e.tokens.computed(to);
            self.prefilled.inc_by(e.tokens.held() - before);
        }
    }

    /// This many tokens ran behind what the request holds, in vain. [`apply`](Self::apply) calls it.
    pub fn discarded(&mut self, request: &R, tokens: u64) {
        if let Some(e) = self.requests.get(request) {
            self.prefilled.inc_by(tokens.min(e.tokens.missing()));
        }
    }

    /// See [`PromptTokens::adopted`], and [`Turn::computed`](super::turn::Turn::computed).
    pub fn adopted(&mut self, request: &R, to: u64) {
        if !planted(Bug::AdoptionForgotten) {
            self.with(request, |t| t.adopted(to));
        }
    }

    /// See [`PromptTokens::preempted`].
    pub fn preempted(&mut self, request: &R) {
        if planted(Bug::CountedAtPreemption)
            && let Some(parts) = self.requests.get(request).filter(|e| !e.settled).map(|e| e.tokens.parts())
        {
            self.count(&Parts { pending: 0, ..parts });
        }
        self.with(request, PromptTokens::preempted);
    }

    /// The request has its first token: its prompt's tokens are final. It stays known until it has ended, so that what
    /// runs again after a preemption is in `kvferry_prefill_tokens_total`.
    pub fn first_token(&mut self, request: &R) {
        let Some(e) = self.requests.get_mut(request).filter(|e| !e.settled) else { return };
        e.settled = true;
        let parts = e.tokens.parts();
        self.settle(&parts, "first_token");
    }

    /// The request has ended. Without a first token, its prompt's tokens are final as they are now.
    pub fn ended(&mut self, request: &R, end: End) {
        if let Some(e) = self.requests.remove(request).filter(|e| !e.settled) {
            self.settle(
                &e.tokens.parts(),
                match end {
                    End::Aborted => "aborted",
                    End::Failed => "failed",
                },
            );
        }
    }

    /// Tells the books what follows from a report: what was lost, what ran in vain, and who failed.
    pub fn apply(&mut self, outcome: &Outcome<R>) {
        for a in &outcome.affected {
            self.discarded(&a.id, a.discarded);
            if planted(Bug::ExternalLeftStale) && a.waits_for.is_some() {
                continue;
            }
            self.lost(&a.id, a.held.total());
        }
        for f in &outcome.failed {
            self.discarded(&f.id, f.discarded);
            self.lost(&f.id, f.held.total());
            self.ended(&f.id, End::Failed);
        }
    }

    /// A request's tokens by source, as they are now.
    pub fn request(&self, request: &R) -> Option<Parts> {
        Some(self.requests.get(request)?.tokens.parts())
    }

    /// All final tokens by source. [`Parts::older`] is the older form.
    pub fn totals(&self) -> Parts {
        self.totals
    }

    /// Prompt tokens that ran through the model, in vain or again too.
    pub fn prefilled(&self) -> u64 {
        self.prefilled.get()
    }

    fn with(&mut self, request: &R, f: impl FnOnce(&mut PromptTokens)) {
        if let Some(e) = self.requests.get_mut(request) {
            f(&mut e.tokens);
        }
    }

    fn settle(&mut self, parts: &Parts, outcome: &'static str) {
        self.count(parts);
        self.prompts.get_or_create(&OutcomeLabels { outcome }).inc();
    }

    fn count(&mut self, p: &Parts) {
        self.totals = self.totals.plus(p);
        for (source, n) in
            [("computed", p.computed()), ("local_cache", p.local_cache), ("external", p.external), ("none", p.pending)]
        {
            self.tokens.get_or_create(&SourceLabels { source }).inc_by(n);
        }
        for (by, r) in [("own", p.own), ("other", p.other)] {
            for (was, n) in [("local_cache", r.local_cache), ("external", r.external)] {
                self.recomputed.get_or_create(&RecomputedLabels { was, by }).inc_by(n);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// The exported series, with their values.
    fn scrape(registry: &Registry) -> BTreeMap<String, u64> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
        let series = text.lines().filter(|l| !l.starts_with('#')).filter_map(|l| l.rsplit_once(' '));
        series.map(|(name, n)| (name.to_owned(), n.parse().unwrap())).collect()
    }

    fn tokens(s: &BTreeMap<String, u64>, source: &str) -> u64 {
        s[&format!("kvferry_prompt_tokens_total{{source=\"{source}\"}}")]
    }

    #[test]
    fn nothing_is_exported_before_it_is_final_and_nothing_goes_down() {
        let (mut ledger, mut registry) = (Ledger::new(), Registry::default());
        ledger.register(&mut registry);
        let mut last = scrape(&registry);
        assert_eq!(last.len(), 4 + 4 + 1 + 3, "every series is there from the start: {last:?}");
        let mut step = |ledger: &Ledger<&str>| {
            let now = scrape(&registry);
            assert!(now.iter().all(|(name, n)| last[name] <= *n), "{last:?}, then {now:?}");
            let t = ledger.totals();
            let exported = ["computed", "local_cache", "external", "none"].map(|s| tokens(&now, s));
            assert_eq!(exported, [t.computed(), t.local_cache, t.external, t.pending]);
            last = now;
            exported
        };
        ledger.admit("a", 100);
        ledger.lookup(&"a", 16, 64);
        ledger.load_ended(&"a");
        assert_eq!(step(&ledger), [0; 4]);
        ledger.lost(&"a", 32);
        ledger.computed(&"a", 90);
        ledger.preempted(&"a");
        ledger.lookup(&"a", 80, 0);
        assert_eq!(step(&ledger), [0; 4]);
        ledger.computed(&"a", 100);
        ledger.first_token(&"a");
        assert_eq!(step(&ledger), [68, 16, 16, 0]);
        // Counted is counted.
        ledger.preempted(&"a");
        ledger.lookup(&"a", 0, 0);
        ledger.computed(&"a", 100);
        ledger.first_token(&"a");
        ledger.ended(&"a", End::Failed);
        ledger.ended(&"a", End::Failed);
        assert_eq!(step(&ledger), [68, 16, 16, 0]);
        assert_eq!(ledger.prefilled(), (90 - 32) + (100 - 80) + 100);
        // An aborted one is counted as far as it came.
        ledger.admit("b", 50);
        ledger.lookup(&"b", 16, 16);
        ledger.admit("b", 10);
        assert_eq!(step(&ledger), [68, 32, 16, 34]);
    }

    #[test]
    fn a_word_about_a_request_that_is_gone_does_nothing() {
        let mut ledger: Ledger<u64> = Ledger::new();
        ledger.lookup(&1, 5, 5);
        ledger.load_ended(&1);
        ledger.lost(&1, 0);
        ledger.computed(&1, 5);
        ledger.discarded(&1, 5);
        ledger.adopted(&1, 5);
        ledger.preempted(&1);
        ledger.first_token(&1);
        ledger.ended(&1, End::Aborted);
        assert_eq!((ledger.totals(), ledger.prefilled(), ledger.request(&1)), (Parts::default(), 0, None));
    }
}
