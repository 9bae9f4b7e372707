//! Checks of the promises. Each check uses its own record of the events, and does not trust the machines.

use std::collections::{BTreeMap, BTreeSet};

use kvferry_proto::{
    ClaimId, ClientBody, ClientFrame, EngineId, Gone, Incarnation, OfferId, PeerId, Release, ServerBody, Token,
    puller::{Ended, PullId},
    table::{self, Freed},
};

use crate::{
    consumer::Process,
    memory::{Memory, describe},
    trace::{Micros, Promise},
    world::{Event, World, say},
};

/// How late a woken machine may be, in all.
const SLACK: Micros = 1500;

/// An observer's record of an offer at one rank.
#[derive(Debug, Clone)]
pub(crate) struct Lease {
    entered: Micros,
    ready: Option<Micros>,
    /// Until when each claim holds.
    claims: BTreeMap<(Incarnation, ClaimId), Micros>,
    released: BTreeMap<EngineId, BTreeSet<u32>>,
    /// Released claims. A late frame does not bring one back.
    ended_claims: BTreeSet<(Incarnation, ClaimId)>,
    /// The last reader of some engine released it.
    done: Option<Micros>,
    unclaimed_until: Micros,
    claimed_ever: bool,
    pub revoked: bool,
    /// It was opened before its blocks were computed.
    grows: bool,
    freed: Option<Gone>,
}

/// A release that the network owes to a producer: consumer incarnation, offer, claim, producer incarnation.
pub(crate) type PendingKey = (Incarnation, OfferId, Option<ClaimId>, Incarnation);

impl World {
    // Leak-free.

    pub(crate) fn lease_begins(&mut self, q: usize, id: OfferId, ready: bool, grows: bool) {
        let early = self.procs[q].early_released.contains(&id);
        let unclaimed = self.weather.lease.unclaimed.as_micros() as Micros;
        let lease = Lease {
            entered: self.now,
            ready: ready.then_some(self.now),
            claims: BTreeMap::new(),
            released: BTreeMap::new(),
            ended_claims: BTreeSet::new(),
            done: (early && !self.forgets_early(q)).then_some(self.now),
            unclaimed_until: self.now + unclaimed,
            claimed_ever: false,
            revoked: false,
            grows,
            freed: None,
        };
        self.procs[q].leases.insert(id, lease);
    }

    /// A table with tight limits forgets some early releases, and so does a process that was stopped until they were too old.
    fn forgets_early(&self, q: usize) -> bool {
        self.weather.tight || self.procs[q].resumed > 0
    }

    pub(crate) fn lease_ready(&mut self, q: usize, id: OfferId) {
        let unclaimed = self.weather.lease.unclaimed.as_micros() as Micros;
        if let Some(l) = self.procs[q].leases.get_mut(&id)
            && l.ready.is_none()
        {
            l.ready = Some(self.now);
            l.unclaimed_until = self.now + unclaimed;
        }
    }

    pub(crate) fn lease_released_by_anyone(&mut self, q: usize, id: OfferId) {
        match self.procs[q].leases.get_mut(&id) {
            Some(l) => {
                l.done.get_or_insert(self.now);
            }
            None => {
                self.procs[q].early_released.insert(id);
            }
        }
    }

    /// Whether this is the token of the offer with this id.
    fn shows(&self, id: OfferId, token: Token) -> bool {
        self.requests.iter().any(|r| r.offer.id == id && r.offer.token == token)
    }

