//! Decode ranks: the real puller, sessions and quarantine, and an engine that reuses blocks the moment a pull has ended.

mod drive;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use kvferry_proto::{
    Block, BlockId, Cause, ChunkSize, EngineId, GroupOutcome, Lane, LaneKind, LocalBlocks, Offer, OfferId, PeerId,
    Rank, Reader, Release, Shard, Token,
    hello::Welcome,
    pull::Retry,
    puller::{self, Progress, PullId, Puller, Start},
    quarantine::Quarantine,
    session::{self, PeerSession},
    staging::Ring,
};

use crate::{
    fabric::Fabric,
    memory::{Layout, LocalMem, Part},
    producer::Request,
    trace::{Micros, Promise},
    world::{Event, World, say},
};

/// A decode rank; its process comes and goes.
pub(crate) struct Consumer {
    pub engine: u32,
    id: EngineId,
    rank: Rank,
    pub reader: Reader,
    shard: Shard,
    pub life: u64,
    pub process: Option<Process>,
}

/// One process life of a decode rank.
pub(crate) struct Process {
    pub me: PeerId,
    pub puller: Puller<Box<dyn Lane>>,
    pub sessions: BTreeMap<usize, Session>,
    pub quarantine: Quarantine,
    pub layout: Layout,
    /// Its number in the fabric.
    pub local: usize,
    /// Set if its memory is GPU memory.
    pub gpu: Option<Gpu>,
    free: Vec<Vec<u32>>,
    pub pulls: BTreeMap<u64, Pull>,
    next_pull: u64,
    /// Requests whose offers were held before their pulls.
    pub held: BTreeSet<usize>,
    /// Those that still wait for their pulls.
    pub waiting: BTreeSet<usize>,
    drive_sessions: VecDeque<puller::Out>,
    drive_puller: VecDeque<puller::In<Box<dyn Lane>>>,
    sessions_due: bool,
    puller_due: bool,
    wake_at: Option<Micros>,
    spins: u32,
    closing: bool,
}

/// GPU memory of a decode rank.
pub(crate) struct Gpu {
    /// The ring of its staged lanes.
    pub ring: Arc<Ring>,
    /// NICs write it directly.
    direct: bool,
    /// Memory of a peer on the same host can be mapped.
    mapped: bool,
}

pub(crate) struct Session {
    machine: PeerSession,
    pub conn: Option<usize>,
    /// When the dial that runs began.
    pub dialing: Option<Micros>,
    /// The answer to the last dial.
    pub welcome: Option<(usize, Arc<Welcome>)>,
}

/// A pull, as the engine that started it knows it.
pub(crate) struct Pull {
    pub r: usize,
    pub progress: Arc<Progress>,
    pub wanted: Vec<LocalBlocks>,
    pub producers: Vec<usize>,
    pub started: Micros,
    pub deadline: Micros,
    pub attempts: u32,
    pub decided: Option<Micros>,
    /// What it decided, unless it ended at once.
    pub frozen: Option<Vec<GroupOutcome>>,
    pub ended: bool,
    pub wedged: bool,
    pub healing: bool,
    /// The field of its name that was changed: it must load nothing.
    pub mangled: Option<&'static str>,
    /// Why it may lose blocks.
    pub excused: Option<&'static str>,
}

impl Pull {
    /// Blocks that it holds.
    pub(crate) fn blocks(&self) -> usize {
        self.wanted.iter().map(|w| w.wants().count()).sum()
    }
}

impl Process {
    /// Its device is unusable, or a good part of its ring is lost.
    pub(crate) fn device_lost(&self, fabric: &Fabric) -> bool {
        let ring = self.gpu.as_ref().map(|gpu| &gpu.ring);
        fabric.locals[self.local].dead_device || ring.is_some_and(|r| r.lost() * 4 > r.slots())
    }
}

impl Consumer {
    pub(crate) fn session(&mut self, p: usize) -> Option<&mut Session> {
        self.process.as_mut()?.sessions.get_mut(&p)
    }
}

impl Process {
    /// Whether it has ever held this offer.
    pub(crate) fn holds(&self, requests: &[Request], id: OfferId) -> bool {
        self.held.iter().any(|&r| requests[r].offer.id == id)
    }
}

