//! Good peers on good and bad days.

use kvferry_proto::{Cause, Group, GroupKind, Lane, LaneEvent, Limits, PoolLayout, Read, Region};

use super::rig::*;
use crate::{
    config::TcpConfig,
    lane::{WakingLane, tcp::Server},
    memory::Memory,
};

/// Regions of different sizes, with and without gaps between blocks, in two segments.
fn uneven() -> PoolLayout {
    let region = |name: &str, segment, offset, block_bytes, stride| Region {
        name: name.into(),
        segment,
        offset,
        block_bytes,
        stride,
    };
    let regions = vec![
        region("dense", 0, 0, 1000, 1000),
        region("gaps", 0, 64_000, 500, 777),
        region("big", 1, 123, 70_000, 70_000),
    ];
    let layout = PoolLayout {
        segments: vec![120_000, 5_000_000],
        groups: vec![Group {
            id: kvferry_proto::GroupId(0),
            kind: GroupKind::Full,
            block_tokens: 16,
            blocks: 64,
            regions,
        }],
    };
    layout.check().unwrap();
    layout
}

/// A pool whose 48 MiB are more than socket buffers hold: a transfer without a receiver stops in the middle.
fn large() -> PoolLayout {
    PoolLayout::uniform(48, 1, 1 << 20, 16)
}

fn all(n: u32) -> Vec<Option<u32>> {
    (0..n).map(Some).collect()
}

fn roomy() -> TcpConfig {
    TcpConfig { window: 1 << 30, ..TcpConfig::default() }
}

/// The chunk's reads, of 1 MiB at most.
fn all_reads(plan: &kvferry_proto::Plan, chunk: u32) -> Vec<Read> {
    let mut reads = Vec::new();
    plan.reads(chunk, 0, 1 << 20, &mut reads);
    reads
}

#[test]
pub(super) fn every_byte_lands_where_it_was_wanted_and_nowhere_else() {
    let rig = Rig::new(uneven());
    let src = [Some(9), Some(10), Some(11), None, Some(2), Some(60), Some(63), Some(0), Some(1), Some(33)];
    let dst = [Some(20), Some(21), Some(22), Some(23), Some(5), Some(4), None, Some(62), Some(63), Some(0)];
    let (grant, offer) = rig.offer(3, &src);
    let pairs: Vec<_> = src.iter().zip(dst).filter_map(|(s, d)| Some(((*s)?, d?))).collect();
    for (connections, window, chunk, max_read) in
        [(1, 8 << 20, 1 << 20, 8 << 20), (1, 1, 1, 999), (3, 100_000, 150_000, 30_000), (2, 1 << 30, 1, 7)]
    {
        let plan = rig.plan(&offer, &dst, chunk);
        let (mut lane, memory) = rig.lane(&TcpConfig { connections, window, checksum: window != 1 });
        let a = attempt();
        let events = pull(&mut lane, a, grant, &plan, max_read);
        check(&rig.export.layout, &memory, &pairs, 0);
        let fences = fences(&events, a);
        assert_eq!(fences.len(), plan.chunks().len());
        for (chunk, word) in fences {
            assert_eq!(word, grant.nonce.get());
            let mut reads = Vec::new();
            plan.reads(chunk, 0, max_read, &mut reads);
            let fence = LaneEvent::Fence { attempt: a, chunk, word };
            let at = events.iter().position(|e| *e == fence).unwrap();
            assert_eq!(done(&events[..at], a, chunk), reads.len() as u32, "all reads are done before the fence");
            assert_eq!(done(&events, a, chunk), reads.len() as u32);
        }
    }
}

#[test]
pub(super) fn a_fence_comes_after_all_reads_of_its_chunk_however_it_was_posted() {
    let rig = Rig::new(large());
    let (grant, offer) = rig.offer(1, &all(48));
    let plan = rig.plan(&offer, &all(48), 48 << 20);
    let (mut lane, _memory) = rig.lane(&TcpConfig { connections: 2, window: 47 << 20, ..TcpConfig::default() });
    let a = attempt();
    lane.begin(a, grant);
    let reads = all_reads(&plan, 0);
    // The last read is small next to the earlier ones: on a connection of its own it would overtake them.
    let mut posted = lane.post(a, &reads);
    assert_eq!(posted, 47, "the window cuts the chunk");
    let events = drive(&mut lane, |lane, events| {
        posted += lane.post(a, &reads[posted..]);
        !fences(events, a).is_empty()
    });
    assert_eq!(done(&events, a, 0), 48);
    assert_eq!(fences(&events, a), [(0, grant.nonce.get())]);
}

