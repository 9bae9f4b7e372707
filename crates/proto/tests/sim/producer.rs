//! Prefill engines: processes that fill blocks, offer them, and use them again as soon as they hear that they are free.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Instant,
};

use kvferry_proto::{
    Machine,
    block::{BlockId, EngineId, GroupId, Incarnation, OfferId, Rank},
    frame::{ClaimId, ClientBody, ClientFrame, Gone, PeerId, ServerBody, ServerFrame},
    group::GroupKind,
    hello::Welcome,
    lane::LaneKind,
    offer::{Offer, OfferGroup, OfferRank},
    shard::Shard,
    table::{self, Freed, OfferTable},
};

use crate::{
    checks::Lease,
    memory::{Layout, Part, ProcMem, Version},
    rng::Rng,
    trace::{Micros, Promise},
    world::{Event, World, say},
};

/// An engine: ranks that share a block table.
pub(crate) struct Engine {
    pub id: EngineId,
    /// Addresses of its ranks.
    pub ranks: Vec<usize>,
    /// Free blocks of each group, last freed last.
    free: Vec<Vec<u32>>,
    blocks: u32,
    lives: u32,
}

/// An address that a rank listens at.
pub(crate) struct Producer {
    pub addr: Arc<str>,
    pub engine: usize,
    pub rank: Rank,
    pub shard: Shard,
    /// The process that listens there.
    pub proc: Option<usize>,
    /// A dead one's host answers nothing, not even a refusal.
    pub dead_silent: bool,
    pub silent_once: bool,
    /// The process there runs another model.
    pub wrong_model: bool,
}

/// One process life of a rank.
pub(crate) struct Proc {
    pub producer: usize,
    pub id: PeerId,
    pub table: OfferTable,
    pub layout: Layout,
    pub welcome: Arc<Welcome>,
    pub alive: bool,
    /// When it died, and its host told so.
    pub died: Option<Micros>,
    pub stopped: bool,
    pub resumed: Micros,
    draining: bool,
    outs: VecDeque<table::Out>,
    outs_scheduled: bool,
    wake_at: Option<Micros>,
    /// The stream of each consumer incarnation.
    pub sessions: BTreeMap<Incarnation, usize>,
    /// Frames that came while it was stopped.
    pub inbox: VecDeque<(usize, ClientFrame)>,
    pub leases: BTreeMap<OfferId, Lease>,
    pub claimed: BTreeMap<(Incarnation, ClaimId), OfferId>,
    /// Offers that were released before they were entered.
    pub early_released: BTreeSet<OfferId>,
    requests: BTreeMap<OfferId, (usize, usize)>,
}

/// A request that an engine prefilled.
pub(crate) struct Request {
    pub version: Version,
    pub engine: usize,
    pub offer: Arc<Offer>,
    /// By rank of the engine: the process, and whether its blocks are back.
    pub ranks: Vec<RankPart>,
    given_back: bool,
    /// Why its pulls may lose blocks.
    pub excused: Option<&'static str>,
}

pub(crate) struct RankPart {
    pub proc: usize,
    pub ready: bool,
    pub back: bool,
}

impl World {
    pub(crate) fn make_engines(&mut self) {
        let heads = self.shape.heads;
        let whole = Shard::whole(heads, 3);
        let split_heads = |rng: &mut Rng, n: u32| {
            let mut cuts: Vec<u32> = (1..heads).collect();
            rng.shuffle(&mut cuts);
            cuts.truncate(n as usize - 1);
            cuts.sort_unstable();
            cuts.insert(0, 0);
            cuts.push(heads);
            cuts.windows(2)
                .enumerate()
                .map(|(i, w)| Shard {
                    tp_rank: i as u32,
                    tp_size: cuts.len() as u32 - 1,
                    first_head: w[0],
                    heads: w[1] - w[0],
                    ..whole
                })
                .collect::<Vec<_>>()
        };
        let by_layers = vec![
            Shard { pp_size: 2, layers: 1, ..whole },
            Shard { pp_rank: 1, pp_size: 2, first_layer: 1, layers: 2, ..whole },
        ];
        let plans: Vec<Vec<Shard>> = match self.rng.below(8) {
            0..=1 => vec![vec![whole]],
            2..=3 => vec![vec![whole], vec![whole]],
            4 => vec![vec![whole]; 3],
            5 => vec![split_heads(&mut self.rng, 2), vec![whole]],
            6 => vec![split_heads(&mut self.rng, heads.min(3))],
            _ => vec![by_layers, vec![whole]],
        };
        for (e, shards) in plans.into_iter().enumerate() {
            let blocks = self.rng.between(16, 40) as u32;
            let free = self.shape.groups.iter().map(|_| (0..blocks).rev().collect()).collect();
            let id = format!("prefill-{e}").parse().expect("an engine id");
            let first = self.producers.len();
            for (i, shard) in shards.iter().enumerate() {
                let p = self.producers.len();
                self.producers.push(Producer {
                    addr: format!("p{p}:7400").into(),
                    engine: e,
                    rank: Rank(i as u32),
                    shard: *shard,
                    proc: None,
                    dead_silent: false,
                    silent_once: false,
                    wrong_model: false,
                });
            }
            self.engines.push(Engine { id, ranks: (first..first + shards.len()).collect(), free, blocks, lives: 0 });
            for p in first..first + shards.len() {
                self.start_proc(p);
            }
        }
    }

