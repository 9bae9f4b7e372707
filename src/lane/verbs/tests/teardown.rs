//! Teardown of lanes, stage by stage.

use std::time::{Duration, Instant};

use kvferry_proto::{Attempt, Cause, Grant, Lane, LaneEvent};

use super::rig::{A, Rig};
use crate::lane::{
    WakingLane,
    verbs::teardown::{COUNTERS, ERR_BOUND},
};

#[test]
fn a_stopped_attempt_is_quiet_only_when_nothing_of_it_is_in_flight() {
    let mut r = Rig::simple();
    let b = Attempt(2);
    r.lane.begin(b, Grant { slot: 3, nonce: r.nonce });
    assert_eq!(r.post(A, 0..8), 8);
    assert_eq!(r.post(b, 8..12), 4);
    r.lane.stop(A);
    assert_eq!(r.post(A, 12..16), 4, "accepted, and forgotten");
    assert_eq!(r.device().in_flight(), 12);
    assert_eq!(r.poll(), []);
    let n = r.device().numbers()[0];
    r.device().complete(n, 7);
    assert_eq!(r.poll(), []);
    r.device().complete(n, 1);
    assert_eq!(r.poll(), [LaneEvent::Quiet { attempt: A }]);
    r.device().complete(n, 4);
    assert_eq!(r.poll(), [LaneEvent::Done { attempt: b, chunk: 0, reads: 4 }]);
}

#[test]
fn completions_that_come_after_the_end_change_nothing() {
    let mut r = Rig::simple();
    assert_eq!(r.post(A, 0..8), 8);
    let n = r.device().numbers()[0];
    let ids: Vec<u64> = r.device().pairs[&n].ops.iter().map(|o| o.wr_id).collect();
    r.lane.kill();
    // In the queue when the lane looks: flushed completions, then the same requests again, as successful.
    for &id in &ids {
        r.device().forge(id, 0, n);
    }
    r.until(|e| matches!(e, LaneEvent::Down { .. }));
    assert_eq!((r.done(), r.quiet()), (0, 1));
    let before = r.events.len();
    for _ in 0..10 {
        r.poll();
    }
    assert_eq!(r.events.len(), before);
    assert!(matches!(r.lane.arm(), Ok(None)));
}

#[test]
fn an_attempt_that_drains_by_itself_is_counted() {
    let mut r = Rig::simple();
    assert_eq!(r.post(A, 0..8), 8);
    let count = || COUNTERS.stages()[0];
    let before = count();
    r.lane.stop(A);
    r.poll();
    assert_eq!(r.quiet(), 0);
    r.execute(|_| ());
    r.until(|e| matches!(e, LaneEvent::Quiet { .. }));
    let after = count();
    assert!(after.0 == "drain" && after.1 > before.1 && after.2 > before.2);
}

#[test]
fn queue_pairs_that_do_not_flush_are_destroyed() {
    let mut r = Rig::simple();
    assert_eq!(r.post(A, 0..8), 8);
    r.device().no_flush = true;
    let count = || COUNTERS.stages().map(|(_, n, time)| (n, time));
    let before = count();
    r.lane.kill();
    assert_eq!(r.poll(), [LaneEvent::Failed { attempt: A, cause: Cause::LaneFailed }]);
    r.until(|e| matches!(e, LaneEvent::Quiet { .. }));
    assert_eq!(r.device().destroyed, 1);
    let after = count();
    assert!(after[2].0 > before[2].0, "destruction made it quiet");
    let drained = after[1].1.unwrap() - before[1].1.unwrap();
    assert!(drained >= ERR_BOUND, "after all of the time for draining: {drained:?}");
}

#[test]
fn queue_pairs_that_cannot_be_destroyed_close_their_device_or_wedge() {
    for close in [0, libc::EBUSY] {
        let mut r = Rig::simple();
        assert_eq!(r.post(A, 0..8), 8);
        {
            let mut d = r.device();
            (d.no_flush, d.destroy, d.close) = (true, libc::EBUSY, close);
        }
        r.lane.kill();
        if close == 0 {
            r.until(|e| matches!(e, LaneEvent::Quiet { .. }));
            assert_eq!(r.device().closed, 1);
        } else {
            r.until(|e| matches!(e, LaneEvent::Wedged));
            for _ in 0..10 {
                r.poll();
            }
            assert_eq!(r.quiet(), 0, "a lane that may write at any time is never quiet");
        }
    }
}

#[test]
fn a_removed_device_counts_as_destroyed() {
    let mut r = Rig::simple();
    assert_eq!(r.post(A, 0..8), 8);
    {
        let mut d = r.device();
        (d.no_flush, d.destroy) = (true, libc::EIO);
    }
    r.lane.kill();
    r.until(|e| matches!(e, LaneEvent::Quiet { .. }));
}

#[test]
fn a_lane_that_is_dropped_while_reading_is_torn_down() {
    let mut r = Rig::simple();
    assert_eq!(r.post(A, 0..8), 8);
    let device = r.devices[0].clone();
    let keep = (r.here.clone(), r.there.clone());
    drop(r);
    let limit = Instant::now() + Duration::from_secs(20);
    while device.lock().unwrap().destroyed == 0 {
        assert!(Instant::now() < limit);
        std::thread::yield_now();
    }
    drop(keep);
}
