//! Admission, turns, blocks for the next tokens, and loads.

use std::collections::HashMap;

use kvferry::{
    Block,
    scheduler::{
        table::{Held, Keeps},
        turn::turns,
    },
};

use super::{Check, Engine, request::Req};
use crate::history::Event;

impl Engine {
    pub(super) fn take_turns(&mut self, budget: &mut u64) -> Check {
        let views: Vec<_> = self.running.iter().map(Req::view).collect();
        let turns = turns(&self.groups, &views);
        must!(turns.len() == views.len(), "a request has no turn");
        must!(
            turns.is_empty() || turns.iter().any(|t| t.may_run()) || views.iter().any(|v| v.loading),
            "no request may run: {turns:?}"
        );
        for (r, t) in self.running.iter_mut().zip(&turns) {
            if r.load.is_none() && t.computed > r.held.total() {
                self.histories.note(r.id, r.held.total(), t.computed, Event::Other);
                self.ledger.adopted(&r.id, t.computed);
                r.held.adopt(t.computed);
            }
        }
        for t in &turns {
            let Some(i) = self.running.iter().position(|r| r.id == t.id) else { continue };
            let r = &self.running[i];
            let end = t.limit.unwrap_or(u64::MAX).min(r.known());
            if r.load.is_some() || !t.may_run() {
                continue;
            }
            if self.retry(i, end) {
                continue;
            }
            let (r, from) = (&self.running[i], self.running[i].held.total());
            let to = end.min(from + *budget);
            if to <= from {
                continue;
            }
            let mut id = Some(r.id);
            while let Some(at) = id.and_then(|id| self.running.iter().position(|r| r.id == id))
                && !self.make_room(at, from, to)
            {
                let victim = self.running.len() - 1;
                if !self.late.is_empty() || victim == 0 {
                    id = None;
                } else {
                    self.preempt(victim);
                }
            }
            if let Some(r) = self.running.iter_mut().find(|r| Some(r.id) == id) {
                r.scheduled = to - from;
                *budget -= to - from;
                self.cache_blocks(t.id);
            }
        }
        Ok(())
    }

    /// Pulls the tokens that a load did not bring again, into blocks that the request owns.
    pub(super) fn retry(&mut self, i: usize, end: u64) -> bool {
        let r = &mut self.running[i];
        let (from, to) = (r.held.total(), r.a.external.min(r.prompt() - 1).min(end));
        if !r.a.retry || r.retried || r.held.computed > 0 || to <= from || r.held.cached == from {
            return false;
        }
        r.retried = true;
        let id = r.id;
        r.held = Held { cached: from, loaded: to - from, computed: 0 };
        if !self.begin_load(i, from, to) {
            self.running[i].held = Held { cached: from, loaded: 0, computed: 0 };
            return false;
        }
        self.ledger.lookup(&id, from, to - from);
        self.histories.note(id, from, to, Event::Promised);
        true
    }

    /// Starts an asynchronous load of tokens `from..to`.
    pub(super) fn begin_load(&mut self, i: usize, from: u64, to: u64) -> bool {
        let Some(todo) = self.load_blocks(i, from, to) else { return false };
        for (g, p) in &todo {
            let b = self.running[i].block(*g, *p).unwrap();
            self.pools[*g].slab(b).failed = false;
        }
        self.running[i].load = Some(todo.into());
        true
    }

    /// Allocates and returns the blocks for a load of tokens `from..to`, prefix first.
    pub(super) fn load_blocks(&mut self, i: usize, from: u64, to: u64) -> Option<Vec<(usize, u64)>> {
        let mut todo = Vec::new();
        for g in 0..self.groups.len() {
            let n = self.tokens(g);
            let first = match self.groups[g].keeps {
                Keeps::All => from,
                Keeps::Window(w) => from.max(to.saturating_sub(w - 1)),
                Keeps::State => to - 1,
            };
            todo.extend((first / n..to.div_ceil(n)).map(|p| (g, p)));
        }
        todo.sort_by_key(|(g, p)| (p * self.tokens(*g), *g));
        self.fill_table(i, &todo).then_some(todo)
    }

    pub(super) fn make_room(&mut self, i: usize, from: u64, to: u64) -> bool {
        let need: Vec<_> = (0..self.groups.len())
            .flat_map(|g| (from / self.tokens(g)..to.div_ceil(self.tokens(g))).map(move |p| (g, p)))
            .collect();
        self.fill_table(i, &need)
    }

    /// Allocates all missing blocks at these positions, or none.
    pub(super) fn fill_table(&mut self, i: usize, need: &[(usize, u64)]) -> bool {
        let r = &mut self.running[i];
        let missing: Vec<_> = need.iter().copied().filter(|&(g, p)| r.block(g, p).is_none()).collect();
        let enough = |g: usize| missing.iter().filter(|m| m.0 == g).count() <= self.pools[g].free();
        if !(0..self.pools.len()).all(enough) {
            return false;
        }
        for (g, p) in missing {
            if r.tables[g].len() <= p as usize {
                r.tables[g].resize(p as usize + 1, None);
            }
            r.tables[g][p as usize] = self.pools[g].alloc();
        }
        true
    }

