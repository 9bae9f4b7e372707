//! A consumer's session with one producer address.

mod growing;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kvferry_proto::{
    Cause, ClaimId, ClientBody, ClientFrame, Contents, Gone, Grant, HelloError, Incarnation, Machine, Mismatch, Nonce,
    OfferId, PeerId, Rank, Reader, Release, ServerBody, ServerFrame, SessionConfig, Token,
    session::{Health, In, Out, PeerSession, Want},
};

const MILLI: Duration = Duration::from_millis(1);
const NANO: Duration = Duration::from_nanos(1);

/// A session with a clock.
struct Session {
    machine: PeerSession,
    now: Instant,
    /// The stream that was opened last.
    stream: u64,
}

impl Session {
    fn new() -> Self {
        let start = Instant::now();
        let machine = PeerSession::new(start, peer("me", 1), SessionConfig::default(), 1000, Box::new(|| u64::MAX));
        Self { machine, now: start, stream: 0 }
    }

    /// An idle session that is up with the producer's process `n`.
    fn up(n: u64) -> Self {
        let mut s = Self::new();
        s.claim(999, n);
        s.welcome(n);
        s.opened(n);
        s.answer(ServerBody::Gone { claim: ClaimId(999), why: Gone::Unknown });
        s.outs();
        s
    }

    /// Moves the clock on by `by`, through every timeout.
    fn wait(&mut self, by: Duration) {
        let then = self.now + by;
        while let Some(t) = self.machine.next_timeout().filter(|t| *t <= then) {
            self.machine.tick(t);
        }
        self.now = then;
        self.machine.tick(then);
    }

    /// The same with a peer that answers every ping at once.
    fn wait_answered(&mut self, by: Duration) -> Vec<Out> {
        let (then, mut all) = (self.now + by, Vec::new());
        while self.now < then {
            self.now = self.machine.next_timeout().map_or(then, |t| t.min(then));
            self.machine.tick(self.now);
            let outs = self.outs();
            for o in &outs {
                if let Out::Send(ClientFrame { body: ClientBody::Ping(n), .. }) = o {
                    self.answer(ServerBody::Pong(*n));
                }
            }
            all.extend(outs);
        }
        all
    }

    fn tell(&mut self, event: In) {
        self.machine.handle(self.now, event);
    }

    /// Claims an offer of the producer's process `of`.
    fn claim(&mut self, claim: u64, of: u64) {
        self.tell(In::Claim(want(claim, of)));
    }

    /// A claim that is granted.
    fn hold(&mut self, claim: u64, of: u64) {
        self.claim(claim, of);
        self.grant(claim);
        self.outs();
    }

    fn grant(&mut self, claim: u64) {
        let nonce = Nonce::from_wire(claim).unwrap();
        self.answer(ServerBody::Granted {
            claim: ClaimId(claim),
            grant: Grant { slot: 3, nonce },
            contents: whole(),
            growths: 0,
            remaining: Duration::from_secs(10),
        });
    }

    fn release(&mut self, claim: u64, of: u64) {
        let release =
            Release { claim: Some(ClaimId(claim)), offer: id(claim), token: token(), reader: Reader::ONLY, all: false };
        self.tell(In::Release { expect: incarnation(of), release });
    }

    fn answer(&mut self, body: ServerBody) {
        self.tell(In::Frame(self.stream, ServerFrame { ack: 0, body: Some(body) }));
    }

    fn ack(&mut self, ack: u64) {
        self.tell(In::Frame(self.stream, ServerFrame { ack, body: None }));
    }

    /// The dial finds the producer's process `n`.
    fn welcome(&mut self, n: u64) {
        self.tell(In::Welcomed(peer("them", n)));
    }

    fn opened(&mut self, n: u64) {
        self.outs(); // learns the stream's number
        self.answer(ServerBody::Opened(incarnation(n)));
    }

    fn refused(&mut self) {
        self.unreachable(true);
    }

