//! Pulls of offers that grow.

use super::{
    rig::{BLOCK, BLOCKS, DEADLINE, NANO, PATIENCE, Pull, SECOND, sets, wanted},
    *,
};
use kvferry_proto::{ChunkSize, Group, GroupKind, OfferGroup, Offered, Plan, PoolLayout, Region, Shard, Source};

const TOKENS: u64 = 16 * BLOCKS as u64;
const QUEUED: Duration = Duration::from_secs(5);
const STALLED: Duration = Duration::from_secs(3);

impl Pull {
    fn growing(awaited: bool) -> Self {
        let mut p = Self::new(1, wanted(BLOCKS));
        let retry =
            Retry { awaited, queued: QUEUED, stalled: STALLED, ..Retry::new(3, Duration::from_millis(10), PATIENCE) };
        p.tracker = PullTracker::new(p.start, vec![wanted(BLOCKS)], 1, p.start + DEADLINE, retry, true);
        p
    }

    /// The offer's first `computed` blocks are below its mark now.
    fn grows(&mut self, computed: u32, complete: bool) {
        let (layout, shard) = (PoolLayout::uniform(BLOCKS, 1, BLOCK, 16), Shard::whole(2, 1));
        let side = Source { layout: &layout, shard: &shard };
        let size = ChunkSize { per_pull: u32::MAX, min_bytes: BLOCK, max_bytes: BLOCK };
        let plan = self.tracker.take_plan();
        let mut plan =
            plan.unwrap_or_else(|| Box::new(Plan::open(side, self.tracker.wanted(), size, 100).expect("a good plan")));
        let groups = [OfferGroup {
            group: GroupId(0),
            first_position: 0,
            blocks: (0..BLOCKS).map(|b| Some(BlockId(b))).collect(),
        }];
        let tokens = u64::from(computed) * 16;
        plan.extend(Offered { groups: &groups, tokens, complete }, &[side], side).unwrap();
        self.tell(In::Planned(plan));
    }

    /// Reads and fences everything that can be read.
    fn reads(&mut self, a: kvferry_proto::Attempt) -> Vec<u32> {
        let chunks = self.post_all(ONLY);
        chunks.iter().for_each(|c| self.good(a, *c));
        chunks
    }
}

#[test]
fn a_pull_reads_below_the_mark_rests_and_goes_on_when_its_offer_grows() {
    let mut p = Pull::growing(false);
    p.grows(0, false);
    p.grant(ONLY);
    assert_eq!(p.outs(), [Out::NeedLane { source: ONLY, avoid: vec![] }], "the lane is there before the first block");
    let a = p.lane(ONLY, FenceKind::Trailer);
    assert!(p.tracker.rests(ONLY));
    p.grows(3, false);
    assert!(!p.tracker.rests(ONLY));
    assert_eq!(p.reads(a), [0, 1, 2]);
    assert!(p.tracker.rests(ONLY));
    assert_eq!(p.outs(), []);
    p.grows(7, false);
    assert_eq!(p.reads(a), [3, 4, 5, 6]);
    assert_eq!(p.outs(), [], "one block is missing");
    p.grows(8, true);
    assert_eq!(p.reads(a), [7]);
    assert_eq!(p.outs(), [Out::Decided, Out::Stop(a)]);
    p.quiet(a);
    assert!(p.ended().complete());
}

#[test]
fn a_pull_that_has_all_it_wants_does_not_wait_for_the_end_of_the_prefill() {
    let mut p = Pull::growing(false);
    p.grows(8, false);
    p.grant(ONLY);
    p.outs();
    let a = p.lane(ONLY, FenceKind::Trailer);
    p.reads(a);
    assert_eq!(p.outs(), [Out::Decided, Out::Stop(a)]);
}

#[test]
fn a_fence_after_the_decision_changes_no_set_and_no_prefix() {
    let mut p = Pull::growing(false);
    p.grows(4, false);
    p.grant(ONLY);
    let a = p.lane(ONLY, FenceKind::Trailer);
    p.post_all(ONLY);
    p.good(a, 0);
    p.done(a, 1, 1);
    p.tell(In::Cancel(Cause::Revoked));
    p.fence(a, 1, nonce().get());
    assert_eq!(p.tracker.loaded_prefix(TOKENS), 16);
    p.outs();
    p.quiet(a);
    assert_eq!(sets(&p.ended()), (vec![[0, 0]], vec![(Cause::Revoked, vec![[1, 7]])]));
}

