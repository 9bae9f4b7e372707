//! The blocks that arrived are kept, and a failed lane is replaced within the deadline.

use kvferry::{LaneKind, Pull};
use kvferry_testkit::rig::{
    Producer, SOON, Spec, all_of, assert_loaded_is_exact, consumer, ended, killable, pull_all, really, throttled,
    wait_until_loaded,
};
use rustix::process::Signal;

#[test]
fn a_producer_killed_at_a_share_of_the_bytes_leaves_nearly_that_share_of_the_prompt() {
    for lane in [LaneKind::Tcp, LaneKind::Local] {
        for (killed_at, at_least) in [(0.25, 0.20), (0.50, 0.45), (0.75, 0.70)] {
            let spec = Spec { blocks: 512, ..Spec::default() };
            let mut producer = Producer::start(&spec);
            let consumer = consumer(&spec, killable());
            let offer = producer.offer_all();
            let pull = consumer.pull(pull_all(&offer, lane, SOON)).unwrap();
            wait_until_loaded(&consumer, pull, killed_at);
            producer.signal(Signal::KILL);
            let end = ended(&consumer);
            let kept = end.outcome.loaded() as f64 / 512.0;
            assert!(kept >= at_least && kept < 1.0, "{lane}: killed at {killed_at}, kept {kept}");
            assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
        }
    }
}

#[test]
fn a_broken_lane_is_replaced_and_only_the_missing_part_is_read_again() {
    let (tcp, local) = (really(LaneKind::Tcp), really(LaneKind::Local));
    let mut pairs = vec![(tcp, local), (local, tcp), (tcp, tcp)];
    if tcp == LaneKind::Verbs {
        pairs.push((LaneKind::Verbs, LaneKind::Tcp));
    }
    for (first, second) in pairs {
        let spec = Spec::default();
        let mut producer = Producer::start(&spec);
        // The first lane breaks after 6 of 16 MiB.
        let consumer = consumer(&spec, throttled("down@6M,lanes=1"));
        let offer = producer.offer_all();
        let lanes = if first == second { vec![first] } else { vec![first, second] };
        consumer.pull(Pull::new(offer.clone(), all_of(&offer)).lanes(lanes).deadline(SOON)).unwrap();
        let end = ended(&consumer);
        assert!(end.outcome.complete(), "{first} then {second}: {:?}", end.outcome);
        assert_eq!(end.outcome.lanes, [first, second]);
        assert_eq!(end.outcome.retries, 1);
        assert_eq!(assert_loaded_is_exact(&end, &consumer, &spec, producer.seed), u64::from(spec.blocks));
    }
}
