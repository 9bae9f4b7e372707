//! Producers and consumers that are killed again and again, while both sides' pools are GPU memory.

use std::{
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use cudarc::driver::result;
use kvferry::{Consumer, LaneKind, Offer};
use kvferry_testkit::{
    gpu,
    rig::{Producer, SOON, Spec, assert_loaded_is_exact, consumer, ended, pull_all, throttled},
};

use crate::{
    alone::{alone, on_standin},
    pair::{Engine, wait_until},
};

/// What a consumer process holds beside its pool. The last three are the stand-in's counts; 0 on a real GPU.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    imports: u64,
    streams: u64,
    registrations: u64,
}

impl Held {
    fn now() -> Self {
        let counts = crate::alone::standin().map(|s| s.counts()).unwrap_or_default();
        Self {
            descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count(),
            imports: counts.imports,
            streams: counts.streams,
            registrations: counts.registrations,
        }
    }
}

/// Bytes of the GPU's memory that are in use, by any process.
fn device_bytes() -> usize {
    let (free, total) = result::mem_get_info().unwrap();
    total - free
}

/// Waits until no more of the GPU's memory is in use than before a process started, which was killed then. Returns the time
/// since.
fn wait_until_back(before: usize, killed: Instant) -> Duration {
    // The stand-in shares two busy cores with everything else.
    let limit = if gpu::is_real() { Duration::from_secs(1) } else { Duration::from_secs(2) };
    wait_until("the dead process's memory is free", || device_bytes() <= before);
    let took = killed.elapsed();
    assert!(took < limit, "{took:?}");
    took
}

/// The lane of a round, and the share of the pull that is loaded when the process is killed: from before the first chunk to
/// after the last one.
fn round_of(round: u32) -> (LaneKind, f64) {
    let lane = if round.is_multiple_of(2) { LaneKind::Tcp } else { LaneKind::Local };
    (lane, f64::from(round % 11) / 10.0)
}

/// Pulls everything from a producer that is killed when some of it is loaded. Returns the time in which its memory came back.
fn pull_from_one_that_dies(consumer: &Consumer, spec: &Spec, round: u32) -> Duration {
    let (lane, share) = round_of(round);
    let before = device_bytes();
    let mut producer = Producer::start(spec);
    let offer = producer.offer_all();
    let id = consumer.pull(pull_all(&offer, lane, SOON)).unwrap();
    let until = Instant::now() + SOON;
    while let Some((loaded, all)) = consumer.progress(id)
        && (all == 0 || (loaded as f64) < share * all as f64)
    {
        assert!(Instant::now() < until, "{loaded} of {all} chunks");
        std::thread::yield_now();
    }
    let killed = Instant::now();
    producer.kill();
    // Also with no pull running, when all was loaded before.
    let back = wait_until_back(before, killed);
    let end = ended(consumer);
    assert_loaded_is_exact(&end, consumer, spec, producer.seed);
    assert!(end.outcome.times.decided.unwrap() < SOON, "{:?}", end.outcome);
    back
}

fn spec() -> Spec {
    // The lease of a killed consumer's claim is short, so that its offers end within the test.
    Spec { blocks: 128, gpu: true, claimed_ms: 2_500, ..Spec::default() }
}

/// Kills this many producers. Returns the longest time in which a dead one's memory came back.
fn kill_producers(times: u32) -> Duration {
    let _engine = Engine::new();
    let spec = spec();
    let consumer = consumer(&spec, throttled("throttle=256M"));
    // A first pull opens what stays open: the lanes' buffers, and what the driver keeps.
    let mut first = Producer::start(&spec);
    for lane in [LaneKind::Tcp, LaneKind::Local] {
        consumer.pull(pull_all(&first.offer_all(), lane, SOON)).unwrap();
        assert!(ended(&consumer).outcome.complete());
    }
    first.kill();
    wait_until("the imports are closed", || Held::now().imports == 0);
    for round in 0..4 {
        pull_from_one_that_dies(&consumer, &spec, round);
    }
    wait_until("the imports are closed", || Held::now().imports == 0);
    let before = Held::now();
    let longest = (0..times).map(|round| pull_from_one_that_dies(&consumer, &spec, round)).max();
    wait_until("all is closed", || Held::now().descriptors <= before.descriptors);
    let after = Held::now();
    assert_eq!((after.imports, after.streams, after.registrations), (0, before.streams, before.registrations));
    assert_eq!((consumer.blocks_held(), consumer.pulls(), consumer.wedged()), (0, 0, 0));
    // The whole ring is there: a pull of everything uses it, and ends complete.
    let mut producer = Producer::start(&spec);
    let offer = producer.offer_all();
    consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    assert!(ended(&consumer).outcome.complete());
    longest.unwrap_or_default()
}

