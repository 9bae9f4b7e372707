//! The requests of a step: turns, admission, preemption.

use kvferry::{
    BlockId, HoldState,
    scheduler::{
        ledger::EndReason,
        table::Held,
        turn::{Turn, turns},
    },
};

use super::Engine;
use crate::{
    api::Times,
    kv::BLOCK,
    request::{Id, Req},
};

const TOKENS: u64 = BLOCK as u64;

impl Engine {
    /// Gives each request its turn. Returns the rest of the step's token budget.
    pub(super) fn take_turns(&mut self) -> u64 {
        let mut budget = self.settings.budget;
        let views: Vec<_> = self.running.iter().map(Req::view).collect();
        let mut turns = turns(&self.groups, &views);
        for (r, t) in self.running.iter_mut().zip(&turns) {
            if r.load.is_none() && t.computed > r.held.total() {
                self.ledger.adopted(&r.id, t.computed);
                self.counts.had(r.id, t.computed);
                r.held.adopt(t.computed);
            }
        }
        // Requests without a client can be removed now: others have adopted their blocks.
        for i in (0..self.running.len()).rev() {
            if self.running[i].gone && self.running[i].load.is_none() {
                let r = self.running.remove(i);
                self.close(r, EndReason::Aborted);
            }
        }
        // Requests that generate get their token first, so that a long prompt does not delay them.
        turns.sort_by_key(|t| self.index(t.id).is_none_or(|i| self.running[i].known() - t.computed > 1));
        for t in &turns {
            self.take_turn(t, &mut budget);
        }
        budget
    }

    fn index(&self, id: Id) -> Option<usize> {
        self.running.iter().position(|r| r.id == id)
    }

    fn take_turn(&mut self, t: &Turn<Id>, budget: &mut u64) {
        let Some(i) = self.index(t.id).filter(|i| self.running[*i].load.is_none() && t.may_run()) else { return };
        let end = t.limit.unwrap_or(u64::MAX).min(self.running[i].known());
        if self.load(i, end, budget) {
            return;
        }
        let from = self.running[i].held.total();
        let to = end.min(from + *budget);
        if to <= from {
            return;
        }
        // The newest request is preempted, even if it is this one.
        while let Some(i) = self.index(t.id)
            && !self.make_room(i, to)
        {
            let victim = self.running.iter().rposition(|r| r.load.is_none() && !r.gone);
            match victim.filter(|v| *v != i || self.running.len() > 1) {
                Some(v) => self.preempt(v),
                // Offers hold the blocks, and will be freed.
                None => return,
            }
        }
        if let Some(i) = self.index(t.id) {
            self.schedule(i, to - from, budget);
        }
    }

    pub(super) fn schedule(&mut self, i: usize, tokens: u64, budget: &mut u64) {
        self.running[i].scheduled = tokens;
        *budget = budget.saturating_sub(tokens);
        self.cache_blocks(i);
    }

    /// Caches the blocks that will be full at the end of the step. Other requests may find them in the same step, since the
    /// model stores all KV of a layer before it reads any.
    pub(super) fn cache_blocks(&mut self, i: usize) {
        let r = &mut self.running[i];
        r.update_keys();
        if r.load.is_some() {
            return;
        }
        let full = (r.ran_to() / TOKENS) as usize;
        for (b, key) in r.tables[0].iter().zip(&r.keys).take(full) {
            if let Some(b) = b {
                self.blocks.cache(*b, *key);
            }
        }
    }

    /// Allocates all missing blocks for the first `to` tokens, or none.
    fn make_room(&mut self, i: usize, to: u64) -> bool {
        let table = &mut self.running[i].tables[0];
        let more = (to.div_ceil(TOKENS) as usize).saturating_sub(table.len());
        match self.blocks.alloc_all(more) {
            Some(new) => {
                table.extend(new.into_iter().map(Some));
                true
            }
            None => false,
        }
    }