impl World {
    pub(crate) fn make_consumers(&mut self) {
        let heads = self.shape.heads;
        let whole = Shard::whole(heads, 3);
        let single = self.engines.iter().all(|e| e.ranks.len() == 1);
        let mut add = |engine: u32, rank: u32, reader: Reader, shard: Shard| {
            self.consumers.push(Consumer {
                engine,
                id: format!("decode-{engine}").parse().expect("an engine id"),
                rank: Rank(rank),
                reader,
                shard,
                life: 0,
                process: None,
            });
        };
        let mut engine = 0;
        if single && self.rng.chance(250) {
            // Two ranks of one engine read every offer, each its heads.
            let first = self.rng.between(1, u64::from(heads) - 1) as u32;
            let half = |rank, first_head, heads| Shard { tp_rank: rank, tp_size: 2, first_head, heads, ..whole };
            add(0, 0, Reader { index: 0, of: 2 }, half(0, 0, first));
            add(0, 1, Reader { index: 1, of: 2 }, half(1, first, heads - first));
            engine = 1;
        }
        let more = self.rng.below(3) as u32 + u32::from(engine == 0);
        for i in engine..(engine + more).min(3) {
            add(i, 0, Reader::ONLY, whole);
        }
        for c in 0..self.consumers.len() {
            self.restart_consumer(c);
        }
    }

    pub(crate) fn restart_consumer(&mut self, c: usize) {
        if self.consumers[c].process.as_ref().is_some_and(|p| p.closing) {
            self.crash_consumer(c);
        }
        if self.consumers[c].process.is_some() {
            return;
        }
        let shape = self.shape.clone();
        let shard = self.consumers[c].shard;
        let layout = shape.layout(&mut self.rng, &shard, 64);
        let me = PeerId {
            engine: self.consumers[c].id.clone(),
            rank: self.consumers[c].rank,
            incarnation: self.incarnation(),
        };
        let gpu = self.weather.gpu;
        let gpu = self.rng.chance(gpu).then(|| Gpu {
            // Few slots, or slots that are shorter than most chunks, so that chunks are read in several batches.
            ring: Arc::new(if self.rng.chance(400) {
                Ring::with_slots(self.rng.between(8, 16) as u32, 16 * self.rng.between(5, 20))
            } else {
                Ring::with_slots(self.rng.between(16, 64) as u32, 16 * self.rng.between(6, 60))
            }),
            direct: self.rng.chance(400),
            mapped: self.rng.chance(400),
        });
        let mut fabric = self.fabric.get();
        let local = fabric.locals.len();
        fabric.locals.push(LocalMem::new(&shape, &layout));
        if let Some(gpu) = &gpu {
            let words = gpu.ring.slots() * gpu.ring.slot_bytes() as usize / 8;
            fabric.locals[local].ring = vec![(0, (usize::MAX, 0)); words];
        }
        drop(fabric);
        say!(self, "consumer {c} starts as {}", me.incarnation);
        self.consumers[c].life += 1;
        self.consumers[c].process = Some(Process {
            puller: Puller::new(layout.pool.clone(), shard, 1 << 20, self.weather.looks),
            sessions: BTreeMap::new(),
            quarantine: Quarantine::new(&layout.pool),
            local,
            gpu,
            free: shape.groups.iter().map(|_| (0..64).rev().collect()).collect(),
            pulls: BTreeMap::new(),
            next_pull: 1,
            held: BTreeSet::new(),
            waiting: BTreeSet::new(),
            drive_sessions: VecDeque::new(),
            drive_puller: VecDeque::new(),
            sessions_due: false,
            puller_due: false,
            wake_at: None,
            spins: 0,
            closing: false,
            me,
            layout,
        });
    }

