//! Offers that grow, and claims that wait for them.

use super::*;
use kvferry_proto::{BadOffer, BlockId, Extent, GroupId, Growth, OfferGroup};

const MS: Duration = Duration::from_millis(1);
const WHOLE: u64 = 64;

fn blocks(group: u16, positions: std::ops::Range<u32>) -> OfferGroup {
    let blocks = positions.clone().map(|b| Some(BlockId(b))).collect();
    OfferGroup { group: GroupId(group), first_position: positions.start, blocks }
}

/// Blocks of 16 tokens of one group, and the mark behind them.
fn growth(positions: std::ops::Range<u32>) -> Growth {
    Growth { tokens: u64::from(positions.end) * 16, complete: false, groups: vec![blocks(0, positions)] }
}

fn finish() -> Growth {
    Growth { tokens: WHOLE, complete: true, groups: Vec::new() }
}

/// The mark, and the number of blocks.
type Published = (u64, usize);

/// The mark, whether it is the last one, and the number of blocks.
type Told = (u64, bool, usize);

impl Table {
    fn open(&mut self, n: u64) {
        let contents = Arc::new(Contents { whole: WHOLE, ..Contents::default() });
        self.table.offer(self.now, secret(n), contents, true).unwrap();
    }

    fn grow(&mut self, growth: Growth, ready: bool) -> u64 {
        self.table.grow(self.now, id(1), growth, ready).unwrap()
    }

    fn refused(&mut self, growth: Growth) -> OfferError {
        self.table.grow(self.now, id(1), growth, true).unwrap_err()
    }

    /// What was published, and what each claim was told.
    fn news(&mut self) -> (Vec<Published>, Vec<Told>) {
        let (mut published, mut told) = (Vec::new(), Vec::new());
        for out in self.outs() {
            match out {
                Out::Publish { contents, .. } => published.push((contents.tokens, contents.blocks())),
                Out::Send(_, ServerFrame { body: Some(ServerBody::Grown { growth, .. }), .. }) => {
                    let blocks = growth.groups.iter().map(|g| g.blocks.len()).sum();
                    told.push((growth.tokens, growth.complete, blocks));
                }
                _ => {}
            }
        }
        (published, told)
    }

    fn awaits(&mut self, from: &PeerId, claim: u64, (offer, token): (OfferId, Token)) {
        let (claim, reader) = (ClaimId(claim), Reader::ONLY);
        self.frame(from, ClientBody::Claim { claim, offer, token, number: 0, reader, awaited: true });
    }

    /// The answers that consumers got, by claim.
    fn answers(&mut self) -> Vec<(u64, String)> {
        let answer = |o| match o {
            Out::Send(_, ServerFrame { body: Some(body), .. }) => Some(match body {
                ServerBody::Granted { claim, .. } => (claim.0, "granted".to_owned()),
                ServerBody::NotYet { claim, .. } => (claim.0, "not yet".to_owned()),
                ServerBody::Gone { claim, why } => (claim.0, why.as_str().to_owned()),
                other => panic!("{other:?}"),
            }),
            _ => None,
        };
        self.outs().into_iter().filter_map(answer).collect()
    }
}

#[test]
fn growths_are_readable_in_their_order_each_once_its_data_is_in_place() {
    let mut t = Table::new(Limits::default());
    t.open(1);
    t.granted(&peer("a", 1), 1, 1);
    let first = t.grow(growth(0..1), false);
    let second = t.grow(growth(1..2), false);
    t.grow(growth(2..3), true);
    assert_eq!(t.news(), (vec![], vec![]), "the first growth's data is not there");
    t.tell(In::Grown(id(1), second));
    assert_eq!(t.news(), (vec![], vec![]), "the first growth's data is still not there");
    t.tell(In::Grown(id(1), first));
    assert_eq!(t.news(), (vec![(48, 3)], vec![(48, false, 3)]));
    // An event that comes twice, or of no growth, does nothing.
    t.tell(In::Grown(id(1), first));
    t.tell(In::Grown(id(1), 0));
    t.tell(In::Grown(id(1), 9));
    assert_eq!(t.news(), (vec![], vec![]));
}