    fn unreachable(&mut self, refused: bool) {
        let why = String::new();
        self.tell(In::DialFailed(HelloError::Unreachable { addr: "x:1".into(), why, refused }));
    }

    fn breaks(&mut self) {
        self.tell(In::Broken(self.stream));
    }

    fn outs(&mut self) -> Vec<Out> {
        let outs: Vec<_> = std::iter::from_fn(|| self.machine.poll()).collect();
        for o in &outs {
            if let Out::Open(n) = o {
                self.stream = *n;
            }
        }
        outs
    }
}

fn incarnation(n: u64) -> Incarnation {
    Incarnation::from_wire(n).unwrap()
}

fn peer(engine: &str, n: u64) -> PeerId {
    PeerId { engine: engine.parse().unwrap(), rank: Rank(0), incarnation: incarnation(n) }
}

fn want(claim: u64, of: u64) -> Want {
    Want {
        claim: ClaimId(claim),
        offer: id(claim),
        token: token(),
        number: 0,
        engine: "them".parse().unwrap(),
        rank: Rank(0),
        expect: incarnation(of),
        reader: Reader::ONLY,
        awaited: false,
    }
}

/// Contents that do not grow.
fn whole() -> Arc<Contents> {
    Arc::new(Contents { complete: true, ..Contents::default() })
}

fn token() -> Token {
    Token::from_bytes([5; 16])
}

fn id(n: u64) -> OfferId {
    OfferId { high: 7, low: n }
}

fn lost(claim: u64, cause: Cause) -> Out {
    Out::Lost { claim: ClaimId(claim), cause }
}

/// The claims that were sent.
fn claims(outs: &[Out]) -> Vec<u64> {
    let sent = |o: &Out| match o {
        Out::Send(ClientFrame { body: ClientBody::Claim { claim, .. }, .. }) => Some(claim.0),
        _ => None,
    };
    outs.iter().filter_map(sent).collect()
}

/// The sequence numbers and offers of the releases that were sent.
fn releases(outs: &[Out]) -> Vec<(u64, u64)> {
    let sent = |o: &Out| match o {
        Out::Send(ClientFrame { seq, body: ClientBody::Release(r) }) => Some((*seq, r.offer.low)),
        _ => None,
    };
    outs.iter().filter_map(sent).collect()
}

fn losses(outs: Vec<Out>) -> Vec<Out> {
    outs.into_iter().filter(|o| matches!(o, Out::Lost { .. })).collect()
}

#[test]
fn a_claim_dials_says_hello_opens_and_is_granted_in_this_order() {
    let mut s = Session::new();
    s.claim(1, 2);
    assert_eq!(s.outs(), [Out::Dial]);
    s.welcome(2);
    let outs = s.outs();
    assert!(
        matches!(&outs[..], [Out::Peer(_), Out::Open(1), Out::Send(f)] if matches!(f.body, ClientBody::Open { .. }))
    );
    s.opened(2);
    let outs = s.outs();
    assert_eq!(claims(&outs), [1]);
    s.grant(1);
    s.grant(1);
    let grant = Grant { slot: 3, nonce: Nonce::from_wire(1).unwrap() };
    let granted = Out::Granted { claim: ClaimId(1), grant, contents: whole() };
    assert_eq!(s.outs(), [granted], "a repeated grant is told once");
}

#[test]
fn a_claim_for_another_incarnation_probes_while_the_stream_stays() {
    let mut s = Session::up(2);
    s.hold(1, 2);
    s.claim(2, 3);
    assert_eq!(s.outs(), [Out::Dial], "the claim is not sent to the wrong process, and the stream stays");
    // The old process answers: the new claim was for a dead one, and the held claim stays.
    s.welcome(2);
    assert_eq!(s.outs(), [lost(2, Cause::PeerRestarted)]);
    assert_eq!(s.machine.claims(), 1);
    s.claim(3, 2);
    assert_eq!(claims(&s.outs()), [3], "the stream is still good");
}