    pub(crate) fn crash_consumer(&mut self, c: usize) {
        let Some(process) = &self.consumers[c].process else { return };
        if !process.closing && self.calm.is_none() && self.rng.chance(300) {
            // Some shut down first.
            return self.close_consumer(c);
        }
        say!(self, "consumer {c} dies");
        let process = self.consumers[c].process.take();
        self.consumers[c].life += 1;
        if let Some(process) = process {
            self.fabric.get().local_died(process.local);
            self.pending.retain(|k, _| k.0 != process.me.incarnation);
            // Its lanes go with it.
            drop(process);
        }
        for conn in 0..self.conns.len() {
            if self.conns[conn].consumer == c && !self.conns[conn].broken {
                self.break_conn(conn);
            }
        }
    }

    fn close_consumer(&mut self, c: usize) {
        say!(self, "consumer {c} shuts down");
        let now = self.clock();
        let Some(process) = &mut self.consumers[c].process else { return };
        process.closing = true;
        for p in process.pulls.values_mut() {
            p.excused.get_or_insert("its consumer shut down");
        }
        for &r in &process.held {
            self.requests[r].excused.get_or_insert("a consumer that held it shut down");
        }
        process.puller.handle(now, puller::In::Shutdown);
        self.drain_puller(c);
        let all: Vec<usize> =
            self.consumers[c].process.as_ref().map_or(Vec::new(), |p| p.sessions.keys().copied().collect());
        self.drive_sessions(c, self.consumers[c].life);
        for p in all {
            self.session(c, p, session::In::Close);
        }
        let t = self.now + 20_000;
        self.at(t, Event::CrashConsumer { c });
    }

    pub(crate) fn heal(&mut self, c: usize, engine: usize) {
        self.healing -= 1;
        if !self.engine_up(engine) {
            return self.broken(Promise::Healing, format!("engine {engine} is not up after the storm"));
        }
        self.request(Some((c, engine)));
    }

