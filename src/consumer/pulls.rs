//! The pulls of one consumer: which ones run, which local blocks they hold, and which ones have ended.
//!
//! Written by the engine's threads when a pull starts, and by the data thread when it ends.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use kvferry_proto::{
    Cause, EngineId, LocalBlocks, Outcome, PoolLayout, PullError, WaitError,
    puller::{Ended, Progress, PullId},
    quarantine::Quarantine,
};
use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;

use crate::{config::OnWedge, control::health, driver::thread::Reports, metrics::ConsumerMetrics, repeats::Repeats};

pub(super) struct Pulls {
    quarantine: Mutex<Quarantine>,
    state: Mutex<State>,
    ended: Condvar,
    running: AtomicUsize,
    wedged: AtomicUsize,
    pub(super) metrics: ConsumerMetrics,
    on_wedge: OnWedge,
    /// Peers and causes of pulls that ended with invalid blocks.
    incomplete: Repeats<(EngineId, Option<Cause>)>,
}

#[derive(Default)]
struct State {
    /// Ended pulls that the engine has not polled.
    ended: VecDeque<Ended>,
    /// Wedged pulls of which no call of `wait` has heard.
    wedged: VecDeque<PullId>,
    /// Receivers of asynchronous pulls.
    waiters: HashMap<PullId, oneshot::Sender<Ended>>,
    /// Pulls that have not ended.
    running: HashMap<PullId, Running>,
    /// Why no running pull will end: the data thread panicked, or stopped.
    over: Option<WaitError>,
}

struct Running {
    progress: Arc<Progress>,
    /// Its frozen sets, once it has decided.
    decided: Option<Outcome>,
    wedged: bool,
}

impl Pulls {
    pub(super) fn new(layout: &PoolLayout, on_wedge: OnWedge) -> Self {
        Self {
            quarantine: Mutex::new(Quarantine::new(layout)),
            state: Mutex::default(),
            ended: Condvar::new(),
            running: AtomicUsize::new(0),
            wedged: AtomicUsize::new(0),
            metrics: ConsumerMetrics::default(),
            on_wedge,
            incomplete: Repeats::default(),
        }
    }

    /// Enters a pull, which holds its local blocks from now on. At most `limit` pulls run at a time.
    pub(super) fn begin(
        &self,
        id: PullId,
        blocks: &[LocalBlocks],
        limit: usize,
        waiter: Option<oneshot::Sender<Ended>>,
    ) -> Result<Arc<Progress>, PullError> {
        let wanted = || blocks.iter().flat_map(LocalBlocks::wanted_blocks);
        let failed = |error| {
            self.running.fetch_sub(1, Ordering::AcqRel);
            Err(error)
        };
        if self.running.fetch_add(1, Ordering::AcqRel) >= limit {
            return failed(PullError::TooManyPulls { limit });
        }
        if let Err(busy) = self.quarantine.lock().take(id.0, wanted()) {
            return failed(busy);
        }
        let progress = Arc::new(Progress::default());
        let mut state = self.state.lock();
        if let Some(over) = &state.over {
            let error = if *over == WaitError::Died { PullError::Died } else { PullError::Shutdown };
            drop(state);
            self.quarantine.lock().give_back(id.0, wanted());
            return failed(error);
        }
        state.running.insert(id, Running { progress: progress.clone(), decided: None, wedged: false });
        state.waiters.extend(waiter.map(|tx| (id, tx)));
        drop(state);
        self.metrics.running.inc();
        Ok(progress)
    }

    /// The next ended pull.
    pub(super) fn poll(&self) -> Option<Ended> {
        self.state.lock().ended.pop_front()
    }

    /// Waits for the next ended pull, or for the news that one will not end.
    pub(super) fn wait(&self, timeout: Duration) -> Result<Ended, WaitError> {
        let mut state = self.state.lock();
        let nothing = |s: &mut State| s.ended.is_empty() && s.wedged.is_empty() && s.over.is_none();
        self.ended.wait_while_for(&mut state, nothing, timeout);
        if let Some(ended) = state.ended.pop_front() {
            return Ok(ended);
        }
        if let Some(pull) = state.wedged.pop_front() {
            return Err(WaitError::Wedged { pull });
        }
        Err(state.over.clone().unwrap_or(WaitError::NotYet { after: timeout }))
    }

    pub(super) fn progress(&self, pull: PullId) -> Option<(usize, usize)> {
        self.state.lock().running.get(&pull).map(|p| p.progress.get())
    }

