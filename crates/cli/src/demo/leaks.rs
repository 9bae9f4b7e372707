//! The last act of the demo: whether the producer gets everything back.

use std::{
    fs,
    time::{Duration, Instant},
};

use kvferry::{Config, Consumer, Faults, LaneKind, PoolLayout};

use super::{BLOCK, Demo, LIMIT, REGIONS};
use crate::{
    peer::{self, Peer},
    report::{Failure, size},
};

/// Lease of the demo's offers until they are claimed: short, so that forgotten ones end while you watch.
pub(super) const UNCLAIMED: &str = "3s";
/// Rounds, each with a pull that ends, a consumer that goes away in mid-pull, and a forgotten offer.
const ROUNDS: u32 = 8;
/// Blocks of each pull of a round.
const BLOCKS: u32 = 32;
/// Memory that the producer's allocator may keep. Far less than the pools of the consumers that came and went.
const SLACK: u64 = 16 << 20;

/// The offers and blocks of a producer.
#[derive(Debug, Clone, Copy)]
struct Holds {
    descriptors: u64,
    memory: u64,
    offers: u64,
    blocks: u64,
    claims: u64,
    released: u64,
    ended: u64,
}

impl Holds {
    fn read(peer: &Peer, pid: u32) -> Result<Self, Failure> {
        let u = peer.usage(LIMIT)?;
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let kib = status.lines().find_map(|l| l.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse::<u64>().ok());
        let memory = kib.ok_or_else(|| Failure::failed("/proc/PID/status has no VmRSS"))? << 10;
        let (offers, blocks, claims) = (u.offers, u.blocks, u.claims);
        Ok(Self { descriptors, memory, offers, blocks, claims, released: u.released, ended: u.ended })
    }

    fn text(&self) -> String {
        let Self { descriptors, offers, blocks, claims, .. } = self;
        let memory = size(self.memory);
        format!("{offers} offers, {blocks} blocks, {claims} leases, {descriptors} descriptors, {memory}")
    }
}

/// Pulls, breaks off pulls and forgets offers, and compares what the producer holds before and after.
pub(super) fn show(demo: &mut Demo, addr: &str, pid: u32) -> Result<(), Failure> {
    // Once before the count: the first pull of a kind allocates what later ones use again.
    round(demo, addr)?;
    let peer = Peer::probe(addr, &"demo".parse()?, &demo.model.model(), LIMIT)?;
    let before = settled(&peer, pid, |h| h.offers == 0 && h.claims == 0)?;
    demo.say(format!("before: the producer holds {}", before.text()));
    for _ in 0..ROUNDS {
        round(demo, addr)?;
    }
    let busy = Holds::read(&peer, pid)?;
    demo.say(format!("during: {}", busy.text()));
    let clean = |h: &Holds| {
        let held = h.offers + h.blocks + h.claims;
        held == 0 && h.descriptors <= before.descriptors && h.memory <= before.memory + SLACK
    };
    let after = settled(&peer, pid, clean)?;
    demo.say(format!("after:  {}", after.text()));
    let (released, ended) = (after.released - before.released, after.ended - before.ended);
    let seen = format!(
        "{released} offers released, {ended} ended by their leases; before: {}; after: {}",
        before.text(),
        after.text()
    );
    demo.observe("leak-free", clean(&after) && released + ended == u64::from(ROUNDS) * 3 && ended > 0, seen);
    Ok(())
}

/// One pull that ends, one whose consumer goes away, and one offer that nobody pulls.
fn round(demo: &Demo, addr: &str) -> Result<(), Failure> {
    let model = demo.model.model();
    let mut peer = Peer::probe(addr, &"demo".parse()?, &model, LIMIT)?;
    let consumer = |faults: Option<Faults>| -> Result<Consumer, Failure> {
        let layout = PoolLayout::uniform(BLOCKS, REGIONS, BLOCK, demo.model.block_tokens);
        let mut config = Config::default();
        config.pull.faults = faults;
        config.pull.lanes = vec![LaneKind::Tcp];
        Ok(Consumer::builder("demo".parse()?, model.clone(), layout).config(config).build()?)
    };
    let mut pull = |consumer: &Consumer| {
        let offer = peer.offer(BLOCKS, 0, LIMIT)?;
        peer::pull(consumer, (offer, 0), BLOCKS, vec![LaneKind::Tcp], LIMIT)
    };
    let whole = consumer(None)?;
    pull(&whole)?;
    whole.wait(LIMIT * 2).map_err(|e| Failure::waiting(&e))?;
    // Too slow to end before it is dropped.
    let broken = consumer(Some("throttle=4M".parse()?))?;
    let id = pull(&broken)?;
    let until = Instant::now() + LIMIT;
    while broken.progress(id).is_some_and(|(done, _)| done == 0) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(broken);
    peer.offer(BLOCKS, 0, LIMIT)?;
    Ok(())
}

/// The state of the producer when `good` is true of it, or after [`LIMIT`].
fn settled(peer: &Peer, pid: u32, good: impl Fn(&Holds) -> bool) -> Result<Holds, Failure> {
    let until = Instant::now() + LIMIT;
    loop {
        let holds = Holds::read(peer, pid)?;
        if good(&holds) || Instant::now() > until {
            return Ok(holds);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