#[test]
fn a_failed_probe_touches_nothing_of_the_live_stream() {
    let mut s = Session::up(2);
    s.hold(1, 2);
    s.claim(2, 3);
    s.refused();
    let outs = s.outs();
    assert!(!outs.iter().any(|o| matches!(o, Out::HangUp | Out::Lost { .. } | Out::Health(_))), "{outs:?}");
    assert_eq!(s.machine.health(), Health::Up);
}

#[test]
fn a_restart_at_the_same_address_loses_the_old_claims_and_grants_the_new() {
    let mut s = Session::up(2);
    s.hold(1, 2);
    s.claim(2, 3);
    s.outs();
    s.welcome(3);
    let outs = s.outs();
    assert!(outs.contains(&lost(1, Cause::PeerRestarted)), "{outs:?}");
    assert!(outs.contains(&Out::Peer(peer("them", 3))) && outs.contains(&Out::Health(Health::Reborn)), "{outs:?}");
    assert_eq!(s.machine.peer(), Some(&peer("them", 3)));
    s.opened(3);
    assert_eq!(claims(&s.outs()), [2]);
    s.grant(2);
    assert!(matches!(s.outs()[..], [Out::Granted { claim: ClaimId(2), .. }]));
    // A process that is known to be dead gets no more claims.
    s.claim(4, 2);
    assert_eq!(s.outs(), [lost(4, Cause::PeerRestarted)]);
}

#[test]
fn frames_of_an_old_stream_are_ignored() {
    let mut s = Session::up(2);
    s.hold(1, 2);
    s.breaks();
    s.welcome(2);
    s.outs();
    let old = s.stream - 1;
    let frame = ServerFrame { ack: 0, body: Some(ServerBody::Gone { claim: ClaimId(1), why: Gone::Expired }) };
    s.tell(In::Frame(old, frame));
    s.tell(In::Broken(old));
    assert_eq!(s.outs(), []);
}

#[test]
fn a_broken_stream_is_redialled_at_once_and_the_same_process_resumes_the_claims() {
    let mut s = Session::up(2);
    s.hold(1, 2);
    s.breaks();
    assert_eq!(s.outs(), [Out::HangUp, Out::Health(Health::Down), Out::Dial]);
    s.welcome(2);
    s.opened(2);
    assert_eq!(claims(&s.outs()), [1], "claimed again: the producer may have forgotten");
}

#[test]
fn a_refused_redial_ends_granted_claims_with_peer_down() {
    let mut s = Session::up(2);
    s.hold(1, 2);
    s.breaks();
    s.refused();
    assert_eq!(losses(s.outs()), [lost(1, Cause::PeerDown)]);
}

#[test]
fn a_refused_first_dial_ends_claims_with_unreachable() {
    let mut s = Session::new();
    s.claim(1, 2);
    s.outs();
    s.wait(MILLI);
    s.refused();
    assert_eq!(losses(s.outs()), [lost(1, Cause::Unreachable)]);
}

#[test]
fn a_dial_without_an_answer_is_tried_again_and_keeps_the_claims() {
    let mut s = Session::new();
    s.claim(1, 2);
    s.outs();
    s.unreachable(false);
    assert_eq!(losses(s.outs()), []);
    s.wait(Duration::from_millis(20));
    assert_eq!(s.outs(), [Out::Dial]);
}

#[test]
fn a_handshake_that_is_refused_ends_the_claims_with_its_cause() {
    let mut s = Session::new();
    s.claim(1, 2);
    s.outs();
    s.tell(In::DialFailed(HelloError::Version { here: "1".into(), there: "9".into() }));
    assert_eq!(losses(s.outs()), [lost(1, Cause::Refused)]);
}

