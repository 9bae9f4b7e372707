//! The ends of attempts, lanes, owners and GPUs while copies are in flight, and the memory that they leave.

use super::*;

#[test]
fn a_killed_owner_leaves_no_memory_behind_though_the_lane_is_idle() {
    with_driver(a_killed_owner_leaves_no_memory_behind_though_the_lane_is_idle, "", |_| {
        let memory = memory();
        let before = free(&memory);
        for kind in ["gpu handles", "gpu descriptors", "gpu both"] {
            let mut p = Producer::start(kind);
            let mut lane = connect(&p.name, 1, p.incarnation, &memory, LONG).unwrap();
            assert!(lane.arm().unwrap().is_some());
            assert!(free(&memory) < before);
            p.kill();
            assert_eq!(drive(&mut lane, |e| !e.is_empty()), [LaneEvent::Down { cause: Cause::PeerDown }]);
            wait_free(&memory, before);
            assert!(lane.arm().unwrap().is_none());
            lane.begin(A, grant(&p));
            let failed = LaneEvent::Failed { attempt: A, cause: Cause::PeerDown };
            assert_eq!(poll_once(&mut lane), [failed, quiet()], "a new attempt on a dead lane fails at once");
        }
    });
}

#[test]
fn a_killed_owner_leaves_no_memory_behind_once_its_copies_are_done() {
    with_driver(a_killed_owner_leaves_no_memory_behind_once_its_copies_are_done, "", |control| {
        let memory = memory();
        let before = free(&memory);
        for kind in ["gpu handles", "gpu descriptors"] {
            let mut p = Producer::start(kind);
            let mut lane = lane(&p, &memory, LONG);
            let held = free(&memory);
            control.hang(true);
            assert_eq!(lane.post(A, &[Read::between(5, (0, 0), (0, 0), 6 * MIB)]), 1);
            p.kill();
            let cause = Cause::PeerDown;
            let events = drive(&mut lane, |e| !e.is_empty());
            assert_eq!(events, [LaneEvent::Failed { attempt: A, cause }, LaneEvent::Down { cause }], "at once");
            let fd = lane.arm().unwrap().expect("it waits for the copies");
            assert_eq!(poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&NOW)), Ok(0), "and lets its owner sleep");
            assert_eq!(free(&memory), held, "the copies read this memory");
            control.hang(false);
            assert_eq!(drive(&mut lane, |e| !e.is_empty()), [quiet()], "and neither Done nor Fence");
            assert!(bytes(&memory, 0, 0, 6 << 20) == stamps(0, 0, 6 << 20), "the copies ran to their end");
            wait_free(&memory, before);
            assert!(lane.arm().unwrap().is_none());
        }
    });
}

#[test]
fn a_staged_lane_sleeps_while_its_copies_run_after_its_owners_death() {
    with_driver(a_staged_lane_sleeps_while_its_copies_run_after_its_owners_death, "", |control| {
        let mut p = Producer::start("memfd");
        let config = GpuConfig { copy_bound: LONG, ..GpuConfig::default() };
        let pool = memory();
        let ring = PinnedRing::new(&pool, &config).unwrap().unwrap();
        let inner = dial(&p.name, 1, p.incarnation, ring.memory()).unwrap();
        let mut lane = stage(&ring, Box::new(inner)).unwrap();
        lane.begin(A, grant(&p));
        control.hang(true);
        let before = control.counts().host_to_device;
        assert_eq!(lane.post(A, &[Read::between(5, (0, 0), (0, 0), 20_000)]), 1);
        let (start, mut events) = (Instant::now(), vec![]);
        while control.counts().host_to_device == before {
            lane.poll(&mut events);
            assert!(start.elapsed() < LIMIT, "no copy after {events:?}");
        }
        assert!(lane.arm().unwrap().is_some(), "it waits for the copies and for its owner");
        p.kill();
        drive(&mut lane, |e| e.iter().any(|e| matches!(e, LaneEvent::Down { .. })));
        let fd = lane.arm().unwrap().expect("it waits for the copies");
        assert_eq!(poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&NOW)), Ok(0), "and lets its thread sleep");
        control.hang(false);
        drive(&mut lane, |e| e.contains(&quiet()));
        assert!(lane.arm().unwrap().is_none());
    });
}

