//! The consumer: what a decode engine's rank holds to pull offered blocks into its own memory.
//!
//! [`Consumer::pull`] starts a pull. The engine hears of it again when it has *ended*: every wanted block is then either
//! loaded or invalid, and nothing writes local memory any more. A synchronous engine loop calls [`Consumer::poll`] once a
//! step; async code awaits [`Consumer::pull_async`].

mod builder;
mod connector;
mod directory;
mod pull;
mod pulls;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use kvferry_proto::{
    BadOffer, Cause, Offer, Outcome, PeerId, PoolLayout, PullError, Reader, Shard, WaitError,
    pull::Retry,
    puller::{Ended, Hold, HoldRequest, HoldSetter, In, PullId, Start},
};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use self::{directory::Sessions, pulls::Pulls};
use crate::{
    config::Config,
    driver::{runtime::Runtime, thread::Mail},
    mailbox::Mailbox,
    memory::{Mark, Memory},
    metrics::ConsumerMetrics,
};

pub use self::{builder::Builder, pull::Pull};

/// A decode engine's rank. Dropping it calls [`Consumer::shutdown`].
pub struct Consumer {
    me: PeerId,
    layout: Arc<PoolLayout>,
    memory: Memory,
    shard: Shard,
    config: Config,
    pulls: Arc<Pulls>,
    sessions: Arc<Sessions>,
    mailbox: Mailbox<Mail>,
    next_pull: AtomicU64,
    stopped: AtomicBool,
    data_thread: Mutex<Option<JoinHandle<()>>>,
    runtime: Runtime,
}

/// A month: long enough for any pull, short enough to add to an `Instant`.
const MAX_DEADLINE: Duration = Duration::from_secs(30 * 86_400);

impl Consumer {
    /// How long a shutdown waits for lanes to become quiet.
    const SHUTDOWN: Duration = Duration::from_secs(2);
    /// How long it then waits for releases to be acknowledged.
    const GOODBYE: Duration = Duration::from_millis(500);

    /// This rank's identity.
    pub fn me(&self) -> &PeerId {
        &self.me
    }

    /// The memory that pulls write.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The layout of that memory.
    pub fn layout(&self) -> &Arc<PoolLayout> {
        &self.layout
    }

    /// Starts a pull. Its local blocks belong to it until [`Consumer::poll`] (or `wait`) returns its end; the engine may
    /// neither read nor write them before.
    pub fn pull(&self, pull: Pull) -> Result<PullId, PullError> {
        self.start(pull, None)
    }

    /// Starts a pull whose end comes through the returned receiver, and not through [`Consumer::poll`]. The receiver fails at
    /// once when the pull will not end, see [`Consumer::decided`].
    pub fn pull_async(&self, pull: Pull) -> Result<(PullId, oneshot::Receiver<Ended>), PullError> {
        let (tx, rx) = oneshot::channel();
        Ok((self.start(pull, Some(tx))?, rx))
    }

    fn start(&self, pull: Pull, waiter: Option<oneshot::Sender<Ended>>) -> Result<PullId, PullError> {
        if self.stopped.load(Ordering::Acquire) {
            return Err(PullError::Shutdown);
        }
        // Checked first: otherwise the caller sees `BlockBusy` instead of the real cause, `Died`.
        if self.pulls.died() {
            return Err(PullError::Died);
        }
        let started = Instant::now();
        let limits = &self.config.limits;
        pull.check(&self.layout, limits.blocks_per_offer)?;
        pull.offer.check_seal(&self.config.names.seal_keys)?;
        let mark = pull.after.map(|stream| Mark::record(&self.memory, stream)).transpose();
        let mark = mark.map_err(|why| PullError::Stream { why })?;
        let (sources, reader) = self.sources(&pull.offer);
        let id = PullId(self.next_pull.fetch_add(1, Ordering::Relaxed));
        let progress = self.pulls.begin(id, &pull.blocks, limits.pulls, waiter)?;
        let settings = &self.config.pull;
        let deadline = pull.deadline.unwrap_or(settings.deadline).min(MAX_DEADLINE);
        self.mailbox.send(Mail::Puller(In::Start(Box::new(Start {
            id,
            offer: pull.offer,
            sources,
            wanted: pull.blocks,
            reader,
            started,
            deadline: started + deadline,
            retry: Retry {
                attempts: settings.attempts,
                wait: settings.retry_wait,
                patience: settings.patience,
                awaited: pull.awaited,
                queued: settings.queued,
                stalled: settings.stalled,
            },
            chunk: settings.chunk,
            lanes: pull.lanes.unwrap_or_else(|| settings.lanes.clone()),
            local_ready: pull.local_ready && mark.is_none(),
            progress,
        }))));
        if let Some(mark) = mark {
            let (mailbox, pulls) = (self.mailbox.clone(), Arc::downgrade(&self.pulls));
            mark.then(move |done| {
                // Without its reader the mailbox would only grow.
                if pulls.upgrade().is_none_or(|p| p.died()) {
                    return;
                }
                mailbox.send(Mail::Puller(match done {
                    Ok(()) => In::LocalReady(id),
                    Err(error) => {
                        tracing::error!(pull = id.0, %error, "the work before a pull failed: it is cancelled");
                        In::Cancel(id, Cause::GpuFailed)
                    }
                }));
            });
        }
        Ok(id)
    }

