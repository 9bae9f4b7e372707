//! The staged lane, rule by rule.

mod random;
mod rig;

use std::{sync::Arc, time::Duration};

use kvferry_proto::{
    Attempt, Cause, FenceKind, FenceSlot, Lane, LaneEvent,
    staging::{Finished, Ring},
};

use self::rig::{A, B, BOUND, Rig, SLOT, done, grant, reads};

const KINDS: [FenceKind; 3] = [FenceKind::Posted, FenceKind::Own, FenceKind::Trailer];
const OWN: [FenceKind; 2] = [FenceKind::Own, FenceKind::Trailer];
const NONCE: u64 = 77;

fn failed(attempt: Attempt, cause: Cause) -> LaneEvent {
    LaneEvent::Failed { attempt, cause }
}

fn quiet(attempt: Attempt) -> LaneEvent {
    LaneEvent::Quiet { attempt }
}

fn fence(chunk: u32, word: u64) -> LaneEvent {
    LaneEvent::Fence { attempt: A, chunk, word }
}

const DOWN: LaneEvent = LaneEvent::Down { cause: Cause::LaneFailed };

#[test]
fn a_ring_is_cut_into_slots_of_whole_units() {
    let slots = |bytes| {
        let ring = Ring::new(bytes);
        assert_eq!(ring.free(), ring.slots());
        (ring.slots(), ring.slot_bytes())
    };
    assert_eq!(slots(0), (0, SLOT));
    assert_eq!(slots(SLOT - 1), (0, SLOT));
    assert_eq!(slots(5 * SLOT + 7), (5, SLOT));
    assert_eq!(slots(64 << 20), (64, 1 << 20));
    assert_eq!(slots(127 * SLOT), (127, SLOT));
    assert_eq!(slots(256 << 20), (64, 4 << 20));
}

#[test]
fn its_reads_fit_into_a_slot_and_its_bound_has_time_for_the_copies() {
    let r = Rig::new(FenceKind::Own, 8);
    let caps = r.lane.caps();
    assert_eq!((caps.max_read, caps.fence), (SLOT, FenceKind::Own));
    assert_eq!(caps.quiet_bound, Duration::from_millis(5) + BOUND);
    assert!(r.lane.degraded());
    let wide = Rig::on(&Arc::new(Ring::new(1 << 30)), FenceKind::Own);
    assert_eq!(wide.lane.caps().max_read, 1 << 20, "the inner lane's");
}

#[test]
fn reads_of_a_chunk_share_slots_and_keep_what_names_their_bytes() {
    let mut r = Rig::new(FenceKind::Posted, 8);
    let offered = reads(4, 5, 20_000 + 8);
    assert_eq!(r.lane.post(A, &offered), 5);
    let posted: Vec<_> = r.s().in_flight.iter().map(|(_, r)| *r).collect();
    for (o, p) in offered.iter().zip(&posted) {
        assert_eq!(p.dst_offset % 16, 0);
        assert_eq!(p.dst_offset / SLOT, (p.dst_offset + p.len - 1) / SLOT, "inside one slot");
        assert_eq!(*o, kvferry_proto::Read { dst_segment: 5, dst_offset: o.dst_offset, ..*p });
    }
    assert_eq!(r.slots_in_flight().len(), 2, "three reads to a slot");
    assert_eq!(r.ring.free(), 6);
}

#[test]
fn a_read_is_done_when_its_copy_is_finished() {
    for kind in KINDS {
        let mut r = Rig::new(kind, 8);
        assert_eq!(r.lane.post(A, &reads(0, 3, 100)), 3);
        r.s().land(1);
        r.s().land(1);
        assert_eq!(r.poll(), []);
        assert!(r.s().jobs.is_empty(), "the lane does not say which reads are done");
        r.s().land(0);
        assert_eq!(r.poll(), []);
        assert!(r.lane.copies_outstanding());
        assert_eq!(r.s().jobs[0].1.len(), 3);
        assert_eq!(r.ring.free(), 7, "the job reads the slot");
        r.s().copy();
        assert_eq!(r.poll(), [LaneEvent::Done { attempt: A, chunk: 0, reads: 3 }]);
        assert_eq!(r.ring.free(), 8);
        assert!(!r.lane.copies_outstanding());
    }
}

