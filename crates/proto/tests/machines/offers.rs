//! The producer's offer table.

mod growing;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kvferry_proto::{
    ClaimId, ClientBody, ClientFrame, Contents, Gone, Incarnation, LeaseConfig, Limits, Machine, OfferError, OfferId,
    PeerId, Rank, Reader, Release, ServerBody, ServerFrame, Token,
    table::{Freed, In, OfferTable, Out},
};
use proptest::prelude::*;

const SECOND: Duration = Duration::from_secs(1);
const NANO: Duration = Duration::from_nanos(1);
/// The defaults, which the tests below count with.
const UNCLAIMED: u32 = 30;
const CLAIMED: u32 = 10;

fn lease(change: impl FnOnce(&mut LeaseConfig)) -> LeaseConfig {
    let mut lease = LeaseConfig::default();
    change(&mut lease);
    lease
}

fn limits(change: impl FnOnce(&mut Limits)) -> Limits {
    let mut limits = Limits::default();
    change(&mut limits);
    limits
}

/// An offer table with a clock.
struct Table {
    table: OfferTable,
    start: Instant,
    now: Instant,
}

impl Table {
    fn new(limits: Limits) -> Self {
        Self::with(LeaseConfig::default(), limits)
    }

    fn with(lease: LeaseConfig, limits: Limits) -> Self {
        let (start, mut seed) = (Instant::now(), 0);
        let entropy = Box::new(move || {
            seed += 1;
            seed
        });
        Self { table: OfferTable::new(lease, limits, entropy), start, now: start }
    }

    /// Moves the clock to so long after the start, by way of every timeout.
    fn at(&mut self, after: Duration) {
        let then = self.start + after;
        while let Some(t) = self.table.next_timeout().filter(|t| *t <= then) {
            self.table.tick(t);
        }
        self.now = then;
        self.table.tick(then);
    }

    fn offer(&mut self, n: u64) {
        self.table.offer(self.now, secret(n), contents(n), true).unwrap();
    }

    fn tell(&mut self, event: In) {
        self.table.handle(self.now, event);
    }

    fn frame(&mut self, from: &PeerId, body: ClientBody) {
        self.tell(In::Frame(from.clone(), ClientFrame { seq: 0, body }));
    }

    /// Claims, and returns the answer.
    fn claim(&mut self, from: &PeerId, claim: u64, offer: u64) -> ServerBody {
        self.claim_as(from, claim, offer, Reader::ONLY)
    }

    fn claim_as(&mut self, from: &PeerId, claim: u64, offer: u64, reader: Reader) -> ServerBody {
        // Each offer's number is the low half of its id.
        let (claim, number) = (ClaimId(claim), offer);
        self.frame(
            from,
            ClientBody::Claim { claim, offer: id(offer), token: token(offer), number, reader, awaited: false },
        );
        let mut answers = self.outs().into_iter().filter_map(|o| match o {
            Out::Send(to, ServerFrame { body: Some(body), .. }) if to == from.incarnation => Some(body),
            _ => None,
        });
        answers.next_back().expect("a claim is answered")
    }

    fn granted(&mut self, from: &PeerId, claim: u64, offer: u64) {
        let answer = self.claim(from, claim, offer);
        assert!(matches!(answer, ServerBody::Granted { .. }), "{answer:?}");
    }

    fn renew(&mut self, from: &PeerId, claim: u64) {
        self.frame(from, ClientBody::Renew(vec![ClaimId(claim)]));
    }

    fn release(&mut self, from: &PeerId, claim: Option<u64>, offer: u64, reader: Reader) {
        let release = Release { claim: claim.map(ClaimId), offer: id(offer), token: token(offer), reader, all: false };
        self.frame(from, ClientBody::Release(release));
    }

    fn outs(&mut self) -> Vec<Out> {
        std::iter::from_fn(|| self.table.poll()).collect()
    }

    fn freed(&mut self) -> Vec<(u64, Gone)> {
        let freed = |o| if let Out::Freed(Freed { offer, why }) = o { Some((offer.low, why)) } else { None };
        self.outs().into_iter().filter_map(freed).collect()
    }
}

