//! When chunks are fenced, over which queue pairs, and what becomes of those that are in doubt.

use std::time::{Duration, Instant};

use kvferry_proto::{
    lane::{Attempt, Grant, Lane, LaneEvent},
    plan::Read,
};

use super::{A, BLOCKS, Rig, read};
use crate::{config::VerbsConfig, lane::WakingLane};

#[test]
fn a_fence_goes_over_every_pair_that_carried_its_chunk_and_no_other() {
    for (blocks, pairs) in [(1, 1), (2, 2), (5, 5), (90, 6)] {
        let mut r = Rig::new(2, VerbsConfig { queue_pairs: 3, depth: 32, ..VerbsConfig::default() });
        assert_eq!(r.post(A, 0..blocks), blocks as usize);
        r.carry_out(|_| ());
        assert_eq!(r.in_flight(), 0, "nothing is fenced before its data has been seen to complete");
        r.poll();
        assert_eq!(r.in_flight(), pairs, "{blocks} blocks");
    }
}

#[test]
fn a_chunk_that_is_offered_in_parts_is_fenced_when_all_of_it_is_done() {
    let mut r = Rig::new(2, VerbsConfig { queue_pairs: 1, depth: 32, signal_every: 1, ..VerbsConfig::default() });
    let word = r.nonce.get();
    // For the first time, after a fence that held, and after one that was lost with its rail.
    for time in 0..3 {
        let part: Vec<Read> = (0..8).map(read).collect();
        r.posted = r.events.len();
        assert_eq!(r.lane.post(A, &part), 8);
        r.carry_out(|_| ());
        r.poll();
        assert_eq!((r.in_flight(), r.lane.arm().is_ok()), (0, true), "{time}: a part is no chunk");
        assert_eq!(r.post(A, 8..16), 8);
        if time == 1 {
            r.carry_out(|_| ());
            r.poll();
            let number = r.device().numbers()[0];
            r.device().fail(number, 12);
            assert_eq!(r.fence(), LaneEvent::Again { attempt: A, chunk: 0 });
        } else {
            assert_eq!(r.fence(), LaneEvent::Fence { attempt: A, chunk: 0, word });
        }
    }
}

#[test]
fn a_fence_that_was_due_when_its_attempt_was_stopped_is_not_the_next_attempts() {
    let config = VerbsConfig { spin: Duration::ZERO, queue_pairs: 1, depth: 16, ..VerbsConfig::default() };
    let mut r = Rig::new(1, config);
    assert_eq!(r.post(A, 0..4), 4);
    r.carry_out(|_| ());
    // It sees that all is done, and posts nothing yet.
    assert!(r.lane.arm().is_err());
    r.lane.stop(A);
    let b = Attempt(2);
    r.lane.begin(b, Grant { slot: 3, nonce: r.nonce });
    assert_eq!(r.lane.post(b, &[read(4)]), 1);
    r.carry_out(|_| ());
    r.poll();
    assert_eq!((r.done(), r.in_flight()), (5, 0));
}

#[test]
fn a_fence_that_finds_no_room_on_its_rail_holds_up_none_on_another_one() {
    let config = VerbsConfig { timeout: 18, queue_pairs: 1, depth: 16, signal_every: 1, ..VerbsConfig::default() };
    let mut r = Rig::new(2, config);
    let number = [0, 1].map(|n| r.devices[n].lock().unwrap().numbers()[0]);
    let word = r.nonce.get();
    // Chunks of two reads, one on each rail. What the first rail has of them is done, and other reads take its places; then
    // so is what the second one has, and more fences are due than the first rail has places left.
    let mut chunks = 0;
    while r.lane.post(A, &[0, 1].map(|b| Read { chunk: chunks, ..read(u64::from(chunks) * 2 + b) })) == 2 {
        chunks += 1;
    }
    r.devices[0].lock().unwrap().complete(number[0], 100);
    r.poll();
    let endless: Vec<Read> = (200..240).map(|b| Read { chunk: 99, ..read(b) }).collect();
    r.lane.post(A, &endless);
    r.devices[1].lock().unwrap().complete(number[1], 100);
    r.poll();
    assert_eq!(r.devices[0].lock().unwrap().in_flight(), 16, "full, fences among it");
    assert!(r.devices[1].lock().unwrap().in_flight() < chunks as usize, "and not all fences");
    let b = Attempt(2);
    r.lane.begin(b, Grant { slot: 3, nonce: r.nonce });
    assert_eq!(r.lane.post(b, &[read(250)]), 1);
    while !r.events.contains(&LaneEvent::Fence { attempt: b, chunk: 0, word }) {
        r.devices[1].lock().unwrap().complete(number[1], 100);
        r.poll();
        assert_eq!(r.lane.rails().count(), 2, "it waited until the first rail was given up");
    }
}

