//! When a lane lets its owner sleep, and what wakes it.

use std::time::{Duration, Instant};

use kvferry_proto::lane::{Lane, LaneEvent};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{A, BLOCK, Rig};
use crate::{config::VerbsConfig, lane::WakingLane};

#[test]
fn an_idle_lane_sleeps_and_a_completion_wakes_it() {
    // Arms the lane, lets something happen, and tells whether that woke it.
    let woken = |r: &mut Rig, what: &dyn Fn(), ms: i64| {
        let fd = r.lane.arm().unwrap().unwrap();
        what();
        let mut fds = [PollFd::new(&fd, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: ms / 1000, tv_nsec: ms % 1000 * 1_000_000 })).unwrap() == 1
    };
    let mut r = Rig::new(1, VerbsConfig { spin: Duration::ZERO, queue_pairs: 1, depth: 16, ..VerbsConfig::default() });
    let device = r.devices[0].clone();
    let carry_out = || {
        let mut d = device.lock().unwrap();
        let n = d.numbers()[0];
        d.complete(n, 4);
    };
    assert!(!woken(&mut r, &|| (), 10));
    assert_eq!(r.post(A, 0..4), 4);
    assert!(!woken(&mut r, &|| (), 10));
    assert!(woken(&mut r, &carry_out, 1000));
    assert_eq!(r.poll(), [LaneEvent::Done { attempt: A, chunk: 0, reads: 4 }]);
    assert!(!woken(&mut r, &|| (), 10), "woken once, and the fence is on its way");
    // One that came before the queue was armed.
    assert_eq!(r.post(A, 4..8), 4);
    r.carry_out(|_| ());
    assert_eq!(r.lane.arm().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    assert!(r.poll().contains(&LaneEvent::Done { attempt: A, chunk: 0, reads: 4 }));
}

#[test]
fn a_lane_that_nobody_uses_any_more_does_not_keep_its_owner_awake() {
    let readable = |r: &Rig, timeout: Option<&Timespec>| {
        let fd = r.lane.descriptor();
        poll(&mut [PollFd::new(&fd, PollFlags::IN)], timeout).unwrap() == 1
    };
    let config = VerbsConfig { spin: Duration::ZERO, queue_pairs: 1, depth: 16, ..VerbsConfig::default() };
    let mut r = Rig::new(1, config);
    assert_eq!(r.post(A, 0..4), 4);
    // It sleeps, and so sets a timer: the requests may be lost.
    assert!(r.lane.arm().unwrap().is_some());
    r.carry_out(|_| ());
    r.poll();
    r.lane.stop(A);
    r.carry_out(|_| ());
    assert_eq!(r.poll(), [LaneEvent::Quiet { attempt: A }]);
    // The timer goes off while the lane is idle, and nobody arms it again.
    assert!(readable(&r, None));
    r.poll();
    assert!(!readable(&r, Some(&Timespec::default())), "its owner would never sleep again");
}

#[test]
fn the_end_of_little_data_is_looked_for_before_sleeping_and_not_for_ever() {
    const HOUR: Duration = Duration::from_secs(3600);
    // Blocks that make up more than is looked for, and one that does not.
    let much = (64 << 10) / BLOCK + 1;
    for (spin, blocks, looks) in [(HOUR, 1, true), (HOUR, much, false), (Duration::ZERO, 1, false)] {
        let config = VerbsConfig { spin, queue_pairs: 1, depth: 256, ..VerbsConfig::default() };
        let mut r = Rig::new(1, config);
        assert_eq!(r.post(A, 0..blocks), blocks as usize);
        assert_eq!(r.lane.arm().is_err(), looks, "{spin:?} {blocks}");
    }
    // What does not come is slept for.
    let config = VerbsConfig { spin: Duration::from_millis(1), queue_pairs: 1, depth: 16, ..VerbsConfig::default() };
    let mut r = Rig::new(1, config);
    assert_eq!(r.post(A, 0..1), 1);
    let limit = Instant::now() + Duration::from_secs(20);
    while r.lane.arm().is_err() {
        assert!(Instant::now() < limit);
    }
}

#[test]
fn rails_of_a_lane_that_nobody_used_for_long_are_not_taken_for_stalled() {
    let mut r = Rig::new(3, VerbsConfig { queue_pairs: 1, depth: 16, ..VerbsConfig::default() });
    r.lane.slept_for(Duration::from_secs(3600));
    // One read goes out; the next is refused by its rail, which fails, and waits for a third one.
    assert_eq!(r.post(A, 0..1), 1);
    r.devices[1].lock().unwrap().refuse = Some((0, libc::EIO));
    assert_eq!(r.post(A, 1..2), 1);
    let events = r.poll();
    assert_eq!(r.lane.rails().count(), 2, "{events:?}");
}
