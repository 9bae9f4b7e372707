//! Pulls, and the outcome of blocks that did not arrive.

use std::{collections::HashSet, sync::mpsc::RecvTimeoutError, time::Duration};

use kvferry::{
    Block, BlockId, Cause, Consumer, Ended, GroupId, LocalBlocks, Offer, Pull,
    scheduler::{
        invalid::{Outcome, Report, resolve},
        ledger::EndReason,
        table::Held,
    },
};

use super::Engine;
use crate::{
    api::{Times, fingerprints},
    kv::BLOCK,
    request::{Id, Load, Refusal, Req},
};

const TOKENS: u64 = BLOCK as u64;

/// Releases an offer that is not pulled. A malformed one cannot be released: it ends with its lease.
pub(super) fn give_back(consumer: &Consumer, offer: &Offer) {
    if let Err(e) = consumer.release(offer) {
        tracing::warn!(offer = %offer.id, "an offer is not released: {e}");
    }
}

impl Engine {
    /// Starts a pull of the request's offer from the held tokens up to `end`. `true` if the request needs nothing else in
    /// this step.
    pub(super) fn load(&mut self, i: usize, end: u64, budget: &mut u64) -> bool {
        let r = &mut self.running[i];
        let (from, to) = (r.held.total(), r.external().min(end));
        let Some(consumer) = self.link.consumer.as_ref().filter(|_| r.job.offer.is_some()) else { return false };
        let Some(offer) = r.job.offer.take() else { return false };
        // Less than a block is not worth a pull, and a block that was begun here is continued here.
        if to < from + TOKENS || r.held.computed > 0 || !from.is_multiple_of(TOKENS) {
            give_back(consumer, &offer);
            return false;
        }
        let first = (from / TOKENS) as usize;
        let blocks = r.table()[first..to.div_ceil(TOKENS) as usize].to_vec();
        r.held = Held { cached: from, loaded: to - from, computed: 0 };
        self.ledger.lookup(&r.id, from, to - from);
        self.counts.asked.inc_by(to - from);
        let wanted = LocalBlocks { group: GroupId(0), first_position: first as u32, blocks };
        let from_engine = offer.engine.clone();
        let mut pull = Pull::new(offer.clone(), vec![wanted]).expect(fingerprints(&r.job.prompt));
        pull = match r.job.awaited {
            true => pull.awaited().deadline(self.settings.awaited),
            false => pull.deadline(self.settings.deadline),
        };
        let started = Times::now();
        let pull = match consumer.pull(pull) {
            Ok(pull) => {
                self.pulls.insert(pull, (r.id, from_engine));
                Some(pull)
            }
            Err(e) => {
                tracing::warn!(request = %r.job.name, "a pull could not be started: {e}");
                // Otherwise its peer would wait for the end of the lease.
                give_back(consumer, &offer);
                self.refused.push((r.id, e.cause()));
                None
            }
        };
        if self.settings.sync_loads {
            // It counts on the load at once, and so may other requests.
            let (known, total) = (r.known(), r.held.total());
            let tokens = (known - total).min(*budget);
            self.schedule(i, tokens, budget);
        } else {
            r.load = Some(Load { pull, started, ended: false });
        }
        true
    }

    /// Handles the loads that have ended since the last step.
    pub(super) fn end_loads(&mut self) {
        let ends = std::mem::take(&mut self.ends);
        let refused = std::mem::take(&mut self.refused);
        if ends.is_empty() && refused.is_empty() {
            return;
        }
        for id in ends.iter().filter_map(|e| Some(&self.pulls.get(&e.pull)?.0)).chain(refused.iter().map(|r| &r.0)) {
            let load = self.running.iter_mut().find(|r| r.id == *id).and_then(|r| r.load.as_mut());
            load.into_iter().for_each(|l| l.ended = true);
        }
        for e in &ends {
            let id = self.pulls.get(&e.pull).map(|p| p.0);
            if let Some(r) = self.running.iter_mut().find(|r| Some(r.id) == id)
                && let Some(l) = &r.load
            {
                let at = |after: Option<Duration>| after.map_or(0, |after| l.started + after.as_micros() as u64);
                (r.times.first_loaded, r.times.loaded) = (at(e.outcome.times.first), at(e.outcome.times.data));
            }
        }
        self.report(&ends, &refused);
        for i in 0..self.running.len() {
            let r = &mut self.running[i];
            if r.load.as_ref().is_some_and(|l| l.ended) {
                r.load = None;
                self.ledger.load_ended(&r.id);
                self.counts.had(r.id, r.held.total());
                self.cache_blocks(i);
            }
        }
    }

