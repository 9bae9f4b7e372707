//! A small engine with stamped blocks: paged pools, a prefix cache with shared blocks, sync and async loads, shared loads,
//! chunked scheduling, preemption, aborts, retries, and progressive, repeated and late reports.
//!
//! It follows the library's decisions, and after each step it checks them against the content of the blocks.

macro_rules! must {
    ($cond:expr, $($arg:tt)*) => { if !$cond { return Err(format!($($arg)*)); } };
}

mod check;
mod report;
mod request;
mod run;
mod schedule;

use std::collections::VecDeque;

use kvferry::{
    Block, BlockId, GroupId,
    scheduler::{
        invalid::Policy,
        ledger::{EndReason, Ledger},
        table::{GroupSpec, Held, Keeps},
        tokens::Parts,
    },
};

pub(crate) use self::request::Arrival;
use self::request::Req;
use crate::{
    history::{Event, Histories},
    pool::Pool,
};

/// The error describes the broken property.
pub(crate) type Check = Result<(), String>;

#[derive(Debug, Clone)]
pub(crate) enum Op {
    Arrive(Arrival),
    /// Runs `budget` tokens. `noise` adds reports of unrelated blocks, `late` delays the true reports by one step.
    Step {
        budget: u64,
        noise: u8,
        late: bool,
    },
    Abort(u8),
    Preempt(u8),
    /// Moves a running request to the front, as a scheduler with priorities does.
    Promote(u8),
}

pub(crate) struct Engine {
    groups: Vec<GroupSpec>,
    unit: u64,
    policy: Policy,
    pools: Vec<Pool>,
    running: Vec<Req>,
    waiting: VecDeque<Req>,
    next: u32,
    /// Delayed reports.
    late: Vec<Block>,
    /// Missing blocks of loads that were stopped with their request.
    stopped: Vec<Block>,
    reported: Vec<Block>,
    /// No load fails any more.
    healthy: bool,
    pub ledger: Ledger<u32>,
    histories: Histories,
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
            // Enough for the largest request, or for two or three average ones.
            pools: groups.iter().map(|g| Pool::new(56 / g.block_tokens.get(), tokens(g))).collect(),
            groups,
            policy,
            running: Vec::new(),
            waiting: VecDeque::new(),
            next: 0,
            late: Vec::new(),
            stopped: Vec::new(),
            reported: Vec::new(),
            healthy: false,
            ledger: Ledger::new(),
            histories: Histories::default(),
            totals: Parts::default(),
            failed: 0,
        }
    }

    pub(crate) fn run(&mut self, ops: &[Op]) -> Check {
        for op in ops {
            match op {
                Op::Arrive(a) => self.arrive(a.clone()),
                Op::Step { budget, noise, late } => self.step(*budget, *noise, *late)?,
                // Requests that may have computed on unreported lost blocks stay until the report.
                Op::Abort(_) | Op::Preempt(_) if !self.late.is_empty() => {}
                Op::Abort(n) => self.abort(*n),
                Op::Preempt(n) if !self.running.is_empty() => self.preempt(usize::from(*n) % self.running.len()),
                Op::Promote(n) if !self.running.is_empty() => {
                    let n = usize::from(*n) % self.running.len();
                    self.running[..=n].rotate_right(1);
                }
                Op::Preempt(_) | Op::Promote(_) => {}
            }
            self.check_counts()?;
        }
        // Without further failures, all remaining requests must finish.
        self.healthy = true;
        for _ in 0..300 {
            if self.running.is_empty() && self.waiting.is_empty() {
                return self.check_end();
            }
            self.step(24, 0, false)?;
            self.check_counts()?;
        }
        Err("requests are stuck".into())
    }

    pub(super) fn tokens(&self, g: usize) -> u64 {
        u64::from(self.groups[g].block_tokens.get())
    }

    pub(super) fn name(&self, g: usize, id: BlockId) -> Block {
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
        self.histories.admit(id, r.prompt());
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
        self.release(&mut r);
        self.ledger.ended(&r.id, EndReason::Aborted);
        self.histories.settle(r.id);
    }

    pub(super) fn preempt(&mut self, n: usize) {
        let mut r = self.running.remove(n);
        self.release(&mut r);
        self.ledger.preempted(&r.id);
        self.histories.note(r.id, 0, u64::MAX, Event::Preempted);
        self.waiting.push_front(r);
    }

    /// Releases a request's blocks. A running load is stopped, and its missing blocks are still reported.
    pub(super) fn release(&mut self, r: &mut Req) {
        for (g, p) in r.load.take().unwrap_or_default() {
            if let Some(b) = r.block(g, p) {
                self.stopped.push(self.name(g, b));
            }
        }
        for (g, table) in r.tables.iter_mut().enumerate() {
            // Last block first, so that the prefix stays in the cache longest.
            for b in table.drain(..).rev().flatten() {
                self.pools[g].release(b);
            }
        }
        r.held = Held::default();
        r.scheduled = 0;
        r.load_failed = false;
        r.retried = false;
    }

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
}