#[test]
fn an_offer_is_final_only_when_the_data_of_all_growths_is_in_place() {
    let mut t = Table::new(Limits::default());
    t.open(1);
    t.granted(&peer("a", 1), 1, 1);
    let late = t.grow(growth(0..4), false);
    t.grow(finish(), true);
    assert_eq!(t.news(), (vec![], vec![]));
    assert!(matches!(t.refused(growth(4..5)), OfferError::Bad(BadOffer::Malformed(_))), "it is finished");
    t.tell(In::Grown(id(1), late));
    assert_eq!(t.news(), (vec![(64, 4)], vec![(64, true, 4)]));
    assert!(matches!(t.refused(growth(4..5)), OfferError::Bad(BadOffer::Malformed(_))), "it is final");
}

#[test]
fn claims_hear_of_growths_together_and_of_the_last_one_at_once() {
    let mut t = Table::new(Limits::default());
    t.open(1);
    t.granted(&peer("a", 1), 1, 1);
    t.grow(growth(0..1), true);
    assert_eq!(t.news(), (vec![(16, 1)], vec![(16, false, 1)]));
    t.grow(growth(1..2), true);
    t.at(3 * MS);
    t.grow(growth(2..3), true);
    assert_eq!(t.news(), (vec![(32, 2), (48, 3)], vec![]), "both are readable, and not told of yet");
    assert_eq!(t.table.next_timeout(), Some(t.start + 10 * MS));
    // A claim in between is granted all of it, and is not told again.
    t.granted(&peer("b", 2), 1, 1);
    t.at(10 * MS);
    assert_eq!(t.news(), (vec![], vec![(48, false, 2)]));
    t.at(11 * MS);
    t.grow(growth(3..4), true);
    t.grow(finish(), true);
    let (_, told) = t.news();
    assert_eq!(told, [(64, true, 1), (64, true, 1)], "the last growth does not wait, and brings the one before it");
    // Nothing is left to tell.
    assert_eq!(t.table.next_timeout(), Some(t.start + CLAIMED * SECOND));
}

#[test]
fn a_growth_that_does_not_follow_is_refused_and_changes_nothing() {
    let mut t = Table::new(limits(|l| l.blocks_per_offer = 4));
    t.open(1);
    t.grow(growth(0..2), true);
    t.outs();
    let bad = |groups, tokens, complete| Growth { groups, tokens, complete };
    for wrong in [
        bad(vec![blocks(0, 1..3)], 48, false),
        bad(vec![blocks(0, 3..4)], 64, false),
        bad(vec![blocks(0, 2..5)], 64, false),
        bad(vec![blocks(2, 0..1), blocks(1, 0..1)], 32, false),
        bad(vec![OfferGroup { blocks: vec![Some(BlockId(u32::MAX))], ..blocks(0, 2..3) }], 48, false),
        bad(vec![], 16, false),
        bad(vec![], 65, false),
        bad(vec![], 48, true),
    ] {
        let error = t.refused(wrong.clone());
        assert!(matches!(error, OfferError::Bad(_)), "{wrong:?}: {error}");
    }
    assert_eq!(t.news(), (vec![], vec![]));
    // A group may begin late, and anywhere.
    t.grow(bad(vec![blocks(0, 2..3), blocks(3, 7..8)], 48, false), true);
    assert_eq!(t.news().0, [(48, 4)]);
}

#[test]
fn an_open_offer_has_no_lease_without_a_claim_until_it_is_finished() {
    let mut t = Table::new(Limits::default());
    t.open(1);
    t.at(2 * UNCLAIMED * SECOND);
    t.grow(growth(0..4), true);
    t.grow(finish(), true);
    assert_eq!(t.freed(), []);
    t.at(3 * UNCLAIMED * SECOND - NANO);
    assert_eq!(t.freed(), []);
    t.at(3 * UNCLAIMED * SECOND);
    assert_eq!(t.freed(), [(1, Gone::Expired)]);
}

