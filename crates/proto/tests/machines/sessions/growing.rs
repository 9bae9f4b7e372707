//! Claims of offers that grow.

use super::*;
use kvferry_proto::{BlockId, GroupId, Growth, OfferGroup};
use std::sync::Arc;

fn list(positions: std::ops::Range<u32>) -> Vec<OfferGroup> {
    let blocks = positions.clone().map(|b| Some(BlockId(b))).collect();
    vec![OfferGroup { group: GroupId(0), first_position: positions.start, blocks }]
}

impl Session {
    /// The claim is granted: the offer has grown by `blocks` blocks now, one at a time, of 2^20 tokens in all.
    fn grant_open(&mut self, blocks: u32) {
        let contents =
            Contents { tokens: u64::from(blocks), whole: 1 << 20, groups: list(0..blocks), ..Contents::default() };
        let grant = Grant { slot: 3, nonce: Nonce::from_wire(1).unwrap() };
        let (claim, contents, remaining) = (ClaimId(1), Arc::new(contents), Duration::from_secs(10));
        self.answer(ServerBody::Granted { claim, grant, contents, growths: blocks.into(), remaining });
    }

    fn grown(&mut self, positions: std::ops::Range<u32>, complete: bool) {
        let tokens = if complete { 1 << 20 } else { u64::from(positions.end) };
        let growth = Growth { tokens, complete, groups: list(positions.clone()) };
        let (after, growths) = (positions.start.into(), positions.end.into());
        self.answer(ServerBody::Grown { claim: ClaimId(1), after, growths, growth });
    }

    /// The number of blocks of each grant and growth that the pull hears of, and the claims that are sent.
    fn heard(&mut self) -> (Vec<usize>, Vec<u64>) {
        let outs = self.outs();
        let granted = |o: &Out| match o {
            Out::Granted { contents, .. } => Some(contents.blocks()),
            Out::Grown { growth, .. } => Some(growth.groups[0].blocks.len()),
            _ => None,
        };
        (outs.iter().filter_map(granted).collect(), claims(&outs))
    }

    fn holding(blocks: u32) -> Self {
        let mut s = Session::up(1);
        s.claim(1, 1);
        s.grant_open(blocks);
        s.outs();
        s
    }
}

#[test]
fn each_growth_reaches_the_pull() {
    let mut s = Session::holding(2);
    s.grown(2..3, false);
    s.grown(3..7, false);
    s.grown(7..8, true);
    assert_eq!(s.heard(), (vec![1, 4, 1], vec![]));
    // It is final.
    s.grown(8..9, false);
    assert_eq!(s.heard(), (vec![], vec![]));
}

#[test]
fn a_growth_that_does_not_follow_makes_the_session_claim_again_and_the_grant_brings_everything() {
    let mut s = Session::holding(2);
    s.grown(4..6, false);
    assert_eq!(s.heard(), (vec![], vec![1]));
    s.grown(6..7, false);
    assert_eq!(s.heard(), (vec![], vec![]), "the answer comes first");
    s.grant_open(7);
    // Late: the grant has it.
    s.grown(5..7, false);
    s.grown(7..8, false);
    assert_eq!(s.heard(), (vec![7, 1], vec![]));
}

#[test]
fn a_session_that_comes_back_hears_of_the_growth_that_it_missed() {
    let mut s = Session::holding(2);
    s.breaks();
    s.welcome(1);
    s.opened(1);
    // A growth of the new stream before its grant is of no use.
    s.grown(5..6, false);
    assert_eq!(s.heard(), (vec![], vec![1]));
    s.grant_open(6);
    assert_eq!(s.heard(), (vec![6], vec![]));
    // A grant that is late takes nothing back.
    s.grant_open(4);
    s.grant_open(6);
    assert_eq!(s.heard(), (vec![], vec![]));
}

#[test]
fn growth_is_bounded_by_the_limit_of_an_offer() {
    let mut s = Session::holding(2);
    s.grown(2..1001, false);
    assert_eq!(s.heard(), (vec![], vec![1]), "1001 blocks, where 1000 are the limit");
}

#[test]
fn growths_without_end_end_the_claim() {
    let mut s = Session::holding(0);
    let mut lost = Vec::new();
    for i in 0..200_000 {
        let growth = Growth { tokens: i + 1, complete: false, groups: Vec::new() };
        s.answer(ServerBody::Grown { claim: ClaimId(1), after: i, growths: i + 1, growth });
        lost.extend(losses(s.outs()));
    }
    assert_eq!(lost, [super::lost(1, Cause::Limit)]);
}

#[test]
fn a_growth_that_brings_nothing_is_no_growth() {
    let mut s = Session::holding(2);
    let growth = Growth { tokens: 2, complete: false, groups: Vec::new() };
    s.answer(ServerBody::Grown { claim: ClaimId(1), after: 2, growths: 3, growth });
    assert_eq!(s.heard(), (vec![], vec![1]), "it claims again");
}

#[test]
fn a_claim_that_waits_for_its_offer_is_not_sent_at_every_heartbeat() {
    let mut s = Session::up(1);
    let heartbeat = SessionConfig::default().heartbeat;
    s.tell(In::Claim(Want { awaited: true, ..want(1, 1) }));
    s.outs();
    s.answer(ServerBody::NotYet { claim: ClaimId(1), retry: Duration::from_secs(3600) });
    assert_eq!(claims(&s.wait_answered(heartbeat * 10 - NANO)), [0u64; 0]);
    assert_eq!(claims(&s.wait_answered(NANO)), [1]);
    s.grant_open(1);
    assert_eq!(s.heard(), (vec![1], vec![]));
}

#[test]
fn a_grant_that_no_claim_has_asked_for_is_ignored() {
    let mut s = Session::holding(2);
    s.grant_open(5);
    assert_eq!(s.heard(), (vec![], vec![]));
    s.grown(2..3, false);
    assert_eq!(s.heard(), (vec![1], vec![]));
}