#[test]
fn a_session_that_is_refused_ends_its_claims_with_the_cause_and_later_ones_dial_again() {
    let mut s = Session::new();
    s.claim(1, 7);
    s.welcome(7);
    s.outs();
    s.tell(In::Refused(s.stream - 1, Cause::Limit));
    assert_eq!(s.outs(), [], "an older stream");
    s.tell(In::Refused(s.stream, Cause::Limit));
    let outs = s.outs();
    assert_eq!(outs.first(), Some(&lost(1, Cause::Limit)));
    assert!(outs.contains(&Out::HangUp) && !outs.contains(&Out::Dial), "{outs:?}");
    s.claim(2, 7);
    assert!(s.outs().contains(&Out::Dial));
}

#[test]
fn another_engine_at_the_address_does_not_get_the_claims() {
    let mut s = Session::new();
    s.claim(1, 2);
    s.outs();
    s.tell(In::Welcomed(peer("strangers", 2)));
    assert_eq!(losses(s.outs()), [lost(1, Cause::Refused)]);
}

/// A name that gives one rank's process for another rank would load that rank's heads twice, and the others not at all.
#[test]
fn a_claim_for_another_rank_or_engine_of_the_process_is_refused_also_on_a_stream_that_is_up() {
    for (engine, rank) in [("them", 1), ("others", 0)] {
        for up in [false, true] {
            let mut s = if up { Session::up(2) } else { Session::new() };
            s.tell(In::Claim(Want { engine: engine.parse().unwrap(), rank: Rank(rank), ..want(1, 2) }));
            let mut outs = s.outs();
            if !up {
                s.tell(In::Welcomed(peer("them", 2)));
                outs = s.outs();
            }
            assert_eq!(losses(outs), [lost(1, Cause::Refused)], "{engine} {rank}");
        }
    }
}

#[test]
fn releases_are_resent_until_they_are_acknowledged() {
    let mut s = Session::up(2);
    s.hold(1, 2);
    s.release(1, 2);
    let first = releases(&s.outs());
    assert!(matches!(first[..], [(seq, 1)] if seq > 0), "{first:?}");
    let mut again = s.wait_answered(Duration::from_millis(1500));
    assert_eq!(releases(&again), first);
    // Through a broken stream too.
    s.breaks();
    s.welcome(2);
    s.opened(2);
    again = s.outs();
    assert_eq!(releases(&again), first);
    s.ack(first[0].0);
    assert_eq!(s.machine.unacked(), 0);
    assert_eq!(releases(&s.wait_answered(Duration::from_secs(5))), []);
}

#[test]
fn what_a_mismatched_pair_claimed_is_released_without_a_session() {
    let mut s = Session::new();
    s.claim(1, 2);
    assert_eq!(s.outs(), [Out::Dial]);
    let mismatch =
        || HelloError::Mismatch(Mismatch { field: "weights".into(), consumer: "a".into(), producer: "b".into() });
    s.tell(In::DialFailed(mismatch()));
    assert_eq!(losses(s.outs()), [lost(1, Cause::Refused)]);
    s.release(1, 2);
    s.wait(Duration::from_secs(1));
    s.tell(In::DialFailed(mismatch()));
    let outs = s.outs();
    let alone = |o: &Out| matches!(o, Out::ReleaseAlone(expect, r) if *expect == incarnation(2) && r.offer == id(1));
    assert_eq!(outs.iter().filter(|o| alone(o)).count(), 1, "{outs:?}");
    assert_eq!(s.machine.unacked(), 0);
}

#[test]
fn releases_of_an_incarnation_that_is_gone_are_dropped() {
    let mut s = Session::up(2);
    s.hold(1, 2);
    s.release(1, 2);
    s.breaks();
    s.outs();
    s.welcome(3);
    s.opened(3);
    assert_eq!(releases(&s.outs()), []);
    assert_eq!(s.machine.unacked(), 0);
    s.release(1, 2);
    assert_eq!((s.outs(), s.machine.unacked()), (vec![], 0), "a new release is dropped too");
}

