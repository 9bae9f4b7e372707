//! One pull.

use std::time::{Duration, Instant};

use kvferry_proto::{
    Machine,
    block::{BlockId, GroupId, Incarnation, Nonce, OfferId},
    error::Cause,
    group::PoolLayout,
    lane::{Attempt, FenceKind, Grant, LaneCaps, LaneEvent, LaneKind},
    offer::{Offer, OfferGroup},
    outcome::Outcome,
    plan::{ChunkSize, LocalBlocks, Plan, Source},
    pull::{In, Out, PullTracker, Retry},
    shard::Shard,
};

const SECOND: Duration = Duration::from_secs(1);
const NANO: Duration = Duration::from_nanos(1);
/// Bytes of a block: one chunk.
const BLOCK: u64 = 64;
/// Blocks of the pull, at positions 0 to 7.
const BLOCKS: u32 = 8;
const DEADLINE: Duration = Duration::from_secs(10);
/// Of every lane here: a pull stops that long before its deadline.
const QUIET: Duration = Duration::from_secs(2);

/// A pull with a clock, and lanes that do what the test says.
struct Pull {
    tracker: PullTracker,
    start: Instant,
    now: Instant,
    attempts: u64,
    sources: usize,
}

impl Pull {
    /// A pull that waits for everything.
    fn new(sources: usize, wanted: LocalBlocks) -> Self {
        let start = Instant::now();
        let retry = Retry { attempts: 3, wait: Duration::from_millis(10) };
        let tracker = PullTracker::new(start, vec![wanted], sources, start + DEADLINE, retry, true);
        Self { tracker, start, now: start, attempts: 0, sources }
    }

    /// A pull of all blocks whose plan and grants are there.
    fn granted(sources: usize) -> Self {
        let mut p = Self::new(sources, wanted(BLOCKS));
        p.plan(BLOCKS);
        (0..sources).for_each(|s| p.grant(s));
        p
    }

    /// And its lanes, without anything posted.
    fn reading(sources: usize, fence: FenceKind) -> (Self, Vec<Attempt>) {
        let mut p = Self::granted(sources);
        p.outs();
        let attempts = (0..sources).map(|s| p.lane(s, fence)).collect();
        (p, attempts)
    }

    /// The plan, where the offer has `offered` blocks.
    fn plan(&mut self, offered: u32) {
        let sources = self.sources;
        let parts: Vec<_> = (0..sources)
            .map(|i| {
                let heads = 2 / sources as u32;
                (
                    PoolLayout::uniform(BLOCKS, 1, BLOCK / sources as u64, 16),
                    Shard { first_head: i as u32 * heads, heads, ..Shard::whole(2, 1) },
                )
            })
            .collect();
        let from: Vec<_> = parts.iter().map(|(layout, shard)| Source { layout, shard }).collect();
        let (layout, shard) = (PoolLayout::uniform(BLOCKS, 1, BLOCK, 16), Shard::whole(2, 1));
        let blocks = (0..offered).map(|b| Some(BlockId(b))).collect();
        let offer = Offer {
            id: OfferId { high: 1, low: 1 },
            engine: "them".parse().unwrap(),
            incarnation: Incarnation::from_wire(1).unwrap(),
            ranks: vec![],
            groups: vec![OfferGroup { group: GroupId(0), first_position: 0, blocks }],
            tokens: 128,
            request: String::new(),
        };
        let size = ChunkSize { per_pull: u32::MAX, min_bytes: BLOCK, max_bytes: BLOCK };
        let here = Source { layout: &layout, shard: &shard };
        let plan = Plan::new(&offer, &from, here, self.tracker.wanted(), size, 100).unwrap();
        self.tell(In::Planned(Box::new(plan)));
    }

    fn grant(&mut self, source: usize) {
        self.tell(In::Granted { source, grant: Grant { slot: 0, nonce: nonce() } });
    }

