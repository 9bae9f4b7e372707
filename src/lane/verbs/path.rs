//! A lane's part on one rail: its queue pairs to the peer, and what is in flight on them.
//!
//! Owns the queue pairs and the completion queue, posts and accounts, and climbs the ladder when the rail fails. What was
//! lost on it is kept until the rail is quiet, and is then for the lane to post elsewhere (promise *frugal*, but never
//! before promise *quiet*).

use std::{
    io,
    mem::MaybeUninit,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use kvferry_proto::error::Cause;

use super::{
    chain::{Chain, Posted, Request},
    cq::{BATCH, Completion, Cq, Status},
    exchange::Remote,
    ladder::{self, Climb, Erring, Job, Last, Rung, Step},
    landing::Landing,
    memory::Region,
    qp::Qp,
    rail::{Pool, Rail},
    wake::Bell,
};
use crate::memory::Memory;

/// Completion batches of one poll: enough to keep up, few enough that other lanes get their turn.
const BATCHES: usize = 8;

/// Places of a queue pair that only fences take, and requests of one whose report is missing. A fence goes over all queue
/// pairs that carried its chunk at once; would reads take every place that becomes free, it might wait for them all.
fn kept_for_fences(depth: usize) -> usize {
    (depth / 8).clamp(usize::from(depth > 1), 8)
}

/// What a request is for.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct What {
    /// Offset in the source segment; of the word for a fence.
    pub src: u64,
    /// Offset in the local segment; the landing slot for a fence.
    pub dst: u64,
    pub len: u32,
    /// The lane's slot of the attempt.
    pub attempt: u32,
    pub chunk: u32,
    pub src_segment: u16,
    pub dst_segment: u16,
    pub fence: bool,
    /// The queue pair that a fence must go over.
    pub end: u8,
    /// And its rail.
    pub path: u8,
}

/// Why a rail of a lane failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Why {
    Completion(Status, u32),
    Post(i32),
    Queue,
    Stalled,
    Device,
    Killed,
}

impl Why {
    /// Whether the peer, or the way to it, may be what failed.
    fn beyond(self) -> bool {
        match self {
            Self::Completion(status, _) => !status.is_local(),
            Self::Stalled => true,
            Self::Post(_) | Self::Queue | Self::Device | Self::Killed => false,
        }
    }

    pub(crate) fn cause(self) -> Cause {
        match self {
            Self::Completion(Status::RETRIES_EXCEEDED, _) | Self::Stalled => Cause::Unreachable,
            _ => Cause::LaneFailed,
        }
    }
}

impl std::fmt::Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Completion(status, vendor) => write!(f, "{status}, vendor error {vendor:#x}"),
            Self::Post(os) => write!(f, "a request was refused: {}", io::Error::from_raw_os_error(*os)),
            Self::Queue => f.write_str("its completion queue is broken"),
            Self::Stalled => f.write_str("no completion came for longer than the transport may take: lost"),
            Self::Device => f.write_str("the device failed or was removed"),
            Self::Killed => f.write_str("closed by its owner"),
        }
    }
}

/// One queue pair.
#[derive(Debug)]
pub(crate) struct End {
    qp: Option<Qp>,
    number: u32,
    chain: Chain<What>,
    /// Bytes posted or filled, and not retired.
    bytes: u64,
    /// Places for fences only.
    kept: usize,
    /// Something is filled.
    dirty: bool,
    /// When something of it last completed, or was posted where nothing was in flight.
    progress: Instant,
}

impl End {
    pub(crate) fn new(qp: Qp, depth: u32, signal_every: u32, index: u8) -> Self {
        let number = qp.number();
        let chain = Chain::new(depth, signal_every, index);
        let kept = kept_for_fences(chain.room());
        Self { qp: Some(qp), number, chain, bytes: 0, kept, dirty: false, progress: Instant::now() }
    }
}

