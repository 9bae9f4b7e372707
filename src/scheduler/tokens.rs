//! Where the tokens of one prompt came from.
//!
//! Every token has exactly one state, kept by position in runs, and every count is a sum over them: parts are disjoint,
//! unsigned and add up because nothing else can be written down. There is no counter to correct, and so none to forget.
//!
//! A token's source is the dearest that was ever paid for it: a preempted request that finds its own blocks again in the
//! prefix cache has computed them nevertheless. What turns out never to have arrived was not paid.

use super::sabotage::{Bug, planted};

/// Where a lost token had seemed to come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Was {
    LocalCache,
    External,
}

/// How a token was had, cheapest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Had {
    LocalCache,
    External,
    /// Lost, and computed again by a request that shares it.
    Other(Was),
    /// Computed by the request itself; again, if it had been lost.
    Own(Option<Was>),
}

/// What is known of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Token {
    /// Before the last preemption.
    before: Option<Had>,
    /// Since then.
    now: Option<Had>,
    /// Set from when it is lost until it is had again.
    lost: Option<Was>,
}

impl Token {
    fn had(self) -> Option<Had> {
        self.before.max(self.now)
    }

    fn get(&mut self, had: Had) {
        self.now = Some(had);
        self.lost = None;
    }
}

/// Tokens that were lost and computed again, by what they had seemed to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Recomputed {
    /// They had been found in the local prefix cache, in blocks whose load failed.
    pub local_cache: u64,
    /// They had been expected from a load.
    pub external: u64,
}

impl Recomputed {
    /// Both.
    pub fn total(&self) -> u64 {
        self.local_cache + self.external
    }
}

/// A prompt's tokens by source: seven disjoint parts that add up to the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Parts {
    /// Computed by the request itself, and never had otherwise.
    pub first: u64,
    /// Lost, and computed again by the request itself.
    pub own: Recomputed,
    /// Lost, and computed again by another request that shares the blocks.
    pub other: Recomputed,
    /// Found in the local prefix cache.
    pub local_cache: u64,
    /// Brought by a load.
    pub external: u64,
    /// Not had yet; at the end of a request, never had (it was aborted or failed first).
    pub pending: u64,
}

impl Parts {
    /// Source `computed`: computed here, by whichever request.
    pub fn computed(&self) -> u64 {
        self.first + self.own.total() + self.other.total()
    }

    /// Computed after they were lost, by whichever request. A part of [`Parts::computed`].
    pub fn recomputed(&self) -> u64 {
        self.own.total() + self.other.total()
    }

    /// Tokens that were had: `computed + local_cache + external`.
    pub fn total(&self) -> u64 {
        self.computed() + self.local_cache + self.external
    }

    /// All tokens of the prompt: `total + pending`.
    pub fn prompt(&self) -> u64 {
        self.total() + self.pending
    }

    /// The older form.
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

    /// The sum of two.
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

/// The form in which hits are counted as they were looked up and `recomputed` takes back what was lost. Derived, never
/// stored:
///
/// - `computed + local_cache_hit + external_kv_transfer - recomputed = total`
/// - `local_cache_hit + external_kv_transfer - recomputed = cached`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Older {
    /// Tokens computed here.
    pub computed: u64,
    /// Tokens found in the local prefix cache, lost ones too.
    pub local_cache_hit: u64,
    /// Tokens expected from loads, lost ones too.
    pub external_kv_transfer: u64,
    /// Tokens that were a hit or a load, were lost, and were computed after all.
    pub recomputed: u64,
    /// Tokens that nobody had to compute.
    pub cached: u64,
    /// All tokens that were had.
    pub total: u64,
}

/// The tokens of one prompt, through the whole life of its request. Positions past the prompt (generated tokens) are
/// nobody's concern here: every call may name them, and they are left out.
#[derive(Debug, Clone)]
pub struct PromptTokens {
    /// Where each run ends, and the state of its tokens; ascending, neighbours differ, the last ends with the prompt.
    runs: Vec<(u64, Token)>,
    /// Tokens from the start whose KV is there.
    held: u64,
    /// Tokens behind `held` that a load promises.
    promised: u64,
}

impl PromptTokens {
    /// A prompt of this many tokens, of which nothing is there.
    pub fn new(prompt: u64) -> Self {
        let runs = if prompt == 0 { Vec::new() } else { vec![(prompt, Token::default())] };
        Self { runs, held: 0, promised: 0 }
    }

    /// Tokens of the prompt.
    pub fn prompt(&self) -> u64 {
        self.runs.last().map_or(0, |r| r.0)
    }

    /// Tokens from the start whose KV is there. Without what a load promises.
    pub fn held(&self) -> u64 {
        self.held
    }