    fn lane(&mut self, source: usize, fence: FenceKind) -> Attempt {
        self.attempts += 1;
        let attempt = Attempt(self.attempts);
        let caps = LaneCaps { kind: LaneKind::Tcp, max_read: 1 << 20, quiet_bound: QUIET, fence };
        self.tell(In::Lane { source, attempt, caps });
        attempt
    }

    /// Posts every read that the pull has for a source: the chunks, in order.
    fn post_all(&mut self, source: usize) -> Vec<u32> {
        let mut chunks = Vec::new();
        while let Some((_, reads)) = self.tracker.next_reads(source) {
            let n = reads.len();
            chunks.push(reads[0].chunk);
            self.tracker.accepted(source, n);
        }
        chunks
    }

    fn done(&mut self, attempt: Attempt, chunk: u32, reads: u32) {
        self.tell(In::Event(attempt, LaneEvent::Done { attempt, chunk, reads }));
    }

    fn fence(&mut self, attempt: Attempt, chunk: u32, word: u64) {
        self.tell(In::Event(attempt, LaneEvent::Fence { attempt, chunk, word }));
    }

    /// The chunk's one read is done, and the fence holds.
    fn good(&mut self, attempt: Attempt, chunk: u32) {
        self.done(attempt, chunk, 1);
        self.fence(attempt, chunk, nonce().get());
    }

    fn fails(&mut self, attempt: Attempt, cause: Cause) {
        self.tell(In::Event(attempt, LaneEvent::Failed { attempt, cause }));
    }

    fn again(&mut self, attempt: Attempt, chunk: u32) {
        self.tell(In::Event(attempt, LaneEvent::Again { attempt, chunk }));
    }

    fn quiet(&mut self, attempt: Attempt) {
        self.tell(In::Event(attempt, LaneEvent::Quiet { attempt }));
    }

    fn tell(&mut self, event: In) {
        self.tracker.handle(self.now, event);
    }

    fn at(&mut self, after: Duration) {
        self.now = self.start + after;
        self.tracker.tick(self.now);
    }

    fn outs(&mut self) -> Vec<Out> {
        std::iter::from_fn(|| self.tracker.poll()).collect()
    }

    /// The end, which must be the last and only thing that it wants.
    fn ended(&mut self) -> Outcome {
        match self.outs().as_slice() {
            [Out::Ended(o)] => (**o).clone(),
            other => panic!("not just the end: {other:?}"),
        }
    }

    /// As `ended`, where it decides and ends in one step.
    fn decided_and_ended(&mut self) -> Outcome {
        assert_eq!(self.tracker.poll(), Some(Out::Decided));
        self.ended()
    }
}

fn nonce() -> Nonce {
    Nonce::from_wire(77).unwrap()
}

/// The local blocks 0 to `n - 1` at the same positions.
fn wanted(n: u32) -> LocalBlocks {
    LocalBlocks { group: GroupId(0), first_position: 0, blocks: (0..n).map(|b| Some(BlockId(b))).collect() }
}

/// Positions, as `[first, last]`.
type Ranges = Vec<[u32; 2]>;

/// What is loaded, and what is invalid by which cause.
fn sets(o: &Outcome) -> (Ranges, Vec<(Cause, Ranges)>) {
    let g = &o.groups[0];
    let causes: Vec<_> = g.causes.iter().map(|(c, s)| (*c, s.ranges().to_vec())).collect();
    assert_eq!(g.invalid.len(), g.causes.iter().map(|(_, s)| s.len()).sum::<u64>(), "one cause for each");
    assert!(g.loaded.iter().all(|p| !g.invalid.contains(p)));
    (g.loaded.ranges().to_vec(), causes)
}

const ONLY: usize = 0;

