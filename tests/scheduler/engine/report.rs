//! Reports of lost blocks, their outcome, and the count of a step.

use std::collections::{BTreeSet, HashSet};

use kvferry::{
    Block, BlockId, Cause,
    scheduler::{
        invalid::{Outcome, Report, resolve},
        ledger::EndReason,
    },
};

use super::{Check, Engine, request::Req};
use crate::history::Event;

impl Engine {
    pub(super) fn report(&mut self, mut failures: Vec<Block>, noise: u8, late: bool) -> Check {
        // The delayed reports of the previous step come now.
        let delayed = std::mem::take(&mut self.late);
        if late && self.running.iter().all(|r| !r.load_failed) {
            self.late = std::mem::take(&mut failures);
        }
        failures.extend(delayed);
        failures.append(&mut self.stopped);
        if noise & 8 != 0 && !self.reported.is_empty() {
            failures.push(self.reported[usize::from(noise) % self.reported.len()]);
        }
        if noise & 16 != 0 {
            let g = usize::from(noise) % self.groups.len();
            // About half of them are outside of the pool.
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
        must!(outcome == again, "two calls with the same input differ");
        if self.late.is_empty() {
            self.check_outcome(&outcome, &blocks, &requests)?;
        }
        self.apply(outcome)
    }

    pub(super) fn apply(&mut self, outcome: Outcome<u32>) -> Check {
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
                "kept and lost tokens do not add up for {}: {old:?} {a:?}",
                a.id
            );
            self.histories.note(r.id, new.total(), old.total(), Event::Lost);
            r.held = new;
            r.scheduled = 0;
            r.load_failed = false;
            // Blocks after the new end are not needed any more.
            if let Some(todo) = &mut r.load {
                todo.retain(|(g, p)| p * u64::from(self.groups[*g].block_tokens.get()) < new.total());
            }
        }
        for f in outcome.failed {
            let i = self.running.iter().position(|r| r.id == f.id).unwrap();
            let mut r = self.running.remove(i);
            self.histories.note(r.id, f.held.total(), r.held.total(), Event::Lost);
            self.release(&mut r);
            self.histories.settle(r.id);
            self.failed += 1;
        }
        Ok(())
    }

    /// Counts the step, ends loads, and removes finished requests.
    pub(super) fn count(&mut self) {
        for i in 0..self.running.len() {
            let r = &mut self.running[i];
            let loads = r.load.is_some();
            if loads && r.load.as_ref().is_some_and(|l| !l.is_empty()) {
                continue;
            }
            r.load = None;
            r.load_failed = false;
            self.ledger.load_ended(&r.id);
            self.histories.note(r.id, r.held.cached, r.held.loaded_end(), Event::Loaded);
            if loads {
                let id = r.id;
                self.cache_blocks(id);
                continue;
            }
            if r.scheduled > 0 {
                let to = r.ran_to();
                self.histories.note(r.id, r.held.total(), to, Event::Own);
                self.ledger.computed(&r.id, to);
                r.held.computed += std::mem::take(&mut r.scheduled);
            }
        }
        // A token is emitted when no report can invalidate it any more.
        for i in (0..self.running.len()).rev() {
            let r = &mut self.running[i];
            if !self.late.is_empty() || r.load.is_some() || r.held.total() < r.known() {
                continue;
            }
            r.made += 1;
            if !r.settled {
                r.settled = true;
                self.ledger.first_token(&r.id);
                self.histories.settle(r.id);
            }
            if r.made > r.a.out {
                let mut r = self.running.remove(i);
                self.release(&mut r);
                self.ledger.ended(&r.id, EndReason::Aborted);
            }
        }
    }
}