    pub(super) fn loaded_prefix(&self, pull: PullId) -> Option<u64> {
        self.state.lock().running.get(&pull).map(|p| p.progress.prefix())
    }

    pub(super) fn outcome(&self, pull: PullId) -> Option<Outcome> {
        self.state.lock().running.get(&pull)?.decided.clone()
    }

    pub(super) fn running(&self) -> usize {
        self.running.load(Ordering::Acquire)
    }

    pub(super) fn blocks_held(&self) -> usize {
        self.quarantine.lock().len()
    }

    pub(super) fn wedged(&self) -> usize {
        self.wedged.load(Ordering::Acquire)
    }

    /// The wedged pulls, in the order of their ids. After a panic of the data thread, all that were running.
    pub(super) fn wedged_pulls(&self) -> Vec<PullId> {
        let state = self.state.lock();
        let died = state.over == Some(WaitError::Died);
        let mut found: Vec<_> = state.running.iter().filter(|(_, r)| died || r.wedged).map(|(id, _)| *id).collect();
        found.sort_unstable();
        found
    }

    /// Whether the data thread has panicked.
    pub(super) fn died(&self) -> bool {
        self.state.lock().over == Some(WaitError::Died)
    }

    fn log_incomplete(&self, ended: &Ended) {
        let (peer, cause) = (&ended.offer.engine, ended.outcome.cause());
        let Some(unlogged) = self.incomplete.is_news(Instant::now(), (peer.clone(), cause)) else { return };
        tracing::warn!(
            request = %ended.offer.request, %peer, incarnation = %ended.offer.incarnation,
            loaded = ended.outcome.loaded(), invalid = ended.outcome.invalid(),
            cause = cause.map_or("none", Cause::as_str), unlogged, "pull ended with invalid blocks"
        );
    }

    fn after_wedge(&self) {
        if self.on_wedge == OnWedge::Exit {
            tracing::error!("on_wedge = exit");
            std::process::exit(70);
        }
    }
}

impl Reports for Pulls {
    fn decided(&self, pull: PullId, outcome: Outcome) {
        if let Some(running) = self.state.lock().running.get_mut(&pull) {
            running.decided = Some(outcome);
        }
    }

    fn ended(&self, ended: Ended) {
        let blocks = ended.blocks.loaded.iter().chain(&ended.blocks.invalid).copied();
        self.quarantine.lock().give_back(ended.pull.0, blocks);
        self.running.fetch_sub(1, Ordering::AcqRel);
        self.metrics.running.dec();
        self.metrics.ended(&ended.outcome);
        if !ended.outcome.complete() {
            self.log_incomplete(&ended);
        }
        let mut state = self.state.lock();
        state.running.remove(&ended.pull);
        let unclaimed = match state.waiters.remove(&ended.pull) {
            Some(tx) => tx.send(ended).err(),
            None => Some(ended),
        };
        if let Some(ended) = unclaimed {
            state.ended.push_back(ended);
            self.ended.notify_one();
        }
    }

    fn wedged(&self, pull: PullId) {
        self.wedged.fetch_add(1, Ordering::AcqRel);
        self.metrics.wedged.inc();
        health::turn_bad();
        let mut state = self.state.lock();
        if let Some(running) = state.running.get_mut(&pull) {
            running.wedged = true;
        }
        // The receiver of an asynchronous pull sees its sender dropped.
        if state.waiters.remove(&pull).is_none() {
            state.wedged.push_back(pull);
            self.ended.notify_one();
        }
        drop(state);
        tracing::error!(
            pull = pull.0,
            "a pull's blocks are withheld: its lane wedged; restart this process to get them back"
        );
        self.after_wedge();
    }

    fn died(&self) {
        let mut state = self.state.lock();
        state.over = Some(WaitError::Died);
        let pulls = state.running.len();
        self.wedged.store(pulls, Ordering::Release);
        self.metrics.wedged.set(pulls as i64);
        health::turn_bad();
        // Last, so that a receiver that sees its sender dropped also sees the count above.
        state.waiters.clear();
        self.ended.notify_all();
        drop(state);
        tracing::error!(
            pulls,
            "the data thread panicked: the blocks of its pulls are withheld, and no new pull is accepted; \
             restart this process"
        );
        self.after_wedge();
    }

    fn stopped(&self) {
        let mut state = self.state.lock();
        state.over = Some(WaitError::Shutdown);
        state.waiters.clear();
        self.ended.notify_all();
    }
}
