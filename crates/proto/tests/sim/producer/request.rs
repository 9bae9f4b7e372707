//! The life of a request at a prefill engine: prefilled, offered, routed to consumers, and its blocks given back.

use std::sync::Arc;

use kvferry_proto::{
    BlockId, Contents, GroupId, GroupKind, Growth, Incarnation, Offer, OfferGroup, OfferId, OfferRank, Token,
    sabotage::{Bug, planted},
    table,
};

use super::{RankPart, Request};
use crate::{
    memory::Part,
    trace::{Micros, Promise},
    world::{Event, World, say},
};

impl World {
    /// A request is prefilled and offered. `heal`: for this consumer, by this engine, with nothing in its way.
    pub(crate) fn request(&mut self, heal: Option<(usize, usize)>) {
        let up: Vec<usize> = (0..self.engines.len()).filter(|&e| self.engine_up(e)).collect();
        let e = match heal {
            Some((_, e)) => e,
            None if up.is_empty() => return,
            None => *self.rng.pick(&up),
        };
        let Some(groups) = self.allocate(e) else { return };
        let tokens = self.tokens_of(&groups);
        let games = self.weather.games.clone();
        let version = self.version();
        let grows = self.rng.chance(games.grow);
        let awaited = grows && self.rng.chance(500);
        self.engines[e].named += 1;
        let number = if awaited { 0 } else { self.engines[e].named };
        let procs: Vec<usize> = self.engines[e].ranks.iter().filter_map(|&p| self.producers[p].proc).collect();
        let incarnations: Vec<_> = procs.iter().map(|&q| self.procs[q].id.incarnation).collect();
        let offer = Offer::new(
            self.offer_id(),
            self.engines[e].id.clone(),
            Incarnation::of_engine(&incarnations).expect("an engine has ranks"),
            procs
                .iter()
                .map(|&q| OfferRank {
                    rank: self.procs[q].id.rank,
                    incarnation: self.procs[q].id.incarnation,
                    addr: self.producers[self.procs[q].producer].addr.to_string(),
                })
                .collect(),
            tokens,
        )
        .request(format!("v{version}"))
        .number(number)
        .fingerprints([("prompt".to_owned(), format!("v{version}"))].into());
        let contents = Contents::of(&offer, groups);
        if let Err(error) = offer.check().and_then(|()| contents.check(1 << 20)) {
            self.broken(Promise::Sound, format!("the simulation's own offer: {error}"));
        }
        let r = self.requests.len();
        let steps = if grows { self.steps(&contents) } else { Vec::new() };
        self.stats.grown += u64::from(grows);
        self.stats.offers += 1;
        say!(self, "engine {e} offers v{version} as {} {:?}", offer.id, contents.groups);
        let late = !grows && self.rng.chance(games.late_ready);
        self.requests.push(Request {
            version,
            engine: e,
            offer: Arc::new(offer),
            contents: Arc::new(contents),
            steps,
            awaited,
            ranks: procs
                .iter()
                .map(|&proc| RankPart { proc, ready: !late || planted(Bug::ReadyBeforeEvent), back: false, step: 0 })
                .collect(),
            given_back: false,
            excused: None,
        });
        let early = if self.rng.chance(games.early) { self.rng.tail(100, 10_000, 60_000) } else { 0 };
        if early > 20_000 && !awaited {
            self.requests[r].excused = Some("the offer was entered very late");
        }
        for k in 0..procs.len() {
            if !grows {
                self.fill(r, k, if late { Part::Even } else { Part::All });
            }
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

    /// The router passes the offer to consumers.
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
        for g in &request.contents.groups {
            for (i, b) in g.blocks.iter().enumerate() {
                if let Some(b) = b {
                    let position = g.first_position + i as u32;
                    let memory = &mut fabric.procs[q].memory;
                    memory.write(&self.shape, &self.procs[q].layout, (g.group, *b), position, request.version, part);
                }
            }
        }
    }

    /// The tokens that the blocks hold; the last block is partial.
    fn tokens_of(&self, groups: &[OfferGroup]) -> u64 {
        let end = |g: &OfferGroup| {
            u64::from(g.first_position + g.blocks.len() as u32) * u64::from(self.shape.group(g.group).tokens)
        };
        groups.iter().map(end).max().unwrap_or(1).saturating_sub(1).max(1)
    }

    /// The steps by which a prefill fills these contents. Blocks are listed ahead of the mark; some groups only at the end.
    fn steps(&mut self, contents: &Contents) -> Vec<Growth> {
        let mut marks: Vec<u64> = (0..self.rng.below(5)).map(|_| self.rng.below(contents.whole)).collect();
        marks.sort_unstable();
        marks.push(contents.whole);
        let last = marks.len() - 1;
        let at_end: Vec<bool> = contents.groups.iter().map(|_| self.rng.chance(250)).collect();
        let mut listed = vec![0; contents.groups.len()];
        let mut steps = Vec::new();
        for (i, &tokens) in marks.iter().enumerate() {
            let ahead = self.rng.below(100);
            let mut groups = Vec::new();
            for ((g, from), at_end) in contents.groups.iter().zip(&mut listed).zip(&at_end) {
                let block = u64::from(self.shape.group(g.group).tokens);
                let end = ((tokens + ahead).div_ceil(block) as usize).saturating_sub(g.first_position as usize);
                let to = if i == last { g.blocks.len() } else { end.min(g.blocks.len()).max(*from) };
                if to > *from && (!at_end || i == last) {
                    let first_position = g.first_position + *from as u32;
                    let blocks = g.blocks[*from..to].to_vec();
                    groups.push(OfferGroup { group: g.group, first_position, blocks });
                    *from = to;
                }
            }
            steps.push(Growth { tokens, complete: i == last, groups });
        }
        steps
    }

    /// The engine computes a step at one rank: it fills the blocks below the mark, and a part of the block that the mark is in.
    fn compute(&mut self, r: usize, k: usize, step: usize) {
        let request = &self.requests[r];
        let q = request.ranks[k].proc;
        let before = step.checked_sub(1).map_or(0, |s| request.steps[s].tokens);
        let Growth { tokens, complete, .. } = request.steps[step];
        let mut fabric = self.fabric.get();
        for g in &request.contents.groups {
            let size = u64::from(self.shape.group(g.group).tokens);
            for (i, b) in g.blocks.iter().enumerate() {
                let Some(b) = b else { continue };
                let position = g.first_position + i as u32;
                let (start, end) = (u64::from(position) * size, (u64::from(position) + 1) * size);
                let part = match () {
                    () if end <= before => continue,
                    () if end <= tokens || complete => Part::All,
                    () if start < tokens => Part::Even,
                    () => continue,
                };
                let memory = &mut fabric.procs[q].memory;
                memory.write(&self.shape, &self.procs[q].layout, (g.group, *b), position, request.version, part);
            }
        }
    }

    /// A step of a prefill that grows its offer.
    pub(crate) fn grow(&mut self, r: usize, k: usize) {
        let q = self.requests[r].ranks[k].proc;
        if !self.awake(q, Event::Grow { r, k }) || self.requests[r].ranks[k].back {
            return;
        }
        let (step, now) = (self.requests[r].ranks[k].step, self.clock());
        self.requests[r].ranks[k].step += 1;
        let late = self.rng.chance(400);
        if !late {
            self.compute(r, k, step);
        }
        let (id, growth) = (self.requests[r].offer.id, self.requests[r].steps[step].clone());
        say!(
            self,
            "process {q}: {id} grows to {} tokens, its data is {}",
            growth.tokens,
            if late { "late" } else { "there" }
        );
        match self.procs[q].table.grow(now, id, growth, !late) {
            Ok(number) if late => {
                let t = self.now + self.rng.tail(10, 3000, 20_000);
                self.at(t, Event::Grown { r, k, number, step });
            }
            Ok(_) => {}
            Err(error) => return say!(self, "process {q}: {error}"),
        }
        self.drain_table(q);
        if self.rng.chance(150) {
            // Its sessions break meanwhile: the consumers have to hear of what they missed.
            let conns: Vec<_> = (0..self.conns.len()).filter(|&conn| self.conns[conn].proc == q).collect();
            for conn in conns {
                let t = self.now + self.rng.below(200);
                self.at(t, Event::Break { conn });
            }
        }
        if step + 1 < self.requests[r].steps.len() {
            let t = self.now + self.rng.tail(10, 4000, 20_000);
            self.at(t, Event::Grow { r, k });
        }
    }

    /// The data of a step is there. Its event comes in any case, and the blocks may be another request's by now.
    pub(crate) fn grown(&mut self, r: usize, k: usize, number: u64, step: usize) {
        let q = self.requests[r].ranks[k].proc;
        if !self.awake(q, Event::Grown { r, k, number, step }) {
            return;
        }
        if !self.requests[r].ranks[k].back {
            self.compute(r, k, step);
        }
        let id = self.requests[r].offer.id;
        self.table(q, table::In::Grown(id, number));
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
        let grows = !self.requests[r].steps.is_empty();
        self.lease_begins(q, id, ready && !grows, grows);
        let secret = (id, self.requests[r].offer.token);
        let contents = match grows {
            true => Arc::new(Contents::open(&self.requests[r].offer)),
            false => self.requests[r].contents.clone(),
        };
        match self.procs[q].table.offer(now, secret, contents, ready) {
            Ok(()) => self.procs[q].table.numbered(now, self.requests[r].offer.number),
            Err(error) => {
                say!(self, "process {q}: cannot offer v{}: {error}", self.requests[r].version);
                self.procs[q].leases.remove(&id);
                self.requests[r].excused = Some("the table refused it");
                self.rank_back(r, k);
            }
        }
        self.drain_table(q);
        if grows {
            let t = self.now + self.rng.tail(0, 4000, 20_000);
            self.at(t, Event::Grow { r, k });
        }
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
                // A revoked name cannot be entered, and the engines here enter every name.
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
            let token = self.requests[r].offer.token;
            self.table(q, table::In::Release(None, id, token));
        }
    }

