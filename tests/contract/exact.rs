//! Every block of a pull ends in exactly one of two sets, and a loaded one holds what the producer held.

use std::time::Duration;

use kvferry::{BlockId, Cause, Config, GroupId, LaneKind, LocalBlocks, Offer, Pull, PullError};
use kvferry_testkit::rig::{Producer, SOON, Spec, all_of, assert_loaded_is_exact, consumer, ended, pull_all, really};

#[test]
fn a_pull_over_each_lane_is_byte_exact() {
    for (lane, engine_memory) in [(LaneKind::Local, false), (LaneKind::Local, true), (LaneKind::Tcp, false)] {
        let spec = Spec { engine_memory, ..Spec::default() };
        let mut producer = Producer::start(&spec);
        let consumer = consumer(&spec, Config::default());
        let offer = producer.offer_all();
        consumer.pull(pull_all(&offer, lane, SOON)).unwrap();
        let end = ended(&consumer);
        assert!(end.outcome.complete(), "{lane}: {:?}", end.outcome);
        assert_eq!(end.outcome.lanes, [really(lane)]);
        assert_eq!(assert_loaded_is_exact(&end, &consumer, &spec, producer.seed), u64::from(spec.blocks));
        assert_eq!(end.outcome.bytes, u64::from(spec.blocks) * spec.block_bytes());
        assert_eq!(producer.freed(offer.id).0, "Released");
    }
}

#[test]
fn positions_decide_what_goes_where_and_what_is_not_offered_is_invalid() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, Config::default());
    let offer = producer.offer(&[9, 8, 7, 6]);
    // Positions 1 and 3 are wanted, 2 is a local hit, 4 and 5 were never offered.
    let blocks = [Some(100), None, Some(50), Some(30), Some(31)];
    let blocks = blocks.iter().map(|b| b.map(BlockId)).collect();
    let wanted = LocalBlocks { group: GroupId(0), first_position: 1, blocks };
    consumer.pull(Pull::new(offer, vec![wanted]).deadline(SOON)).unwrap();
    let end = ended(&consumer);
    let g = &end.outcome.groups[0];
    assert_eq!(g.loaded.iter().collect::<Vec<_>>(), [1, 3]);
    assert_eq!(g.invalid.iter().collect::<Vec<_>>(), [4, 5]);
    assert_eq!(g.causes.len(), 1);
    assert_eq!(g.causes[0].0, Cause::NotOffered);
    let layout = spec.layout();
    let mut check = kvferry_testkit::pattern::Check::new();
    for (local, remote) in [(100, 8), (50, 6)] {
        let (_, bad) =
            check.block(producer.seed, (&layout, remote), (consumer.memory(), &layout, local), GroupId(0)).unwrap();
        assert_eq!(bad, 0);
    }
    let ids = |b: &[kvferry::Block]| b.iter().map(|b| b.id.0).collect::<Vec<_>>();
    assert_eq!((ids(&end.blocks.loaded), ids(&end.blocks.invalid)), (vec![100, 50], vec![30, 31]));
}

#[test]
fn many_pulls_at_once_do_not_mix() {
    let spec = Spec { blocks: 512, ..Spec::default() };
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, Config::default());
    let offers: Vec<Offer> =
        (0..32).map(|i| producer.offer(&(i * 16..i * 16 + 16).rev().collect::<Vec<_>>())).collect();
    for (i, offer) in offers.iter().enumerate() {
        let blocks = (0..16).map(|b| Some(BlockId(i as u32 * 16 + b))).collect();
        let wanted = LocalBlocks { group: GroupId(0), first_position: 0, blocks };
        let lane = if i % 2 == 0 { LaneKind::Local } else { LaneKind::Tcp };
        consumer.pull(Pull::new(offer.clone(), vec![wanted]).lanes(vec![lane]).deadline(SOON)).unwrap();
    }
    let layout = spec.layout();
    let mut check = kvferry_testkit::pattern::Check::new();
    for _ in 0..32 {
        let end = ended(&consumer);
        assert!(end.outcome.complete(), "{:?}", end.outcome);
        for (position, block) in end.blocks.loaded.iter().enumerate() {
            let src = end.offer.groups[0].blocks[position].unwrap().0;
            let (_, bad) = check
                .block(producer.seed, (&layout, src), (consumer.memory(), &layout, block.id.0), GroupId(0))
                .unwrap();
            assert_eq!(bad, 0, "local block {} does not hold block {src}", block.id.0);
        }
    }
    assert_eq!(consumer.blocks_held(), 0);
}

#[test]
fn a_pull_that_cannot_be_right_is_refused_and_holds_nothing() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, Config::default());
    let offer = producer.offer(&[1, 2]);
    let wanted = |ids: &[u32]| {
        vec![LocalBlocks {
            group: GroupId(0),
            first_position: 0,
            blocks: ids.iter().map(|b| Some(BlockId(*b))).collect(),
        }]
    };
    let past = Pull::new(offer.clone(), wanted(&[0, spec.blocks]));
    assert!(matches!(consumer.pull(past), Err(PullError::Plan(_))));
    let twice = Pull::new(offer.clone(), wanted(&[5, 5]));
    assert!(matches!(consumer.pull(twice), Err(PullError::Plan(_))));
    let mut no_ranks = offer.clone();
    no_ranks.ranks.clear();
    assert!(matches!(consumer.pull(Pull::new(no_ranks, wanted(&[0, 1]))), Err(PullError::Offer(_))));
    assert_eq!((consumer.blocks_held(), consumer.pulls()), (0, 0));

    // An offer that names blocks past the producer's pool is caught when the pool is known, and loses nothing.
    let mut liar = offer.clone();
    liar.groups[0].blocks[1] = Some(BlockId(1 << 30));
    consumer.pull(Pull::new(liar, wanted(&[0, 1])).deadline(SOON)).unwrap();
    let end = ended(&consumer);
    assert_eq!((end.outcome.loaded(), end.outcome.cause()), (0, Some(Cause::BadOffer)));
    consumer.pull(Pull::new(producer.offer(&[1, 2]), wanted(&[0, 1])).deadline(Duration::from_secs(10))).unwrap();
    assert!(ended(&consumer).outcome.complete());
    let _ = all_of(&offer);
}
