//! The simulation: seeded failures, thousands a second. The real protocol machines and the real puller run under a seeded
//! scheduler with a virtual clock, over a network that loses messages and lanes that fail, on memory whose every word says
//! who wrote it. After every step the promises of the contract are checked.
//!
//! A failed seed is printed with the broken promise, the command that replays it, and the last events:
//! `KVFERRY_SIM_SEED=123 cargo test -p kvferry-proto --test sim -- replay --ignored --nocapture`. `KVFERRY_SIM_SEEDS` sets the
//! number of seeds.

mod checks;
mod consumer;
mod fabric;
mod lane;
mod memory;
mod network;
#[cfg(debug_assertions)]
mod planted;
mod producer;
mod rng;
mod trace;
mod weather;
mod world;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use crate::{
    trace::{Promise, Violation},
    world::{Stats, World},
};

/// Runs one seed. A panic in a machine is a broken promise like any other.
fn run_seed(seed: u64, tracing: bool) -> (Result<Stats, Violation>, Vec<String>) {
    let mut fabric = None;
    let ran = catch_unwind(AssertUnwindSafe(|| World::run(seed, &mut fabric, tracing)));
    let result = ran.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default();
        let at = fabric.as_ref().map_or(0, |f| f.get().now);
        Err(Violation { promise: Promise::Sound, at, what: format!("a machine panicked: {text}") })
    });
    let lines = fabric.map_or(Vec::new(), |f| f.get().trace.lines().map(str::to_owned).collect());
    (result, lines)
}

/// A failed seed, for a reader. The bug that was planted stays planted.
fn report(seed: u64) -> String {
    let (result, lines) = run_seed(seed, true);
    let what =
        result.err().map_or("nothing in the second run: the seed is not deterministic".to_owned(), |v| v.to_string());
    let command =
        format!("KVFERRY_SIM_SEED={seed} cargo test -p kvferry-proto --test sim -- replay --ignored --nocapture");
    format!("{}\nseed {seed}: {what}\nreplay: {command}\n", lines.join("\n"))
}

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs seeds on all cores until one fails. `(seeds run, stats, the first failure)`.
fn run_seeds(first: u64, count: u64) -> (u64, Stats, Option<(u64, Violation)>) {
    let (next, ran, stop) = (AtomicU64::new(first), AtomicU64::new(0), AtomicBool::new(false));
    let total = Mutex::new((Stats::default(), None::<(u64, Violation)>));
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut sum = Stats::default();
                let mut failed = None;
                while !stop.load(Relaxed) {
                    let seed = next.fetch_add(1, Relaxed);
                    if seed >= first + count {
                        break;
                    }
                    ran.fetch_add(1, Relaxed);
                    match run_seed(seed, false).0 {
                        Ok(stats) => sum.add(&stats),
                        Err(v) => {
                            stop.store(true, Relaxed);
                            failed = Some((seed, v));
                        }
                    }
                }
                let mut total = total.lock().unwrap();
                total.0.add(&sum);
                if let Some(f) = failed
                    && total.1.as_ref().is_none_or(|(s, _)| f.0 < *s)
                {
                    total.1 = Some(f);
                }
            });
        }
    });
    let (stats, failed) = total.into_inner().unwrap();
    (ran.into_inner(), stats, failed)
}

#[test]
fn twenty_thousand_seeds_keep_every_promise() {
    let count = env("KVFERRY_SIM_SEEDS").unwrap_or(20_000);
    let first = env("KVFERRY_SIM_FIRST").unwrap_or(0);
    let start = Instant::now();
    let (ran, stats, failed) = run_seeds(first, count);
    let seconds = start.elapsed().as_secs_f64();
    println!("{ran} seeds in {seconds:.1} s, {:.0} a second: {stats:?}", ran as f64 / seconds);
    if let Some((seed, v)) = failed {
        panic!("{}\n{v}", report(seed));
    }
    assert_eq!(ran, count);
}

/// Replays the seed of `KVFERRY_SIM_SEED` and prints its trace.
fn replay_seed() {
    let seed = env("KVFERRY_SIM_SEED").expect("KVFERRY_SIM_SEED is the seed to run");
    let (result, lines) = run_seed(seed, true);
    if result.is_err() {
        panic!("{}", report(seed));
    }
    lines.iter().for_each(|l| println!("{l}"));
    println!("seed {seed}: every promise was kept: {result:?}");
}

#[cfg(not(debug_assertions))]
#[test]
#[ignore = "a release build has no planted bugs: run it without --release"]
fn every_planted_bug_is_caught_within_2000_seeds() {}

#[cfg(not(debug_assertions))]
#[test]
#[ignore = "a tool: replays KVFERRY_SIM_SEED"]
fn replay() {
    replay_seed();
}

#[test]
fn a_seed_gives_the_same_run_every_time() {
    for seed in 0..50 {
        assert_eq!(run_seed(seed, true).1, run_seed(seed, true).1, "seed {seed}");
    }
}
