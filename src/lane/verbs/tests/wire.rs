//! The lane over soft-RoCE, with both ends in this process: wrong keys, and queue pairs that disappear.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kvferry_proto::{Attempt, Cause, Grant, Incarnation, Lane, LaneEvent, Limits, Nonce, PoolLayout, Read};
use kvferry_testkit::{
    rdma::{Loss, need_wires, objects, settled},
    reasons::reasons,
    rig::SOON,
};

use crate::{
    config::VerbsConfig,
    lane::{
        WakingLane,
        verbs::{Opening, Rails, Role, Server, VerbsTicket, lane::VerbsLane},
    },
    memory::{Export, FenceWords, Memory},
};

const BLOCK: u64 = 64 << 10;
const BLOCKS: u32 = 64;
const A: Attempt = Attempt(1);

struct Both {
    lane: VerbsLane,
    server: Server,
    rails: Arc<Rails>,
    memory: Memory,
    words: Arc<FenceWords>,
    nonce: Nonce,
}

fn both(twist: impl FnOnce(&mut VerbsTicket)) -> Both {
    both_with(&VerbsConfig::default(), twist)
}

/// With these settings of the reader.
fn both_with(reader: &VerbsConfig, twist: impl FnOnce(&mut VerbsTicket)) -> Both {
    let layout = Arc::new(PoolLayout::uniform(BLOCKS, 1, BLOCK, 16));
    let (here, there) = (Memory::alloc(&layout.segments).unwrap(), Memory::alloc(&layout.segments).unwrap());
    for b in 0..u64::from(BLOCKS) {
        there.write_from(0, b * BLOCK, &vec![b as u8 + 1; BLOCK as usize]).unwrap();
    }
    let words = Arc::new(FenceWords::new(16).unwrap());
    let nonce = Nonce::random();
    words.set(5, nonce);
    let export = Export::new(layout.clone(), there, words.clone());
    let on = |rail: &str, of: &VerbsConfig| VerbsConfig { rails: vec![rail.into()], ..of.clone() };
    let incarnation = Incarnation::random();
    let served = on("rxb1", &VerbsConfig::default());
    let server = Server::start(&export, incarnation, &served, &Limits::default()).unwrap();
    let rails = Rails::open(&on("rxa1", reader), here.clone(), Role::Reader).unwrap();
    let until = Instant::now() + SOON;
    let (opening, mut ticket) = loop {
        let made = Opening::new(&rails, None).and_then(|o| Ok((server.admit(1, o.request())?, o)));
        match made {
            Ok((ticket, opening)) => break (opening, ticket),
            Err(e) => assert!(Instant::now() < until, "{e}"),
        }
        std::thread::yield_now();
    };
    twist(&mut ticket);
    let mut lane = opening.finish(&ticket, layout, incarnation).unwrap();
    lane.begin(A, Grant { slot: 5, nonce });
    Both { lane, server, rails, memory: here, words, nonce }
}

fn reads(blocks: std::ops::Range<u64>) -> Vec<Read> {
    let read = |b: u64| Read {
        src_offset: b * BLOCK,
        dst_offset: (u64::from(BLOCKS) - 1 - b) * BLOCK,
        len: BLOCK,
        piece: BLOCK,
        within: 0,
        chunk: 0,
        position: b as u32,
        blocks: 1,
        group: kvferry_proto::GroupId(0),
        region: 0,
        src_segment: 0,
        dst_segment: 0,
    };
    blocks.map(read).collect()
}

/// Polls, asleep in between, until an event satisfies `f`.
fn until(lane: &mut VerbsLane, events: &mut Vec<LaneEvent>, f: impl Fn(&[LaneEvent]) -> bool) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let limit = Instant::now() + SOON;
    while !f(events) {
        assert!(Instant::now() < limit, "{events:?}");
        lane.poll(events);
        if let Ok(Some(fd)) = lane.arm() {
            let _ = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&Timespec { tv_sec: 1, tv_nsec: 0 }));
        }
    }
}

fn done(events: &[LaneEvent]) -> u32 {
    events.iter().map(|e| if let LaneEvent::Done { reads, .. } = e { *reads } else { 0 }).sum()
}