fn id(n: u64) -> OfferId {
    OfferId { high: 7, low: n }
}

fn token(n: u64) -> Token {
    Token::from_bytes((u128::from(n) << 64 | 5).to_le_bytes())
}

fn secret(n: u64) -> (OfferId, Token) {
    (id(n), token(n))
}

/// Contents that differ from offer to offer.
fn contents(n: u64) -> Arc<Contents> {
    Arc::new(Contents { tokens: n, whole: n, complete: true, ..Contents::default() })
}

/// A rank of an engine: two of the same letter are of one engine.
fn peer(engine: &str, n: u64) -> PeerId {
    let incarnation = Incarnation::from_wire(n).unwrap();
    PeerId { engine: engine.parse().unwrap(), rank: Rank(n as u32), incarnation }
}

fn gone(claim: u64, why: Gone) -> ServerBody {
    ServerBody::Gone { claim: ClaimId(claim), why }
}

#[test]
fn a_name_that_is_claimed_before_it_is_entered_waits_and_is_granted() {
    let mut b = Table::new(Limits::default());
    let a = peer("a", 1);
    assert!(matches!(b.claim(&a, 1, 1), ServerBody::NotYet { .. }));
    b.at(SECOND);
    assert!(matches!(b.claim(&a, 1, 1), ServerBody::NotYet { .. }));
    b.offer(1);
    b.granted(&a, 1, 1);
}

#[test]
fn a_name_that_is_taken_back_before_it_is_entered_is_revoked_at_once() {
    let mut b = Table::new(Limits::default());
    let a = peer("a", 1);
    assert!(matches!(b.claim(&a, 1, 1), ServerBody::NotYet { .. }));
    b.tell(In::Revoke(id(1)));
    assert_eq!(b.claim(&a, 1, 1), gone(1, Gone::Revoked));
    assert_eq!(b.table.offer(b.now, secret(1), contents(1), true), Err(OfferError::Duplicate(id(1))));
    assert_eq!(b.freed(), []);
}

#[test]
fn a_name_that_is_never_entered_is_unknown_after_the_grace_period() {
    let mut b = Table::new(Limits::default());
    let a = peer("a", 1);
    assert!(matches!(b.claim(&a, 1, 1), ServerBody::NotYet { .. }));
    b.at(2 * SECOND - NANO);
    assert!(matches!(b.claim(&a, 1, 1), ServerBody::NotYet { .. }));
    b.at(2 * SECOND);
    assert_eq!(b.claim(&a, 1, 1), gone(1, Gone::Unknown));
}

#[test]
fn a_release_before_the_offer_is_entered_frees_it_at_once_and_never_publishes_it() {
    let mut b = Table::new(Limits::default());
    let a = peer("a", 1);
    b.release(&a, Some(1), 1, Reader::ONLY);
    b.tell(In::Release(None, id(2), token(2)));
    b.outs();
    b.at(SECOND);
    b.offer(1);
    b.offer(2);
    let freed = |n| Out::Freed(Freed { offer: id(n), why: Gone::Released });
    assert_eq!(b.outs(), [freed(1), freed(2)]);
    assert_eq!(b.table.live(), 0);
    assert_eq!(b.claim(&a, 1, 1), gone(1, Gone::Released));
}

#[test]
fn an_unclaimed_offer_is_freed_at_its_leases_end_and_not_before() {
    let mut b = Table::new(Limits::default());
    b.offer(1);
    b.at(UNCLAIMED * SECOND - NANO);
    assert_eq!(b.freed(), []);
    b.at(UNCLAIMED * SECOND);
    assert_eq!(b.freed(), [(1, Gone::Expired)]);
}

#[test]
fn a_claimed_offer_is_freed_at_the_claims_end_and_not_before() {
    let mut b = Table::new(Limits::default());
    let a = peer("a", 1);
    b.offer(1);
    b.at(25 * SECOND);
    b.granted(&a, 1, 1);
    b.at((25 + CLAIMED) * SECOND - NANO);
    assert_eq!(b.freed(), [], "the claim outlasts the unclaimed lease");
    b.at((25 + CLAIMED) * SECOND);
    assert_eq!(b.freed(), [(1, Gone::Expired)]);
    assert_eq!(b.table.claims(), 0);
}

