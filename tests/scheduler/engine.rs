//! A small engine on stamped blocks: paged pools, a prefix cache with shared blocks, sync and async loads, loads that
//! are shared while under way, chunked scheduling, preemption, aborts, retries, progressive, repeated and late reports.
//!
//! It asks the library what to do, and after each step it looks into the blocks to see whether that was right.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use kvferry::{
    Block, BlockId, Cause, GroupId,
    scheduler::{
        invalid::{Outcome, Policy, Report, resolve},
        ledger::{End, Ledger},
        table::{GroupSpec, Held, Keeps, Request},
        tokens::Parts,
        turn::turns,
    },
};

use crate::{
    books::{Books, Event},
    pool::{Pool, Stamp},
};

/// What is wrong, in words.
pub(crate) type Check = Result<(), String>;

macro_rules! must {
    ($cond:expr, $($arg:tt)*) => { if !$cond { return Err(format!($($arg)*)); } };
}

#[derive(Debug, Clone)]
pub(crate) struct Arrival {
    /// Requests of a family have a common prefix of `shared` tokens.
    pub family: u32,
    pub shared: u64,
    pub tail: u64,
    /// Tokens to generate.
    pub out: u64,
    /// Tokens that a prefill engine has.
    pub external: u64,
    pub asynchronous: bool,
    /// Does not look into the prefix cache (and so makes second copies of blocks).
    pub skip_cache: bool,
    /// Shares loads under way.
    pub share_load: bool,
    /// Tries a failed load once more.
    pub retry: bool,
    /// Which blocks of its loads fail; all of them: the whole load, without a word about blocks.
    pub fails: u16,
}

#[derive(Debug, Clone)]
pub(crate) enum Op {
    Arrive(Arrival),
    /// Runs `budget` tokens. `noise` adds reports of blocks that have nothing to do with it, `late` holds the true ones
    /// back for a step.
    Step {
        budget: u64,
        noise: u8,
        late: bool,
    },
    Abort(u8),
    Preempt(u8),
    /// Puts a running request first, as a scheduler with priorities does.
    Promote(u8),
}

struct Req {
    id: u32,
    a: Arrival,
    made: u64,
    tables: Vec<Vec<Option<BlockId>>>,
    held: Held,
    /// Blocks that its load has yet to bring, or `None` without a load under way.
    load: Option<VecDeque<(usize, u64)>>,
    /// Blocks that its load brings in this step.
    sync: Vec<(usize, u64)>,
    load_failed: bool,
    scheduled: u64,
    settled: bool,
    retried: bool,
    /// Admitted in this step: it may count on what others compute in it.
    fresh: bool,
}

impl Req {
    fn prompt(&self) -> u64 {
        self.a.shared + self.a.tail
    }

    fn known(&self) -> u64 {
        self.prompt() + self.made
    }

    fn stamp(&self, token: u64) -> Stamp {
        if token < self.a.shared { (self.a.family, token) } else { (1000 + self.id, token) }
    }

    fn view(&self) -> Request<'_, u32> {
        Request {
            id: self.id,
            blocks: &self.tables,
            held: self.held,
            loading: self.load.is_some(),
            scheduled: self.scheduled,
        }
    }

    fn ran_to(&self) -> u64 {
        self.held.total() + self.scheduled
    }

    fn block(&self, g: usize, p: u64) -> Option<BlockId> {
        self.tables[g].get(p as usize).copied().flatten()
    }

    fn fails(&self, nth: usize) -> bool {
        self.a.fails >> (nth % 16) & 1 == 1
    }
}

pub(crate) struct Engine {
    groups: Vec<GroupSpec>,
    unit: u64,
    policy: Policy,
    pools: Vec<Pool>,
    running: Vec<Req>,
    waiting: VecDeque<Req>,
    next: u32,
    /// Reports held back.
    late: Vec<Block>,
    /// Blocks of loads that ended with their request.
    ghosts: Vec<Block>,
    reported: Vec<Block>,
    calm: bool,
    pub ledger: Ledger<u32>,
    books: Books,
    totals: Parts,
    pub failed: u64,
}

