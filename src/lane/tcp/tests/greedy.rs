//! Peers that want more than their share.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use kvferry_proto::{Grant, Limits, PoolLayout};
use rustix::net::{AddressFamily, RecvFlags, SocketType};

use super::{
    super::{
        connection::{Connection, Next, Shared},
        frames::*,
        handshake::Keyed,
    },
    bad_peers::{connect_raw, proven, rest},
    rig::*,
};
use crate::{config::TcpConfig, lane::tcp::Server};

/// Blocks of an offer whose lookups are a whole turn.
const MANY: u32 = 1 << 16;

/// A request of every block of a large offer, and of one past its end.
fn lookups_and_a_refusal(grant: Grant) -> Vec<u8> {
    let all = Entry { group: 0, region: 0, position: 0, blocks: MANY, within: 0, piece: 64 };
    let past = Entry { position: MANY, blocks: 1, ..all };
    let request = Request { count: 2, tag: 9, nonce: grant.nonce.get(), slot: grant.slot };
    let mut bytes = [&request.encode()[..], &all.encode(), &past.encode()].concat();
    seal_request(&mut bytes, 0);
    bytes
}

fn large() -> Rig {
    Rig::new(PoolLayout::uniform(MANY, 1, 64, 16))
}

fn offer(rig: &Rig) -> Grant {
    rig.offer(1, &(0..MANY).map(Some).collect::<Vec<_>>()).0
}

#[test]
fn lookups_of_refused_requests_end_a_turn_like_bytes() {
    const REQUESTS: usize = 4;
    let rig = large();
    let grant = offer(&rig);
    let listener = TcpListener::bind(ANY).unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    client.set_read_timeout(Some(LIMIT)).unwrap();
    let server = listener.accept().unwrap().0;
    server.set_nonblocking(true).unwrap();
    let watch = server.try_clone().unwrap();
    let sent = |n: usize| {
        let (mut seen, end) = (vec![0; n], Instant::now() + LIMIT);
        while rustix::net::recv(&watch, &mut seen, RecvFlags::PEEK).map_or(0, |(got, _)| got) < n {
            assert!(Instant::now() < end);
            std::thread::yield_now();
        }
    };
    let challenge = Challenge { options: Options::default(), random: [9; 32] };
    let mut connection = Connection::new(server.into(), None, challenge);
    let mut scratch = vec![0; 128 << 10];
    let mut turn = |turn_bytes| {
        let (key, is_full) = (|_| Some(KEY), |_| false);
        let (export, incarnation) = (&*rig.export, rig.incarnation);
        let scratch = &mut scratch;
        let mut shared = Shared { export, incarnation, key: &key, is_full: &is_full, scratch, ahead: None, token: 0 };
        assert!(matches!(connection.turn(&mut shared, turn_bytes), Next::Wait(_)));
    };
    let (random, options, incarnation) = ([1; 32], Options::default(), rig.incarnation);
    let keyed = Keyed { key: &KEY, challenge: &challenge, options, random: &random, lane: LANE, incarnation };
    client.write_all(&Proof { lane: LANE, options, random, mac: keyed.consumer() }.encode()).unwrap();
    sent(Proof::LEN);
    turn(2 << 20);
    client.read_exact(&mut [0; Challenge::LEN + Answer::LEN]).unwrap();

    let requests = lookups_and_a_refusal(grant).repeat(REQUESTS);
    client.write_all(&requests).unwrap();
    sent(requests.len());
    client.set_nonblocking(true).unwrap();
    let (mut turns, mut replies) = (0, Vec::new());
    while replies.len() < REQUESTS * Reply::LEN {
        assert!(turns < 100);
        turn(2 << 20);
        turns += 1;
        let mut got = [0; REQUESTS * Reply::LEN];
        let n = client.read(&mut got).unwrap_or(0);
        replies.extend_from_slice(&got[..n]);
    }
    assert!(turns >= REQUESTS, "{REQUESTS} requests in {turns} turns");
}