    pub(super) fn admit(&mut self, budget: &mut u64) {
        while self.running.len() < 6
            && *budget > 0
            && let Some(mut r) = self.waiting.pop_front()
        {
            let most = (r.known() - 1) / self.unit * self.unit;
            let hit = if r.a.skip_cache { 0 } else { self.look_up(&mut r, most) };
            r.held = Held { cached: hit, loaded: 0, computed: 0 };
            let sharing = r.a.share_load && self.share_load(&mut r, most);
            let to = if sharing || self.healthy { hit } else { r.a.external.min(r.prompt() - 1).max(hit) };
            let (id, asynchronous) = (r.id, r.a.asynchronous);
            r.fresh = true;
            self.running.push(r);
            let i = self.running.len() - 1;
            let from = hit;
            let room = if to > from && asynchronous {
                self.running[i].held.loaded = to - from;
                self.begin_load(i, from, to)
            } else if sharing {
                true
            } else {
                let n = (*budget).min(self.running[i].known() - to);
                let sync = if to > from { self.load_blocks(i, from, to) } else { Some(Vec::new()) };
                match sync {
                    Some(sync) if self.make_room(i, to, to + n) => {
                        let r = &mut self.running[i];
                        r.held.loaded = to - from;
                        r.sync = sync;
                        r.scheduled = n;
                        *budget -= n;
                        true
                    }
                    _ => false,
                }
            };
            if !room {
                // It waits for room. Nothing was counted yet.
                let mut r = self.running.pop().unwrap();
                self.release(&mut r);
                r.sync.clear();
                self.waiting.push_front(r);
                return;
            }
            self.ledger.lookup(&id, hit, to - hit);
            self.histories.note(id, 0, hit, Event::Hit);
            self.histories.note(id, hit, to, Event::Promised);
            self.cache_blocks(id);
        }
    }

    /// Takes the longest cached prefix, and returns its length.
    pub(super) fn look_up(&mut self, r: &mut Req, most: u64) -> u64 {
        let mut hit = most;
        while hit > 0 {
            let mut found = Vec::new();
            for g in 0..self.groups.len() {
                let n = self.tokens(g);
                let first = match self.groups[g].keeps {
                    Keeps::All => 0,
                    Keeps::Window(w) => hit.saturating_sub(w - 1) / n,
                    Keeps::State => hit / n - 1,
                };
                for p in first..hit / n {
                    let key = r.stamp((p + 1) * n - 1);
                    found.push((g, p, self.pools[g].find(key, (r.id as usize >> (p % 3)) + p as usize)));
                }
            }
            if found.iter().all(|f| f.2.is_some()) {
                for g in 0..self.groups.len() {
                    r.tables[g] = vec![None; (hit / self.tokens(g)) as usize];
                }
                for (g, p, b) in found {
                    self.pools[g].retain(b.unwrap());
                    r.tables[g][p as usize] = b;
                }
                return hit;
            }
            hit -= self.unit;
        }
        0
    }

    /// Shares the blocks after its hit with a request whose load brings them.
    pub(super) fn share_load(&mut self, r: &mut Req, most: u64) -> bool {
        if self.groups.iter().any(|g| g.keeps != Keeps::All) {
            return false;
        }
        let from = r.held.cached;
        let common = |o: &Req| if o.a.family == r.a.family { o.a.shared.min(r.a.shared) } else { 0 };
        let end = |o: &Req| o.held.loaded_end().min(common(o)).min(most) / self.unit * self.unit;
        let other = self.running.iter().find(|o| o.load.is_some() && o.held.cached <= from && end(o) > from);
        let Some(other) = other else { return false };
        let to = end(other);
        for g in 0..self.groups.len() {
            let n = u64::from(self.groups[g].block_tokens.get());
            for p in from / n..to / n {
                let b = other.block(g, p);
                self.pools[g].retain(b.unwrap());
                r.tables[g].push(b);
            }
        }
        true
    }

    /// Caches the blocks that will be full at the end of the step: other requests may find them in the same step.
    pub(super) fn cache_blocks(&mut self, id: u32) {
        let Some(r) = self.running.iter().find(|r| r.id == id && r.load.is_none()) else { return };
        for (g, table) in r.tables.iter().enumerate() {
            let n = u64::from(self.groups[g].block_tokens.get());
            for (p, b) in table.iter().enumerate() {
                let end = (p as u64 + 1) * n;
                if let Some(b) = b
                    && end <= r.ran_to()
                {
                    self.pools[g].cache(*b, r.stamp(end - 1));
                }
            }
        }
    }

    /// No block is computed by two requests, or while a load writes it, or (with one group) if another request has it.
    pub(super) fn check_schedule(&self) -> Check {
        let mut writers: HashMap<Block, u32> = HashMap::new();
        for r in &self.running {
            for g in 0..self.groups.len() {
                let n = self.tokens(g);
                for p in r.held.total() / n..r.ran_to().div_ceil(n) {
                    if r.scheduled == 0 || r.load.is_some() {
                        continue;
                    }
                    let b = r.block(g, p).ok_or("computes where there is no block")?;
                    let block = self.name(g, b);
                    if let Some(other) = writers.insert(block, r.id) {
                        return Err(format!("{block:?} is computed by {other} and {}", r.id));
                    }
                    for o in self.running.iter().filter(|o| o.id != r.id && o.block(g, p) == Some(b)) {
                        let promised = o.load.is_some() && (o.held.cached..o.held.loaded_end()).contains(&(p * n));
                        must!(!promised, "{} computes {block:?} while the load of {} writes it", r.id, o.id);
                        let has = o.load.is_none() && !o.fresh && o.held.total() > p * n;
                        must!(!has || self.groups.len() > 1, "{} computes {block:?}, which {} has", r.id, o.id);
                    }
                }
            }
        }
        Ok(())
    }
}
