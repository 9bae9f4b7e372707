//! Lanes over TLS.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    time::Duration,
};

use kvferry_proto::{Cause, LaneEvent, Limits, PoolLayout};

use super::{
    changed::{flip, proxy, unchanged},
    pulls,
    rig::*,
};
use crate::{
    config::TcpConfig,
    lane::{
        LaneError,
        tcp::{Server, TcpLane},
    },
    memory::Memory,
    tls::{TlsIdentity, tests::Authority},
};

const BLOCK: u64 = 64 << 10;

fn layout() -> PoolLayout {
    PoolLayout::uniform(64, 1, BLOCK, 16)
}

fn all() -> Vec<Option<u32>> {
    (0..64).map(Some).collect()
}

/// A lane over TLS with these certificates, or a plain one.
fn connect_with(rig: &Rig, addr: SocketAddr, tls: Option<&TlsIdentity>) -> Result<(TcpLane, Memory), LaneError> {
    let memory = Memory::alloc(&rig.export.layout.segments).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let config = TcpConfig { window: 1 << 30, ..TcpConfig::default() };
    let lane = TcpLane::connect(addr, LANE, &KEY, rig.incarnation, memory.clone(), &config, tls);
    runtime.block_on(lane).map(|lane| (lane, memory))
}

fn serve(tls: Option<Arc<TlsIdentity>>) -> Rig {
    Rig::with(layout(), |export, incarnation| {
        Server::start(ANY, export, incarnation, &Limits::default(), &TcpConfig::default(), tls).unwrap()
    })
}

fn identity_of(authority: &Authority) -> Arc<TlsIdentity> {
    TlsIdentity::new(&authority.issue("any"), None).unwrap()
}

#[test]
fn pulls_over_tls_keep_every_promise_of_plain_ones() {
    over_tls(|| {
        pulls::every_byte_lands_where_it_was_wanted_and_nowhere_else();
        pulls::a_fence_comes_after_all_reads_of_its_chunk_however_it_was_posted();
        pulls::an_offer_revoked_in_the_middle_fails_its_fence_and_is_refused_from_then_on();
        pulls::one_attempts_bad_request_leaves_the_others_alone();
        pulls::nothing_is_written_once_a_stopped_attempt_is_quiet();
        pulls::blocks_that_arrived_before_the_producer_went_stay_loaded();
        pulls::a_killed_lane_is_quiet_and_down_at_once();
        pulls::the_window_takes_a_prefix_and_always_one_read();
        pulls::only_a_peer_with_the_key_of_this_incarnation_may_connect();
        pulls::a_consumer_that_does_not_receive_delays_no_other();
    });
}

#[test]
fn a_byte_that_is_flipped_under_tls_ends_the_lane_as_corrupt_and_what_arrived_before_is_right() {
    let authority = Authority::new();
    let tls = identity_of(&authority);
    let rig = serve(Some(tls.clone()));
    let (grant, offer) = rig.offer(1, &all());
    let plan = rig.plan(&offer, &all(), BLOCK);
    let addr = proxy(rig.server.addr(), unchanged(), flip(2 << 20, usize::MAX));
    let (mut lane, memory) = connect_with(&rig, addr, Some(&tls)).unwrap();
    let a = attempt();
    let mut events = pull(&mut lane, a, grant, &plan, 1 << 20);
    let cause = Cause::Corrupt;
    let end = [LaneEvent::Failed { attempt: a, cause }, LaneEvent::Quiet { attempt: a }, LaneEvent::Down { cause }];
    assert_eq!(events.split_off(events.len() - 3), end);
    let fenced: Vec<_> = fences(&events, a).into_iter().map(|(chunk, _)| chunk).collect();
    assert!(fenced.len() > 10 && fenced.len() < 33, "{fenced:?}");
    for chunk in fenced {
        let mut got = vec![0; BLOCK as usize];
        memory.read_into(0, u64::from(chunk) * BLOCK, &mut got).unwrap();
        assert!(got.iter().enumerate().all(|(i, &b)| b == pattern(0, u64::from(chunk) * BLOCK + i as u64)));
    }
}

#[test]
fn a_request_that_is_flipped_under_tls_ends_the_lane_as_corrupt() {
    let authority = Authority::new();
    let tls = identity_of(&authority);
    let rig = serve(Some(tls.clone()));
    let (grant, offer) = rig.offer(1, &all());
    let plan = rig.plan(&offer, &all(), BLOCK);
    // The handshake is some two kilobytes, the requests are five.
    let addr = proxy(rig.server.addr(), flip(4000, usize::MAX), unchanged());
    let (mut lane, _memory) = connect_with(&rig, addr, Some(&tls)).unwrap();
    let a = attempt();
    let events = pull(&mut lane, a, grant, &plan, 1 << 20);
    assert_eq!(events.last(), Some(&LaneEvent::Down { cause: Cause::Corrupt }), "{events:?}");
    assert!(events.contains(&LaneEvent::Failed { attempt: a, cause: Cause::Corrupt }));
}