/// A lane's part on one rail. Fields drop in this order: pairs, queue, registrations, rail.
#[derive(Debug)]
pub(crate) struct Path {
    ends: Vec<End>,
    cq: Option<Cq>,
    landing: Option<Region<Arc<Landing>>>,
    landing_key: u32,
    /// What its requests name. Held for as long as something may be written.
    pool: Option<Arc<Pool>>,
    rail: Option<Arc<Rail>>,
    name: String,
    segments: Vec<Remote>,
    words: Remote,
    /// Local segments: address and key.
    local: Vec<Remote>,
    slots: Arc<Landing>,
    /// Held for as long as something may be written.
    memory: Memory,
    pub(crate) rung: Rung,
    pub(crate) why: Option<Why>,
    /// Requests that failed, or may not have been carried out.
    lost: Vec<What>,
    /// When nothing was waited for, or something last completed.
    progress: Instant,
    stall: Duration,
    bytes: u64,
    window: u64,
    /// The peer's, if it is known.
    host: Option<IpAddr>,
}

/// What a path is made of.
pub(crate) struct Parts {
    pub rail: Arc<Rail>,
    pub cq: Cq,
    pub ends: Vec<End>,
    pub landing: Region<Arc<Landing>>,
    pub slots: Arc<Landing>,
    pub memory: Memory,
    pub segments: Vec<Remote>,
    pub words: Remote,
    pub host: Option<IpAddr>,
    pub window: u64,
    /// Longest time without a completion while something is in flight.
    pub stall: Duration,
}

