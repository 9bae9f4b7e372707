//! Sessions between a peer's task and a server: claims, releases, deaths and restarts.

use std::{
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant},
};

use kvferry_proto::{
    Cause, ClaimId, Gone, Incarnation, LaneKind, OfferId, Reader, Release, ServerBody, ServerFrame, Token,
    hello::{Hello, Welcome},
    puller::{In, LaneWish, Need},
};

use super::rig::{Consumer, Rig, Seen, config, hello, run, want};
use crate::{
    control::{
        lanes::{Connecting, LaneConnector, Prepared},
        refusal::Refusal,
    },
    lane::{LaneError, ticket::LaneTicket},
};

fn release(claim: Option<ClaimId>) -> Release {
    Release { claim, offer: OfferId::random(), token: Token::random(), reader: Reader::ONLY, all: false }
}

#[test]
fn a_claim_is_granted_and_its_release_arrives() {
    let rig = Rig::new(&config());
    let consumer = Consumer::new(rig.addr, config());
    let claim = consumer.claim(1, &rig.desk.me);
    assert_eq!(consumer.welcome().peer, rig.desk.me);
    assert_eq!(consumer.answer(), (claim, None));
    let sent = release(Some(claim));
    consumer.handle.release(rig.desk.me.incarnation, sent.clone());
    assert_eq!(rig.release().2, sent);
    consumer.close();
    rig.closed();
}

#[test]
fn a_revoked_claim_is_lost_with_its_reason() {
    let rig = Rig::new(&config());
    let consumer = Consumer::new(rig.addr, config());
    let want = want(1, &rig.desk.me);
    consumer.handle.claim(want.clone());
    assert_eq!(consumer.answer(), (want.claim, None));
    let revoked = ServerBody::Revoked { offer: want.offer, why: Gone::HardCap };
    assert!(rig.desk.outbox(rig.opened()).send(ServerFrame { ack: 0, body: Some(revoked) }));
    assert_eq!(consumer.answer(), (want.claim, Some(Cause::Expired)));
}

#[test]
fn a_release_is_sent_again_after_the_stream_broke_until_it_is_acknowledged() {
    let rig = Rig::new(&config());
    rig.desk.acknowledges.store(false, Ordering::SeqCst);
    let consumer = Consumer::new(rig.addr, config());
    let sent = release(None);
    consumer.handle.release(rig.desk.me.incarnation, sent.clone());
    let (first, seq, got) = rig.release();
    assert_eq!(got, sent);
    rig.desk.outbox(first).end(&Refusal::Precondition("a broken stream".into()));
    assert_eq!(rig.closed(), first);
    rig.desk.acknowledges.store(true, Ordering::SeqCst);
    let again = loop {
        let again = rig.release();
        if again.0 != first {
            break again;
        }
    };
    assert_eq!((again.1, again.2), (seq, sent), "the same release under the same number");
    // Closing waits for the acknowledgement.
    consumer.close();
}

#[test]
fn a_peer_that_dies_loses_its_claims_soon() {
    let rig = Rig::new(&config());
    let consumer = Consumer::new(rig.addr, config());
    let claim = consumer.claim(1, &rig.desk.me);
    assert_eq!(consumer.answer(), (claim, None));
    rig.die();
    assert_eq!(consumer.answer(), (claim, Some(Cause::PeerDown)));
}

#[test]
fn a_peer_restarted_at_the_same_address_is_served_again_and_old_claims_are_lost() {
    let rig = Rig::new(&config());
    let (addr, old) = (rig.addr, rig.desk.me.clone());
    let consumer = Consumer::new(addr, config());
    let held = consumer.claim(1, &old);
    assert_eq!(consumer.answer(), (held, None));
    rig.server.shutdown();
    run(rig.server.stopped());
    rig.die();
    let (lost, cause) = consumer.answer();
    assert_eq!(lost, held);
    assert!(matches!(cause, Some(Cause::PeerDown | Cause::PeerRestarted)), "{cause:?}");
    let reborn = Rig::at(addr, &config());
    let new = consumer.claim(2, &reborn.desk.me);
    assert_eq!(consumer.answer(), (new, None), "the same task serves the new peer");
    let late = consumer.claim(3, &old);
    assert_eq!(consumer.answer(), (late, Some(Cause::PeerRestarted)));
}

