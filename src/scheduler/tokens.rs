//! The source of each token of one prompt.
//!
//! Every token has exactly one state, stored by position in runs, and every count is a sum over the states. So the parts
//! are disjoint and unsigned, and add up by construction. No counter ever needs a correction.
//!
//! A token's source is the most expensive one that it ever had: a preempted request that finds its own blocks in the
//! prefix cache has still computed them. A source that turned out to be lost does not count.

use super::sabotage::{Bug, planted};

/// The source that a lost token seemed to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum LostSource {
    LocalCache,
    External,
}

/// The source of a token, cheapest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    LocalCache,
    External,
    /// Lost, and computed again by another request that shares the block.
    Other(LostSource),
    /// Computed by the request itself; `Some` if it had been lost before.
    Own(Option<LostSource>),
}

/// The state of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Token {
    /// The source before the last preemption.
    before: Option<Source>,
    /// The source since then.
    now: Option<Source>,
    /// Set when it is lost, and cleared when it has a source again.
    lost: Option<LostSource>,
}

impl Token {
    fn source(self) -> Option<Source> {
        self.before.max(self.now)
    }

    fn get(&mut self, source: Source) {
        self.now = Some(source);
        self.lost = None;
    }
}

/// Tokens that were lost and computed again, by the source that they seemed to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Recomputed {
    /// They had been found in the local prefix cache, in blocks whose load failed.
    pub local_cache: u64,
    /// They had been expected from a load.
    pub external: u64,
}

impl Recomputed {
    /// The sum.
    pub fn total(&self) -> u64 {
        self.local_cache + self.external
    }
}

/// A prompt's tokens by source: seven disjoint parts that add up to the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Parts {
    /// Computed by the request itself, without a loss before.
    pub first: u64,
    /// Lost, and computed again by the request itself.
    pub own: Recomputed,
    /// Lost, and computed again by another request that shares the blocks.
    pub other: Recomputed,
    /// Found in the local prefix cache.
    pub local_cache: u64,
    /// Brought by a load.
    pub external: u64,
    /// Without a source yet. At the end of a request: tokens that it never had.
    pub pending: u64,
}

impl Parts {
    /// Source `computed`: computed by any request here.
    pub fn computed(&self) -> u64 {
        self.first + self.own.total() + self.other.total()
    }

    /// Lost, and computed again by any request. A part of [`Parts::computed`].
    pub fn recomputed(&self) -> u64 {
        self.own.total() + self.other.total()
    }

    /// Tokens with a source: `computed + local_cache + external`.
    pub fn total(&self) -> u64 {
        self.computed() + self.local_cache + self.external
    }

    /// All tokens of the prompt: `total + pending`.
    pub fn prompt(&self) -> u64 {
        self.total() + self.pending
    }

    /// The same tokens in the older form.
    pub fn older(&self) -> Older {
        Older {
            computed: self.computed(),
            local_cache_hit: self.local_cache + self.own.local_cache + self.other.local_cache,
            external_kv_transfer: self.external + self.own.external + self.other.external,
            recomputed: self.recomputed(),
            cached: self.local_cache + self.external,
            total: self.total(),
        }
    }

    /// The sum of both.
    #[must_use]
    pub fn plus(&self, o: &Parts) -> Parts {
        let add = |a: Recomputed, b: Recomputed| Recomputed {
            local_cache: a.local_cache + b.local_cache,
            external: a.external + b.external,
        };
        Parts {
            first: self.first + o.first,
            own: add(self.own, o.own),
            other: add(self.other, o.other),
            local_cache: self.local_cache + o.local_cache,
            external: self.external + o.external,
            pending: self.pending + o.pending,
        }
    }
}

/// The form that counts all hits of the lookup, and corrects lost ones by `recomputed`. It is derived, and never stored:
///
/// - `computed + local_cache_hit + external_kv_transfer - recomputed = total`
/// - `local_cache_hit + external_kv_transfer - recomputed = cached`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Older {
    /// Tokens computed here.
    pub computed: u64,
    /// Tokens found in the local prefix cache, with lost ones.
    pub local_cache_hit: u64,
    /// Tokens expected from loads, with lost ones.
    pub external_kv_transfer: u64,
    /// Tokens that were a hit or a load, were lost, and were computed.
    pub recomputed: u64,
    /// Tokens that no request had to compute.
    pub cached: u64,
    /// All tokens with a source.
    pub total: u64,
}

/// The tokens of one prompt, through the whole life of its request. Calls may name positions after the prompt (generated
/// tokens), which are ignored.
#[derive(Debug, Clone)]
pub struct PromptTokens {
    /// The end of each run, and the state of its tokens. Ascending; neighbours differ; the last run ends with the prompt.
    runs: Vec<(u64, Token)>,
    /// Tokens from the start whose KV is present.
    held: u64,
    /// Tokens after `held` that a load promises.
    promised: u64,
}