impl Path {
    pub(crate) fn new(p: Parts) -> Self {
        let pool = p.rail.pool();
        // Nothing is read into an empty segment.
        let place = |r: &Region<Memory>| Remote { address: r.address(), rkey: r.lkey() };
        let local = pool.iter().flat_map(|p| &p.segments).map(|r| r.as_ref().map(place).unwrap_or_default()).collect();
        let all: usize = p.ends.iter().map(|e| e.chain.room()).sum();
        Self {
            name: p.rail.name().into(),
            landing_key: p.landing.lkey(),
            local,
            ends: p.ends,
            cq: Some(p.cq),
            landing: Some(p.landing),
            pool,
            rail: Some(p.rail),
            segments: p.segments,
            words: p.words,
            slots: p.slots,
            memory: p.memory,
            rung: Rung::Live,
            why: None,
            lost: Vec::with_capacity(all),
            progress: Instant::now(),
            stall: p.stall,
            bytes: 0,
            window: p.window,
            host: p.host,
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Bytes in flight.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.ends.iter().map(|e| e.chain.in_flight()).sum()
    }

    /// Whether a completion is to be expected for everything in flight.
    pub(crate) fn will_complete(&self) -> bool {
        self.ends.iter().all(|e| e.chain.will_complete())
    }

    /// The queue pair with the least to do, and how much that is; `None`: no more reads are taken now.
    #[inline]
    pub(crate) fn best(&self) -> Option<(usize, u64)> {
        if !self.rung.is_live() || (self.bytes >= self.window && self.bytes > 0) {
            return None;
        }
        // What a full queue took only a part of may end in a request that reports nothing: the next one on it does.
        if let Some(i) = self.ends.iter().position(|e| e.chain.room() > 0 && !e.chain.will_complete()) {
            return Some((i, 0));
        }
        let free = self.ends.iter().enumerate().filter(|(_, e)| e.chain.room() > e.kept);
        free.map(|(i, e)| (i, e.bytes)).min_by_key(|(_, bytes)| *bytes)
    }

    /// Whether a queue pair could still complete something.
    pub(crate) fn alive(&self, end: usize) -> bool {
        self.rung.is_live() && end < self.ends.len()
    }

    /// Whether a queue pair takes a request now, whatever is in flight.
    pub(crate) fn has_room(&self, end: usize) -> bool {
        self.ends.get(end).is_some_and(|e| e.chain.room() > 0)
    }

    /// Fills a request on a queue pair that `best` named. The lane has checked both ends' bounds.
    #[inline]
    pub(crate) fn fill(&mut self, end: usize, w: What) {
        let request = if w.fence {
            Request {
                local: self.slots.address(w.dst as u16),
                lkey: self.landing_key,
                len: w.len,
                remote: self.words.address + w.src,
                rkey: self.words.rkey,
            }
        } else {
            let (l, r) = (&self.local[usize::from(w.dst_segment)], &self.segments[usize::from(w.src_segment)]);
            Request { local: l.address + w.dst, lkey: l.rkey, len: w.len, remote: r.address + w.src, rkey: r.rkey }
        };
        let e = &mut self.ends[end];
        e.chain.fill(request, w);
        e.bytes += u64::from(w.len);
        e.dirty = true;
        self.bytes += u64::from(w.len);
    }

    /// Whether the local and remote keys cover these segments.
    pub(crate) fn has(&self, src: u16, dst: u16) -> bool {
        usize::from(src) < self.segments.len() && usize::from(dst) < self.local.len()
    }

    /// Posts what is filled. What the device did not take comes back, in order.
    pub(crate) fn flush(&mut self, mut back: impl FnMut(What)) {
        let mut why = None;
        for e in &mut self.ends {
            if !std::mem::take(&mut e.dirty) {
                continue;
            }
            let idle = e.chain.in_flight() == 0;
            let posted = match &mut e.qp {
                // SAFETY: what was filled names registered memory inside its bounds, which the lane checked; the
                // registrations and the memory are held until this path is quiet.
                Some(qp) => unsafe { e.chain.post(qp) },
                None => Posted::Part { os: libc::ENOTCONN },
            };
            // The clock is read behind the post: the wire does not wait for it.
            if idle && e.chain.in_flight() > 0 {
                e.progress = Instant::now();
                self.progress = e.progress;
            }
            match posted {
                Posted::All => continue,
                // Full: there is less room than was asked for. It goes out when something has completed.
                Posted::Part { os: libc::ENOMEM } => {}
                Posted::Part { os } | Posted::Unknown { os } => why = Some(Why::Post(os)),
            }
            let (bytes, all) = (&mut e.bytes, &mut self.bytes);
            e.chain.unfill(|w| {
                *bytes -= u64::from(w.len);
                *all -= u64::from(w.len);
                back(w);
            });
        }
        if let Some(why) = why {
            self.fail(why, Instant::now());
        }
    }

    /// Takes completions: `done` gets what was read, and on which queue pair. What failed is kept as lost. `true` when there were any.
    pub(crate) fn reap(&mut self, now: Instant, mut done: impl FnMut(What, usize)) -> bool {
        let Some(cq) = &mut self.cq else { return false };
        let mut space = [const { MaybeUninit::<Completion>::uninit() }; BATCH];
        let (mut any, mut why) = (false, None);
        for _ in 0..BATCHES {
            let got = match cq.poll(&mut space) {
                Ok(got) => got,
                Err(_) => {
                    why = why.or(Some(Why::Queue));
                    break;
                }
            };
            any |= !got.is_empty();
            for c in got {
                // Which pair, by the request's id; the number must agree.
                let end = (c.wr_id >> 56) as usize;
                let Some(e) = self.ends.get_mut(end).filter(|e| e.number == c.qp_num) else { continue };
                // Nothing in flight has this id: it is late, or rubbish.
                let Some(before) = e.chain.find(c.wr_id) else { continue };
                let failure = c.failure();
                e.progress = now;
                let (bytes, all) = (&mut e.bytes, &mut self.bytes);
                let good = if failure.is_some() { before } else { before + 1 };
                // A queue pair completes in order: whatever was before this one without a failure of its own was done.
                e.chain.retire(good, |w| {
                    *bytes -= u64::from(w.len);
                    *all -= u64::from(w.len);
                    done(w, end);
                });
                if let Some(status) = failure {
                    let lost = &mut self.lost;
                    e.chain.retire(1, |w| {
                        *bytes -= u64::from(w.len);
                        *all -= u64::from(w.len);
                        lost.push(w);
                    });
                    why = why.or(Some(Why::Completion(status, c.vendor_err)));
                }
            }
            if got.len() < BATCH {
                break;
            }
        }
        if any {
            self.progress = now;
        }
        if let Some(why) = why {
            self.fail(why, now);
        }
        any
    }

    /// Looks at what no completion tells: a device that is gone, or one that lost requests.
    pub(crate) fn watch(&mut self, now: Instant, waiting: bool) {
        if !self.rung.is_live() {
            return;
        }
        if self.rail.as_ref().is_some_and(|r| r.state().fatal()) {
            self.fail(Why::Device, now);
        } else if self.due(waiting).is_some_and(|t| now >= t) {
            self.fail(Why::Stalled, now);
        } else if self.in_flight() == 0 && !waiting {
            self.progress = now;
        }
    }

    /// When it has stalled, if nothing completes until then: each queue pair by itself, for the others may go on.
    fn due(&self, waiting: bool) -> Option<Instant> {
        let pairs = self.ends.iter().filter(|e| e.chain.in_flight() > 0).map(|e| e.progress).min();
        let since = if waiting { Some(pairs.map_or(self.progress, |p| p.min(self.progress))) } else { pairs };
        since.map(|t| t + self.stall)
    }

    /// Nothing was wanted of it until now.
    pub(crate) fn rested(&mut self, now: Instant) {
        self.progress = now;
    }

    /// A queue pair with something in flight of which no completion will come by itself.
    pub(crate) fn silent(&self) -> Option<usize> {
        let live = self.rung.is_live();
        self.ends.iter().position(|e| live && e.chain.room() > 0 && !e.chain.will_complete())
    }

    /// When it must be looked at again at the latest.
    pub(crate) fn until(&self, waiting: bool) -> Option<Instant> {
        match &self.rung {
            Rung::Live => self.due(waiting),
            rung => rung.until(),
        }
    }

    /// First rung that stops anything: the pairs go to ERR, and flush what is in flight.
    pub(crate) fn fail(&mut self, why: Why, now: Instant) {
        if !self.rung.is_live() {
            return;
        }
        self.why = Some(why);
        let pairs = self.ends.iter_mut().filter_map(|e| e.qp.take()).collect();
        let pairs = Erring::begin(pairs, &self.name);
        self.rung = Rung::Error { since: now, climb: Climb::from(now), pairs };
        if why != Why::Killed
            && let Some(rail) = &self.rail
        {
            rail.failed(self.host.filter(|_| why.beyond()));
        }
    }

    /// Climbs, if it is time to.
    pub(crate) fn climb(&mut self, now: Instant, bell: &Bell, peer: &str) {
        match &self.rung {
            Rung::Live | Rung::Quiet | Rung::Wedged => {}
            Rung::Error { since, climb, pairs } => {
                let (since, climb) = (*since, *climb);
                if self.in_flight() == 0 {
                    self.become_quiet(Last::Error, climb, now, peer);
                } else if now >= since + ladder::ERR_BOUND {
                    let job = Job::destroy(pairs.clone(), bell.clone());
                    self.rung = Rung::Destroying { since: now, climb: climb.not_drained(now), job };
                }
            }
            Rung::Destroying { since, climb, job } => {
                let (since, climb) = (*since, *climb);
                match ladder::destroying(job, since, now) {
                    Step::Wait => {}
                    Step::Quiet => self.become_quiet(Last::Destroy, climb, now, peer),
                    Step::Next => self.close(climb.not_destroyed(now), now),
                }
            }
            Rung::Closing { since, climb, closing } => {
                let (since, climb) = (*since, *climb);
                match ladder::closing(closing, since, now) {
                    Step::Wait => {}
                    Step::Quiet => self.become_quiet(Last::Close, climb, now, peer),
                    Step::Next => {
                        climb.end(&self.name, peer, Last::Wedged, now);
                        // What may still be written is never given back.
                        std::mem::forget((self.memory.clone(), self.slots.clone()));
                        self.rung = Rung::Wedged;
                    }
                }
            }
        }
    }

    /// Lets go of the device, and tells everybody else on it to do so: it closes when the last one has.
    fn close(&mut self, climb: Climb, now: Instant) {
        let Some(rail) = self.rail.take() else { return };
        let closing = rail.pd().device().closing();
        self.woken();
        rail.condemn();
        ladder::bury(Vec::new, self.cq.take(), (self.landing.take(), self.pool.take(), rail));
        self.rung = Rung::Closing { since: now, climb, closing };
    }

    fn become_quiet(&mut self, rung: Last, climb: Climb, now: Instant, peer: &str) {
        self.woken();
        climb.end(&self.name, peer, rung, now);
        for e in &mut self.ends {
            let lost = &mut self.lost;
            e.chain.retire(u64::MAX, |w| lost.push(w));
            e.bytes = 0;
        }
        self.bytes = 0;
        let pairs = match std::mem::replace(&mut self.rung, Rung::Quiet) {
            Rung::Error { pairs, .. } => Some(pairs),
            // They are destroyed.
            _ => None,
        };
        let pairs = move || pairs.map(|p| p.wait()).unwrap_or_default();
        ladder::bury(pairs, self.cq.take(), (self.landing.take(), self.pool.take(), self.rail.take()));
    }

    /// What was lost, once nothing of it can be written any more.
    pub(crate) fn take_lost(&mut self, mut each: impl FnMut(What)) {
        if self.rung.is_quiet() {
            self.lost.drain(..).for_each(&mut each);
        }
    }

    /// Before a sleep: completions from now on make the descriptor readable.
    pub(crate) fn arm(&mut self, now: Instant) {
        // One that is not in use is looked at by the clock, if it cannot be armed.
        if self.cq.as_mut().is_some_and(|cq| cq.arm().is_err()) {
            self.fail(Why::Queue, now);
        }
    }

    /// After a sleep, and before the queue is buried: a descriptor that stays readable until it is closed would keep its
    /// owner awake.
    pub(crate) fn woken(&mut self) {
        if let Some(cq) = &mut self.cq {
            cq.take_events();
        }
    }
}

impl Drop for Path {
    fn drop(&mut self) {
        let mut pairs: Vec<_> = self.ends.iter_mut().filter_map(|e| e.qp.take()).collect();
        let idle = self.in_flight() == 0;
        let (cq, landing, rail) = (self.cq.take(), self.landing.take(), (self.pool.take(), self.rail.take()));
        let kept = (self.memory.clone(), self.slots.clone());
        if self.rung.is_quiet() {
            return;
        }
        if !matches!(self.rung, Rung::Live | Rung::Error { .. }) {
            // On the ladder, and nobody is left to see its end.
            tracing::error!(rail = %self.name, "a lane was dropped before it was quiet: its memory is never freed");
            std::mem::forget((kept, landing, rail, cq));
            return;
        }
        let erring = match &self.rung {
            Rung::Error { pairs, .. } => Some(pairs.clone()),
            _ => None,
        };
        super::wake::undertake("kvferry-bury", move || {
            pairs.extend(erring.iter().flat_map(Erring::wait));
            let good = pairs.into_iter().filter_map(|qp| qp.destroy().err()).count() == 0;
            drop(cq);
            if !good && !idle {
                tracing::error!(
                    "a lane was dropped while it was read into, and does not stop: its memory is never freed"
                );
                std::mem::forget((kept, landing, rail));
            }
        });
    }
}
