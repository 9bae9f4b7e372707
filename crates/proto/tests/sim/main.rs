//! Bad days, by the thousand. The real protocol machines and the real puller run under a seeded scheduler with a virtual
//! clock, over a network that loses and lanes that lie, on memory whose every word says who wrote it. After every step the
//! promises of the contract are checked.
//!
//! A seed that fails is printed with the promise that was broken, how to run it again, and the last things that happened:
//! `KVFERRY_SIM_SEED=123 cargo test --test sim -- replay --ignored --nocapture`. `KVFERRY_SIM_SEEDS` sets how many are run.

mod checks;
mod consumer;
mod fabric;
mod lane;
mod memory;
mod network;
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

use kvferry_proto::sabotage::{Bug, plant};

use crate::{
    trace::{Promise, Violation},
    world::{Stats, World},
};

/// Runs one seed. A panic in a machine is a broken promise like any other.
fn day(seed: u64, tracing: bool) -> (Result<Stats, Violation>, Vec<String>) {
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

/// A failed seed, for a reader.
fn report(seed: u64, bug: Option<Bug>) -> String {
    plant(bug);
    let (result, lines) = day(seed, true);
    let what =
        result.err().map_or("nothing, the second time: the day is not deterministic".to_owned(), |v| v.to_string());
    let mut text = String::new();
    for l in &lines {
        text += l;
        text.push('\n');
    }
    format!(
        "{text}\nseed {seed}: {what}\nreplay: KVFERRY_SIM_SEED={seed} cargo test --test sim -- replay --ignored --nocapture\n"
    )
}

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs seeds on all cores until one fails. `(days, stats, the first failure)`.
fn days(first: u64, count: u64) -> (u64, Stats, Option<(u64, Violation)>) {
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
                    match day(seed, false).0 {
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
fn twenty_thousand_bad_days() {
    let count = env("KVFERRY_SIM_SEEDS").unwrap_or(20_000);
    let first = env("KVFERRY_SIM_FIRST").unwrap_or(0);
    let start = Instant::now();
    let (ran, stats, failed) = days(first, count);
    let seconds = start.elapsed().as_secs_f64();
    println!("{ran} days in {seconds:.1} s, {:.0} a second: {stats:?}", ran as f64 / seconds);
    if let Some((seed, v)) = failed {
        panic!("{}\n{v}", report(seed, None));
    }
    assert_eq!(ran, count);
}

#[test]
fn every_planted_bug_is_caught_within_2000_days() {
    let mut missed = Vec::new();
    for bug in Bug::ALL {
        plant(Some(bug));
        let caught = (0..2000).find_map(|seed| day(seed, false).0.err().map(|v| (seed, v)));
        plant(None);
        match caught {
            Some((seed, v)) => println!("{bug:?}: caught on day {seed}: {v}"),
            None => missed.push(bug),
        }
    }
    assert!(missed.is_empty(), "not caught: {missed:?}");
}

/// Runs the seed of `KVFERRY_SIM_SEED`, with the bug of `KVFERRY_SIM_BUG` planted, and prints its trace.
#[test]
#[ignore = "a tool: replays KVFERRY_SIM_SEED"]
fn replay() {
    let seed = env("KVFERRY_SIM_SEED").expect("KVFERRY_SIM_SEED is the seed to run");
    let bug = std::env::var("KVFERRY_SIM_BUG").ok();
    let bug = bug.and_then(|name| Bug::ALL.into_iter().find(|b| format!("{b:?}") == name));
    plant(bug);
    if day(seed, false).0.is_err() {
        panic!("{}", report(seed, bug));
    }
    let (result, lines) = day(seed, true);
    lines.iter().for_each(|l| println!("{l}"));
    println!("seed {seed}: every promise was kept: {result:?}");
}

#[test]
fn a_seed_is_the_same_day_every_time() {
    for seed in 0..50 {
        assert_eq!(day(seed, true).1, day(seed, true).1, "seed {seed}");
    }
}
