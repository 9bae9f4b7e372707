//! Plans that are made in parts.

use super::*;
use kvferry_proto::Offered;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_plan_that_is_made_in_parts_reads_what_one_for_the_whole_offer_reads_and_nothing_above_the_mark(
        bytes in proptest::collection::vec(proptest::collection::vec(1u64..40, 1..4), 1..3),
        theirs in proptest::collection::vec(blocks(), 2),
        ours in proptest::collection::vec(blocks(), 2),
        size in chunk_size(),
        steps in proptest::collection::vec((0u64..600, 0usize..30, proptest::bool::weighted(0.3)), 0..6),
    ) {
        let (there, here) = (pool(&bytes, 3, true), pool(&bytes, 0, false));
        let whole = Shard::whole(1, 1);
        let all: Vec<_> = (0..).zip(&theirs).take(bytes.len()).map(|(g, b)| offered(g, b)).collect();
        let local: Vec<_> = (0..).zip(&ours).take(bytes.len()).map(|(g, b)| wanted(g, b)).collect();
        let (from, to) = ([Source { layout: &there, shard: &whole }], Source { layout: &here, shard: &whole });
        let one = Plan::new(&all, &from, to, &local, size, 1000).unwrap();

        let mut plan = Plan::open(to, &local, size, 1000).unwrap();
        let (mut mark, mut listed, mut late) = (0, 0, true);
        for (tokens, blocks, one_group) in steps {
            (mark, listed, late) = (mark.max(tokens), listed.max(blocks), late && one_group);
            let groups: Vec<_> = all
                .iter()
                .take(if late { 1 } else { all.len() })
                .map(|g| OfferGroup { blocks: g.blocks[..listed.min(g.blocks.len())].to_vec(), ..g.clone() })
                .collect();
            let before = plan.chunks().len();
            plan.extend(Offered { groups: &groups, tokens: mark, complete: false }, &from, to).unwrap();
            let waits = plan.groups().iter().any(|g| g.uncut().next().is_some());
            prop_assert!(waits || plan.is_complete());
            for chunk in before..plan.chunks().len() {
                let last = plan.wants(chunk as u32).last().unwrap().position;
                prop_assert!((u64::from(last) + 1) * 16 <= mark, "position {last} is read, and the mark is {mark}");
            }
        }
        plan.extend(Offered { groups: &all, tokens: 600, complete: true }, &from, to).unwrap();
        prop_assert!(plan.is_complete());
        prop_assert_eq!(plan.bytes(), one.bytes());
        prop_assert!(plan.groups().iter().all(|g| g.uncut().next().is_none()));
        prop_assert!(carry_out(&plan, &[&there], &here, u64::MAX) == carry_out(&one, &[&there], &here, u64::MAX));
        for (a, b) in plan.groups().iter().zip(one.groups()) {
            prop_assert_eq!((&a.wants, &a.not_offered), (&b.wants, &b.not_offered));
        }
    }
}

#[test]
fn a_chunk_waits_until_it_is_large_enough_and_no_longer_than_to_the_end() {
    let pool = pool(&[vec![10]], 0, false);
    let whole = Shard::whole(1, 1);
    let side = Source { layout: &pool, shard: &whole };
    // A sixteenth of the pull: 15 bytes, so two blocks.
    let size = ChunkSize { per_pull: 1, min_bytes: 1000, max_bytes: 1000 };
    let all = [offered(0, &straight(POOL))];
    let mut plan = Plan::open(side, &[wanted(0, &straight(POOL))], size, 1000).unwrap();
    let mut chunks = |blocks: u64, complete| {
        plan.extend(Offered { groups: &all, tokens: blocks * 16, complete }, &[side], side).unwrap();
        plan.chunks().iter().map(|c| c.count).collect::<Vec<_>>()
    };
    assert_eq!(chunks(1, false), [0u32; 0]);
    assert_eq!(chunks(2, false), [2]);
    assert_eq!(chunks(3, false), [2]);
    assert_eq!(chunks(12, false), [2, 10]);
    assert_eq!(chunks(23, false), [2, 10, 11]);
    assert_eq!(chunks(24, true), [2, 10, 11, 1]);
}