#[test]
fn a_claim_of_an_offer_that_is_not_ready_is_sent_again_when_the_peer_says() {
    let mut s = Session::up(2);
    s.claim(1, 2);
    s.outs();
    s.answer(ServerBody::NotYet { claim: ClaimId(1), retry: 30 * MILLI });
    s.wait(30 * MILLI - NANO);
    assert_eq!(claims(&s.outs()), [0; 0]);
    s.wait(NANO);
    assert_eq!(claims(&s.outs()), [1]);
    // A peer's word is bounded.
    s.answer(ServerBody::NotYet { claim: ClaimId(1), retry: Duration::MAX });
    s.wait(500 * MILLI);
    assert_eq!(claims(&s.outs()), [1]);
}

#[test]
fn a_revoked_offer_loses_its_claims() {
    let mut s = Session::up(2);
    s.hold(1, 2);
    s.hold(2, 2);
    s.answer(ServerBody::Revoked { offer: id(1), why: Gone::Revoked });
    assert_eq!(s.outs(), [lost(1, Cause::Revoked)]);
}

#[test]
fn held_claims_are_renewed_with_every_heartbeat() {
    let mut s = Session::up(2);
    s.hold(1, 2);
    let outs = s.wait_answered(Duration::from_secs(5));
    let renewals = outs
        .iter()
        .filter(|o| matches!(o, Out::Send(ClientFrame { body: ClientBody::Renew(c), .. }) if *c == [ClaimId(1)]))
        .count();
    assert_eq!(renewals, 10, "one each half second");
}

#[test]
fn a_suspect_peer_gets_no_new_claims_until_it_answers() {
    let mut s = Session::up(2);
    s.hold(1, 2);
    s.wait(Duration::from_millis(2600));
    assert_eq!(s.machine.health(), Health::Suspect);
    s.outs();
    s.claim(2, 2);
    assert_eq!(claims(&s.outs()), [0; 0]);
    s.answer(ServerBody::Pong(1));
    assert_eq!(s.machine.health(), Health::Up);
    assert_eq!(claims(&s.outs()), [2]);
}

#[test]
fn silence_past_the_limit_goes_down_and_dials_at_once() {
    let mut s = Session::up(2);
    s.hold(1, 2);
    s.wait(500 * MILLI);
    s.outs(); // the ping that stays unanswered
    s.wait(Duration::from_secs(1));
    assert!(s.outs().contains(&Out::Dial), "the second dial");
    s.unreachable(false);
    s.wait(20 * MILLI);
    assert!(s.outs().contains(&Out::Dial), "and again, while the stream stays");
    s.wait(Duration::from_secs(9) - 20 * MILLI - NANO);
    s.unreachable(false);
    let outs = s.outs();
    assert!(!outs.contains(&Out::HangUp), "{outs:?}");
    s.wait(NANO);
    let outs = s.outs();
    assert_eq!(outs, [Out::HangUp, Out::Health(Health::Down), Out::Dial]);
    assert_eq!(s.machine.claims(), 1, "the answer to the dial decides");
}

#[test]
fn an_idle_session_expires_and_one_that_holds_a_claim_does_not() {
    let mut s = Session::up(2);
    s.hold(1, 2);
    let outs = s.wait_answered(Duration::from_secs(600));
    assert!(!outs.contains(&Out::Expired));
    s.release(1, 2);
    let seq = releases(&s.outs())[0].0;
    s.ack(seq);
    assert!(!s.wait_answered(Duration::from_secs(300) - NANO).contains(&Out::Expired));
    let outs = s.wait_answered(NANO);
    assert!(outs.ends_with(&[Out::HangUp, Out::Expired]), "{outs:?}");
}

#[test]
fn a_closing_session_loses_its_claims_and_expires_when_its_releases_are_out() {
    let mut s = Session::up(2);
    s.hold(1, 2);
    s.hold(2, 2);
    s.release(1, 2);
    let seq = releases(&s.outs())[0].0;
    s.tell(In::Close);
    assert_eq!(s.outs(), [lost(2, Cause::Shutdown)]);
    s.ack(seq);
    s.wait(NANO);
    assert_eq!(s.outs(), [Out::HangUp, Out::Expired]);
}

