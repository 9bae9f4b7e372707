//! Every block of a pull ends in exactly one of two sets, and a loaded one holds what the producer held.

use std::time::Duration;

use kvferry::{BlockId, Cause, Config, GroupId, LaneKind, LocalBlocks, Offer, Pull, PullError, Token};
use kvferry_testkit::rig::{Producer, SOON, Spec, assert_loaded_is_exact, consumer, ended, local, pull_all, really};

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
fn blocks_are_matched_by_position_and_positions_without_an_offered_block_are_invalid() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, Config::default());
    let offer = producer.offer(&[9, 8, 7, 6]);
    // Positions 1 and 3 are wanted, 2 is a local hit, 4 and 5 are not in the offer.
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
    assert_eq!(assert_loaded_is_exact(&end, &consumer, &spec, producer.seed), 2);
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
        let wanted = local(i as u32 * 16..(i as u32 + 1) * 16);
        let lane = really(if i % 2 == 0 { LaneKind::Local } else { LaneKind::Tcp });
        consumer.pull(Pull::new(offer.clone(), wanted).lanes(vec![lane]).deadline(SOON)).unwrap();
    }
    for _ in 0..32 {
        let end = ended(&consumer);
        assert!(end.outcome.complete(), "{:?}", end.outcome);
        assert_eq!(assert_loaded_is_exact(&end, &consumer, &spec, producer.seed), 16);
    }
    assert_eq!(consumer.blocks_held(), 0);
}

#[test]
fn an_invalid_pull_is_refused_and_holds_no_blocks() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, Config::default());
    let offer = producer.offer(&[1, 2]);
    let past = Pull::new(offer.clone(), local([0, spec.blocks]));
    assert!(matches!(consumer.pull(past), Err(PullError::Plan(_))));
    let twice = Pull::new(offer.clone(), local([5, 5]));
    assert!(matches!(consumer.pull(twice), Err(PullError::Plan(_))));
    let mut no_ranks = offer.clone();
    no_ranks.ranks.clear();
    assert!(matches!(consumer.pull(Pull::new(no_ranks, local([0, 1]))), Err(PullError::Offer(_))));
    assert_eq!((consumer.blocks_held(), consumer.pulls()), (0, 0));

    // A token that is not the offer's opens nothing, and harms nothing.
    let mut forged = offer.clone();
    forged.token = Token::random();
    consumer.pull(Pull::new(forged, local([0, 1])).deadline(SOON)).unwrap();
    let end = ended(&consumer);
    assert_eq!((end.outcome.loaded(), end.outcome.cause()), (0, Some(Cause::BadOffer)));
    assert_eq!(producer.count().0, 1, "the offer is still there");
    consumer.pull(Pull::new(offer, local([0, 1])).deadline(Duration::from_secs(10))).unwrap();
    assert!(ended(&consumer).outcome.complete());
}