    /// Tokens behind what is held and what a load promises.
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
            let part = match t.had() {
                None if t.lost.is_some() && planted(Bug::CountedWhenLost) => &mut p.own.external,
                None => &mut p.pending,
                Some(Had::LocalCache) => &mut p.local_cache,
                Some(Had::External) => &mut p.external,
                Some(Had::Other(Was::LocalCache)) => &mut p.other.local_cache,
                Some(Had::Other(Was::External)) => &mut p.other.external,
                Some(Had::Own(None)) => &mut p.first,
                Some(Had::Own(Some(Was::LocalCache))) => &mut p.own.local_cache,
                Some(Had::Own(Some(Was::External))) => &mut p.own.external,
            };
            *part += n;
        }
        p
    }

    /// A look-up: the prefix cache has the first `local` tokens, and a load is to bring `external` more behind them (or
    /// behind what is held, if that is more). The load's tokens count when it has ended.
    pub fn lookup(&mut self, local: u64, external: u64) {
        let local = local.min(self.prompt());
        self.each(self.held, local, |t| t.get(Had::LocalCache));
        self.held = self.held.max(local);
        self.promised = external.min(self.prompt() - self.held);
    }

    /// The load has ended: what it promised and was not [lost](Self::lost) is there. Without a load, nothing happens.
    pub fn load_ended(&mut self) {
        let to = self.held + self.promised;
        self.each(self.held, to, |t| t.get(Had::External));
        self.held = to;
        self.promised = 0;
    }

    /// Nothing from token `from` on can be counted on: it was not there when it seemed to be, and a load under way will
    /// not bring it. Said again, it changes nothing.
    pub fn lost(&mut self, from: u64) {
        let held = self.held;
        self.each(from, held, |t| {
            if planted(Bug::Saturates) && t.now == Some(Had::LocalCache) {
                return;
            }
            t.lost = match t.now.take() {
                Some(Had::LocalCache) => Some(Was::LocalCache),
                Some(Had::External) => Some(Was::External),
                Some(Had::Other(was)) => Some(was),
                Some(Had::Own(was)) => was,
                None => t.lost,
            }
        });
        self.each(from.max(held), held + self.promised, |t| t.lost = Some(Was::External));
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
        self.advance(to, |t| t.get(Had::Own(t.lost)));
    }

    /// A sharer has filled the blocks up to `to`, and the request goes on behind them.
    pub fn adopted(&mut self, to: u64) {
        self.advance(to, |t| t.get(t.lost.map_or(Had::LocalCache, Had::Other)));
    }

    /// The request's blocks are taken away. What was paid for its tokens stays paid.
    pub fn preempted(&mut self) {
        let prompt = self.prompt();
        self.each(0, prompt, |t| {
            t.before = t.had();
            t.now = None;
        });
        self.held = 0;
        self.promised = 0;
    }

    fn advance(&mut self, to: u64, f: impl Fn(&mut Token)) {
        let to = to.min(self.prompt());
        if to > self.held {
            self.each(self.held, to, f);
            // Whoever computes does not wait for a load.
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
    fn a_load_that_fails_in_part_moves_its_tokens_and_no_others() {
        let mut t = PromptTokens::new(100);
        t.lookup(32, 48);
        assert_eq!(parts(&t), [0, 0, 0, 32, 0, 68], "a promise is not a token");
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
    fn it_does_not_matter_whether_the_loss_is_told_before_or_after_the_end_of_the_load() {
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
    fn what_a_sharer_computes_counts_as_computed_by_another() {
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
        assert_eq!(parts(&t), [14, 0, 0, 16, 0, 10], "it has computed tokens 16..24 nevertheless");
        t.computed(40);
        assert_eq!(parts(&t), [24, 0, 0, 16, 0, 0]);
    }

    #[test]
    fn a_loss_is_remembered_over_a_preemption_until_the_tokens_are_had() {
        let mut t = PromptTokens::new(40);
        t.lookup(0, 32);
        t.lost(8);
        t.preempted();
        t.lookup(16, 0);
        t.computed(40);
        assert_eq!(parts(&t), [8, 16, 0, 16, 0, 0], "8..16 were found in the cache, 16..32 had to be computed");
    }

    #[test]
    fn the_last_token_of_a_full_hit_runs_nevertheless() {
        let mut t = PromptTokens::new(32);
        t.lookup(32, 0);
        t.lost(31);
        t.computed(32);
        let o = t.parts().older();
        assert_eq!((o.computed, o.local_cache_hit, o.recomputed, o.cached, o.total), (1, 32, 1, 31, 32));
    }

    #[test]
    fn no_call_makes_more_tokens_than_the_prompt_has() {
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
