//! The consumer: what a decode engine's rank holds to pull offered blocks into its own memory.
//!
//! A pull is started with [`Consumer::pull`] and heard of again when it has *ended*: every wanted block is then either
//! loaded or invalid, and nothing writes local memory any more. A synchronous engine loop calls [`Consumer::poll`] once a
//! step; async code awaits [`Consumer::pull_async`].

mod connector;
mod directory;

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use kvferry_proto::{
    block::{EngineId, Incarnation, Marks, Rank},
    error::{Cause, PullError},
    frame::{PeerId, Reader, Release},
    group::PoolLayout,
    hello::{self, Hello},
    lane::LaneKind,
    model::Model,
    offer::Offer,
    plan::LocalBlocks,
    pull::Retry,
    puller::{Ended, In, Progress, PullId, Puller, Start, better::Waits},
    quarantine::Quarantine,
    shard::Shard,
};
use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;

use self::{
    connector::Connector,
    directory::{Directory, ToPuller},
};
use crate::{
    config::{Config, OnWedge},
    control::{health, host},
    driver::{
        mailbox::Mailbox,
        runtime::Runtime,
        thread::{self, Mail, Reports},
    },
    error::StartError,
    memory::Memory,
    metrics::ConsumerMetrics,
};

/// A pull to start. Only the offer and the blocks are needed; the rest has defaults.
#[derive(Debug, Clone)]
pub struct Pull {
    /// What to read.
    pub offer: Arc<Offer>,
    /// Which positions are wanted, and the local blocks that they go into.
    pub blocks: Vec<LocalBlocks>,
    /// From now to the decision; `None`: the configured one.
    pub deadline: Option<Duration>,
    /// Which lanes may be used, best first; `None`: the configured ones.
    pub lanes: Option<Vec<LaneKind>>,
    /// Earlier work on the local blocks is done. If not, say so later with [`Consumer::local_ready`]: nothing is read before.
    pub local_ready: bool,
}

impl Pull {
    /// A pull of these blocks, with the defaults.
    pub fn new(offer: impl Into<Arc<Offer>>, blocks: Vec<LocalBlocks>) -> Self {
        Self { offer: offer.into(), blocks, deadline: None, lanes: None, local_ready: true }
    }

    /// With this time from now to the decision.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Over these lanes only, best first.
    pub fn lanes(mut self, lanes: Vec<LaneKind>) -> Self {
        self.lanes = Some(lanes);
        self
    }
}

/// How a consumer is built.
pub struct Builder {
    engine: EngineId,
    rank: Rank,
    model: Model,
    shard: Shard,
    layout: PoolLayout,
    memory: Option<Memory>,
    config: Config,
}

impl Builder {
    /// Which rank of the engine this is, and its part of the model. By default the only one.
    pub fn rank(mut self, rank: Rank, shard: Shard) -> Self {
        (self.rank, self.shard) = (rank, shard);
        self
    }

    /// The engine's own memory. Without it, kvferry allocates what the layout needs.
    pub fn memory(mut self, memory: Memory) -> Self {
        self.memory = Some(memory);
        self
    }

    /// Other settings than the defaults.
    pub fn config(mut self, config: Config) -> Self {
        self.config = config;
        self
    }

    /// Starts the consumer's two threads: one moves data, one talks to peers. Nothing is dialled yet.
    pub fn build(self) -> Result<Consumer, StartError> {
        self.layout.check()?;
        self.shard.check().map_err(|why| StartError::Config { field: "shard", why: why.into() })?;
        self.config.check()?;
        let memory = match self.memory {
            Some(m) => m,
            None => {
                let memory = Memory::alloc(&self.layout.segments)?;
                memory.touch()?;
                memory
            }
        };
        memory.check(&self.layout)?;
        let me = PeerId { engine: self.engine, rank: self.rank, incarnation: Incarnation::random() };
        let os = |what| move |source| StartError::Os { what, source };
        let runtime = Runtime::start("kvferry-control").map_err(os("cannot start the control thread"))?;
        let mailbox = Mailbox::new().map_err(os("cannot create an eventfd"))?;
        let layout = Arc::new(self.layout);
        let shared = Arc::new(Shared {
            quarantine: Mutex::new(Quarantine::new(&layout)),
            done: Mutex::new(Done::default()),
            ended: Condvar::new(),
            pulls: AtomicUsize::new(0),
            wedged: AtomicUsize::new(0),
            metrics: ConsumerMetrics::default(),
            up: Mutex::default(),
            on_wedge: self.config.pull.on_wedge,
        });
        let hello = Hello {
            versions: hello::VERSIONS,
            features: hello::features::ALL,
            peer: me.clone(),
            model: self.model,
            shard: self.shard,
            host: host::identity().to_owned(),
        };
        let connector = Connector::new(memory.clone(), self.config.tcp.clone(), self.config.pull.faults.clone());
        #[cfg(feature = "verbs")]
        let connector = match self.config.pull.lanes.contains(&LaneKind::Verbs) {
            true => connector.with_verbs(&self.config.verbs),
            false => connector,
        };
        let directory = Directory {
            handle: runtime.handle().clone(),
            hello: Arc::new(hello),
            config: Arc::new(self.config.clone()),
            events: Arc::new(ToPuller(mailbox.clone())),
            connector: Arc::new(connector),
            peers: HashMap::new(),
            shared: shared.clone(),
        };
        let waits = Waits { first: self.config.pull.look_min, longest: self.config.pull.look_max };
        let puller = Puller::new(layout.clone(), self.shard, self.config.limits.blocks_per_offer, waits);
        let rail = thread::spawn("kvferry-data", puller, mailbox.clone(), Box::new(directory), shared.clone())
            .map_err(os("cannot start the data thread"))?;
        Ok(Consumer {
            me,
            layout,
            memory,
            shard: self.shard,
            config: self.config,
            shared,
            mailbox,
            next_pull: AtomicU64::new(1),
            stopped: AtomicBool::new(false),
            rail: Mutex::new(Some(rail)),
            runtime,
        })
    }
}