impl PromptTokens {
    /// A prompt of this many tokens, without any KV.
    pub fn new(prompt: u64) -> Self {
        let runs = if prompt == 0 { Vec::new() } else { vec![(prompt, Token::default())] };
        Self { runs, held: 0, promised: 0 }
    }

    /// Tokens in the prompt.
    pub fn prompt(&self) -> u64 {
        self.runs.last().map_or(0, |r| r.0)
    }

    /// Tokens from the start whose KV is present, without those that a load promises.
    pub fn held(&self) -> u64 {
        self.held
    }

    /// Tokens that are neither held nor promised.
    pub fn missing(&self) -> u64 {
        self.prompt() - self.held - self.promised
    }

    /// The tokens by source.
    pub fn parts(&self) -> Parts {
        let mut p = Parts::default();
        let mut from = 0;
        for (to, t) in &self.runs {
            let n = to - from;
            from = *to;
            let part = match t.source() {
                None if t.lost.is_some() && planted(Bug::CountedWhenLost) => &mut p.own.external,
                None => &mut p.pending,
                Some(Source::LocalCache) => &mut p.local_cache,
                Some(Source::External) => &mut p.external,
                Some(Source::Other(LostSource::LocalCache)) => &mut p.other.local_cache,
                Some(Source::Other(LostSource::External)) => &mut p.other.external,
                Some(Source::Own(None)) => &mut p.first,
                Some(Source::Own(Some(LostSource::LocalCache))) => &mut p.own.local_cache,
                Some(Source::Own(Some(LostSource::External))) => &mut p.own.external,
            };
            *part += n;
        }
        p
    }

    /// A lookup: the prefix cache has the first `local` tokens, and a load will bring `external` more after them (or after
    /// the held tokens, if those are more). The load's tokens count after its end.
    pub fn lookup(&mut self, local: u64, external: u64) {
        let local = local.min(self.prompt());
        self.each(self.held, local, |t| t.get(Source::LocalCache));
        self.held = self.held.max(local);
        self.promised = external.min(self.prompt() - self.held);
    }

    /// The load has ended: the promised tokens that were not [lost](Self::lost) are held now. Does nothing without a load.
    pub fn load_ended(&mut self) {
        let to = self.held + self.promised;
        self.each(self.held, to, |t| t.get(Source::External));
        self.held = to;
        self.promised = 0;
    }

    /// The tokens from `from` on are lost: their KV is not in the blocks, and a running load will not bring it. A repeated
    /// call changes nothing.
    pub fn lost(&mut self, from: u64) {
        let held = self.held;
        self.each(from, held, |t| {
            if planted(Bug::Saturates) && t.now == Some(Source::LocalCache) {
                return;
            }
            t.lost = match t.now.take() {
                Some(Source::LocalCache) => Some(LostSource::LocalCache),
                Some(Source::External) => Some(LostSource::External),
                Some(Source::Other(was)) => Some(was),
                Some(Source::Own(was)) => was,
                None => t.lost,
            }
        });
        self.each(from.max(held), held + self.promised, |t| t.lost = Some(LostSource::External));
        let lost = (held + self.promised).saturating_sub(from);
        self.held = held.min(from);
        self.promised = if planted(Bug::Wraps) {
            self.promised.wrapping_sub(lost).min(self.prompt() - self.held)
        } else {
            self.promised - lost.min(self.promised)
        };
    }

    /// The request has computed its tokens up to `to`.
    pub fn computed(&mut self, to: u64) {
        self.advance(to, |t| t.get(Source::Own(t.lost)));
    }

    /// Another request has filled the blocks up to `to`, and this one adopts them.
    pub fn adopted(&mut self, to: u64) {
        self.advance(to, |t| t.get(t.lost.map_or(Source::LocalCache, Source::Other)));
    }

    /// The request loses its blocks. Its tokens keep the sources that they had.
    pub fn preempted(&mut self) {
        let prompt = self.prompt();
        self.each(0, prompt, |t| {
            t.before = t.source();
            t.now = None;
        });
        self.held = 0;
        self.promised = 0;
    }

    fn advance(&mut self, to: u64, f: impl Fn(&mut Token)) {
        let to = to.min(self.prompt());
        if to > self.held {
            self.each(self.held, to, f);
            // Computed tokens are not promised any more.
            self.promised = (self.held + self.promised).saturating_sub(to);
            self.held = to;
        }
    }