#[test]
fn refused_reads_take_no_room() {
    for kind in KINDS {
        let mut r = Rig::new(kind, 8);
        let all = reads(0, 6, 40_000);
        r.s().accepts = Some(0);
        assert_eq!(r.lane.post(A, &all), 0);
        assert_eq!(r.ring.free(), 8);
        r.s().accepts = Some(2);
        assert_eq!(r.lane.post(A, &all), 2);
        assert_eq!(r.ring.free(), 6);
        r.s().accepts = Some(0);
        assert_eq!(r.lane.post(A, &all[2..]), 0);
        assert_eq!(r.ring.free(), 6);
        r.s().accepts = None;
        assert_eq!(r.lane.post(A, &all[2..3]), 1);
        let events = r.land_and_copy();
        assert_eq!(done(&events, A, 0), 3);
        assert_eq!(r.ring.free(), 8);
    }
}

#[test]
fn short_reads_of_a_later_post_join_the_slot_of_an_open_batch() {
    let mut r = Rig::new(FenceKind::Own, 8);
    let all = reads(0, 4, 1000);
    r.s().accepts = Some(2);
    assert_eq!(r.lane.post(A, &all), 2);
    r.s().accepts = None;
    assert_eq!(r.lane.post(A, &all[2..]), 2);
    assert_eq!(r.slots_in_flight().len(), 1);
    assert_eq!(r.s().complete.len(), 1, "one chunk to the inner lane");
}

#[test]
fn a_chunk_larger_than_the_ring_is_read_in_batches_that_are_fenced_one_by_one() {
    for kind in OWN {
        let mut r = Rig::new(kind, 8);
        let all = reads(9, 20, SLOT);
        let (mut posted, mut events, mut batches) = (0, Vec::new(), 0);
        while posted < all.len() {
            let n = r.lane.post(A, &all[posted..]);
            assert!(n > 0);
            posted += n;
            assert_eq!(r.lane.post(A, &all[posted..]), 0);
            batches += 1;
            r.s().land_all();
            r.s().fence_all(NONCE);
            events.extend(r.poll());
            r.s().copy_all();
            events.extend(r.poll());
        }
        assert!(batches > 2);
        assert_eq!(done(&events, A, 9), 20);
        assert_eq!(events.last(), Some(&fence(9, NONCE)));
        assert_eq!(events.iter().filter(|e| matches!(e, LaneEvent::Fence { .. })).count(), 1);
        assert_eq!(r.s().local.len(), 20);
    }
}

#[test]
fn a_stale_word_of_any_batch_makes_the_chunk_stale() {
    for words in [[1, NONCE, NONCE], [NONCE, 0, 3], [NONCE, NONCE, 0]] {
        let mut r = Rig::new(FenceKind::Trailer, 4);
        let all = reads(0, 6, SLOT);
        let (mut posted, mut events) = (0, Vec::new());
        for word in words {
            posted += r.lane.post(A, &all[posted..]);
            r.s().land_all();
            r.s().fence_all(word);
            events.extend(r.poll());
            r.s().copy_all();
            events.extend(r.poll());
        }
        assert_eq!(posted, 6);
        let stale = words.into_iter().find(|w| *w != NONCE).unwrap();
        assert_eq!(events.last(), Some(&fence(0, stale)));
    }
}

#[test]
fn a_fence_waits_for_the_copies() {
    for kind in OWN {
        let mut r = Rig::new(kind, 8);
        r.lane.post(A, &reads(0, 2, 100));
        r.s().land_all();
        r.s().fence_all(NONCE);
        assert_eq!(r.poll(), []);
        r.s().copy_all();
        assert_eq!(r.poll(), [LaneEvent::Done { attempt: A, chunk: 0, reads: 2 }, fence(0, NONCE)]);
    }
}

