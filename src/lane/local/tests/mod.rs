//! The lane against producers in other processes, which run this test binary.

#[cfg(feature = "cuda")]
mod gpu;
mod rig;

use std::{
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use kvferry_proto::{Attempt, Cause, FenceSlot, Grant, Incarnation, Lane, LaneEvent, Limits, Nonce, PoolLayout, Read};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::FallocateFlags,
    io::Errno,
    mm::MprotectFlags,
    net::{RecvFlags, SendFlags, SocketAddrUnix},
    thread::{CapabilitySet, capabilities, set_capabilities},
};
use tokio::runtime::Handle;

use self::rig::*;
use super::{LocalLane, Server, connect::connect_host, socket, wire};
use crate::{
    config::LocalConfig,
    lane::{LaneError, WakingLane},
    memory::{Export, FenceWords, Mapping, Memory},
};

#[test]
fn every_byte_arrives_where_it_should_on_both_paths() {
    for kind in ["memfd", "raw"] {
        let p = Producer::start(kind);
        let memory = Memory::alloc(&[1 << 23, 9000]).unwrap();
        let mut lane = p.lane(&memory);
        assert_eq!(lane.mapped(), kind == "memfd");
        // Odd sizes, both segments on both sides, more reads than the window and longer ones than a poll.
        let mut reads = vec![Read::between(5, (0, 1), (0, 1), 3_000_000), Read::between(5, (1, 0), (1, 4000), 5000)];
        reads.extend(
            (0..3000u64).map(|i| Read::between(5, (0, i * 1234 % 3_700_000), (0, 3_000_010 + i * 1500), 1 + i % 1500)),
        );
        let events = pull(&mut lane, &reads);
        assert_eq!(done(&events, 5), 3002);
        assert_eq!(fence(&mut lane), word(p.nonce));
        for r in reads {
            let mut bytes = vec![0; r.len as usize];
            memory.read_into(r.dst_segment, r.dst_offset, &mut bytes).unwrap();
            let right = |(i, b): (usize, &u8)| *b == stamp(r.src_segment, r.src_offset + i as u64);
            assert!(bytes.iter().enumerate().all(right), "{kind} {r:?}");
        }
        let mut rest = [9; 10];
        memory.read_into(0, 3_000_001, &mut rest[..9]).unwrap();
        assert_eq!(rest, [0, 0, 0, 0, 0, 0, 0, 0, 0, 9], "nothing was written between the reads");
    }
}

#[test]
fn a_revoked_word_fails_the_fence_on_both_paths() {
    for kind in ["memfd", "raw"] {
        let mut p = Producer::start(kind);
        let memory = Memory::alloc(&[1 << 20]).unwrap();
        let mut lane = p.lane(&memory);
        assert_eq!(fence(&mut lane), word(p.nonce));
        p.tell("withdraw");
        pull(&mut lane, &[Read::between(5, (0, 0), (0, 0), 100)]);
        assert_eq!(fence(&mut lane), word(0), "{kind}");
        assert!(lane.post_fence(A, FenceSlot { chunk: 5, slot: 8 }));
        assert_eq!(drive(&mut lane, |e| !e.is_empty()), word(0), "{kind}: a slot past the table is never live");
    }
}

#[test]
fn a_killed_owner_fails_the_fence_though_its_memory_can_still_be_read() {
    let mut p = Producer::start("memfd");
    let memory = Memory::alloc(&[1 << 20]).unwrap();
    let mut lane = p.lane(&memory);
    lane.poll(&mut vec![]);
    p.kill();
    assert_eq!(lane.post(A, &[Read::between(5, (0, 0), (0, 0), 100)]), 1);
    let mut events = vec![];
    lane.poll(&mut events);
    assert_eq!(events, [LaneEvent::Done { attempt: A, chunk: 5, reads: 1 }], "the mapping outlives its owner");
    assert_eq!(fence(&mut lane), dead(Cause::PeerDown));
    assert!(lane.arm().unwrap().is_none());
}