    /// A frame is about to reach the offer table.
    pub(crate) fn lease_frame(&mut self, q: usize, from: &PeerId, frame: &ClientFrame) {
        let now = self.now;
        let claimed = self.weather.lease.claimed.as_micros() as Micros;
        let unclaimed = self.weather.lease.unclaimed.as_micros() as Micros;
        let shown = match &frame.body {
            ClientBody::Claim { offer, token, .. } => self.shows(*offer, *token),
            ClientBody::Release(r) => self.shows(r.offer, r.token),
            _ => true,
        };
        let proc = &mut self.procs[q];
        match &frame.body {
            ClientBody::Claim { claim, offer, .. } => {
                proc.claimed.insert((from.incarnation, *claim), *offer);
                if !shown {
                    proc.stolen.insert((from.incarnation, *claim));
                }
            }
            ClientBody::Renew(claims) => {
                for c in claims {
                    let key = (from.incarnation, *c);
                    let lease = proc.claimed.get(&key).and_then(|o| proc.leases.get_mut(o));
                    if let Some(until) = lease.and_then(|l| l.claims.get_mut(&key))
                        && *until > now
                    {
                        *until = now + claimed;
                    }
                }
            }
            ClientBody::Release(r) => {
                let key = (from.incarnation, r.offer, r.claim, proc.id.incarnation);
                self.pending.remove(&key);
                if !shown {
                    return;
                }
                let Some(l) = proc.leases.get_mut(&r.offer) else {
                    if r.all || r.reader.of == 1 {
                        proc.early_released.insert(r.offer);
                    }
                    return;
                };
                if let Some(claim) = r.claim {
                    l.claims.remove(&(from.incarnation, claim));
                    l.ended_claims.insert((from.incarnation, claim));
                }
                let readers = l.released.entry(from.engine.clone()).or_default();
                readers.insert(r.reader.index);
                if r.all || readers.len() >= r.reader.of as usize {
                    l.done.get_or_insert(now);
                } else {
                    l.unclaimed_until = l.unclaimed_until.max(now + unclaimed);
                }
            }
            ClientBody::Open { .. } | ClientBody::Ping(_) => {}
        }
    }

    /// The offer table emits an action.
    pub(crate) fn lease_out(&mut self, q: usize, out: &table::Out) {
        let now = self.now;
        let claimed = self.weather.lease.claimed.as_micros() as Micros;
        match out {
            table::Out::Send(to, frame) => {
                if let Some(ServerBody::Grown { claim, growth, .. }) = &frame.body {
                    let last = self.procs[q].grown.insert((*to, *claim), now);
                    if !growth.complete && last.is_some_and(|t| now < t + 10_000) {
                        self.broken(Promise::Sound, format!("process {q} tells {claim:?} of growths too often"));
                    }
                }
                if let Some(ServerBody::Granted { claim, .. }) = &frame.body {
                    let key = (*to, *claim);
                    if self.procs[q].stolen.contains(&key) {
                        self.broken(
                            Promise::Exact,
                            format!("process {q} grants {claim:?}, which showed a wrong token"),
                        );
                    }
                    let lease = self.procs[q].claimed.get(&key).copied();
                    if let Some(l) = lease.and_then(|o| self.procs[q].leases.get_mut(&o)) {
                        l.claimed_ever = true;
                        if !l.ended_claims.contains(&key) {
                            l.claims.insert(key, now + claimed);
                        }
                    }
                }
            }
            // No lease runs before an offer is finished.
            table::Out::Publish { offer, contents, .. } if contents.complete => self.lease_ready(q, *offer),
            table::Out::Freed(Freed { offer, why }) => self.check_freed(q, *offer, *why),
            _ => {}
        }
    }