    /// Changes the tokens `from..to`.
    fn each(&mut self, from: u64, to: u64, f: impl Fn(&mut Token)) {
        let to = to.min(self.prompt());
        if from >= to {
            return;
        }
        let mut runs: Vec<(u64, Token)> = Vec::with_capacity(self.runs.len() + 2);
        let mut push = |end: u64, t: Token| match runs.last_mut() {
            Some(last) if last.1 == t => last.0 = end,
            _ => runs.push((end, t)),
        };
        let mut start = 0;
        for &(end, t) in &self.runs {
            let (a, b) = (from.clamp(start, end), to.clamp(start, end));
            if a > start {
                push(a, t);
            }
            if b > a {
                let mut changed = t;
                f(&mut changed);
                push(b, changed);
            }
            if end > b {
                push(end, t);
            }
            start = end;
        }
        self.runs = runs;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(t: &PromptTokens) -> [u64; 6] {
        let p = t.parts();
        assert_eq!(p.prompt(), t.prompt(), "{p:?}");
        [p.first, p.own.total(), p.other.total(), p.local_cache, p.external, p.pending]
    }

    #[test]
    fn a_partly_failed_load_moves_only_its_own_tokens() {
        let mut t = PromptTokens::new(100);
        t.lookup(32, 48);
        assert_eq!(parts(&t), [0, 0, 0, 32, 0, 68], "promised tokens do not count");
        t.lost(48);
        t.lost(64);
        t.load_ended();
        assert_eq!(parts(&t), [0, 0, 0, 32, 16, 52]);
        t.computed(100);
        assert_eq!(parts(&t), [20, 32, 0, 32, 16, 0]);
        let o = t.parts().older();
        assert_eq!((o.computed, o.local_cache_hit, o.external_kv_transfer, o.recomputed), (52, 32, 48, 32));
        assert_eq!((o.cached, o.total), (48, 100));
    }

    #[test]
    fn a_loss_may_be_reported_before_or_after_the_end_of_the_load() {
        let [mut a, mut b] = [PromptTokens::new(10), PromptTokens::new(10)];
        a.lookup(2, 6);
        b.lookup(2, 6);
        a.lost(1);
        a.load_ended();
        b.load_ended();
        b.lost(1);
        assert_eq!((a.parts(), a.held()), (b.parts(), b.held()));
        a.computed(10);
        b.computed(10);
        assert_eq!(a.parts(), b.parts());
        assert_eq!(a.parts().own, Recomputed { local_cache: 1, external: 6 });
    }

    #[test]
    fn tokens_computed_by_another_request_count_as_other() {
        let mut t = PromptTokens::new(50);
        t.lookup(32, 16);
        t.load_ended();
        t.lost(16);
        t.adopted(32);
        t.computed(50);
        assert_eq!(parts(&t), [2, 16, 16, 16, 0, 0]);
    }

    #[test]
    fn a_prefix_found_again_after_a_preemption_is_not_counted_twice() {
        let mut t = PromptTokens::new(40);
        t.lookup(16, 0);
        t.computed(30);
        t.preempted();
        t.lookup(24, 0);
        assert_eq!(parts(&t), [14, 0, 0, 16, 0, 10], "it has computed tokens 16..24 before");
        t.computed(40);
        assert_eq!(parts(&t), [24, 0, 0, 16, 0, 0]);
    }

    #[test]
    fn a_loss_is_remembered_across_a_preemption() {
        let mut t = PromptTokens::new(40);
        t.lookup(0, 32);
        t.lost(8);
        t.preempted();
        t.lookup(16, 0);
        t.computed(40);
        assert_eq!(parts(&t), [8, 16, 0, 16, 0, 0], "8..16 were found in the cache, and 16..32 were computed");
    }

    #[test]
    fn the_last_token_of_a_full_hit_counts_as_recomputed() {
        let mut t = PromptTokens::new(32);
        t.lookup(32, 0);
        t.lost(31);
        t.computed(32);
        let o = t.parts().older();
        assert_eq!((o.computed, o.local_cache_hit, o.recomputed, o.cached, o.total), (1, 32, 1, 31, 32));
    }

    #[test]
    fn no_call_counts_more_tokens_than_the_prompt_has() {
        let mut t = PromptTokens::new(10);
        t.lookup(u64::MAX, u64::MAX);
        t.lost(u64::MAX);
        t.load_ended();
        t.adopted(u64::MAX);
        t.lost(3);
        t.lookup(2, u64::MAX);
        t.computed(u64::MAX);
        assert_eq!(parts(&t), [0, 7, 0, 3, 0, 0]);
        let mut none = PromptTokens::new(0);
        none.lookup(5, 5);
        none.computed(9);
        assert_eq!(parts(&none), [0; 6]);
    }
}
