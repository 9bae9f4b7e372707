//! Figures, printed: `cargo test --release --lib --features verbs speed -- --ignored --nocapture`.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use kvferry_proto::{
    BlockId, ChunkSize, Contents, Grant, GroupId, Incarnation, LaneKind, LocalBlocks, Model, Offer, OfferGroup,
    OfferId, OfferRank, PeerId, PoolLayout, Rank, Reader, Shard,
    hello::Welcome,
    pull::Retry,
    puller::{In, Need, Out, Progress, PullId, Puller, Start, better::Waits},
};

use super::{
    fake::Control,
    rig::{BLOCK, BLOCKS, Rig},
};
use crate::{config::VerbsConfig, lane::WakingLane};

const ADDR: &str = "10.0.0.1:7400";
const SECOND: Duration = Duration::from_secs(1);

type Driver = Puller<Box<dyn WakingLane>>;

/// A rank with the lane of a rig.
fn driver(r: Rig) -> (Driver, Vec<Arc<Mutex<Control>>>, Grant, Incarnation, impl Sized) {
    let Rig { lane, devices, served, here, there, words, nonce, server, rails, incarnation, .. } = r;
    let layout = Arc::new(PoolLayout::uniform(BLOCKS as u32, 1, BLOCK, 16));
    let shard = Shard::whole(2, 1);
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
        lanes: vec![LaneKind::Verbs],
        host: String::new(),
        silence: 60 * SECOND,
        gpu_uuid: None,
    };
    let mut it = Driver::new(layout, shard, BLOCKS as usize, Waits { first: SECOND, longest: SECOND });
    it.handle(Instant::now(), In::Peer(ADDR.into(), Arc::new(welcome)));
    let lane: Box<dyn WakingLane> = Box::new(lane);
    it.handle(Instant::now(), In::Lane { peer: ADDR.into(), incarnation, need: Need::Now, lane: Ok(lane) });
    (it, devices, Grant { slot: 3, nonce }, incarnation, (served, here, there, words, server, rails))
}

/// Starts a pull of all blocks, a block a chunk.
fn start(it: &mut Driver, n: u64, grant: Grant, incarnation: Incarnation) {
    let blocks: Vec<_> = (0..BLOCKS as u32).map(|b| Some(BlockId(b))).collect();
    let offer = Offer::new(
        OfferId { high: 1, low: n },
        "them".parse().unwrap(),
        incarnation,
        vec![OfferRank { rank: Rank(0), incarnation, addr: ADDR.into() }],
        BLOCKS * 16,
    );
    let offered = OfferGroup { group: GroupId(0), first_position: 0, blocks: blocks.clone() };
    let contents = Arc::new(Contents::of(&offer, vec![offered]));
    let now = Instant::now();
    let pull = Start {
        id: PullId(n),
        offer: Arc::new(offer),
        sources: vec![0],
        wanted: vec![LocalBlocks { group: GroupId(0), first_position: 0, blocks }],
        reader: Reader::ONLY,
        started: now,
        deadline: now + 30 * SECOND,
        retry: Retry::new(3, SECOND, SECOND),
        chunk: ChunkSize { per_pull: u32::MAX, min_bytes: BLOCK, max_bytes: BLOCK },
        lanes: vec![LaneKind::Verbs],
        local_ready: true,
        progress: Arc::<Progress>::default(),
    };
    it.handle(now, In::Start(Box::new(pull)));
    let Some(Out::Claim(_, want)) = it.poll() else { panic!("it claims first") };
    it.handle(now, In::Granted(want.claim, grant, contents));
}

/// The time from a completion to the next post, including the fake device's time for both; and the time of a turn without
/// a completion.
#[test]
#[ignore = "prints figures"]
fn speed_of_a_turn() {
    let config = VerbsConfig { window: 1, spin: Duration::ZERO, ..VerbsConfig::default() };
    let (mut it, devices, grant, incarnation, _kept) = driver(Rig::new(1, config));
    let (mut idle, mut turns) = (Vec::new(), Vec::new());
    for n in 1..=40 {
        start(&mut it, n, grant, incarnation);
        it.turn(Instant::now());
        while it.pulls() > 0 {
            let before = Instant::now();
            it.turn(before);
            idle.push(before.elapsed());
            let mut device = devices[0].lock().unwrap();
            for number in device.numbers() {
                device.complete(number, 1);
            }
            let posts = device.posts;
            drop(device);
            let before = Instant::now();
            it.turn(before);
            let took = before.elapsed();
            if devices[0].lock().unwrap().posts > posts {
                turns.push(took);
            }
        }
        while it.poll().is_some() {}
    }
    for (what, mut all) in [("a turn without a completion", idle), ("from a completion to the next request", turns)] {
        all.sort();
        println!(
            "{what}: {:?} (median of {}; a tenth is below {:?})",
            all[all.len() / 2],
            all.len(),
            all[all.len() / 10]
        );
    }
}