    fn check_freed(&mut self, q: usize, id: OfferId, why: Gone) {
        let now = self.now;
        let cap = self.weather.lease.hard_cap.as_micros() as Micros;
        let Some(l) = self.procs[q].leases.get_mut(&id) else {
            return self.broken(Promise::LeakFree, format!("process {q} frees {id}, which it never offered"));
        };
        let lease = l.clone();
        l.freed = Some(why);
        let early = self.forgets_early(q) && self.procs[q].early_released.contains(&id);
        let held = lease.claims.values().copied().max().filter(|t| *t > now && lease.entered + cap > now);
        let wrong = if lease.freed.is_some() {
            Some("a second time")
        } else {
            match why {
                Gone::Expired if held.is_some() => Some("while a claim holds"),
                Gone::Expired if lease.ready.is_none() && !(lease.grows && lease.claimed_ever) => {
                    Some("though it is not ready, and no lease runs")
                }
                Gone::Expired if !lease.claimed_ever && now < lease.unclaimed_until => {
                    Some("before its unclaimed time is over")
                }
                Gone::Released if lease.done.is_none() && !early => Some("though not all its readers released it"),
                Gone::Released if held.is_some() => Some("while another claim holds"),
                Gone::Revoked if !lease.revoked => Some("as revoked, though the engine did not revoke it"),
                Gone::HardCap if now < lease.entered + cap => Some("before the hard cap"),
                Gone::Unknown | Gone::Limit | Gone::Token => Some("for no reason that frees blocks"),
                _ => None,
            }
        };
        if let Some(wrong) = wrong {
            self.broken(Promise::LeakFree, format!("process {q} frees {id} ({why:?}) {wrong}: {lease:?}"));
        }
        // A live consumer's lease does not run out. An expiry excuses a loss only if frames were lost.
        // A hold's claim may have run out while the storm's last faults still kept its session down.
        let held = || self.consumers.iter().filter_map(|c| c.process.as_ref()).any(|p| p.holds(&self.requests, id));
        let explains = match why {
            Gone::Expired => {
                !lease.claimed_ever
                    || !self.weather.sure_network()
                    || !self.all_awake()
                    || (self.unsure.is_some() && held())
            }
            Gone::Released => false,
            _ => true,
        };
        if explains && let Some(r) = self.requests.iter_mut().find(|r| r.offer.id == id) {
            r.excused.get_or_insert("its offer ended");
        }
    }

    fn all_awake(&self) -> bool {
        self.weather.producer_deaths + self.weather.consumer_deaths == 0
    }

    pub(crate) fn release_issued(&mut self, c: usize, addr: &str, expect: Incarnation, r: &Release) {
        let Some(me) = self.consumers[c].process.as_ref().map(|p| p.me.incarnation) else { return };
        if self.producer_at(addr).is_some() {
            self.pending.insert((me, r.offer, r.claim, expect), self.now);
        }
    }

    /// A session is dropped: forgets its releases to the present process.
    pub(crate) fn check_expired(&mut self, c: usize, p: usize) {
        let Some(me) = self.consumers[c].process.as_ref().map(|p| p.me.incarnation) else { return };
        let Some(incarnation) = self.producers[p].proc.map(|q| self.procs[q].id.incarnation) else { return };
        self.pending.retain(|k, _| k.0 != me || k.3 != incarnation);
    }

    /// Checks for forgotten offers, pulls and releases.
    pub(crate) fn audit(&mut self) {
        let t = self.now + 2000;
        self.at(t, Event::Audit);
        let cap = self.weather.lease.hard_cap.as_micros() as Micros;
        for c in 0..self.consumers.len() {
            self.check_deadlines(c);
            self.check_holds(c);
            self.check_prefixes(c);
        }
        let mut late = None;
        let mut live = 0;
        for (q, proc) in self.procs.iter().enumerate().filter(|(_, p)| p.alive) {
            live += proc.leases.values().filter(|l| l.freed.is_none()).count();
            if proc.stopped {
                continue;
            }
            for (id, l) in proc.leases.iter().filter(|(_, l)| l.freed.is_none()) {
                let claims = l.claims.values().copied().max();
                let end = match (l.done, l.ready) {
                    (Some(t), _) => claims.unwrap_or(0).max(t),
                    (None, None) => l.entered + cap,
                    (None, Some(_)) => claims.unwrap_or(0).max(l.unclaimed_until),
                }
                .min(l.entered + cap)
                .max(proc.resumed);
                if self.now > end + SLACK {
                    late = Some(format!("process {q} holds {id} {} us past its end: {l:?}", self.now - end));
                }
            }
        }
        if let Some(what) = late {
            self.broken(Promise::LeakFree, what);
        }
        self.check_pending();
        let pinned = self.fabric.get().pinned(self.weather.quiet_bound.1 + 2 * SLACK);
        if let Some(what) = pinned {
            self.broken(Promise::LeakFree, what);
        }
        if self.calm.is_some() && self.healing == 0 {
            self.check_end(live);
        }
    }