    /// The router hands an offer over.
    pub(crate) fn handover(&mut self, r: usize, c: usize, pull: bool, heal: bool) {
        let offer = self.requests[r].offer.clone();
        let (reader, shard, life) = (self.consumers[c].reader, self.consumers[c].shard, self.consumers[c].life);
        let games = self.weather.games.clone();
        let mangled = (!heal && self.rng.chance(games.mangle)).then(|| self.mangle(r));
        let offer = mangled.as_ref().map_or(offer, |(changed, _)| changed.clone());
        let mangled = mangled.map(|(_, what)| what);
        let awaited = self.requests[r].awaited;
        let Some(process) = &mut self.consumers[c].process else { return };
        if process.closing {
            return;
        }
        // A name with another token leaves the hold alone.
        if mangled != Some("token") {
            process.waiting.remove(&r);
        }
        if mangled.is_some_and(|what| what != "token") {
            self.requests[r].excused.get_or_insert("a changed name of it was used");
        }
        if !pull {
            if mangled.is_none() {
                self.requests[r].excused.get_or_insert("it was released without a pull");
            }
            if process.held.contains(&r) {
                return self.puller(c, puller::In::Release(offer));
            }
            for rank in &offer.ranks {
                let release = Release {
                    claim: None,
                    offer: offer.id,
                    token: offer.token,
                    reader: Reader::ONLY,
                    all: self.rng.chance(500),
                };
                let out = puller::Out::Release(rank.addr.as_str().into(), rank.incarnation, release);
                process.drive_sessions.push_back(out);
            }
            return self.schedule_sessions(c);
        }
        let sources: Vec<usize> = (0..offer.ranks.len())
            .filter(|&k| self.procs[self.requests[r].ranks[k].proc].id.rank == offer.ranks[k].rank)
            .filter(|&k| {
                let p = self.procs[self.requests[r].ranks[k].proc].producer;
                self.producers[p].shard.common_heads(&shard).is_some()
            })
            .collect();
        if !heal && mangled.is_none() && self.rng.chance(games.hold) && process.held.insert(r) {
            process.waiting.insert(r);
            say!(self, "consumer {c}: holds {}", offer.id);
            let limit = self.weather.lease.hard_cap;
            self.puller(
                c,
                puller::In::Hold(
                    Box::new(puller::HoldRequest {
                        offer,
                        sources,
                        reader,
                        awaited,
                        seen: puller::HoldSetter::of(&puller::Hold::default()),
                        patience: std::time::Duration::from_secs(2),
                    }),
                    limit,
                ),
            );
            let most = 4 * self.weather.lease.unclaimed.as_micros() as Micros;
            let t = self.now + self.rng.below(most);
            if t >= self.now + limit.as_micros() as Micros {
                self.requests[r].excused.get_or_insert("it waits longer than offers are held");
            }
            return self.at(t, Event::Handover { r, c, pull: true });
        }
        let mut wanted = Vec::new();
        for (g, o) in self.requests[r].contents.groups.iter().enumerate() {
            let end = o.first_position + o.blocks.len() as u32;
            // Some more positions than were offered, at either end; some are local hits already.
            let first = o.first_position.saturating_sub(self.rng.below(2) as u32 * u32::from(!heal));
            let end = end + self.rng.below(2) as u32 * u32::from(!heal);
            let hits = if self.rng.chance(300) { self.rng.below(u64::from(end - first)) as u32 } else { 0 };
            let blocks = (first..end)
                .map(|p| {
                    let null = p.checked_sub(o.first_position).is_some_and(|i| o.blocks.get(i as usize) == Some(&None));
                    let skip = p < first + hits || (null && self.rng.chance(900)) || self.rng.chance(30);
                    if skip { None } else { process.free[g].pop().map(BlockId) }
                })
                .collect();
            wanted.push(LocalBlocks { group: o.group, first_position: first, blocks });
        }
        if self.rng.chance(200) {
            wanted.reverse();
        }
        let id = process.next_pull;
        process.next_pull += 1;
        let blocks: Vec<Block> = wanted.iter().flat_map(LocalBlocks::wanted_blocks).collect();
        if let Err(error) = process.quarantine.take(id, blocks.iter().copied()) {
            return self.broken(Promise::Quiet, format!("free blocks are not free: {error}"));
        }
        {
            let mut f = self.fabric.get();
            let local = &mut f.locals[process.local];
            for b in &blocks {
                let at = local.index(b.group, b.id);
                local.holders[at] = id;
            }
        }
        let producers: Vec<usize> =
            sources.iter().map(|&k| self.procs[self.requests[r].ranks[k].proc].producer).collect();
        // A dial or a new stream that the storm swallowed may hang for longer than a pull's patience.
        let hangs = producers.iter().any(|p| {
            let Some(s) = process.sessions.get(p) else { return false };
            let opening = s.conn.and_then(|c| self.conns[c].opening);
            s.dialing.max(opening).is_some_and(|t| self.calm.is_none_or(|calm| t <= calm))
        });
        let short = self.rng.chance(games.short_deadline) && !heal;
        let late_local = self.rng.chance(games.late_local) && !heal;
        let deadline = self.now
            + match (heal, short) {
                (true, _) => 700_000,
                (_, true) => self.rng.tail(0, 5000, 30_000),
                _ => self.rng.between(300_000, 800_000),
            };
        let mut lanes = vec![LaneKind::Verbs, LaneKind::Local, LaneKind::Tcp];
        self.rng.shuffle(&mut lanes);
        lanes.truncate(self.rng.between(1, 3) as usize);
        let progress = Arc::<Progress>::default();
        let info = Pull {
            r,
            progress: progress.clone(),
            wanted: wanted.clone(),
            producers,
            started: self.now,
            deadline,
            attempts: self.weather.retry.attempts,
            decided: None,
            frozen: None,
            ended: false,
            wedged: false,
            healing: heal,
            mangled,
            excused: match (short, self.weather.sure_network()) {
                _ if mangled.is_some() => Some("its name was changed"),
                (true, _) => Some("a short deadline"),
                (_, false) => Some("the network"),
                _ => (hangs && self.unsure.is_some()).then_some("its session hangs"),
            },
        };
        process.pulls.insert(id, info);
        self.stats.pulls += 1;
        say!(
            self,
            "consumer {c}: pull {id} of v{} {}, deadline in {} us, {wanted:?}",
            self.requests[r].version,
            offer.id,
            deadline - self.now
        );
        self.scribble_local(c, &blocks);
        let start = Start {
            id: PullId(id),
            offer: offer.clone(),
            sources,
            wanted,
            reader,
            started: self.instant(self.now),
            deadline: self.instant(deadline),
            retry: Retry { awaited, ..self.weather.retry },
            chunk: ChunkSize {
                per_pull: self.rng.between(1, 16) as u32,
                min_bytes: self.rng.between(1, 400),
                max_bytes: self.rng.between(200, 4000),
            },
            lanes,
            local_ready: !late_local,
            progress,
        };
        self.puller(c, puller::In::Start(Box::new(start)));
        if late_local {
            let t = self.now + self.rng.tail(0, 3000, 20_000);
            self.at(t, Event::LocalReady { c, e: life, pull: id });
        }
        if self.rng.chance(games.cancel) && !heal {
            let t = self.now + self.rng.tail(0, 10_000, 100_000);
            self.at(t, Event::Cancel { c, e: life, pull: id });
        }
    }

