//! Fences: when they are posted, over which queue pairs, and unverified chunks.

use std::time::{Duration, Instant};

use kvferry_proto::{Attempt, Grant, Lane, LaneEvent, Read};

use super::rig::{A, BLOCK, BLOCKS, Rig, read};
use crate::{config::VerbsConfig, lane::WakingLane};

#[test]
fn a_fence_goes_over_the_queue_pairs_of_its_chunk_and_no_other() {
    for (blocks, pairs) in [(1, 1), (2, 2), (5, 5), (90, 6)] {
        let mut r = Rig::new(2, VerbsConfig { queue_pairs: 3, depth: 32, ..VerbsConfig::default() });
        assert_eq!(r.post(A, 0..blocks), blocks as usize);
        r.execute(|_| ());
        assert_eq!(r.in_flight(), 0, "no chunk is fenced before the completions of its data");
        r.poll();
        assert_eq!(r.in_flight(), pairs, "{blocks} blocks");
    }
}

#[test]
fn a_chunk_that_is_accepted_in_parts_is_fenced_when_all_of_it_is_done() {
    let config = VerbsConfig { queue_pairs: 1, signal_every: 1, window: 4 * BLOCK, ..VerbsConfig::default() };
    let mut r = Rig::new(2, config);
    let word = r.nonce.get();
    // The first time, after a fence that held, and after a fence that was lost with its rail.
    for time in 0..3 {
        let mut next = r.post(A, 0..16) as u64;
        assert!(next < 16, "the window is full");
        while next < 16 {
            r.execute(|_| ());
            r.poll();
            assert_eq!((r.in_flight(), r.lane.arm().is_ok()), (0, true), "{time}: no fence after a part of the chunk");
            next += r.post(A, next..16) as u64;
        }
        if time == 1 {
            r.execute(|_| ());
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
fn a_fence_that_was_due_when_its_attempt_stopped_is_not_posted_for_the_next_attempt() {
    let config = VerbsConfig { spin: Duration::ZERO, queue_pairs: 1, depth: 16, ..VerbsConfig::default() };
    let mut r = Rig::new(1, config);
    assert_eq!(r.post(A, 0..4), 4);
    r.execute(|_| ());
    // It sees that all reads are done, and posts nothing yet.
    assert!(r.lane.arm().is_err());
    r.lane.stop(A);
    let b = Attempt(2);
    r.lane.begin(b, Grant { slot: 3, nonce: r.nonce });
    assert_eq!(r.lane.post(b, &[read(4)]), 1);
    r.execute(|_| ());
    r.poll();
    assert_eq!((r.done(), r.in_flight()), (5, 1), "only the fence of the next attempt");
    r.execute(|_| ());
    let word = r.nonce.get();
    assert_eq!(r.poll(), [LaneEvent::Fence { attempt: b, chunk: 0, word }]);
}

#[test]
fn a_fence_without_room_on_its_rail_does_not_delay_fences_on_another_rail() {
    let config = VerbsConfig { timeout: 18, queue_pairs: 1, depth: 16, signal_every: 1, ..VerbsConfig::default() };
    let mut r = Rig::new(2, config);
    let number = [0, 1].map(|n| r.devices[n].lock().unwrap().numbers()[0]);
    let word = r.nonce.get();
    // Chunks of two reads, one on each rail. The reads on the first rail are done, and other reads take their slots. Then the
    // reads on the second rail are done, and more fences are due than the first rail has slots.
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
    assert_eq!(r.devices[0].lock().unwrap().in_flight(), 16, "full, with fences among the requests");
    assert!(r.devices[1].lock().unwrap().in_flight() < chunks as usize, "not all fences are posted");
    let b = Attempt(2);
    r.lane.begin(b, Grant { slot: 3, nonce: r.nonce });
    assert_eq!(r.lane.post(b, &[read(250)]), 1);
    while !r.events.contains(&LaneEvent::Fence { attempt: b, chunk: 0, word }) {
        r.devices[1].lock().unwrap().complete(number[1], 100);
        r.poll();
        assert_eq!(r.lane.rails().count(), 2, "the fence waited until the first rail failed");
    }
}

#[test]
fn a_read_with_a_false_completion_is_read_again() {
    // The request reports or not, is the last of its queue or not; the failure is seen before the fence is posted or not.
    for (done_before, seen) in [(0, true), (3, true), (7, true), (7, false), (3, false)] {
        let mut r = Rig::new(2, VerbsConfig { queue_pairs: 1, depth: 32, signal_every: 4, ..VerbsConfig::default() });
        assert_eq!(r.post(A, 0..16), 16);
        let failing = r.devices[0].clone();
        let number = failing.lock().unwrap().numbers()[0];
        failing.lock().unwrap().complete(number, done_before);
        failing.lock().unwrap().complete_falsely(number);
        if seen {
            // A request of another attempt reveals that the queue pair is in ERR, while the other one still has reads of the chunk.
            let b = Attempt(2);
            r.lane.begin(b, Grant { slot: 3, nonce: r.nonce });
            r.post(b, 20..24);
            r.poll();
            assert_eq!(r.lane.rails().count(), 1);
        }
        assert_eq!(r.fence(), LaneEvent::Again { attempt: A, chunk: 0 }, "{done_before} {seen}");
        assert_eq!(r.post(A, 0..16), 16);
        r.execute(|_| ());
        r.poll();
        let word = r.nonce.get();
        assert_eq!(r.fence(), LaneEvent::Fence { attempt: A, chunk: 0, word });
        r.check(0..16);
    }
}

#[test]
fn a_word_that_was_not_written_does_not_count_as_revoked() {
    let mut r = Rig::new(2, VerbsConfig { queue_pairs: 1, depth: 32, signal_every: 4, ..VerbsConfig::default() });
    assert_eq!(r.post(A, 0..16), 16);
    r.execute(|_| ());
    r.poll();
    assert_eq!(r.in_flight(), 2, "its fence, on both queue pairs");
    let failing = r.devices[0].clone();
    let number = failing.lock().unwrap().numbers()[0];
    failing.lock().unwrap().complete_falsely(number);
    let limit = Instant::now() + Duration::from_secs(20);
    while !r.events.contains(&LaneEvent::Again { attempt: A, chunk: 0 }) {
        r.execute(|_| ());
        r.poll();
        assert!(Instant::now() < limit, "{:?}", r.events);
    }
    assert!(!r.events.iter().any(|e| matches!(e, LaneEvent::Fence { .. })));
    assert_eq!(r.post(A, 0..16), 16);
    r.execute(|_| ());
    r.poll();
    let word = r.nonce.get();
    assert_eq!(r.fence(), LaneEvent::Fence { attempt: A, chunk: 0, word });
}

#[test]
fn a_fence_is_posted_while_reads_use_every_slot_that_becomes_free() {
    let mut r = Rig::new(1, VerbsConfig { queue_pairs: 2, depth: 16, signal_every: 1, ..VerbsConfig::default() });
    // Both queue pairs carry the first chunk, and the second chunk fills them.
    assert_eq!(r.post(A, 0..4), 4);
    let of_the_second = |b| Read { chunk: 1, ..read(b) };
    let reads: Vec<Read> = (4..BLOCKS).map(of_the_second).collect();
    let mut next = r.lane.post(A, &reads);
    // It also takes the slots of the first chunk: on one queue pair before that chunk is done, on the other after it.
    for pair in 0..2 {
        let number = { r.device().numbers()[pair] };
        r.device().complete(number, 2);
        r.poll();
        next += r.lane.post(A, &reads[next..]);
    }
    assert!(next < reads.len(), "the queues are full");
    // A queue pair has room again only when the other one is full again.
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
