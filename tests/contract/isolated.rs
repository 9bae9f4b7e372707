//! A peer's failure or bad input touches that peer's pulls only.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use kvferry::{BlockId, Cause, Config, GroupId, LaneKind, LocalBlocks, Pull};
use kvferry_testkit::rig::{Producer, SOON, Spec, assert_loaded_is_exact, consumer, ended, pull_all, really};
use rustix::process::Signal;

#[test]
fn one_dead_peer_and_one_stopped_peer_leave_eight_others_pulling() {
    let small = Spec { blocks: 64, ..Spec::default() };
    let mut producers: Vec<_> = (0..10).map(|_| Producer::start(&small)).collect();
    let pool = Spec { blocks: 1024, ..small.clone() };
    let consumer = consumer(&pool, Config::default());
    let layout = pool.layout();
    for round in 0..3 {
        for (i, p) in producers.iter_mut().enumerate() {
            if round > 0 && i < 2 {
                continue;
            }
            let offer = p.offer_all();
            let blocks = (0..64).map(|b| Some(BlockId(i as u32 * 64 + b))).collect();
            let wanted = LocalBlocks { group: GroupId(0), first_position: 0, blocks };
            consumer.pull(Pull::new(offer, vec![wanted]).lanes(vec![really(LaneKind::Tcp)]).deadline(SOON)).unwrap();
        }
        let expected = if round > 0 { 8 } else { 10 };
        for _ in 0..expected {
            let end = ended(&consumer);
            assert!(end.outcome.complete(), "round {round}: {:?}", end.outcome);
            let seed = end.offer.incarnation.get();
            let mut check = kvferry_testkit::pattern::Check::new();
            for (position, b) in end.blocks.loaded.iter().enumerate() {
                let src = end.offer.groups[0].blocks[position].unwrap().0;
                let theirs = small.layout();
                let (_, bad) =
                    check.block(seed, (&theirs, src), (consumer.memory(), &layout, b.id.0), GroupId(0)).unwrap();
                assert_eq!(bad, 0);
            }
        }
        if round == 0 {
            producers[0].kill();
            producers[1].signal(Signal::STOP);
        }
    }
    producers[1].signal(Signal::CONT);
}

#[test]
fn a_peer_with_another_model_or_dtype_is_refused_by_name_and_others_are_served() {
    let spec = Spec::default();
    for other in [Spec { model: "other".into(), ..spec.clone() }, Spec { dtype: "float8".into(), ..spec.clone() }] {
        let mut wrong = Producer::start(&other);
        let mut right = Producer::start(&spec);
        let consumer = consumer(&spec, Config::default());
        let offer = wrong.offer_all();
        consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
        assert_eq!(ended(&consumer).outcome.cause(), Some(Cause::Refused));
        let offer = right.offer_all();
        consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
        assert!(ended(&consumer).outcome.complete());
    }
}

#[test]
fn a_peer_of_another_shape_is_refused_before_a_byte_is_read() {
    let spec = Spec::default();
    let mut wrong = Producer::start(&Spec { block_size: spec.block_size * 2, ..spec.clone() });
    let consumer = consumer(&spec, Config::default());
    let offer = wrong.offer(&[1, 2, 3]);
    consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    let end = ended(&consumer);
    assert_eq!((end.outcome.loaded(), end.outcome.cause()), (0, Some(Cause::BadOffer)));
}

#[test]
fn random_bytes_and_half_open_connections_on_every_port_harm_nobody() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, Config::default());
    // Every port that the process listens on, as the kernel knows them: control, data, and unix sockets.
    let ports = kvferry_testkit::rig::listening_ports(producer.pid());
    assert!(ports.len() >= 2, "control and data: {ports:?}");
    let names = kvferry_testkit::rig::listening_names(producer.pid());
    assert!(!names.is_empty(), "the local lane's socket");
    let mut half_open = Vec::new();
    let mut state = 0x1234_5678_9abc_def1u64;
    let mut rubbish = move |n: usize| -> Vec<u8> {
        (0..n)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state as u8
            })
            .collect()
    };
    for round in 0..8 {
        for &port in &ports {
            half_open.push(TcpStream::connect(("127.0.0.1", port)).unwrap());
            let mut s = TcpStream::connect(("127.0.0.1", port)).unwrap();
            s.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
            // It may close on us at any byte.
            let _ = s.write_all(&rubbish(1 << (2 * round)));
            let _ = s.shutdown(std::net::Shutdown::Write);
            s.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            let _ = s.read(&mut [0; 4096]);
        }
        for name in &names {
            use std::os::linux::net::SocketAddrExt as _;
            let addr = std::os::unix::net::SocketAddr::from_abstract_name(name).unwrap();
            let Ok(mut s) = std::os::unix::net::UnixStream::connect_addr(&addr) else { continue };
            let _ = s.write_all(&rubbish(1 << (2 * round).min(12)));
        }
    }
    for lane in [LaneKind::Tcp, LaneKind::Local] {
        let offer = producer.offer_all();
        consumer.pull(pull_all(&offer, lane, SOON)).unwrap();
        let end = ended(&consumer);
        assert!(end.outcome.complete(), "{lane}: {:?}", end.outcome);
        assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
    }
    drop(half_open);
}

#[test]
fn a_peer_that_nobody_listens_at_is_unreachable_at_once() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, Config::default());
    let offer = producer.offer_all();
    producer.kill();
    consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    let end = ended(&consumer);
    assert_eq!((end.outcome.loaded(), end.outcome.cause()), (0, Some(Cause::Unreachable)));
    assert!(end.outcome.times.decided.unwrap() < Duration::from_secs(5), "not at its deadline of {SOON:?}");
}
