//! The fixed cost of a pull: claim, fence, decide and release, with one small block. `cargo bench --bench pull`.

use std::time::{Duration, Instant};

use kvferry::{Consumer, LaneKind, Pull};
use kvferry_testkit::rig::{self, Producer, Spec, local};

fn main() {
    rig::play();
    let spec = Spec { blocks: 8, regions: 1, block_size: 4096, ..Spec::default() };
    let mut producer = Producer::start(&spec);
    let limit = Duration::from_secs(10);
    println!(
        "{:<6} {:>6} {:>14} {:>12} {:>12} {:>12} {:>14}",
        "lane", "pulls", "first pull ms", "p50 us", "p90 us", "p99 us", "claim p50 us"
    );
    for lane in [LaneKind::Local, LaneKind::Tcp] {
        let consumer = Consumer::builder("bench".parse().expect("an id"), spec.kv_model(), spec.layout())
            .build()
            .expect("a consumer");
        let (mut all, mut claims) = (Vec::new(), Vec::new());
        let mut first = Duration::ZERO;
        for i in 0..2001 {
            let offer = producer.offer(&[0]);
            let start = Instant::now();
            consumer.pull(Pull::new(offer, local([0])).lanes(vec![lane]).deadline(limit)).expect("a pull");
            let ended = consumer.wait(limit * 2).expect("it ends");
            let took = start.elapsed();
            assert!(ended.outcome.complete(), "{:?}", ended.outcome);
            if i == 0 {
                first = took;
            } else {
                all.push(took);
                claims.push(ended.outcome.times.claim.unwrap_or_default());
            }
        }
        all.sort();
        claims.sort();
        let at = |v: &[Duration], p: usize| v[(v.len() - 1) * p / 100].as_secs_f64() * 1e6;
        println!(
            "{:<6} {:>6} {:>14.2} {:>12.1} {:>12.1} {:>12.1} {:>14.1}",
            lane.as_str(),
            all.len(),
            first.as_secs_f64() * 1e3,
            at(&all, 50),
            at(&all, 90),
            at(&all, 99),
            at(&claims, 50)
        );
    }
}