    fn start_proc(&mut self, p: usize) {
        let q = self.procs.len();
        let (e, rank, shard) = (self.producers[p].engine, self.producers[p].rank, self.producers[p].shard);
        let blocks = self.engines[e].blocks;
        let shape = self.shape.clone();
        let layout = shape.layout(&mut self.rng, &shard, blocks);
        let id = PeerId { engine: self.engines[e].id.clone(), rank, incarnation: self.incarnation() };
        let mut lanes = vec![LaneKind::Verbs, LaneKind::Local, LaneKind::Tcp];
        self.rng.shuffle(&mut lanes);
        let welcome = Welcome {
            version: 1,
            features: 1,
            peer: id.clone(),
            engine_incarnation: id.incarnation,
            model: self.model.clone(),
            shard,
            pool: layout.pool.clone(),
            fence_slots: self.weather.limits.offers as u32,
            lanes,
            host: String::new(),
            silence: self.weather.session.silence,
        };
        let table = OfferTable::new(self.weather.lease.clone(), self.weather.limits.clone(), self.entropy());
        self.fabric.get().procs.push(ProcMem {
            addr: p,
            alive: true,
            stopped: false,
            memory: layout.zeroed(),
            words: Vec::new(),
        });
        say!(self, "{} is process {q}, {} of {}", self.producers[p].addr, id.incarnation, id.engine);
        self.procs.push(Proc {
            producer: p,
            id,
            table,
            layout,
            welcome: Arc::new(welcome),
            alive: true,
            died: None,
            stopped: false,
            resumed: 0,
            draining: false,
            outs: VecDeque::new(),
            outs_scheduled: false,
            wake_at: None,
            sessions: BTreeMap::new(),
            inbox: VecDeque::new(),
            leases: BTreeMap::new(),
            claimed: BTreeMap::new(),
            early_released: BTreeSet::new(),
            requests: BTreeMap::new(),
        });
        self.producers[p].proc = Some(q);
        self.producers[p].wrong_model = false;
    }

    /// Whether an engine can offer: all its ranks are well.
    pub(crate) fn engine_up(&self, e: usize) -> bool {
        self.engines[e].ranks.iter().all(|&p| {
            !self.producers[p].wrong_model
                && self.producers[p].proc.is_some_and(|q| {
                    let proc = &self.procs[q];
                    proc.alive && !proc.stopped && !proc.draining
                })
        })
    }

