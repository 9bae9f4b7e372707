//! Plans: which bytes are read into which.

mod growing;

use std::collections::BTreeMap;

use kvferry_proto::{
    BlockId, ChunkSize, Group, GroupId, GroupKind, LocalBlocks, OfferGroup, Plan, PlanError, PoolLayout, Read, Region,
    Shard, Source,
};
use proptest::prelude::*;

/// A byte of a rank's memory: segment and offset.
type Byte = (u16, u64);

/// One side's blocks by position, from a first position on.
type Blocks = (u32, Vec<Option<BlockId>>);

const POOL: u32 = 24;

fn offered(group: u16, (first_position, blocks): &Blocks) -> OfferGroup {
    OfferGroup { group: GroupId(group), first_position: *first_position, blocks: blocks.clone() }
}

fn wanted(group: u16, (first_position, blocks): &Blocks) -> LocalBlocks {
    LocalBlocks { group: GroupId(group), first_position: *first_position, blocks: blocks.clone() }
}

/// The block at a position.
fn at((first, blocks): &Blocks, position: u32) -> Option<BlockId> {
    position.checked_sub(*first).and_then(|i| blocks.get(i as usize).copied().flatten())
}

/// Blocks 0, 1, 2, … at the positions from 0 on.
fn straight(n: u32) -> Blocks {
    (0, (0..n).map(|b| Some(BlockId(b))).collect())
}

/// One side's group of regions `r0`, `r1`, … with these bytes a block: each in a place and with a stride of its own.
fn group(id: u16, bytes: &[u64], slack: u64, shuffled: bool) -> (Group, u64) {
    let mut end = slack;
    let mut regions: Vec<_> = bytes
        .iter()
        .enumerate()
        .map(|(i, &block_bytes)| {
            let (offset, stride) = (end, block_bytes + slack);
            end = offset + u64::from(POOL) * stride;
            Region { name: format!("r{i}").into(), segment: id, offset, block_bytes, stride }
        })
        .collect();
    if shuffled {
        regions.reverse();
    }
    (Group { id: GroupId(id), kind: GroupKind::Full, block_tokens: 16, blocks: POOL, regions }, end)
}

/// One side's pool, a segment for each group.
fn pool(groups: &[Vec<u64>], slack: u64, shuffled: bool) -> PoolLayout {
    let (groups, segments) = (0..).zip(groups).map(|(id, bytes)| group(id, bytes, slack, shuffled)).unzip();
    let pool = PoolLayout { segments, groups };
    pool.check().unwrap();
    pool
}

/// Carries out all reads of all chunks: for each byte written here, the source and the byte there. Fails when a byte is
/// written twice or lies outside of its segment.
fn carry_out(plan: &Plan, sources: &[&PoolLayout], here: &PoolLayout, max_read: u64) -> BTreeMap<Byte, (usize, Byte)> {
    let mut copied = BTreeMap::new();
    for chunk in 0..plan.chunks().len() as u32 {
        for (s, there) in sources.iter().enumerate() {
            let mut reads = Vec::new();
            plan.reads(chunk, s, max_read, &mut reads);
            for r in reads {
                assert!(r.len > 0 && r.len <= max_read && r.len == u64::from(r.blocks) * r.piece && r.chunk == chunk);
                assert!(r.src_offset + r.len <= there.segments[usize::from(r.src_segment)], "past the source: {r:?}");
                assert!(r.dst_offset + r.len <= here.segments[usize::from(r.dst_segment)], "past the pool: {r:?}");
                for k in 0..r.len {
                    let to = (r.dst_segment, r.dst_offset + k);
                    let twice = copied.insert(to, (s, (r.src_segment, r.src_offset + k)));
                    assert!(twice.is_none(), "written twice: {r:?}");
                }
                check_names(plan, there, &r);
            }
        }
    }
    copied
}

/// A read's names and its addresses must mean the same bytes.
fn check_names(plan: &Plan, there: &PoolLayout, r: &Read) {
    let region = &there.group(r.group).unwrap().regions[usize::from(r.region)];
    assert_eq!(region.segment, r.src_segment);
    let wants = plan.wants(r.chunk);
    for i in 0..r.blocks {
        let want = wants.iter().find(|w| w.position == r.position + i).expect("only wanted positions of its chunk");
        let named = region.block_offset(want.src.0) + r.within;
        assert_eq!(named, r.src_offset + u64::from(i) * r.piece, "position {} of {r:?}", want.position);
    }
}

