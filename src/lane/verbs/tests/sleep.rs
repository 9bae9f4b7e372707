//! Sleep of a lane's owner, and its wake-ups.

use std::time::{Duration, Instant};

use kvferry_proto::{Lane, LaneEvent};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::rig::{A, BLOCK, Rig};
use crate::{config::VerbsConfig, lane::WakingLane};

#[test]
fn an_idle_lane_sleeps_and_a_completion_wakes_it() {
    // Arms the lane, runs `event`, and tells whether that woke the owner.
    let woken = |r: &mut Rig, event: &dyn Fn(), ms: i64| {
        let fd = r.lane.arm().unwrap().unwrap();
        event();
        let mut fds = [PollFd::new(&fd, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: ms / 1000, tv_nsec: ms % 1000 * 1_000_000 })).unwrap() == 1
    };
    let mut r = Rig::new(1, VerbsConfig { spin: Duration::ZERO, queue_pairs: 1, depth: 16, ..VerbsConfig::default() });
    let device = r.devices[0].clone();
    let execute = || {
        let mut d = device.lock().unwrap();
        let n = d.numbers()[0];
        d.complete(n, 4);
    };
    assert!(!woken(&mut r, &|| (), 10));
    assert_eq!(r.post(A, 0..4), 4);
    assert!(!woken(&mut r, &|| (), 10));
    assert!(woken(&mut r, &execute, 1000));
    assert_eq!(r.poll(), [LaneEvent::Done { attempt: A, chunk: 0, reads: 4 }]);
    assert!(!woken(&mut r, &|| (), 10), "woken once, and the fence is in flight");
    // A completion from before the queue was armed.
    assert_eq!(r.post(A, 4..8), 4);
    r.execute(|_| ());
    assert_eq!(r.lane.arm().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    assert!(r.poll().contains(&LaneEvent::Done { attempt: A, chunk: 0, reads: 4 }));
}

#[test]
fn an_unused_lane_does_not_keep_its_owner_awake() {
    let readable = |r: &Rig, timeout: Option<&Timespec>| {
        let fd = r.lane.descriptor();
        poll(&mut [PollFd::new(&fd, PollFlags::IN)], timeout).unwrap() == 1
    };
    let config = VerbsConfig { spin: Duration::ZERO, queue_pairs: 1, depth: 16, ..VerbsConfig::default() };
    let mut r = Rig::new(1, config);
    assert_eq!(r.post(A, 0..4), 4);
    // Before a sleep it sets a timer, since the requests may be lost.
    assert!(r.lane.arm().unwrap().is_some());
    r.execute(|_| ());
    r.poll();
    r.lane.stop(A);
    r.execute(|_| ());
    assert_eq!(r.poll(), [LaneEvent::Quiet { attempt: A }]);
    // The timer expires while the lane is idle, and the lane is not armed again.
    assert!(readable(&r, None));
    r.poll();
    assert!(!readable(&r, Some(&Timespec::default())), "its owner would never sleep again");
}

#[test]
fn the_end_of_a_small_transfer_is_polled_for_a_limited_time_before_a_sleep() {
    const HOUR: Duration = Duration::from_secs(3600);
    // More blocks than a small transfer has, and one block.
    let much = (64 << 10) / BLOCK + 1;
    for (spin, blocks, looks) in [(HOUR, 1, true), (HOUR, much, false), (Duration::ZERO, 1, false)] {
        let config = VerbsConfig { spin, queue_pairs: 1, depth: 256, ..VerbsConfig::default() };
        let mut r = Rig::new(1, config);
        assert_eq!(r.post(A, 0..blocks), blocks as usize);
        assert_eq!(r.lane.arm().is_err(), looks, "{spin:?} {blocks}");
    }
    // If nothing completes it sleeps.
    let config = VerbsConfig { spin: Duration::from_millis(1), queue_pairs: 1, depth: 16, ..VerbsConfig::default() };
    let mut r = Rig::new(1, config);
    assert_eq!(r.post(A, 0..1), 1);
    let limit = Instant::now() + Duration::from_secs(20);
    while r.lane.arm().is_err() {
        assert!(Instant::now() < limit);
    }
}
