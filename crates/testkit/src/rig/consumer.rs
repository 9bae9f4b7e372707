//! Consumers of the producers of a [`Spec`], and checks of their pulls.

use std::time::{Duration, Instant};

use kvferry::{BlockId, Config, Consumer, Ended, GroupId, LaneKind, LocalBlocks, Offer, Pull, PullId};

use super::{
    producer::offered_blocks,
    role::pool_on_gpu,
    spec::{READER_RAILS, SOON, Spec, on_gpu, rails, tls},
};
use crate::pattern::Check;

/// Settings of a consumer whose lanes have these faults.
pub fn throttled(faults: &str) -> Config {
    let mut config = Config::default();
    config.pull.faults = Some(faults.parse().expect("faults"));
    config
}

/// Settings of a consumer that reads slowly enough for a kill in the middle of 32 MiB. In an emulated machine the killer
/// runs late, and the queue pairs of a killed process live on for a while.
pub fn killable() -> Config {
    throttled(if really(LaneKind::Tcp) == LaneKind::Verbs { "throttle=8M" } else { "throttle=64M" })
}

/// A consumer with the same pool as the producers of `spec`.
pub fn consumer(spec: &Spec, mut config: Config) -> Consumer {
    if config.verbs.rails.is_empty() {
        config.verbs.rails = rails(READER_RAILS);
    }
    config.tcp.checksum |= spec.checksum;
    config.tls = config.tls.or_else(tls);
    let layout = spec.layout();
    let builder = Consumer::builder("decode".parse().expect("an id"), spec.kv_model(), layout.clone()).config(config);
    let builder = if on_gpu().1 { builder.memory(pool_on_gpu(&layout)) } else { builder };
    builder.build().expect("a consumer starts")
}

/// Local blocks for the positions from 0 on.
pub fn local(blocks: impl IntoIterator<Item = u32>) -> Vec<LocalBlocks> {
    let blocks = blocks.into_iter().map(|b| Some(BlockId(b))).collect();
    vec![LocalBlocks { group: GroupId(0), first_position: 0, blocks }]
}

/// Local blocks for all positions of an offer; each block has the number of its position.
pub fn all_of(offer: &Offer) -> Vec<LocalBlocks> {
    local(0..offer.tokens.div_ceil(16) as u32)
}

/// The lane that a test really uses when it names this one: verbs replace tcp if there are rails, and tcp replaces the local
/// lane from GPU memory into host memory, which does not exist.
pub fn really(lane: LaneKind) -> LaneKind {
    if lane == LaneKind::Local && on_gpu() == (true, false) {
        return LaneKind::Tcp;
    }
    let verbs = lane == LaneKind::Tcp && std::env::var_os(READER_RAILS).is_some();
    if verbs { LaneKind::Verbs } else { lane }
}

/// A deadline that leaves this much time for reading. Verbs need up to 1.2 s to become quiet, so they stop that much
/// earlier; an emulated rail also takes time to connect. Copies into GPU memory have a quarter of a second to end.
pub fn deadline(lane: LaneKind, reading: Duration) -> Duration {
    let quiet = if really(lane) == LaneKind::Verbs { 2_000 } else { 0 };
    let copies = if on_gpu().1 { 250 } else { 0 };
    reading + Duration::from_millis(quiet + copies)
}

/// A pull of everything over one lane.
pub fn pull_all(offer: &Offer, lane: LaneKind, deadline: Duration) -> Pull {
    Pull::new(offer.clone(), all_of(offer)).lanes(vec![really(lane)]).deadline(deadline)
}

/// Waits until a pull ends.
pub fn ended(consumer: &Consumer) -> Ended {
    consumer.wait(SOON).expect("the pull ends")
}

/// Waits until this share of the pull's chunks is loaded.
pub fn wait_until_loaded(consumer: &Consumer, pull: PullId, share: f64) {
    let until = Instant::now() + SOON;
    loop {
        let Some((loaded, all)) = consumer.progress(pull) else {
            panic!("the pull ended before {share} of it was loaded: {:?}", ended(consumer).outcome);
        };
        if all > 0 && loaded as f64 >= share * all as f64 {
            return;
        }
        assert!(Instant::now() < until, "{loaded} of {all} chunks after {SOON:?}");
        std::thread::yield_now();
    }
}

/// Compares every loaded block with the producer's block, and returns the number of blocks. `never:` in a message tells
/// tests/vm/run that a busy host is no excuse.
pub fn assert_loaded_is_exact(ended: &Ended, consumer: &Consumer, spec: &Spec, seed: u64) -> u64 {
    let (theirs, ours) = (spec.layout(), consumer.layout());
    let mut check = Check::new();
    let mut local = ended.blocks.loaded.iter();
    let mut compared = 0;
    let offered = offered_blocks(ended.offer.id);
    for g in &ended.outcome.groups {
        assert!(g.loaded.iter().all(|p| !g.invalid.contains(p)), "never: loaded and invalid share a position");
        for position in g.loaded.iter() {
            let src = *offered.get(position as usize).expect("never: a position is loaded that was not offered");
            let dst = local.next().expect("each loaded position has a block").id;
            let (_, bad) = check
                .block(seed, (&theirs, src), (consumer.memory(), ours, dst.0), g.group)
                .expect("the blocks are in the pool");
            assert_eq!(bad, 0, "never: position {position} does not hold block {src}");
            compared += 1;
        }
    }
    compared
}