#[test]
fn only_certificates_of_the_same_authority_connect() {
    let (authority, other) = (Authority::new(), Authority::new());
    let rig = serve(Some(identity_of(&authority)));
    let addr = rig.server.addr();
    assert!(connect_with(&rig, addr, Some(&identity_of(&authority))).is_ok());
    // Another authority at the consumer, which distrusts the producer.
    let refused = |tls: &TlsIdentity| connect_with(&rig, addr, Some(tls)).map(|_| ()).unwrap_err();
    let error = refused(&identity_of(&other));
    assert!(matches!(error, LaneError::Tls { .. }), "{error}");
    // A certificate of another authority, at a consumer that trusts the producer's.
    let mixed = crate::config::TlsConfig { ca: authority.issue("any").ca, ..other.issue("any") };
    let error = refused(&TlsIdentity::new(&mixed, None).unwrap());
    assert!(matches!(error, LaneError::Tls { .. }), "{error}");
    assert!(connect_with(&rig, addr, Some(&identity_of(&authority))).is_ok(), "and the others are served");
}

#[test]
fn tls_and_plain_ends_do_not_connect() {
    let tls = identity_of(&Authority::new());
    let rig = serve(None);
    let error = connect_with(&rig, rig.server.addr(), Some(&tls)).map(|_| ()).unwrap_err();
    assert!(matches!(error, LaneError::Tls { .. }), "{error}");
    // A plain client waits for a producer that waits for its first message: the producer's limit ends that.
    let rig = Rig::with(layout(), |export, incarnation| {
        let limits = (Duration::from_millis(50), 8);
        let config = TcpConfig::default();
        Server::start_with(ANY, export, incarnation, &Limits::default(), &config, Some(tls.clone()), limits).unwrap()
    });
    let error = connect_with(&rig, rig.server.addr(), None).map(|_| ()).unwrap_err();
    assert!(matches!(error, LaneError::Connect { .. }), "{error}");
    // Nothing of the lane is said before the handshake.
    let mut stream = TcpStream::connect(rig.server.addr()).unwrap();
    let mut said = Vec::new();
    stream.read_to_end(&mut said).unwrap();
    assert!(said.is_empty());
}

#[test]
fn noise_and_half_open_handshakes_do_no_harm() {
    let tls = identity_of(&Authority::new());
    let rig = Rig::with(layout(), |export, incarnation| {
        let limits = (Duration::from_secs(3600), 8);
        let config = TcpConfig::default();
        Server::start_with(ANY, export, incarnation, &Limits::default(), &config, Some(tls.clone()), limits).unwrap()
    });
    let (grant, offer) = rig.offer(1, &all());
    let plan = rig.plan(&offer, &all(), BLOCK);
    let (mut lane, memory) = connect_with(&rig, rig.server.addr(), Some(&tls)).unwrap();
    let mut silent = Vec::new();
    for round in 0..40u8 {
        silent.push(TcpStream::connect(rig.server.addr()).unwrap());
        let mut noise = TcpStream::connect(rig.server.addr()).unwrap();
        noise.set_read_timeout(Some(LIMIT)).unwrap();
        // A record of a handshake, and bytes that are none.
        let first = if round % 2 == 0 { [22, 3, 1, 0, 200] } else { [round; 5] };
        let _ = noise.write_all(&[&first[..], &[round; 400]].concat());
        match noise.read_to_end(&mut Vec::new()) {
            Ok(_) => {}
            Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::ConnectionReset, "it must close"),
        }
        if round % 10 == 0 {
            let a = attempt();
            let events = pull(&mut lane, a, grant, &plan, 1 << 20);
            assert_eq!(fences(&events, a).len(), 64);
        }
    }
    check(&rig.export.layout, &memory, &(0..64).map(|b| (b, b)).collect::<Vec<_>>(), 0);
    // The oldest of too many silent connections was closed.
    silent[0].set_read_timeout(Some(LIMIT)).unwrap();
    assert_eq!(silent[0].read(&mut [0; 8]).unwrap(), 0);
    assert!(connect_with(&rig, rig.server.addr(), Some(&tls)).is_ok());
}