    /// A request is prefilled and offered. `heal`: for this consumer, by this engine, with nothing in its way.
    pub(crate) fn request(&mut self, heal: Option<(usize, usize)>) {
        let up: Vec<usize> = (0..self.engines.len()).filter(|&e| self.engine_up(e)).collect();
        let e = match heal {
            Some((_, e)) => e,
            None if up.is_empty() => return,
            None => *self.rng.pick(&up),
        };
        let Some(groups) = self.allocate(e) else { return };
        let games = self.weather.games.clone();
        let version = self.version();
        let procs: Vec<usize> = self.engines[e].ranks.iter().filter_map(|&p| self.producers[p].proc).collect();
        let incarnations: Vec<_> = procs.iter().map(|&q| self.procs[q].id.incarnation).collect();
        let offer = Offer {
            id: self.offer_id(),
            engine: self.engines[e].id.clone(),
            incarnation: Incarnation::of_engine(&incarnations).expect("an engine has ranks"),
            ranks: procs
                .iter()
                .map(|&q| OfferRank {
                    rank: self.procs[q].id.rank,
                    incarnation: self.procs[q].id.incarnation,
                    addr: self.producers[self.procs[q].producer].addr.to_string(),
                })
                .collect(),
            groups,
            tokens: 1,
            request: format!("v{version}"),
        };
        if let Err(error) = offer.check(1 << 20) {
            self.broken(Promise::Sound, format!("the simulation's own offer: {error}"));
        }
        let r = self.requests.len();
        self.stats.offers += 1;
        say!(self, "engine {e} offers v{version} as {} {:?}", offer.id, offer.groups);
        let late = self.rng.chance(games.late_ready);
        self.requests.push(Request {
            version,
            engine: e,
            offer: Arc::new(offer),
            ranks: procs.iter().map(|&proc| RankPart { proc, ready: !late, back: false }).collect(),
            given_back: false,
            excused: None,
        });
        let early = if self.rng.chance(games.early) { self.rng.tail(100, 10_000, 60_000) } else { 0 };
        if early > 20_000 {
            self.requests[r].excused = Some("the books were very late");
        }
        for k in 0..procs.len() {
            self.fill(r, k, if late { Part::Even } else { Part::All });
            let t = self.now + if early == 0 { 0 } else { self.rng.below(early) };
            if t == self.now {
                self.register(r, k);
            } else {
                self.at(t, Event::Register { r, k });
            }
            if late {
                let t = t + self.rng.tail(10, 8000, 40_000);
                self.at(t, Event::Ready { r, k });
            }
        }
        if let Some((c, _)) = heal {
            return self.handover(r, c, true, true);
        }
        self.route(r);
        if self.rng.chance(games.revoke) {
            let t = self.now + self.rng.tail(10, 15_000, 80_000);
            self.at(t, Event::Revoke { r });
        }
    }

    /// The router: who gets the offer, and when.
    fn route(&mut self, r: usize) {
        let games = self.weather.games.clone();
        let ranks = self.requests[r].ranks.len();
        if self.rng.chance(games.unpulled) {
            let t = self.now + self.rng.tail(0, 2000, 50_000);
            match self.rng.below(3) {
                0 => (0..ranks).for_each(|k| self.at(t, Event::Forget { r, k })),
                1 => {
                    let c = self.rng.below(self.consumers.len() as u64) as usize;
                    self.at(t, Event::Handover { r, c, pull: false });
                }
                _ => {}
            }
            return;
        }
        let mut engines: Vec<u32> = self.consumers.iter().map(|c| c.engine).collect();
        engines.dedup();
        self.rng.shuffle(&mut engines);
        engines.truncate(if self.rng.chance(games.twice) { 2 } else { 1 });
        if engines.len() > 1 {
            self.requests[r].excused = Some("two engines pull it: the first to finish releases it");
        }
        for engine in engines {
            let unclaimed = self.weather.lease.unclaimed.as_micros() as Micros;
            let late = if self.rng.chance(games.late_handover) { self.rng.below(unclaimed * 3 / 2) } else { 0 };
            if late > unclaimed / 2 {
                self.requests[r].excused = Some("the router was very late");
            }
            for c in 0..self.consumers.len() {
                if self.consumers[c].engine == engine {
                    let t = self.now + late + self.rng.tail(0, 300, 5000);
                    self.at(t, Event::Handover { r, c, pull: true });
                }
            }
        }
    }

    fn allocate(&mut self, e: usize) -> Option<Vec<OfferGroup>> {
        let shape = self.shape.clone();
        let mut groups = Vec::new();
        let n = self.rng.between(1, 12);
        for (g, s) in shape.groups.iter().enumerate() {
            let first_position = *self.rng.pick(&[0, 0, 1, 3]);
            let mut blocks: Vec<Option<BlockId>> = Vec::new();
            let nulls = if s.kind == GroupKind::SlidingWindow { self.rng.below(n) } else { 0 };
            for i in 0..n {
                if i < nulls || (s.kind == GroupKind::SlidingWindow && self.rng.chance(50)) {
                    blocks.push(None);
                    continue;
                }
                let Some(b) = self.engines[e].free[g].pop() else { break };
                blocks.push(Some(BlockId(b)));
            }
            if self.rng.chance(300) {
                blocks.reverse();
            }
            groups.push(OfferGroup { group: GroupId(s.id), first_position, blocks });
        }
        if groups.iter().all(|g| g.blocks.is_empty()) { None } else { Some(groups) }
    }