/// A decode engine's rank, pulling. Dropping it cancels every pull and waits until memory is quiet, or for a bounded time.
pub struct Consumer {
    me: PeerId,
    layout: Arc<PoolLayout>,
    memory: Memory,
    shard: Shard,
    config: Config,
    shared: Arc<Shared>,
    mailbox: Mailbox<Mail>,
    next_pull: AtomicU64,
    stopped: AtomicBool,
    rail: Mutex<Option<JoinHandle<()>>>,
    runtime: Runtime,
}

impl Consumer {
    /// How long a shutdown waits for lanes to become quiet.
    const SHUTDOWN: Duration = Duration::from_secs(2);
    /// And then, for releases to be acknowledged.
    const GOODBYE: Duration = Duration::from_millis(500);

    /// Starts building a consumer: the engine, what its KV means, and how its memory is laid out.
    pub fn builder(engine: EngineId, model: Model, layout: PoolLayout) -> Builder {
        let shard = Shard::whole(1, 1);
        Builder { engine, rank: Rank(0), model, shard, layout, memory: None, config: Config::default() }
    }

    /// Who this is.
    pub fn me(&self) -> &PeerId {
        &self.me
    }

    /// The memory that pulls write.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// How it is laid out.
    pub fn layout(&self) -> &Arc<PoolLayout> {
        &self.layout
    }

    /// Starts a pull. Its local blocks belong to it until [`Consumer::poll`] (or `wait`) hands out its end; the engine may
    /// neither read nor write them before.
    pub fn pull(&self, pull: Pull) -> Result<PullId, PullError> {
        self.start(pull, None)
    }

    /// Starts a pull whose end comes through the returned receiver, and not through [`Consumer::poll`].
    pub fn pull_async(&self, pull: Pull) -> Result<(PullId, oneshot::Receiver<Ended>), PullError> {
        let (tx, rx) = oneshot::channel();
        Ok((self.start(pull, Some(tx))?, rx))
    }

    fn start(&self, pull: Pull, waiter: Option<oneshot::Sender<Ended>>) -> Result<PullId, PullError> {
        if self.stopped.load(Ordering::Acquire) {
            return Err(PullError::Shutdown);
        }
        // Before all else: blocks that a dead thread withholds are busy for ever, and that is not what is wrong.
        if self.shared.done.lock().died {
            return Err(PullError::Died);
        }
        let started = Instant::now();
        let limits = &self.config.limits;
        pull.offer.check(limits.blocks_per_offer)?;
        check_wanted(&self.layout, &pull.blocks, limits.blocks_per_offer)?;
        let (sources, reader) = self.sources(&pull.offer);
        let id = PullId(self.next_pull.fetch_add(1, Ordering::Relaxed));
        if self.shared.pulls.fetch_add(1, Ordering::AcqRel) >= limits.pulls {
            self.shared.pulls.fetch_sub(1, Ordering::AcqRel);
            return Err(PullError::TooManyPulls { limit: limits.pulls });
        }
        let blocks = pull.blocks.iter().flat_map(LocalBlocks::wanted_blocks);
        if let Err(busy) = self.shared.quarantine.lock().take(id.0, blocks) {
            self.shared.pulls.fetch_sub(1, Ordering::AcqRel);
            return Err(busy);
        }
        let progress = Arc::new(Progress::default());
        let died = {
            let mut done = self.shared.done.lock();
            if !done.died {
                done.progress.insert(id, progress.clone());
                if let Some(tx) = waiter {
                    done.waiters.insert(id, tx);
                }
            }
            done.died
        };
        if died {
            let blocks = pull.blocks.iter().flat_map(LocalBlocks::wanted_blocks);
            self.shared.quarantine.lock().give_back(id.0, blocks);
            self.shared.pulls.fetch_sub(1, Ordering::AcqRel);
            return Err(PullError::Died);
        }
        self.shared.metrics.running.inc();
        let deadline = pull.deadline.unwrap_or(self.config.pull.deadline).min(MAX_DEADLINE);
        self.mailbox.send(Mail::Puller(In::Start(Box::new(Start {
            id,
            offer: pull.offer,
            sources,
            wanted: pull.blocks,
            reader,
            started,
            deadline: started + deadline,
            retry: Retry { attempts: self.config.pull.attempts, wait: self.config.pull.retry_wait },
            chunk: self.config.pull.chunk,
            lanes: pull.lanes.unwrap_or_else(|| self.config.pull.lanes.clone()),
            local_ready: pull.local_ready,
            progress,
        }))));
        Ok(id)
    }