#[test]
fn a_fence_of_the_owner_passes_through() {
    let mut r = Rig::new(FenceKind::Posted, 8);
    r.lane.post(A, &reads(3, 2, 100));
    assert_eq!(done(&r.land_and_copy(), A, 3), 2);
    let slot = FenceSlot { chunk: 3, slot: 8 };
    assert!(r.lane.post_fence(A, slot));
    assert_eq!(r.s().fences, [slot]);
    assert_eq!(r.inner(fence(3, NONCE)), [fence(3, NONCE)]);
    assert!(r.lane.post_fence(B, slot), "does nothing");
    assert_eq!(r.s().fences.len(), 1);
}

#[test]
fn a_chunk_is_read_again_only_after_its_copies() {
    for kind in OWN {
        let mut r = Rig::new(kind, 8);
        r.lane.post(A, &reads(0, 2, 100));
        r.s().land_all();
        let (attempt, chunk) = r.s().complete.pop().unwrap();
        assert_eq!(r.inner(LaneEvent::Again { attempt, chunk }), []);
        r.s().copy_all();
        let again = LaneEvent::Again { attempt: A, chunk: 0 };
        assert_eq!(r.poll(), [LaneEvent::Done { attempt: A, chunk: 0, reads: 2 }, again], "its owner counts reads");
        assert_eq!(r.lane.post(A, &reads(0, 2, 100)), 2);
        r.s().land_all();
        r.s().fence_all(NONCE);
        r.poll();
        r.s().copy_all();
        assert_eq!(r.poll().last(), Some(&fence(0, NONCE)));
    }
}

#[test]
fn a_full_copier_is_asked_again() {
    let mut r = Rig::new(FenceKind::Own, 8);
    r.s().room = Some(1);
    for chunk in 0..3 {
        r.lane.post(A, &reads(chunk, 1, 100));
    }
    r.s().land_all();
    let mut events = r.poll();
    assert_eq!(r.s().jobs.len(), 1);
    for n in (0..3).rev() {
        assert_eq!(r.lane.waits_for_room(), n > 0);
        assert!(r.s().copy());
        events.extend(r.poll());
    }
    assert_eq!((0..3).map(|c| done(&events, A, c)).sum::<u32>(), 3);
}

#[test]
fn a_batch_that_grows_while_the_copier_is_full_is_copied_when_all_of_it_has_landed() {
    for kind in KINDS {
        let mut r = Rig::new(kind, 8);
        let all = reads(0, 3, 100);
        (r.s().accepts, r.s().room) = (Some(1), Some(0));
        assert_eq!(r.lane.post(A, &all), 1);
        r.s().land_all();
        r.poll();
        assert!(r.lane.waits_for_room());
        (r.s().accepts, r.s().room) = (None, None);
        assert_eq!(r.lane.post(A, &all[1..]), 2);
        r.poll();
        assert!(r.s().jobs.is_empty());
        assert_eq!(done(&r.land_and_copy(), A, 0), 3);
    }
}

#[test]
fn slots_are_freed_with_an_event_so_that_refused_reads_are_offered_again() {
    let ring = Arc::new(Ring::new(4 * SLOT));
    let (mut r, mut other) = (Rig::on(&ring, FenceKind::Own), Rig::on(&ring, FenceKind::Own));
    // The last slot is for a lane without slots.
    assert_eq!(other.lane.post(A, &reads(0, 1, SLOT)), 1);
    assert_eq!(r.lane.post(A, &reads(0, 9, SLOT)), 1);
    assert_eq!(r.lane.post(A, &reads(1, 9, SLOT)), 0);
    assert_eq!(done(&other.land_and_copy(), A, 0), 1, "an event, so the owner's next turn offers the reads again");
    assert_eq!(r.lane.post(A, &reads(1, 9, SLOT)), 1);
}