#[test]
fn the_loaded_prefix_ends_at_the_first_block_that_is_not_loaded() {
    let mut p = Pull::growing(false);
    assert_eq!(p.tracker.loaded_prefix(TOKENS), 0);
    p.grows(4, false);
    p.grant(ONLY);
    let a = p.lane(ONLY, FenceKind::Trailer);
    assert_eq!(p.tracker.loaded_prefix(TOKENS), 0);
    assert_eq!(p.post_all(ONLY), [0, 1, 2, 3]);
    p.good(a, 1);
    assert_eq!(p.tracker.loaded_prefix(TOKENS), 0);
    p.good(a, 0);
    assert_eq!(p.tracker.loaded_prefix(TOKENS), 32);
    p.good(a, 3);
    p.good(a, 2);
    assert_eq!(p.tracker.loaded_prefix(TOKENS), 64);
    p.grows(8, true);
    assert_eq!(p.tracker.loaded_prefix(TOKENS), 64);
    p.reads(a);
    // The last block is partial.
    assert_eq!(p.tracker.loaded_prefix(TOKENS - 3), TOKENS - 3);
}

#[test]
fn a_pull_whose_prefill_does_not_go_on_ends_as_stalled_and_keeps_its_prefix() {
    let mut p = Pull::growing(false);
    p.grows(0, false);
    p.grant(ONLY);
    let a = p.lane(ONLY, FenceKind::Trailer);
    p.at(SECOND);
    p.grows(3, false);
    p.reads(a);
    p.outs();
    p.at(SECOND + STALLED - NANO);
    assert_eq!(p.outs(), []);
    assert_eq!(p.tracker.next_timeout(), Some(p.start + SECOND + STALLED));
    p.at(SECOND + STALLED);
    assert_eq!(p.outs(), [Out::Decided, Out::Stop(a)]);
    p.quiet(a);
    assert_eq!(sets(&p.ended()), (vec![[0, 2]], vec![(Cause::Stalled, vec![[3, 7]])]));
}

#[test]
fn a_pull_waits_longer_for_a_prefill_that_is_queued() {
    for opened in [true, false] {
        let mut p = Pull::growing(!opened);
        if opened {
            p.grows(0, false);
            p.grant(ONLY);
            p.outs();
        }
        p.at(QUEUED - NANO);
        assert_eq!(p.outs(), []);
        p.at(QUEUED);
        let o = p.decided_and_ended();
        assert_eq!(sets(&o), (vec![], vec![(Cause::Stalled, vec![[0, 7]])]), "opened: {opened}");
    }
    // A claim that does not wait is answered in time, or its pull has a deadline.
    let mut p = Pull::growing(false);
    p.at(DEADLINE - NANO);
    assert_eq!(p.outs(), []);
    p.at(DEADLINE);
    assert_eq!(p.tracker.poll(), Some(Out::Decided));
}

#[test]
fn a_pull_that_rests_gives_up_when_its_peer_goes_silent() {
    let mut p = Pull::growing(false);
    p.grows(3, false);
    p.grant(ONLY);
    let a = p.lane(ONLY, FenceKind::Trailer);
    p.reads(a);
    p.outs();
    p.tell(In::Silent { source: ONLY, silent: true });
    p.at(PATIENCE);
    assert_eq!(p.outs(), [Out::Decided, Out::Stop(a)]);
    p.quiet(a);
    assert_eq!(sets(&p.ended()), (vec![[0, 2]], vec![(Cause::PeerDown, vec![[3, 7]])]));
}

#[test]
fn a_new_lane_reads_what_the_old_one_had_not_fenced_and_what_has_grown_since() {
    let mut p = Pull::growing(false);
    p.grows(3, false);
    p.grant(ONLY);
    let a = p.lane(ONLY, FenceKind::Trailer);
    assert_eq!(p.post_all(ONLY), [0, 1, 2]);
    p.good(a, 0);
    p.fails(a, Cause::LaneFailed);
    p.grows(5, false);
    assert_eq!(p.post_all(ONLY), [] as [u32; 0], "the old lane is not quiet");
    p.quiet(a);
    let b = p.lane(ONLY, FenceKind::Trailer);
    assert_eq!(p.reads(b), [1, 2, 3, 4]);
    p.grows(8, true);
    assert_eq!(p.reads(b), [5, 6, 7]);
    p.quiet(b);
    let outs = p.outs();
    let Some(Out::Ended(o)) = outs.last() else { panic!("{outs:?}") };
    assert!(o.complete());
    assert_eq!(o.bytes, u64::from(BLOCKS) * BLOCK);
}

