//! GPUs that hang or fail, and servers that have nothing to do.

use kvferry_proto::{Cause, Lane, LaneEvent, PoolLayout};

use super::{
    super::{
        super::{handshake::Keyed, readahead::LAST_COPIES},
        bad_peers::{connect_raw, proven, rest},
    },
    *,
};
use crate::{
    config::TcpConfig,
    lane::tcp::Server,
    memory::{Export, FenceWords, Memory, gpu::PinnedRing},
};

/// Proves itself with this key; the verdict.
fn verdict(rig: &Rig, key: [u8; 32]) -> Verdict {
    let mut s = connect_raw(rig);
    let mut b = [0; Challenge::LEN];
    s.read_exact(&mut b).unwrap();
    let challenge = Challenge::decode(&b).unwrap();
    let (random, options, incarnation) = ([1; 32], Options::default(), rig.incarnation);
    let keyed = Keyed { key: &key, challenge: &challenge, options, random: &random, lane: LANE, incarnation };
    s.write_all(&Proof { lane: LANE, options, random, mac: keyed.consumer() }.encode()).unwrap();
    let mut b = [0; Answer::LEN];
    s.read_exact(&mut b).unwrap();
    Answer::decode(&b).unwrap().verdict
}

#[test]
fn while_copies_hang_the_server_accepts_and_refuses_and_sleeps() {
    with_driver(while_copies_hang_the_server_accepts_and_refuses_and_sleeps, "", |control| {
        from_gpu(small_ring(), || {
            let rig = Rig::new(PoolLayout::uniform(4, 1, MIB, 16));
            let (grant, gone) = (rig.offer(1, &[Some(0)]).0, rig.offer(2, &[Some(0)]).0);
            rig.export.withdraw(2);
            // A reply whose data is there, and one behind it whose data hangs.
            let first = proven(&rig);
            ask(&first, grant, KIB);
            assert_eq!(reply(&first, grant, KIB), grant.nonce.get());
            control.hang(true);
            let before = control.counts().device_to_host;
            // More connections than slots.
            let stuck: Vec<_> = (0..6).map(|_| proven(&rig)).collect();
            stuck.iter().for_each(|s| ask(s, grant, MIB));
            wait_for(control, |c| c.device_to_host - before >= 4);
            assert_eq!(verdict(&rig, KEY), Verdict::Welcome);
            assert_eq!(verdict(&rig, [1; 32]), Verdict::Refused);
            ask(&first, gone, KIB);
            let mut head = [0; Reply::LEN];
            (&first).read_exact(&mut head).unwrap();
            let sum = check_request(&request(gone, KIB)).unwrap();
            assert_eq!(Reply::decode(&head, sum).unwrap().status, Status::Stale);
            server_sleeps();
            control.hang(false);
            for s in &stuck {
                assert_eq!(reply(s, grant, MIB), grant.nonce.get());
            }
            server_sleeps();
        });
    });
}

#[test]
fn an_unusable_gpu_closes_connections_and_the_server_goes_on() {
    with_driver(an_unusable_gpu_closes_connections_and_the_server_goes_on, "", |control| {
        from_gpu(small_ring(), || {
            let rig = Rig::new(PoolLayout::uniform(4, 1, MIB, 16));
            let blocks: Vec<_> = (0..4).map(Some).collect();
            let (grant, offer) = rig.offer(1, &blocks);
            let plan = rig.plan(&offer, &blocks, 4 * MIB);
            control.hang(true);
            let (mut lane, _memory) = rig.lane(&TcpConfig::default());
            let a = attempt();
            lane.begin(a, grant);
            let mut reads = Vec::new();
            plan.reads(0, 0, MIB, &mut reads);
            assert!(lane.post(a, &reads) > 0);
            // These wait too: for copies, and for slots.
            let others: Vec<_> = (0..6).map(|_| proven(&rig)).collect();
            others.iter().for_each(|s| ask(s, grant, MIB));
            wait_for(control, |c| c.device_to_host >= 4);
            control.raise(0, 700, 0);
            let down = drive(&mut lane, |_, events| events.iter().any(|e| matches!(e, LaneEvent::Down { .. })));
            assert!(down.contains(&LaneEvent::Failed { attempt: a, cause: Cause::LaneFailed }), "{down:?}");
            assert!(fences(&down, a).is_empty());
            others.iter().for_each(|s| drop(rest(s)));
            // Later connections are closed too.
            let late = connect_raw(&rig);
            rest(&late);
            assert_eq!(verdict(&rig, [1; 32]), Verdict::Refused, "the server goes on");
            server_sleeps();
        });
    });
}

#[test]
fn a_server_that_ends_waits_for_its_last_copy() {
    with_driver(a_server_that_ends_waits_for_its_last_copy, "", |control| {
        from_gpu(small_ring(), || {
            let rig = Rig::new(PoolLayout::uniform(1, 1, MIB, 16));
            let grant = rig.offer(1, &[Some(0)]).0;
            let stream = proven(&rig);
            // Less than the time that a server waits.
            control.set_delay(LAST_COPIES / 5);
            let before = control.counts();
            ask(&stream, grant, MIB);
            wait_for(control, |c| c.device_to_host > before.device_to_host);
            drop(rig.server);
            let now = control.counts();
            let (queued, run) = (now.device_to_host - before.device_to_host, now.operations - before.operations);
            assert_eq!(run, queued, "no copy reads the pool any more");
        });
    });
}

#[test]
fn a_server_without_requests_makes_no_cuda_calls() {
    with_driver(a_server_without_requests_makes_no_cuda_calls, "", |control| {
        from_gpu(GpuConfig::default(), || {
            let rig = Rig::new(PoolLayout::uniform(4, 1, MIB, 16));
            let (grant, gone) = (rig.offer(1, &[Some(0)]).0, rig.offer(2, &[Some(0)]).0);
            rig.export.withdraw(2);
            let stream = proven(&rig);
            for _ in 0..3 {
                ask(&stream, grant, MIB);
                assert_eq!(reply(&stream, grant, MIB), grant.nonce.get());
            }
            server_sleeps();
            let before = control.counts().calls;
            for _ in 0..50 {
                assert_eq!(verdict(&rig, KEY), Verdict::Welcome);
                ask(&stream, gone, MIB);
                (&stream).read_exact(&mut [0; Reply::LEN]).unwrap();
            }
            server_sleeps();
            assert_eq!(control.counts().calls, before);
        });
    });
}

#[test]
fn a_ring_that_cannot_be_pinned_is_named() {
    with_driver(a_ring_that_cannot_be_pinned_is_named, "", |control| {
        let layout = PoolLayout::uniform(1, 1, 4096, 16);
        let memory = Memory::alloc_gpu(0, &layout.segments).unwrap();
        control.raise(0, 700, 0);
        let error = PinnedRing::new(&memory, &GpuConfig::default()).map(drop).unwrap_err();
        let error = crate::StartError::from(error).to_string();
        assert!(error.contains("cannot pin the ring") && error.contains("700"), "{error}");
        let export = Export::new(layout.into(), memory, FenceWords::new(1).unwrap().into());
        let (limits, config) = (kvferry_proto::Limits::default(), TcpConfig::default());
        let incarnation = kvferry_proto::Incarnation::random();
        let error = Server::start(ANY, export.into(), incarnation, &limits, &config, None).map(drop).unwrap_err();
        assert!(error.to_string().contains("no pinned ring"), "{error}");
    });
}