    /// Whether the blocks below each pull's prefix hold the request's bytes.
    fn check_prefixes(&mut self, c: usize) {
        let Some(process) = &self.consumers[c].process else { return };
        let mut bad = None;
        let fabric = self.fabric.get();
        for (id, pull) in process.pulls.iter().filter(|(_, p)| p.decided.is_none()) {
            let prefix = pull.progress.prefix();
            for l in &pull.wanted {
                let size = u64::from(self.shape.group(l.group).tokens);
                for (position, block) in l.wants().filter(|(p, _)| (u64::from(*p) + 1) * size <= prefix) {
                    let (memory, version) = (&fabric.locals[process.local].memory, self.requests[pull.r].version);
                    let at = (l.group, block);
                    if memory.differs(&self.shape, &process.layout, at, position, version).is_some() {
                        bad = Some(format!(
                            "pull {id} of consumer {c} has loaded {prefix} tokens, and position {position} of group {} is not",
                            l.group.0
                        ));
                    }
                }
            }
        }
        drop(fabric);
        if let Some(what) = bad {
            self.broken(Promise::Exact, what);
        }
    }

    /// Whether a hold outlived the start of its pull.
    fn check_holds(&mut self, c: usize) {
        let Some(process) = &self.consumers[c].process else { return };
        let (holds, waiting) = (process.puller.holds(), process.waiting.len());
        if holds > waiting {
            self.broken(
                Promise::LeakFree,
                format!("consumer {c} holds {holds} offers, and {waiting} wait for their pulls"),
            );
        }
    }

    fn check_pending(&mut self) {
        let Some(calm) = self.calm else { return };
        let s = &self.weather.session;
        let bound = (s.hello_timeout + s.redial_max + s.down + s.heartbeat * 6).as_micros() as Micros + 20_000;
        let alive: Vec<Incarnation> =
            self.procs.iter().filter(|p| p.alive && !p.stopped).map(|p| p.id.incarnation).collect();
        self.pending.retain(|k, _| alive.contains(&k.3));
        let late = self.pending.iter().find(|(_, t)| self.now > (**t).max(calm) + bound);
        if let Some((k, t)) = late {
            let what =
                format!("a release of {} ({:?}) has not arrived {} us after it was made", k.1, k.2, self.now - t);
            self.broken(Promise::LeakFree, what);
        }
    }

