//! A lane's part on one rail: its queue pairs to the peer, and their requests in flight.
//!
//! Owns the queue pairs and the completion queue, posts requests and accounts for them, and tears itself down when the rail
//! fails. Requests that were lost on it are kept until the rail is quiet; then the lane posts them on other rails (promise
//! *frugal*, but never before promise *quiet*).

use std::{
    mem::MaybeUninit,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    chain::{Chain, Request},
    cleanup,
    cq::{BATCH, Completion, Cq},
    exchange::Remote,
    failure::FailureReason,
    landing::Landing,
    memory::Region,
    qp::Qp,
    rail::{Pool, Rail},
    teardown::{self, Destruction, FailingPairs, Outcome, Stage, Step, Times},
    wake::Bell,
};
use crate::memory::Memory;

/// Completion batches of one poll: enough to keep up, few enough that other lanes get their turn.
const BATCHES: usize = 8;

/// Slots of a queue pair that only fences may use. A fence goes over all queue pairs of its chunk at once. If reads could use
/// every slot that becomes free, the fence might wait for all of them.
fn kept_for_fences(depth: usize) -> usize {
    (depth / 8).clamp(usize::from(depth > 1), 8)
}

/// The purpose of a request.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Work {
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
}

/// One queue pair.
#[derive(Debug)]
pub(crate) struct QueuePairState {
    qp: Option<Qp>,
    number: u32,
    chain: Chain<Work>,
    /// Bytes that are filled or posted, and not retired.
    bytes: u64,
    /// Slots for fences only.
    kept: usize,
    /// A request is filled and not posted.
    dirty: bool,
    /// The last completion, or the last post on an idle queue pair.
    progress: Instant,
}

impl QueuePairState {
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
    pairs: Vec<QueuePairState>,
    cq: Option<Cq>,
    landing: Option<Region<Arc<Landing>>>,
    landing_key: u32,
    /// The registrations that its requests name. Held for as long as the device may write.
    pool: Option<Arc<Pool>>,
    rail: Option<Arc<Rail>>,
    name: String,
    segments: Vec<Remote>,
    words: Remote,
    /// Local segments: address and key.
    local: Vec<Remote>,
    slots: Arc<Landing>,
    /// Held for as long as the device may write.
    memory: Memory,
    pub(crate) stage: Stage,
    pub(crate) failure: Option<FailureReason>,
    /// Requests that failed, or may not have been executed.
    lost: Vec<Work>,
    stall: Duration,
    bytes: u64,
    window: u64,
    /// The peer's host, if it is known.
    host: Option<IpAddr>,
}

/// The parts of a path.
pub(crate) struct Parts {
    pub rail: Arc<Rail>,
    pub cq: Cq,
    pub pairs: Vec<QueuePairState>,
    pub landing: Region<Arc<Landing>>,
    pub slots: Arc<Landing>,
    pub memory: Memory,
    pub segments: Vec<Remote>,
    pub words: Remote,
    pub host: Option<IpAddr>,
    pub window: u64,
    /// Longest time without a completion while requests are in flight.
    pub stall: Duration,
}

