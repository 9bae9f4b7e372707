use kvferry_proto::{BlockId, GroupId, PoolLayout, Rank, Reader};

use super::*;
use crate::{
    control::{guard::ConnState, outbox::FrameQueue},
    memory::{FenceWords, Memory},
};

fn core(change: impl FnOnce(&mut Config, &mut Servers)) -> Arc<Core> {
    let layout = Arc::new(PoolLayout::uniform(8, 2, 4096, 16));
    let memory = Memory::alloc(&layout.segments).unwrap();
    let export = Arc::new(Export::new(layout, memory, Arc::new(FenceWords::new(16).unwrap())));
    let model = Model {
        name: "m".into(),
        dtype: "bfloat16".into(),
        scales: String::new(),
        weights: String::new(),
        attention: "HND".into(),
        block_tokens: 16,
    };
    let mut config = Config::default();
    let mut servers = Servers {
        tcp: None,
        local: None,
        #[cfg(feature = "verbs")]
        verbs: None,
    };
    change(&mut config, &mut servers);
    Arc::new(Core::new(peer(), "127.0.0.1:1".into(), model, Shard::whole(8, 4), export, servers, config))
}

fn peer() -> PeerId {
    PeerId { engine: "e".parse().unwrap(), rank: Rank(0), incarnation: Incarnation::random() }
}

fn address(last: u8) -> PeerKey {
    PeerKey::new([10, 0, 0, last].into(), None)
}

fn open(core: &Core, from: &PeerId, by: &PeerKey) -> SessionId {
    let outbox = Outbox::new(FrameQueue::new(ConnState::for_test()));
    core.open(from, core.me.incarnation, outbox, by).unwrap()
}

/// Offers a block, and claims it.
fn claim(core: &Arc<Core>, n: u64, session: SessionId, from: &PeerId, by: &PeerKey) -> Result<(), Refusal> {
    let blocks = vec![Some(BlockId(0))];
    let spec = OfferSpec::new(16, vec![OfferGroup { group: GroupId(0), first_position: 0, blocks }]);
    let (name, groups) = core.name(spec);
    core.enter(&name, groups, Ready::Now).unwrap();
    let (offer, token) = (name.id, name.token);
    let body = ClientBody::Claim { claim: ClaimId(n), offer, token, number: 0, reader: Reader::ONLY, awaited: false };
    core.frame(session, from, ClientFrame { seq: 0, body }, by)
}

fn is_share<T: std::fmt::Debug>(result: Result<T, Refusal>, of: &str) {
    assert!(matches!(&result, Err(Refusal::Share { what, .. }) if *what == of), "{result:?}");
}

#[test]
fn two_sessions_of_a_consumer_count_its_claims_once() {
    let core = core(|c, _| c.limits.claims_per_peer = 2);
    let (from, by) = (peer(), address(1));
    let _old = open(&core, &from, &by);
    let session = open(&core, &from, &by);
    claim(&core, 1, session, &from, &by).unwrap();
    claim(&core, 2, session, &from, &by).unwrap();
    is_share(claim(&core, 3, session, &from, &by), "claims");
    // Another peer has its own share.
    let (other, there) = (peer(), address(2));
    let session = open(&core, &other, &there);
    claim(&core, 1, session, &other, &there).unwrap();
}

#[test]
fn a_peer_that_reconnects_keeps_the_claims_of_its_closed_sessions() {
    let core = core(|c, _| c.limits.claims_per_peer = 2);
    let by = address(1);
    for _ in 0..2 {
        let from = peer();
        let session = open(&core, &from, &by);
        claim(&core, 1, session, &from, &by).unwrap();
        core.closed(session, &from);
    }
    let from = peer();
    let session = open(&core, &from, &by);
    is_share(claim(&core, 1, session, &from, &by), "claims");
    // Until their leases run out.
    core.tick(Instant::now() + core.config.lease.hard_cap * 2);
    claim(&core, 1, session, &from, &by).unwrap();
}

#[test]
fn a_request_for_a_lane_that_fails_takes_no_place_and_closes_no_lane() {
    let core = core(|_, _| {});
    let (from, by) = (peer(), address(1));
    open(&core, &from, &by);
    for n in 0..LANES_OF_A_KIND as u64 {
        let mut state = core.lock();
        let oldest = core.room(&mut state, &from, LaneKind::Tcp).unwrap();
        assert_eq!(oldest, None);
        core.keep(state, &from, (LaneKind::Tcp, n), oldest).unwrap();
    }
    let mut state = core.lock();
    // It fails after the check.
    for _ in 0..2 {
        assert_eq!(core.room(&mut state, &from, LaneKind::Tcp).unwrap(), Some(0));
    }
    let count =
        |state: &State| (state.lanes, state.lanes_by_peer.of(&by), state.sessions.values().next().unwrap().lanes.len());
    assert_eq!(count(&state), (8, 8, 8));
    core.keep(state, &from, (LaneKind::Tcp, 8), Some(0)).unwrap();
    assert_eq!(count(&core.lock()), (8, 8, 8));
}

#[cfg(feature = "verbs")]
#[test]
fn a_verbs_lane_over_the_share_or_beside_another_one_creates_no_queue_pair() {
    let (server, ends, made) = verbs::tests::rig::served();
    let core = core(|c, s| {
        c.limits.lanes_per_peer = 1;
        s.verbs = Some(server);
    });
    let (from, by) = (peer(), address(1));
    let request = || core.connect_verbs(&from, core.me.incarnation, &ends, &by).map(|_| ());
    let session = open(&core, &from, &by);
    // A stranger gets none: a lane needs a granted claim.
    assert!(matches!(request(), Err(Refusal::Precondition(_))));
    claim(&core, 1, session, &from, &by).unwrap();
    let before = made();
    let making = core.connecting(&from, &by).unwrap();
    let beside = request();
    assert!(matches!(beside, Err(Refusal::NotYet(_))), "{beside:?}");
    assert_eq!(made(), before);
    drop(making);
    request().unwrap();
    let before = made();
    is_share(request(), "lanes");
    assert_eq!(made(), before);
}

#[test]
fn a_lane_kind_that_is_requested_repeatedly_closes_only_lanes_of_its_own_kind() {
    let mut lanes = VecDeque::from([(LaneKind::Tcp, 0)]);
    for n in 1..=LANES_OF_A_KIND as u64 {
        assert_eq!(superfluous(&lanes, LaneKind::Verbs), None);
        lanes.push_back((LaneKind::Verbs, n));
    }
    assert_eq!(superfluous(&lanes, LaneKind::Verbs), Some(1), "the oldest of its own kind");
    assert_eq!(superfluous(&lanes, LaneKind::Tcp), None);
}