#[test]
fn a_claim_at_the_leases_end_is_refused_even_if_the_timer_is_late() {
    let mut b = Table::new(Limits::default());
    b.offer(1);
    b.now += UNCLAIMED * SECOND; // no tick
    assert_eq!(b.claim(&peer("a", 1), 1, 1), gone(1, Gone::Expired));
}

#[test]
fn a_renewal_after_the_claims_end_does_not_bring_it_back() {
    let mut b = Table::new(Limits::default());
    let a = peer("a", 1);
    b.offer(1);
    b.granted(&a, 1, 1);
    b.now += CLAIMED * SECOND; // no tick
    b.renew(&a, 1);
    b.at(CLAIMED * SECOND);
    assert_eq!(b.freed(), [(1, Gone::Expired)]);
}

proptest! {
    /// Each renewal: after how many milliseconds, and of which claim.
    #[test]
    fn renewals_in_any_order_cannot_hide_an_end(renewals in proptest::collection::vec((0u64..6000, 0usize..3), 0..30)) {
        let mut b = Table::new(Limits::default());
        let peers = [peer("a", 1), peer("b", 2), peer("c", 3)];
        b.offer(1);
        for p in &peers {
            b.granted(p, 1, 1);
        }
        let lease = Duration::from_secs(10);
        let (mut ends, mut t) = ([lease; 3], Duration::ZERO);
        for (wait, who) in renewals {
            t += Duration::from_millis(wait);
            if t >= *ends.iter().max().unwrap() {
                break;
            }
            b.at(t);
            b.renew(&peers[who], 1);
            if ends[who] > t {
                ends[who] = t + lease;
            }
        }
        let end = *ends.iter().max().unwrap();
        b.at(end - NANO);
        prop_assert_eq!(b.freed(), []);
        b.at(end);
        prop_assert_eq!(b.freed(), [(1, Gone::Expired)]);
    }
}

#[test]
fn several_readers_of_one_engine_all_have_to_release() {
    let mut b = Table::new(Limits::default());
    let readers = [peer("a", 1), peer("a", 2), peer("a", 3)];
    let reader = |index| Reader { index, of: 3 };
    b.offer(1);
    // The first one is done before the last one has claimed.
    b.claim_as(&readers[0], 1, 1, reader(0));
    b.release(&readers[0], Some(1), 1, reader(0));
    b.release(&readers[0], Some(1), 1, reader(0)); // resent: still one reader
    b.claim_as(&readers[1], 1, 1, reader(1));
    b.claim_as(&readers[2], 1, 1, reader(2));
    b.release(&readers[1], Some(1), 1, reader(1));
    assert_eq!(b.freed(), []);
    b.release(&readers[2], Some(1), 1, reader(2));
    assert_eq!(b.freed(), [(1, Gone::Released)]);
}

#[test]
fn a_reader_that_never_comes_holds_the_offer_for_the_unclaimed_lease_only() {
    let mut b = Table::new(Limits::default());
    let a = peer("a", 1);
    b.offer(1);
    b.claim_as(&a, 1, 1, Reader { index: 0, of: 2 });
    b.at(5 * SECOND);
    b.release(&a, Some(1), 1, Reader { index: 0, of: 2 });
    b.at((5 + UNCLAIMED) * SECOND - NANO);
    assert_eq!(b.freed(), []);
    b.at((5 + UNCLAIMED) * SECOND);
    assert_eq!(b.freed(), [(1, Gone::Expired)]);
}

#[test]
fn a_release_does_not_free_what_another_consumer_still_reads() {
    let mut b = Table::new(Limits::default());
    let (a, c) = (peer("a", 1), peer("c", 2));
    b.offer(1);
    b.granted(&a, 1, 1);
    b.granted(&c, 1, 1);
    b.release(&a, Some(1), 1, Reader::ONLY);
    b.tell(In::Release(None, id(1), token(1)));
    assert_eq!(b.freed(), [], "the other one reads");
    b.release(&c, Some(1), 1, Reader::ONLY);
    assert_eq!(b.freed(), [(1, Gone::Released)]);
}

