//! The puller: pulls and lanes of a rank.

mod growing;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use kvferry_proto::{
    Attempt, BlockId, Cause, ChunkSize, ClaimId, Contents, FenceKind, Grant, GroupId, Incarnation, Lane, LaneCaps,
    LaneEvent, LaneKind, LocalBlocks, Model, Nonce, Offer, OfferGroup, OfferId, OfferRank, PeerId, PoolLayout, Rank,
    Read, Reader, Shard, Token,
    hello::Welcome,
    pull::Retry,
    puller::{Hold, HoldRequest, HoldSetter, HoldState, In, Need, Out, Progress, PullId, Puller, Start, better::Waits},
    session::Want,
};

const SECOND: Duration = Duration::from_secs(1);
const ADDR: &str = "10.0.0.1:7400";

/// A lane that reads nothing and is quiet at once when it is stopped. It reports that when it is polled.
struct Prompt {
    kind: LaneKind,
    degraded: bool,
    attempts: Vec<Attempt>,
    stopped: Vec<Attempt>,
    begun: Arc<AtomicUsize>,
    killed: Arc<AtomicBool>,
    /// The next poll goes down.
    down: Arc<AtomicBool>,
}

impl Prompt {
    fn of(kind: LaneKind) -> Self {
        Self {
            kind,
            degraded: false,
            attempts: Vec::new(),
            stopped: Vec::new(),
            begun: Arc::default(),
            killed: Arc::default(),
            down: Arc::default(),
        }
    }
}

impl Lane for Prompt {
    fn caps(&self) -> LaneCaps {
        let fence = FenceKind::Trailer;
        LaneCaps { kind: self.kind, max_read: 1 << 20, quiet_bound: Duration::from_millis(5), fence }
    }
    fn degraded(&self) -> bool {
        self.degraded
    }
    fn begin(&mut self, a: Attempt, _: Grant) {
        self.attempts.push(a);
        self.begun.fetch_add(1, Ordering::Relaxed);
    }
    fn post(&mut self, _: Attempt, reads: &[Read]) -> usize {
        reads.len()
    }
    fn stop(&mut self, a: Attempt) {
        self.stopped.push(a);
    }
    fn kill(&mut self) {
        self.killed.store(true, Ordering::Relaxed);
    }
    fn poll(&mut self, out: &mut Vec<LaneEvent>) {
        if self.down.swap(false, Ordering::Relaxed) {
            out.push(LaneEvent::Down { cause: Cause::LaneFailed });
            self.stopped.append(&mut self.attempts);
        }
        out.extend(self.stopped.drain(..).map(|attempt| LaneEvent::Quiet { attempt }));
    }
}

/// A puller that knows one peer.
struct Rig {
    puller: Puller<Box<dyn Lane>>,
    now: Instant,
    incarnation: Incarnation,
    pulls: u64,
    /// The need of the last wish.
    need: Need,
    welcome: Arc<Welcome>,
}

impl Rig {
    fn new() -> Self {
        let (layout, shard) = (Arc::new(PoolLayout::uniform(4, 1, 64, 16)), Shard::whole(2, 1));
        let incarnation = Incarnation::from_wire(1).unwrap();
        let welcome = Welcome {
            version: 1,
            features: 1,
            peer: PeerId { engine: "them".parse().unwrap(), rank: Rank(0), incarnation },
            engine_incarnation: incarnation,
            model: Model {
                name: "m".into(),
                dtype: "uint8".into(),
                scales: String::new(),
                weights: String::new(),
                attention: "HND".into(),
                block_tokens: 16,
            },
            shard,
            pool: layout.clone(),
            fence_slots: 8,
            lanes: vec![LaneKind::Verbs, LaneKind::Tcp],
            host: String::new(),
            silence: 60 * SECOND,
            gpu_uuid: None,
        };
        let (mut puller, now) = (Puller::new(layout, shard, 100, WAITS), Instant::now());
        let welcome = Arc::new(welcome);
        puller.handle(now, In::Peer(ADDR.into(), welcome.clone()));
        Self { puller, now, incarnation, pulls: 0, need: Need::Now, welcome }
    }

    /// A granted pull of four blocks. Returns the kinds that it wants connected.
    fn pull(&mut self) -> Option<Vec<LaneKind>> {
        let (start, contents) = self.start();
        self.puller.handle(self.now, In::Start(start));
        let want = self.claimed();
        self.grant(want.claim, contents);
        self.wish()
    }

    /// The claim that is made next.
    fn claimed(&mut self) -> Want {
        let Some(Out::Claim(_, want)) = self.puller.poll() else { panic!("it claims first") };
        want
    }

    fn grant(&mut self, claim: ClaimId, contents: Arc<Contents>) {
        let grant = Grant { slot: 0, nonce: Nonce::from_wire(7).unwrap() };
        self.puller.handle(self.now, In::Granted(claim, grant, contents));
    }