#[test]
fn stalled_lanes_do_not_starve_another_peers_lane() {
    let ring = Arc::new(Ring::new(64 << 20));
    // The first ones take what they may; then a quarter of the slots is there for first slots.
    let mut stalled: Vec<Rig> = Vec::new();
    loop {
        let mut r = Rig::on(&ring, FenceKind::Own);
        let taken = r.lane.post(A, &reads(0, 64, 1 << 20));
        assert!(taken >= 1);
        stalled.push(r);
        if taken == 1 {
            break;
        }
    }
    assert_eq!(stalled[0].slots_in_flight().len(), 24, "one lane alone may use much of the ring");
    while stalled.len() < 16 {
        let mut r = Rig::on(&ring, FenceKind::Own);
        assert_eq!(r.lane.post(A, &reads(0, 64, 1 << 20)), 1);
        stalled.push(r);
    }
    let mut r = Rig::on(&ring, FenceKind::Own);
    for chunk in 0..10 {
        assert_eq!(r.lane.post(A, &reads(chunk, 1, 1 << 20)), 1);
        assert_eq!(done(&r.land_and_copy(), A, chunk), 1);
    }
}

#[test]
fn an_attempt_is_quiet_after_the_inner_lane_and_the_copies() {
    for kind in KINDS {
        let mut r = Rig::new(kind, 8);
        r.lane.post(A, &reads(0, 2, 100));
        r.s().land_all();
        r.poll();
        r.lane.post(A, &reads(1, 2, 100));
        r.s().land(0);
        r.poll();
        r.lane.stop(A);
        r.lane.stop(A);
        assert_eq!(r.s().stopped, [A, A]);
        r.s().land_all();
        assert_eq!(r.poll(), []);
        assert_eq!(r.s().jobs.len(), 1, "data that lands after the stop is dropped");
        assert_eq!(r.lane.post(A, &reads(2, 1, 100)), 0);
        assert_eq!(r.inner(quiet(A)), []);
        assert_eq!(r.ring.free(), 7, "the job's slot");
        r.s().copy_all();
        let events = r.poll();
        assert_eq!(events.last(), Some(&quiet(A)), "the last event");
        assert_eq!(done(&events, A, 0), 2, "what was copied counts");
        assert_eq!(r.ring.free(), 8);
        assert_eq!(r.inner(quiet(A)), []);
    }
}

#[test]
fn slots_of_a_stopped_attempt_are_free_only_when_the_inner_lane_is_quiet() {
    for kind in KINDS {
        let mut r = Rig::new(kind, 8);
        r.lane.post(A, &reads(0, 2, 100));
        r.s().land_all();
        r.poll();
        r.lane.post(A, &reads(1, 2, 100));
        r.lane.stop(A);
        r.s().copy_all();
        r.poll();
        assert_eq!(r.ring.free(), 6);
        assert_eq!(r.inner(quiet(A)), [quiet(A)]);
        assert_eq!(r.ring.free(), 8);
    }
}

#[test]
fn a_fence_that_is_held_at_the_stop_comes_before_quiet() {
    let mut r = Rig::new(FenceKind::Trailer, 8);
    r.lane.post(A, &reads(0, 2, 100));
    r.s().land_all();
    r.s().fence_all(NONCE);
    r.poll();
    r.lane.stop(A);
    assert_eq!(r.inner(quiet(A)), []);
    r.s().copy_all();
    assert_eq!(r.poll(), [LaneEvent::Done { attempt: A, chunk: 0, reads: 2 }, fence(0, NONCE), quiet(A)]);
}

#[test]
fn a_failure_passes_at_once_and_once() {
    for kind in KINDS {
        let mut r = Rig::new(kind, 8);
        r.lane.post(A, &reads(0, 2, 100));
        r.s().land_all();
        r.poll();
        assert_eq!(r.inner(failed(A, Cause::Corrupt)), [failed(A, Cause::Corrupt)]);
        assert_eq!(r.inner(failed(A, Cause::LaneFailed)), []);
        assert_eq!(r.lane.post(A, &reads(1, 1, 100)), 0);
        assert_eq!(r.inner(quiet(A)), []);
        r.s().copy_all();
        assert_eq!(r.poll().last(), Some(&quiet(A)));
    }
}

