//! Pulls of offers that grow.

use std::sync::{
    Mutex,
    atomic::{AtomicU32, Ordering},
};

use super::*;

/// The contents when this many of four blocks are computed.
fn computed(whole: &Contents, blocks: usize) -> Arc<Contents> {
    let groups = whole.groups.iter().map(|g| OfferGroup { blocks: g.blocks[..blocks].to_vec(), ..g.clone() }).collect();
    let tokens = blocks as u64 * 16;
    Arc::new(Contents { tokens, complete: false, groups, ..whole.clone() })
}

impl Rig {
    /// Claims an offer that may not be open yet, for up to a minute.
    fn holds(&mut self, offer: &Arc<Offer>, seen: &Hold) {
        let request = HoldRequest {
            offer: offer.clone(),
            sources: vec![0],
            reader: Reader::ONLY,
            awaited: true,
            seen: HoldSetter::of(seen),
            patience: 2 * SECOND,
        };
        self.puller.handle(self.now, In::Hold(Box::new(request), 60 * SECOND));
    }

    /// A pull of an open offer that has a lane and nothing to read, its claim, and what the offer will contain.
    fn waits(&mut self) -> (ClaimId, Arc<Contents>) {
        let (start, contents) = self.start();
        self.puller.handle(self.now, In::Start(start));
        let claim = self.claimed().claim;
        self.grant(claim, computed(&contents, 0));
        if self.wish().is_some() {
            self.connected(Prompt::of(LaneKind::Verbs));
        }
        while self.puller.turn(self.now) {}
        (claim, contents)
    }

    fn busy(&self) -> usize {
        self.puller.busy_lanes().count()
    }
}

#[test]
fn pulls_that_wait_for_growth_keep_no_lane_busy_and_one_that_grows_does() {
    let mut rig = Rig::new();
    let waiting: Vec<_> = (0..100).map(|_| rig.waits()).collect();
    assert_eq!((rig.busy(), rig.puller.lanes().count()), (0, 1));
    // Only its deadline wakes it.
    let next = rig.puller.next_timeout().unwrap();
    assert!(next > rig.now + 20 * SECOND, "{:?}", next - rig.now);
    let (claim, contents) = &waiting[40];
    let growth = computed(contents, 4).since(&kvferry_proto::Extent::of(&computed(contents, 0)));
    rig.puller.handle(rig.now, In::Grown(*claim, growth));
    assert_eq!(rig.busy(), 1);
}

#[test]
fn a_lane_that_goes_down_while_its_pulls_wait_is_left_by_all_of_them() {
    let mut rig = Rig::new();
    let (start, contents) = rig.start();
    rig.puller.handle(rig.now, In::Start(start));
    let claim = rig.claimed().claim;
    rig.grant(claim, computed(&contents, 0));
    assert!(rig.wish().is_some());
    let lane = Prompt::of(LaneKind::Verbs);
    let down = lane.down.clone();
    rig.connected(lane);
    rig.waits();
    assert_eq!(rig.busy(), 0);
    down.store(true, Ordering::Relaxed);
    let lane = rig.puller.idle_lanes().next().unwrap();
    rig.puller.mark_ready(lane);
    while rig.puller.turn(rig.now) {}
    // Both ask for a new lane, in one wish.
    assert!(rig.wish().is_some());
    assert_eq!(rig.connected(Prompt::of(LaneKind::Tcp)).load(Ordering::Relaxed), 2);
}

#[test]
fn a_pull_that_cannot_be_planned_leaves_nothing_on_its_lane() {
    let mut rig = Rig::new();
    rig.waits();
    for _ in 0..3 {
        let (start, contents) = rig.start();
        rig.puller.handle(rig.now, In::Start(start));
        let claim = rig.claimed().claim;
        let mut wrong = Contents::clone(&contents);
        wrong.groups[0].blocks[2] = Some(BlockId(1000));
        rig.grant(claim, Arc::new(wrong));
        while rig.puller.turn(rig.now) {}
        let outs: Vec<_> = std::iter::from_fn(|| rig.puller.poll()).collect();
        assert!(outs.iter().any(|o| matches!(o, Out::Ended(_))), "{outs:?}");
    }
    assert_eq!((rig.busy(), rig.puller.pulls()), (0, 1));
}

#[test]
fn a_cancelled_pull_that_waits_for_growth_ends() {
    let mut rig = Rig::new();
    rig.waits();
    rig.puller.handle(rig.now, In::Cancel(PullId(1), Cause::Cancelled));
    while rig.puller.turn(rig.now) {}
    let outs: Vec<_> = std::iter::from_fn(|| rig.puller.poll()).collect();
    assert!(outs.iter().any(|o| matches!(o, Out::Ended(_))), "{outs:?}");
}

