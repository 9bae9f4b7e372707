//! The properties that must hold after each step.

use std::collections::{BTreeSet, HashMap, HashSet};

use kvferry::{
    Block, BlockId,
    scheduler::{
        invalid::{Outcome, Policy},
        table::Keeps,
        tokens::Parts,
    },
};

use super::{Check, Engine, request::Req};

impl Engine {
    /// Compares the outcome with one that is computed from the content of the blocks.
    pub(super) fn check_outcome(&self, out: &Outcome<u32>, blocks: &HashSet<Block>, requests: &BTreeSet<u32>) -> Check {
        let mut bad = HashSet::new();
        let each = |r: &Req| {
            let held: Vec<_> = (0..self.groups.len())
                .flat_map(|g| r.tables[g].iter().enumerate().map(move |(p, b)| (g, p as u64, *b)))
                .filter_map(|(g, p, b)| Some((g, p, b?)))
                .collect();
            held
        };
        let mut computed_itself = HashSet::new();
        for r in &self.running {
            for (g, p, b) in each(r) {
                let (n, name) = (self.tokens(g), self.name(g, b));
                let start = p * n;
                if start >= r.ran_to() {
                    continue;
                }
                if r.load.is_some() {
                    if self.pools[g].blocks[b.0 as usize].failed {
                        bad.insert(name);
                    }
                } else {
                    if start >= r.held.loaded_end() {
                        computed_itself.insert(name);
                    }
                    let end = (start + n).min(r.ran_to());
                    let first = if self.groups[g].keeps == Keeps::State { end - 1 } else { start };
                    if !(first..end).all(|t| self.is_valid(r, g, t)) {
                        bad.insert(name);
                    }
                }
                if requests.contains(&r.id) && start + n > r.held.cached && start < r.held.loaded_end() {
                    bad.insert(name);
                }
            }
        }
        bad.extend(blocks.iter().copied().filter(|b| !computed_itself.contains(b)));
        // A false report of a block counts too, with its effect on the blocks that were computed on top of it.
        let start = |(g, p, _): &(usize, u64, BlockId)| p * self.tokens(*g);
        loop {
            let before = bad.len();
            for r in self.running.iter().filter(|r| r.load.is_none()) {
                let ran = || each(r).into_iter().filter(|b| start(b) < r.ran_to());
                let first = ran().filter(|(g, _, b)| bad.contains(&self.name(*g, *b))).map(|b| start(&b)).min();
                let Some(first) = first else { continue };
                let on_top = ran().filter(|b| {
                    let computed = (start(b)..start(b) + self.tokens(b.0))
                        .any(|t| t >= first && t >= r.held.loaded_end() && t < r.ran_to());
                    let adopted = start(b) >= first && start(b) < r.held.cached;
                    computed || adopted && !computed_itself.contains(&self.name(b.0, b.2))
                });
                bad.extend(on_top.map(|(g, _, b)| self.name(g, b)).collect::<Vec<_>>());
            }
            if bad.len() == before {
                break;
            }
        }
        for r in &self.running {
            let first = each(r).into_iter().filter(|(g, _, b)| bad.contains(&self.name(*g, *b)));
            let first = first.map(|(g, p, _)| p * self.tokens(g)).filter(|start| *start < r.ran_to()).min();
            let new = out.affected.iter().find(|a| a.id == r.id).map(|a| a.held);
            let new = new.or_else(|| out.failed.iter().find(|f| f.id == r.id).map(|f| f.held));
            let Some(first) = first else {
                must!(new.is_none(), "{} lost nothing, and is cut to {new:?}", r.id);
                continue;
            };
            let mut to = first.min(r.held.total());
            if (self.groups.len() > 1) && first < r.held.loaded_end() {
                to = to.min(r.held.cached);
            }
            to -= to % self.unit;
            let good =
                |g: usize, t: u64| r.block(g, t / self.tokens(g)).is_some_and(|b| !bad.contains(&self.name(g, b)));
            let fits = |to: u64| {
                (0..self.groups.len()).all(|g| match self.groups[g].keeps {
                    Keeps::All => (0..to).all(|t| good(g, t)),
                    Keeps::Window(w) => (to.saturating_sub(w - 1)..to).all(|t| good(g, t)),
                    Keeps::State => to == 0 || good(g, to - 1),
                })
            };
            while !fits(to) {
                to -= self.unit;
            }
            must!(
                new.map(|h| h.total()) == Some(to),
                "{} must be cut to {to} for the loss at {first}, not to {new:?} ({:?} + {})",
                r.id,
                r.held,
                r.scheduled
            );
        }
        if !(blocks.is_empty() && requests.is_empty()) {
            self.check_shared(out)?;
        }
        must!(out.affected.is_empty() || self.policy == Policy::Recompute, "requests continue under `fail`");
        must!(out.failed.is_empty() || self.policy == Policy::Fail, "requests fail under `recompute`");
        Ok(())
    }