#[test]
fn a_killed_owner_fails_reads_and_fences_of_its_address_space() {
    for fence_first in [true, false] {
        let mut p = Producer::start("raw");
        let memory = Memory::alloc(&[1 << 20]).unwrap();
        let mut lane = p.lane(&memory);
        lane.poll(&mut vec![]);
        p.kill();
        if fence_first {
            assert!(lane.post_fence(A, FenceSlot { chunk: 5, slot: SLOT }));
        }
        lane.post(A, &[Read::between(5, (0, 0), (0, 0), 100)]);
        assert_eq!(drive(&mut lane, |e| !e.is_empty()), dead(Cause::PeerDown));
        assert!(lane.arm().unwrap().is_none());
    }
}

#[test]
fn a_death_is_noticed_while_the_lane_sleeps() {
    for kind in ["memfd", "raw"] {
        let mut p = Producer::start(kind);
        let memory = Memory::alloc(&[1 << 20]).unwrap();
        let mut lane = p.lane(&memory);
        assert!(lane.arm().unwrap().is_some());
        p.kill();
        assert_eq!(drive(&mut lane, |e| !e.is_empty()), dead(Cause::PeerDown));
        assert!(lane.arm().unwrap().is_none());
        lane.begin(Attempt(8), Grant { slot: SLOT, nonce: Nonce::random() });
        let cause = Cause::PeerDown;
        let attempt = Attempt(8);
        assert_eq!(
            drive(&mut lane, |e| !e.is_empty()),
            [LaneEvent::Failed { attempt, cause }, LaneEvent::Quiet { attempt }],
            "a new attempt on a dead lane fails at once"
        );
    }
}

#[test]
fn a_death_is_noticed_by_a_lane_that_was_armed_before_its_last_work() {
    let mut p = Producer::start("memfd");
    let memory = Memory::alloc(&[1 << 20]).unwrap();
    let mut lane = p.lane(&memory);
    lane.arm().unwrap();
    pull(&mut lane, &[Read::between(0, (0, 0), (0, 0), 100)]);
    p.kill();
    // Its descriptor is in its owner's epoll set by now, and wakes the owner until the lane reports the death.
    let mut events = vec![];
    lane.poll(&mut events);
    assert!(events.contains(&LaneEvent::Down { cause: Cause::PeerDown }), "{events:?}");
}

#[test]
fn a_stopped_owner_still_serves_reads_and_fences() {
    for kind in ["memfd", "raw"] {
        let p = Producer::start(kind);
        let memory = Memory::alloc(&[1 << 20]).unwrap();
        let mut lane = p.lane(&memory);
        let pid = rustix::process::Pid::from_child(&p.child);
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::UNTRACED).unwrap().unwrap();
        pull(&mut lane, &[Read::between(5, (0, 0), (0, 0), 100)]);
        assert_eq!(fence(&mut lane), word(p.nonce));
        if kind == "raw" {
            let lane = dial(&p.name, 2, p.incarnation, &memory);
            assert!(matches!(lane, Err(LaneError::Silent { .. })), "but it opens no lane");
        }
    }
}