pub(crate) fn layout(n: u8) -> Vec<GroupSpec> {
    let spec = |id, tokens, keeps| GroupSpec::new(GroupId(id), tokens, keeps).unwrap();
    match n {
        0 => vec![spec(0, 4, Keeps::All)],
        1 => vec![spec(0, 4, Keeps::All), spec(1, 2, Keeps::All)],
        2 => vec![spec(0, 4, Keeps::All), spec(1, 2, Keeps::Window(5))],
        _ => vec![spec(3, 2, Keeps::All), spec(7, 4, Keeps::State)],
    }
}

impl Engine {
    pub(crate) fn new(groups: Vec<GroupSpec>, policy: Policy) -> Self {
        let tokens = |g: &GroupSpec| u64::from(g.block_tokens.get());
        Self {
            unit: groups.iter().map(tokens).max().unwrap(),
            // Enough for the largest request, and for two or three of the usual ones.
            pools: groups.iter().map(|g| Pool::new(56 / g.block_tokens.get(), tokens(g))).collect(),
            groups,
            policy,
            running: Vec::new(),
            waiting: VecDeque::new(),
            next: 0,
            late: Vec::new(),
            ghosts: Vec::new(),
            reported: Vec::new(),
            calm: false,
            ledger: Ledger::new(),
            books: Books::default(),
            totals: Parts::default(),
            failed: 0,
        }
    }

    pub(crate) fn run(&mut self, ops: &[Op]) -> Check {
        for op in ops {
            match op {
                Op::Arrive(a) => self.arrive(a.clone()),
                Op::Step { budget, noise, late } => self.step(*budget, *noise, *late)?,
                // Whoever may have computed on rubbish that is not reported yet stays until it is.
                Op::Abort(_) | Op::Preempt(_) if !self.late.is_empty() => {}
                Op::Abort(n) => self.abort(*n),
                Op::Preempt(n) if !self.running.is_empty() => self.preempt(usize::from(*n) % self.running.len()),
                Op::Promote(n) if !self.running.is_empty() => {
                    let n = usize::from(*n) % self.running.len();
                    self.running[..=n].rotate_right(1);
                }
                Op::Preempt(_) | Op::Promote(_) => {}
            }
            self.check_books()?;
        }
        // No more failures: everyone who is left must get to his end.
        self.calm = true;
        for _ in 0..300 {
            if self.running.is_empty() && self.waiting.is_empty() {
                return self.check_end();
            }
            self.step(24, 0, false)?;
            self.check_books()?;
        }
        Err("requests are stuck".into())
    }

    fn tokens(&self, g: usize) -> u64 {
        u64::from(self.groups[g].block_tokens.get())
    }

    fn name(&self, g: usize, id: BlockId) -> Block {
        Block { group: self.groups[g].id, id }
    }

    fn arrive(&mut self, a: Arrival) {
        let id = self.next;
        self.next += 1;
        let tables = vec![Vec::new(); self.groups.len()];
        let r = Req {
            id,
            a,
            made: 0,
            tables,
            held: Held::default(),
            load: None,
            sync: Vec::new(),
            load_failed: false,
            scheduled: 0,
            settled: false,
            retried: false,
            fresh: false,
        };
        self.ledger.admit(id, r.prompt());
        self.books.admit(id, r.prompt());
        self.waiting.push_back(r);
    }

    fn abort(&mut self, n: u8) {
        let all = self.running.len() + self.waiting.len();
        if all == 0 {
            return;
        }
        let n = usize::from(n) % all;
        let mut r = if n < self.running.len() {
            self.running.remove(n)
        } else {
            self.waiting.remove(n - self.running.len()).unwrap()
        };
        self.let_go(&mut r);
        self.ledger.ended(&r.id, End::Aborted);
        self.books.settle(r.id);
    }

    fn preempt(&mut self, n: usize) {
        let mut r = self.running.remove(n);
        self.let_go(&mut r);
        self.ledger.preempted(&r.id);
        self.books.note(r.id, 0, u64::MAX, Event::Preempted);
        self.waiting.push_front(r);
    }

