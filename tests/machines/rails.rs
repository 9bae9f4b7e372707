//! Pulls and lanes of a rank, joined.

use std::{
    io,
    os::fd::BorrowedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use kvferry::{
    block::{BlockId, GroupId, Incarnation, Nonce, OfferId, Rank},
    driver::rail::{Addr, In, Out, Progress, PullId, Rail, Start},
    error::Cause,
    group::PoolLayout,
    lane::{Attempt, FenceKind, FenceSlot, Grant, Lane, LaneCaps, LaneEvent, LaneKind},
    model::Model,
    offer::{Offer, OfferGroup, OfferRank},
    plan::{ChunkSize, LocalBlocks, Read},
    protocol::{
        frame::{PeerId, Reader},
        hello::Welcome,
        pull::Retry,
    },
    shard::Shard,
};

const SECOND: Duration = Duration::from_secs(1);
const ADDR: &str = "10.0.0.1:7400";

/// A lane that reads nothing, and is quiet as soon as it is stopped: it says so when it is polled.
#[derive(Default)]
struct Prompt {
    stopped: Vec<Attempt>,
    killed: Arc<AtomicBool>,
}

impl Lane for Prompt {
    fn caps(&self) -> LaneCaps {
        let (kind, fence) = (LaneKind::Tcp, FenceKind::Trailer);
        LaneCaps { kind, max_read: 1 << 20, quiet_bound: Duration::from_millis(5), fence }
    }
    fn begin(&mut self, _: Attempt, _: Grant) {}
    fn post(&mut self, _: Attempt, reads: &[Read], _: bool) -> usize {
        reads.len()
    }
    fn post_fence(&mut self, _: Attempt, _: FenceSlot) -> bool {
        true
    }
    fn stop(&mut self, a: Attempt) {
        self.stopped.push(a);
    }
    fn kill(&mut self) {
        self.killed.store(true, Ordering::Relaxed);
    }
    fn poll(&mut self, out: &mut Vec<LaneEvent>) {
        out.extend(self.stopped.drain(..).map(|attempt| LaneEvent::Quiet { attempt }));
    }
    fn arm(&mut self) -> io::Result<Option<BorrowedFd<'_>>> {
        Ok(None)
    }
}

/// A pull of four blocks that is being read.
fn reading(now: Instant) -> (Rail, Arc<AtomicBool>) {
    let (layout, shard) = (Arc::new(PoolLayout::uniform(4, 1, 64, 16)), Shard::whole(2, 1));
    let incarnation = Incarnation::from_wire(1).unwrap();
    let blocks: Vec<_> = (0..4).map(|b| Some(BlockId(b))).collect();
    let offer = Offer {
        id: OfferId { high: 1, low: 1 },
        engine: "them".parse().unwrap(),
        incarnation,
        ranks: vec![OfferRank { rank: Rank(0), incarnation, addr: ADDR.into() }],
        groups: vec![OfferGroup { group: GroupId(0), first_position: 0, blocks: blocks.clone() }],
        tokens: 64,
        request: String::new(),
    };
    let welcome = Welcome {
        version: 1,
        features: 1,
        peer: PeerId { engine: "them".parse().unwrap(), rank: Rank(0), incarnation },
        engine_incarnation: incarnation,
        model: Model {
            name: "m".into(),
            dtype: "uint8".into(),
            scales: String::new(),
            attention: "HND".into(),
            block_tokens: 16,
        },
        shard,
        pool: layout.clone(),
        fence_slots: 8,
        lanes: vec![LaneKind::Tcp],
        host: String::new(),
        silence: 60 * SECOND,
    };
    let start = Start {
        id: PullId(1),
        offer: Arc::new(offer),
        sources: vec![0],
        wanted: vec![LocalBlocks { group: GroupId(0), first_position: 0, blocks }],
        reader: Reader::ONLY,
        started: now,
        deadline: now + 30 * SECOND,
        retry: Retry { attempts: 3, wait: Duration::from_millis(10) },
        chunk: ChunkSize::default(),
        lanes: vec![LaneKind::Tcp],
        local_ready: true,
        progress: Arc::<Progress>::default(),
    };
    let mut rail = Rail::new(layout, shard, 100);
    let (addr, lane): (Addr, _) = (ADDR.into(), Prompt::default());
    let killed = lane.killed.clone();
    rail.handle(now, In::Peer(addr.clone(), Arc::new(welcome)));
    rail.handle(now, In::Start(Box::new(start)));
    let Some(Out::Claim(_, want)) = rail.poll() else { panic!("it claims first") };
    rail.handle(now, In::Granted(want.claim, Grant { slot: 0, nonce: Nonce::from_wire(7).unwrap() }));
    assert!(matches!(rail.poll(), Some(Out::Connect(..))));
    rail.handle(now, In::Lane { peer: addr, incarnation, lane: Ok(Box::new(lane)) });
    rail.turn(now);
    (rail, killed)
}

#[test]
fn a_lane_that_is_quiet_in_time_is_not_killed_by_a_thread_that_looks_late() {
    let now = Instant::now();
    let (mut rail, killed) = reading(now);
    rail.handle(now, In::Cancel(PullId(1), Cause::Cancelled));
    // The lane is quiet at once, and the thread does not run for a second, which is far past the lane's bound.
    rail.turn(now + SECOND);
    let outs: Vec<_> = std::iter::from_fn(|| rail.poll()).collect();
    assert!(outs.iter().any(|o| matches!(o, Out::Ended(_))), "{outs:?}");
    assert!(!killed.load(Ordering::Relaxed), "everybody's reads on it would be lost");
    assert_eq!(rail.lanes().count(), 1);
}