#[test]
fn a_producer_that_closes_in_the_handshake_is_named() {
    let tls = identity_of(&Authority::new());
    let rig = serve(None);
    let listener = TcpListener::bind(ANY).unwrap();
    let addr = listener.local_addr().unwrap();
    let closes = std::thread::spawn(move || {
        let mut io = listener.accept().unwrap().0;
        io.read(&mut [0; 1024]).unwrap()
    });
    let error = connect_with(&rig, addr, Some(&tls)).map(|_| ()).unwrap_err();
    assert!(closes.join().unwrap() > 0);
    assert!(matches!(error, LaneError::Tls { .. } | LaneError::Connect { .. }), "{error}");
}

/// Bytes of one copy of the measurement.
const COPY: usize = 256 << 20;

/// A bare copy over one loopback connection of rustls, with writes and reads of 1 MiB. Returns the time of each.
struct Bare {
    stream: rustls::StreamOwned<rustls::ClientConnection, TcpStream>,
    to: Vec<u8>,
}

impl Bare {
    fn new(tls: &TlsIdentity) -> Self {
        let listener = TcpListener::bind(ANY).unwrap();
        let addr = listener.local_addr().unwrap();
        let server = tls.server(crate::tls::Protocol::Lane);
        std::thread::spawn(move || {
            let io = listener.accept().unwrap().0;
            io.set_nodelay(true).unwrap();
            let conn = rustls::ServerConnection::new(server).unwrap();
            let mut stream = rustls::StreamOwned::new(conn, io);
            let from: Vec<u8> = (0..COPY).map(|i| pattern(0, i as u64)).collect();
            while stream.read_exact(&mut [0]).is_ok() {
                for piece in from.chunks(1 << 20) {
                    stream.write_all(piece).unwrap();
                }
                stream.flush().unwrap();
            }
        });
        let client = tls.client(crate::tls::Protocol::Lane);
        let conn = rustls::ClientConnection::new(client, tls.server_name().unwrap()).unwrap();
        let stream = rustls::StreamOwned::new(conn, TcpStream::connect(addr).unwrap());
        Self { stream, to: vec![0; COPY] }
    }

    fn copy(&mut self) -> Duration {
        let start = std::time::Instant::now();
        self.stream.write_all(&[1]).unwrap();
        for piece in self.to.chunks_mut(1 << 20) {
            self.stream.read_exact(piece).unwrap();
        }
        start.elapsed()
    }
}

/// The lane beside a bare rustls copy, in turn.
/// `cargo test --release --lib --features verbs tls_speed -- --ignored --nocapture`
#[test]
#[ignore = "a measurement, for a release build on an idle machine"]
fn tls_speed() {
    let tls = identity_of(&Authority::new());
    let mut bare = Bare::new(&tls);
    for block in [16 << 10, 64 << 10, 1 << 20] {
        let n = (COPY / block) as u32;
        let rig = Rig::with(PoolLayout::uniform(n, 1, block as u64, 16), |export, incarnation| {
            let (limits, config) = (Limits::default(), TcpConfig::default());
            Server::start(ANY, export, incarnation, &limits, &config, Some(tls.clone())).unwrap()
        });
        rig.export.memory.touch().unwrap();
        let blocks: Vec<_> = (0..n).map(|b| Some(b.wrapping_mul(7919) % n)).collect();
        let (grant, offer) = rig.offer(1, &blocks);
        let local: Vec<_> = (0..n).map(Some).collect();
        let plan = rig.plan(&offer, &local, 2 << 20);
        let memory = Memory::alloc(&rig.export.layout.segments).unwrap();
        memory.touch().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let connect = |tls: Option<&TlsIdentity>| {
            let config = TcpConfig::default();
            let addr = rig.server.addr();
            runtime.block_on(TcpLane::connect(addr, LANE, &KEY, rig.incarnation, memory.clone(), &config, tls)).unwrap()
        };
        let mut lane = connect(Some(&tls));
        let mut times: [Vec<f64>; 3] = Default::default();
        for round in 0..11 {
            let start = std::time::Instant::now();
            let a = attempt();
            let events = pull(&mut lane, a, grant, &plan, 8 << 20);
            let ours = start.elapsed();
            assert_eq!(fences(&events, a).len(), plan.chunks().len());
            let theirs = bare.copy();
            if round > 0 {
                times[0].push(ours.as_secs_f64());
                times[1].push(theirs.as_secs_f64());
                times[2].push(theirs.as_secs_f64() / ours.as_secs_f64());
            }
        }
        times.iter_mut().for_each(|t| t.sort_by(f64::total_cmp));
        let rate = |t: &[f64]| COPY as f64 / t[t.len() / 2] / 1e9;
        println!(
            "blocks of {block:>7}: {:.2} GB/s over TLS, {:.2} bare, median ratio {:.2}",
            rate(&times[0]),
            rate(&times[1]),
            times[2][times[2].len() / 2]
        );
    }
}