    /// Waits until every load of this step is quiet. The model then runs on the blocks that arrived.
    pub(super) fn wait_for_loads(&mut self) {
        while self.ends.len() < self.pulls.len() {
            match self.inbox.recv_timeout(Duration::from_millis(20)) {
                Ok(msg) => self.handle(msg),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            // A load without a client must not delay the step, but it still has to become quiet.
            for (pull, (id, _)) in &self.pulls {
                let unwanted = |r: &&Req| r.id == *id && r.job.out.is_closed();
                if let Some(c) = &self.link.consumer
                    && (self.stopping || self.running.iter().find(unwanted).is_some())
                {
                    c.cancel(*pull);
                }
            }
        }
    }

    /// Handles the loads of this step after the model has run.
    pub(super) fn end_sync_loads(&mut self) {
        let ends = std::mem::take(&mut self.ends);
        let refused = std::mem::take(&mut self.refused);
        let ids: HashSet<Id> =
            ends.iter().filter_map(|e| Some(self.pulls.get(&e.pull)?.0)).chain(refused.iter().map(|r| r.0)).collect();
        self.report(&ends, &refused);
        for r in self.running.iter().filter(|r| ids.contains(&r.id)) {
            self.ledger.load_ended(&r.id);
            self.counts.had(r.id, r.held.loaded_end());
        }
    }

    /// Reports the blocks that did not arrive, and applies the outcome.
    fn report(&mut self, ends: &[Ended], refused: &[(Id, Cause)]) {
        let report = refused.iter().fold(Report::new(), |r, (id, cause)| r.load_failed(*id, *cause));
        let report = ends.iter().fold(report, Report::ended);
        let failed: Vec<Id> =
            ends.iter().filter(|e| !e.outcome.complete()).filter_map(|e| Some(self.pulls.get(&e.pull)?.0)).collect();
        ends.iter().for_each(|e| drop(self.pulls.remove(&e.pull)));
        if report.is_empty() {
            return;
        }
        let invalid = ends.iter().flat_map(|e| &e.blocks.invalid).copied().collect();
        self.count_losses(&invalid, refused);
        let views: Vec<_> = self.running.iter().map(Req::view).collect();
        let outcome = resolve(&self.groups, &views, &report, self.settings.policy);
        self.apply(outcome);
        for r in self.running.iter().filter(|r| failed.contains(&r.id)) {
            self.counts.salvaged.inc_by(r.held.loaded_end() - r.held.cached);
        }
    }

    /// Counts lost tokens from the block tables alone: see [`Counts`](crate::counts::Counts).
    fn count_losses(&mut self, invalid: &HashSet<Block>, refused: &[(Id, Cause)]) {
        let bad = |b: &Option<BlockId>| b.is_some_and(|id| invalid.contains(&Block { group: GroupId(0), id }));
        for r in &self.running {
            let first = r.table().iter().position(bad).map(|p| p as u64 * TOKENS);
            let all = refused.iter().any(|f| f.0 == r.id).then_some(r.held.cached);
            if let Some(from) = first.into_iter().chain(all).min() {
                self.counts.lost(r.id, r.prompt(), from, r.held.loaded_end().max(from));
            }
        }
    }

    fn apply(&mut self, outcome: Outcome<Id>) {
        self.ledger.apply(&outcome);
        outcome.uncache.iter().for_each(|b| self.blocks.uncache(b.id));
        for s in &outcome.shared {
            tracing::debug!(block = s.block.id.0, owner = s.owner, heirs = ?s.heirs, "a lost block is shared");
        }
        for a in outcome.affected {
            let Some(r) = self.running.iter_mut().find(|r| r.id == a.id) else { continue };
            tracing::info!(
                request = %r.job.name, kept = a.held.total(), lost = a.lost.total(), cause = %a.first.cause,
                waits = a.waits_for.is_some(), "KV did not arrive; it is computed again"
            );
            r.held = a.held;
            r.scheduled = 0;
        }
        for f in outcome.failed {
            let Some(i) = self.running.iter().position(|r| r.id == f.id) else { continue };
            tracing::warn!(request = %self.running[i].job.name, "failed: {}", f.reason);
            self.running[i].fail(Refusal::KvLost(f.reason.to_string()));
            // A running load writes these blocks, so they are released when it is quiet.
            match self.running[i].load.as_ref().filter(|l| !l.ended).and_then(|l| l.pull) {
                Some(pull) => {
                    self.running[i].gone = true;
                    if let Some(c) = &self.link.consumer {
                        c.cancel(pull);
                    }
                }
                None => {
                    let r = self.running.remove(i);
                    self.close(r, EndReason::Failed);
                }
            }
        }
    }
}