#[test]
pub(super) fn an_offer_revoked_in_the_middle_fails_its_fence_and_is_refused_from_then_on() {
    let rig = Rig::new(large());
    let (grant, offer) = rig.offer(1, &all(48));
    let plan = rig.plan(&offer, &all(48), 48 << 20);
    let (mut lane, _memory) = rig.lane(&roomy());
    let a = attempt();
    lane.begin(a, grant);
    assert_eq!(lane.post(a, &all_reads(&plan, 0)), 48);
    drive(&mut lane, |_, events| done(events, a, 0) > 0);
    rig.export.withdraw(1);
    // The engine reuses the blocks at once: bytes may change between their copy and their checksum, and are still stale.
    for _ in 0..4 {
        rig.export.memory.write_from(0, 0, &vec![0xee; 48 << 20]).unwrap();
    }
    let events = drive(&mut lane, |_, events| !fences(events, a).is_empty());
    assert_eq!(fences(&events, a), [(0, 0)]);
    let b = attempt();
    lane.begin(b, grant);
    assert_eq!(lane.post(b, &all_reads(&plan, 0)), 48);
    let events = drive(&mut lane, |_, events| !events.is_empty());
    assert_eq!(events, [LaneEvent::Failed { attempt: b, cause: Cause::Stale }]);
    assert_eq!(lane.post(b, &all_reads(&plan, 0)), 0, "a failed attempt posts no more");
    lane.stop(b);
    assert_eq!(drive(&mut lane, |_, events| !events.is_empty()), [LaneEvent::Quiet { attempt: b }]);
}

#[test]
pub(super) fn one_attempts_bad_request_leaves_the_others_alone() {
    let rig = Rig::new(uneven());
    let (grant, offer) = rig.offer(1, &all(8));
    let plan = rig.plan(&offer, &all(8), 100_000);
    let (mut lane, memory) = rig.lane(&roomy());
    let (a, bad) = (attempt(), attempt());
    lane.begin(bad, grant);
    let good = all_reads(&plan, 0);
    let past = Read { position: 8, ..good[0] };
    let of = |chunk, reads: &[Read]| reads.iter().map(|r| Read { chunk, ..*r }).collect::<Vec<_>>();
    // A good chunk, one past the offer, and a good one again: reads behind the refusal are not reported.
    assert_eq!(lane.post(bad, &good), good.len());
    assert_eq!(lane.post(bad, &of(1, &[past])), 1);
    assert_eq!(lane.post(bad, &of(2, &good)), good.len());
    let events = pull(&mut lane, a, grant, &plan, 1 << 20);
    let of_bad: Vec<_> = events.iter().filter(|e| matches!(e, LaneEvent::Failed { .. })).collect();
    assert_eq!(of_bad, [&LaneEvent::Failed { attempt: bad, cause: Cause::BadOffer }]);
    assert_eq!(done(&events, bad, 0), good.len() as u32, "only reads before the refusal");
    assert_eq!((done(&events, bad, 1), done(&events, bad, 2)), (0, 0));
    assert_eq!(fences(&events, bad), [(0, grant.nonce.get())]);
    check(&rig.export.layout, &memory, &(0..8).map(|b| (b, b)).collect::<Vec<_>>(), 0);
}

