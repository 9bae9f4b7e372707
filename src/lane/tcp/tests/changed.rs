//! A network that changes bytes on their way: a proxy between the two ends.

use std::{
    collections::VecDeque,
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
};

use kvferry_proto::{Attempt, Cause, Grant, Lane, LaneEvent, Limits, Plan, PoolLayout};

use super::{
    super::frames::{Answer, Challenge, Proof, Reply, Request, Trailer},
    rig::*,
};
use crate::{
    config::TcpConfig,
    lane::tcp::{Server, TcpLane},
    memory::Memory,
};

const BLOCKS: u32 = 16;
/// One chunk, one read, one reply.
const BLOCK: usize = 64 << 10;
/// Where the first reply's data begins in the producer's stream.
const DATA: usize = Challenge::LEN + Answer::LEN + Reply::LEN;
/// From one reply to the next.
const PERIOD: usize = Reply::LEN + BLOCK + Trailer::LEN;

/// Changes bytes of a stream. Gets the place of the first one.
pub(super) type Change = Arc<Mutex<dyn FnMut(usize, &mut [u8]) + Send>>;

pub(super) fn change(change: impl FnMut(usize, &mut [u8]) + Send + 'static) -> Change {
    Arc::new(Mutex::new(change))
}

pub(super) fn unchanged() -> Change {
    change(|_, _| {})
}

/// Flips the byte at `place`, and every `period` bytes from there.
pub(super) fn flip(place: usize, period: usize) -> Change {
    change(move |at, bytes| {
        let hit = |i: usize| at + i >= place && (at + i - place).is_multiple_of(period);
        bytes.iter_mut().enumerate().filter(|(i, _)| hit(*i)).for_each(|(_, b)| *b ^= 1);
    })
}

/// Swaps two 16-bit words of the first reply's data, once: the checksum of TCP stays right.
fn swap_words() -> Change {
    let mut done = false;
    change(move |at, bytes| {
        let begin = DATA.saturating_sub(at).min(bytes.len());
        let (words, _) = bytes[begin..].as_chunks_mut::<2>();
        let differ = words.windows(2).position(|w| w[0] != w[1]);
        if let Some(i) = differ.filter(|_| !done) {
            words.swap(i, i + 1);
            done = true;
        }
    })
}

fn pump(mut from: TcpStream, mut to: TcpStream, change: Change) {
    let (mut at, mut buffer) = (0, vec![0; 32 << 10]);
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        change.lock().unwrap()(at, &mut buffer[..n]);
        at += n;
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// A proxy to a producer that changes requests and replies. Ends with the test's process.
pub(super) fn proxy(to: SocketAddr, up: Change, down: Change) -> SocketAddr {
    let listener = TcpListener::bind(ANY).unwrap();
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for near in listener.incoming().map_while(Result::ok) {
            let far = TcpStream::connect(to).unwrap();
            let (near2, far2) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            let (up, down) = (up.clone(), down.clone());
            std::thread::spawn(move || pump(near, far, up));
            std::thread::spawn(move || pump(far2, near2, down));
        }
    });
    addr
}

struct Setting {
    rig: Rig,
    grant: Grant,
    plan: Plan,
}

impl Setting {
    fn new(checksum: bool) -> Self {
        let config = TcpConfig { checksum, ..TcpConfig::default() };
        let rig = Rig::with(PoolLayout::uniform(BLOCKS, 1, BLOCK as u64, 16), |export, incarnation| {
            Server::start(ANY, export, incarnation, &Limits::default(), &config, None).unwrap()
        });
        let blocks: Vec<_> = (0..BLOCKS).map(Some).collect();
        let (grant, offer) = rig.offer(1, &blocks);
        let plan = rig.plan(&offer, &blocks, BLOCK as u64);
        Self { rig, grant, plan }
    }

    /// A lane through a proxy.
    fn lane(&self, up: Change, down: Change) -> (TcpLane, Memory) {
        let addr = proxy(self.rig.server.addr(), up, down);
        let memory = Memory::alloc(&self.rig.export.layout.segments).unwrap();
        let config = TcpConfig { window: 1 << 30, checksum: true, ..TcpConfig::default() };
        (connect(addr, &KEY, self.rig.incarnation, memory.clone(), &config).unwrap(), memory)
    }

    /// Pulls all blocks as the tracker does, until each has its fence or the attempt fails.
    fn pull(&self, lane: &mut TcpLane, a: Attempt) -> Vec<LaneEvent> {
        lane.begin(a, self.grant);
        let mut due: VecDeque<u32> = (0..BLOCKS).collect();
        let mut seen = 0;
        drive(lane, |lane, events| {
            for e in &events[seen..] {
                if let LaneEvent::Again { attempt, chunk } = e {
                    assert_eq!((*attempt, done(events, a, *chunk) > 0), (a, true), "all of it has come");
                    due.push_front(*chunk);
                }
            }
            seen = events.len();
            let over = events.iter().any(|e| matches!(e, LaneEvent::Failed { .. } | LaneEvent::Down { .. }));
            for chunk in due.drain(..) {
                let mut reads = Vec::new();
                self.plan.reads(chunk, 0, 1 << 20, &mut reads);
                let taken = if over { 1 } else { lane.post(a, &reads) };
                assert_eq!((taken, reads.len()), (1, 1));
            }
            over || fences(events, a).len() as u32 == BLOCKS
        })
    }