    fn preempt(&mut self, i: usize) {
        let mut r = self.running.remove(i);
        // It will not fill these blocks in this step.
        if r.scheduled > 0 {
            let unfilled = r.tables[0].iter().skip((r.held.total() / TOKENS) as usize).flatten();
            unfilled.for_each(|b| self.blocks.uncache(*b));
        }
        self.withdraw(&mut r);
        self.release(&mut r);
        self.ledger.preempted(&r.id);
        self.counts.preemptions.inc();
        self.waiting.push_front(r);
    }

    /// Admits requests while there is room for all of their known tokens. A request whose prompt waits in another engine's queue
    /// gets no blocks yet: the other engine might wait for blocks that this engine's requests hold there.
    pub(super) fn admit(&mut self, mut budget: u64) {
        // A request with a running load holds blocks, but does not run.
        let loading = |running: &[Req]| running.iter().filter(|r| r.load.is_some()).count();
        while self.running.len() - loading(&self.running) < self.settings.running
            && loading(&self.running) < self.settings.loading
            && let Some(next) = self.waiting.iter().position(Req::is_ready)
            && (budget > 0 || self.waiting[next].job.offer.is_some())
            && let Some(mut r) = self.waiting.remove(next)
        {
            if r.hold.take().is_some_and(|h| h.state() == HoldState::Ended) {
                // The other engine does not offer the prompt: a pull would hold blocks for nothing.
                self.release_offer(&mut r);
            }
            r.update_keys();
            let hit = self.look_up(&mut r);
            let shares = self.share(&mut r);
            let need = (r.known().div_ceil(TOKENS) as usize) - r.table().len();
            let Some(new) = self.blocks.alloc_all(need) else {
                // It waits for room. Nothing was counted yet.
                self.release(&mut r);
                self.waiting.insert(next, r);
                return;
            };
            r.tables[0].extend(new.into_iter().map(Some));
            r.held = Held { cached: hit, loaded: 0, computed: 0 };
            self.ledger.lookup(&r.id, hit, 0);
            self.counts.had(r.id, hit);
            r.times.admitted = Times::now();
            self.running.push(r);
            let i = self.running.len() - 1;
            let known = self.running[i].known();
            if !shares && !self.load(i, known, &mut budget) && budget > 0 {
                self.schedule(i, budget.min(known - hit), &mut budget);
            }
        }
    }

    /// Takes the longest cached prefix, and returns its tokens.
    fn look_up(&mut self, r: &mut Req) -> u64 {
        let most = (r.longest_hit() / TOKENS) as usize;
        let found: Vec<BlockId> = r.keys.iter().take(most).map_while(|k| self.blocks.find(k)).collect();
        found.iter().for_each(|b| self.blocks.retain(*b));
        r.tables[0] = found.into_iter().map(Some).collect();
        r.table().len() as u64 * TOKENS
    }

    /// Shares the blocks after its hit with a request that loads or computes the same text, and then waits for it. A request
    /// that has an offer waits only for another request's load, not for a computation. These blocks are not cached yet, so
    /// that no request counts on them.
    ///
    /// No request waits for the load of an offer that grows: its own prompt may be complete much earlier.
    fn share(&mut self, r: &mut Req) -> bool {
        let from = r.table().len();
        let most = (r.longest_hit() / TOKENS) as usize;
        let common = |o: &Req| {
            let keys = o.keys.iter().zip(&r.keys).take(most).take_while(|(a, b)| a == b).count();
            keys.min(o.table().len())
        };
        let loads = r.job.offer.is_some();
        let waits = |o: &Req| if o.load.is_some() { !o.job.awaited } else { !loads };
        let best = self.running.iter().filter(|o| !o.gone && waits(o)).max_by_key(|o| common(o));
        let Some(o) = best.filter(|o| common(o) > from) else { return false };
        let shared: Vec<_> = o.table()[from..common(o)].to_vec();
        shared.iter().flatten().for_each(|b| self.blocks.retain(*b));
        r.tables[0].extend(shared);
        true
    }
}