    /// Checks that every block and claim was given back.
    fn check_end(&mut self, live: usize) {
        let busy = self.consumers.iter().filter_map(|c| c.process.as_ref()).any(|p| {
            let open = p.pulls.values().filter(|p| !(p.ended || p.wedged && p.decided.is_some())).count();
            open > 0
        });
        let calm = self.calm.unwrap_or(self.now);
        if busy || live > 0 || !self.pending.is_empty() {
            let most = calm + self.weather.lease.hard_cap.as_micros() as Micros + 2_000_000;
            if self.now > most {
                let what =
                    format!("{live} offers are live, pulls are open ({busy}), {} releases owed", self.pending.len());
                self.broken(Promise::LeakFree, what);
            }
            return;
        }
        for (q, proc) in self.procs.iter().enumerate().filter(|(_, p)| p.alive) {
            if proc.table.live() + proc.table.claims() > 0 {
                let what = format!(
                    "process {q}'s table keeps {} offers and {} claims",
                    proc.table.live(),
                    proc.table.claims()
                );
                self.broken(Promise::LeakFree, what);
            }
        }
        for (c, p) in self.consumers.iter().enumerate().filter_map(|(c, k)| Some((c, k.process.as_ref()?))) {
            if let Some(ring) = p.gpu.as_ref().map(|gpu| &gpu.ring)
                && p.pulls.values().all(|p| p.ended)
                && ring.free() + ring.lost() != ring.slots()
            {
                self.broken(Promise::LeakFree, format!("consumer {c} leaks slots: {ring:?}"));
            }
        }
        let mut wedged = 0;
        for (c, p) in self.consumers.iter().enumerate().filter_map(|(c, k)| Some((c, k.process.as_ref()?))) {
            let held: usize = p.pulls.values().filter(|p| !p.ended).map(|p| p.blocks()).sum();
            let open = p.pulls.values().filter(|p| !p.ended).count();
            wedged += open;
            if p.quarantine.len() != held || p.puller.pulls() != open {
                self.broken(
                    Promise::LeakFree,
                    format!(
                        "consumer {c} holds {} blocks and {} pulls, where {held} and {open} are wedged",
                        p.quarantine.len(),
                        p.puller.pulls()
                    ),
                );
            }
            let lanes = p.puller.lanes().count();
            if lanes > 3 * self.producers.len() {
                self.broken(Promise::LeakFree, format!("consumer {c} keeps {lanes} lanes"));
            }
        }
        say!(self, "the run is over");
        self.stats.wedged += wedged as u64;
        self.finished = true;
    }

    // Timely.

    pub(crate) fn check_deadlines(&mut self, c: usize) {
        let Some(p) = &self.consumers[c].process else { return };
        let late = p.pulls.iter().find(|(_, p)| p.decided.is_none() && self.now > p.deadline + SLACK);
        if let Some((id, p)) = late {
            let what =
                format!("pull {id} of consumer {c} has not decided {} us past its deadline", self.now - p.deadline);
            self.broken(Promise::Timely, what);
        }
        let bound = 2 * (self.weather.quiet_bound.1 + self.weather.copy_bound) + 2 * SLACK;
        let open =
            p.pulls.iter().find(|(_, p)| !p.ended && !p.wedged && p.decided.is_some_and(|t| self.now > t + bound));
        let told = self.knows_of_a_death(p).or_else(|| self.waits_for_a_stopped_process(p));
        if let (Some(what), None) = (told, self.unsure) {
            self.broken(Promise::Timely, what);
        }
        if let Some((id, p)) = open {
            let since = self.now - p.decided.unwrap_or(0);
            let what =
                format!("pull {id} of consumer {c} has not ended {since} us after its decision, and nothing wedged");
            self.broken(Promise::Timely, what);
        }
    }

    /// A pull that still waits for a dead process, although a dial would have been refused by now.
    fn knows_of_a_death(&self, p: &Process) -> Option<String> {
        let bound = 2 * self.weather.session.redial_max.as_micros() as Micros + 30_000;
        // A host that died too may have dropped the dial.
        let silent = |p: &usize| self.producers[*p].silent_once;
        p.pulls.iter().filter(|(_, pull)| pull.decided.is_none() && !pull.producers.iter().any(silent)).find_map(
            |(id, pull)| {
                let sources = self.requests[pull.r].ranks.iter().map(|k| &self.procs[k.proc]);
                let mut of_pull = sources.filter(|q| pull.producers.contains(&q.producer));
                let died = of_pull.find_map(|q| q.died.filter(|t| self.now > pull.started.max(*t) + bound))?;
                Some(format!("pull {id} of {} still waits for a process that died at {died} us", p.me.incarnation))
            },
        )
    }