#[test]
pub(super) fn nothing_is_written_once_a_stopped_attempt_is_quiet() {
    let rig = Rig::new(large());
    let (grant, offer) = rig.offer(1, &all(48));
    let plan = rig.plan(&offer, &all(48), 24 << 20);
    let (mut lane, memory) = rig.lane(&roomy());
    let (a, b) = (attempt(), attempt());
    lane.begin(a, grant);
    assert_eq!(lane.post(a, &all_reads(&plan, 0)), 24);
    drive(&mut lane, |_, events| done(events, a, 0) > 0);
    lane.stop(a);
    let mut events = Vec::new();
    lane.poll(&mut events);
    assert_eq!(events[0], LaneEvent::Quiet { attempt: a }, "quiet at once");
    // The engine reuses the blocks while the rest of the chunk is still in flight.
    let mark = vec![0xee; 24 << 20];
    memory.write_from(0, 0, &mark).unwrap();
    lane.begin(b, grant);
    assert_eq!(lane.post(b, &all_reads(&plan, 1)), 24);
    events.extend(drive(&mut lane, |_, events| !fences(events, b).is_empty()));
    assert_eq!(fences(&events, b), [(1, grant.nonce.get())]);
    let mut got = vec![0; 24 << 20];
    memory.read_into(0, 0, &mut got).unwrap();
    assert!(got == mark, "a late write");
    memory.read_into(0, 24 << 20, &mut got).unwrap();
    assert!(got.iter().enumerate().all(|(i, &g)| g == pattern(0, (24 << 20) + i as u64)));
    let of_a = |e: &&LaneEvent| matches!(e, LaneEvent::Done { attempt, .. } | LaneEvent::Fence { attempt, .. } if *attempt == a);
    assert_eq!(events.iter().find(of_a), None, "nothing of an attempt after its quiet");
    assert_eq!(lane.post(a, &all_reads(&plan, 0)), 0);
}

#[test]
pub(super) fn blocks_that_arrived_before_the_producer_went_stay_loaded() {
    let rig = Rig::new(large());
    let (grant, offer) = rig.offer(1, &all(48));
    let plan = rig.plan(&offer, &all(48), 1 << 20);
    let (mut lane, memory) = rig.lane(&TcpConfig { connections: 2, ..roomy() });
    let (a, idle) = (attempt(), attempt());
    lane.begin(a, grant);
    lane.begin(idle, grant);
    for chunk in 0..48 {
        assert_eq!(lane.post(a, &all_reads(&plan, chunk)), 1);
    }
    let before = drive(&mut lane, |_, events| !fences(events, a).is_empty());
    drop(rig.server);
    let after = drive(&mut lane, |_, events| events.iter().any(|e| matches!(e, LaneEvent::Down { .. })));
    assert_eq!(
        after[after.len() - 4..],
        [
            LaneEvent::Failed { attempt: a, cause: Cause::LaneFailed },
            LaneEvent::Quiet { attempt: a },
            LaneEvent::Quiet { attempt: idle },
            LaneEvent::Down { cause: Cause::PeerDown },
        ]
    );
    let fenced: Vec<_> = fences(&before, a).into_iter().chain(fences(&after, a)).collect();
    assert!(!fenced.is_empty() && fenced.len() < 48);
    for (chunk, word) in fenced {
        assert_eq!(word, grant.nonce.get());
        let mut got = vec![0; 1 << 20];
        memory.read_into(0, u64::from(chunk) << 20, &mut got).unwrap();
        assert!(got.iter().enumerate().all(|(i, &g)| g == pattern(0, (u64::from(chunk) << 20) + i as u64)));
    }
    let mut events = Vec::new();
    lane.poll(&mut events);
    assert!(events.is_empty() && lane.arm().unwrap().is_none(), "nothing comes after the end");
    let late = attempt();
    lane.begin(late, grant);
    assert_eq!(lane.post(late, &all_reads(&plan, 0)), 0);
    lane.poll(&mut events);
    let failed = LaneEvent::Failed { attempt: late, cause: Cause::LaneFailed };
    assert_eq!(events, [failed, LaneEvent::Quiet { attempt: late }]);
}