    /// Holds the offer of a pull for up to a minute. Returns its claim.
    fn hold(&mut self, start: &Start) -> ClaimId {
        let wait = HoldRequest {
            offer: start.offer.clone(),
            sources: vec![0],
            reader: start.reader,
            awaited: false,
            seen: HoldSetter::of(&Hold::default()),
            patience: 2 * SECOND,
        };
        self.puller.handle(self.now, In::Hold(Box::new(wait), 60 * SECOND));
        let want = self.claimed();
        assert_eq!((want.offer, want.token), (start.offer.id, start.offer.token));
        want.claim
    }

    /// The claim and the reach of the release that is made next.
    fn released(&mut self) -> (Option<ClaimId>, bool) {
        let Some(Out::Release(_, _, release)) = self.puller.poll() else { panic!("it releases") };
        (release.claim, release.all)
    }

    /// A pull of four blocks that has not started, and what its offer contains.
    fn start(&mut self) -> (Box<Start>, Arc<Contents>) {
        self.pulls += 1;
        let blocks: Vec<_> = (0..4).map(|b| Some(BlockId(b))).collect();
        let offer = Offer::new(
            OfferId { high: 1, low: self.pulls },
            "them".parse().unwrap(),
            self.incarnation,
            vec![OfferRank { rank: Rank(0), incarnation: self.incarnation, addr: ADDR.into() }],
            64,
        );
        let offered = OfferGroup { group: GroupId(0), first_position: 0, blocks: blocks.clone() };
        let contents = Arc::new(Contents::of(&offer, vec![offered]));
        let start = Start {
            id: PullId(self.pulls),
            offer: Arc::new(offer),
            sources: vec![0],
            wanted: vec![LocalBlocks { group: GroupId(0), first_position: 0, blocks }],
            reader: Reader::ONLY,
            started: self.now,
            deadline: self.now + 30 * SECOND,
            retry: Retry::new(3, Duration::from_millis(10), 2 * SECOND),
            chunk: ChunkSize::default(),
            lanes: vec![LaneKind::Verbs, LaneKind::Tcp],
            local_ready: true,
            progress: Arc::<Progress>::default(),
        };
        (Box::new(start), contents)
    }

    /// The kinds of the next wish.
    fn wish(&mut self) -> Option<Vec<LaneKind>> {
        match self.puller.poll()? {
            Out::Connect(_, wish) => {
                self.need = wish.need;
                Some(wish.kinds)
            }
            other => panic!("{other:?}"),
        }
    }

    /// Answers the wish with a lane. Returns the number of attempts on it.
    fn connected(&mut self, lane: Prompt) -> Arc<AtomicUsize> {
        let begun = lane.begun.clone();
        self.answer(Ok(Box::new(lane)));
        begun
    }

    fn answer(&mut self, lane: Result<Box<dyn Lane>, Cause>) {
        self.puller
            .handle(self.now, In::Lane { peer: ADDR.into(), incarnation: self.incarnation, need: self.need, lane });
        self.puller.turn(self.now);
    }

    fn kinds(&self) -> Vec<LaneKind> {
        self.puller.lanes().map(|(_, kind, _)| kind).collect()
    }
}

const WAITS: Waits = Waits { first: SECOND, longest: Duration::from_secs(60) };
const BOTH: [LaneKind; 2] = [LaneKind::Verbs, LaneKind::Tcp];

fn count(n: &AtomicUsize) -> usize {
    n.load(Ordering::Relaxed)
}

#[test]
fn a_quiet_lane_is_not_killed_by_a_thread_that_runs_late() {
    let mut rig = Rig::new();
    assert!(rig.pull().is_some());
    let lane = Prompt::of(LaneKind::Verbs);
    let killed = lane.killed.clone();
    rig.connected(lane);
    let (mut puller, now) = (rig.puller, rig.now);
    puller.handle(now, In::Cancel(PullId(1), Cause::Cancelled));
    // The lane is quiet at once, and the thread does not run for a second, which is far past the lane's bound.
    puller.turn(now + SECOND);
    let outs: Vec<_> = std::iter::from_fn(|| puller.poll()).collect();
    assert!(outs.iter().any(|o| matches!(o, Out::Ended(_))), "{outs:?}");
    assert!(!killed.load(Ordering::Relaxed), "the reads of every pull on it would be lost");
    assert_eq!(puller.lanes().count(), 1);
}

