//! The sources of the prompt tokens of all requests, and their counters.
//!
//! Owns the tokens of each request that has not ended, and the totals. The totals count a token once, when it is final:
//! when its request has its first token, or ends without one. Before that a token can still be lost, and moves only
//! between the parts of its request. So no correction ever subtracts from a counter, and exported values only grow. A
//! scrape is exact for all finished prompts, and does not contain the others.

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

/// The reason why a request ended without a first token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[non_exhaustive]
pub enum EndReason {
    /// Its client disconnected, or the engine dropped it.
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
    /// The totals contain its tokens.
    settled: bool,
}

/// The token accounting of an engine. `R` is the engine's name for a request.
///
/// Calls about unknown requests, such as ended ones, do nothing: late calls are normal.
#[derive(Debug)]
pub struct Ledger<R> {
    requests: HashMap<R, Entry>,
    /// All final tokens. The counters below grow together with it.
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
    /// An empty ledger.
    pub fn new() -> Self {
        let mut ledger = Self::default();
        // Every series exists from the start with value 0: a rate over a series that appears later misses its first step.
        ledger.count(&Parts::default());
        for outcome in ["first_token", "aborted", "failed"] {
            ledger.prompts.get_or_create(&OutcomeLabels { outcome }).inc_by(0);
        }
        ledger
    }

    /// Exports the counters. All but the last count tokens:
    ///
    /// - `kvferry_prompt_tokens_total{source}`: final prompt tokens by `source`: `computed`, `local_cache`, `external`,
    ///   and `none` for tokens that the request never had before it ended. They add up to the prompts.
    /// - `kvferry_prompt_tokens_recomputed_total{was,by}`: the part of `computed` that had been a hit or a load (`was`:
    ///   `local_cache`, `external`), was lost, and was computed again, `by` the request itself (`own`) or by a request that
    ///   shares the blocks (`other`). `by="own"` is the work that losses caused in this engine.
    /// - `kvferry_prefill_tokens_total`: prompt tokens that ran through the model, with those that were discarded or ran
    ///   again after a preemption. Counted when they run.
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

    /// Adds a request. If another request of this name has not ended, it is aborted first.
    pub fn admit(&mut self, request: R, prompt_tokens: u64) {
        self.ended(&request, EndReason::Aborted);
        self.requests.insert(request, Entry { tokens: PromptTokens::new(prompt_tokens), settled: false });
    }

    /// See [`PromptTokens::lookup`]. Also call it after a preemption, and when a load is repeated.
    pub fn lookup(&mut self, request: &R, local: u64, external: u64) {
        self.with(request, |t| t.lookup(local, external));
    }

    /// See [`PromptTokens::load_ended`]. The report of lost blocks may come before or after it.
    pub fn load_ended(&mut self, request: &R) {
        self.with(request, PromptTokens::load_ended);
    }

    /// See [`PromptTokens::lost`]. [`apply`](Self::apply) calls it for every affected request. An engine calls it itself to
    /// discard tokens: for instance, the last token of a full hit must run to give logits.
    pub fn lost(&mut self, request: &R, from: u64) {
        self.with(request, |t| t.lost(from));
    }

    /// The request's tokens up to `to` were computed and are valid.
    pub fn computed(&mut self, request: &R, to: u64) {
        if let Some(e) = self.requests.get_mut(request) {
            let before = e.tokens.held();
            e.tokens.computed(to);
            self.prefilled.inc_by(e.tokens.held() - before);
        }
    }

    /// This many tokens after the held ones ran and were discarded. [`apply`](Self::apply) calls it.
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

    /// The request has its first token, so the tokens of its prompt are final. The ledger keeps the request until its end:
    /// tokens that run again after a preemption count in `kvferry_prefill_tokens_total`.
    pub fn first_token(&mut self, request: &R) {
        let Some(e) = self.requests.get_mut(request).filter(|e| !e.settled) else { return };
        e.settled = true;
        let parts = e.tokens.parts();
        self.settle(&parts, "first_token");
    }

    /// The request has ended. Without a first token, the tokens of its prompt become final in their current state.
    pub fn ended(&mut self, request: &R, reason: EndReason) {
        if let Some(e) = self.requests.remove(request).filter(|e| !e.settled) {
            self.settle(
                &e.tokens.parts(),
                match reason {
                    EndReason::Aborted => "aborted",
                    EndReason::Failed => "failed",
                },
            );
        }
    }

    /// Applies the outcome of a report: lost tokens, discarded tokens, and failed requests.
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
            self.ended(&f.id, EndReason::Failed);
        }
    }

    /// A request's tokens by current source.
    pub fn request(&self, request: &R) -> Option<Parts> {
        Some(self.requests.get(request)?.tokens.parts())
    }

    /// All final tokens by source. [`Parts::older`] is the older form.
    pub fn totals(&self) -> Parts {
        self.totals
    }

    /// Prompt tokens that ran through the model, with discarded and repeated ones.
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
    fn tokens_are_exported_when_they_are_final_and_no_counter_decreases() {
        let (mut ledger, mut registry) = (Ledger::new(), Registry::default());
        ledger.register(&mut registry);
        let mut last = scrape(&registry);
        assert_eq!(last.len(), 4 + 4 + 1 + 3, "every series exists from the start: {last:?}");
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
        // Later calls do not change counted tokens.
        ledger.preempted(&"a");
        ledger.lookup(&"a", 0, 0);
        ledger.computed(&"a", 100);
        ledger.first_token(&"a");
        ledger.ended(&"a", EndReason::Failed);
        ledger.ended(&"a", EndReason::Failed);
        assert_eq!(step(&ledger), [68, 16, 16, 0]);
        assert_eq!(ledger.prefilled(), (90 - 32) + (100 - 80) + 100);
        // An aborted request is counted in its current state.
        ledger.admit("b", 50);
        ledger.lookup(&"b", 16, 16);
        ledger.admit("b", 10);
        assert_eq!(step(&ledger), [68, 32, 16, 34]);
    }

    #[test]
    fn calls_about_an_unknown_request_do_nothing() {
        let mut ledger: Ledger<u64> = Ledger::new();
        ledger.lookup(&1, 5, 5);
        ledger.load_ended(&1);
        ledger.lost(&1, 0);
        ledger.computed(&1, 5);
        ledger.discarded(&1, 5);
        ledger.adopted(&1, 5);
        ledger.preempted(&1);
        ledger.first_token(&1);
        ledger.ended(&1, EndReason::Aborted);
        assert_eq!((ledger.totals(), ledger.prefilled(), ledger.request(&1)), (Parts::default(), 0, None));
    }
}