#[test]
fn a_chunk_that_its_lane_takes_back_is_read_and_fenced_again_on_the_same_attempt() {
    for kind in [FenceKind::Posted, FenceKind::Own] {
        let mut p = Pull::granted(1);
        let a = p.lane(ONLY, kind);
        p.outs();
        p.post_all(ONLY);
        for c in 0..BLOCKS {
            p.done(a, c, 1);
            let asked = (kind == FenceKind::Posted).then_some(c);
            assert_eq!(p.tracker.next_fence(ONLY).map(|f| f.1.chunk), asked);
            p.tracker.fence_posted(ONLY);
        }
        (0..BLOCKS).filter(|c| ![1, 3].contains(c)).for_each(|c| p.fence(a, c, nonce().get()));
        p.again(a, 3);
        p.again(a, 1);
        assert_eq!(p.outs(), [], "two chunks are missing");
        assert_eq!(p.post_all(ONLY), [1, 3], "in prefix order");
        // A word of the fence that was given up, and a second taking back, mean nothing now.
        p.fence(a, 1, nonce().get());
        p.again(a, 1);
        assert_eq!(p.post_all(ONLY), [] as [u32; 0]);
        for c in [1, 3] {
            p.done(a, c, 1);
            p.tracker.fence_posted(ONLY);
            p.fence(a, c, nonce().get());
        }
        assert_eq!(p.outs(), [Out::Decided, Out::Stop(a)]);
        p.quiet(a);
        assert!(p.ended().complete());
    }
}

#[test]
fn a_pull_reads_in_prefix_order_and_ends_complete() {
    let mut p = Pull::granted(1);
    assert_eq!(p.outs(), [Out::NeedLane { source: ONLY, avoid: vec![] }]);
    let a = p.lane(ONLY, FenceKind::Trailer);
    assert_eq!(p.post_all(ONLY), (0..BLOCKS).collect::<Vec<_>>());
    (0..BLOCKS).rev().for_each(|c| p.good(a, c)); // completions come in any order
    assert_eq!(p.outs(), [Out::Decided, Out::Stop(a)]);
    p.quiet(a);
    let o = p.ended();
    assert!(o.complete());
    assert_eq!((o.bytes, o.retries, o.lanes), (u64::from(BLOCKS) * BLOCK, 0, vec![LaneKind::Tcp]));
}

#[test]
fn nothing_is_read_before_the_plan_the_grant_and_the_local_blocks_are_there() {
    let retry = Retry { attempts: 3, wait: SECOND };
    let mut p = Pull::new(1, wanted(BLOCKS));
    p.tracker = PullTracker::new(p.start, vec![wanted(BLOCKS)], 1, p.start + DEADLINE, retry, false);
    p.plan(BLOCKS);
    assert_eq!(p.outs(), []);
    p.grant(ONLY);
    assert_eq!(p.outs(), []);
    p.tell(In::LocalReady);
    assert_eq!(p.outs(), [Out::NeedLane { source: ONLY, avoid: vec![] }]);
}

#[test]
fn a_dead_peer_leaves_the_prefix_usable_and_the_rest_invalid_by_its_cause() {
    let (mut p, a) = Pull::reading(1, FenceKind::Trailer);
    p.post_all(ONLY);
    (0..3).for_each(|c| p.good(a[0], c));
    p.done(a[0], 3, 1); // its data is in, and its fence is not
    p.tell(In::Lost { cause: Cause::PeerDown });
    assert_eq!(p.outs(), [Out::Decided, Out::Stop(a[0])]);
    p.fence(a[0], 3, nonce().get()); // too late: the sets are frozen
    p.quiet(a[0]);
    let o = p.ended();
    assert_eq!(sets(&o), (vec![[0, 2]], vec![(Cause::PeerDown, vec![[3, 7]])]));
    let report = p.tracker.report(&o);
    assert_eq!((report.loaded.len(), report.invalid.len()), (3, 5));
    assert_eq!(report.invalid[0].id, BlockId(3));
}

#[test]
fn a_stale_fence_loads_nothing_of_its_chunk() {
    for word in [0, 78] {
        let (mut p, a) = Pull::reading(1, FenceKind::Trailer);
        p.post_all(ONLY);
        p.good(a[0], 0);
        p.done(a[0], 1, 1);
        p.fence(a[0], 1, word);
        p.outs();
        p.quiet(a[0]);
        assert_eq!(sets(&p.ended()), (vec![[0, 0]], vec![(Cause::Stale, vec![[1, 7]])]));
    }
}

