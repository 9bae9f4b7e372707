//! Several rails: degraded lanes, failed rails, and released devices.

use std::time::{Duration, Instant};

use kvferry_proto::{Lane, LaneEvent};

use super::rig::{A, BLOCK, BLOCKS, Rig};
use crate::config::VerbsConfig;

#[test]
fn a_producer_releases_a_failed_device_and_no_other() {
    let r = Rig::new(2, VerbsConfig { queue_pairs: 1, ..VerbsConfig::default() });
    let pairs = |at: usize| r.served[at].lock().unwrap().numbers().len();
    assert_eq!((pairs(0), pairs(1)), (1, 1));
    let rails = r.server.rails().usable(None).unwrap();
    rails.iter().find(|(rail, ..)| rail.name() == "served0:1").unwrap().0.state().mark_fatal();
    // No lane is requested, and no session ends.
    let limit = Instant::now() + Duration::from_secs(20);
    while pairs(0) > 0 {
        assert!(Instant::now() < limit, "its device could not be closed");
        std::thread::yield_now();
    }
    assert_eq!((pairs(1), r.server.lanes_served()), (1, 1));
}

#[test]
fn a_lane_that_lost_a_rail_is_degraded() {
    let config = VerbsConfig { queue_pairs: 1, ..VerbsConfig::default() };
    let mut r = Rig::new(2, config);
    assert!(!r.lane.degraded());
    assert_eq!(r.post(A, 0..8), 8);
    let number = r.device().numbers()[0];
    r.device().fail(number, 12);
    r.poll();
    assert!(r.lane.degraded());
    assert_eq!(r.lane.rails().collect::<Vec<_>>(), ["reader1:1"]);
    // A lane that is made while the rail is avoided lacks it too; a later lane has both.
    let new = r.another();
    assert!(new.degraded() && new.rails().count() == 1, "{:?}", new.rails().collect::<Vec<_>>());
    let limit = Instant::now() + Duration::from_secs(20);
    while r.another().degraded() {
        assert!(Instant::now() < limit);
        std::thread::yield_now();
    }
    assert_eq!(r.another().rails().count(), 2);
}

#[test]
fn a_lane_is_degraded_while_the_pool_of_another_rail_is_being_registered() {
    let r = Rig::new(2, VerbsConfig { queue_pairs: 1, ..VerbsConfig::default() });
    assert_eq!((r.another().degraded(), r.rails.progress().0), (false, 2 * BLOCK * BLOCKS));
    for rails in [&r.rails, r.server.rails()] {
        let usable = rails.usable(None).unwrap();
        let slow = &usable[1].0;
        let pool = rails.not_yet(slow);
        assert!(r.another().degraded(), "a better lane will be available soon");
        slow.put_pool(pool);
        assert!(!r.another().degraded());
    }
}

#[test]
fn reads_that_one_rail_lost_go_over_the_other_once_the_first_is_quiet() {
    let config = VerbsConfig { queue_pairs: 1, depth: 32, signal_every: 8, ..VerbsConfig::default() };
    let mut r = Rig::new(2, config);
    assert_eq!(r.post(A, 0..40), 40);
    let (lost, other) = (r.devices[0].clone(), r.devices[1].clone());
    assert_eq!((lost.lock().unwrap().in_flight(), other.lock().unwrap().in_flight()), (20, 20));
    {
        let mut d = lost.lock().unwrap();
        let n = d.numbers()[0];
        d.complete(n, 5);
        // Only the failing request completes: the flush comes later.
        d.no_flush = true;
        let rest = d.pairs.get_mut(&n).unwrap().ops.split_off(1);
        d.fail(n, 12);
        d.pairs.get_mut(&n).unwrap().ops = rest;
    }
    r.poll();
    assert_eq!(other.lock().unwrap().in_flight(), 20, "no read moves while the failed rail may still write");
    let limit = Instant::now() + Duration::from_secs(20);
    while other.lock().unwrap().in_flight() == 20 {
        r.poll();
        assert!(Instant::now() < limit, "{:?}", r.events);
    }
    assert_eq!(lost.lock().unwrap().destroyed, 1, "it did not flush, so it was destroyed");
    while r.done() < 40 {
        let mut d = other.lock().unwrap();
        for n in d.numbers() {
            d.complete(n, 100);
        }
        drop(d);
        r.poll();
        assert!(Instant::now() < limit, "{:?}", r.events);
    }
    r.check(0..40);
    assert_eq!(r.lane.rails().collect::<Vec<_>>(), ["reader1:1"]);
    // Five of the chunk's reads were carried by the failed rail.
    assert_eq!(r.fence(), LaneEvent::Again { attempt: A, chunk: 0 });
    let mut from = 0;
    while from < 40 {
        from += r.post(A, from..40) as u64;
        r.execute(|_| ());
        r.poll();
    }
    let word = r.nonce.get();
    assert_eq!(r.fence(), LaneEvent::Fence { attempt: A, chunk: 0, word });
    assert!(!r.events.iter().any(|e| matches!(e, LaneEvent::Failed { .. } | LaneEvent::Down { .. })));
}

#[test]
fn a_dismissed_lane_has_no_queue_pairs() {
    let r = Rig::simple();
    assert_eq!(r.server.lanes_served(), 1);
    r.server.dismiss(9);
    r.server.dismiss(9);
    assert_eq!(r.server.lanes_served(), 0);
}