fn down(events: &[LaneEvent]) -> bool {
    events.iter().any(|e| matches!(e, LaneEvent::Down { .. }))
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn reads_arrive_and_the_fence_shows_a_revoked_offer() {
    need_wires(1);
    let before = objects();
    let mut b = both(|_| ());
    let mut events = Vec::new();
    assert_eq!(b.lane.post(A, &reads(0..u64::from(BLOCKS))), BLOCKS as usize);
    until(&mut b.lane, &mut events, |e| done(e) == BLOCKS);
    for block in 0..u64::from(BLOCKS) {
        let mut got = vec![0; BLOCK as usize];
        b.memory.read_into(0, (u64::from(BLOCKS) - 1 - block) * BLOCK, &mut got).unwrap();
        assert!(got.iter().all(|&x| x == block as u8 + 1), "block {block}");
    }
    let word = b.nonce.get();
    until(&mut b.lane, &mut events, |e| e.contains(&LaneEvent::Fence { attempt: A, chunk: 0, word }));
    b.words.clear(5);
    assert_eq!(b.lane.post(A, &reads(0..1)), 1);
    until(&mut b.lane, &mut events, |e| e.contains(&LaneEvent::Fence { attempt: A, chunk: 0, word: 0 }));
    b.lane.stop(A);
    until(&mut b.lane, &mut events, |e| e.contains(&LaneEvent::Quiet { attempt: A }));
    drop(b);
    settled(before);
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn wrong_keys_and_addresses_fail_the_lane() {
    need_wires(1);
    let before = objects();
    let twists: [fn(&mut VerbsTicket); 3] = [
        |t| t.rails[0].segments[0].rkey ^= 0x55,
        |t| t.rails[0].segments[0].address += u64::from(BLOCKS) * BLOCK,
        |t| t.rails[0].segments[0].address -= BLOCK,
    ];
    for twist in twists {
        let mut b = both(twist);
        let mut events = Vec::new();
        let started = Instant::now();
        assert_eq!(b.lane.post(A, &reads(0..u64::from(BLOCKS))), BLOCKS as usize);
        until(&mut b.lane, &mut events, down);
        println!("down {:?} after {:?}", events.last(), started.elapsed());
        assert!(events.contains(&LaneEvent::Failed { attempt: A, cause: Cause::LaneFailed }), "{events:?}");
        assert_eq!(events.iter().filter(|e| matches!(e, LaneEvent::Quiet { .. })).count(), 1);
    }
    settled(before);
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn a_peer_that_destroys_its_queue_pairs_is_noticed() {
    need_wires(1);
    let before = objects();
    let mut b = both(|_| ());
    let mut events = Vec::new();
    assert_eq!(b.lane.post(A, &reads(0..8)), 8);
    until(&mut b.lane, &mut events, |e| done(e) == 8);
    b.server.dismiss(1);
    let served = Instant::now() + SOON;
    while objects().qp > before.qp + 2 {
        assert!(Instant::now() < served);
    }
    let started = Instant::now();
    assert_eq!(b.lane.post(A, &reads(8..40)), 32);
    until(&mut b.lane, &mut events, down);
    println!("noticed after {:?}: {:?}", started.elapsed(), events.last());
    assert!(events.contains(&LaneEvent::Failed { attempt: A, cause: Cause::Unreachable }), "{events:?}");
    assert_eq!(done(&events), 8);
    drop(b);
    settled(before);
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn a_peer_that_deregisters_its_memory_is_noticed() {
    need_wires(1);
    let before = objects();
    let mut b = both(|_| ());
    let with_both = objects();
    let mut events = Vec::new();
    assert_eq!(b.lane.post(A, &reads(0..8)), 8);
    until(&mut b.lane, &mut events, |e| done(e) == 8);
    b.server.rails().withdraw();
    let now = objects();
    assert_eq!((now.qp, with_both.mr - now.mr), (with_both.qp, 2), "the pool and the fence table, and no queue pair");
    let started = Instant::now();
    assert_eq!(b.lane.post(A, &reads(8..40)), 32);
    until(&mut b.lane, &mut events, down);
    println!("noticed after {:?}: {:?}", started.elapsed(), events.last());
    assert!(events.contains(&LaneEvent::Failed { attempt: A, cause: Cause::LaneFailed }), "{events:?}");
    assert_eq!(done(&events), 8);
    let refused = Opening::new(&b.rails, None).and_then(|o| b.server.admit(2, o.request()));
    assert!(refused.unwrap_err().to_string().contains("withdrawn"));
    drop(b);
    settled(before);
}

/// A lane does not rely on its transport. The configuration refuses these settings, but a transport that reports nothing is
/// normal.
#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn a_lane_gives_up_a_transport_that_never_gives_up() {
    need_wires(1);
    let before = objects();
    for (timeout, retry) in [(0, 3), (14, 7)] {
        let reader = VerbsConfig { timeout, retry, ..VerbsConfig::default() };
        let mut b = both_with(&reader, |_| ());
        let mut events = Vec::new();
        assert_eq!(b.lane.post(A, &reads(0..8)), 8);
        until(&mut b.lane, &mut events, |e| done(e) == 8);
        let lost = Loss::on("a1", 100);
        reasons();
        let started = Instant::now();
        assert_eq!(b.lane.post(A, &reads(8..40)), 32);
        until(&mut b.lane, &mut events, down);
        let (took, reasons) = (started.elapsed(), reasons());
        println!("timeout {timeout}, retry {retry}: down after {took:?}: {reasons:?}");
        assert!(reasons.len() == 1 && reasons[0].contains("no completion came"), "{reasons:?}");
        assert!(took >= reader.gives_up_after() * 2, "the transport has its time: {took:?}");
        assert!(events.contains(&LaneEvent::Failed { attempt: A, cause: Cause::Unreachable }), "{events:?}");
        assert_eq!(events.iter().filter(|e| matches!(e, LaneEvent::Quiet { .. })).count(), 1);
        assert_eq!(done(&events), 8);
        drop(lost);
        drop(b);
        settled(before);
    }
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn a_killed_lane_is_quiet_soon_and_nothing_is_written_afterwards() {
    need_wires(1);
    for _ in 0..5 {
        let mut b = both(|_| ());
        let mut events = Vec::new();
        assert_eq!(b.lane.post(A, &reads(0..u64::from(BLOCKS))), BLOCKS as usize);
        b.lane.kill();
        until(&mut b.lane, &mut events, down);
        assert_eq!(events.iter().filter(|e| matches!(e, LaneEvent::Quiet { .. })).count(), 1);
        for block in 0..u64::from(BLOCKS) {
            b.memory.write_from(0, block * BLOCK, &vec![0xAB; BLOCK as usize]).unwrap();
        }
        let later = Instant::now() + Duration::from_millis(300);
        while Instant::now() < later {
            std::thread::yield_now();
        }
        let mut got = vec![0; BLOCK as usize];
        for block in 0..u64::from(BLOCKS) {
            b.memory.read_into(0, block * BLOCK, &mut got).unwrap();
            assert!(got.iter().all(|&x| x == 0xAB), "never: block {block} was written after the lane was quiet");
        }
    }
}
