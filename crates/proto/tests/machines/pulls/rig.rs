//! A pull with a clock, and lanes that the test plays.

use std::time::{Duration, Instant};

use kvferry_proto::{
    Attempt, BlockId, Cause, ChunkSize, FenceKind, Grant, GroupId, LaneCaps, LaneEvent, LaneKind, LocalBlocks, Machine,
    Nonce, OfferGroup, Outcome, Plan, PoolLayout, Shard, Source,
    pull::{In, Out, PullTracker, Retry},
};

pub(super) const SECOND: Duration = Duration::from_secs(1);
pub(super) const NANO: Duration = Duration::from_nanos(1);
/// Bytes of a block: one chunk.
pub(super) const BLOCK: u64 = 64;
/// Blocks of the pull, at positions 0 to 7.
pub(super) const BLOCKS: u32 = 8;
pub(super) const DEADLINE: Duration = Duration::from_secs(10);
/// How long a pull waits for a silent peer.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);
/// The bound of every lane here: a pull stops that long before its deadline.
pub(super) const QUIET: Duration = Duration::from_secs(2);

/// A pull with a clock, and lanes that the test plays.
pub(super) struct Pull {
    pub(super) tracker: PullTracker,
    pub(super) start: Instant,
    pub(super) now: Instant,
    attempts: u64,
    pub(super) sources: usize,
}

impl Pull {
    /// A pull without plan, grants and lanes.
    pub(super) fn new(sources: usize, wanted: LocalBlocks) -> Self {
        let start = Instant::now();
        let retry = Retry::new(3, Duration::from_millis(10), PATIENCE);
        let tracker = PullTracker::new(start, vec![wanted], sources, start + DEADLINE, retry, true);
        Self { tracker, start, now: start, attempts: 0, sources }
    }

    /// A pull of all blocks, with plan and grants.
    pub(super) fn granted(sources: usize) -> Self {
        let mut p = Self::new(sources, wanted(BLOCKS));
        p.plan(BLOCKS);
        (0..sources).for_each(|s| p.grant(s));
        p
    }

    /// The same with lanes, and nothing posted.
    pub(super) fn reading(sources: usize, fence: FenceKind) -> (Self, Vec<Attempt>) {
        let mut p = Self::granted(sources);
        p.outs();
        let attempts = (0..sources).map(|s| p.lane(s, fence)).collect();
        (p, attempts)
    }

    /// The plan, where the offer has `offered` blocks.
    pub(super) fn plan(&mut self, offered: u32) {
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
        let offer = [OfferGroup { group: GroupId(0), first_position: 0, blocks }];
        let size = ChunkSize { per_pull: u32::MAX, min_bytes: BLOCK, max_bytes: BLOCK };
        let here = Source { layout: &layout, shard: &shard };
        let plan = Plan::new(&offer, &from, here, self.tracker.wanted(), size, 100).unwrap();
        self.tell(In::Planned(Box::new(plan)));
    }

    pub(super) fn grant(&mut self, source: usize) {
        self.tell(In::Granted { source, grant: Grant { slot: 0, nonce: nonce() } });
    }

    pub(super) fn lane(&mut self, source: usize, fence: FenceKind) -> Attempt {
        self.attempts += 1;
        let attempt = Attempt(self.attempts);
        let caps = LaneCaps { kind: LaneKind::Tcp, max_read: 1 << 20, quiet_bound: QUIET, fence };
        self.tell(In::Lane { source, attempt, caps });
        attempt
    }

    /// Posts all reads for a source. Returns the chunks, in order.
    pub(super) fn post_all(&mut self, source: usize) -> Vec<u32> {
        let mut chunks = Vec::new();
        while let Some((_, reads)) = self.tracker.next_reads(source) {
            let n = reads.len();
            chunks.push(reads[0].chunk);
            self.tracker.accepted(source, n);
        }
        chunks
    }

    pub(super) fn done(&mut self, attempt: Attempt, chunk: u32, reads: u32) {
        self.tell(In::Event(attempt, LaneEvent::Done { attempt, chunk, reads }));
    }

    pub(super) fn fence(&mut self, attempt: Attempt, chunk: u32, word: u64) {
        self.tell(In::Event(attempt, LaneEvent::Fence { attempt, chunk, word }));
    }

    /// The chunk's one read is done, and the fence holds.
    pub(super) fn good(&mut self, attempt: Attempt, chunk: u32) {
        self.done(attempt, chunk, 1);
        self.fence(attempt, chunk, nonce().get());
    }

    pub(super) fn fails(&mut self, attempt: Attempt, cause: Cause) {
        self.tell(In::Event(attempt, LaneEvent::Failed { attempt, cause }));
    }

    pub(super) fn again(&mut self, attempt: Attempt, chunk: u32) {
        self.tell(In::Event(attempt, LaneEvent::Again { attempt, chunk }));
    }

    pub(super) fn quiet(&mut self, attempt: Attempt) {
        self.tell(In::Event(attempt, LaneEvent::Quiet { attempt }));
    }

    pub(super) fn tell(&mut self, event: In) {
        self.tracker.handle(self.now, event);
    }

    pub(super) fn at(&mut self, after: Duration) {
        self.now = self.start + after;
        self.tracker.tick(self.now);
    }

    pub(super) fn outs(&mut self) -> Vec<Out> {
        std::iter::from_fn(|| self.tracker.poll()).collect()
    }

    /// The end, which must be the only action.
    pub(super) fn ended(&mut self) -> Outcome {
        match self.outs().as_slice() {
            [Out::Ended(o)] => (**o).clone(),
            other => panic!("not just the end: {other:?}"),
        }
    }

    /// The same for a pull that decides and ends in one step.
    pub(super) fn decided_and_ended(&mut self) -> Outcome {
        assert_eq!(self.tracker.poll(), Some(Out::Decided));
        self.ended()
    }
}

pub(super) fn nonce() -> Nonce {
    Nonce::from_wire(77).unwrap()
}

/// The local blocks 0 to `n - 1` at the same positions.
pub(super) fn wanted(n: u32) -> LocalBlocks {
    LocalBlocks { group: GroupId(0), first_position: 0, blocks: (0..n).map(|b| Some(BlockId(b))).collect() }
}

/// Positions, as `[first, last]`.
pub(super) type Ranges = Vec<[u32; 2]>;

/// The loaded positions, and the invalid ones by cause.
pub(super) fn sets(o: &Outcome) -> (Ranges, Vec<(Cause, Ranges)>) {
    let g = &o.groups[0];
    let causes: Vec<_> = g.causes.iter().map(|(c, s)| (*c, s.ranges().to_vec())).collect();
    assert_eq!(g.invalid.len(), g.causes.iter().map(|(_, s)| s.len()).sum::<u64>(), "one cause for each");
    assert!(g.loaded.iter().all(|p| !g.invalid.contains(p)));
    (g.loaded.ranges().to_vec(), causes)
}