    /// The engine writes the request's KV into its blocks at one rank.
    fn fill(&mut self, r: usize, k: usize, part: Part) {
        let request = &self.requests[r];
        let q = request.ranks[k].proc;
        let mut fabric = self.fabric.get();
        for g in &request.offer.groups {
            for (i, b) in g.blocks.iter().enumerate() {
                if let Some(b) = b {
                    let position = g.first_position + i as u32;
                    let memory = &mut fabric.procs[q].memory;
                    memory.write(&self.shape, &self.procs[q].layout, (g.group, *b), position, request.version, part);
                }
            }
        }
    }

    fn awake(&mut self, q: usize, event: Event) -> bool {
        if self.procs[q].alive && self.procs[q].stopped {
            let t = self.now + 1000;
            self.at(t, event);
            return false;
        }
        self.procs[q].alive
    }

    pub(crate) fn register(&mut self, r: usize, k: usize) {
        let q = self.requests[r].ranks[k].proc;
        if !self.awake(q, Event::Register { r, k }) || self.requests[r].ranks[k].back {
            return;
        }
        let (id, ready, now) = (self.requests[r].offer.id, self.requests[r].ranks[k].ready, self.clock());
        self.procs[q].requests.insert(id, (r, k));
        self.lease_begins(q, id, ready);
        match self.procs[q].table.offer(now, id, ready) {
            Ok(()) => {}
            Err(error) => {
                say!(self, "process {q}: cannot offer v{}: {error}", self.requests[r].version);
                self.procs[q].leases.remove(&id);
                self.requests[r].excused = Some("the books refused it");
                self.rank_back(r, k);
            }
        }
        self.drain_table(q);
    }

    pub(crate) fn ready(&mut self, r: usize, k: usize) {
        let q = self.requests[r].ranks[k].proc;
        if !self.awake(q, Event::Ready { r, k }) || self.requests[r].ranks[k].back {
            return;
        }
        // An offer that is not entered yet is entered as ready.
        self.requests[r].ranks[k].ready = true;
        self.fill(r, k, Part::Odd);
        let id = self.requests[r].offer.id;
        self.lease_ready(q, id);
        self.table(q, table::In::Ready(id));
    }

    pub(crate) fn revoke(&mut self, r: usize) {
        for k in 0..self.requests[r].ranks.len() {
            let q = self.requests[r].ranks[k].proc;
            if self.procs[q].alive && !self.procs[q].stopped {
                let id = self.requests[r].offer.id;
                // A name that is taken back cannot be entered any more; engines here enter whatever they have named.
                let Some(lease) = self.procs[q].leases.get_mut(&id) else { continue };
                lease.revoked = true;
                self.table(q, table::In::Revoke(id));
            }
        }
    }

    /// A release without a session reaches a rank.
    pub(crate) fn forget(&mut self, r: usize, k: usize) {
        let q = self.requests[r].ranks[k].proc;
        if self.awake(q, Event::Forget { r, k }) {
            let id = self.requests[r].offer.id;
            self.requests[r].excused.get_or_insert("a scheduler released it");
            self.lease_released_by_anyone(q, id);
            self.table(q, table::In::Release(None, id));
        }
    }

    pub(crate) fn drain_proc(&mut self, p: usize) {
        if let Some(q) = self.producers[p].proc.filter(|&q| !self.procs[q].stopped) {
            self.procs[q].draining = true;
            for r in self.requests.iter_mut().filter(|r| r.ranks.iter().any(|k| k.proc == q)) {
                r.excused.get_or_insert("its producer drains");
            }
            self.table(q, table::In::Drain);
        }
    }

    pub(crate) fn table(&mut self, q: usize, event: table::In) {
        let now = self.clock();
        self.procs[q].table.handle(now, event);
        self.drain_table(q);
    }