    /// The release of a consumer that takes the process for one of another model reaches the address.
    pub(crate) fn release_alone(&mut self, p: usize, expect: Incarnation, offer: OfferId, token: Token) {
        let Some(q) = self.producers[p].proc.filter(|&q| self.procs[q].id.incarnation == expect) else { return };
        if !self.awake(q, Event::ReleaseAlone { p, expect, offer, token }) {
            return;
        }
        if let Some(r) = self.requests.iter_mut().find(|r| r.offer.id == offer && r.offer.token == token) {
            r.excused.get_or_insert("a consumer of another model released it");
            self.lease_released_by_anyone(q, offer);
        }
        self.table(q, table::In::Release(None, offer, token));
    }

    /// The engine reuses free blocks at once.
    pub(super) fn scribble(&mut self, r: usize, k: usize) {
        let version = self.version();
        let request = &self.requests[r];
        let q = request.ranks[k].proc;
        let mut fabric = self.fabric.get();
        for g in &request.contents.groups {
            for b in g.blocks.iter().flatten() {
                let memory = &mut fabric.procs[q].memory;
                memory.write(&self.shape, &self.procs[q].layout, (g.group, *b), 0, version, Part::All);
            }
        }
    }

    /// A rank's part of a request is free, or gone with its process.
    pub(super) fn rank_back(&mut self, r: usize, k: usize) {
        let request = &mut self.requests[r];
        request.ranks[k].back = true;
        if request.ranks.iter().all(|k| k.back) && !std::mem::replace(&mut request.given_back, true) {
            let e = request.engine;
            for (g, s) in request.contents.groups.iter().zip(&mut self.engines[e].free) {
                s.extend(g.blocks.iter().flatten().map(|b| b.0));
            }
        }
    }
}