#[test]
fn without_permission_the_lane_is_refused_with_the_reason_unless_the_pool_is_shared() {
    let memory = Memory::alloc(&[1 << 20]).unwrap();
    let mut lane = Producer::start("undumpable memfd").lane(&memory);
    assert!(lane.mapped());
    lane.kill();
    let p = Producer::start("undumpable raw");
    // Root may read every process. Each thread has capabilities of its own, and `dial` works on the calling thread.
    let dialled = std::thread::scope(|s| {
        let dial = || {
            let mut own = capabilities(None).unwrap();
            own.effective.remove(CapabilitySet::SYS_PTRACE);
            set_capabilities(None, own).unwrap();
            dial(&p.name, 1, p.incarnation, &memory).map(drop)
        };
        s.spawn(dial).join().unwrap()
    });
    match dialled {
        Err(LaneError::Forbidden { why }) => assert!(why.contains("CAP_SYS_PTRACE"), "{why}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_dismissed_lane_ends_without_a_death() {
    let mut p = Producer::start("memfd");
    let memory = Memory::alloc(&[1 << 20]).unwrap();
    let mut lane = p.lane(&memory);
    p.tell("dismiss");
    assert_eq!(drive(&mut lane, |e| !e.is_empty()), dead(Cause::LaneFailed));
    assert!(matches!(dial(&p.name, 1, p.incarnation, &memory), Err(LaneError::Refused { .. })));
}

/// A producer inside this process, for tests without a death.
struct Inside {
    handle: Handle,
    _until: tokio::sync::oneshot::Sender<()>,
    server: Server,
    incarnation: Incarnation,
    memory: Memory,
}

fn inside(limits: &Limits) -> Inside {
    let (handle, _until) = background();
    let incarnation = Incarnation::random();
    let server = Server::start(export(true).0, incarnation, handle.clone(), &LocalConfig::default(), limits).unwrap();
    Inside { handle, _until, server, incarnation, memory: Memory::alloc(&[1 << 20]).unwrap() }
}

impl Inside {
    fn dial(&self, lane: u64, incarnation: Incarnation) -> Result<LocalLane, LaneError> {
        dial(&self.server.name(), lane, incarnation, &self.memory)
    }

    fn on_its_thread(&self, work: impl FnOnce() + Send + 'static) {
        let task = self.handle.spawn(async { work() });
        runtime().block_on(task).unwrap();
    }

    fn raw(&self) -> OwnedFd {
        let fd = socket::new().unwrap();
        let name = self.server.name();
        assert_eq!(name[0], 0);
        rustix::net::connect(&fd, &SocketAddrUnix::new_abstract_name(&name[1..]).unwrap()).unwrap();
        fd
    }
}

#[test]
fn only_an_admitted_lane_gets_in_and_only_once() {
    let p = inside(&Limits::default());
    let refused = |lane| match p.dial(lane, p.incarnation) {
        Err(LaneError::Refused { why }) => why,
        other => panic!("{other:?}"),
    };
    assert!(refused(4).contains("not admitted"));
    p.server.admit(4, KEY);
    p.server.dismiss(4);
    assert!(refused(4).contains("not admitted"));
    p.server.admit(5, KEY);
    assert!(matches!(p.dial(5, Incarnation::random()), Err(LaneError::Restarted)), "for another incarnation");
    let lane = p.dial(5, p.incarnation).unwrap();
    assert!(refused(5).contains("in use"));
    drop(lane);
    let why = loop {
        let why = refused(5);
        if !why.contains("in use") {
            break why;
        }
    };
    assert!(why.contains("not admitted"), "a lane is used once: {why}");
}

#[test]
fn dropping_the_server_ends_its_lanes() {
    let p = inside(&Limits::default());
    p.server.admit(1, KEY);
    let mut lane = p.dial(1, p.incarnation).unwrap();
    lane.begin(A, Grant { slot: SLOT, nonce: Nonce::random() });
    let name = p.server.name();
    drop(p.server);
    assert_eq!(drive(&mut lane, |e| !e.is_empty()), dead(Cause::LaneFailed));
    let start = Instant::now();
    let what = loop {
        match dial(&name, 1, p.incarnation, &p.memory) {
            Err(LaneError::Elsewhere { what }) => break what,
            // A process that another test starts holds a copy of the socket until its exec.
            Err(LaneError::Refused { .. } | LaneError::Silent { .. }) if start.elapsed() < LIMIT => {}
            other => panic!("{other:?}"),
        }
    };
    assert!(what.contains("one host"), "{what}");
}

/// Waits for the next packet; 0 when the other end has closed.
fn packet(fd: &OwnedFd, into: &mut [u8]) -> usize {
    poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&Timespec { tv_sec: 20, tv_nsec: 0 })).unwrap();
    match rustix::net::recv(fd, into, RecvFlags::DONTWAIT) {
        Ok((n, _)) => n,
        // Closed without having read our packets.
        Err(Errno::CONNRESET) => 0,
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn malformed_requests_and_silent_connections_are_closed_and_harm_no_other() {
    let mut limits = Limits::default();
    limits.lanes = 4;
    let p = inside(&limits);
    let mut answer = vec![0; wire::MAX_REPLY];
    let good = wire::Request { lane: 1, incarnation: p.incarnation.get(), key: KEY, gpu: None }.encode();
    let mut long = good.to_vec();
    long.push(0);
    for malformed in [&b"x"[..], &[0xff; 32], &good[..31], &long, &[0x55; 70_000]] {
        let fd = p.raw();
        rustix::net::send(&fd, malformed, SendFlags::NOSIGNAL).unwrap();
        let n = packet(&fd, &mut answer);
        assert!(matches!(wire::Reply::decode(&answer[..n]), Ok(wire::Reply::Refused { .. })), "{n}");
        assert_eq!(packet(&fd, &mut answer), 0, "and closed");
    }
    let silent: Vec<_> = (0..4).map(|_| p.raw()).collect();
    let over = p.raw();
    assert_eq!(packet(&over, &mut answer), 0, "over the limit");
    for fd in &silent {
        assert_eq!(packet(fd, &mut answer), 0, "half-open connections time out");
    }
    p.server.admit(1, KEY);
    let mut lane = p.dial(1, p.incarnation).unwrap();
    lane.begin(A, Grant { slot: SLOT, nonce: Nonce::random() });
    pull(&mut lane, &[Read::between(1, (0, 0), (0, 0), 4096)]);
}

#[test]
fn a_wrong_key_gets_no_lane_and_spoils_it_for_nobody() {
    let p = inside(&Limits::default());
    p.server.admit(1, KEY);
    let mut wrong = KEY;
    wrong[31] ^= 1;
    let name = p.server.name();
    let tried = runtime().block_on(connect_host(&name, (1, wrong), p.incarnation, layout(), p.memory.clone(), &[]));
    match tried {
        Err(LaneError::Refused { why }) => assert!(why.contains("the key"), "{why}"),
        other => panic!("{other:?}"),
    }
    assert!(p.dial(1, p.incarnation).is_ok(), "the rightful consumer still gets it");
}

#[test]
fn the_files_of_pool_and_fence_table_cannot_be_written_in_any_way() {
    let p = inside(&Limits::default());
    p.server.admit(1, KEY);
    let fd = p.raw();
    let request = wire::Request { lane: 1, incarnation: p.incarnation.get(), key: KEY, gpu: None };
    rustix::net::send(&fd, &request.encode(), SendFlags::NOSIGNAL).unwrap();
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], None).unwrap();
    let mut answer = vec![0; wire::MAX_REPLY];
    let files = socket::receive(fd.as_fd(), &mut answer).unwrap().files;
    assert_eq!(files.len(), layout().segments.len() + 1);
    for file in &files {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let again = std::fs::OpenOptions::new().read(true).write(true).open(path);
        let again = again.map(OwnedFd::from);
        for fd in std::iter::once(file).chain(&again) {
            assert!(rustix::io::pwrite(fd, b"x", 0).is_err(), "pwrite");
            assert!(Mapping::new(fd.as_fd(), 4096, true).is_err(), "a writable mapping");
            assert!(rustix::fs::ftruncate(fd, 0).is_err(), "truncation");
            assert!(
                rustix::fs::fallocate(fd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, 4096).is_err()
            );
            let read_only = Mapping::new(fd.as_fd(), 4096, false).expect("a mapping to read");
            // SAFETY: the range is the mapping's own; only its protection is asked to change.
            let raised = unsafe {
                rustix::mm::mprotect(read_only.base().as_ptr().cast(), 4096, MprotectFlags::READ | MprotectFlags::WRITE)
            };
            assert!(raised.is_err(), "a mapping that becomes writable");
        }
    }
}