    pub(crate) fn wake_proc(&mut self, q: usize) {
        if self.procs[q].wake_at.is_some_and(|t| t <= self.now) {
            self.procs[q].wake_at = None;
        }
        if !self.procs[q].alive || self.procs[q].stopped {
            return;
        }
        let now = self.clock();
        self.procs[q].table.tick(now);
        if self.procs[q].table.next_timeout().is_some_and(|t| t <= now) {
            self.broken(Promise::Sound, format!("process {q}'s books want a tick in the past, after a tick"));
        }
        self.drain_table(q);
    }

    /// What the books want done is queued, in order; the engine may be slow to do it.
    fn drain_table(&mut self, q: usize) {
        while let Some(out) = self.procs[q].table.poll() {
            self.lease_out(q, &out);
            self.procs[q].outs.push_back(out);
        }
        let next: Option<Instant> = self.procs[q].table.next_timeout();
        if let Some(next) = next {
            let t = (self.micros(next) + self.rng.below(400)).max(self.now + 1);
            if self.procs[q].wake_at.is_none_or(|w| t < w) {
                self.procs[q].wake_at = Some(t);
                self.at(t, Event::WakeProc { q });
            }
        }
        if !self.procs[q].outs_scheduled {
            self.procs[q].outs_scheduled = true;
            self.do_outs(q);
        }
    }

    pub(crate) fn do_outs(&mut self, q: usize) {
        while !self.procs[q].outs.is_empty() && self.procs[q].alive && !self.procs[q].stopped {
            let stall = self.weather.games.stall;
            if self.rng.chance(stall) {
                let t = self.now + self.rng.tail(20, 1500, 6000);
                return self.at(t, Event::Outs { q });
            }
            if let Some(out) = self.procs[q].outs.pop_front() {
                self.do_out(q, out);
            }
        }
        self.procs[q].outs_scheduled = false;
    }

    fn do_out(&mut self, q: usize, out: table::Out) {
        match out {
            table::Out::Publish { offer, slot, nonce } => {
                say!(self, "process {q}: {offer} is live in slot {slot}");
                self.fabric.get().procs[q].set_word(slot, nonce.get());
            }
            table::Out::Withdraw { offer, slot } => {
                say!(self, "process {q}: {offer} leaves slot {slot}");
                self.fabric.get().procs[q].set_word(slot, 0);
            }
            table::Out::Freed(Freed { offer, why }) => {
                say!(self, "process {q}: blocks of {offer} are free: {why:?}");
                let Some(&(r, k)) = self.procs[q].requests.get(&offer) else { return };
                match why {
                    Gone::Expired => self.stats.expired += 1,
                    Gone::HardCap => self.stats.capped += 1,
                    Gone::Revoked => self.stats.revoked += 1,
                    _ => self.stats.released += 1,
                }
                let reuse = self.weather.reuse;
                if self.rng.chance(reuse) {
                    self.scribble(r, k);
                }
                self.rank_back(r, k);
            }
            table::Out::Send(to, frame) => {
                if let Some(&conn) = self.procs[q].sessions.get(&to) {
                    self.send_to_client(conn, frame);
                }
            }
            table::Out::Broadcast(frame) => {
                let all: Vec<_> = self.procs[q].sessions.values().copied().collect();
                for conn in all {
                    self.send_to_client(conn, frame.clone());
                }
            }
        }
    }

    /// Free blocks are somebody else's at once.
    fn scribble(&mut self, r: usize, k: usize) {
        let version = self.version();
        let request = &self.requests[r];
        let q = request.ranks[k].proc;
        let mut fabric = self.fabric.get();
        for g in &request.offer.groups {
            for b in g.blocks.iter().flatten() {
                let memory = &mut fabric.procs[q].memory;
                memory.write(&self.shape, &self.procs[q].layout, (g.group, *b), 0, version, Part::All);
            }
        }
    }

    /// A rank's part of a request is free, or gone with its process.
    fn rank_back(&mut self, r: usize, k: usize) {
        let request = &mut self.requests[r];
        request.ranks[k].back = true;
        if request.ranks.iter().all(|k| k.back) && !std::mem::replace(&mut request.given_back, true) {
            let e = request.engine;
            for (g, s) in request.offer.groups.iter().zip(&mut self.engines[e].free) {
                s.extend(g.blocks.iter().flatten().map(|b| b.0));
            }
        }
    }