#[test]
fn pulls_leave_a_lane_of_the_second_choice_once_the_first_is_available() {
    let mut rig = Rig::new();
    assert_eq!(rig.pull().unwrap(), BOTH);
    let tcp = rig.connected(Prompt::of(LaneKind::Tcp));
    assert_eq!(rig.pull(), None, "an unavailable kind is not tried again at once");
    rig.now += 2 * SECOND;
    // The pull uses the present lane and does not wait.
    assert_eq!(rig.pull().unwrap(), [LaneKind::Verbs]);
    assert_eq!(count(&tcp), 3);
    rig.answer(Err(Cause::LaneFailed));
    rig.now += SECOND;
    assert_eq!(rig.pull(), None, "waits between searches grow");
    rig.now += 2 * SECOND;
    assert_eq!(rig.pull().unwrap(), [LaneKind::Verbs]);
    let verbs = rig.connected(Prompt::of(LaneKind::Verbs));
    assert_eq!((count(&tcp), count(&verbs)), (5, 0), "running attempts stay on their lane");
    rig.now += 100 * SECOND;
    assert_eq!(rig.pull(), None);
    assert_eq!(count(&verbs), 1);
}

#[test]
fn a_lane_that_lost_a_part_is_replaced_and_finishes_what_it_has() {
    let mut rig = Rig::new();
    rig.pull();
    let old = rig.connected(Prompt { degraded: true, ..Prompt::of(LaneKind::Verbs) });
    assert_eq!(rig.pull(), None);
    rig.now += 2 * SECOND;
    assert_eq!(rig.pull().unwrap(), [LaneKind::Verbs]);
    let new = rig.connected(Prompt::of(LaneKind::Verbs));
    assert_eq!(rig.puller.busy_lanes().count(), 1, "three pulls are on it");
    assert_eq!(rig.pull(), None);
    assert_eq!((count(&old), count(&new)), (3, 1));
    assert_eq!(rig.kinds(), [LaneKind::Verbs]);
}

#[test]
fn pulls_of_a_new_session_take_no_lane_of_an_old_one() {
    let mut rig = Rig::new();
    rig.pull();
    let old = rig.connected(Prompt::of(LaneKind::Verbs));
    assert_eq!((rig.pull(), count(&old)), (None, 2));
    // The stream broke, and the same producer answers again: it has released the lanes of the old session.
    rig.puller.handle(rig.now, In::Peer(ADDR.into(), rig.welcome.clone()));
    assert_eq!(rig.pull().unwrap(), BOTH);
    let new = rig.connected(Prompt::of(LaneKind::Verbs));
    assert_eq!((count(&old), count(&new)), (2, 1), "running attempts stay on their lane");
}

#[test]
fn a_pull_without_a_lane_does_not_fail_when_a_search_for_a_better_one_does() {
    let mut rig = Rig::new();
    rig.pull();
    let tcp = Prompt::of(LaneKind::Tcp);
    let down = tcp.down.clone();
    rig.connected(tcp);
    rig.pull();
    rig.now += 2 * SECOND;
    assert_eq!(rig.pull().unwrap(), [LaneKind::Verbs]);
    // The present lane goes down during the search for a better one.
    down.store(true, Ordering::Relaxed);
    rig.puller.turn(rig.now);
    assert_eq!(rig.wish().unwrap(), BOTH, "it does not wait for the search");
    let now = std::mem::replace(&mut rig.need, Need::Better);
    rig.answer(Err(Cause::LaneFailed));
    assert_eq!(rig.wish(), None);
    rig.need = now;
    let tcp = rig.connected(Prompt::of(LaneKind::Tcp));
    assert_eq!(count(&tcp), 3, "none of them has failed");
}

#[test]
fn a_lane_is_idle_once_its_attempts_are_quiet_and_a_turn_says_when_there_was_work() {
    let mut rig = Rig::new();
    rig.pull();
    rig.connected(Prompt::of(LaneKind::Verbs));
    let lane = rig.puller.lanes().next().expect("it is connected").0;
    assert_eq!((rig.puller.busy_lanes().collect::<Vec<_>>(), rig.puller.idle_lanes().count()), (vec![lane], 0));
    rig.puller.handle(rig.now, In::Cancel(PullId(1), Cause::Cancelled));
    assert!(rig.puller.turn(rig.now), "the lane reported `Quiet`");
    assert!(!rig.puller.turn(rig.now));
    assert_eq!((rig.puller.busy_lanes().count(), rig.puller.idle_lanes().collect::<Vec<_>>()), (0, vec![lane]));
    assert_eq!(rig.puller.pulls(), 0);
}