    /// Gives its blocks back. A load under way is stopped, and what it would have failed to bring is still reported.
    fn let_go(&mut self, r: &mut Req) {
        for (g, p) in r.load.take().unwrap_or_default() {
            if let Some(b) = r.block(g, p) {
                self.ghosts.push(self.name(g, b));
            }
        }
        for (g, table) in r.tables.iter_mut().enumerate() {
            // Last block first: the prefix stays in the cache longest.
            for b in table.drain(..).rev().flatten() {
                self.pools[g].release(b);
            }
        }
        r.held = Held::default();
        r.scheduled = 0;
        r.load_failed = false;
        r.retried = false;
    }

    // ---- scheduling

    fn step(&mut self, mut budget: u64, noise: u8, late: bool) -> Check {
        self.take_turns(&mut budget)?;
        self.admit(&mut budget);
        self.check_schedule()?;
        let mut failures = self.run_model()?;
        self.move_loads(&mut failures, usize::from(noise % 3) + 1);
        self.report(failures, noise, late)?;
        self.count();
        self.running.iter_mut().for_each(|r| r.fresh = false);
        self.check_blocks()
    }

    fn take_turns(&mut self, budget: &mut u64) -> Check {
        let views: Vec<_> = self.running.iter().map(Req::view).collect();
        let turns = turns(&self.groups, &views);
        must!(turns.len() == views.len(), "a request has no turn");
        must!(
            turns.is_empty() || turns.iter().any(|t| t.may_run()) || views.iter().any(|v| v.loading),
            "nobody may run: {turns:?}"
        );
        for (r, t) in self.running.iter_mut().zip(&turns) {
            if r.load.is_none() && t.computed > r.held.total() {
                self.books.note(r.id, r.held.total(), t.computed, Event::Other);
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

    /// Pulls once more what a load did not bring, into blocks that are the request's to fill.
    fn retry(&mut self, i: usize, end: u64) -> bool {
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
        self.books.note(id, from, to, Event::Promised);
        true
    }

    /// Sets an asynchronous load of tokens `from..to` going.
    fn begin_load(&mut self, i: usize, from: u64, to: u64) -> bool {
        let Some(todo) = self.load_blocks(i, from, to) else { return false };
        for (g, p) in &todo {
            let b = self.running[i].block(*g, *p).unwrap();
            self.pools[*g].slab(b).failed = false;
        }
        self.running[i].load = Some(todo.into());
        true
    }

    /// The blocks that a load of tokens `from..to` brings, allocated where they are not there yet; prefix first.
    fn load_blocks(&mut self, i: usize, from: u64, to: u64) -> Option<Vec<(usize, u64)>> {
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

    fn make_room(&mut self, i: usize, from: u64, to: u64) -> bool {
        let need: Vec<_> = (0..self.groups.len())
            .flat_map(|g| (from / self.tokens(g)..to.div_ceil(self.tokens(g))).map(move |p| (g, p)))
            .collect();
        self.fill_table(i, &need)
    }

    /// Allocates what is missing at these positions, all or nothing.
    fn fill_table(&mut self, i: usize, need: &[(usize, u64)]) -> bool {
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

    fn admit(&mut self, budget: &mut u64) {
        while self.running.len() < 6
            && *budget > 0
            && let Some(mut r) = self.waiting.pop_front()
        {
            let most = (r.known() - 1) / self.unit * self.unit;
            let hit = if r.a.skip_cache { 0 } else { self.look_up(&mut r, most) };
            r.held = Held { cached: hit, loaded: 0, computed: 0 };
            let sharing = r.a.share_load && self.share_load(&mut r, most);
            let to = if sharing || self.calm { hit } else { r.a.external.min(r.prompt() - 1).max(hit) };
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
                // Not its time yet; nothing was counted.
                let mut r = self.running.pop().unwrap();
                self.let_go(&mut r);
                r.sync.clear();
                self.waiting.push_front(r);
                return;
            }
            self.ledger.lookup(&id, hit, to - hit);
            self.books.note(id, 0, hit, Event::Hit);
            self.books.note(id, hit, to, Event::Promised);
            self.cache_blocks(id);
        }
    }

    /// Takes the longest prefix that the cache has, and returns its length.
    fn look_up(&mut self, r: &mut Req, most: u64) -> u64 {
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

    /// Takes the blocks behind its hit from a request whose load brings them.
    fn share_load(&mut self, r: &mut Req, most: u64) -> bool {
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

    /// Puts what will be full at the end of the step into the prefix cache: others may find it in this very step.
    fn cache_blocks(&mut self, id: u32) {
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

    /// No block is computed by two requests, nor computed while a load writes it; where a request stands alone in the
    /// way of one that has the block, it takes it over.
    fn check_schedule(&self) -> Check {
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

    // ---- running

    /// Whether what a group needs of the past at `token` is really there.
    fn past(&self, r: &Req, g: usize, token: u64) -> bool {
        let first = match self.groups[g].keeps {
            Keeps::All => 0,
            Keeps::Window(w) => token.saturating_sub(w - 1),
            Keeps::State => token.saturating_sub(1),
        };
        (first..token).all(|t| self.is_there(r, g, t))
    }

    fn is_there(&self, r: &Req, g: usize, t: u64) -> bool {
        let n = self.tokens(g);
        r.block(g, t / n)
            .is_some_and(|b| self.pools[g].blocks[b.0 as usize].slots[(t % n) as usize] == Some(r.stamp(t)))
    }

    /// Loads and computes what the step was to; returns the blocks that did not arrive.
    fn run_model(&mut self) -> Result<Vec<Block>, String> {
        let mut failures = Vec::new();
        for i in 0..self.running.len() {
            let sync = std::mem::take(&mut self.running[i].sync);
            for (nth, (g, p)) in sync.into_iter().enumerate() {
                self.arrive_block(i, nth, g, p, &mut failures);
            }
        }
        for i in 0..self.running.len() {
            let (from, to) = (self.running[i].held.total(), self.running[i].ran_to());
            if self.running[i].load.is_some() {
                continue;
            }
            let r = &self.running[i];
            self.books.prefilled += to.min(r.prompt()).saturating_sub(from);
            for t in from..to {
                let r = &self.running[i];
                let good = (0..self.groups.len()).all(|g| self.past(r, g, t));
                let stamp = good.then(|| r.stamp(t));
                for g in 0..self.groups.len() {
                    let n = self.tokens(g);
                    let b = self.running[i].block(g, t / n).ok_or("computes where there is no block")?;
                    let slab = self.pools[g].slab(b);
                    slab.slots[(t % n) as usize] = stamp;
                    slab.failed = false;
                }
            }
        }
        Ok(failures)
    }

    fn arrive_block(&mut self, i: usize, nth: usize, g: usize, p: u64, failures: &mut Vec<Block>) {
        let n = self.tokens(g);
        let r = &mut self.running[i];
        let Some(b) = r.block(g, p) else { return };
        let slab = &mut self.pools[g].blocks[b.0 as usize];
        if r.fails(nth) && !self.calm {
            slab.slots.fill(None);
            slab.failed = true;
            if r.a.fails == u16::MAX {
                r.load_failed = true;
            } else {
                failures.push(Block { group: self.groups[g].id, id: b });
            }
            return;
        }
        slab.failed = false;
        for t in p * n..((p + 1) * n).min(r.held.loaded_end()) {
            slab.slots[(t % n) as usize] = Some(r.stamp(t));
        }
    }

    /// A few more blocks of every load under way.
    fn move_loads(&mut self, failures: &mut Vec<Block>, blocks: usize) {
        for i in 0..self.running.len() {
            for _ in 0..blocks {
                let Some(todo) = &mut self.running[i].load else { break };
                let nth = todo.len();
                if let Some((g, p)) = todo.pop_front() {
                    self.arrive_block(i, nth, g, p, failures);
                }
            }
        }
    }

    // ---- reports

    fn report(&mut self, mut failures: Vec<Block>, noise: u8, late: bool) -> Check {
        // What was held back in the step before comes now.
        let held_back = std::mem::take(&mut self.late);
        if late && self.running.iter().all(|r| !r.load_failed) {
            self.late = std::mem::take(&mut failures);
        }
        failures.extend(held_back);
        failures.append(&mut self.ghosts);
        if noise & 8 != 0 && !self.reported.is_empty() {
            failures.push(self.reported[usize::from(noise) % self.reported.len()]);
        }
        if noise & 16 != 0 {
            let g = usize::from(noise) % self.groups.len();
            // Half of them in the pool, half of them nowhere.
            failures.push(self.name(g, BlockId(u32::from(noise.rotate_left(3)) % (112 / self.tokens(g) as u32))));
        }
        self.reported.extend(&failures);
        let blocks: HashSet<Block> = failures.into_iter().collect();
        let requests: BTreeSet<u32> = self.running.iter().filter(|r| r.load_failed).map(|r| r.id).collect();
        let mut report = requests.iter().fold(Report::new(), |r, id| r.load_failed(*id, Cause::PeerDown));
        report.extend(blocks.iter().map(|b| (*b, Cause::Deadline)));
        let views: Vec<_> = self.running.iter().map(Req::view).collect();
        let outcome = resolve(&self.groups, &views, &report, self.policy);
        let again = resolve(&self.groups, &views, &report, self.policy);
        must!(outcome == again, "not a function");
        if self.late.is_empty() {
            self.check_outcome(&outcome, &blocks, &requests)?;
        }
        self.apply(outcome)
    }

    fn apply(&mut self, outcome: Outcome<u32>) -> Check {
        self.ledger.apply(&outcome);
        for b in &outcome.uncache {
            let g = self.groups.iter().position(|g| g.id == b.group).unwrap();
            if (b.id.0 as usize) < self.pools[g].blocks.len() {
                self.pools[g].uncache(b.id);
            }
        }
        for a in outcome.affected {
            let r = self.running.iter_mut().find(|r| r.id == a.id).unwrap();
            let (old, new) = (r.held, a.held);
            must!(
                [old.cached, old.loaded, old.computed]
                    == [new.cached + a.lost.cached, new.loaded + a.lost.loaded, new.computed + a.lost.computed],
                "what is kept and what is lost do not add up for {}: {old:?} {a:?}",
                a.id
            );
            self.books.note(r.id, new.total(), old.total(), Event::Lost);
            r.held = new;
            r.scheduled = 0;
            r.load_failed = false;
            // What is behind the new end need not come any more.
            if let Some(todo) = &mut r.load {
                todo.retain(|(g, p)| p * u64::from(self.groups[*g].block_tokens.get()) < new.total());
            }
        }
        for f in outcome.failed {
            let i = self.running.iter().position(|r| r.id == f.id).unwrap();
            let mut r = self.running.remove(i);
            self.books.note(r.id, f.held.total(), r.held.total(), Event::Lost);
            self.let_go(&mut r);
            self.books.settle(r.id);
            self.failed += 1;
        }
        Ok(())
    }

    /// Counts the step, ends loads, and lets requests go that are done.
    fn count(&mut self) {
        for i in 0..self.running.len() {
            let r = &mut self.running[i];
            let loads = r.load.is_some();
            if loads && r.load.as_ref().is_some_and(|l| !l.is_empty()) {
                continue;
            }
            r.load = None;
            r.load_failed = false;
            self.ledger.load_ended(&r.id);
            self.books.note(r.id, r.held.cached, r.held.loaded_end(), Event::Loaded);
            if loads {
                let id = r.id;
                self.cache_blocks(id);
                continue;
            }
            if r.scheduled > 0 {
                let to = r.ran_to();
                self.books.note(r.id, r.held.total(), to, Event::Own);
                self.ledger.computed(&r.id, to);
                r.held.computed += std::mem::take(&mut r.scheduled);
            }
        }
        // A token is given out when nothing can be wrong with it any more.
        for i in (0..self.running.len()).rev() {
            let r = &mut self.running[i];
            if !self.late.is_empty() || r.load.is_some() || r.held.total() < r.known() {
                continue;
            }
            r.made += 1;
            if !r.settled {
                r.settled = true;
                self.ledger.first_token(&r.id);
                self.books.settle(r.id);
            }
            if r.made > r.a.out {
                let mut r = self.running.remove(i);
                self.let_go(&mut r);
                self.ledger.ended(&r.id, End::Aborted);
            }
        }
    }
}

// ---- what must hold
impl Engine {
    /// The outcome, against one worked out from what is really in the blocks.
    fn check_outcome(&self, out: &Outcome<u32>, blocks: &HashSet<Block>, requests: &BTreeSet<u32>) -> Check {
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
                    if !(first..end).all(|t| self.is_there(r, g, t)) {
                        bad.insert(name);
                    }
                }
                if requests.contains(&r.id) && start + n > r.held.cached && start < r.held.loaded_end() {
                    bad.insert(name);
                }
            }
        }
        bad.extend(blocks.iter().copied().filter(|b| !computed_itself.contains(b)));
        // A false word about a block is believed, and so is what follows for what was computed on top of it.
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
                    let taken = start(b) >= first && start(b) < r.held.cached;
                    computed || taken && !computed_itself.contains(&self.name(b.0, b.2))
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
        must!(out.affected.is_empty() || self.policy == Policy::Recompute, "goes on under `fail`");
        must!(out.failed.is_empty() || self.policy == Policy::Fail, "fails under `recompute`");
        Ok(())
    }

    /// Every block that several need and nobody has is named once, with one owner, and everyone else as an heir.
    fn check_shared(&self, out: &Outcome<u32>) -> Check {
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
            must!(expected.remove(&s.block).as_ref() == Some(&named), "not who holds it: {s:?}");
        }
        must!(expected.is_empty(), "nobody is said to compute {expected:?}");
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

    /// No request counts on what is not there, and the prefix cache has nothing that is not what it says.
    fn check_blocks(&self) -> Check {
        if !self.late.is_empty() {
            return Ok(());
        }
        for r in &self.running {
            let to = if r.load.is_some() { r.held.cached } else { r.held.total() };
            for g in 0..self.groups.len() {
                must!(self.past(r, g, to), "{} counts on {to} tokens, group {g} has them not", r.id);
            }
        }
        for (g, pool) in self.pools.iter().enumerate() {
            for (b, slab) in pool.blocks.iter().enumerate() {
                let Some((text, last)) = slab.key else { continue };
                let n = slab.slots.len();
                let first = if self.groups[g].keeps == Keeps::State { n - 1 } else { 0 };
                let right = (first..n).all(|s| {
                    let t = last + 1 - (n - s) as u64;
                    // The text's own prefix may be a family's.
                    slab.slots[s].is_some_and(|(w, at)| at == t && (w == text || text >= 1000 && w < 1000))
                });
                must!(right, "block {b} of group {g} is cached as {:?} and holds {:?}", slab.key, slab.slots);
            }
        }
        Ok(())
    }

    fn check_books(&mut self) -> Check {
        for r in self.running.iter().chain(&self.waiting).filter(|r| !r.settled) {
            let parts = self.ledger.request(&r.id).ok_or("an open request is not in the books")?;
            must!(parts.prompt() == r.prompt(), "{}: {parts:?} do not add up to {}", r.id, r.prompt());
            let slow = self.books.parts(r.id).unwrap();
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
        must!(t == self.books.total, "counted {t:?}, but it was {:?}", self.books.total);
        let o = t.older();
        must!(
            o.computed + o.local_cache_hit + o.external_kv_transfer == o.total + o.recomputed
                && o.local_cache_hit + o.external_kv_transfer == o.cached + o.recomputed,
            "the older form does not add up: {o:?}"
        );
        let ran = (self.ledger.prefilled(), self.books.prefilled);
        must!(ran.0 == ran.1, "{} prompt tokens ran by the books, {} really", ran.0, ran.1);
        Ok(())
    }

    fn check_end(&self) -> Check {
        let leaked = self.pools.iter().flat_map(|p| &p.blocks).filter(|b| b.refs > 0).count();
        must!(leaked == 0, "{leaked} blocks are still held");
        Ok(())
    }
}