    pub(crate) fn crash(&mut self, p: usize) {
        let Some(q) = self.producers[p].proc.take() else { return };
        let silent = self.rng.chance(300);
        say!(self, "process {q} at {} dies{}", self.producers[p].addr, if silent { " with its host" } else { "" });
        self.producers[p].dead_silent = silent;
        self.producers[p].silent_once |= silent;
        self.procs[q].alive = false;
        self.procs[q].died = (!silent).then_some(self.now);
        self.fabric.get().proc_died(q);
        for conn in 0..self.conns.len() {
            if self.conns[conn].proc == q && !silent {
                let t = self.now + self.delay();
                self.at(t, Event::Break { conn });
            }
        }
        for r in 0..self.requests.len() {
            for k in 0..self.requests[r].ranks.len() {
                if self.requests[r].ranks[k].proc == q {
                    // A pull that is still on loses what was not fenced yet.
                    self.requests[r].excused.get_or_insert("its producer died");
                    if !self.requests[r].ranks[k].back {
                        self.rank_back(r, k);
                    }
                }
            }
        }
    }

    pub(crate) fn restart(&mut self, p: usize) {
        if self.producers[p].proc.is_some() {
            return;
        }
        let e = self.producers[p].engine;
        if self.engines[e].ranks.len() == 1 && self.rng.chance(400) {
            self.engines[e].lives += 1;
            let id = format!("prefill-{e}-{}", self.engines[e].lives);
            self.engines[e].id = id.parse().expect("an engine id");
        }
        self.start_proc(p);
        if self.calm.is_none() && self.rng.chance(100) {
            say!(self, "{} runs another model now", self.producers[p].addr);
            self.producers[p].wrong_model = true;
        }
    }

    pub(crate) fn stop_proc(&mut self, p: usize) {
        if let Some(q) = self.producers[p].proc {
            say!(self, "process {q} is stopped");
            self.procs[q].stopped = true;
            self.fabric.get().proc_stopped(q, true);
            for r in &mut self.requests {
                if r.ranks.iter().any(|k| k.proc == q) {
                    r.excused.get_or_insert("its producer was stopped");
                }
            }
        }
    }

    pub(crate) fn continue_proc(&mut self, p: usize) {
        let Some(q) = self.producers[p].proc.filter(|&q| self.procs[q].stopped) else { return };
        say!(self, "process {q} goes on");
        self.procs[q].stopped = false;
        self.procs[q].resumed = self.now;
        self.fabric.get().proc_stopped(q, false);
        // Frames and timers come in any order.
        let frames_first = self.rng.chance(500);
        if !frames_first {
            self.wake_proc(q);
        }
        while let Some((conn, frame)) = self.procs[q].inbox.pop_front() {
            self.serve(conn, frame);
        }
        self.wake_proc(q);
        self.do_outs(q);
    }

    /// At the end of the storm every address is served again, by the right model.
    pub(crate) fn come_back(&mut self, p: usize) {
        self.continue_proc(p);
        let draining = self.producers[p].proc.is_some_and(|q| self.procs[q].draining);
        if self.producers[p].wrong_model || draining {
            self.crash(p);
        }
        self.restart(p);
    }

    /// A frame reaches a running process.
    pub(crate) fn serve(&mut self, conn: usize, frame: ClientFrame) {
        let q = self.conns[conn].proc;
        if let ClientBody::Open { from, expect } = &frame.body {
            let incarnation = self.procs[q].id.incarnation;
            if *expect != incarnation && self.rng.chance(500) {
                let t = self.now + self.delay();
                return self.at(t, Event::Break { conn });
            }
            self.conns[conn].from = Some(from.clone());
            self.procs[q].sessions.insert(from.incarnation, conn);
            return self.send_to_client(conn, ServerFrame { ack: 0, body: Some(ServerBody::Opened(incarnation)) });
        }
        let Some(from) = self.conns[conn].from.clone() else {
            // Something went wrong on the way: this is no session.
            let t = self.now + self.delay();
            return self.at(t, Event::Break { conn });
        };
        self.lease_frame(q, &from, &frame);
        self.table(q, table::In::Frame(from, frame));
    }
}