#[test]
fn a_dead_owners_fence_fails() {
    with_driver(a_dead_owners_fence_fails, "", |control| {
        let mut p = Producer::start("gpu handles");
        let memory = memory();
        let mut lane = lane(&p, &memory, LONG);
        let operations = control.counts().operations;
        assert_eq!(lane.post(A, &[Read::between(5, (0, 0), (0, 0), 100)]), 1);
        p.kill();
        wait_for(control, |c| c.operations > operations);
        let events = drive(&mut lane, |e| e.contains(&quiet()));
        assert!(!events.iter().any(|e| matches!(e, LaneEvent::Fence { .. })), "its word can still be read: {events:?}");
    });
}

#[test]
fn a_stopped_attempt_is_quiet_when_its_copies_are_done() {
    with_driver(a_stopped_attempt_is_quiet_when_its_copies_are_done, "", |control| {
        let p = Producer::start("gpu handles");
        let memory = memory();
        let mut lane = lane(&p, &memory, LONG);
        let b = Attempt(8);
        lane.begin(b, grant(&p));
        control.hang(true);
        for i in 0..4 {
            assert_eq!(lane.post(A, &[Read::between(i, (0, 0), (0, u64::from(i) * MIB), MIB)]), 1);
        }
        lane.stop(A);
        lane.stop(b);
        assert_eq!(poll_once(&mut lane), [LaneEvent::Quiet { attempt: b }], "the one without copies");
        lane.stop(A);
        assert_eq!(lane.post(A, &[Read::between(9, (0, 0), (0, 5 * MIB), MIB)]), 1);
        assert_eq!(poll_once(&mut lane), []);
        control.hang(false);
        assert_eq!(drive(&mut lane, |e| !e.is_empty()), [quiet()]);
        assert!(bytes(&memory, 0, 3 * MIB, 1 << 20) == stamps(0, 0, 1 << 20), "all four copies had ended by then");
        assert_eq!(bytes(&memory, 0, 5 * MIB, 100), [0; 100], "a stopped attempt posts no more");
        assert_eq!(poll_once(&mut lane), [], "once");
        lane.begin(A, grant(&p));
        assert_eq!(pull(&mut lane, &[Read::between(5, (0, 0), (0, 0), 100)]), pulled(1, p.nonce));
    });
}

#[test]
fn a_killed_lane_is_quiet_when_its_copies_are_done() {
    with_driver(a_killed_lane_is_quiet_when_its_copies_are_done, "", |control| {
        let p = Producer::start("gpu handles");
        let memory = memory();
        let mut lane = lane(&p, &memory, LONG);
        let b = Attempt(8);
        lane.begin(b, grant(&p));
        control.hang(true);
        assert_eq!(lane.post(A, &[Read::between(5, (0, 0), (0, 0), MIB)]), 1);
        lane.kill();
        lane.kill();
        let cause = Cause::LaneFailed;
        let [a, b] = [A, b].map(|attempt| LaneEvent::Failed { attempt, cause });
        let quiet_b = LaneEvent::Quiet { attempt: Attempt(8) };
        assert_eq!(poll_once(&mut lane), [a, b, LaneEvent::Down { cause }, quiet_b]);
        assert_eq!(control.counts().imports, 2, "the copies read this memory");
        control.hang(false);
        assert_eq!(drive(&mut lane, |e| !e.is_empty()), [quiet()]);
        wait_imports(control, 0);
    });
}

#[test]
fn a_dropped_lane_keeps_the_memory_of_its_copies() {
    with_driver(a_dropped_lane_keeps_the_memory_of_its_copies, "", |control| {
        let p = Producer::start("gpu handles");
        let local = memory();
        let gpu = gpu(&local);
        let mut lane = lane(&p, &local, LONG);
        control.hang(true);
        assert_eq!(lane.post(A, &[Read::between(5, (0, 0), (0, 0), MIB)]), 1);
        drop((lane, local));
        gpu.memory().unwrap();
        let counts = control.counts();
        assert_eq!((counts.imports, counts.physical), (2, 2), "both ends are still allocated");
        control.hang(false);
        wait_imports(control, 0);
        wait_for(control, |c| c.physical == 0);
        gpu.check().expect("no copy has met memory that was gone");
    });
}