#[test]
fn a_second_hello_leaves_the_running_session_alone() {
    let rig = Rig::new(&config());
    let consumer = Consumer::new(rig.addr, config());
    let held = consumer.claim(1, &rig.desk.me);
    assert_eq!(consumer.answer(), (held, None));
    let session = rig.opened();
    // A claim on another incarnation of the peer makes the session dial again.
    let mut other = rig.desk.me.clone();
    other.incarnation = Incarnation::random();
    let stale = consumer.claim(2, &other);
    assert_eq!(consumer.answer(), (stale, Some(Cause::PeerRestarted)));
    rig.seen(|s| match s {
        Seen::Hello => Some(()),
        Seen::Opened(_) | Seen::Closed(_) => panic!("the session was touched: {s:?}"),
        Seen::Frame(..) => None,
    });
    let next = consumer.claim(3, &rig.desk.me);
    assert_eq!(consumer.answer(), (next, None));
    rig.seen(|s| match s {
        Seen::Frame(id, f) if matches!(f.body, kvferry_proto::ClientBody::Claim { claim, .. } if claim == next) => {
            assert_eq!(id, session, "on the same session");
            Some(())
        }
        Seen::Opened(_) | Seen::Closed(_) => panic!("the session was touched: {s:?}"),
        _ => None,
    });
}

#[test]
fn a_peer_that_refuses_every_session_is_dialled_with_backoff() {
    let mut c = config();
    c.session.redial_min = Duration::from_millis(40);
    let rig = Rig::new(&c);
    rig.desk.refuses_sessions.store(true, Ordering::SeqCst);
    let consumer = Consumer::new(rig.addr, c);
    let began = Instant::now();
    let claim = consumer.claim(1, &rig.desk.me);
    for _ in 0..6 {
        rig.opened();
    }
    // Between the second and the sixth dial there are four waits of at least 20, 40, 50 and 50 ms: half of the doubling
    // wait, up to the longest. A slow machine makes the sum longer, never shorter.
    assert!(began.elapsed() >= Duration::from_millis(160), "{:?}", began.elapsed());
    rig.desk.refuses_sessions.store(false, Ordering::SeqCst);
    assert_eq!(consumer.answer(), (claim, None), "and the claim is granted once sessions are accepted");
}

#[test]
fn an_unused_session_is_dropped_and_can_be_used_again() {
    let mut c = config();
    c.session.idle = Duration::from_millis(300);
    let rig = Rig::new(&c);
    let consumer = Consumer::new(rig.addr, c);
    let claim = consumer.claim(1, &rig.desk.me);
    assert_eq!(consumer.answer(), (claim, None));
    consumer.handle.release(rig.desk.me.incarnation, release(Some(claim)));
    consumer.event(|e| matches!(e, In::Dropped(_)).then_some(()));
    rig.closed();
    let again = consumer.claim(2, &rig.desk.me);
    assert_eq!(consumer.answer(), (again, None));
}

#[test]
fn dropping_the_handle_ends_the_session() {
    let rig = Rig::new(&config());
    let consumer = Consumer::new(rig.addr, config());
    let claim = consumer.claim(1, &rig.desk.me);
    assert_eq!(consumer.answer(), (claim, None));
    let rest = consumer.close();
    rig.closed();
    assert!(matches!(rest[..], [In::Lost(c, Cause::Shutdown)] if c == claim), "and its task has ended");
}

#[test]
fn a_server_that_shuts_down_closes_its_port_and_its_sessions() {
    let rig = Rig::new(&config());
    let consumer = Consumer::new(rig.addr, config());
    let claim = consumer.claim(1, &rig.desk.me);
    assert_eq!(consumer.answer(), (claim, None));
    rig.server.shutdown();
    run(rig.server.stopped());
    rig.closed();
    assert_eq!((rig.server.sessions(), rig.server.connections()), (0, 0));
    TcpListener::bind(rig.addr).expect("the port is free");
    assert_eq!(consumer.answer(), (claim, Some(Cause::PeerDown)));
}

/// Records its tickets, and fails.
#[derive(Default)]
struct Tickets {
    seen: Mutex<Vec<(LaneTicket, SocketAddr)>>,
    on_gpu: bool,
}

