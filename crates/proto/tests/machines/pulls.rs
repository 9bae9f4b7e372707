//! One pull.

mod growing;
mod rig;

use std::time::{Duration, Instant};

use kvferry_proto::{
    BlockId, Cause, FenceKind, Grant, GroupId, LaneEvent, LaneKind, LocalBlocks, Machine, Nonce,
    pull::{In, Out, PullTracker, Retry},
};

use self::rig::{BLOCK, BLOCKS, DEADLINE, NANO, PATIENCE, Pull, QUIET, SECOND, nonce, sets, wanted};

const ONLY: usize = 0;

#[test]
fn a_chunk_that_its_lane_takes_back_is_read_and_fenced_again_on_the_same_attempt() {
    for kind in [FenceKind::Posted, FenceKind::Own, FenceKind::Trailer] {
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
        // A word of the old fence, and a second `Again`, mean nothing now.
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
    let retry = Retry::new(3, SECOND, PATIENCE);
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
    assert_eq!(p.tracker.progress(), (0, BLOCKS as usize), "a fence that was not posted loads nothing");
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
    assert_eq!(p.post_all(ONLY), [1, 3, 4, 5, 6, 7], "only the missing chunks");
    p.good(a[0], 1);
    p.quiet(a[0]);
    assert_eq!(p.tracker.progress().0, 2, "the old attempt counts no more");
    [1, 3, 4, 5, 6, 7].into_iter().for_each(|c| p.good(b, c));
    p.outs();
    p.quiet(b);
    let o = p.ended();
    assert!(o.complete());
    assert_eq!(o.retries, 1);
}

#[test]
fn the_first_failure_of_the_last_lane_is_the_pulls_cause() {
    for cause in [Cause::Unreachable, Cause::LaneFailed, Cause::Corrupt] {
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
fn a_pull_gives_up_when_its_attempts_are_used_up() {
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
    p.good(a[0], 1); // a read in flight still counts
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
fn a_deadline_decides_even_without_a_plan() {
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
    assert_eq!(p.outs(), [Out::Decided, Out::Wedged]);
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
fn completions_of_unknown_chunks_do_no_harm() {
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
fn blocks_that_were_not_offered_are_invalid_and_the_rest_is_loaded() {
    let mut p = Pull::new(1, wanted(BLOCKS));
    p.plan(5);
    p.grant(ONLY);
    let a = p.lane(ONLY, FenceKind::Trailer);
    p.post_all(ONLY).into_iter().for_each(|c| p.good(a, c));
    p.outs();
    p.quiet(a);
    assert_eq!(sets(&p.ended()), (vec![[0, 4]], vec![(Cause::NotOffered, vec![[5, 7]])]));
}

#[test]
fn only_the_first_plan_for_the_right_sources_counts() {
    let mut p = Pull::new(1, wanted(BLOCKS));
    p.sources = 2;
    p.plan(BLOCKS);
    assert!(p.tracker.plan().is_none(), "it is for two sources");
    p.sources = 1;
    p.plan(BLOCKS);
    p.plan(3);
    assert_eq!(p.tracker.plan().map(|plan| plan.chunks().len()), Some(BLOCKS as usize));
    assert_eq!(p.tracker.progress(), (0, BLOCKS as usize));
    let mut late = Pull::new(1, wanted(BLOCKS));
    late.tell(In::Cancel(Cause::Cancelled));
    late.plan(BLOCKS);
    assert!(late.tracker.plan().is_none(), "the pull has decided");
}

fn silent(p: &mut Pull, source: usize, silent: bool) {
    p.tell(In::Silent { source, silent });
}

#[test]
fn a_pull_that_moves_nothing_from_a_silent_peer_gives_up_before_its_deadline() {
    let mut p = Pull::new(1, wanted(BLOCKS));
    p.plan(BLOCKS);
    p.at(PATIENCE);
    silent(&mut p, ONLY, true);
    // Not at once: this process may have been stopped itself, and the answer may be there.
    p.at(PATIENCE + PATIENCE / 8 - NANO);
    assert_eq!(p.outs(), []);
    assert_eq!(p.tracker.next_timeout(), Some(p.now + NANO));
    p.at(PATIENCE + PATIENCE / 8);
    let o = p.decided_and_ended();
    assert_eq!(sets(&o), (vec![], vec![(Cause::PeerDown, vec![[0, BLOCKS - 1]])]));
}

#[test]
fn a_silent_peer_that_answers_in_time_costs_nothing() {
    let mut p = Pull::new(1, wanted(BLOCKS));
    p.plan(BLOCKS);
    p.at(PATIENCE);
    silent(&mut p, ONLY, true);
    silent(&mut p, ONLY, false);
    p.at(DEADLINE - NANO);
    assert_eq!(p.outs(), []);
}

#[test]
fn a_pull_whose_data_moves_goes_on_although_its_peer_is_silent() {
    let (mut p, a) = Pull::reading(1, FenceKind::Trailer);
    p.post_all(ONLY);
    silent(&mut p, ONLY, true);
    // One read or fence within each patience.
    for c in 0..2 {
        p.at(p.now - p.start + PATIENCE - NANO);
        p.done(a[0], c, 1);
        p.at(p.now - p.start + PATIENCE / 2);
        p.fence(a[0], c, nonce().get());
    }
    assert_eq!(p.outs(), []);
    p.at(p.now - p.start + PATIENCE);
    assert_eq!(p.outs(), [Out::Decided, Out::Stop(a[0])]);
    p.quiet(a[0]);
    assert_eq!(sets(&p.ended()), (vec![[0, 1]], vec![(Cause::PeerDown, vec![[2, BLOCKS - 1]])]));
}

#[test]
fn one_silent_peer_of_two_ends_the_pull_unless_its_part_is_complete() {
    let (mut p, a) = Pull::reading(2, FenceKind::Trailer);
    (0..2).for_each(|s| drop(p.post_all(s)));
    (0..BLOCKS).for_each(|c| p.good(a[0], c));
    silent(&mut p, 0, true);
    p.at(PATIENCE * 2);
    assert_eq!(p.outs(), [], "nothing more is needed from it");
    silent(&mut p, 1, true);
    p.at(PATIENCE * 2 + PATIENCE / 8);
    assert!(p.outs().contains(&Out::Decided), "the other part never comes");
}

#[test]
fn a_peer_that_never_answered_hello_is_unreachable() {
    let mut p = Pull::new(1, wanted(BLOCKS));
    p.at(PATIENCE);
    silent(&mut p, ONLY, true);
    p.at(PATIENCE * 2);
    assert_eq!(sets(&p.decided_and_ended()).1, [(Cause::Unreachable, vec![[0, BLOCKS - 1]])]);
}

#[test]
fn endless_patience_waits_for_the_deadline() {
    let retry = Retry::new(3, SECOND, Duration::MAX);
    let now = Instant::now();
    let mut tracker = PullTracker::new(now, vec![wanted(BLOCKS)], 1, now + DEADLINE, retry, true);
    tracker.handle(now, In::Silent { source: ONLY, silent: true });
    tracker.tick(now + DEADLINE - NANO);
    assert!(!tracker.decided());
    tracker.tick(now + DEADLINE);
    assert!(tracker.decided());
}