#[test]
fn an_open_offer_ends_when_its_consumer_goes_silent() {
    let mut t = Table::new(Limits::default());
    t.open(1);
    t.granted(&peer("a", 1), 1, 1);
    t.at(CLAIMED * SECOND);
    assert_eq!(t.freed(), [(1, Gone::Expired)]);
    assert_eq!(t.refused(growth(0..1)), OfferError::Ended { offer: id(1), why: Gone::Expired });
}

#[test]
fn a_growth_after_the_end_of_its_offer_publishes_nothing() {
    let mut t = Table::new(Limits::default());
    t.open(1);
    t.granted(&peer("a", 1), 1, 1);
    let late = t.grow(growth(0..1), false);
    t.tell(In::Revoke(id(1)));
    assert_eq!(t.freed(), [(1, Gone::Revoked)]);
    t.tell(In::Grown(id(1), late));
    assert_eq!(t.outs(), []);
    assert_eq!(t.refused(growth(1..2)), OfferError::Ended { offer: id(1), why: Gone::Revoked });
    assert_eq!(t.outs(), []);
}

#[test]
fn claims_that_wait_are_answered_when_the_offer_is_entered() {
    let mut t = Table::new(Limits::default());
    t.awaits(&peer("a", 1), 1, secret(1));
    t.awaits(&peer("b", 2), 2, secret(1));
    t.awaits(&peer("c", 3), 3, (id(1), token(9)));
    // A claim that is sent again is answered once.
    t.awaits(&peer("a", 1), 1, secret(1));
    let not_yet = |claim| (claim, "not yet".to_owned());
    assert_eq!(t.answers(), [not_yet(1), not_yet(2), not_yet(3), not_yet(1)]);
    t.at(60 * SECOND);
    t.open(1);
    assert_eq!(t.answers(), [(1, "granted".to_owned()), (2, "granted".to_owned()), (3, "token".to_owned())]);
    // One that is not ready when it is entered answers them when it is.
    t.awaits(&peer("a", 1), 4, secret(2));
    t.table.offer(t.now, secret(2), contents(2), false).unwrap();
    t.awaits(&peer("b", 2), 5, secret(2));
    assert_eq!(t.answers(), [not_yet(4), not_yet(5)]);
    t.tell(In::Ready(id(2)));
    assert_eq!(t.answers(), [(4, "granted".to_owned()), (5, "granted".to_owned())]);
}

#[test]
fn claims_that_wait_hear_that_the_offer_will_not_come() {
    let mut t = Table::with(lease(|l| l.awaited = 50 * SECOND), Limits::default());
    let unknown = |claim| (claim, "unknown".to_owned());
    t.awaits(&peer("a", 1), 1, secret(1));
    t.awaits(&peer("a", 1), 2, secret(2));
    t.awaits(&peer("a", 1), 3, secret(3));
    t.answers();
    t.tell(In::Revoke(id(1)));
    assert_eq!(t.answers(), [(1, "revoked".to_owned())]);
    // Another reader of the engine releases the name for all of them.
    t.awaits(&peer("a", 1), 6, secret(6));
    t.awaits(&peer("a", 1), 7, (id(6), token(9)));
    t.answers();
    t.tell(In::Release(None, id(6), token(6)));
    assert_eq!(t.answers(), [(6, "released".to_owned())], "the other one shows another token");
    t.tell(In::Closed(peer("a", 1).incarnation));
    t.awaits(&peer("a", 1), 2, secret(2));
    t.awaits(&peer("a", 1), 3, secret(3));
    t.answers();
    // The consumer does not need it any more.
    t.release(&peer("a", 1), Some(2), 2, Reader::ONLY);
    t.answers();
    t.open(2);
    assert_eq!(t.answers(), []);
    t.at(50 * SECOND);
    assert_eq!(t.answers(), [unknown(3)], "it has waited long enough");
    assert_eq!(t.table.claims(), 0);
    t.awaits(&peer("a", 1), 4, secret(4));
    t.answers();
    t.tell(In::Drain);
    assert_eq!(t.answers(), [unknown(4)]);
    t.awaits(&peer("a", 1), 5, secret(5));
    assert_eq!(t.answers(), [unknown(5)]);
}