    /// A pull that still waits for a stopped process, although nothing moves and its patience must have ended.
    fn waits_for_a_stopped_process(&self, p: &Process) -> Option<String> {
        let (s, patience) = (&self.weather.session, self.weather.retry.patience);
        // The next ping, or the next dial; the silence; the patience with its second look.
        let bound = s.heartbeat + s.redial_max + s.suspect + patience * 9 / 8;
        let bound = bound.as_micros() as Micros + 10_000;
        let fabric = self.fabric.get();
        p.pulls.iter().filter(|(_, pull)| pull.decided.is_none()).find_map(|(id, pull)| {
            let [only] = pull.producers[..] else { return None };
            let q = self.requests[pull.r].ranks.iter().map(|k| &self.procs[k.proc]).find(|q| q.producer == only)?;
            let moved = fabric.moved.get(&(p.local, *id)).copied().unwrap_or(0);
            let since = pull.started.max(q.stopped_at).max(moved);
            (q.alive && q.stopped && self.now > since + bound).then(|| {
                format!(
                    "pull {id} of {} waits for a stopped process, and nothing moved since {since} us",
                    p.me.incarnation
                )
            })
        })
    }

    pub(crate) fn check_decided(&mut self, c: usize, id: u64) {
        say!(self, "consumer {c}: pull {id} has decided");
        let now = self.now;
        let process = self.consumers[c].process.as_ref();
        let frozen = process.and_then(|p| p.puller.outcome(PullId(id))).map(|o| o.groups.clone());
        let Some(p) = self.consumers[c].process.as_mut().and_then(|p| p.pulls.get_mut(&id)) else {
            return self.broken(Promise::Exact, format!("consumer {c} decides pull {id}, which it never started"));
        };
        let deadline = p.deadline;
        p.frozen = frozen;
        let again = p.decided.replace(now).is_some();
        if again {
            self.broken(Promise::Exact, format!("pull {id} of consumer {c} decided twice"));
        }
        if now > deadline + SLACK {
            let what = format!("pull {id} of consumer {c} decided {} us after its deadline", now - deadline);
            self.broken(Promise::Timely, what);
        }
    }

    // Exact, Fresh, Frugal, Isolated, Healing.