impl Path {
    pub(crate) fn new(p: Parts) -> Self {
        let pool = p.rail.pool();
        // No read goes to an empty segment.
        let place = |r: &Region<Memory>| Remote { address: r.address(), rkey: r.lkey() };
        let local = pool.iter().flat_map(|p| &p.segments).map(|r| r.as_ref().map(place).unwrap_or_default()).collect();
        let all: usize = p.pairs.iter().map(|q| q.chain.room()).sum();
        Self {
            name: p.rail.name().into(),
            landing_key: p.landing.lkey(),
            local,
            pairs: p.pairs,
            cq: Some(p.cq),
            landing: Some(p.landing),
            pool,
            rail: Some(p.rail),
            segments: p.segments,
            words: p.words,
            slots: p.slots,
            memory: p.memory,
            stage: Stage::Live,
            failure: None,
            lost: Vec::with_capacity(all),
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
        self.pairs.iter().map(|q| q.chain.in_flight()).sum()
    }

    /// The queue pair with the fewest bytes in flight, and how many; `None`: no more reads are accepted now.
    #[inline]
    pub(crate) fn best(&self) -> Option<(usize, u64)> {
        if !self.stage.is_live() || (self.bytes >= self.window && self.bytes > 0) {
            return None;
        }
        let free = self.pairs.iter().enumerate().filter(|(_, q)| q.chain.room() > q.kept);
        free.map(|(i, q)| (i, q.bytes)).min_by_key(|(_, bytes)| *bytes)
    }

    /// Whether a queue pair can complete requests.
    pub(crate) fn alive(&self, pair: usize) -> bool {
        self.stage.is_live() && pair < self.pairs.len()
    }

    /// Whether a queue pair has room for a request, whatever is in flight.
    pub(crate) fn has_room(&self, pair: usize) -> bool {
        self.pairs.get(pair).is_some_and(|q| q.chain.room() > 0)
    }

    /// Fills a request on a queue pair that has room. The lane has checked the bounds of both ends.
    #[inline]
    pub(crate) fn fill(&mut self, pair: usize, w: Work) {
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
        let q = &mut self.pairs[pair];
        q.chain.fill(request, w);
        q.bytes += u64::from(w.len);
        q.dirty = true;
        self.bytes += u64::from(w.len);
    }

    /// Whether the local and remote keys cover these segments.
    pub(crate) fn has(&self, src: u16, dst: u16) -> bool {
        usize::from(src) < self.segments.len() && usize::from(dst) < self.local.len()
    }

    /// Posts the filled requests. If the device refuses them the rail fails, and they are lost once it is quiet: a queue is
    /// never full here, since the chain counts its room.
    pub(crate) fn flush(&mut self) {
        let mut failure = None;
        for q in &mut self.pairs {
            if !std::mem::take(&mut q.dirty) {
                continue;
            }
            let idle = q.chain.in_flight() == 0;
            let Some(qp) = &mut q.qp else { continue };
            // SAFETY: the filled requests name registered memory within its bounds, which the lane checked; the registrations
            // and the memory are held until this path is quiet.
            let posted = unsafe { q.chain.post(qp) };
            // The clock is read after the post: the wire does not wait for it.
            if idle {
                q.progress = Instant::now();
            }
            if let Err(e) = posted {
                failure = Some(FailureReason::Post(e.raw_os_error().unwrap_or(libc::EIO)));
            }
        }
        if let Some(reason) = failure {
            self.fail(reason, Instant::now());
        }
    }

    /// Takes completions: `done` gets each completed request and its queue pair. Failed requests are kept as lost. `true` if
    /// there was any completion.
    pub(crate) fn reap(&mut self, now: Instant, mut done: impl FnMut(Work, usize)) -> bool {
        let Some(cq) = &mut self.cq else { return false };
        let mut space = [const { MaybeUninit::<Completion>::uninit() }; BATCH];
        let (mut any, mut reason) = (false, None);
        for _ in 0..BATCHES {
            let got = match cq.poll(&mut space) {
                Ok(got) => got,
                Err(_) => {
                    reason = reason.or(Some(FailureReason::Queue));
                    break;
                }
            };
            any |= !got.is_empty();
            for c in got {
                // The request's id names the queue pair; the completion's number must agree.
                let pair = (c.wr_id >> 56) as usize;
                let Some(q) = self.pairs.get_mut(pair).filter(|q| q.number == c.qp_num) else { continue };
                // Without a request in flight that has this id, the completion is late or malformed.
                let Some(before) = q.chain.find(c.wr_id) else { continue };
                let failure = c.failure();
                q.progress = now;
                let (bytes, all) = (&mut q.bytes, &mut self.bytes);
                let good = if failure.is_some() { before } else { before + 1 };
                // A queue pair completes in order: requests before this one without a failure of their own succeeded.
                q.chain.retire(good, |w| {
                    *bytes -= u64::from(w.len);
                    *all -= u64::from(w.len);
                    done(w, pair);
                });
                if let Some(status) = failure {
                    let lost = &mut self.lost;
                    q.chain.retire(1, |w| {
                        *bytes -= u64::from(w.len);
                        *all -= u64::from(w.len);
                        lost.push(w);
                    });
                    reason = reason.or(Some(FailureReason::Completion(status, c.vendor_err)));
                }
            }
            if got.len() < BATCH {
                break;
            }
        }
        if let Some(reason) = reason {
            self.fail(reason, now);
        }
        any
    }

    /// Checks for failures without a completion: a device that is gone, or lost requests.
    pub(crate) fn watch(&mut self, now: Instant) {
        if !self.stage.is_live() {
            return;
        }
        if self.rail.as_ref().is_some_and(|r| r.state().fatal()) {
            self.fail(FailureReason::Device, now);
        } else if self.due().is_some_and(|t| now >= t) {
            self.fail(FailureReason::Stalled, now);
        }
    }

    /// When it has stalled unless a request completes before. Each queue pair counts by itself, since the others may go on.
    fn due(&self) -> Option<Instant> {
        let busy = self.pairs.iter().filter(|q| q.chain.in_flight() > 0);
        busy.map(|q| q.progress + self.stall).min()
    }

    /// When it must be looked at again at the latest.
    pub(crate) fn until(&self) -> Option<Instant> {
        match &self.stage {
            Stage::Live => self.due(),
            stage => stage.until(),
        }
    }

    /// Begins the teardown: the queue pairs go to ERR, and flush their requests.
    pub(crate) fn fail(&mut self, reason: FailureReason, now: Instant) {
        if !self.stage.is_live() {
            return;
        }
        debug_assert!(self.pairs.iter().all(|q| !q.dirty), "filled requests are posted before anything else happens");
        self.failure = Some(reason);
        let pairs = self.pairs.iter_mut().filter_map(|q| q.qp.take()).collect();
        let pairs = FailingPairs::begin(pairs, &self.name);
        self.stage = Stage::Error { since: now, times: Times::from(now), pairs };
        if reason != FailureReason::Killed
            && let Some(rail) = &self.rail
        {
            rail.failed(self.host.filter(|_| reason.may_be_remote()));
        }
    }

    /// Goes on with the teardown, when it is time.
    pub(crate) fn escalate(&mut self, now: Instant, bell: &Bell, peer: &str) {
        match &self.stage {
            Stage::Live | Stage::Quiet | Stage::Wedged => {}
            Stage::Error { since, times, pairs } => {
                let (since, times) = (*since, *times);
                if self.in_flight() == 0 {
                    self.become_quiet(Outcome::Drained, times, now, peer);
                } else if now >= since + teardown::ERR_BOUND {
                    let destruction = Destruction::begin(pairs.clone(), bell.clone());
                    self.stage = Stage::Destroying { since: now, times: times.not_drained(now), destruction };
                }
            }
            Stage::Destroying { since, times, destruction } => {
                let (since, times) = (*since, *times);
                match destruction.step(since, now) {
                    Step::Wait => {}
                    Step::Quiet => self.become_quiet(Outcome::Destroyed, times, now, peer),
                    Step::Escalate => self.close(times.not_destroyed(now), now),
                }
            }
            Stage::Closing { since, times, closing } => {
                let (since, times) = (*since, *times);
                match teardown::closing(closing, since, now) {
                    Step::Wait => {}
                    Step::Quiet => self.become_quiet(Outcome::Closed, times, now, peer),
                    Step::Escalate => {
                        times.finish(&self.name, peer, Outcome::Wedged, now);
                        // Memory that the device may still write is never freed.
                        std::mem::forget((self.memory.clone(), self.slots.clone()));
                        self.stage = Stage::Wedged;
                    }
                }
            }
        }
    }

    /// Releases the device, and has all other owners release it: it closes after the last one.
    fn close(&mut self, times: Times, now: Instant) {
        let Some(rail) = self.rail.take() else { return };
        let closing = rail.pd().device().closing();
        self.woken();
        rail.state().mark_fatal();
        cleanup::give_back(Vec::new, self.cq.take(), (self.landing.take(), self.pool.take(), rail));
        self.stage = Stage::Closing { since: now, times, closing };
    }

    fn become_quiet(&mut self, outcome: Outcome, times: Times, now: Instant, peer: &str) {
        self.woken();
        times.finish(&self.name, peer, outcome, now);
        for q in &mut self.pairs {
            let lost = &mut self.lost;
            q.chain.retire(u64::MAX, |w| lost.push(w));
            q.bytes = 0;
        }
        self.bytes = 0;
        let pairs = match std::mem::replace(&mut self.stage, Stage::Quiet) {
            Stage::Error { pairs, .. } => Some(pairs),
            // They are destroyed already.
            _ => None,
        };
        let pairs = move || pairs.map(|p| p.wait()).unwrap_or_default();
        cleanup::give_back(pairs, self.cq.take(), (self.landing.take(), self.pool.take(), self.rail.take()));
    }

    /// Takes the lost requests, once none of them can write any more.
    pub(crate) fn take_lost(&mut self) -> Vec<Work> {
        if self.stage.is_quiet() { std::mem::take(&mut self.lost) } else { Vec::new() }
    }

    /// Before a sleep: later completions make the descriptor readable.
    pub(crate) fn arm(&mut self, now: Instant) {
        // A rail that is being torn down is looked at by the clock, if its queue cannot be armed.
        if self.cq.as_mut().is_some_and(|cq| cq.arm().is_err()) {
            self.fail(FailureReason::Queue, now);
        }
    }

    /// After a sleep, and before the queue is given back: a descriptor that stays readable until it is closed would keep its
    /// owner awake.
    pub(crate) fn woken(&mut self) {
        if let Some(cq) = &mut self.cq {
            cq.take_events();
        }
    }
}

impl Drop for Path {
    fn drop(&mut self) {
        let mut pairs: Vec<_> = self.pairs.iter_mut().filter_map(|q| q.qp.take()).collect();
        let idle = self.in_flight() == 0;
        let (cq, landing, rail) = (self.cq.take(), self.landing.take(), (self.pool.take(), self.rail.take()));
        let kept = (self.memory.clone(), self.slots.clone());
        if self.stage.is_quiet() {
            return;
        }
        if !matches!(self.stage, Stage::Live | Stage::Error { .. }) {
            // Its teardown is under way, and has lost its owner.
            tracing::error!(rail = %self.name, "a lane was dropped before it was quiet: its memory is never freed");
            std::mem::forget((kept, landing, rail, cq));
            return;
        }
        let failing = match &self.stage {
            Stage::Error { pairs, .. } => Some(pairs.clone()),
            _ => None,
        };
        cleanup::spawn("kvferry-cleanup", move || {
            pairs.extend(failing.iter().flat_map(FailingPairs::wait));
            let good = pairs.into_iter().filter_map(|qp| qp.destroy().err()).count() == 0;
            drop(cq);
            if !good && !idle {
                tracing::error!(
                    "a lane was dropped while it was read into, and cannot be stopped: its memory is never freed"
                );
                std::mem::forget((kept, landing, rail));
            }
        });
    }
}