#[test]
fn eight_claims_of_a_consumer_wait_for_one_name() {
    let mut t = Table::new(Limits::default());
    for claim in 1..=9 {
        t.awaits(&peer("a", 1), claim, secret(1));
    }
    assert_eq!(t.answers().last(), Some(&(9, "limit".to_owned())));
    // It keeps no other consumer out.
    t.awaits(&peer("b", 2), 1, secret(1));
    assert_eq!(t.answers(), [(1, "not yet".to_owned())]);
    assert_eq!(t.table.claims(), 9);
}

#[test]
fn a_consumer_has_no_more_claims_that_wait_than_claims_at_all_and_they_end_with_its_session() {
    let mut t = Table::new(limits(|l| l.claims_per_session = 2));
    let (a, b) = (peer("a", 1), peer("b", 2));
    for claim in 1..=3 {
        t.awaits(&a, claim, secret(claim));
    }
    assert_eq!(t.answers().last(), Some(&(3, "limit".to_owned())));
    t.awaits(&b, 1, secret(1));
    t.awaits(&b, 2, secret(9));
    assert_eq!((t.table.claims_of(a.incarnation), t.table.claims_of(b.incarnation)), (2, 2));
    t.answers();
    t.tell(In::Closed(a.incarnation));
    assert_eq!((t.table.claims_of(a.incarnation), t.table.claims_of(b.incarnation)), (0, 2));
    t.open(1);
    assert_eq!(t.answers(), [(1, "granted".to_owned())]);
}

proptest! {
    #[test]
    fn contents_that_grow_by_any_steps_become_those_that_were_offered_whole(
        lengths in proptest::collection::vec(0u32..12, 1..4),
        cuts in proptest::collection::vec((proptest::collection::vec(0u32..12, 4), 0u64..200), 0..6),
    ) {
        let lists = |to: &dyn Fn(usize) -> u32| -> Vec<OfferGroup> {
            let lists = lengths.iter().enumerate().map(|(g, n)| blocks(g as u16, 0..(*n).min(to(g))));
            lists.filter(|g| !g.blocks.is_empty()).collect()
        };
        let whole = Contents { tokens: 200, whole: 200, complete: true, groups: lists(&|_| u32::MAX), ..Contents::default() };
        let mut states: Vec<Contents> = Vec::new();
        let (mut tos, mut mark) = ([0u32; 4], 0);
        for (cut, tokens) in &cuts {
            for (to, cut) in tos.iter_mut().zip(cut) {
                *to = (*to).max(*cut);
            }
            mark = mark.max(*tokens);
            states.push(Contents { tokens: mark, complete: false, groups: lists(&|g| tos[g]), ..whole.clone() });
        }
        states.push(whole.clone());
        for (i, early) in states.iter().enumerate() {
            for late in &states[i..] {
                prop_assert!(Extent::of(late).covers(&Extent::of(early)));
                prop_assert!(late.agrees(early) && early.agrees(late));
                if early.complete {
                    continue;
                }
                let (mut grown, gain) = (early.clone(), late.since(&Extent::of(early)));
                if gain.is_empty_after(early.tokens) {
                    prop_assert!(grown.grow(&gain, 1000).is_err());
                } else {
                    grown.grow(&gain, 1000).unwrap();
                }
                prop_assert_eq!(&grown, late);
            }
        }
    }
}