#[test]
fn root_and_other_users_share_no_lane_unless_the_settings_list_them() {
    let here = rustix::process::geteuid().as_raw();
    let process = |uid| socket::Credentials { pid: 1, uid };
    assert!(process(here).may_share(&[]));
    for other in [0, 1, 65534, here + 1].into_iter().filter(|u| *u != here) {
        assert!(!process(other).may_share(&[]), "user {other}, this process is user {here}");
        assert!(process(other).may_share(&[7, other]));
    }
}

#[test]
fn a_consumer_that_sends_on_an_open_lane_loses_it() {
    let p = inside(&Limits::default());
    p.server.admit(1, KEY);
    let fd = p.raw();
    let request = wire::Request { lane: 1, incarnation: p.incarnation.get(), key: KEY, gpu: None };
    rustix::net::send(&fd, &request.encode(), SendFlags::NOSIGNAL).unwrap();
    let mut answer = vec![0; wire::MAX_REPLY];
    let n = packet(&fd, &mut answer);
    assert!(matches!(wire::Reply::decode(&answer[..n]), Ok(wire::Reply::Granted { files: true, .. })));
    rustix::net::send(&fd, b"and another thing", SendFlags::NOSIGNAL).unwrap();
    let n = packet(&fd, &mut answer);
    assert_eq!(&answer[..n], wire::BYE);
    assert_eq!(packet(&fd, &mut answer), 0);
}