    /// A request's name, with one field changed.
    fn mangle(&mut self, r: usize) -> (Arc<Offer>, &'static str) {
        let mut name = Offer::clone(&self.requests[r].offer);
        let what = *self.rng.pick(&["token", "tokens", "fingerprint"]);
        match what {
            "token" => name.token = Token::from_bytes([7; 16]),
            "tokens" => name.tokens += 1,
            _ => drop(name.fingerprints.insert("prompt".into(), "another".into())),
        }
        (Arc::new(name), what)
    }

    /// The engine writes local blocks for its own purposes.
    pub(crate) fn scribble_local(&mut self, c: usize, blocks: &[Block]) {
        let version = self.version();
        let Some(process) = &self.consumers[c].process else { return };
        let mut f = self.fabric.get();
        for b in blocks {
            let memory = &mut f.locals[process.local].memory;
            memory.write(&self.shape, &process.layout, (b.group, b.id), 0, version, Part::All);
        }
    }

    pub(crate) fn local_ready(&mut self, c: usize, e: u64, pull: u64) {
        if self.consumers[c].life != e {
            return;
        }
        let Some(info) = self.consumers[c].process.as_ref().and_then(|p| p.pulls.get(&pull)) else { return };
        if info.ended {
            return;
        }
        // Earlier work wrote the blocks until now.
        let blocks: Vec<Block> = info.wanted.iter().flat_map(LocalBlocks::wanted_blocks).collect();
        self.scribble_local(c, &blocks);
        self.puller(c, puller::In::LocalReady(PullId(pull)));
    }

    pub(crate) fn cancel(&mut self, c: usize, e: u64, pull: u64) {
        if self.consumers[c].life == e
            && let Some(info) = self.consumers[c].process.as_mut().and_then(|p| p.pulls.get_mut(&pull))
        {
            info.excused.get_or_insert("it was cancelled");
            say!(self, "consumer {c}: cancel pull {pull}");
            self.puller(c, puller::In::Cancel(PullId(pull), Cause::Cancelled));
        }
    }

    /// A consumer's pulls from an address may lose blocks.
    pub(crate) fn excuse_peer(&mut self, c: usize, p: usize, why: &'static str) {
        let Some(process) = &mut self.consumers[c].process else { return };
        for pull in process.pulls.values_mut().filter(|pull| pull.producers.contains(&p)) {
            pull.excused.get_or_insert(why);
        }
    }

    /// A pull has ended: the engine reuses its blocks.
    fn ended(&mut self, c: usize, ended: puller::Ended) {
        self.check_ended(c, &ended);
        let Some(process) = &mut self.consumers[c].process else { return };
        let Some(pull) = process.pulls.get_mut(&ended.pull.0) else { return };
        pull.ended = true;
        let blocks: Vec<Block> = pull.wanted.iter().flat_map(LocalBlocks::wanted_blocks).collect();
        process.quarantine.give_back(ended.pull.0, blocks.iter().copied());
        {
            let mut f = self.fabric.get();
            let local = &mut f.locals[process.local];
            for b in &blocks {
                let at = local.index(b.group, b.id);
                local.holders[at] = 0;
            }
        }
        for b in &blocks {
            let g = self.shape.groups.iter().position(|g| g.id == b.group.0).unwrap_or(0);
            process.free[g].push(b.id.0);
        }
        if self.rng.chance(500) {
            self.scribble_local(c, &blocks);
        }
    }
}