    pub(crate) fn check_ended(&mut self, c: usize, ended: &Ended) {
        let id = ended.pull.0;
        say!(self, "consumer {c}: pull {id} has ended: {:?}", ended.outcome);
        let Some(process) = &self.consumers[c].process else { return };
        let Some(pull) = process.pulls.get(&id) else {
            return self.broken(Promise::Quiet, format!("consumer {c} ends pull {id}, which it never started"));
        };
        if pull.ended {
            return self.broken(Promise::Quiet, format!("pull {id} of consumer {c} ended twice"));
        }
        let Some(decided) = pull.decided else {
            return self.broken(Promise::Timely, format!("pull {id} of consumer {c} ended before it decided"));
        };
        if pull.frozen.as_ref().is_some_and(|f| *f != ended.outcome.groups) {
            let what = format!("pull {id} of consumer {c} decided {:?}, and ends otherwise", pull.frozen);
            return self.broken(Promise::Exact, what);
        }
        if ended.outcome.groups.len() != pull.wanted.len() {
            return self
                .broken(Promise::Exact, format!("pull {id} of consumer {c} reports other groups than were wanted"));
        }
        let request = &self.requests[pull.r];
        let mut bad: Option<(Promise, String)> = None;
        let (mut loaded, mut lost) = (0, 0);
        let fabric = self.fabric.get();
        let local = &fabric.locals[process.local];
        let (mut said_loaded, mut said_invalid) = (Vec::new(), Vec::new());
        for (wanted, got) in pull.wanted.iter().zip(&ended.outcome.groups) {
            if wanted.group != got.group {
                bad = Some((Promise::Exact, "reports groups in another order than they were wanted".into()));
                break;
            }
            let all: BTreeSet<u32> = wanted.wants().map(|(p, _)| p).collect();
            let mut sets: Vec<u32> = got.loaded.iter().chain(got.invalid.iter()).collect();
            sets.sort_unstable();
            if !sets.iter().copied().eq(all.iter().copied()) {
                bad = Some((Promise::Exact, format!("wanted {all:?}, reports {:?} and {:?}", got.loaded, got.invalid)));
            }
            let mut causes: Vec<u32> = got.causes.iter().flat_map(|(_, s)| s.iter().collect::<Vec<_>>()).collect();
            causes.sort_unstable();
            if !causes.iter().copied().eq(got.invalid.iter()) {
                bad =
                    Some((Promise::Exact, format!("gives causes for {causes:?} where {:?} are invalid", got.invalid)));
            }
            let offered = request.contents.groups.iter().find(|g| g.group == wanted.group);
            for (position, block) in wanted.wants() {
                let there = offered.is_some_and(|o| {
                    position
                        .checked_sub(o.first_position)
                        .and_then(|i| o.blocks.get(i as usize))
                        .is_some_and(Option::is_some)
                });
                if got.loaded.contains(position) {
                    loaded += 1;
                    said_loaded.push((wanted.group, block));
                    let differs = local.memory.differs(
                        &self.shape,
                        &process.layout,
                        (wanted.group, block),
                        position,
                        request.version,
                    );
                    if let Some((found, right)) = differs {
                        let fresh = found >> 32 == right >> 32;
                        let promise = if fresh { Promise::Exact } else { Promise::Fresh };
                        let what = format!(
                            "calls group {} position {position} (block {}) loaded, which holds {}, not {}",
                            wanted.group.0,
                            block.0,
                            describe(found),
                            describe(right)
                        );
                        bad = Some((promise, what));
                    }
                    continue;
                }
                said_invalid.push((wanted.group, block));
                lost += u64::from(there);
                let mut fenced = there;
                Memory::each(&self.shape, &process.layout, wanted.group, block, |segment, at| {
                    fenced &= fabric.fenced(process.local, id, decided, segment, at);
                });
                if fenced {
                    let what = format!("throws away group {} position {position}, which was fenced", wanted.group.0);
                    bad = Some((Promise::Frugal, what));
                }
            }
        }
        let mut report = (Vec::new(), Vec::new());
        report.0.extend(ended.blocks.loaded.iter().map(|b| (b.group, b.id)));
        report.1.extend(ended.blocks.invalid.iter().map(|b| (b.group, b.id)));
        if let Some(what) = pull.mangled.filter(|_| loaded > 0 && bad.is_none()) {
            bad = Some((Promise::Exact, format!("loads {loaded} blocks by a name whose {what} was changed")));
        }
        if bad.is_none() && report != (said_loaded, said_invalid) {
            bad = Some((Promise::Exact, "reports other blocks than positions".into()));
        }
        let device = process.device_lost(&fabric).then_some("its device or its ring is lost");
        let faults = fabric.faults.get(&(process.local, id)).copied().unwrap_or(0);
        let excused = fabric.excused.get(&(process.local, id)).copied();
        drop(fabric);
        let excuse = pull
            .excused
            .or(excused)
            .or(device)
            .or(request.excused)
            .or((!self.weather.sure_network()).then_some("the network"))
            .or(self.weather.tight.then_some("tight limits"))
            .or((faults + ended.outcome.retries + 1 >= pull.attempts).then_some("too many faults"));
        if bad.is_none() && lost > 0 && excuse.is_none() {
            let promise = match () {
                () if pull.healing => Promise::Healing,
                () if faults > 0 => Promise::Frugal,
                () => Promise::Isolated,
            };
            bad = Some((promise, format!("lost {lost} blocks for no good reason: {:?}", ended.outcome.groups)));
        }
        let (retries, healing) = (u64::from(ended.outcome.retries), pull.healing);
        let complete = lost == 0;
        if let Some((promise, what)) = bad {
            self.broken(promise, format!("pull {id} of consumer {c} {what}"));
        }
        self.stats.retried += retries;
        self.stats.must_complete += u64::from(excuse.is_none());
        self.stats.healed += u64::from(healing && complete);
        match (complete, loaded) {
            (true, _) => self.stats.complete += 1,
            (false, 0) => self.stats.empty += 1,
            _ => self.stats.partial += 1,
        }
    }
}