/// Breaks the stream `lived` after it opened; how long the session waits before it dials.
fn wait_after_break(s: &mut Session, lived: Duration) -> Duration {
    s.wait_answered(lived);
    s.breaks();
    let from = s.now;
    while !s.outs().contains(&Out::Dial) {
        s.now = s.machine.next_timeout().expect("a dial is scheduled");
        s.machine.tick(s.now);
    }
    let waited = s.now - from;
    s.welcome(2);
    s.opened(2);
    s.outs();
    waited
}

#[test]
fn a_peer_whose_streams_break_at_once_is_redialled_more_and_more_slowly() {
    let mut s = Session::new();
    s.claim(1, 2);
    s.welcome(2);
    s.opened(2);
    s.outs();
    let waits: Vec<_> = (0..12).map(|_| wait_after_break(&mut s, MILLI)).collect();
    assert_eq!(waits[0], Duration::ZERO, "the first one may be an accident");
    assert!(waits[1..].windows(2).all(|w| w[0] > Duration::ZERO && w[0] <= w[1]), "{waits:?}");
    assert!(waits[11] >= Duration::from_secs(1), "{waits:?}");
    // A stream that lived for a while resets the waits.
    assert_eq!(wait_after_break(&mut s, Duration::from_secs(1)), Duration::ZERO);
    assert_eq!(wait_after_break(&mut s, MILLI), Duration::ZERO);
    let after = wait_after_break(&mut s, MILLI);
    assert!(after > Duration::ZERO && after <= 20 * MILLI, "from the shortest wait again: {after:?}");
}

#[test]
fn a_failed_dial_says_nothing_about_claims_and_releases_that_were_made_after_it_began() {
    let version = HelloError::Version { here: "1".into(), there: "9".into() };
    let refused = HelloError::Unreachable { addr: "x:1".into(), why: String::new(), refused: true };
    for (error, cause, unacked) in [(version, Cause::Refused, 1), (refused, Cause::Unreachable, 2)] {
        let mut s = Session::new();
        s.claim(1, 2);
        s.release(8, 2);
        s.unreachable(false);
        s.wait(20 * MILLI);
        assert_eq!(s.outs(), [Out::Dial, Out::Health(Health::Down), Out::Dial]);
        s.claim(2, 3);
        s.release(9, 3);
        s.tell(In::DialFailed(error));
        assert_eq!(losses(s.outs()), [lost(1, cause)]);
        assert_eq!((s.machine.claims(), s.machine.unacked()), (1, unacked));
        // The second wait is longer, but claim 2 need not sit it out.
        s.wait(20 * MILLI - NANO);
        assert_eq!(s.outs(), []);
        s.wait(NANO);
        assert_eq!(s.outs(), [Out::Dial]);
    }
}

#[test]
fn a_session_is_up_while_its_peer_answers_on_an_open_stream() {
    let mut s = Session::new();
    s.claim(1, 2);
    s.welcome(2);
    assert!(!s.machine.is_up());
    s.opened(2);
    assert!(s.machine.is_up());
    s.wait(Duration::from_millis(2600));
    assert!(!s.machine.is_up(), "it is silent");
    s.answer(ServerBody::Pong(1));
    assert!(s.machine.is_up());
    s.release(1, 2);
    assert_eq!(s.machine.claims(), 0);
    s.breaks();
    assert!(!s.machine.is_up());
}

#[test]
fn a_stream_that_is_opening_is_silent_until_it_is_down_and_never_suspect() {
    let mut s = Session::new();
    s.claim(1, 2);
    s.welcome(2);
    s.wait(Duration::from_secs(10) - NANO);
    assert_eq!(s.machine.health(), Health::Up);
    s.wait(NANO);
    assert_eq!(s.machine.health(), Health::Down);
}