#[test]
fn a_stopped_attempt_is_quiet_and_reports_no_more_events() {
    let p = inside(&Limits::default());
    p.server.admit(1, KEY);
    let mut lane = p.dial(1, p.incarnation).unwrap();
    let grant = Grant { slot: SLOT, nonce: Nonce::random() };
    let b = Attempt(8);
    lane.begin(A, grant);
    lane.begin(b, grant);
    assert_eq!(lane.post(A, &[Read::between(0, (0, 0), (0, 0), 50), Read::between(0, (0, 50), (0, 50), 50)]), 2);
    assert_eq!(lane.post(b, &[Read::between(9, (0, 0), (0, 200), 50)]), 1);
    assert!(lane.post_fence(A, FenceSlot { chunk: 0, slot: SLOT }));
    lane.stop(A);
    let mut events = vec![];
    lane.poll(&mut events);
    assert_eq!(events, [LaneEvent::Quiet { attempt: A }, LaneEvent::Done { attempt: b, chunk: 9, reads: 1 }]);
    let mut bytes = [1; 100];
    p.memory.read_into(0, 0, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 100], "queued reads are not copied");
    assert_eq!(lane.post(A, &[Read::between(0, (0, 0), (0, 0), 50)]), 1);
    lane.stop(A);
    lane.poll(&mut events);
    assert_eq!(events.len(), 2, "a quiet attempt stays quiet");
    lane.kill();
    lane.kill();
    lane.poll(&mut events);
    let cause = Cause::LaneFailed;
    assert_eq!(
        events[2..],
        [LaneEvent::Failed { attempt: b, cause }, LaneEvent::Down { cause }, LaneEvent::Quiet { attempt: b }]
    );
    assert!(lane.arm().unwrap().is_none());
}

#[test]
fn a_pool_with_more_segments_than_a_packet_has_files_is_read_without_files() {
    for (segments, mapped) in [(wire::MAX_FILES as u64 - 1, true), (wire::MAX_FILES as u64, false), (4096, false)] {
        let layout = Arc::new(PoolLayout { segments: vec![64; segments as usize], groups: vec![] });
        let last = segments as u16 - 1;
        let memory = if mapped { Memory::alloc(&layout.segments).unwrap() } else { pool(&layout, segments < 4096) };
        memory.write_from(last, 60, b"last").unwrap();
        let export = Arc::new(Export::new(layout.clone(), memory, Arc::new(FenceWords::new(8).unwrap())));
        let (handle, _until) = background();
        let incarnation = Incarnation::random();
        let server = Server::start(export, incarnation, handle, &LocalConfig::default(), &Limits::default()).unwrap();
        server.admit(1, KEY);
        let memory = Memory::alloc(&[64]).unwrap();
        let name = server.name();
        let mut lane =
            runtime().block_on(connect_host(&name, (1, KEY), incarnation, layout, memory.clone(), &[])).unwrap();
        assert_eq!(lane.mapped(), mapped);
        lane.begin(A, Grant { slot: SLOT, nonce: Nonce::random() });
        pull(&mut lane, &[Read::between(1, (last, 60), (0, 3), 4)]);
        let mut bytes = [0; 4];
        memory.read_into(0, 3, &mut bytes).unwrap();
        assert_eq!(&bytes, b"last");
    }
}

#[test]
fn a_read_outside_of_either_pool_fails_its_attempt_only() {
    let p = inside(&Limits::default());
    p.server.admit(1, KEY);
    let mut lane = p.dial(1, p.incarnation).unwrap();
    let grant = Grant { slot: SLOT, nonce: Nonce::random() };
    lane.begin(A, grant);
    let end = layout().segments[0];
    let bad = [
        Read::between(0, (0, end - 99), (0, 0), 100),
        Read::between(0, (2, 0), (0, 0), 1),
        Read::between(0, (0, u64::MAX), (0, 0), 100),
        Read::between(0, (0, 0), (0, (1 << 20) - 99), 100),
        Read::between(0, (0, 0), (1, 0), 1),
        Read::between(0, (0, 0), (0, u64::MAX), 100),
        Read::between(0, (0, 0), (0, 0), u64::MAX),
        Read::between(0, (0, 0), (0, 0), 0),
    ];
    for (i, bad) in bad.into_iter().enumerate() {
        let attempt = Attempt(100 + i as u64);
        lane.begin(attempt, grant);
        lane.post(attempt, &[Read::between(0, (0, 0), (0, 0), 100), bad]);
        let mut events = vec![];
        lane.poll(&mut events);
        assert_eq!(events, [LaneEvent::Failed { attempt, cause: Cause::BadOffer }], "{bad:?}");
        lane.stop(attempt);
        events.clear();
        lane.poll(&mut events);
        assert_eq!(events, [LaneEvent::Quiet { attempt }]);
    }
    pull(&mut lane, &[Read::between(1, (0, end - 100), (0, (1 << 20) - 100), 100)]);
}

