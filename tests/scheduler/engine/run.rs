//! The step itself: blocks arrive, and the model runs.

use kvferry::{Block, scheduler::table::Keeps};

use super::{Engine, request::Req};

impl Engine {
    /// Whether the past tokens that a group needs at `token` are valid.
    pub(super) fn past(&self, r: &Req, g: usize, token: u64) -> bool {
        let first = match self.groups[g].keeps {
            Keeps::All => 0,
            Keeps::Window(w) => token.saturating_sub(w - 1),
            Keeps::State => token.saturating_sub(1),
        };
        (first..token).all(|t| self.is_valid(r, g, t))
    }

    pub(super) fn is_valid(&self, r: &Req, g: usize, t: u64) -> bool {
        let n = self.tokens(g);
        r.block(g, t / n)
            .is_some_and(|b| self.pools[g].blocks[b.0 as usize].slots[(t % n) as usize] == Some(r.stamp(t)))
    }

    /// Loads and computes the tokens of the step. Returns the blocks that did not arrive.
    pub(super) fn run_model(&mut self) -> Result<Vec<Block>, String> {
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
            self.histories.prefilled += to.min(r.prompt()).saturating_sub(from);
            for t in from..to {
                let r = &self.running[i];
                let valid = (0..self.groups.len()).all(|g| self.past(r, g, t));
                let stamp = valid.then(|| r.stamp(t));
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

    pub(super) fn arrive_block(&mut self, i: usize, nth: usize, g: usize, p: u64, failures: &mut Vec<Block>) {
        let n = self.tokens(g);
        let r = &mut self.running[i];
        let Some(b) = r.block(g, p) else { return };
        let slab = &mut self.pools[g].blocks[b.0 as usize];
        if r.fails(nth) && !self.healthy {
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

    /// Brings the next blocks of every running load.
    pub(super) fn move_loads(&mut self, failures: &mut Vec<Block>, blocks: usize) {
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
}