/// The environment variable that makes this binary a consumer.
const CONSUMER: &str = "KVFERRY_TEST_GPU_CONSUMER";

/// Does the work of a consumer if this process was started as one: says when a share of a pull is loaded, and waits for its
/// death.
pub(crate) fn play_consumer() {
    let Ok(text) = std::env::var(CONSUMER) else { return };
    let (spec, offer, round): (Spec, Offer, u32) = serde_json::from_str(&text).expect("an offer and a round");
    let (lane, share) = round_of(round);
    let consumer = consumer(&spec, throttled("throttle=256M"));
    let id = consumer.pull(pull_all(&offer, lane, SOON)).expect("a pull");
    while let Some((loaded, all)) = consumer.progress(id)
        && (all == 0 || (loaded as f64) < share * all as f64)
    {
        std::thread::yield_now();
    }
    println!("@@loaded");
    std::thread::sleep(SOON);
}

/// Starts a consumer, and kills it when some of its pull is loaded. Returns the time of the kill.
fn kill_one_that_pulls(producer: &mut Producer, round: u32) -> Instant {
    let offer = producer.offer_all();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "role", "--ignored", "--nocapture", "--test-threads=1"])
        .env(CONSUMER, serde_json::to_string(&(&producer.spec, &offer, round)).unwrap())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|l| l.contains("@@loaded")), "the consumer has ended");
    let killed = Instant::now();
    child.kill().unwrap();
    child.wait().unwrap();
    killed
}

/// Kills this many consumers of one producer. Returns the longest time in which a dead one's memory came back.
fn kill_consumers(times: u32) -> Duration {
    let _engine = Engine::new();
    let spec = spec();
    let mut producer = Producer::start(&spec);
    // A first pull opens what stays open: the producer's buffers.
    const ALL_OVER_TCP: u32 = 10;
    kill_one_that_pulls(&mut producer, ALL_OVER_TCP);
    let longest = (0..times).map(|round| {
        let before = device_bytes();
        let killed = kill_one_that_pulls(&mut producer, round);
        wait_until_back(before, killed)
    });
    let longest = longest.max();
    wait_until("the dead consumers' claims have ended", || producer.count().1 == 0);
    let consumer = consumer(&spec, throttled("throttle=1G"));
    for lane in [LaneKind::Tcp, LaneKind::Local] {
        let offer = producer.offer_all();
        consumer.pull(pull_all(&offer, lane, SOON)).unwrap();
        let end = ended(&consumer);
        assert!(end.outcome.complete(), "{:?}", end.outcome);
        assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
    }
    longest.unwrap_or_default()
}

/// The stand-in's devices, in a folder that the processes of a test share. Removed when dropped.
struct Devices(PathBuf);

impl Devices {
    fn new() -> Self {
        Self(format!("/dev/shm/kvferry-kills-{}", std::process::id()).into())
    }

    fn settings(&self) -> String {
        format!("memory=2G,dir={}", self.0.display())
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        // The process of the test itself has none, and neither has a real GPU.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn kills_lose_no_descriptor_or_device_byte() {
    let devices = Devices::new();
    let _ = on_standin!("kills::kills_lose_no_descriptor_or_device_byte", &devices.settings(), "gpu");
    kill_producers(11);
    kill_consumers(11);
}

#[test]
#[ignore = "needs minutes"]
fn a_thousand_kills_lose_no_descriptor_or_device_byte() {
    let devices = Devices::new();
    let _ = on_standin!("kills::a_thousand_kills_lose_no_descriptor_or_device_byte", &devices.settings(), "gpu");
    kill_producers(1000);
}

#[test]
#[ignore = "needs minutes"]
fn after_fifty_kills_of_each_side_device_memory_is_back() {
    let devices = Devices::new();
    alone!("kills::after_fifty_kills_of_each_side_device_memory_is_back", &devices.settings(), Some("gpu"));
    println!("figure kills/producer {:.3} s at most until its memory was free", kill_producers(50).as_secs_f64());
    println!("figure kills/consumer {:.3} s at most until its memory was free", kill_consumers(50).as_secs_f64());
}
