//! Planted bugs. A release build does not contain them, and so not this test either.

use kvferry::scheduler::sabotage::{self, Bug};

use crate::{cases, run, runner};

#[test]
fn every_planted_bug_is_caught() {
    for bug in Bug::ALL {
        sabotage::plant(Some(bug));
        let mut tries = 0;
        let caught = {
            let tries = std::cell::Cell::from_mut(&mut tries);
            runner(20_000, 5, 0).run(&cases(0..4), |c| {
                tries.set(tries.get() + 1);
                run(&c)
            })
        };
        sabotage::plant(None);
        let Err(e) = caught else { panic!("{bug:?} was not caught in {tries} cases") };
        println!("{bug:?}: caught after {tries} cases: {}", e.to_string().lines().next().unwrap_or_default());
    }
}
