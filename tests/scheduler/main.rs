//! The scheduler's functions against a slow, simple engine that records the content of its blocks.
//!
//! After each step: no request counts on a block without valid content; each missing block is computed by exactly one
//! request; the parts of each prompt add up, counters only grow, and every token has its real source. With debug
//! assertions, the tests also plant bugs and check that each one is caught.

mod engine;
mod history;
#[cfg(debug_assertions)]
mod planted;
mod pool;

use std::collections::HashMap;

use engine::{Arrival, Engine, Op, layout};
use kvferry::{
    Block, BlockId, Cause, GroupId,
    scheduler::{
        invalid::{Policy, Report, resolve},
        ledger::Ledger,
        table::{GroupSpec, Held, Request},
        turn::turns,
    },
};
use proptest::{
    prelude::*,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

#[derive(Debug, Clone)]
struct Case {
    layout: u8,
    policy: Policy,
    ops: Vec<Op>,
}

fn arrival() -> impl Strategy<Value = Op> {
    let fails = prop_oneof![
        2 => Just(0u16),
        // A dead peer: all blocks from some position on.
        3 => (0u32..8).prop_map(|n| u16::MAX << n),
        2 => any::<u16>(),
    ];
    (0u32..2, 0u64..22, 1u64..7, 0u64..3, 0u64..30, any::<[bool; 4]>(), any::<bool>(), fails).prop_map(
        |(family, shared, tail, out, external, flags, skip, fails)| {
            let [asynchronous, share_load, retry, more] = flags;
            let skip_cache = skip && more;
            Op::Arrive(Arrival {
                family,
                shared,
                tail,
                out,
                external,
                asynchronous,
                skip_cache,
                share_load,
                retry,
                fails,
            })
        },
    )
}

fn cases(layouts: std::ops::Range<u8>) -> impl Strategy<Value = Case> {
    let op = prop_oneof![
        5 => arrival(),
        9 => (1u64..24, any::<u8>(), prop::bool::weighted(0.1))
            .prop_map(|(budget, noise, late)| Op::Step { budget, noise, late }),
        1 => any::<u8>().prop_map(Op::Abort),
        1 => any::<u8>().prop_map(Op::Preempt),
        1 => any::<u8>().prop_map(Op::Promote),
    ];
    let policy = prop_oneof![5 => Just(Policy::Recompute), 1 => Just(Policy::Fail)];
    (layouts, policy, prop::collection::vec(op, 2..22)).prop_map(|(layout, policy, ops)| Case { layout, policy, ops })
}

fn run(case: &Case) -> Result<(), TestCaseError> {
    Engine::new(layout(case.layout), case.policy).run(&case.ops).map_err(TestCaseError::fail)
}

fn runner(cases: u32, seed: u8, shrink: u32) -> TestRunner {
    let config = Config { cases, max_shrink_iters: shrink, failure_persistence: None, ..Config::default() };
    // Every run has the same cases, so a failure in CI can be repeated.
    TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &[seed; 32]))
}

fn holds(n: u32, seed: u8, layouts: std::ops::Range<u8>) {
    if let Err(e) = runner(n, seed, 20_000).run(&cases(layouts), |c| run(&c)) {
        panic!("{e}");
    }
}

#[test]
fn requests_count_only_on_valid_blocks_with_one_group() {
    holds(60_000, 1, 0..1);
}

#[test]
fn requests_count_only_on_valid_blocks_with_two_block_sizes() {
    holds(20_000, 2, 1..2);
}

#[test]
fn requests_count_only_on_valid_blocks_with_a_window() {
    holds(20_000, 3, 2..3);
}

#[test]
fn requests_count_only_on_valid_blocks_with_state() {
    holds(20_000, 4, 3..4);
}

/// A failure of a real scheduler, with its numbers: two requests share all blocks that fail. The external count of the
/// second one stayed at 7000 while none of its tokens were cached. A hit count became -7000, the metrics library refused
/// it, and every later request of that server failed.
#[test]
fn token_accounting_is_exact_when_all_lost_blocks_are_shared() {
    let groups = [GroupSpec::full(GroupId(0), 10).unwrap()];
    let table = |last: u32| vec![(0..700).chain([last]).map(|b| Some(BlockId(b))).collect::<Vec<_>>()];
    let (a, b) = (table(700), table(701));
    let held = Held { cached: 0, loaded: 7000, computed: 0 };
    // Both count on the same load of 7000 tokens, in the same step.
    let mut requests = [
        Request { id: 'a', blocks: &a, held, loading: false, scheduled: 10 },
        Request { id: 'b', blocks: &b, held, loading: false, scheduled: 10 },
    ];
    let mut ledger = Ledger::new();
    for r in &requests {
        ledger.admit(r.id, 7010);
        ledger.lookup(&r.id, 0, 7000);
    }
    let mut report = Report::new();
    report.extend((0..700).map(|b| (Block { group: GroupId(0), id: BlockId(b) }, Cause::PeerDown)));
    let outcome = resolve(&groups, &requests, &report, Policy::Recompute);
    ledger.apply(&outcome);
    for (r, affected) in requests.iter_mut().zip(&outcome.affected) {
        ledger.load_ended(&r.id);
        r.held = affected.held;
        assert_eq!(r.held.total(), 0);
        assert_eq!(ledger.request(&r.id).unwrap().pending, 7010);
    }
    assert_eq!(outcome.shared.len(), 700);
    assert!(outcome.shared.iter().all(|s| s.owner == 'a' && s.heirs == ['b']));

    // Steps of 2000 tokens per request, until both have their first token.
    let mut ran = HashMap::from([('a', 0), ('b', 0)]);
    for _ in 0..8 {
        let turns = turns(&groups, &requests);
        for (r, t) in requests.iter_mut().zip(&turns) {
            ledger.adopted(&r.id, t.computed);
            r.held.adopt(t.computed);
            let to = t.limit.unwrap_or(7010).min(r.held.total() + 2000).min(7010);
            *ran.get_mut(&r.id).unwrap() += to - r.held.total();
            r.held.computed += to - r.held.total();
            ledger.computed(&r.id, to);
            if to == 7010 {
                ledger.first_token(&r.id);
            }
        }
    }
    assert_eq!(ran, HashMap::from([('a', 7010), ('b', 10)]), "the lost blocks were computed once");
    let t = ledger.totals();
    assert_eq!((t.own.external, t.other.external, t.first), (7000, 7000, 20));
    assert_eq!((t.local_cache, t.external, t.pending, t.total()), (0, 0, 0, 2 * 7010));
    assert_eq!(ledger.prefilled(), 7010 + 10 + 2 * 10, "with the discarded tokens");
    let o = t.older();
    assert_eq!((o.local_cache_hit, o.external_kv_transfer, o.recomputed, o.cached), (0, 14_000, 14_000, 0));
}