    /// Which of the offer's ranks this rank reads from, and which of their readers it is. From an engine of the same shape
    /// a rank reads its counterpart only. From an engine of another shape it claims every rank, and the plan selects what
    /// to read from each.
    fn sources(&self, offer: &Offer) -> (Vec<usize>, Reader) {
        let here = self.shard.tp_size.saturating_mul(self.shard.pp_size);
        if offer.ranks.len() == 1 {
            return (vec![0], Reader { index: self.me.rank.0.min(here - 1), of: here });
        }
        if offer.ranks.len() == here as usize
            && let Some(i) = offer.ranks.iter().position(|r| r.rank == self.me.rank)
        {
            return (vec![i], Reader::ONLY);
        }
        ((0..offer.ranks.len()).collect(), Reader { index: self.me.rank.0.min(here - 1), of: here })
    }

    /// Tells a pull that earlier work on its local blocks is done, so that it may write them.
    pub fn local_ready(&self, pull: PullId) {
        self.tell(Mail::Puller(In::LocalReady(pull)));
    }

    /// Cancels a pull. Loaded blocks stay loaded; its end is reported as always, once memory is quiet.
    pub fn cancel(&self, pull: PullId) {
        self.tell(Mail::Puller(In::Cancel(pull, Cause::Cancelled)));
    }

    /// Claims an offer whose pull starts later, so that its lease does not run out while the request waits in the engine's queue.
    /// The claim is renewed until the pull starts, which takes it over, until [`Consumer::release`], and for
    /// [`LeaseConfig::hard_cap`](crate::LeaseConfig::hard_cap) at most. It holds no local blocks. A claim that fails is not
    /// reported: the pull claims again and reports the cause.
    ///
    /// # Errors
    /// The name is malformed, its seal is missing or does not fit, or the consumer has shut down. No peer is contacted.
    pub fn hold(&self, offer: &Offer) -> Result<Hold, PullError> {
        self.hold_offer(offer, false)
    }

    /// Claims like [`Consumer::hold`] an offer that may be opened later. An engine gives local blocks to a request once its hold
    /// is granted: the prefill has begun then, and goes on. If it gave them to requests whose prefill waits for blocks, two
    /// engines with full pools could wait for each other.
    ///
    /// # Errors
    /// Those of [`Consumer::hold`].
    pub fn hold_awaited(&self, offer: &Offer) -> Result<Hold, PullError> {
        self.hold_offer(offer, true)
    }

    fn hold_offer(&self, offer: &Offer, awaited: bool) -> Result<Hold, PullError> {
        if self.stopped.load(Ordering::Acquire) {
            return Err(PullError::Shutdown);
        }
        offer.check()?;
        offer.check_seal(&self.config.names.seal_keys)?;
        let (sources, reader) = self.sources(offer);
        let (hold, patience) = (Hold::default(), self.config.pull.patience);
        let wait = HoldRequest {
            offer: Arc::new(offer.clone()),
            sources,
            reader,
            awaited,
            seen: HoldSetter::of(&hold),
            patience,
        };
        self.tell(Mail::Puller(In::Hold(Box::new(wait), self.config.lease.hard_cap)));
        Ok(hold)
    }