    fn check(&self, memory: &Memory) {
        check(&self.rig.export.layout, memory, &(0..BLOCKS).map(|b| (b, b)).collect::<Vec<_>>(), 0);
    }
}

fn again(events: &[LaneEvent]) -> usize {
    events.iter().filter(|e| matches!(e, LaneEvent::Again { .. })).count()
}

#[test]
pub(super) fn words_that_change_places_on_their_way_are_read_again_and_every_byte_is_right() {
    let s = Setting::new(true);
    let (mut lane, memory) = s.lane(unchanged(), swap_words());
    let a = attempt();
    let events = s.pull(&mut lane, a);
    assert_eq!(again(&events), 1);
    let fences = fences(&events, a);
    assert_eq!(fences.len() as u32, BLOCKS);
    assert!(fences.iter().all(|(_, word)| *word == s.grant.nonce.get()));
    s.check(&memory);
}

#[test]
fn the_checksum_is_in_force_only_if_both_sides_want_it() {
    let s = Setting::new(false);
    let (mut lane, memory) = s.lane(unchanged(), swap_words());
    let events = s.pull(&mut lane, attempt());
    assert_eq!(again(&events), 0);
    // Only the checksum sees the change.
    let mut got = vec![0; BLOCK];
    memory.read_into(0, 0, &mut got).unwrap();
    let differ = got.iter().enumerate().filter(|(i, b)| **b != pattern(0, *i as u64)).count();
    assert!((1..=4).contains(&differ), "{differ} bytes differ");
}

#[test]
pub(super) fn a_network_that_changes_every_chunk_fails_the_attempt_as_corrupt_and_nothing_is_fenced() {
    let s = Setting::new(true);
    let (mut lane, _memory) = s.lane(unchanged(), flip(DATA + 1000, PERIOD));
    let (a, b) = (attempt(), attempt());
    let events = s.pull(&mut lane, a);
    assert_eq!(again(&events), 3);
    assert_eq!(events.last(), Some(&LaneEvent::Failed { attempt: a, cause: Cause::Corrupt }));
    assert_eq!(fences(&events, a), []);
    lane.stop(a);
    let events = s.pull(&mut lane, b);
    let failed = LaneEvent::Failed { attempt: b, cause: Cause::Corrupt };
    assert!(events.contains(&failed), "another attempt on this lane has its own count: {events:?}");
    assert_eq!((again(&events), fences(&events, b)), (3, vec![]));
}

#[test]
fn a_trailer_that_was_changed_is_not_believed() {
    for (field, byte) in [("tag", 0), ("word", 8), ("data", 16), ("sum", 24)] {
        let s = Setting::new(true);
        let (mut lane, memory) = s.lane(unchanged(), flip(DATA + BLOCK + byte, usize::MAX));
        let a = attempt();
        let events = s.pull(&mut lane, a);
        assert_eq!(again(&events), 1, "{field}");
        assert!(fences(&events, a).iter().all(|(_, word)| *word == s.grant.nonce.get()), "{field}");
        s.check(&memory);
    }
}

#[test]
fn a_reply_whose_head_was_changed_ends_the_lane_as_corrupt() {
    for byte in [4, 8, 16, 24] {
        let s = Setting::new(true);
        let (mut lane, memory) = s.lane(unchanged(), flip(DATA - Reply::LEN + byte, usize::MAX));
        let a = attempt();
        let cause = Cause::Corrupt;
        let end = [LaneEvent::Failed { attempt: a, cause }, LaneEvent::Quiet { attempt: a }, LaneEvent::Down { cause }];
        assert_eq!(s.pull(&mut lane, a), end, "byte {byte}");
        check(&s.rig.export.layout, &memory, &[], 0);
    }
}

#[test]
fn a_request_that_was_changed_is_not_answered() {
    // The position of its entry: another block of the offer, whose bytes would arrive as they were sent.
    let s = Setting::new(true);
    let (mut lane, memory) = s.lane(flip(Proof::LEN + Request::LEN + 4, usize::MAX), unchanged());
    let a = attempt();
    let events = s.pull(&mut lane, a);
    assert_eq!(events[0], LaneEvent::Failed { attempt: a, cause: Cause::LaneFailed });
    assert_eq!(events.last(), Some(&LaneEvent::Down { cause: Cause::PeerDown }));
    check(&s.rig.export.layout, &memory, &[], 0);
}

#[test]
fn a_changed_handshake_turns_nothing_off() {
    let s = Setting::new(true);
    for (up, down) in [(unchanged(), flip(8, usize::MAX)), (flip(8, usize::MAX), unchanged())] {
        let addr = proxy(s.rig.server.addr(), up, down);
        let config = TcpConfig { checksum: true, ..TcpConfig::default() };
        let memory = Memory::alloc(&s.rig.export.layout.segments).unwrap();
        let refused = connect(addr, &KEY, s.rig.incarnation, memory, &config).map(|_| ()).unwrap_err().to_string();
        assert!(refused.contains("changed the handshake"), "{refused}");
    }
}