#[test]
fn a_released_claim_is_not_brought_back_by_a_late_frame() {
    let mut b = Table::new(Limits::default());
    let (a, c) = (peer("a", 1), peer("c", 2));
    b.offer(1);
    b.granted(&c, 1, 1);
    b.granted(&a, 1, 1);
    b.release(&a, Some(1), 1, Reader::ONLY);
    assert_eq!(b.claim(&a, 1, 1), gone(1, Gone::Released));
    b.release(&c, Some(1), 1, Reader::ONLY);
    assert_eq!(b.freed(), [(1, Gone::Released)]);
}

#[test]
fn every_release_is_acknowledged_even_of_an_unknown_offer() {
    let mut b = Table::new(Limits::default());
    let a = peer("a", 1);
    let release = Release { claim: None, offer: id(9), token: token(9), reader: Reader::ONLY, all: false };
    b.tell(In::Frame(a.clone(), ClientFrame { seq: 5, body: ClientBody::Release(release) }));
    assert_eq!(b.outs(), [Out::Send(a.incarnation, ServerFrame { ack: 5, body: None })]);
}

#[test]
fn no_offer_outlives_the_hard_cap_however_often_it_is_renewed() {
    let mut b = Table::with(lease(|l| l.hard_cap = 60 * SECOND), Limits::default());
    let a = peer("a", 1);
    b.offer(1);
    b.granted(&a, 1, 1);
    for t in (5..60).step_by(5) {
        b.at(t * SECOND);
        b.renew(&a, 1);
    }
    b.at(60 * SECOND - NANO);
    assert_eq!(b.freed(), []);
    b.at(60 * SECOND);
    let outs = b.outs();
    assert!(outs.contains(&Out::Freed(Freed { offer: id(1), why: Gone::HardCap })), "{outs:?}");
    let told = ServerFrame { ack: 0, body: Some(ServerBody::Revoked { offer: id(1), why: Gone::HardCap }) };
    assert!(outs.contains(&Out::Send(a.incarnation, told)), "its consumer is told: {outs:?}");
}

/// A table with three ended offers: 1 expired, 2 released, 3 revoked.
fn three_ends() -> Table {
    let mut b = Table::new(Limits::default());
    b.offer(1);
    b.at(UNCLAIMED * SECOND);
    b.offer(2);
    b.offer(3);
    let a = peer("a", 1);
    b.granted(&a, 2, 2);
    b.granted(&a, 3, 3);
    b.release(&a, Some(2), 2, Reader::ONLY);
    b.tell(In::Revoke(id(3)));
    b
}

#[test]
fn a_tombstone_says_why_an_offer_is_gone_until_it_is_forgotten() {
    let mut b = three_ends();
    let a = peer("a", 1);
    b.outs();
    let whys = [(1, Gone::Expired), (2, Gone::Released), (3, Gone::Revoked)];
    b.at(149 * SECOND);
    for (n, why) in whys {
        assert_eq!(b.claim(&a, 10 + n, n), gone(10 + n, why));
        assert_eq!(b.table.offer(b.now, secret(n), contents(n), true), Err(OfferError::Duplicate(id(n))));
    }
    b.at(200 * SECOND);
    for (n, _) in whys {
        assert!(matches!(b.claim(&a, 20 + n, n), ServerBody::NotYet { .. }), "it is a name like any other");
    }
}

#[test]
fn the_word_is_withdrawn_before_the_blocks_are_freed() {
    let mut b = Table::new(Limits::default());
    let a = peer("a", 1);
    let ends: [fn(&mut Table, &PeerId); 3] = [
        |b, a| b.release(a, Some(1), 1, Reader::ONLY),
        |b, _| b.tell(In::Revoke(id(2))),
        |b, _| b.at(CLAIMED * SECOND),
    ];
    for (n, end) in (1..).zip(ends) {
        b.offer(n);
        b.granted(&a, n, n);
        end(&mut b, &a);
        let outs = b.outs();
        let withdrawn = outs.iter().position(|o| matches!(o, Out::Withdraw { offer, .. } if *offer == id(n)));
        let freed = outs.iter().position(|o| matches!(o, Out::Freed(f) if f.offer == id(n)));
        assert!(withdrawn.is_some() && withdrawn < freed, "{outs:?}");
    }
}

