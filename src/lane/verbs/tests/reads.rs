//! Reads: their order, their bounds, and failures of requests and devices.

use std::time::{Duration, Instant};

use kvferry_proto::{Attempt, Cause, Grant, Lane, LaneEvent, Read};

use super::rig::{A, BLOCK, BLOCKS, Rig, read};
use crate::config::VerbsConfig;

#[test]
fn blocks_and_the_fence_word_land_where_they_belong() {
    let mut r = Rig::new(2, VerbsConfig { queue_pairs: 3, depth: 32, ..VerbsConfig::default() });
    assert_eq!(r.post(A, 0..90), 90);
    assert_eq!(
        r.devices.iter().map(|d| d.lock().unwrap().in_flight()).sum::<usize>(),
        90,
        "spread over all queue pairs"
    );
    r.execute(|_| ());
    r.poll();
    assert_eq!(r.done(), 90);
    r.check(0..90);
    let word = r.nonce.get();
    assert_eq!(r.fence(), LaneEvent::Fence { attempt: A, chunk: 0, word });
    r.words.clear(3);
    assert_eq!(r.post(A, 0..90), 90);
    r.execute(|_| ());
    r.poll();
    assert_eq!(r.fence(), LaneEvent::Fence { attempt: A, chunk: 0, word: 0 });
    r.lane.stop(A);
    assert_eq!(r.poll(), [LaneEvent::Quiet { attempt: A }]);
}

#[test]
fn a_lane_whose_only_device_refuses_requests_goes_down_with_nothing_in_flight() {
    for at in [0, 1, 7] {
        let mut r = Rig::simple();
        r.device().refuse = Some((at, libc::EINVAL));
        assert_eq!(r.post(A, 0..8), 8);
        r.until(|e| matches!(e, LaneEvent::Down { .. }));
        assert_eq!(r.quiet(), 1);
        assert_eq!(r.done(), 0);
        assert!(r.events.contains(&LaneEvent::Failed { attempt: A, cause: Cause::LaneFailed }));
    }
}

#[test]
fn malformed_completions_among_flushed_ones_fail_no_other_request() {
    for undefined in [0, u32::MAX, 0xdead_beef] {
        for good in 0..14 {
            let mut r = Rig::simple();
            r.device().undefined = undefined;
            assert_eq!(r.post(A, 0..14), 14);
            let n = r.device().numbers()[0];
            // Completions of no request: other ids and other queue pairs, some of them failures.
            for (id, number) in [(u64::MAX, n), (1 << 56, n), (16, n), (3, n + 1), (u64::from(undefined), n + 7)] {
                r.device().forge(id, undefined & 7, number);
            }
            r.device().complete(n, good);
            r.device().fail(n, 12);
            r.until(|e| matches!(e, LaneEvent::Down { .. }));
            assert_eq!(r.done() as usize, good, "requests before the failure succeeded without a report of their own");
            assert!(r.events.contains(&LaneEvent::Failed { attempt: A, cause: Cause::Unreachable }));
            assert_eq!(r.events.iter().filter(|e| matches!(e, LaneEvent::Failed { .. })).count(), 1);
            assert_eq!(r.quiet(), 1);
            r.check(0..good as u64);
        }
    }
}

#[test]
fn queue_pairs_may_complete_in_any_order() {
    for turn in [|_: &mut Vec<u32>| (), |n: &mut Vec<u32>| n.reverse(), |n: &mut Vec<u32>| n.rotate_left(2)] {
        let mut r = Rig::new(1, VerbsConfig { queue_pairs: 4, depth: 8, signal_every: 3, ..VerbsConfig::default() });
        let mut from = 0;
        while from < 200 {
            from += r.post(A, from..200) as u64;
            r.execute(turn);
            r.poll();
        }
        r.execute(turn);
        r.poll();
        assert_eq!(r.done(), 200);
        r.check(0..200);
    }
}

