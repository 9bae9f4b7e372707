//! Prefill engines: processes that fill blocks, offer them, and reuse them as soon as they are free.

mod request;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Instant,
};

use kvferry_proto::{
    ClaimId, ClientBody, ClientFrame, Contents, EngineId, Gone, Growth, Incarnation, LaneKind, Machine, Offer, OfferId,
    PeerId, Rank, ServerBody, ServerFrame, Shard,
    hello::Welcome,
    table::{self, Freed, OfferTable},
};

use crate::{
    checks::Lease,
    memory::{Layout, ProcMem, Version},
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
    /// Names that its scheduler minted.
    named: u64,
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
    pub stopped_at: Micros,
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
    /// Claims that showed a wrong token.
    pub stolen: BTreeSet<(Incarnation, ClaimId)>,
    /// When each claim heard of a growth last.
    pub grown: BTreeMap<(Incarnation, ClaimId), Micros>,
    /// Offers that were released before they were entered.
    pub early_released: BTreeSet<OfferId>,
    requests: BTreeMap<OfferId, (usize, usize)>,
}

/// A request that an engine prefilled.
pub(crate) struct Request {
    pub version: Version,
    pub engine: usize,
    pub offer: Arc<Offer>,
    pub contents: Arc<Contents>,
    /// By which its offer grows; none: it is offered whole.
    pub steps: Vec<Growth>,
    /// Its consumers may claim it before it is entered.
    pub awaited: bool,
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
    /// The next of the request's steps.
    pub step: usize,
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
            self.engines.push(Engine {
                id,
                ranks: (first..first + shards.len()).collect(),
                free,
                blocks,
                lives: 0,
                named: 0,
            });
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
            gpu_uuid: None,
        };
        let table = OfferTable::new(self.weather.lease.clone(), self.weather.limits.clone(), self.entropy());
        self.fabric.get().procs.push(ProcMem {
            addr: p,
            alive: true,
            stopped: false,
            died: 0,
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
            stopped_at: 0,
            resumed: 0,
            draining: false,
            outs: VecDeque::new(),
            outs_scheduled: false,
            wake_at: None,
            sessions: BTreeMap::new(),
            inbox: VecDeque::new(),
            leases: BTreeMap::new(),
            claimed: BTreeMap::new(),
            stolen: BTreeSet::new(),
            grown: BTreeMap::new(),
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
            self.broken(Promise::Sound, format!("process {q}'s table wants a tick in the past, after a tick"));
        }
        self.drain_table(q);
    }

    /// Queues the table's actions in order; the engine may be slow to carry them out.
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
            table::Out::Publish { offer, slot, nonce, .. } => {
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
                    // An open pull loses the chunks that are not fenced yet.
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
            self.procs[q].stopped_at = self.now;
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
        say!(self, "process {q} continues");
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
            // The `Open` was lost: there is no session.
            let t = self.now + self.delay();
            return self.at(t, Event::Break { conn });
        };
        self.lease_frame(q, &from, &frame);
        self.table(q, table::In::Frame(from, frame));
    }
}
