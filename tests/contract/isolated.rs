//! A peer's failure or bad input affects that peer's pulls only.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    process::Command,
    time::Duration,
};

use kvferry::{Cause, Config, LaneKind, Offer, Pull};
use kvferry_testkit::rig::{Producer, SOON, Spec, assert_loaded_is_exact, consumer, ended, local, pull_all, really};
use rustix::process::Signal;

use crate::sockets::{listening_names, listening_ports};

#[test]
fn one_dead_peer_and_one_stopped_peer_leave_eight_others_pulling() {
    let small = Spec { blocks: 64, ..Spec::default() };
    let mut producers: Vec<_> = (0..10).map(|_| Producer::start(&small)).collect();
    let pool = Spec { blocks: 1024, ..small.clone() };
    let consumer = consumer(&pool, Config::default());
    for round in 0..3 {
        for (i, p) in producers.iter_mut().enumerate() {
            if round > 0 && i < 2 {
                continue;
            }
            let offer = p.offer_all();
            let wanted = local(i as u32 * 64..(i as u32 + 1) * 64);
            consumer.pull(Pull::new(offer, wanted).lanes(vec![really(LaneKind::Tcp)]).deadline(SOON)).unwrap();
        }
        let expected = if round > 0 { 8 } else { 10 };
        for _ in 0..expected {
            let end = ended(&consumer);
            assert!(end.outcome.complete(), "round {round}: {:?}", end.outcome);
            assert_eq!(assert_loaded_is_exact(&end, &consumer, &small, end.offer.incarnation.get()), 64);
        }
        if round == 0 {
            producers[0].kill();
            producers[1].signal(Signal::STOP);
        }
    }
    producers[1].signal(Signal::CONT);
}

#[test]
fn a_peer_with_another_model_or_dtype_is_refused_and_others_are_served() {
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
fn a_peer_with_another_layout_is_refused_before_a_byte_is_read() {
    let spec = Spec::default();
    let mut wrong = Producer::start(&Spec { block_size: spec.block_size * 2, ..spec.clone() });
    let consumer = consumer(&spec, Config::default());
    let offer = wrong.offer(&[1, 2, 3]);
    consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    let end = ended(&consumer);
    assert_eq!((end.outcome.loaded(), end.outcome.cause()), (0, Some(Cause::BadOffer)));
}

#[test]
fn random_bytes_and_half_open_connections_on_every_port_affect_no_pull() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, Config::default());
    // The kernel's list of all listening sockets: control, data and unix.
    let ports = listening_ports(producer.pid());
    assert!(ports.len() >= 2, "control and data: {ports:?}");
    let names = listening_names(producer.pid());
    assert!(!names.is_empty(), "the local lane's socket");
    let mut half_open = Vec::new();
    let mut state = 0x1234_5678_9abc_def1u64;
    let mut garbage = move |n: usize| -> Vec<u8> {
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
            // The producer may close the connection at any byte.
            let _ = s.write_all(&garbage(1 << (2 * round)));
            let _ = s.shutdown(std::net::Shutdown::Write);
            s.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            let _ = s.read(&mut [0; 4096]);
        }
        for name in &names {
            use std::os::linux::net::SocketAddrExt as _;
            let addr = std::os::unix::net::SocketAddr::from_abstract_name(name).unwrap();
            let Ok(mut s) = std::os::unix::net::UnixStream::connect_addr(&addr) else { continue };
            let _ = s.write_all(&garbage(1 << (2 * round).min(12)));
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
fn a_peer_that_does_not_listen_is_unreachable_at_once() {
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

/// The environment variable that makes this binary a consumer of another user.
const STRANGER: &str = "KVFERRY_TEST_STRANGER";

/// Does the work of another user's consumer if this process was started as one: pulls an offer over the local lane alone,
/// and prints how many blocks were loaded.
pub(crate) fn play_stranger() {
    let Ok(text) = std::env::var(STRANGER) else { return };
    let (spec, offer): (Spec, Offer) = serde_json::from_str(&text).expect("a spec and an offer");
    // This side trusts root: the producer must refuse.
    let mut config = Config::default();
    config.local.uids = vec![0];
    let consumer = consumer(&spec, config);
    consumer.pull(pull_all(&offer, LaneKind::Local, Duration::from_secs(3))).expect("a pull");
    println!("@@{}", ended(&consumer).outcome.loaded());
}

#[test]
#[ignore = "needs root, to become another user"]
fn another_user_of_the_host_gets_no_local_lane_from_a_producer_of_root() {
    const NOBODY: u32 = 65534;
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    // Another user may not be able to reach this binary where it is.
    let folder = std::env::temp_dir().join(format!("kvferry-stranger-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    let exe = folder.join("contract");
    std::fs::copy(std::env::current_exe().unwrap(), &exe).unwrap();
    for path in [&folder, &exe] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut loaded_by = |uid: u32| {
        let offer = producer.offer_all();
        let out = Command::new(&exe)
            .args(["--exact", "role", "--ignored", "--nocapture", "--test-threads=1"])
            .env(STRANGER, serde_json::to_string(&(&spec, &offer)).unwrap())
            .current_dir("/")
            .uid(uid)
            .gid(uid)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&out.stdout);
        let at = text.find("@@").unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&out.stderr)));
        text[at + 2..].lines().next().unwrap().parse::<u64>().unwrap()
    };
    let (same, other) = (loaded_by(0), loaded_by(NOBODY));
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!((same, other), (u64::from(spec.blocks), 0));
}
