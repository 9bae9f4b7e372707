//! The cost of idle sessions: processor time and memory on both sides. `cargo bench --bench idle`.
//!
//! One producer listens on every loopback address. The consumer pulls one block from each of many addresses, and then is
//! idle. To the consumer each address is another peer, with a connection, a session and a lane.

use std::time::{Duration, Instant};

use kvferry::{Consumer, LaneKind, Pull};
use kvferry_testkit::rig::{self, Producer, Spec, local};

const WATCH: Duration = Duration::from_secs(10);

struct Usage {
    cpu: Duration,
    rss: u64,
}

/// Reads the processor time and the resident memory of a process.
fn usage(pid: u32) -> Usage {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process is there");
    // After the command's closing parenthesis, user and system time are fields 12 and 13, in ticks.
    let fields: Vec<&str> = stat.rsplit_once(')').expect("a stat line").1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap_or(0) + fields[12].parse::<u64>().unwrap_or(0);
    let hz = rustix::param::clock_ticks_per_second();
    let pages: u64 = fields[21].parse().unwrap_or(0);
    Usage { cpu: Duration::from_secs_f64(ticks as f64 / hz as f64), rss: pages * rustix::param::page_size() as u64 }
}

fn measure(sessions: u32, lane: LaneKind) {
    let spec = Spec { listen: "0.0.0.0:0".into(), blocks: 8, regions: 1, block_size: 4096, ..Spec::default() };
    let mut producer = Producer::start(&spec);
    let pid = producer.pid();
    let port = producer.addr.rsplit(':').next().expect("a port").to_owned();
    let consumer =
        Consumer::builder("idle".parse().expect("an id"), spec.kv_model(), spec.layout()).build().expect("a consumer");
    let limit = Duration::from_secs(10);
    let mut pull = |i: u32| {
        let addr = format!("127.1.{}.{}:{port}", i / 250, i % 250 + 1);
        let mut offer = producer.offer(&[0]);
        offer.ranks[0].addr = addr;
        consumer.pull(Pull::new(offer, local([0])).lanes(vec![lane]).deadline(limit)).expect("a pull");
        let ended = consumer.wait(limit * 2).expect("it ends");
        assert!(ended.outcome.complete(), "{:?}", ended.outcome);
        ended.outcome.times.ended.unwrap_or_default()
    };
    // The first pull allocates everything that all sessions share.
    pull(2000);
    let (here, there) = (std::process::id(), pid);
    let before = (usage(here), usage(there));
    let mut first: Vec<Duration> = (0..sessions).map(&mut pull).collect();
    first.sort();
    let after = (usage(here), usage(there));
    let start = Instant::now();
    std::thread::sleep(WATCH);
    let idle = (usage(here), usage(there));
    let percent = |a: &Usage, b: &Usage| 100.0 * (b.cpu - a.cpu).as_secs_f64() / start.elapsed().as_secs_f64();
    let each = |a: &Usage, b: &Usage| b.rss.saturating_sub(a.rss) as f64 / f64::from(sessions) / 1024.0;
    println!(
        "{:<6} {sessions:>8} {:>14.2} {:>14.2} {:>16.1} {:>16.1} {:>18.2}",
        lane.as_str(),
        percent(&after.0, &idle.0),
        percent(&after.1, &idle.1),
        each(&before.0, &after.0),
        each(&before.1, &after.1),
        first[first.len() / 2].as_secs_f64() * 1e3
    );
    drop(consumer);
}

fn main() {
    rig::play();
    println!(
        "{:<6} {:>8} {:>14} {:>14} {:>16} {:>16} {:>18}",
        "lane",
        "sessions",
        "consumer CPU %",
        "producer CPU %",
        "consumer KiB each",
        "producer KiB each",
        "first pull ms (p50)"
    );
    for (sessions, lane) in [(64, LaneKind::Tcp), (64, LaneKind::Local), (1000, LaneKind::Tcp)] {
        measure(sessions, lane);
    }
}