#[test]
fn an_offer_is_freed_once() {
    let mut b = three_ends();
    assert_eq!(b.freed(), [(2, Gone::Released), (3, Gone::Revoked)]);
    let a = peer("a", 1);
    for n in 1..=3 {
        b.tell(In::Revoke(id(n)));
        b.tell(In::Release(None, id(n), token(n)));
        b.release(&a, Some(n), n, Reader::ONLY);
    }
    b.at(100 * SECOND);
    assert_eq!(b.freed(), []);
}

#[test]
fn claims_on_one_offer_are_limited_and_a_repeated_claim_counts_once() {
    let mut b = Table::new(limits(|l| l.claims_per_offer = 2));
    let [a, c, d] = [peer("a", 1), peer("c", 2), peer("d", 3)];
    b.offer(1);
    b.granted(&a, 1, 1);
    b.granted(&c, 1, 1);
    b.granted(&a, 1, 1);
    assert_eq!(b.claim(&d, 1, 1), gone(1, Gone::Limit));
    assert_eq!(b.table.claims(), 2);
}

#[test]
fn claims_of_one_session_are_limited_and_a_release_makes_room() {
    let mut b = Table::new(limits(|l| l.claims_per_session = 1));
    let (a, c) = (peer("a", 1), peer("c", 2));
    b.offer(1);
    b.offer(2);
    b.granted(&a, 1, 1);
    assert_eq!(b.claim(&a, 2, 2), gone(2, Gone::Limit));
    b.granted(&c, 2, 2);
    b.release(&a, Some(1), 1, Reader::ONLY);
    b.granted(&a, 3, 2);
}

#[test]
fn one_claim_names_one_offer() {
    let mut b = Table::new(Limits::default());
    let a = peer("a", 1);
    b.offer(1);
    b.offer(2);
    b.granted(&a, 1, 1);
    assert_eq!(b.claim(&a, 1, 2), gone(1, Gone::Limit));
}

#[test]
fn offers_are_limited_by_the_words_and_a_freed_one_gives_its_word_back() {
    let mut b = Table::new(limits(|l| l.offers = 2));
    b.offer(1);
    b.offer(2);
    assert_eq!(b.table.offer(b.now, secret(3), contents(3), true), Err(OfferError::TooManyOffers { limit: 2 }));
    b.tell(In::Revoke(id(1)));
    b.offer(3);
    let published: Vec<_> = b
        .outs()
        .into_iter()
        .filter_map(|o| if let Out::Publish { slot, nonce, .. } = o { Some((slot, nonce)) } else { None })
        .collect();
    assert_eq!(published[2].0, published[0].0, "the same word");
    assert!(published[2].1 != published[0].1, "under another nonce");
}

#[test]
fn a_live_id_is_refused_and_the_first_offer_stays() {
    let mut b = Table::new(Limits::default());
    b.offer(1);
    assert_eq!((b.table.live(), b.table.claims()), (1, 0));
    assert_eq!(b.table.offer(b.now, secret(1), contents(1), true), Err(OfferError::Duplicate(id(1))));
    b.granted(&peer("a", 1), 1, 1);
}

#[test]
fn an_unready_offer_is_not_granted_and_its_unclaimed_lease_runs_from_ready_on() {
    let mut b = Table::new(Limits::default());
    let a = peer("a", 1);
    b.table.offer(b.now, secret(1), contents(1), false).unwrap();
    b.at(10 * UNCLAIMED * SECOND);
    assert_eq!(b.outs(), [], "neither published nor freed");
    assert!(matches!(b.claim(&a, 1, 1), ServerBody::NotYet { .. }));
    b.tell(In::Ready(id(1)));
    assert!(matches!(b.outs()[..], [Out::Publish { .. }]));
    b.at(11 * UNCLAIMED * SECOND - NANO);
    assert_eq!(b.freed(), []);
    b.at(11 * UNCLAIMED * SECOND);
    assert_eq!(b.freed(), [(1, Gone::Expired)]);
}