#[test]
fn copies_that_hang_wedge_the_lane_within_its_bound() {
    with_driver(copies_that_hang_wedge_the_lane_within_its_bound, "", |control| {
        let bound = Duration::from_millis(300);
        // For a loaded machine.
        let slack = Duration::from_secs(5);
        for death in [false, true] {
            let mut p = Producer::start("gpu handles");
            let memory = memory();
            let mut lane = lane(&p, &memory, bound);
            assert_eq!(lane.caps().quiet_bound, bound + Duration::from_millis(5));
            control.hang(true);
            assert_eq!(lane.post(A, &[Read::between(5, (0, 0), (0, 0), MIB)]), 1);
            let start = Instant::now();
            if death {
                p.kill();
                let events = drive(&mut lane, |e| !e.is_empty());
                assert!(matches!(events[..], [LaneEvent::Failed { .. }, LaneEvent::Down { .. }]), "{events:?}");
            } else {
                lane.stop(A);
                assert_eq!(poll_once(&mut lane), []);
                lane.kill();
                assert_eq!(poll_once(&mut lane), [LaneEvent::Down { cause: Cause::LaneFailed }]);
            }
            assert_eq!(drive(&mut lane, |e| !e.is_empty()), [LaneEvent::Wedged]);
            assert!((bound..bound + slack).contains(&start.elapsed()), "{:?}", start.elapsed());
            assert!(lane.arm().unwrap().is_none());
            lane.kill();
            lane.stop(A);
            let imports = control.counts().imports;
            assert_ne!(imports, 0, "the copies may still run");
            control.hang(false);
            wait_imports(control, 0);
            assert_eq!(poll_once(&mut lane), [], "it is never quiet");
            assert!(lane.arm().unwrap().is_none());
        }
    });
}

#[test]
fn a_stopped_attempts_wait_counts_towards_the_bound() {
    with_driver(a_stopped_attempts_wait_counts_towards_the_bound, "", |control| {
        let p = Producer::start("gpu handles");
        let memory = memory();
        let mut lane = lane(&p, &memory, Duration::from_millis(1));
        control.hang(true);
        assert_eq!(lane.post(A, &[Read::between(5, (0, 0), (0, 0), MIB)]), 1);
        lane.stop(A);
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(2) {
            assert_eq!(poll_once(&mut lane), [], "it is wedged only after a kill");
        }
        lane.kill();
        assert_eq!(poll_once(&mut lane), [LaneEvent::Down { cause: Cause::LaneFailed }, LaneEvent::Wedged]);
        control.hang(false);
    });
}

#[test]
fn a_gpu_that_becomes_unusable_fails_every_attempt() {
    with_driver(a_gpu_that_becomes_unusable_fails_every_attempt, "", |control| {
        let p = Producer::start("gpu handles");
        let memory = memory();
        let mut lane = lane(&p, &memory, LONG);
        let b = Attempt(8);
        lane.begin(b, grant(&p));
        // CUDA_ERROR_ILLEGAL_ADDRESS.
        control.raise(0, 700, 0);
        assert_eq!(lane.post(A, &[Read::between(5, (0, 0), (0, 0), MIB)]), 1);
        let cause = Cause::LaneFailed;
        let mut events = drive(&mut lane, |e| e.len() >= 5);
        assert_eq!(events.remove(2), LaneEvent::Down { cause });
        let of = |attempt| [LaneEvent::Failed { attempt, cause }, LaneEvent::Quiet { attempt }];
        for e in of(A).into_iter().chain(of(b)) {
            assert!(events.contains(&e), "{e:?} is not in {events:?}");
        }
        assert!(lane.arm().unwrap().is_none());
    });
}

#[test]
fn a_dismissed_lane_gives_its_memory_up() {
    with_driver(a_dismissed_lane_gives_its_memory_up, "", |control| {
        let mut p = Producer::start("gpu handles");
        let memory = memory();
        let mut lane = lane(&p, &memory, LONG);
        p.tell("dismiss");
        assert_eq!(drive(&mut lane, |e| !e.is_empty()), dead(Cause::LaneFailed));
        wait_imports(control, 0);
    });
}