#[test]
fn a_hold_whose_claim_is_lost_has_ended() {
    let mut rig = Rig::new();
    let (start, _) = rig.start();
    let seen = Hold::default();
    rig.holds(&start.offer, &seen);
    let claim = rig.claimed().claim;
    rig.puller.handle(rig.now, In::Lost(claim, Cause::Unknown));
    assert_eq!(seen.state(), HoldState::Ended);
}

#[test]
fn a_hold_tells_of_each_change_and_of_its_end_when_the_puller_is_gone() {
    let mut rig = Rig::new();
    let (start, contents) = rig.start();
    let (seen, changes) = (Hold::default(), Arc::new(Mutex::new(Vec::new())));
    let (of, to) = (seen.clone(), changes.clone());
    seen.on_change(move |state| to.lock().unwrap().push((state, of.state())));
    rig.holds(&start.offer, &seen);
    let claim = rig.claimed().claim;
    assert_eq!(*changes.lock().unwrap(), []);
    rig.grant(claim, computed(&contents, 1));
    rig.grant(claim, computed(&contents, 2));
    assert_eq!(*changes.lock().unwrap(), [(HoldState::Granted, HoldState::Granted)]);
    drop(rig);
    let [first, last] = [HoldState::Granted, HoldState::Ended].map(|state| (state, state));
    assert_eq!(*changes.lock().unwrap(), [first, last]);
    // A function that comes late is called at once.
    let late = Arc::new(AtomicU32::new(0));
    let calls = late.clone();
    seen.on_change(move |_| {
        calls.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(late.load(Ordering::Relaxed), 1);
}

#[test]
fn a_grant_that_takes_something_back_or_lists_other_blocks_is_ignored() {
    let mut rig = Rig::new();
    let (claim, contents) = rig.waits();
    rig.grant(claim, computed(&contents, 2));
    rig.grant(claim, computed(&contents, 1));
    let mut other = Contents::clone(&contents);
    other.groups[0].blocks.reverse();
    rig.grant(claim, Arc::new(other));
    rig.puller.handle(rig.now, In::Cancel(PullId(1), Cause::Cancelled));
    while rig.puller.turn(rig.now) {}
    let ended = std::iter::from_fn(|| rig.puller.poll()).find_map(|o| match o {
        Out::Ended(ended) => Some(ended),
        _ => None,
    });
    assert_eq!(ended.unwrap().contents, Some(computed(&contents, 2)));
}

#[test]
fn a_hold_hands_over_what_its_offer_has_grown_by() {
    let mut rig = Rig::new();
    let (start, contents) = rig.start();
    let seen = Hold::default();
    rig.holds(&start.offer, &seen);
    let claim = rig.claimed().claim;
    assert_eq!(seen.state(), HoldState::Waiting, "it is not open yet");
    rig.grant(claim, computed(&contents, 1));
    rig.grant(claim, computed(&contents, 3));
    let again = Hold::default();
    rig.holds(&start.offer, &again);
    assert_eq!([seen.state(), again.state()], [HoldState::Granted; 2]);
    let progress = start.progress.clone();
    rig.puller.handle(rig.now, In::Start(start));
    assert!(rig.wish().is_some(), "it is planned with the hold's grant");
    assert!(progress.get().1 > 0);
    assert_eq!([seen.state(), again.state()], [HoldState::Ended; 2]);
}

#[test]
fn a_hold_ends_when_its_peer_is_silent_for_too_long() {
    for answers in [false, true] {
        let mut rig = Rig::new();
        let (start, _) = rig.start();
        let seen = Hold::default();
        rig.holds(&start.offer, &seen);
        let claim = rig.claimed().claim;
        rig.puller.handle(rig.now, In::Silent(ADDR.into(), true));
        assert_eq!(rig.puller.next_timeout(), Some(rig.now + 2 * SECOND));
        if answers {
            rig.puller.handle(rig.now + SECOND, In::Silent(ADDR.into(), false));
        }
        rig.puller.turn(rig.now + 2 * SECOND);
        if answers {
            assert_eq!(seen.state(), HoldState::Waiting);
        } else {
            assert_eq!(seen.state(), HoldState::Ended);
            assert_eq!(rig.released(), (Some(claim), false));
        }
    }
}

#[test]
fn a_name_with_other_ranks_neither_joins_nor_ends_a_hold() {
    let mut rig = Rig::new();
    let (start, _) = rig.start();
    let mut edited = Offer::clone(&start.offer);
    edited.ranks[0].addr = "10.0.0.9:7400".into();
    let edited = Arc::new(edited);
    let seen = [Hold::default(), Hold::default()];
    for (offer, seen) in [&start.offer, &edited].into_iter().zip(&seen) {
        rig.holds(offer, seen);
    }
    assert_eq!(seen.each_ref().map(Hold::state), [HoldState::Waiting, HoldState::Ended]);
    rig.claimed();
    rig.puller.handle(rig.now, In::Release(edited));
    assert_eq!(rig.released(), (None, true), "the other peer hears of it");
    assert_eq!(seen[0].state(), HoldState::Waiting);
}