#[test]
fn an_offer_that_never_becomes_ready_is_freed_at_the_hard_cap() {
    let mut b = Table::new(Limits::default());
    b.table.offer(b.now, secret(1), contents(1), false).unwrap();
    b.at(600 * SECOND);
    assert_eq!(b.outs(), [Out::Freed(Freed { offer: id(1), why: Gone::HardCap })], "there is no word to withdraw");
}

#[test]
fn a_draining_producer_takes_no_offers_and_grants_what_it_has() {
    let mut b = Table::new(Limits::default());
    b.offer(1);
    b.outs();
    b.tell(In::Drain);
    b.tell(In::Drain);
    assert_eq!(b.outs(), [Out::Broadcast(ServerFrame { ack: 0, body: Some(ServerBody::Draining) })], "said once");
    assert_eq!(b.table.offer(b.now, secret(2), contents(2), true), Err(OfferError::Draining));
    b.granted(&peer("a", 1), 1, 1);
}

#[test]
fn only_offers_that_nobody_claimed_are_revoked_together() {
    let mut b = Table::new(Limits::default());
    b.offer(1);
    b.offer(2);
    b.granted(&peer("a", 1), 1, 1);
    b.outs();
    b.tell(In::RevokeUnclaimed);
    let freed: Vec<_> = b.outs().into_iter().filter(|o| matches!(o, Out::Freed(_))).collect();
    assert_eq!(freed, [Out::Freed(Freed { offer: id(2), why: Gone::Revoked })]);
    assert_eq!((b.table.live(), b.table.claims()), (1, 1));
}

fn unknown(claim: u64) -> ServerBody {
    gone(claim, Gone::Unknown)
}

#[test]
fn a_numbered_name_is_unknown_at_once_when_the_engine_has_passed_it_over() {
    let reorder = LeaseConfig::default().reorder;
    let mut b = Table::new(Limits::default());
    let a = peer("a", 1);
    let enter = |b: &mut Table, n| {
        b.offer(n);
        b.table.numbered(b.now, n);
    };
    assert!(matches!(b.claim(&a, 1, 5), ServerBody::NotYet { .. }), "nothing was entered yet");
    enter(&mut b, 4);
    b.at(reorder * 2);
    assert!(matches!(b.claim(&a, 1, 5), ServerBody::NotYet { .. }), "4 comes before 5");
    enter(&mut b, 6);
    b.at(reorder * 3 - NANO);
    assert!(matches!(b.claim(&a, 1, 5), ServerBody::NotYet { .. }), "steps of an engine overlap");
    b.at(reorder * 3);
    assert_eq!(b.claim(&a, 1, 5), unknown(1));
    assert_eq!(b.claim(&a, 2, 3), unknown(2), "also without an early claim");
    assert!(matches!(b.claim(&a, 3, 7), ServerBody::NotYet { .. }), "a later name may be early");
    b.granted(&a, 4, 6);
    b.granted(&a, 5, 4);
}

#[test]
fn a_name_that_is_entered_a_little_out_of_order_is_granted() {
    let mut b = Table::new(Limits::default());
    let a = peer("a", 1);
    for n in [9, 7, 8] {
        b.offer(n);
        b.table.numbered(b.now, n);
        b.at(b.now - b.start + LeaseConfig::default().reorder / 2);
    }
    for n in [7, 8, 9] {
        b.granted(&a, n, n);
    }
    assert_eq!(b.claim(&a, 1, 6), unknown(1));
    assert!(matches!(b.claim(&a, 2, 10), ServerBody::NotYet { .. }));
}

#[test]
fn a_name_without_a_number_waits_for_the_grace_period() {
    let mut b = Table::new(Limits::default());
    let a = peer("a", 1);
    b.offer(9);
    b.table.numbered(b.now, 9);
    b.at(SECOND);
    assert!(matches!(b.claim(&a, 1, 0), ServerBody::NotYet { .. }));
    // Nor does a name without a number say anything of others.
    b.offer(50);
    b.table.numbered(b.now, 0);
    b.at(SECOND * 2);
    assert!(matches!(b.claim(&a, 2, 49), ServerBody::NotYet { .. }));
}