#[test]
fn silence_of_a_peer_reaches_its_running_pulls_and_those_that_start_meanwhile() {
    let mut rig = Rig::new();
    rig.pull();
    rig.connected(Prompt::of(LaneKind::Verbs));
    rig.now += 2 * SECOND;
    rig.puller.handle(rig.now, In::Silent("10.0.0.2:7400".into(), true));
    rig.now += SECOND;
    rig.puller.turn(rig.now);
    assert_eq!(rig.puller.pulls(), 1, "another peer's silence");
    rig.puller.handle(rig.now, In::Silent(ADDR.into(), true));
    rig.pull();
    for (after, left) in [(SECOND / 4, 1), (SECOND * 2, 0)] {
        rig.puller.turn(rig.now + after);
        rig.puller.turn(rig.now + after);
        assert_eq!(rig.puller.pulls(), left, "{after:?} later");
    }
    let ended = std::iter::from_fn(|| rig.puller.poll()).filter_map(|o| match o {
        Out::Ended(e) => e.outcome.cause(),
        _ => None,
    });
    assert_eq!(ended.collect::<Vec<_>>(), [Cause::PeerDown, Cause::PeerDown]);
    // Once the peer answers again, new pulls start with all their patience.
    rig.puller.handle(rig.now, In::Silent(ADDR.into(), false));
    rig.pull();
    rig.puller.turn(rig.now + 20 * SECOND);
    assert_eq!(rig.puller.pulls(), 1);
}

#[test]
fn a_pull_takes_over_the_claim_and_the_grant_of_its_hold() {
    let mut rig = Rig::new();
    let (start, contents) = rig.start();
    let claim = rig.hold(&start);
    rig.grant(claim, contents);
    rig.puller.handle(rig.now, In::Start(start));
    assert_eq!(rig.wish().unwrap(), BOTH, "it is granted already: no second claim");
    assert_eq!(rig.puller.holds(), 0);
    rig.puller.handle(rig.now, In::Cancel(PullId(1), Cause::Cancelled));
    assert_eq!(rig.released(), (Some(claim), false), "the claim ends with the pull");
}

#[test]
fn a_pull_waits_for_the_grant_of_a_hold_that_has_none_yet() {
    let mut rig = Rig::new();
    let (start, contents) = rig.start();
    let claim = rig.hold(&start);
    rig.puller.handle(rig.now, In::Start(start));
    assert!(rig.puller.poll().is_none());
    rig.grant(claim, contents);
    assert_eq!(rig.wish().unwrap(), BOTH);
}

#[test]
fn a_pull_claims_again_after_its_hold_was_lost() {
    let mut rig = Rig::new();
    let (start, contents) = rig.start();
    let lost = rig.hold(&start);
    rig.puller.handle(rig.now, In::Lost(lost, Cause::PeerDown));
    assert_eq!(rig.puller.holds(), 0);
    rig.puller.handle(rig.now, In::Start(start));
    let want = rig.claimed();
    assert_ne!(want.claim, lost);
    rig.grant(want.claim, contents);
    assert_eq!(rig.wish().unwrap(), BOTH);
}

#[test]
fn a_name_with_another_token_leaves_the_hold_alone() {
    let mut rig = Rig::new();
    let (start, contents) = rig.start();
    let claim = rig.hold(&start);
    let mut forged = Offer::clone(&start.offer);
    forged.token = Token::from_bytes([9; 16]);
    rig.puller.handle(rig.now, In::Release(Arc::new(forged.clone())));
    assert_eq!(rig.released(), (None, true), "the producer refuses this one");
    let wrong = HoldRequest {
        offer: Arc::new(forged),
        sources: vec![0],
        reader: Reader::ONLY,
        awaited: false,
        seen: HoldSetter::of(&Hold::default()),
        patience: 2 * SECOND,
    };
    rig.puller.handle(rig.now, In::Hold(Box::new(wrong), 60 * SECOND));
    assert_ne!(rig.claimed().claim, claim, "a hold of its own, which the producer refuses");
    rig.grant(claim, contents);
    rig.puller.handle(rig.now, In::Start(start));
    assert_eq!(rig.wish().unwrap(), BOTH, "the right pull has the right hold");
}

#[test]
fn a_hold_ends_with_its_release_its_time_or_the_shutdown() {
    let mut rig = Rig::new();
    let (start, _) = rig.start();
    let claim = rig.hold(&start);
    rig.puller.handle(rig.now, In::Release(start.offer.clone()));
    assert_eq!(rig.released(), (Some(claim), true));

    let (start, _) = rig.start();
    let claim = rig.hold(&start);
    rig.now += 59 * SECOND;
    rig.puller.turn(rig.now);
    assert!(rig.puller.poll().is_none());
    assert_eq!(rig.puller.next_timeout(), Some(rig.now + SECOND));
    rig.now += SECOND;
    rig.puller.turn(rig.now);
    assert_eq!(rig.released(), (Some(claim), false));

    let (start, _) = rig.start();
    let claim = rig.hold(&start);
    rig.puller.handle(rig.now, In::Shutdown);
    assert_eq!((rig.released(), rig.puller.holds()), ((Some(claim), false), 0));
}
