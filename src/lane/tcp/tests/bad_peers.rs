//! Peers that break the protocol, as a consumer and as a producer.

use std::{
    io::{self, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    thread::JoinHandle,
    time::Duration,
};

use kvferry_proto::{Cause, Grant, Incarnation, Lane, LaneEvent, Limits, Nonce, PoolLayout, Read};

use super::{
    super::{frames::*, handshake::Keyed, sum::sum},
    rig::*,
};
use crate::{config::TcpConfig, lane::tcp::Server, memory::Memory};

const BLOCK: usize = 4096;

pub(super) fn connect_raw(rig: &Rig) -> TcpStream {
    let s = TcpStream::connect(rig.server.addr()).unwrap();
    s.set_read_timeout(Some(LIMIT)).unwrap();
    s
}

/// Everything until the other side closes, also abruptly.
pub(super) fn rest(mut s: &TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    match s.read_to_end(&mut all) {
        Ok(_) => {}
        Err(e) => assert_eq!(e.kind(), io::ErrorKind::ConnectionReset, "it must close"),
    }
    all
}

/// Proves itself on a fresh connection, as a consumer does.
pub(super) fn proven(rig: &Rig) -> TcpStream {
    let mut s = connect_raw(rig);
    prove(&mut s, rig);
    s
}

/// Proves itself on a connection, as a consumer does.
pub(super) fn prove(s: &mut (impl io::Read + io::Write), rig: &Rig) {
    let mut b = [0; Challenge::LEN];
    s.read_exact(&mut b).unwrap();
    let challenge = Challenge::decode(&b).unwrap();
    let (random, options, incarnation) = ([1; 32], Options::default(), rig.incarnation);
    let keyed = Keyed { key: &KEY, challenge: &challenge, options, random: &random, lane: LANE, incarnation };
    s.write_all(&Proof { lane: LANE, options, random, mac: keyed.consumer() }.encode()).unwrap();
    let mut b = [0; Answer::LEN];
    s.read_exact(&mut b).unwrap();
    assert_eq!(Answer::decode(&b).unwrap().verdict, Verdict::Welcome);
}

#[test]
fn noise_and_half_open_connections_do_no_harm() {
    let rig = Rig::with(PoolLayout::uniform(16, 2, BLOCK as u64, 16), |export, incarnation| {
        Server::start_with(
            ANY,
            export,
            incarnation,
            &Limits::default(),
            &TcpConfig::default(),
            None,
            (Duration::from_secs(3600), 8),
        )
        .unwrap()
    });
    let blocks: Vec<_> = (0..16).map(Some).collect();
    let (grant, offer) = rig.offer(0, &blocks);
    let plan = rig.plan(&offer, &blocks, 1);
    let (mut lane, memory) = rig.lane(&TcpConfig::default());
    let mut silent = Vec::new();
    let mut seed = 1u64;
    for round in 0..40 {
        silent.push(connect_raw(&rig));
        for stream in [connect_raw(&rig), proven(&rig)] {
            let noise: Vec<u8> = (0..200 + round * 400)
                .map(|_| {
                    seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    (seed >> 33) as u8
                })
                .collect();
            // Fails if the other side has closed already.
            let _ = (&stream).write_all(&noise);
            rest(&stream);
        }
        if round % 10 == 0 {
            let a = attempt();
            let events = pull(&mut lane, a, grant, &plan, 1 << 20);
            assert_eq!(fences(&events, a).len(), plan.chunks().len());
        }
    }
    check(&rig.export.layout, &memory, &(0..16).map(|b| (b, b)).collect::<Vec<_>>(), 0);
    // The oldest of too many silent connections was closed.
    assert_eq!(rest(&silent[0]).len(), Challenge::LEN + Answer::LEN);
}

#[test]
fn a_peer_without_a_proof_in_time_is_told_and_closed() {
    let rig = Rig::with(PoolLayout::uniform(1, 1, 64, 16), |export, incarnation| {
        Server::start_with(
            ANY,
            export,
            incarnation,
            &Limits::default(),
            &TcpConfig::default(),
            None,
            (Duration::from_millis(20), 8),
        )
        .unwrap()
    });
    let said = rest(&connect_raw(&rig));
    let answer: [u8; Answer::LEN] = said[Challenge::LEN..].try_into().unwrap();
    assert_eq!(Answer::decode(&answer).unwrap().verdict, Verdict::TooLate);
}

#[test]
fn a_wrong_proof_is_refused_with_a_verdict() {
    let rig = Rig::new(PoolLayout::uniform(1, 1, 64, 16));
    let stream = connect_raw(&rig);
    (&stream).write_all(&[7; Proof::LEN]).unwrap();
    let said = rest(&stream);
    let answer: [u8; Answer::LEN] = said[Challenge::LEN..].try_into().unwrap();
    assert_eq!(Answer::decode(&answer), Ok(Answer { verdict: Verdict::Refused, mac: [0; 32] }));
}

/// The reply to a hand-written request.
fn ask(rig: &Rig, grant: Grant, entry: Entry) -> Reply {
    let mut s = proven(rig);
    let request = Request { count: 1, tag: 9, nonce: grant.nonce.get(), slot: grant.slot };
    let mut bytes = [&request.encode()[..], &entry.encode()].concat();
    let sum = seal_request(&mut bytes, 0);
    // In two parts, to see that the producer waits for the second.
    let (head, rest) = bytes.split_at(Request::LEN);
    s.write_all(head).unwrap();
    s.write_all(rest).unwrap();
    let mut b = [0; Reply::LEN];
    s.read_exact(&mut b).unwrap();
    Reply::decode(&b, sum).unwrap()
}

#[test]
fn a_request_gets_bytes_of_a_live_offer_and_nothing_else() {
    let rig = Rig::new(PoolLayout::uniform(8, 1, BLOCK as u64, 16));
    let (grant, _) = rig.offer(2, &[Some(1), None, Some(3)]);
    let good = Entry { group: 0, region: 0, position: 0, blocks: 1, within: 0, piece: BLOCK as u64 };
    let refused = |status| Reply { status, tag: 9, total: 0 };
    assert_eq!(ask(&rig, grant, good), Reply { status: Status::Ok, tag: 9, total: BLOCK as u64 });
    assert_eq!(ask(&rig, grant, Entry { position: 1, ..good }), refused(Status::OutOfBounds));
    assert_eq!(ask(&rig, grant, Entry { position: 3, ..good }), refused(Status::OutOfBounds));
    assert_eq!(ask(&rig, grant, Entry { piece: u64::MAX, within: 2, ..good }), refused(Status::OutOfBounds));
    assert_eq!(ask(&rig, Grant { nonce: Nonce::random(), ..grant }, good), refused(Status::Stale));
    assert_eq!(ask(&rig, Grant { slot: 3, ..grant }, good), refused(Status::Stale));
    assert_eq!(ask(&rig, Grant { slot: u32::MAX, ..grant }, good), refused(Status::Stale));
}

/// A producer written by hand: shakes hands, receives a request of one entry, and does `then`.
fn impostor(
    key: [u8; 32],
    incarnation: Incarnation,
    then: impl FnOnce(&mut TcpStream, Asked) + Send + 'static,
    listen_first: bool,
) -> (std::net::SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind(ANY).unwrap();
    let addr = listener.local_addr().unwrap();
    let thread = std::thread::spawn(move || {
        let mut s = listener.accept().unwrap().0;
        let challenge = Challenge { options: Options::default(), random: [9; 32] };
        s.write_all(&challenge.encode()).unwrap();
        let mut b = [0; Proof::LEN];
        s.read_exact(&mut b).unwrap();
        let proof = Proof::decode(&b);
        let (options, random) = (proof.options, &proof.random);
        let keyed = Keyed { key: &key, challenge: &challenge, options, random, lane: LANE, incarnation };
        let answer = Answer { verdict: Verdict::Welcome, mac: keyed.producer() };
        if s.write_all(&answer.encode()).is_err() {
            return;
        }
        let mut b = [0; Request::LEN + Entry::LEN + SUM];
        if listen_first && s.read_exact(&mut b).is_err() {
            return;
        }
        let request = b.first_chunk().and_then(|h| Request::decode(h).ok());
        let (tag, nonce) = request.map_or((0, 0), |r| (r.tag, r.nonce));
        then(&mut s, Asked { tag, nonce, sum: check_request(&b).unwrap_or(0) });
        // The consumer closes first: its verdict must not depend on our close.
        let _ = s.read_to_end(&mut Vec::new());
    });
    (addr, thread)
}

#[test]
fn a_stranger_at_the_port_does_not_pass_for_the_producer() {
    let here = Incarnation::random();
    let memory = Memory::alloc(&[4096]).unwrap();
    for (key, incarnation) in [([1; 32], here), (KEY, Incarnation::random())] {
        let (addr, thread) = impostor(key, incarnation, |_, _| {}, true);
        let result = connect(addr, &KEY, here, memory.clone(), &TcpConfig::default());
        let e = result.map(|_| ()).unwrap_err().to_string();
        assert!(e.contains("another process"), "{e}");
        thread.join().unwrap();
    }
}

/// The request that an impostor received; zeros if it did not wait for one.
#[derive(Clone, Copy)]
struct Asked {
    tag: u64,
    nonce: u64,
    sum: u64,
}

type Say = fn(&mut TcpStream, Asked);

fn reply(r: Asked, total: usize) -> Vec<u8> {
    Reply { status: Status::Ok, tag: r.tag, total: total as u64 }.encode(r.sum).to_vec()
}

/// Sends the parts. Fails if the other side has closed already.
fn say(s: &mut TcpStream, parts: &[&[u8]]) {
    let _ = s.write_all(&parts.concat());
}

#[test]
fn a_producer_that_breaks_the_protocol_writes_only_requested_bytes() {
    let sayings: [(&str, bool, Say); 10] = [
        ("another tag", true, |s, r| {
            say(s, &[&reply(Asked { tag: r.tag + 1, ..r }, BLOCK), &[0xab; BLOCK]]);
        }),
        ("more than was requested", true, |s, r| say(s, &[&reply(r, 2 * BLOCK), &[0xab; 2 * BLOCK]])),
        ("less than was requested", true, |s, r| {
            say(s, &[&reply(r, BLOCK - 1), &[0xab; BLOCK - 1], &[0; Trailer::LEN]])
        }),
        ("a status out of range", true, |s, r| {
            let mut b = reply(r, 0);
            b[4] = 200;
            let sum = sum(&b[..24], r.sum).to_le_bytes();
            say(s, &[&b[..24], &sum]);
        }),
        ("a refusal with data", true, |s, r| {
            say(s, &[&Reply { status: Status::Stale, tag: r.tag, total: 5 }.encode(r.sum), &[0xab; 5]]);
        }),
        ("another protocol", true, |s, _| say(s, &[b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"])),
        ("data before any request", false, |s, _| say(s, &[&[0xab; 40]])),
        ("another tag in the trailer", true, |s, r| {
            let trailer = Trailer { tag: 99, word: r.nonce, data: 0 }.encode(r.sum);
            say(s, &[&reply(r, BLOCK), &[0xab; BLOCK], &trailer]);
        }),
        ("more data than it said", true, |s, r| say(s, &[&reply(r, BLOCK), &[0xab; 3 * BLOCK]])),
        ("the end in the middle", true, |s, r| {
            say(s, &[&reply(r, BLOCK), &[0xab; BLOCK / 2]]);
            let _ = s.shutdown(std::net::Shutdown::Both);
        }),
    ];
    for (what, listen_first, saying) in sayings {
        let incarnation = Incarnation::random();
        let (addr, thread) = impostor(KEY, incarnation, saying, listen_first);
        let memory = Memory::alloc(&[3 * BLOCK as u64]).unwrap();
        let mut lane = connect(addr, &KEY, incarnation, memory.clone(), &TcpConfig::default()).unwrap();
        let (a, grant) = (attempt(), Grant { slot: 0, nonce: Nonce::random() });
        lane.begin(a, grant);
        let read = Read::between(0, (0, 0), (0, BLOCK as u64), BLOCK as u64);
        assert_eq!(lane.post(a, &[read]), 1);
        let events = drive(&mut lane, |_, events| events.iter().any(|e| matches!(e, LaneEvent::Down { .. })));
        let end = &events[events.len() - 3..];
        let failed = LaneEvent::Failed { attempt: a, cause: Cause::LaneFailed };
        // More data looks like a trailer that was changed on its way.
        let again = LaneEvent::Again { attempt: a, chunk: 0 };
        assert_eq!(end[0], if what == "more data than it said" { again } else { failed }, "{what}");
        assert_eq!(end[1], LaneEvent::Quiet { attempt: a }, "{what}");
        assert!(fences(&events, a).is_empty(), "{what}");
        let mut got = vec![0; 3 * BLOCK];
        memory.read_into(0, 0, &mut got).unwrap();
        assert!(
            got[..BLOCK].iter().chain(&got[2 * BLOCK..]).all(|&b| b == 0),
            "{what}: outside of the requested bytes"
        );
        drop(lane);
        thread.join().unwrap();
    }
}