impl Tickets {
    fn kinds(&self) -> Vec<LaneKind> {
        self.seen.lock().unwrap().iter().map(|(ticket, _)| ticket.kind()).collect()
    }
}

impl LaneConnector for Tickets {
    fn on_gpu(&self) -> bool {
        self.on_gpu
    }

    fn connect(&self, ticket: LaneTicket, _: Prepared, _: Arc<Welcome>, peer: SocketAddr) -> Connecting<'_> {
        self.seen.lock().unwrap().push((ticket, peer));
        Box::pin(async { Err(LaneError::Refused { why: "this is a test".into() }) })
    }
}

fn no_lane(consumer: &Consumer, incarnation: Incarnation, kinds: &[LaneKind]) -> Cause {
    let wish = LaneWish { expect: incarnation, kinds: kinds.to_vec(), need: Need::Now };
    consumer.handle.connect_lane(wish);
    consumer.event(|e| match e {
        In::Lane { incarnation: i, lane, .. } => {
            assert_eq!(i, incarnation);
            Some(lane.err().expect("an error"))
        }
        _ => None,
    })
}

#[test]
fn lanes_that_cannot_work_are_skipped_and_the_others_are_tried_in_order() {
    let rig = Rig::new(&config());
    let tickets = Arc::new(Tickets::default());
    let consumer = Consumer::with(rig.addr, config(), hello(), tickets.clone());
    let me = rig.desk.me.incarnation;
    assert_eq!(no_lane(&consumer, me, &[LaneKind::Tcp]), Cause::Unreachable, "there is no session yet");
    let claim = consumer.claim(1, &rig.desk.me);
    assert_eq!(consumer.answer(), (claim, None));
    // verbs is not served, local is on another host.
    let kinds = [LaneKind::Verbs, LaneKind::Local, LaneKind::Tcp];
    assert_eq!(no_lane(&consumer, me, &kinds), Cause::LaneFailed);
    let got = tickets.seen.lock().unwrap().clone();
    assert_eq!(got, [(LaneTicket::Tcp { host: None, port: 9, lane: 5, key: [3; 32] }, rig.addr)]);
    assert_eq!(no_lane(&consumer, Incarnation::random(), &kinds), Cause::Unreachable, "another incarnation");
}

#[test]
fn a_local_lane_to_gpu_memory_is_requested_only_for_gpu_memory() {
    let kinds = [LaneKind::Local, LaneKind::Tcp];
    for (producer, consumer, tried) in [
        (None, false, &kinds[..]),
        (None, true, &kinds),
        (Some([7; 16]), false, &kinds[1..]),
        (Some([7; 16]), true, &kinds),
    ] {
        let rig = Rig::new(&config());
        *rig.desk.gpu_uuid.lock().unwrap() = producer;
        let tickets = Arc::new(Tickets { on_gpu: consumer, ..Tickets::default() });
        let hello = Hello { host: "host-b".into(), ..hello() };
        let consumer = Consumer::with(rig.addr, config(), hello, tickets.clone());
        let claim = consumer.claim(1, &rig.desk.me);
        assert_eq!(consumer.answer(), (claim, None));
        assert_eq!(no_lane(&consumer, rig.desk.me.incarnation, &kinds), Cause::LaneFailed);
        assert_eq!(tickets.kinds(), tried, "{producer:?}");
    }
}

#[test]
fn a_consumer_waits_for_a_lane_that_is_not_ready_yet() {
    let rig = Rig::new(&config());
    let tickets = Arc::new(Tickets::default());
    let consumer = Consumer::with(rig.addr, config(), hello(), tickets.clone());
    let claim = consumer.claim(1, &rig.desk.me);
    assert_eq!(consumer.answer(), (claim, None));
    rig.desk.not_yet.store(3, Ordering::SeqCst);
    assert_eq!(no_lane(&consumer, rig.desk.me.incarnation, &[LaneKind::Tcp]), Cause::LaneFailed);
    assert_eq!(tickets.kinds().len(), 1, "the fourth answer was a ticket, in the same call");
    // The wait is bounded: the pull is told that the lane is unreachable.
    rig.desk.not_yet.store(u64::MAX, Ordering::SeqCst);
    assert_eq!(no_lane(&consumer, rig.desk.me.incarnation, &[LaneKind::Tcp]), Cause::Unreachable);
}