#[test]
fn a_device_that_loses_requests_takes_its_lane_down() {
    let mut r = Rig::new(1, VerbsConfig { timeout: 1, retry: 0, ..VerbsConfig::default() });
    assert_eq!(r.post(A, 0..8), 8);
    r.until(|e| matches!(e, LaneEvent::Down { cause: Cause::Unreachable }));
    assert_eq!(r.quiet(), 1);
}

#[test]
fn a_stuck_queue_pair_is_noticed_while_its_neighbour_goes_on() {
    let mut r = Rig::new(1, VerbsConfig { queue_pairs: 2, timeout: 1, retry: 0, ..VerbsConfig::default() });
    assert_eq!(r.post(A, 0..8), 8);
    let goes_on = r.device().numbers()[0];
    let limit = Instant::now() + Duration::from_secs(20);
    let mut down = None;
    while down.is_none() {
        down = r.poll().into_iter().find(|e| matches!(e, LaneEvent::Down { .. }));
        r.device().complete(goes_on, 100);
        r.post(A, 8..9);
        assert!(Instant::now() < limit, "{} reads are done", r.done());
        std::thread::yield_now();
    }
    assert_eq!(down, Some(LaneEvent::Down { cause: Cause::Unreachable }));
    assert!(r.done() > 8, "the other queue pair did go on");
    assert_eq!(r.quiet(), 1);
}

#[test]
fn a_read_outside_its_memory_fails_its_attempt_and_is_never_posted() {
    let bad: [fn(&mut Read); 6] = [
        |r| r.src_offset = BLOCK * BLOCKS,
        |r| r.src_offset = u64::MAX,
        |r| r.dst_offset = u64::MAX - 3,
        |r| r.len = 0,
        |r| r.src_segment = 1,
        |r| r.dst_segment = 1,
    ];
    for f in bad {
        let mut r = Rig::simple();
        let mut read = read(1);
        f(&mut read);
        assert_eq!(r.lane.post(A, &[read]), 1);
        assert_eq!(r.poll(), [LaneEvent::Failed { attempt: A, cause: Cause::BadOffer }]);
        assert_eq!(r.device().in_flight(), 0);
        r.lane.stop(A);
        assert_eq!(r.poll(), [LaneEvent::Quiet { attempt: A }]);
    }
    // A fence word beyond the table.
    let mut r = Rig::simple();
    let b = Attempt(2);
    r.lane.begin(b, Grant { slot: 8, nonce: r.nonce });
    assert_eq!(r.post(b, 0..4), 4);
    assert_eq!(r.poll(), [LaneEvent::Failed { attempt: b, cause: Cause::BadOffer }]);
    assert_eq!(r.device().in_flight(), 0);
    r.lane.stop(b);
    assert_eq!(r.poll(), [LaneEvent::Quiet { attempt: b }]);
}

#[test]
fn reads_that_a_device_refuses_fail_its_rail_and_are_done_once_over_another() {
    for at in [0, 1, 6] {
        let mut r = Rig::new(2, VerbsConfig { queue_pairs: 1, depth: 16, signal_every: 4, ..VerbsConfig::default() });
        r.device().refuse = Some((at, libc::ENOMEM));
        assert_eq!(r.post(A, 0..14), 14, "accepted, whatever the device does with them");
        assert_eq!(r.lane.rails().collect::<Vec<_>>(), ["reader1:1"]);
        // Which requests the device took is not known: they are posted again only when it cannot write any more.
        let limit = Instant::now() + Duration::from_secs(20);
        while r.done() < 14 {
            let mut other = r.devices[1].lock().unwrap();
            let number = other.numbers()[0];
            other.complete(number, 100);
            drop(other);
            r.poll();
            assert!(Instant::now() < limit, "refused at {at}: {:?}", r.events);
        }
        r.check(0..14);
        let word = r.nonce.get();
        assert_eq!(r.fence(), LaneEvent::Fence { attempt: A, chunk: 0, word });
        r.lane.stop(A);
        r.poll();
        assert_eq!(r.quiet(), 1);
    }
}
