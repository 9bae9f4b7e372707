//! `kvferry demo`: a good day and a bad day with real processes on this machine, in less than half a minute.

mod leaks;

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use kvferry::{Cause, Config, Consumer, Ended, LaneKind, Offer, PoolLayout, PullId};
use kvferry_testkit::serve::Serve;
use serde::Serialize;

use crate::{
    args::{self, JsonArg, LaneChoice, ModelArgs, VerbsArgs},
    out::say,
    peer::{self, Peer},
    pool::{MemoryRecord, PoolArgs, PoolPlace},
    report::{Failure, PullRecord, ranges, size, us},
};

/// Flags of `demo`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Bytes to pull in each act.
    #[arg(long, value_name = "BYTES", default_value = "1G", value_parser = args::bytes)]
    total_bytes: u64,
    /// Listening address of the producer. Port 0 selects a free port.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:0", value_parser = args::advertised)]
    listen: String,
    /// The lane between hosts that the demo uses beside local: tcp or verbs.
    #[arg(long, value_enum, default_value = "tcp")]
    lane: LaneChoice,
    #[command(flatten)]
    verbs: VerbsArgs,
    /// RDMA ports of the producer. The default is the consumer's ports.
    #[arg(long, value_name = "RAIL,…", value_delimiter = ',')]
    serve_rails: Vec<String>,
    #[command(flatten)]
    pool: PoolArgs,
    /// Where the producer's pool lies. The default is the consumer's place.
    #[arg(long, value_name = "PLACE")]
    serve_memory: Option<PoolPlace>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

const REGIONS: u32 = 32;
const BLOCK: u64 = 32 << 10;
const LIMIT: Duration = Duration::from_secs(10);
/// The contract's limit for the decision after the producer was killed.
const DECIDE: Duration = Duration::from_millis(100);

/// A promise, and what the demo observed about it.
#[derive(Debug, Serialize)]
struct Observation {
    promise: &'static str,
    seen: String,
    held: bool,
}

/// The demo's JSON.
#[derive(Debug, Serialize)]
struct Record {
    promises: Vec<Observation>,
    pulls: Vec<PullRecord>,
    decided_after_kill_us: u64,
    held: bool,
    seconds: f64,
}

struct Demo {
    started: Instant,
    text: bool,
    model: ModelArgs,
    consumer: Consumer,
    /// The lane between hosts.
    far: LaneKind,
    blocks: u32,
    observations: Vec<Observation>,
    pulls: Vec<PullRecord>,
}

impl Demo {
    fn say(&self, text: impl AsRef<str>) {
        if self.text {
            say!("{:8.3} s  {}", self.started.elapsed().as_secs_f64(), text.as_ref());
        }
    }

    fn observe(&mut self, promise: &'static str, held: bool, seen: String) {
        self.observations.push(Observation { promise, seen, held });
    }

    fn offer(&self, addr: &str) -> Result<(Peer, Offer), Failure> {
        let mut peer = Peer::probe(addr, &"demo".parse()?, &self.model.model(), LIMIT)?;
        let offer = peer.offer(self.blocks, 0, LIMIT)?;
        Ok((peer, offer))
    }

    fn start(&self, offer: Offer, lane: LaneKind) -> Result<PullId, Failure> {
        peer::pull(&self.consumer, (offer, 0), self.blocks, vec![lane], LIMIT)
    }

    fn end(&mut self, peer: &Peer) -> Result<(Ended, PullRecord), Failure> {
        let ended = self.consumer.wait(LIMIT + LIMIT).map_err(|e| Failure::waiting(&e))?;
        let (good, bad) = peer.verify(&ended, &self.consumer)?;
        let mut record = PullRecord::new(LIMIT);
        record.offer(&ended.offer);
        record.memory = Some(MemoryRecord::from(self.consumer.memory()));
        record.peer_memory = peer.memory.clone();
        record.outcome(&ended.outcome);
        record.checked(good, bad);
        self.pulls.push(record.clone());
        Ok((ended, record))
    }

    fn pull(&mut self, addr: &str, lane: LaneKind) -> Result<PullRecord, Failure> {
        let (peer, offer) = self.offer(addr)?;
        self.start(offer, lane)?;
        let (_, r) = self.end(&peer)?;
        let seconds = r.data_us.unwrap_or(0) as f64 / 1e6;
        self.say(format!(
            "{lane}: {} of {} blocks, {} in {:.0} ms ({:.2} GB/s), {} bytes verified, {} wrong",
            r.loaded.len(),
            r.blocks,
            size(r.bytes),
            seconds * 1e3,
            if seconds > 0.0 { r.bytes as f64 / seconds / 1e9 } else { 0.0 },
            r.verified_bytes,
            r.mismatched_bytes
        ));
        Ok(r)
    }
}