#[test]
fn a_fence_is_posted_only_when_all_of_the_chunks_data_is_in() {
    let (mut p, a) = Pull::reading(1, FenceKind::Posted);
    p.post_all(ONLY);
    assert!(p.tracker.next_fence(ONLY).is_none());
    p.fence(a[0], 0, nonce().get());
    assert_eq!(p.tracker.progress(), (0, BLOCKS as usize), "a fence that nobody asked for loads nothing");
    p.done(a[0], 0, 1);
    let (attempt, slot) = p.tracker.next_fence(ONLY).expect("the chunk's data is in");
    assert_eq!((attempt, slot.chunk), (a[0], 0));
    p.fence(a[0], 0, nonce().get());
    assert_eq!(p.tracker.progress().0, 0, "nor does one that is not posted yet");
    p.tracker.fence_posted(ONLY);
    p.fence(a[0], 0, nonce().get());
    assert_eq!(p.tracker.progress().0, 1);
}

#[test]
fn a_grant_under_another_nonce_is_stale() {
    let mut p = Pull::granted(1);
    p.grant(ONLY); // the same again does no harm
    assert!(!p.tracker.decided());
    let grant = Grant { slot: 0, nonce: Nonce::from_wire(78).unwrap() };
    p.tell(In::Granted { source: ONLY, grant });
    p.outs();
    assert!(p.tracker.decided());
}

#[test]
fn a_failed_attempt_is_tried_again_only_after_quiet_and_keeps_what_is_good() {
    let (mut p, a) = Pull::reading(1, FenceKind::Trailer);
    p.post_all(ONLY);
    p.good(a[0], 0);
    p.good(a[0], 2);
    p.fails(a[0], Cause::LaneFailed);
    p.fails(a[0], Cause::LaneFailed); // told twice
    assert_eq!(p.outs(), [Out::Stop(a[0])]);
    p.at(SECOND / 2);
    assert_eq!(p.outs(), [], "the old lane may still write");
    assert_eq!(p.post_all(ONLY), [0u32; 0], "and posts no more");
    p.quiet(a[0]);
    assert_eq!(p.outs(), [Out::NeedLane { source: ONLY, avoid: vec![LaneKind::Tcp] }]);
    let b = p.lane(ONLY, FenceKind::Trailer);
    assert_eq!(p.post_all(ONLY), [1, 3, 4, 5, 6, 7], "only what is missing");
    p.good(a[0], 1);
    p.quiet(a[0]);
    assert_eq!(p.tracker.progress().0, 2, "the old attempt has no say any more");
    [1, 3, 4, 5, 6, 7].into_iter().for_each(|c| p.good(b, c));
    p.outs();
    p.quiet(b);
    let o = p.ended();
    assert!(o.complete());
    assert_eq!(o.retries, 1);
}

#[test]
fn what_its_last_lane_failed_of_is_a_pulls_cause() {
    for cause in [Cause::Unreachable, Cause::LaneFailed] {
        let mut p = Pull::granted(1);
        for _ in 0..3 {
            p.at(p.now - p.start + SECOND / 10);
            assert!(matches!(p.outs()[..], [Out::NeedLane { .. }]));
            let a = p.lane(ONLY, FenceKind::Trailer);
            p.fails(a, cause);
            p.fails(a, Cause::LaneFailed); // the lane as a whole, after its attempt
            p.outs();
            p.quiet(a);
        }
        assert_eq!(sets(&p.decided_and_ended()), (vec![], vec![(cause, vec![[0, 7]])]));
    }
}

#[test]
fn a_pull_gives_up_when_its_tries_are_used_up() {
    let mut p = Pull::granted(1);
    for _ in 0..2 {
        p.at(p.now - p.start + SECOND / 10);
        assert!(matches!(p.outs()[..], [Out::NeedLane { .. }]));
        p.tell(In::NoLane { source: ONLY, cause: Cause::Unreachable });
    }
    p.at(p.now - p.start + SECOND / 10);
    p.outs();
    p.tell(In::NoLane { source: ONLY, cause: Cause::Unreachable });
    assert_eq!(sets(&p.decided_and_ended()), (vec![], vec![(Cause::Unreachable, vec![[0, 7]])]));
}