    /// Which of the offer's ranks this rank reads from, and which of their readers it is. An engine of the same shape is
    /// read rank by rank; of another shape, every rank is asked, and the plan takes what it needs of each.
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

    /// Earlier work on the pull's local blocks is done: it may write them.
    pub fn local_ready(&self, pull: PullId) {
        self.tell(Mail::Puller(In::LocalReady(pull)));
    }

    /// Gives a pull up. What is loaded by now stays loaded; its end is reported as always, once memory is quiet.
    pub fn cancel(&self, pull: PullId) {
        self.tell(Mail::Puller(In::Cancel(pull, Cause::Cancelled)));
    }

    /// Lets go of an offer that will not be pulled (a full local prefix hit, a request refused at admission), so that the
    /// producer's blocks go back at once. Sent again until it is acknowledged.
    pub fn release(&self, offer: &Offer) {
        for rank in &offer.ranks {
            let release = Release { claim: None, offer: offer.id, reader: Reader::ONLY, all: true };
            self.tell(Mail::Release(rank.addr.as_str().into(), rank.incarnation, release));
        }
    }

    /// Mail that nobody reads any more would only pile up.
    fn tell(&self, mail: Mail) {
        if self.is_alive() {
            self.mailbox.send(mail);
        }
    }

    /// The next pull that has ended, if there is one. Never blocks.
    pub fn poll(&self) -> Option<Ended> {
        self.shared.done.lock().queue.pop_front()
    }

    /// Waits for the next pull to end, for `timeout` at most.
    pub fn wait(&self, timeout: Duration) -> Option<Ended> {
        let mut done = self.shared.done.lock();
        self.shared.ended.wait_while_for(&mut done, |d| d.queue.is_empty(), timeout.min(MAX_DEADLINE));
        done.queue.pop_front()
    }

    /// How far a pull is: loaded chunks, and all chunks (0 until its peers have answered). `None` when it has ended.
    pub fn progress(&self, pull: PullId) -> Option<(usize, usize)> {
        self.shared.done.lock().progress.get(&pull).map(|p| p.get())
    }

    /// Pulls that have not ended.
    pub fn pulls(&self) -> usize {
        self.shared.pulls.load(Ordering::Acquire)
    }

    /// Peers whose sessions are up.
    pub fn peers(&self) -> usize {
        let mut up = self.shared.up.lock();
        up.retain(|u| u.strong_count() > 0);
        up.iter().filter_map(Weak::upgrade).filter(|u| u.load(Ordering::Relaxed)).count()
    }

    /// Local blocks that pulls hold now, the withheld ones included.
    pub fn blocks_held(&self) -> usize {
        self.shared.quarantine.lock().len()
    }

    /// Pulls whose lanes wedged, or which were on when the data thread died: their blocks are withheld until this process
    /// restarts. Not zero: health is red.
    pub fn wedged(&self) -> usize {
        self.shared.wedged.load(Ordering::Acquire)
    }

    /// Whether pulls are taken: not after [`Consumer::shutdown`], and not after the data thread has died of a bug.
    pub fn is_alive(&self) -> bool {
        !self.stopped.load(Ordering::Acquire) && !self.shared.done.lock().died
    }

    /// Its metrics, to register where the engine's are.
    pub fn metrics(&self) -> &ConsumerMetrics {
        &self.shared.metrics
    }