/// Distinct blocks in any order, some of them null, from some position on.
fn blocks() -> impl Strategy<Value = Blocks> {
    let shuffled = Just((0..POOL).collect::<Vec<_>>()).prop_shuffle();
    let ordered = Just((0..POOL).collect::<Vec<_>>());
    let null = proptest::collection::vec(proptest::bool::weighted(0.2), POOL as usize);
    (0u32..6, prop_oneof![shuffled, ordered], null, 0..=POOL as usize).prop_map(|(first, ids, null, n)| {
        let block = |(id, null): (u32, bool)| (!null).then_some(BlockId(id));
        (first, ids.into_iter().zip(null).map(block).take(n).collect())
    })
}

fn chunk_size() -> impl Strategy<Value = ChunkSize> {
    (1u32..40, 1u64..200, 1u64..400).prop_map(|(per_pull, min_bytes, max_bytes)| ChunkSize {
        per_pull,
        min_bytes,
        max_bytes,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn reads_cover_exactly_the_wanted_bytes_of_every_block_once_and_in_bounds(
        bytes in proptest::collection::vec(proptest::collection::vec(1u64..40, 1..4), 1..3),
        (their_slack, our_slack) in (0u64..9, prop_oneof![Just(0u64), 0u64..9]),
        theirs in proptest::collection::vec(blocks(), 2),
        ours in proptest::collection::vec(blocks(), 2),
        size in chunk_size(),
        max_read in prop_oneof![1u64..100, Just(u64::MAX)],
    ) {
        let (there, here) = (pool(&bytes, their_slack, true), pool(&bytes, our_slack, false));
        let whole = Shard::whole(1, 1);
        let o: Vec<_> = (0..).zip(&theirs).take(bytes.len()).map(|(g, b)| offered(g, b)).collect();
        let local: Vec<_> = (0..).zip(&ours).take(bytes.len()).map(|(g, b)| wanted(g, b)).collect();
        let source = Source { layout: &there, shard: &whole };
        let plan = Plan::new(&o, &[source], Source { layout: &here, shard: &whole }, &local, size, 1000).unwrap();

        let mut expected = BTreeMap::new();
        let mut not_offered = Vec::new();
        for (g, l) in local.iter().enumerate() {
            for (position, dst) in l.wants() {
                let Some(src) = at(&theirs[g], position) else {
                    not_offered.push((g, position));
                    continue;
                };
                for ours in &here.groups[g].regions {
                    let theirs = there.groups[g].regions.iter().find(|r| r.name == ours.name).unwrap();
                    for k in 0..ours.block_bytes {
                        let from = (theirs.segment, theirs.block_offset(src.0) + k);
                        expected.insert((ours.segment, ours.block_offset(dst.0) + k), (0, from));
                    }
                }
            }
        }
        prop_assert_eq!(plan.bytes(), expected.len() as u64);
        let copied = carry_out(&plan, &[&there], &here, max_read);
        prop_assert!(copied == expected);
        let said = |(g, p): (usize, &kvferry_proto::GroupPlan)| p.not_offered.iter().map(|n| (g, n.0)).collect::<Vec<_>>();
        prop_assert_eq!(plan.groups().iter().enumerate().flat_map(said).collect::<Vec<_>>(), not_offered);
    }

    #[test]
    fn chunks_of_a_group_go_in_prefix_order_and_hold_every_want_once(theirs in blocks(), ours in blocks(), size in chunk_size()) {
        let (layout, whole) = (pool(&[vec![8, 8]], 0, false), Shard::whole(1, 1));
        let side = Source { layout: &layout, shard: &whole };
        let plan = Plan::new(&[offered(0, &theirs)], &[side], side, &[wanted(0, &ours)], size, 1000).unwrap();
        let by_chunk: Vec<_> = (0..plan.chunks().len() as u32).flat_map(|c| plan.wants(c).to_vec()).collect();
        prop_assert_eq!(&by_chunk, &plan.groups()[0].wants);
        prop_assert!(by_chunk.windows(2).all(|w| w[0].position < w[1].position));
    }

    /// The heads lie in unequal parts on the sources, and in other unequal parts on the readers.
    #[test]
    fn unequal_tensor_parallel_parts_cover_each_head_once(
        heads in 2u32..9,
        head_bytes in 1u64..20,
        (cut_there, cut_here) in (0u32..9, 0u32..9),
        (their_slack, our_slack) in (0u64..9, 0u64..9),
        theirs in blocks(),
        ours in blocks(),
        max_read in 1u64..200,
    ) {
        // A cut at 0 or past the end: one rank has all.
        let parts = |cut: u32| -> Vec<Shard> {
            let cut = if cut < heads { cut } else { 0 };
            let part = |(first_head, n)| Shard { first_head, heads: n, ..Shard::whole(heads, 1) };
            [(0, cut), (cut, heads - cut)].into_iter().filter(|p| p.1 > 0).map(part).collect()
        };
        let layout = |s: &Shard, slack| pool(&[vec![u64::from(s.heads) * head_bytes; 2]], slack, false);
        let sources: Vec<_> = parts(cut_there).into_iter().map(|s| (layout(&s, their_slack), s)).collect();
        for shard in parts(cut_here) {
            let here = layout(&shard, our_slack);
            let sharing: Vec<_> = sources.iter().filter(|(_, s)| s.common_heads(&shard).is_some()).collect();
            let from: Vec<_> = sharing.iter().map(|(layout, shard)| Source { layout, shard }).collect();
            let to = Source { layout: &here, shard: &shard };
            let size = ChunkSize::default();
            let plan = Plan::new(&[offered(0, &theirs)], &from, to, &[wanted(0, &ours)], size, 1000).unwrap();

            let mut expected = BTreeMap::new();
            for (position, dst) in wanted(0, &ours).wants() {
                let Some(src) = at(&theirs, position) else { continue };
                for (region, head) in (0..2).flat_map(|r| (shard.first_head..shard.first_head + shard.heads).map(move |h| (r, h))) {
                    let holds = |s: &Shard| (s.first_head..s.first_head + s.heads).contains(&head);
                    let number = sharing.iter().position(|(_, s)| holds(s)).unwrap();
                    let (layout, s) = sharing[number];
                    let (t, o) = (&layout.groups[0].regions[region], &here.groups[0].regions[region]);
                    for k in 0..head_bytes {
                        let from = t.block_offset(src.0) + u64::from(head - s.first_head) * head_bytes + k;
                        let to = o.block_offset(dst.0) + u64::from(head - shard.first_head) * head_bytes + k;
                        expected.insert((0, to), (number, (0, from)));
                    }
                }
            }
            let layouts: Vec<_> = sharing.iter().map(|(l, _)| l).collect();
            prop_assert!(carry_out(&plan, &layouts, &here, max_read) == expected);
        }
    }
}

/// `(position, blocks)` of each read of a pull from `theirs` into `ours`, out of dense pools with one region.
fn reads(theirs: &Blocks, ours: &Blocks) -> Vec<(u32, u32)> {
    let (layout, whole) = (pool(&[vec![8]], 0, false), Shard::whole(1, 1));
    let side = Source { layout: &layout, shard: &whole };
    let size = ChunkSize { per_pull: 1, min_bytes: 1 << 20, max_bytes: 1 << 20 };
    let plan = Plan::new(&[offered(0, theirs)], &[side], side, &[wanted(0, ours)], size, 1000).unwrap();
    let mut out = Vec::new();
    plan.reads(0, 0, u64::MAX, &mut out);
    out.iter().map(|r| (r.position, r.blocks)).collect()
}

#[test]
fn neighbours_on_both_sides_are_one_read() {
    assert_eq!(reads(&straight(8), &straight(8)), [(0, 8)]);
}

#[test]
fn blocks_that_are_apart_on_either_side_are_read_apart() {
    let mut apart = straight(8);
    apart.1.swap(0, 7);
    assert_eq!(reads(&apart, &straight(8)), [(0, 1), (1, 6), (7, 1)]);
    assert_eq!(reads(&straight(8), &apart), [(0, 1), (1, 6), (7, 1)]);
}

#[test]
fn merging_never_crosses_a_position_gap() {
    // Blocks 0 to 3 are neighbours on both sides, and position 2 lies between them.
    let gap = (0, [Some(0), Some(1), None, Some(2), Some(3)].map(|b| b.map(BlockId)).to_vec());
    assert_eq!(reads(&gap, &gap), [(0, 2), (3, 2)]);
}

/// Why a pull between two sides that differ in this way cannot be planned.
fn refusal(differ: impl Fn(&mut PoolLayout, &mut Shard)) -> (String, String) {
    let (here, ours) = (pool(&[vec![24, 24]], 0, false), Shard::whole(4, 1));
    let (mut there, mut theirs) = (here.clone(), ours);
    differ(&mut there, &mut theirs);
    let source = Source { layout: &there, shard: &theirs };
    let to = Source { layout: &here, shard: &ours };
    let all = straight(4);
    let made = Plan::new(&[offered(0, &all)], &[source], to, &[wanted(0, &all)], ChunkSize::default(), 1000);
    let error = made.expect_err("it does not fit");
    let text = error.to_string();
    let PlanError::Region { region, why, .. } = error else { panic!("{error:?}") };
    assert!(text.contains(&region), "the message names the region: {text}");
    (region, why)
}

#[test]
fn regions_that_do_not_match_are_refused_by_name() {
    let (region, why) = refusal(|l, _| l.groups[0].regions[1].block_bytes = 16);
    assert!(region == "r1" && why.contains("24") && why.contains("16"), "{region}: {why}");
    let (region, why) = refusal(|l, _| l.groups[0].regions[1].name = "other".into());
    assert!(region == "r1" && why.contains("hold 0 of a block's 24 bytes"), "{region}: {why}");
    let (region, why) = refusal(|l, _| l.groups[0].block_tokens = 32);
    assert!(region == "r0" && why.contains("block_tokens"), "{region}: {why}");
    let (_, why) = refusal(|l, _| l.groups[0].kind = GroupKind::State);
    assert!(why.contains("State"), "{why}");
}

#[test]
fn heads_that_do_not_match_are_refused_by_name() {
    let (region, why) = refusal(|_, s| s.heads = 3); // 8 bytes a head there, 6 here
    assert!(region == "r0" && why.contains("a head differs in size"), "{region}: {why}");
    let (region, why) = refusal(|l, s| {
        s.heads = 2;
        l.groups[0].regions.iter_mut().for_each(|r| r.block_bytes = 12);
    });
    assert!(
        region == "r0" && why.contains("hold 12 of a block's 24 bytes"),
        "half of the heads are nowhere: {region}: {why}"
    );
}

#[test]
fn heads_that_two_sources_hold_are_refused_rather_than_written_twice() {
    let (layout, whole) = (pool(&[vec![24]], 0, false), Shard::whole(4, 1));
    let side = Source { layout: &layout, shard: &whole };
    let all = straight(4);
    let made = Plan::new(&[offered(0, &all)], &[side, side], side, &[wanted(0, &all)], ChunkSize::default(), 1000);
    assert!(matches!(made, Err(PlanError::Region { .. })), "{made:?}");
}

/// Two ranks that hold the same half add up to a block's bytes, and the other half would keep what was there before.
#[test]
fn two_sources_with_the_same_half_are_not_a_whole() {
    let (theirs, ours) = (pool(&[vec![12]], 0, false), pool(&[vec![24]], 0, false));
    for first_head in [0, 2] {
        let half = Shard { tp_size: 2, first_head, heads: 2, ..Shard::whole(4, 1) };
        let (side, whole) = (Source { layout: &theirs, shard: &half }, Shard::whole(4, 1));
        let here = Source { layout: &ours, shard: &whole };
        let all = straight(4);
        let plan = |sources: &[Source<'_>]| {
            Plan::new(&[offered(0, &all)], sources, here, &[wanted(0, &all)], ChunkSize::default(), 1000)
        };
        let twice = plan(&[side, side]);
        assert!(matches!(twice, Err(PlanError::Region { .. })), "{twice:?}");
        let other = Shard { first_head: 2 - first_head, ..half };
        assert!(plan(&[side, Source { layout: &theirs, shard: &other }]).is_ok(), "both halves, in any order");
    }
}

#[test]
fn blocks_past_either_pool_or_wanted_twice_are_refused() {
    let (layout, whole) = (pool(&[vec![8]], 0, false), Shard::whole(1, 1));
    let side = Source { layout: &layout, shard: &whole };
    let plan = |theirs: &[u32], ours: &[u32], limit| {
        let blocks = |ids: &[u32]| (0, ids.iter().map(|b| Some(BlockId(*b))).collect());
        let o = [offered(0, &blocks(theirs))];
        Plan::new(&o, &[side], side, &[wanted(0, &blocks(ours))], ChunkSize::default(), limit).map(|_| ())
    };
    assert_eq!(plan(&[POOL - 1], &[POOL - 1], 9), Ok(()));
    assert_eq!(plan(&[POOL], &[0], 9), Err(PlanError::SourceBlock { group: 0, block: POOL, blocks: POOL }));
    assert_eq!(plan(&[0], &[POOL], 9), Err(PlanError::LocalBlock { group: 0, block: POOL, blocks: POOL }));
    assert_eq!(plan(&[0, 1], &[5, 5], 9), Err(PlanError::LocalBlockTwice { group: 0, block: 5 }));
    assert_eq!(plan(&[0, 1], &[0, 1], 1), Err(PlanError::TooManyBlocks { blocks: 2, limit: 1 }));
}
