//! Producers that are killed again and again, while both sides' pools are GPU memory.

use std::time::{Duration, Instant};

use cudarc::driver::result;
use kvferry::{Consumer, LaneKind};
use kvferry_testkit::rig::{Producer, SOON, Spec, assert_loaded_is_exact, consumer, ended, pull_all, throttled};

use crate::{
    alone::{alone, on_standin},
    pair::{Engine, wait_until},
};

/// What a consumer process holds beside its pool.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    device_bytes: usize,
    imports: u64,
    streams: u64,
    registrations: u64,
}

impl Held {
    fn now() -> Self {
        let counts = crate::alone::standin().unwrap().counts();
        let (free, total) = result::mem_get_info().unwrap();
        Self {
            descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count(),
            device_bytes: total - free,
            imports: counts.imports,
            streams: counts.streams,
            registrations: counts.registrations,
        }
    }
}

/// Pulls everything over a lane from a producer that is killed when some of it is loaded.
fn pull_from_one_that_dies(consumer: &Consumer, spec: &Spec, round: u32) {
    let lane = if round.is_multiple_of(2) { LaneKind::Tcp } else { LaneKind::Local };
    let mut producer = Producer::start(spec);
    let offer = producer.offer_all();
    let id = consumer.pull(pull_all(&offer, lane, SOON)).unwrap();
    // From before the first chunk to after the last one.
    let share = f64::from(round % 11) / 10.0;
    let until = Instant::now() + SOON;
    while let Some((loaded, all)) = consumer.progress(id)
        && (all == 0 || (loaded as f64) < share * all as f64)
    {
        assert!(Instant::now() < until, "{loaded} of {all} chunks");
        std::thread::yield_now();
    }
    producer.kill();
    let end = ended(consumer);
    assert_loaded_is_exact(&end, consumer, spec, producer.seed);
    assert!(end.outcome.times.decided.unwrap() < SOON, "{:?}", end.outcome);
}

fn kill(times: u32) {
    let _engine = Engine::new();
    let spec = Spec { blocks: 128, gpu: true, ..Spec::default() };
    let consumer = consumer(&spec, throttled("throttle=256M"));
    // The first rounds open what stays open.
    (0..4).for_each(|round| pull_from_one_that_dies(&consumer, &spec, round));
    let settled = |held: &Held| held.imports == 0;
    wait_until("the imports are closed", || settled(&Held::now()));
    let before = Held::now();
    (0..times).for_each(|round| pull_from_one_that_dies(&consumer, &spec, round));
    // A dead peer's memory is free soon, also with no pull running.
    let began = Instant::now();
    wait_until("the dead producers' memory is free", || Held::now().device_bytes <= before.device_bytes);
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    wait_until("all is closed", || Held::now().descriptors <= before.descriptors);
    let after = Held::now();
    assert_eq!((after.imports, after.streams, after.registrations), (0, before.streams, before.registrations));
    assert_eq!((consumer.blocks_held(), consumer.pulls(), consumer.wedged()), (0, 0, 0));
    // The whole ring is there: a pull of everything uses it, and ends complete.
    let mut producer = Producer::start(&spec);
    let offer = producer.offer_all();
    consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    assert!(ended(&consumer).outcome.complete());
}

fn settings() -> String {
    format!("memory=2G,dir=/dev/shm/kvferry-kills-{}", std::process::id())
}

#[test]
fn kills_lose_no_descriptor_or_device_byte() {
    let _ = on_standin!("kills::kills_lose_no_descriptor_or_device_byte", &settings(), "gpu");
    kill(22);
}

#[test]
#[ignore = "needs minutes"]
fn a_thousand_kills_lose_no_descriptor_or_device_byte() {
    let _ = on_standin!("kills::a_thousand_kills_lose_no_descriptor_or_device_byte", &settings(), "gpu");
    kill(1000);
}