    /// Releases an offer that will not be pulled (a full local prefix hit, a request refused at admission), so that the
    /// producer gets its blocks back at once. Sent again until it is acknowledged.
    ///
    /// # Errors
    /// The name is malformed, or its seal is missing or does not fit. No peer is contacted.
    pub fn release(&self, offer: &Offer) -> Result<(), BadOffer> {
        offer.check()?;
        offer.check_seal(&self.config.names.seal_keys)?;
        self.tell(Mail::Puller(In::Release(Arc::new(offer.clone()))));
        Ok(())
    }

    /// Sends mail, unless its reader has ended: nothing would empty the mailbox.
    fn tell(&self, mail: Mail) {
        if self.is_alive() {
            self.mailbox.send(mail);
        }
    }

    /// The next pull that has ended, if there is one. Never blocks.
    pub fn poll(&self) -> Option<Ended> {
        self.pulls.poll()
    }

    /// Waits for the next pull to end, for `timeout` at most.
    ///
    /// # Errors
    /// No pull ended in time, a pull will not end, or none will. The news that a pull will not end, or none will, ends the
    /// wait at once.
    pub fn wait(&self, timeout: Duration) -> Result<Ended, WaitError> {
        self.pulls.wait(timeout.min(MAX_DEADLINE))
    }

    /// The frozen sets of a pull that has decided and not ended. A scheduler may plan with them: they do not change any more.
    /// The local blocks still belong to the pull, so neither read nor write them. `None` before the decision, and after the
    /// end. For a pull that will never end, since its lane is wedged or the data thread panicked, this is all there is to
    /// know.
    pub fn decided(&self, pull: PullId) -> Option<Outcome> {
        self.pulls.outcome(pull)
    }

    /// A pull's loaded chunks, and all its chunks (0 until its peers have answered). `None` when it has ended.
    pub fn progress(&self, pull: PullId) -> Option<(usize, usize)> {
        self.pulls.progress(pull)
    }

    /// Tokens from the prompt's start whose wanted blocks are all loaded, each of them fenced. Positions that the pull does not want
    /// count as present. It only grows. The engine may read those blocks before the pull has ended, and must not write them. `None`
    /// when the pull has ended.
    pub fn loaded_prefix(&self, pull: PullId) -> Option<u64> {
        self.pulls.loaded_prefix(pull)
    }

    /// Number of pulls that have not ended.
    pub fn pulls(&self) -> usize {
        self.pulls.running()
    }

    /// Number of peers whose sessions are up.
    pub fn peers(&self) -> usize {
        self.sessions.up()
    }

    /// Number of local blocks that pulls hold now, withheld blocks included.
    pub fn blocks_held(&self) -> usize {
        self.pulls.blocks_held()
    }

    /// Number of pulls whose lanes wedged, or which were running when the data thread panicked. Their blocks are withheld
    /// until this process restarts. While it is not zero, the gRPC health of this process is NOT_SERVING.
    pub fn wedged(&self) -> usize {
        self.pulls.wedged()
    }

    /// The pulls that [`Consumer::wedged`] counts.
    pub fn wedged_pulls(&self) -> Vec<PullId> {
        self.pulls.wedged_pulls()
    }

    /// Whether new pulls are accepted: not after [`Consumer::shutdown`], and not after the data thread has panicked.
    pub fn is_alive(&self) -> bool {
        !self.stopped.load(Ordering::Acquire) && !self.pulls.died()
    }

    /// This consumer's metrics, to register in the engine's registry.
    pub fn metrics(&self) -> &ConsumerMetrics {
        &self.pulls.metrics
    }

    /// Cancels every pull and waits up to two seconds for memory to be quiet, then up to half a second for releases to be
    /// acknowledged. Pulls that ended meanwhile can still be polled.
    pub fn shutdown(&self) {
        self.stopped.store(true, Ordering::Release);
        let Some(data_thread) = self.data_thread.lock().take() else { return };
        self.mailbox.send(Mail::Stop(Instant::now() + Self::SHUTDOWN));
        // The panic hook has already printed a panic of that thread.
        let _ = data_thread.join();
        // Sessions end when their releases are acknowledged: then a producer need not wait for this consumer's leases to
        // expire. For a peer that does not answer, they expire.
        self.runtime.wait_idle(Self::GOODBYE);
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.shutdown();
    }
}
