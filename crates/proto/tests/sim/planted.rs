//! The simulation with a planted bug. Only builds with debug assertions can plant one.

use kvferry_proto::sabotage::{Bug, plant};

use crate::{replay_seed, run_seed};

#[test]
fn every_planted_bug_is_caught_within_2000_seeds() {
    let mut missed = Vec::new();
    for bug in Bug::ALL {
        plant(Some(bug));
        let caught = (0..2000).find_map(|seed| run_seed(seed, false).0.err().map(|v| (seed, v)));
        plant(None);
        match caught {
            Some((seed, v)) => println!("{bug:?}: caught by seed {seed}: {v}"),
            None => missed.push(bug),
        }
    }
    assert!(missed.is_empty(), "not caught: {missed:?}");
}

/// Replays a seed with the bug of `KVFERRY_SIM_BUG` planted.
#[test]
#[ignore = "a tool: replays KVFERRY_SIM_SEED"]
fn replay() {
    let bug = std::env::var("KVFERRY_SIM_BUG").ok();
    plant(bug.and_then(|name| Bug::ALL.into_iter().find(|b| format!("{b:?}") == name)));
    replay_seed();
}