#[test]
fn a_claim_cuts_a_long_wait_for_the_next_dial_to_the_shortest() {
    let mut s = Session::new();
    s.claim(1, 2);
    for _ in 0..9 {
        s.unreachable(false);
        s.wait(Duration::from_secs(2));
    }
    s.unreachable(false);
    s.outs();
    s.claim(2, 2);
    s.wait(20 * MILLI - NANO);
    assert_eq!(s.outs(), []);
    s.wait(NANO);
    assert_eq!(s.outs(), [Out::Dial]);
}

/// A session that is up, with a claim on its way that has been unanswered for `silent`.
fn silent_for(silent: Duration) -> Session {
    let mut s = Session::up(2);
    s.claim(1, 2);
    assert_eq!(claims(&s.outs()), [1]);
    s.wait(silent);
    s
}

fn granted(claim: u64) -> Out {
    let grant = Grant { slot: 3, nonce: Nonce::from_wire(claim).unwrap() };
    Out::Granted { claim: ClaimId(claim), grant, contents: whole() }
}

#[test]
fn a_silent_stream_gets_a_second_dial_and_the_session_moves_if_only_that_is_answered() {
    let mut s = silent_for(Duration::from_secs(1) - NANO);
    assert!(!s.outs().contains(&Out::Dial));
    s.wait(NANO);
    let outs = s.outs();
    assert!(outs.contains(&Out::Dial) && !outs.contains(&Out::HangUp), "the first stream stays open: {outs:?}");
    s.wait(500 * MILLI);
    assert!(!s.outs().contains(&Out::Dial), "one is enough");
    let old = s.stream;
    s.welcome(2);
    let outs = s.outs();
    assert!(
        matches!(&outs[..], [Out::Peer(_), Out::Open(_), Out::Send(f)] if matches!(f.body, ClientBody::Open { .. }))
    );
    assert_ne!(s.stream, old);
    // The first connection answers after all: its grant does not count any more.
    let (first, second) = (Nonce::from_wire(9).unwrap(), Nonce::from_wire(1).unwrap());
    let grant = |nonce| {
        let grant = Grant { slot: 3, nonce };
        let (claim, contents, remaining) = (ClaimId(1), whole(), Duration::ZERO);
        ServerFrame { ack: 0, body: Some(ServerBody::Granted { claim, grant, contents, growths: 0, remaining }) }
    };
    s.tell(In::Frame(old, grant(first)));
    assert_eq!(s.outs(), []);
    s.opened(2);
    assert_eq!(claims(&s.outs()), [1], "the same claim, on the new stream");
    s.tell(In::Frame(s.stream, grant(second)));
    s.tell(In::Frame(old, grant(first)));
    assert_eq!(s.outs(), [granted(1)]);
}

#[test]
fn a_stream_that_answers_before_the_second_dial_does_keeps_the_session() {
    let mut s = silent_for(Duration::from_secs(1));
    assert!(s.outs().contains(&Out::Dial));
    s.grant(1);
    assert_eq!(s.outs(), [granted(1)]);
    let stream = s.stream;
    s.welcome(2);
    assert_eq!((s.outs(), s.stream), (vec![], stream));
    assert!(s.machine.is_up());
}

#[test]
fn a_claim_that_is_held_is_made_again_on_the_second_connection() {
    let mut s = Session::up(2);
    s.hold(1, 2);
    s.wait(Duration::from_millis(1500));
    assert!(s.outs().contains(&Out::Dial), "two pings are unanswered");
    s.welcome(2);
    s.opened(2);
    assert_eq!(claims(&s.outs()), [1], "the producer may have ended it with the first session");
}

#[test]
fn a_silent_stream_to_an_address_where_nothing_listens_is_down() {
    let mut s = silent_for(Duration::from_secs(1));
    s.outs();
    s.refused();
    let outs = s.outs();
    assert!(outs.contains(&Out::HangUp) && outs.contains(&lost(1, Cause::PeerDown)), "{outs:?}");
}