#[test]
fn a_silent_lane_delays_the_end_and_not_the_decision() {
    let (mut p, a) = Pull::reading(1, FenceKind::Trailer);
    p.post_all(ONLY);
    p.good(a[0], 0);
    p.at(DEADLINE - QUIET - NANO);
    assert_eq!(p.outs(), []);
    p.at(DEADLINE - QUIET);
    assert_eq!(p.outs(), [Out::Stop(a[0])], "it stops its lane's bound ahead of the deadline");
    p.good(a[0], 1); // what was in flight still makes it
    p.at(DEADLINE - NANO);
    assert!(!p.tracker.decided());
    p.outs();
    p.at(DEADLINE);
    assert_eq!(p.outs(), [Out::Decided]);
    p.at(10 * DEADLINE);
    assert_eq!(p.outs(), [], "not ended while the lane may write");
    p.quiet(a[0]);
    let o = p.ended();
    assert_eq!(sets(&o), (vec![[0, 1]], vec![(Cause::Deadline, vec![[2, 7]])]));
    assert_eq!((o.times.decided, o.times.ended), (Some(DEADLINE), Some(10 * DEADLINE)));
}

#[test]
fn a_lane_that_is_quiet_in_time_lets_the_pull_end_before_its_deadline() {
    let (mut p, a) = Pull::reading(1, FenceKind::Trailer);
    p.post_all(ONLY);
    p.at(DEADLINE - QUIET);
    p.outs();
    p.quiet(a[0]);
    assert_eq!(sets(&p.decided_and_ended()).1, [(Cause::Deadline, vec![[0, 7]])]);
}

#[test]
fn a_deadline_that_passes_before_anything_is_there_decides_all_the_same() {
    let mut p = Pull::new(1, wanted(BLOCKS));
    p.at(DEADLINE);
    assert_eq!(sets(&p.decided_and_ended()), (vec![], vec![(Cause::Deadline, vec![[0, 7]])]));
}

#[test]
fn a_lane_that_comes_after_the_decision_is_stopped_at_once() {
    let mut p = Pull::granted(1);
    p.outs();
    p.tell(In::Cancel(Cause::Cancelled));
    p.outs();
    let a = p.lane(ONLY, FenceKind::Trailer);
    assert_eq!(p.outs(), [Out::Stop(a)]);
    assert_eq!(p.post_all(ONLY), [0u32; 0]);
}

#[test]
fn an_attempt_that_does_not_become_quiet_is_killed_after_half_of_its_bound() {
    let (mut p, a) = Pull::reading(1, FenceKind::Trailer);
    p.fails(a[0], Cause::LaneFailed);
    assert_eq!(p.outs(), [Out::Stop(a[0])]);
    assert_eq!(p.tracker.next_timeout(), Some(p.start + QUIET / 2));
    p.at(QUIET / 2 - NANO);
    assert_eq!(p.outs(), []);
    p.at(QUIET / 2);
    assert_eq!(p.outs(), [Out::Kill(a[0])]);
    p.at(QUIET);
    assert_eq!(p.outs(), [], "once");
}

#[test]
fn a_wedged_attempt_decides_and_never_ends_the_pull() {
    let (mut p, a) = Pull::reading(1, FenceKind::Trailer);
    p.post_all(ONLY);
    p.good(a[0], 0);
    p.fails(a[0], Cause::LaneFailed);
    p.at(QUIET / 2);
    p.outs();
    p.tell(In::Event(a[0], LaneEvent::Wedged));
    assert_eq!(p.outs(), [Out::Wedged, Out::Decided]);
    for t in [DEADLINE, 1000 * DEADLINE] {
        p.at(t);
        assert_eq!(p.outs(), []);
    }
}