#[test]
fn a_pull_decides_when_the_last_chunk_is_loaded_from_the_one_source_that_holds_it() {
    let group = |id, names: &[&str]| {
        let region = |(i, name): (usize, &&str)| Region {
            name: (*name).into(),
            segment: id,
            offset: i as u64 * BLOCK,
            block_bytes: BLOCK,
            stride: BLOCK,
        };
        let regions = names.iter().enumerate().map(region).collect();
        Group { id: GroupId(id), kind: GroupKind::Full, block_tokens: 16, blocks: 1, regions }
    };
    let pool = |groups: Vec<Group>| PoolLayout { segments: vec![2 * BLOCK; 2], groups };
    let here = pool(vec![group(0, &["l0", "l1"]), group(1, &["l2"])]);
    let first = pool(vec![group(0, &["l0"]), group(1, &["l2"])]);
    let second = pool(vec![group(0, &["l1"])]);
    let shard = Shard::whole(1, 3);
    let side = |layout| Source { layout, shard: &shard };
    let (sources, to) = ([side(&first), side(&second)], side(&here));
    let list = |group| OfferGroup { group: GroupId(group), first_position: 0, blocks: vec![Some(BlockId(0))] };
    let wanted: Vec<_> = [0, 1]
        .map(|group| LocalBlocks { group: GroupId(group), first_position: 0, blocks: vec![Some(BlockId(0))] })
        .into();
    let retry = Retry::new(3, Duration::from_millis(10), PATIENCE);
    let mut p = Pull::new(2, wanted[0].clone());
    p.tracker = PullTracker::new(p.start, wanted.clone(), 2, p.start + DEADLINE, retry, true);

    let mut plan = Box::new(Plan::open(to, &wanted, ChunkSize::default(), 100).unwrap());
    plan.extend(Offered { groups: &[list(0)], tokens: 16, complete: false }, &sources, to).unwrap();
    p.tell(In::Planned(plan));
    let attempts = [0, 1].map(|source| {
        p.grant(source);
        p.lane(source, FenceKind::Trailer)
    });
    for (source, a) in attempts.into_iter().enumerate() {
        assert_eq!(p.post_all(source), [0]);
        p.good(a, 0);
    }
    p.outs();
    // The second group is on the first source only. The second source's lane is full: it posts nothing any more.
    let mut plan = p.tracker.take_plan().unwrap();
    plan.extend(Offered { groups: &[list(0), list(1)], tokens: 16, complete: true }, &sources, to).unwrap();
    p.tell(In::Planned(plan));
    assert!(p.tracker.rests(1));
    assert_eq!(p.post_all(0), [1]);
    p.good(attempts[0], 1);
    assert_eq!(p.outs()[0], Out::Decided);
}

#[test]
fn growth_before_the_first_wanted_block_is_growth() {
    let mut p = Pull::growing(true);
    let mut rest = wanted(BLOCKS);
    rest.blocks.drain(..4);
    rest.first_position = 4;
    let retry = Retry { awaited: true, queued: QUEUED, stalled: STALLED, ..Retry::new(3, SECOND, PATIENCE) };
    p.tracker = PullTracker::new(p.start, vec![rest], 1, p.start + DEADLINE, retry, true);
    p.grant(ONLY);
    for computed in 1..4 {
        p.at((STALLED - SECOND) * computed);
        p.grows(computed, false);
        p.outs();
    }
    let last = (STALLED - SECOND) * 3;
    assert!(last > QUEUED);
    p.at(last + STALLED - NANO);
    assert_eq!(p.outs(), []);
    p.at(last + STALLED);
    assert_eq!(p.decided_and_ended().cause(), Some(Cause::Stalled));
}

#[test]
fn news_that_move_nothing_are_no_growth() {
    let mut p = Pull::growing(false);
    p.grant(ONLY);
    p.at(SECOND);
    p.grows(3, false);
    let a = p.lane(ONLY, FenceKind::Trailer);
    p.reads(a);
    // Another source has grown, and this one has not.
    p.at(2 * SECOND);
    p.grows(3, false);
    p.outs();
    p.at(SECOND + STALLED);
    assert_eq!(p.outs(), [Out::Decided, Out::Stop(a)]);
}

#[test]
fn lanes_that_fail_are_counted_while_the_offer_grows() {
    let mut p = Pull::growing(false);
    p.grant(ONLY);
    for attempt in 1..=3 {
        p.at(SECOND * attempt / 10);
        p.grows(attempt, false);
        p.outs();
        let a = p.lane(ONLY, FenceKind::Trailer);
        p.fails(a, Cause::LaneFailed);
        p.quiet(a);
    }
    let outs = p.outs();
    let Some(Out::Ended(o)) = outs.last() else { panic!("{outs:?}") };
    assert_eq!(sets(o), (vec![], vec![(Cause::LaneFailed, vec![[0, 7]])]));
}