#[test]
pub(super) fn a_killed_lane_is_quiet_and_down_at_once() {
    let rig = Rig::new(large());
    let (grant, offer) = rig.offer(1, &all(48));
    let plan = rig.plan(&offer, &all(48), 48 << 20);
    let (mut lane, _memory) = rig.lane(&roomy());
    let (a, b) = (attempt(), attempt());
    lane.begin(a, grant);
    lane.begin(b, grant);
    assert_eq!(lane.post(a, &all_reads(&plan, 0)), 48);
    drive(&mut lane, |_, events| done(events, a, 0) > 0);
    lane.kill();
    assert!(lane.arm().is_err(), "there are events");
    let mut events = Vec::new();
    lane.poll(&mut events);
    let quiet = |attempt| LaneEvent::Quiet { attempt };
    assert_eq!(events, [quiet(a), quiet(b), LaneEvent::Down { cause: Cause::LaneFailed }]);
    lane.kill();
    lane.stop(a);
    lane.poll(&mut events);
    assert_eq!(events.len(), 3);
}

#[test]
pub(super) fn the_window_takes_a_prefix_and_always_one_read() {
    let rig = Rig::new(large());
    let (grant, offer) = rig.offer(1, &all(48));
    let plan = rig.plan(&offer, &all(48), 48 << 20);
    for (window, first) in [(1, 1), (0, 1), (1 << 20, 1), ((1 << 20) + 1, 2), (5 << 20, 5)] {
        let (mut lane, _memory) = rig.lane(&TcpConfig { window, ..TcpConfig::default() });
        let a = attempt();
        lane.begin(a, grant);
        let reads = all_reads(&plan, 0);
        assert_eq!(lane.post(a, &reads), first, "window {window}");
        assert_eq!(lane.post(a, &reads[first..]), 0);
        drive(&mut lane, |_, events| done(events, a, 0) == first as u32);
        assert_eq!(lane.post(a, &reads[first..]), first);
    }
}

#[test]
pub(super) fn only_a_peer_with_the_key_of_this_incarnation_may_connect() {
    let rig = Rig::new(uneven());
    let memory = Memory::alloc(&[4096]).unwrap();
    let config = TcpConfig::default();
    let try_with = |key: &[u8; 32], incarnation| {
        connect(rig.server.addr(), key, incarnation, memory.clone(), &config).map(|_| ()).map_err(|e| e.to_string())
    };
    assert_eq!(try_with(&KEY, rig.incarnation), Ok(()));
    assert!(try_with(&[1; 32], rig.incarnation).unwrap_err().contains("does not know this lane"));
    assert!(try_with(&KEY, kvferry_proto::Incarnation::random()).unwrap_err().contains("does not know this lane"));
    let (mut lane, _) = rig.lane(&config);
    rig.server.dismiss(LANE);
    let events = drive(&mut lane, |_, events| !events.is_empty());
    assert_eq!(events, [LaneEvent::Down { cause: Cause::PeerDown }]);
    assert!(try_with(&KEY, rig.incarnation).unwrap_err().contains("does not know this lane"));
}

#[test]
pub(super) fn a_producer_at_its_limit_names_the_limit() {
    let rig = Rig::with(uneven(), |export, incarnation| {
        let mut limits = Limits::default();
        limits.lanes = 1;
        Server::start(ANY, export, incarnation, &limits, &TcpConfig::default(), identity()).unwrap()
    });
    let (_lane, memory) = rig.lane(&TcpConfig::default());
    let second = connect(rig.server.addr(), &KEY, rig.incarnation, memory, &TcpConfig::default());
    let e = second.map(|_| ()).unwrap_err().to_string();
    assert!(e.contains("limits.lanes"), "{e}");
}

#[test]
pub(super) fn a_consumer_that_does_not_receive_delays_no_other() {
    let rig = Rig::new(large());
    let (grant, offer) = rig.offer(1, &all(48));
    let plan = rig.plan(&offer, &all(48), 48 << 20);
    let (mut stuck, _memory) = rig.lane(&roomy());
    let (a, b) = (attempt(), attempt());
    stuck.begin(a, grant);
    assert_eq!(stuck.post(a, &all_reads(&plan, 0)), 48);
    drive(&mut stuck, |_, events| done(events, a, 0) > 0);
    let (mut lane, memory) = rig.lane(&roomy());
    pull(&mut lane, b, grant, &plan, 1 << 20);
    check(&rig.export.layout, &memory, &(0..48).map(|i| (i, i)).collect::<Vec<_>>(), 0);
}