/// Runs the four acts.
pub(crate) fn run(args: Args) -> Result<ExitCode, Failure> {
    let started = Instant::now();
    let blocks = u32::try_from(args.total_bytes / (BLOCK * u64::from(REGIONS)))
        .ok()
        .filter(|n| *n >= 100)
        .ok_or_else(|| Failure::usage("--total-bytes: at least 100M, so that the kill comes in mid-pull"))?;
    let places = [args.pool.memory, args.pool.served(args.serve_memory)];
    PoolPlace::check_sizes(&places, args.total_bytes)?;
    args.verbs.check(args.lane, false)?;
    places.iter().try_for_each(|p| p.check())?;
    let far = match args.lane {
        LaneChoice::Tcp => LaneKind::Tcp,
        LaneChoice::Verbs => LaneKind::Verbs,
        LaneChoice::Auto | LaneChoice::Local => return Err(Failure::usage("--lane: the demo needs tcp or verbs")),
    };
    let flags = |listen: &str| -> Vec<String> {
        let m = &args.model;
        let pairs = [
            ("--listen", listen.to_owned()),
            ("--blocks", blocks.to_string()),
            ("--regions", REGIONS.to_string()),
            ("--block-size", BLOCK.to_string()),
            ("--engine", "prefill-0".to_owned()),
            ("--model", m.model.clone()),
            ("--unclaimed-lease", leaks::UNCLAIMED.to_owned()),
            ("--dtype", m.dtype.clone()),
            ("--block-tokens", m.block_tokens.to_string()),
        ];
        let pairs = pairs.into_iter().flat_map(|(k, v)| [k.to_owned(), v]);
        let pairs = pairs.chain(args.verbs.serve_flags(&args.serve_rails));
        pairs.chain(args.pool.serve_flags(args.serve_memory)).collect()
    };
    // The producer's log would warn of what the demo does on purpose.
    let log = std::env::var_os("KVFERRY_LOG").unwrap_or_else(|| "error".into());
    let start = |listen: &str| Serve::start_with(args::program(), &flags(listen), &[("KVFERRY_LOG", &log)]);
    let mut producer = start(&args.listen)?;
    let addr = producer.ready.listen.clone();
    let layout = PoolLayout::uniform(blocks, REGIONS, BLOCK, args.model.block_tokens);
    let mut config = Config::default();
    config.verbs = args.verbs.config();
    config.gpu = args.pool.config();
    let memory = args.pool.memory.allocate(&layout, false)?;
    let consumer =
        Consumer::builder("demo".parse()?, args.model.model(), layout).memory(memory).config(config).build()?;
    let text = args.json.text();
    let mut demo = Demo {
        started,
        text,
        model: args.model.clone(),
        consumer,
        far,
        blocks,
        observations: Vec::new(),
        pulls: Vec::new(),
    };
    demo.say(format!(
        "producer {} is process {} on {addr}: {} in {blocks} blocks of {REGIONS} regions",
        producer.ready.incarnation,
        producer.ready.pid,
        size(args.total_bytes)
    ));

    demo.say("act 1: a good day");
    let local = demo.pull(&addr, LaneKind::Local)?;
    let other = demo.pull(&addr, far)?;
    let all = |r: &PullRecord| r.loaded.len() == u64::from(blocks) && r.mismatched_bytes == 0;
    demo.observe(
        "exact",
        all(&local) && all(&other),
        format!("{blocks} of {blocks} blocks over local and over {far}, every byte compared"),
    );

    demo.say("act 2: the producer is killed in mid-pull");
    let killed_at = kill_in_mid_pull(&mut demo, &mut producer, &addr)?;

    demo.say("act 3: the producer returns at the same address");
    producer.wait()?;
    let before = producer.ready.incarnation.clone();
    let producer = start(&addr)?;
    demo.say(format!("producer {} is process {} on {addr}", producer.ready.incarnation, producer.ready.pid));
    let healed = demo.pull(&addr, far)?;
    demo.observe(
        "healing",
        all(&healed) && producer.ready.incarnation != before,
        format!(
            "incarnation {} pulled by the same consumer: {} of {blocks} blocks",
            healed.peer.as_ref().map_or("unknown", |p| p.incarnation.as_str()),
            healed.loaded.len()
        ),
    );
    demo.say("act 4: consumers come, break off and forget offers; the producer gets everything back");
    leaks::show(&mut demo, &addr, producer.ready.pid)?;
    let held_blocks = demo.consumer.blocks_held();
    demo.observe(
        "quiet",
        held_blocks == 0 && demo.consumer.wedged() == 0,
        format!("{} pulls ended, {held_blocks} local blocks still held", demo.pulls.len()),
    );
    let held = demo.observations.iter().all(|s| s.held);
    if text {
        say!("\n{:<10} {:<6} observation", "promise", "held");
        for s in &demo.observations {
            say!("{:<10} {:<6} {}", s.promise, if s.held { "yes" } else { "NO" }, s.seen);
        }
        say!(
            "\n{} in {:.1} s",
            if held { "all promises held" } else { "NOT all promises held" },
            started.elapsed().as_secs_f64()
        );
    }
    let record = Record {
        promises: demo.observations,
        pulls: demo.pulls,
        decided_after_kill_us: us(killed_at),
        held,
        seconds: started.elapsed().as_secs_f64(),
    };
    args.json.write(&record)?;
    Ok(if held { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Act 2. Returns the time from the kill to the decision.
fn kill_in_mid_pull(demo: &mut Demo, producer: &mut Serve, addr: &str) -> Result<Duration, Failure> {
    let (peer, offer) = demo.offer(addr)?;
    let started = Instant::now();
    let pull = demo.start(offer, demo.far)?;
    let mut at = 0.0;
    while started.elapsed() < LIMIT {
        let Some((done, all)) = demo.consumer.progress(pull) else { break };
        at = done as f64 / all.max(1) as f64;
        if all > 0 && at >= 0.6 {
            break;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    let killed = started.elapsed();
    producer.kill()?;
    demo.say(format!("SIGKILL to process {} with {:.0} % loaded", producer.ready.pid, at * 100.0));
    let (ended, r) = demo.end(&peer)?;
    let decided = Duration::from_micros(r.decided_us.unwrap_or(u64::MAX / 2)).saturating_sub(killed);
    demo.say(format!("decided {:.1} ms after the kill", decided.as_secs_f64() * 1e3));
    demo.say(format!(
        "loaded  {} ({:.0} %), {} bytes verified, {} wrong",
        ranges(&r.loaded),
        100.0 * r.loaded.len() as f64 / r.blocks as f64,
        r.verified_bytes,
        r.mismatched_bytes
    ));
    let causes: Vec<_> = r.causes.iter().map(|(c, s)| format!("{c}: {}", ranges(s))).collect();
    demo.say(format!("invalid {} ({})", ranges(&r.invalid), causes.join("; ")));
    let blocks = demo.blocks;
    // With several queue pairs a later chunk may arrive before an earlier one.
    let prefix = r.loaded.ranges().first().filter(|p| p[0] == 0).map_or(0, |p| p[1] + 1);
    demo.observe(
        "exact",
        r.loaded.len() + r.invalid.len() == u64::from(blocks) && !ended.outcome.complete(),
        format!("{} loaded and {} invalid, together {blocks}", r.loaded.len(), r.invalid.len()),
    );
    demo.observe(
        "fresh",
        r.mismatched_bytes == 0,
        format!("{} bytes of loaded blocks verified, {} wrong", r.verified_bytes, r.mismatched_bytes),
    );
    demo.observe(
        "timely",
        decided <= DECIDE,
        format!("decided {:.1} ms after SIGKILL, within {} ms", decided.as_secs_f64() * 1e3, DECIDE.as_millis()),
    );
    demo.observe(
        "frugal",
        f64::from(prefix) >= (at - 0.05) * f64::from(blocks),
        format!(
            "killed at {:.0} %, prefix of {prefix} blocks ({:.0} %) kept",
            at * 100.0,
            100.0 * f64::from(prefix) / f64::from(blocks)
        ),
    );
    let known =
        ended.outcome.cause().is_some_and(|c| matches!(c, Cause::PeerDown | Cause::LaneFailed | Cause::Unreachable));
    demo.observe("isolated", known, format!("the consumer continues; cause: {}", causes.join("; ")));
    Ok(decided)
}
