//! Consumers of the producers of a [`Spec`], and what tests ask of their pulls.

use std::time::{Duration, Instant};

use kvferry::{BlockId, Config, Consumer, Ended, GroupId, LaneKind, LocalBlocks, Offer, Pull, PullId};

use super::{READER_RAILS, SOON, Spec, producer::rails};
use crate::pattern::Check;

/// Settings of a consumer whose lanes have these faults.
pub fn throttled(faults: &str) -> Config {
    let mut config = Config::default();
    config.pull.faults = Some(faults.parse().expect("faults"));
    config
}

/// Settings of a consumer that reads so slowly that its peer can be killed in the middle of 32 MiB: an emulated processor runs
/// the killer late, and takes its time with a killed process before that one's queue pairs go.
pub fn killable() -> Config {
    throttled(if really(LaneKind::Tcp) == LaneKind::Verbs { "throttle=8M" } else { "throttle=64M" })
}

/// Settings of a consumer whose pull of 16 MiB outlasts two others of it: over an emulated wire those take half a second each.
pub fn outlasting() -> Config {
    throttled(if really(LaneKind::Tcp) == LaneKind::Verbs { "throttle=3M" } else { "throttle=32M" })
}

/// A consumer with the same pool as the producers of `spec`.
pub fn consumer(spec: &Spec, mut config: Config) -> Consumer {
    if config.verbs.rails.is_empty() {
        config.verbs.rails = rails(READER_RAILS);
    }
    Consumer::builder("decode".parse().expect("an id"), spec.kv_model(), spec.layout())
        .config(config)
        .build()
        .expect("a consumer starts")
}

/// All of an offer's positions, into local blocks of the same numbers.
pub fn all_of(offer: &Offer) -> Vec<LocalBlocks> {
    let n = offer.groups[0].blocks.len() as u32;
    vec![LocalBlocks { group: GroupId(0), first_position: 0, blocks: (0..n).map(|b| Some(BlockId(b))).collect() }]
}

/// The lane that a test runs over which asks for this one: verbs take the place of tcp where there are rails.
pub fn really(lane: LaneKind) -> LaneKind {
    let verbs = lane == LaneKind::Tcp && std::env::var_os(READER_RAILS).is_some();
    if verbs { LaneKind::Verbs } else { lane }
}

/// A deadline that leaves `reading` of itself for reading. Verbs need up to 1.2 s to be quiet, and start to stop so much
/// earlier; an emulated rail takes a moment to connect.
pub fn deadline(lane: LaneKind, reading: Duration) -> Duration {
    reading + if really(lane) == LaneKind::Verbs { Duration::from_millis(2_000) } else { Duration::ZERO }
}

/// A pull of everything over one lane.
pub fn pull_all(offer: &Offer, lane: LaneKind, deadline: Duration) -> Pull {
    Pull::new(offer.clone(), all_of(offer)).lanes(vec![really(lane)]).deadline(deadline)
}

/// Waits for the next end.
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

/// Every loaded position must hold what the producer's block holds; returns how many were compared. `never:` tells
/// tests/vm/run that no busy host excuses it.
pub fn assert_loaded_is_exact(ended: &Ended, consumer: &Consumer, spec: &Spec, seed: u64) -> u64 {
    let layout = spec.layout();
    let mut check = Check::new();
    let mut compared = 0;
    for (g, offered) in ended.outcome.groups.iter().zip(&ended.offer.groups) {
        assert!(g.loaded.iter().all(|p| !g.invalid.contains(p)), "never: loaded and invalid share a position");
        for position in g.loaded.iter() {
            let src = offered.blocks[position as usize].expect("a loaded position was offered");
            let (_, bad) = check
                .block(seed, (&layout, src.0), (consumer.memory(), &layout, position), g.group)
                .expect("the blocks are in the pool");
            assert_eq!(bad, 0, "never: position {position} does not hold block {}", src.0);
            compared += 1;
        }
    }
    compared
}