    /// Every missing block that several requests hold is named once, with one owner and all others as heirs.
    pub(super) fn check_shared(&self, out: &Outcome<u32>) -> Check {
        let alive: Vec<_> = self.running.iter().filter(|r| !out.failed.iter().any(|f| f.id == r.id)).collect();
        let length = |r: &Req| {
            let held = out.affected.iter().find(|a| a.id == r.id).map(|a| a.held);
            match (held, r.load.is_some()) {
                (held, true) => held.unwrap_or(r.held).cached,
                (Some(held), false) => held.total(),
                (None, false) => r.ran_to(),
            }
        };
        let mut expected: HashMap<Block, BTreeSet<u32>> = HashMap::new();
        for (g, n) in (0..self.groups.len()).map(|g| (g, self.tokens(g))) {
            for b in (0..self.pools[g].blocks.len() as u32).map(BlockId) {
                let holds =
                    |r: &&Req| r.tables[g].iter().position(|h| *h == Some(b)).map(|p| (r.id, length(r), p as u64 * n));
                let holders: Vec<_> = alive.iter().filter_map(holds).collect();
                if holders.len() > 1 && holders.iter().all(|(_, length, start)| *length < start + n) {
                    expected.insert(self.name(g, b), holders.iter().map(|h| h.0).collect());
                }
            }
        }
        for s in &out.shared {
            let named: BTreeSet<u32> = s.heirs.iter().copied().chain([s.owner]).collect();
            must!(named.len() == s.heirs.len() + 1, "named twice: {s:?}");
            must!(expected.remove(&s.block).as_ref() == Some(&named), "these are not its holders: {s:?}");
        }
        must!(expected.is_empty(), "no owner for {expected:?}");
        if let [spec] = self.groups[..] {
            for a in out.affected.iter().filter(|a| alive.iter().any(|r| r.id == a.id && r.load.is_none())) {
                let r = alive.iter().find(|r| r.id == a.id).unwrap();
                let next = r.block(0, a.held.total() / self.tokens(0));
                let shared = out.shared.iter().find(|s| Some(s.block.id) == next && s.block.group == spec.id);
                let owner = shared.map(|s| s.owner).filter(|o| *o != a.id);
                must!(a.waits_for == owner, "{a:?} waits, but the owner is {owner:?}");
            }
        }
        Ok(())
    }

    /// Requests count only on valid tokens, and the content of every cached block fits its key.
    pub(super) fn check_blocks(&self) -> Check {
        if !self.late.is_empty() {
            return Ok(());
        }
        for r in &self.running {
            let to = if r.load.is_some() { r.held.cached } else { r.held.total() };
            for g in 0..self.groups.len() {
                must!(self.past(r, g, to), "{} counts on {to} tokens, but group {g} does not have them", r.id);
            }
        }
        for (g, pool) in self.pools.iter().enumerate() {
            for (b, slab) in pool.blocks.iter().enumerate() {
                let Some((text, last)) = slab.key else { continue };
                let n = slab.slots.len();
                let first = if self.groups[g].keeps == Keeps::State { n - 1 } else { 0 };
                let right = (first..n).all(|s| {
                    let t = last + 1 - (n - s) as u64;
                    // The prefix of a text may belong to its family.
                    slab.slots[s].is_some_and(|(w, at)| at == t && (w == text || text >= 1000 && w < 1000))
                });
                must!(right, "block {b} of group {g} is cached as {:?} and holds {:?}", slab.key, slab.slots);
            }
        }
        Ok(())
    }

    pub(super) fn check_counts(&mut self) -> Check {
        for r in self.running.iter().chain(&self.waiting).filter(|r| !r.settled) {
            let parts = self.ledger.request(&r.id).ok_or("an open request is not in the ledger")?;
            must!(parts.prompt() == r.prompt(), "{}: {parts:?} do not add up to {}", r.id, r.prompt());
            let slow = self.histories.parts(r.id).unwrap();
            must!(parts == slow, "{}: {parts:?}, but it was {slow:?}", r.id);
        }
        let t = self.ledger.totals();
        let list = |p: &Parts| {
            let (a, b) = (p.own, p.other);
            let again = [a.local_cache, a.external, b.local_cache, b.external];
            [[p.first, p.local_cache, p.external, p.pending], again].concat()
        };
        let grew = list(&t).iter().zip(list(&self.totals)).all(|(new, old)| *new >= old);
        must!(grew, "a counter went down: {:?}, then {t:?}", self.totals);
        self.totals = t;
        must!(t == self.histories.total, "counted {t:?}, but it was {:?}", self.histories.total);
        let o = t.older();
        must!(
            o.computed + o.local_cache_hit + o.external_kv_transfer == o.total + o.recomputed
                && o.local_cache_hit + o.external_kv_transfer == o.cached + o.recomputed,
            "the older form does not add up: {o:?}"
        );
        let ran = (self.ledger.prefilled(), self.histories.prefilled);
        must!(ran.0 == ran.1, "the ledger counted {} prompt tokens that ran, but it was {}", ran.0, ran.1);
        Ok(())
    }

    pub(super) fn check_end(&self) -> Check {
        let leaked = self.pools.iter().flat_map(|p| &p.blocks).filter(|b| b.refs > 0).count();
        must!(leaked == 0, "{leaked} blocks are still held");
        Ok(())
    }
}