#[test]
fn another_process_that_answers_the_second_dial_loses_the_claims_of_the_first() {
    let mut s = silent_for(Duration::from_secs(1));
    s.outs();
    s.welcome(3);
    assert!(s.outs().contains(&lost(1, Cause::PeerRestarted)));
}

#[test]
fn a_session_without_work_dials_no_second_time() {
    let mut s = Session::up(2);
    s.wait(Duration::from_secs(10));
    let outs = s.outs();
    let pinged = outs.iter().any(|o| matches!(o, Out::Send(ClientFrame { body: ClientBody::Ping(_), .. })));
    assert!(pinged && !outs.contains(&Out::Dial), "{outs:?}");
}

/// What is said of the peer's silence.
fn silence(outs: Vec<Out>) -> Vec<bool> {
    outs.into_iter().filter_map(|o| if let Out::Silent(silent) = o { Some(silent) } else { None }).collect()
}

#[test]
fn silence_is_told_once_and_so_is_its_end() {
    let mut s = silent_for(Duration::from_secs(2) - NANO);
    assert!(silence(s.outs()).is_empty());
    s.wait(NANO);
    assert_eq!(silence(s.outs()), [true]);
    s.wait(Duration::from_secs(1));
    assert!(silence(s.outs()).is_empty());
    s.grant(1);
    assert_eq!(silence(s.outs()), [false]);
}

#[test]
fn a_dial_without_an_answer_is_silence_however_often_it_is_tried() {
    let mut s = Session::new();
    s.claim(1, 2);
    for _ in 0..3 {
        s.wait(500 * MILLI);
        s.unreachable(false);
        assert!(silence(s.outs()).is_empty());
    }
    s.wait(500 * MILLI);
    assert_eq!(silence(s.outs()), [true]);
    s.welcome(2);
    assert_eq!(silence(s.outs()), [false]);
}

#[test]
fn silence_outlasts_the_end_of_its_stream_and_an_answered_break_is_none() {
    let mut s = Session::up(2);
    s.hold(1, 2);
    s.breaks();
    s.wait(Duration::from_secs(2) - NANO);
    assert!(silence(s.outs()).is_empty());
    s.wait(NANO);
    assert_eq!(silence(s.outs()), [true], "the dial is not answered");
    s.welcome(2);
    assert_eq!(silence(s.outs()), [false]);
    s.opened(2);
    s.grant(1);
    s.wait(Duration::from_secs(2));
    assert!(silence(s.outs()).is_empty());
    s.breaks();
    s.wait(500 * MILLI);
    assert_eq!(silence(s.outs()), [true], "it began before the break");
}

#[test]
fn a_session_that_is_down_and_has_no_work_is_not_silent() {
    let mut s = Session::up(2);
    s.hold(1, 2);
    s.wait(Duration::from_secs(3));
    assert_eq!(silence(s.outs()), [true]);
    s.release(1, 2);
    let (seq, _) = releases(&s.outs())[0];
    s.breaks();
    s.outs();
    s.welcome(2);
    s.opened(2);
    s.ack(seq);
    s.outs();
    s.breaks();
    s.wait(Duration::from_secs(3));
    assert!(silence(s.outs()).is_empty());
}

#[test]
fn a_stream_that_is_not_answered_is_opened_again_more_and_more_slowly() {
    let mut s = Session::new();
    s.claim(1, 2);
    s.welcome(2);
    let mut waits = Vec::new();
    for _ in 0..4 {
        s.outs();
        let from = s.now;
        while !s.outs().contains(&Out::Dial) {
            s.now = s.machine.next_timeout().expect("a second dial");
            s.machine.tick(s.now);
        }
        waits.push((s.now - from).as_secs());
        s.welcome(2);
        assert!(s.outs().iter().any(|o| matches!(o, Out::Open(_))));
    }
    assert_eq!(waits, [1, 2, 4, 8], "a busy peer gets to answer one of them");
}