#[test]
fn more_completions_than_reads_are_a_lane_failure() {
    let (mut p, a) = Pull::reading(1, FenceKind::Trailer);
    p.post_all(ONLY);
    p.done(a[0], 0, 2);
    assert_eq!(p.outs(), [Out::Stop(a[0])]);
    p.fence(a[0], 0, nonce().get());
    assert_eq!(p.tracker.progress().0, 0, "nothing of the chunk counts");
    p.quiet(a[0]);
    assert!(matches!(p.outs()[..], [Out::NeedLane { .. }]));
}

#[test]
fn completions_of_chunks_that_are_not_there_do_no_harm() {
    let (mut p, a) = Pull::reading(1, FenceKind::Trailer);
    for chunk in [BLOCKS, u32::MAX] {
        p.done(a[0], chunk, 1);
        p.fence(a[0], chunk, nonce().get());
    }
    p.done(a[0], 0, 1); // not posted yet
    p.fence(a[0], 0, nonce().get());
    assert_eq!(p.tracker.progress().0, 0);
}

#[test]
fn a_chunk_is_loaded_only_when_every_sources_part_is() {
    let (mut p, a) = Pull::reading(2, FenceKind::Trailer);
    assert_eq!(p.post_all(0), p.post_all(1), "each brings a part of every chunk");
    [0, 1, 2].into_iter().for_each(|c| p.good(a[0], c));
    [1, 2, 3].into_iter().for_each(|c| p.good(a[1], c));
    p.tell(In::Cancel(Cause::Cancelled));
    assert_eq!(p.outs(), [Out::Decided, Out::Stop(a[0]), Out::Stop(a[1])]);
    p.quiet(a[1]);
    assert_eq!(p.outs(), [], "the other one may still write");
    p.quiet(a[0]);
    let o = p.ended();
    assert_eq!(sets(&o), (vec![[1, 2]], vec![(Cause::Cancelled, vec![[0, 0], [3, 7]])]));
    assert_eq!(o.bytes, 2 * BLOCK);
}

#[test]
fn one_sources_failed_lane_leaves_the_other_source_reading() {
    let (mut p, a) = Pull::reading(2, FenceKind::Trailer);
    p.post_all(0);
    p.fails(a[0], Cause::LaneFailed);
    p.quiet(a[0]);
    assert_eq!(p.outs(), [Out::Stop(a[0]), Out::NeedLane { source: 0, avoid: vec![LaneKind::Tcp] }]);
    assert_eq!(p.post_all(1).len(), BLOCKS as usize);
}

#[test]
fn a_cancelled_pull_without_a_lane_ends_at_once() {
    let mut p = Pull::new(1, wanted(BLOCKS));
    p.tell(In::Cancel(Cause::Cancelled));
    assert_eq!(sets(&p.decided_and_ended()), (vec![], vec![(Cause::Cancelled, vec![[0, 7]])]));
    p.tell(In::Cancel(Cause::Shutdown));
    p.at(DEADLINE);
    assert_eq!(p.outs(), [], "decided and ended once");
}

#[test]
fn a_pull_that_wants_no_blocks_ends_complete() {
    let nothing = LocalBlocks { group: GroupId(0), first_position: 0, blocks: vec![None; 4] };
    let mut p = Pull::new(1, nothing);
    p.plan(BLOCKS);
    let o = p.decided_and_ended();
    assert!(o.complete());
    assert_eq!(o.loaded(), 0);
}

#[test]
fn what_is_not_in_the_offer_is_invalid_for_that_and_the_rest_is_loaded() {
    let mut p = Pull::new(1, wanted(BLOCKS));
    p.plan(5);
    p.grant(ONLY);
    let a = p.lane(ONLY, FenceKind::Trailer);
    p.post_all(ONLY).into_iter().for_each(|c| p.good(a, c));
    p.outs();
    p.quiet(a);
    assert_eq!(sets(&p.ended()), (vec![[0, 4]], vec![(Cause::NotOffered, vec![[5, 7]])]));
}