#[test]
fn a_consumer_that_goes_on_requesting_out_of_bounds_loses_its_connection_and_no_other_does() {
    let rig = large();
    let grant = offer(&rig);
    let (bad, mut good) = (proven(&rig), proven(&rig));
    // Fails if the producer has closed already.
    let _ = (&bad).write_all(&lookups_and_a_refusal(grant).repeat(1500));
    assert!(rest(&bad).len() <= 8 * Reply::LEN);
    good.write_all(&lookups_and_a_refusal(grant)).unwrap();
    good.read_exact(&mut [0; Reply::LEN]).unwrap();
}

/// Proves the lane on a new connection. The producer's verdict.
fn verdict(rig: &Rig, lane: u64) -> (Verdict, TcpStream) {
    let mut s = connect_raw(rig);
    let mut b = [0; Challenge::LEN];
    s.read_exact(&mut b).unwrap();
    let challenge = Challenge::decode(&b).unwrap();
    let (random, options, incarnation) = ([1; 32], Options::default(), rig.incarnation);
    let keyed = Keyed { key: &KEY, challenge: &challenge, options, random: &random, lane, incarnation };
    s.write_all(&Proof { lane, options, random, mac: keyed.consumer() }.encode()).unwrap();
    let mut b = [0; Answer::LEN];
    s.read_exact(&mut b).unwrap();
    (Answer::decode(&b).unwrap().verdict, s)
}

#[test]
fn one_lane_does_not_take_every_connection() {
    let rig = Rig::new(PoolLayout::uniform(1, 1, 64, 16));
    rig.server.admit(LANE + 1, KEY);
    let mut held = Vec::new();
    for n in 0..100 {
        let (verdict, stream) = verdict(&rig, LANE);
        let expected = if n < TcpConfig::MOST_CONNECTIONS { Verdict::Welcome } else { Verdict::Full };
        assert_eq!(verdict, expected, "connection {n}");
        held.push(stream);
    }
    let (other, _stream) = verdict(&rig, LANE + 1);
    assert_eq!(other, Verdict::Welcome, "another lane");
    // A malformed request ends a connection, and its place is free.
    (&held[0]).write_all(&[0xff; Request::LEN]).unwrap();
    rest(&held[0]);
    assert_eq!(verdict(&rig, LANE).0, Verdict::Welcome);
}

/// Connects from this address of this host.
fn connect_from(rig: &Rig, from: [u8; 4]) -> TcpStream {
    let socket: OwnedFd = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&socket, &SocketAddr::from((from, 0))).unwrap();
    rustix::net::connect(&socket, &rig.server.addr()).unwrap();
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

#[test]
fn silent_strangers_displace_no_handshake_of_another_address() {
    let rig = Rig::with(PoolLayout::uniform(1, 1, 64, 16), |export, incarnation| {
        let limits = (Duration::from_secs(3600), 8);
        let config = TcpConfig::default();
        Server::start_with(ANY, export, incarnation, &Limits::default(), &config, None, limits).unwrap()
    });
    let mut honest = connect_from(&rig, [127, 0, 0, 2]);
    let mut b = [0; Challenge::LEN];
    honest.read_exact(&mut b).unwrap();
    let challenge = Challenge::decode(&b).unwrap();
    let strangers: Vec<_> = (0..100).map(|_| connect_from(&rig, [127, 0, 0, 3])).collect();
    for displaced in &strangers[..98] {
        assert_eq!(rest(displaced).len(), Challenge::LEN + Answer::LEN);
    }
    let (random, options, incarnation) = ([1; 32], Options::default(), rig.incarnation);
    let keyed = Keyed { key: &KEY, challenge: &challenge, options, random: &random, lane: LANE, incarnation };
    honest.write_all(&Proof { lane: LANE, options, random, mac: keyed.consumer() }.encode()).unwrap();
    let mut b = [0; Answer::LEN];
    honest.read_exact(&mut b).unwrap();
    assert_eq!(Answer::decode(&b).unwrap().verdict, Verdict::Welcome);
}
