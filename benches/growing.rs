//! Offers that grow: what pulls that wait cost, and what it costs to plan and read in parts. `cargo bench --bench growing`.

use std::time::{Duration, Instant};

use kvferry::{Config, Consumer, LaneKind, Offer, OfferId, Pull, Token};
use kvferry_testkit::rig::{self, Producer, Say, Spec, consumer, local, pull_all};

const WATCH: Duration = Duration::from_secs(10);
const LONG: Duration = Duration::from_secs(120);
const ROUNDS: usize = 7;

/// The processor time that a process has used.
fn cpu(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process is there");
    // After the command's closing parenthesis, user and system time are fields 12 and 13, in ticks.
    let fields: Vec<&str> = stat.rsplit_once(')').expect("a stat line").1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap_or(0) + fields[12].parse::<u64>().unwrap_or(0);
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// Prints what share of a core both sides use while `pulls` pulls wait: for growth of open offers (`open`), or for offers that
/// are not opened yet.
fn waiting(pulls: u32, open: bool) {
    // The engine of the producer's process looks for freed offers in each step, which costs 2.5 % of a core at 1 ms.
    let spec =
        Spec { blocks: pulls, regions: 1, block_size: 4096, hard_cap_ms: 600_000, step_ms: 1000, ..Spec::default() };
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, Config::default());
    let like = producer.open(&[0]);
    for i in 0..pulls {
        let offer = if open {
            producer.open(&[i])
        } else {
            let transfer = format!("request-{i}");
            let ranks = like.ranks.clone();
            let mut name =
                Offer::new(OfferId::of_transfer(&transfer), like.engine.clone(), like.incarnation, ranks, 16);
            name.token = Token::of_transfer(&transfer);
            name
        };
        consumer
            .pull(Pull::new(offer, local([i])).lanes(vec![LaneKind::Tcp]).deadline(LONG).awaited())
            .expect("a pull");
    }
    // Until all claims are answered, and the lane is there.
    std::thread::sleep(Duration::from_secs(2));
    let processes = [std::process::id(), producer.pid()];
    let (start, before) = (Instant::now(), processes.map(cpu));
    std::thread::sleep(WATCH);
    let percent = |i: usize| 100.0 * (cpu(processes[i]) - before[i]) / start.elapsed().as_secs_f64();
    let state = if open { "wait for growth" } else { "wait for their offers" };
    println!("{pulls} pulls {state:<22} consumer {:>5.2} %   producer {:>5.2} % of a core", percent(0), percent(1));
    assert_eq!(consumer.pulls(), pulls as usize, "all of them still wait");
    drop(consumer);
}

fn time(consumer: &Consumer, pull: Pull, mut then: impl FnMut()) -> f64 {
    let start = Instant::now();
    consumer.pull(pull).expect("a pull");
    then();
    let ended = consumer.wait(LONG).expect("it ends");
    assert!(ended.outcome.complete(), "{:?}", ended.outcome);
    start.elapsed().as_secs_f64()
}

/// Prints the rate of pulls of 2 GiB in `parts` parts, as a share of that of whole pulls. Both in turn; the median of each.
/// A part takes at least 10 ms, as a prefill's step does.
fn in_parts(lane: LaneKind, parts: usize) {
    let spec = Spec { blocks: 16384, regions: 1, block_size: 128 << 10, ..Spec::default() };
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, Config::default());
    let blocks: Vec<u32> = (0..spec.blocks).collect();
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..=ROUNDS {
        let offer = producer.offer(&blocks);
        let whole = time(&consumer, pull_all(&offer, lane, LONG), || {});
        producer.say(&Say::Open { name: None, blocks: blocks.clone(), filled: true });
        let offer = producer.offered().expect("it is opened");
        let part = time(&consumer, pull_all(&offer, lane, LONG), || {
            for i in 1..parts {
                // The prefill is a little faster than the lane, so that the lane never waits.
                producer.grow(offer.id, blocks.len() * i / parts);
                std::thread::sleep(Duration::from_secs_f64(0.7 * whole / parts as f64));
            }
            producer.say(&Say::Finish(offer.id));
        });
        // The first round connects the lane and touches the memory.
        if round > 0 {
            times[0].push(whole);
            times[1].push(part);
        }
    }
    let median = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let [whole, part] = times.each_mut().map(median);
    let gib = f64::from(spec.blocks) * f64::from(spec.block_size as u32) / f64::from(1 << 30);
    println!(
        "{lane:<6} {parts:>3} parts   whole {:>5.2} GiB/s   in parts {:>5.2} GiB/s   ratio {:.3}",
        gib / whole,
        gib / part,
        whole / part
    );
}

fn main() {
    rig::play();
    // The first row is for comparison.
    waiting(1, true);
    waiting(1000, true);
    waiting(1000, false);
    for parts in [8, 16, 32] {
        for lane in [LaneKind::Tcp, LaneKind::Local] {
            in_parts(lane, parts);
        }
    }
}