#[test]
fn a_read_that_is_reported_as_done_and_was_not_is_read_again() {
    // Signaled or not, the last of its queue or not; the slip seen before the fence is posted, or not.
    for (depth_of_slip, seen) in [(0, true), (3, true), (7, true), (7, false), (3, false)] {
        let mut r = Rig::new(2, VerbsConfig { queue_pairs: 1, depth: 32, signal_every: 4, ..VerbsConfig::default() });
        assert_eq!(r.post(A, 0..16), 16);
        let slipping = r.devices[0].clone();
        let number = slipping.lock().unwrap().numbers()[0];
        slipping.lock().unwrap().complete(number, depth_of_slip);
        slipping.lock().unwrap().slip(number);
        if seen {
            // A request of somebody else shows that the pair is in ERR, while the other pair still has some of the chunk.
            let b = Attempt(2);
            r.lane.begin(b, Grant { slot: 3, nonce: r.nonce });
            r.post(b, 20..24);
            r.poll();
            assert_eq!(r.lane.rails().count(), 1);
        }
        assert_eq!(r.fence(), LaneEvent::Again { attempt: A, chunk: 0 }, "{depth_of_slip} {seen}");
        assert_eq!(r.post(A, 0..16), 16);
        r.carry_out(|_| ());
        r.poll();
        let word = r.nonce.get();
        assert_eq!(r.fence(), LaneEvent::Fence { attempt: A, chunk: 0, word });
        r.check(0..16);
    }
}

#[test]
fn a_word_that_did_not_land_is_not_taken_for_a_revoke() {
    let mut r = Rig::new(2, VerbsConfig { queue_pairs: 1, depth: 32, signal_every: 4, ..VerbsConfig::default() });
    assert_eq!(r.post(A, 0..16), 16);
    r.carry_out(|_| ());
    r.poll();
    assert_eq!(r.in_flight(), 2, "its fence, on both pairs");
    let slipping = r.devices[0].clone();
    let number = slipping.lock().unwrap().numbers()[0];
    slipping.lock().unwrap().slip(number);
    let limit = Instant::now() + Duration::from_secs(20);
    while !r.events.contains(&LaneEvent::Again { attempt: A, chunk: 0 }) {
        r.carry_out(|_| ());
        r.poll();
        assert!(Instant::now() < limit, "{:?}", r.events);
    }
    assert!(!r.events.iter().any(|e| matches!(e, LaneEvent::Fence { .. })));
    assert_eq!(r.post(A, 0..16), 16);
    r.carry_out(|_| ());
    r.poll();
    let word = r.nonce.get();
    assert_eq!(r.fence(), LaneEvent::Fence { attempt: A, chunk: 0, word });
}

#[test]
fn a_fence_goes_out_while_reads_take_all_the_room_that_they_get() {
    let mut r = Rig::new(1, VerbsConfig { queue_pairs: 2, depth: 16, signal_every: 1, ..VerbsConfig::default() });
    // The first chunk is carried by both pairs, the second one takes what room is left.
    assert_eq!(r.post(A, 0..4), 4);
    let of_the_second = |b| Read { chunk: 1, ..read(b) };
    let reads: Vec<Read> = (4..BLOCKS).map(of_the_second).collect();
    let mut next = r.lane.post(A, &reads);
    // And what the first one leaves, on one pair before the first chunk is done, on the other after that.
    for pair in 0..2 {
        let number = { r.device().numbers()[pair] };
        r.device().complete(number, 2);
        r.poll();
        next += r.lane.post(A, &reads[next..]);
    }
    assert!(next < reads.len(), "the queues are full");
    // A pair has room again only when the other is full again.
    let (limit, word) = (Instant::now() + Duration::from_secs(20), r.nonce.get());
    for turn in 0.. {
        let number = { r.device().numbers()[turn % 2] };
        r.device().complete(number, 1);
        if r.poll().contains(&LaneEvent::Fence { attempt: A, chunk: 0, word }) {
            break;
        }
        next += r.lane.post(A, &reads[next..]);
        assert!(next < reads.len() && Instant::now() < limit, "the fence waited for all reads");
    }
}