    /// Cancels every pull, ends the data thread within two seconds, and waits another half for releases to be acknowledged.
    /// Pulls that ended meanwhile can still be polled.
    pub fn shutdown(&self) {
        self.stopped.store(true, Ordering::Release);
        let Some(rail) = self.rail.lock().take() else { return };
        self.mailbox.send(Mail::Stop(Instant::now() + Self::SHUTDOWN));
        // A panic in there was printed already.
        let _ = rail.join();
        // Sessions go when their releases are acknowledged, so that a producer need not wait for the lease of a consumer that
        // has said goodbye. A peer that does not answer is left to its leases.
        self.runtime.wait_idle(Self::GOODBYE);
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// A month: far enough to mean "for ever", near enough to add to an `Instant`.
const MAX_DEADLINE: Duration = Duration::from_secs(30 * 86_400);

/// What can be said of the wanted blocks before a peer is asked.
fn check_wanted(layout: &PoolLayout, wanted: &[LocalBlocks], limit: usize) -> Result<(), PullError> {
    use kvferry_proto::plan::PlanError;
    let blocks = wanted.iter().map(|l| l.blocks.len()).sum();
    if blocks > limit {
        return Err(PlanError::TooManyBlocks { blocks, limit }.into());
    }
    for (i, l) in wanted.iter().enumerate() {
        let group = layout
            .group(l.group)
            .filter(|_| wanted[..i].iter().all(|o| o.group != l.group))
            .ok_or(PlanError::LocalGroup(l.group.0))?;
        let mut seen = Marks::new(group.blocks);
        for (_, id) in l.wants() {
            if id.0 >= group.blocks {
                return Err(PlanError::LocalBlock { group: l.group.0, block: id.0, blocks: group.blocks }.into());
            }
            if !seen.insert(id) {
                return Err(PlanError::LocalBlockTwice { group: l.group.0, block: id.0 }.into());
            }
        }
    }
    Ok(())
}

#[derive(Default)]
struct Done {
    queue: VecDeque<Ended>,
    waiters: HashMap<PullId, oneshot::Sender<Ended>>,
    progress: HashMap<PullId, Arc<Progress>>,
    /// The data thread panicked: what has not ended never will.
    died: bool,
}

struct Shared {
    quarantine: Mutex<Quarantine>,
    done: Mutex<Done>,
    ended: Condvar,
    pulls: AtomicUsize,
    wedged: AtomicUsize,
    metrics: ConsumerMetrics,
    /// Which sessions are up.
    up: Mutex<Vec<Weak<AtomicBool>>>,
    on_wedge: OnWedge,
}

impl Reports for Shared {
    fn decided(&self, _: PullId) {}

    fn ended(&self, ended: Ended) {
        let blocks = ended.blocks.loaded.iter().chain(&ended.blocks.invalid).copied();
        self.quarantine.lock().give_back(ended.pull.0, blocks);
        self.pulls.fetch_sub(1, Ordering::AcqRel);
        self.metrics.running.dec();
        self.metrics.ended(&ended.outcome);
        if !ended.outcome.complete() {
            tracing::warn!(
                request = %ended.offer.request, peer = %ended.offer.engine, incarnation = %ended.offer.incarnation,
                loaded = ended.outcome.loaded(), invalid = ended.outcome.invalid(),
                cause = ended.outcome.cause().map_or("none", Cause::as_str), "pull ended with invalid blocks"
            );
        }
        let mut done = self.done.lock();
        done.progress.remove(&ended.pull);
        let unclaimed = match done.waiters.remove(&ended.pull) {
            Some(tx) => tx.send(ended).err(),
            None => Some(ended),
        };
        if let Some(ended) = unclaimed {
            done.queue.push_back(ended);
            self.ended.notify_one();
        }
    }

    fn wedged(&self, pull: PullId) {
        self.wedged.fetch_add(1, Ordering::AcqRel);
        self.metrics.wedged.inc();
        health::turn_bad();
        tracing::error!(
            pull = pull.0,
            "a pull's blocks are withheld: its lane wedged; restart this process to get them back"
        );
        self.after_wedge();
    }

    fn died(&self) {
        let on = {
            let mut done = self.done.lock();
            done.died = true;
            let on = done.progress.len();
            self.wedged.store(on, Ordering::Release);
            self.metrics.wedged.set(on as i64);
            health::turn_bad();
            // Their receivers learn of it, as they would of a consumer that is gone; and find it counted.
            done.waiters.clear();
            on
        };
        tracing::error!(
            pulls = on,
            "the data thread died: these pulls' blocks are withheld, and no pull is taken; restart this process"
        );
        self.after_wedge();
    }
}

impl Shared {
    fn after_wedge(&self) {
        if self.on_wedge == OnWedge::Exit {
            tracing::error!("on_wedge = exit");
            std::process::exit(70);
        }
    }
}