#[test]
fn more_completions_than_reads_fail_the_attempt() {
    for kind in KINDS {
        let mut r = Rig::new(kind, 8);
        r.lane.post(A, &reads(0, 2, 100));
        let chunk = r.s().in_flight[0].1.chunk;
        assert_eq!(r.inner(LaneEvent::Done { attempt: A, chunk, reads: 3 }), [failed(A, Cause::LaneFailed)]);
        assert!(r.s().jobs.is_empty());
        assert_eq!(r.inner(LaneEvent::Done { attempt: A, chunk: 99, reads: 3 }), []);
        let mut r = Rig::new(kind, 8);
        assert_eq!(r.inner(LaneEvent::Done { attempt: A, chunk: 99, reads: 1 }), [failed(A, Cause::LaneFailed)]);
    }
}

#[test]
fn a_read_that_is_too_long_fails_the_attempt() {
    let mut r = Rig::new(FenceKind::Own, 8);
    assert_eq!(r.lane.post(A, &reads(0, 2, SLOT + 1)), 0);
    assert!(r.lane.has_events() && r.s().in_flight.is_empty());
    assert_eq!(r.poll(), [failed(A, Cause::BadOffer)]);
}

#[test]
fn a_lane_that_goes_down_is_quiet_after_its_copies() {
    let mut r = Rig::new(FenceKind::Trailer, 8);
    r.lane.post(A, &reads(0, 2, 100));
    r.s().land_all();
    r.s().events.extend([quiet(A), DOWN]);
    assert_eq!(r.poll(), [DOWN]);
    assert_eq!(r.s().jobs.len(), 1, "data that landed before is kept");
    r.s().copy_all();
    assert_eq!(r.poll(), [LaneEvent::Done { attempt: A, chunk: 0, reads: 2 }, quiet(A)]);
    r.lane.begin(B, grant());
    assert!(r.lane.has_events());
    assert_eq!(r.poll(), [failed(B, Cause::LaneFailed), quiet(B)]);
    assert_eq!(r.s().begun, [A]);
    drop(r.lane);
    assert_eq!((r.ring.free(), r.ring.lost()), (8, 0));
}

#[test]
fn a_wedged_inner_lane_keeps_its_slots() {
    let mut r = Rig::new(FenceKind::Own, 8);
    r.lane.begin(B, grant());
    r.lane.post(A, &reads(0, 2, SLOT));
    r.lane.post(B, &reads(0, 1, SLOT));
    r.s().land(2);
    r.poll();
    r.lane.kill();
    r.s().events.push(quiet(B));
    assert_eq!(r.inner(LaneEvent::Wedged), [LaneEvent::Wedged]);
    assert_eq!((r.ring.free(), r.ring.lost()), (5, 3));
    r.s().copy_all();
    assert_eq!(r.poll().last(), Some(&quiet(B)), "its copies are finished");
    r.lane.wedge();
    assert_eq!(r.poll(), []);
    drop(r.lane);
    assert_eq!((r.ring.free(), r.ring.lost()), (5, 3));
}

#[test]
fn copies_that_do_not_finish_wedge_the_lane_once() {
    let mut r = Rig::new(FenceKind::Own, 8);
    r.lane.post(A, &reads(0, 1, 100));
    r.s().land_all();
    r.poll();
    r.lane.stop(A);
    r.lane.kill();
    r.s().events.extend([quiet(A), DOWN]);
    assert_eq!(r.poll(), [DOWN]);
    assert!(r.lane.copies_outstanding());
    r.lane.wedge();
    r.lane.wedge();
    assert!(r.lane.has_events());
    assert_eq!(r.poll(), [LaneEvent::Wedged]);
    assert_eq!((r.ring.free(), r.ring.lost(), r.s().kills), (7, 1, 1));
    r.s().copy_all();
    assert_eq!(r.poll().last(), Some(&quiet(A)), "the job ended after all");
    assert_eq!((r.ring.free(), r.ring.lost()), (7, 1));
}