#[test]
fn a_child_that_holds_the_socket_does_not_hide_its_parents_death() {
    let mut p = Producer::start("memfd");
    let memory = Memory::alloc(&[1 << 20]).unwrap();
    let mut lane = p.lane(&memory);
    p.tell("leave a child");
    p.kill();
    assert_eq!(fence(&mut lane), dead(Cause::PeerDown));
    assert!(rustix::net::recv(&lane.owner().socket, &mut [0; 8], RecvFlags::DONTWAIT) == Err(Errno::AGAIN));
}

/// Runs `work` on a thread of another user.
fn as_another_user<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let become_nobody = || {
        let nobody = rustix::process::Uid::from_raw(65534);
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
        work()
    };
    std::thread::scope(|s| s.spawn(become_nobody).join().unwrap())
}

#[test]
#[ignore = "needs root, to become another user"]
fn another_user_takes_no_place_of_this_ones_consumers() {
    let mut limits = Limits::default();
    limits.lanes = 4;
    let p = inside(&limits);
    p.server.admit(1, KEY);
    let strangers: Vec<_> = as_another_user(|| (0..50).map(|_| p.raw()).collect());
    let mut lane = p.dial(1, p.incarnation).unwrap();
    lane.begin(A, Grant { slot: SLOT, nonce: Nonce::random() });
    pull(&mut lane, &[Read::between(1, (0, 0), (0, 0), 4096)]);
    let mut answer = vec![0; wire::MAX_REPLY];
    for fd in &strangers {
        let n = packet(fd, &mut answer);
        assert!(matches!(wire::Reply::decode(&answer[..n]), Ok(wire::Reply::Refused { .. })), "{n}");
        assert_eq!(packet(fd, &mut answer), 0, "and closed");
    }
}

#[test]
#[ignore = "needs root, to become another user"]
fn another_user_hears_why_it_gets_no_lane_however_its_request_and_the_close_meet() {
    let p = inside(&Limits::default());
    p.server.admit(1, KEY);
    let here = [rustix::process::geteuid().as_raw()];
    let name = p.server.name();
    as_another_user(|| {
        for _ in 0..500 {
            let dialled = connect_host(&name, (1, KEY), p.incarnation, layout(), p.memory.clone(), &here);
            match runtime().block_on(dialled) {
                Err(LaneError::Refused { why }) => assert!(why.contains("local.uids"), "{why}"),
                other => panic!("{other:?}"),
            }
        }
    });
}

/// Counts the log lines of its thread.
struct Lines(Arc<AtomicU64>);

impl tracing::Subscriber for Lines {
    fn enabled(&self, m: &tracing::Metadata<'_>) -> bool {
        *m.level() <= tracing::Level::WARN
    }
    fn event(&self, _: &tracing::Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn refused_lanes_do_not_fill_the_log() {
    let start = Instant::now();
    let p = inside(&Limits::default());
    let lines = Arc::new(AtomicU64::new(0));
    let count = Lines(lines.clone());
    // On the thread that serves; the guard never leaves it.
    p.on_its_thread(move || std::mem::forget(tracing::subscriber::set_default(count)));
    let mut answer = vec![0; wire::MAX_REPLY];
    for _ in 0..300 {
        let fd = p.raw();
        rustix::net::send(&fd, b"x", SendFlags::NOSIGNAL).unwrap();
        let n = packet(&fd, &mut answer);
        assert!(matches!(wire::Reply::decode(&answer[..n]), Ok(wire::Reply::Refused { .. })), "{n}");
    }
    let lines = lines.load(Ordering::Relaxed);
    assert!((1..=1 + start.elapsed().as_secs()).contains(&lines), "{lines} lines");
}