#[test]
fn a_lane_without_copies_is_not_wedged() {
    let mut r = Rig::new(FenceKind::Own, 8);
    r.lane.post(A, &reads(0, 1, 100));
    r.lane.wedge();
    assert_eq!((r.poll(), r.s().kills), (vec![], 0));
}

#[test]
fn a_failed_copier_fails_every_attempt_and_the_lane() {
    let mut r = Rig::new(FenceKind::Trailer, 8);
    r.lane.begin(B, grant());
    r.lane.post(A, &reads(0, 2, 100));
    r.lane.post(B, &reads(0, 1, 100));
    r.s().land_all();
    r.s().fence_all(NONCE);
    r.poll();
    assert_eq!(r.s().jobs.len(), 2);
    r.s().copy();
    r.s().finished.failed = true;
    let events = r.poll();
    // The last read landed first: that job is B's.
    assert_eq!(
        events[..2],
        [LaneEvent::Done { attempt: B, chunk: 0, reads: 1 }, LaneEvent::Fence { attempt: B, chunk: 0, word: NONCE },]
    );
    assert_eq!(events[2..], [failed(A, Cause::LaneFailed), failed(B, Cause::LaneFailed), DOWN]);
    assert_eq!(r.s().kills, 1);
    assert_eq!(r.poll(), []);
    assert!(!r.lane.copies_outstanding());
    r.s().events.extend([failed(A, Cause::LaneFailed), quiet(B), DOWN, quiet(A)]);
    assert_eq!(r.poll(), [quiet(B), quiet(A)]);
    assert_eq!((r.ring.free(), r.ring.lost()), (8, 0));
}

#[test]
fn a_lane_that_is_dropped_early_loses_its_slots() {
    // With reads in flight, with landed data, with a job.
    for landed in [0, 1, 2] {
        let mut r = Rig::new(FenceKind::Own, 8);
        r.lane.post(A, &reads(0, 2, SLOT));
        for _ in 0..landed {
            r.s().land(0);
        }
        r.poll();
        drop(r.lane);
        assert_eq!((r.ring.free(), r.ring.lost()), (6, 2));
    }
    let r = Rig::new(FenceKind::Own, 8);
    drop(r.lane);
    assert_eq!((r.ring.free(), r.ring.lost()), (8, 0));
}

#[test]
fn a_lost_ring_fails_attempts_at_once() {
    let ring = Arc::new(Ring::new(2 * SLOT));
    let mut waiting = Rig::on(&ring, FenceKind::Own);
    for _ in 0..2 {
        let mut r = Rig::on(&ring, FenceKind::Own);
        assert_eq!(r.lane.post(A, &reads(0, 1, SLOT)), 1);
    }
    assert_eq!(ring.lost(), 2);
    assert_eq!(waiting.lane.post(A, &reads(0, 1, SLOT)), 0);
    assert_eq!(waiting.poll(), [failed(A, Cause::LaneFailed)]);
    waiting.lane.begin(B, grant());
    assert_eq!(waiting.poll(), [failed(B, Cause::LaneFailed), quiet(B)]);
}

#[test]
fn unknown_and_repeated_attempts_do_nothing() {
    let mut r = Rig::new(FenceKind::Own, 8);
    r.lane.begin(A, grant());
    assert_eq!(r.s().begun, [A]);
    assert_eq!(r.lane.post(B, &reads(0, 1, 100)), 0);
    assert_eq!(r.lane.post(A, &[]), 0);
    r.lane.stop(B);
    assert!(r.s().stopped.is_empty());
    for e in [quiet(B), failed(B, Cause::LaneFailed), LaneEvent::Done { attempt: B, chunk: 0, reads: 1 }] {
        assert_eq!(r.inner(e), []);
    }
    assert_eq!(Finished::default(), Finished { up_to: 0, failed: false });
}
