//! `kvferry demo`: real processes on this machine, a good day and a bad one, in under half a minute.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use kvferry::{Cause, Config, Consumer, Ended, LaneKind, Offer, PoolLayout, PullId};
use serde::Serialize;

use crate::{
    args::{self, JsonArg, LaneChoice, ModelArgs, VerbsArgs},
    child::Serve,
    peer::{self, Peer},
    report::{Failure, PullRecord, ranges, size},
};

/// Flags of `demo`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Bytes to pull in each act.
    #[arg(long, value_name = "BYTES", default_value = "1G", value_parser = args::bytes)]
    total_bytes: u64,
    /// Where the producer listens; port 0 takes a free one.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:0")]
    listen: String,
    /// The lane that is broken and heals, beside the one inside this host: tcp or verbs.
    #[arg(long, value_enum, default_value = "tcp")]
    lane: LaneChoice,
    #[command(flatten)]
    verbs: VerbsArgs,
    /// RDMA ports that the producer serves; by default the same as this side's.
    #[arg(long, value_name = "RAIL,…", value_delimiter = ',')]
    serve_rails: Vec<String>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    json: JsonArg,
}

const REGIONS: u32 = 32;
const BLOCK: u64 = 32 << 10;
const LIMIT: Duration = Duration::from_secs(10);
/// The contract's bound for a killed producer, beside the deadline.
const DECIDE: Duration = Duration::from_millis(100);

/// One line of the last table.
#[derive(Debug, Serialize)]
struct Seen {
    promise: &'static str,
    seen: String,
    held: bool,
}

/// The demo's JSON.
#[derive(Debug, Serialize)]
struct Record {
    promises: Vec<Seen>,
    pulls: Vec<PullRecord>,
    decided_after_kill_us: u64,
    held: bool,
    seconds: f64,
}

struct Stage {
    started: Instant,
    text: bool,
    model: ModelArgs,
    consumer: Consumer,
    /// The lane between hosts.
    far: LaneKind,
    blocks: u32,
    seen: Vec<Seen>,
    pulls: Vec<PullRecord>,
}

impl Stage {
    fn say(&self, text: impl AsRef<str>) {
        if self.text {
            println!("{:8.3} s  {}", self.started.elapsed().as_secs_f64(), text.as_ref());
        }
    }

    fn saw(&mut self, promise: &'static str, held: bool, seen: String) {
        self.seen.push(Seen { promise, seen, held });
    }

    fn offer(&self, addr: &str) -> Result<(Peer, Offer), Failure> {
        let peer = Peer::probe(addr, &"demo".parse()?, &self.model.model(), LIMIT)?;
        let offer = peer.offer(self.blocks, 0)?;
        Ok((peer, offer))
    }

    fn start(&self, offer: Offer, lane: LaneKind) -> Result<PullId, Failure> {
        Ok(self.consumer.pull(peer::pull(offer, self.blocks, vec![lane], LIMIT)?)?)
    }

    fn end(&mut self, peer: &Peer) -> Result<(Ended, PullRecord), Failure> {
        let ended = self
            .consumer
            .wait(LIMIT + LIMIT)
            .ok_or_else(|| Failure::failed("a pull did not end: its lane is wedged"))?;
        let (good, bad) = peer.verify(&ended, &self.consumer)?;
        let record = PullRecord::new(&ended, good, bad);
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

/// Runs the three acts.
pub(crate) fn run(args: Args) -> Result<ExitCode, Failure> {
    let started = Instant::now();
    let blocks =
        u32::try_from(args.total_bytes / (BLOCK * u64::from(REGIONS))).ok().filter(|n| *n >= 100).ok_or_else(|| {
            Failure::usage("--total-bytes: at least 100M, so that there is something to kill in the middle of")
        })?;
    args::check_memory(2 * args.total_bytes)?;
    args.verbs.check(args.lane, false)?;
    let far = match args.lane {
        LaneChoice::Tcp => LaneKind::Tcp,
        LaneChoice::Verbs => LaneKind::Verbs,
        LaneChoice::Auto | LaneChoice::Local => return Err(Failure::usage("--lane: tcp or verbs, for the demo")),
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
            ("--dtype", m.dtype.clone()),
            ("--block-tokens", m.block_tokens.to_string()),
        ];
        let pairs = pairs.into_iter().flat_map(|(k, v)| [k.to_owned(), v]);
        pairs.chain(args.verbs.serve_flags(&args.serve_rails)).collect()
    };
    let mut producer = Serve::start(&flags(&args.listen))?;
    let addr = producer.ready.listen.clone();
    let layout = PoolLayout::uniform(blocks, REGIONS, BLOCK, args.model.block_tokens);
    let consumer = Consumer::builder("demo".parse()?, args.model.model(), layout)
        .config(Config { verbs: args.verbs.config(), ..Config::default() })
        .build()?;
    let text = args.json.text();
    let mut stage =
        Stage { started, text, model: args.model.clone(), consumer, far, blocks, seen: Vec::new(), pulls: Vec::new() };
    stage.say(format!(
        "producer {} is process {} on {addr}: {} in {blocks} blocks of {REGIONS} regions",
        producer.ready.incarnation,
        producer.pid(),
        size(args.total_bytes)
    ));

    stage.say("act 1: a good day");
    let local = stage.pull(&addr, LaneKind::Local)?;
    let other = stage.pull(&addr, far)?;
    let all = |r: &PullRecord| r.loaded.len() == u64::from(blocks) && r.mismatched_bytes == 0;
    stage.saw(
        "exact",
        all(&local) && all(&other),
        format!("{blocks} of {blocks} blocks over local and over {far}, every byte compared"),
    );

    stage.say("act 2: the producer is killed in mid-pull");
    let killed_at = kill_in_mid_pull(&mut stage, &mut producer, &addr)?;

    stage.say("act 3: it comes back at the same address");
    producer.wait()?;
    let before = producer.ready.incarnation.clone();
    let producer = Serve::start(&flags(&addr))?;
    stage.say(format!("producer {} is process {} on {addr}", producer.ready.incarnation, producer.pid()));
    let healed = stage.pull(&addr, far)?;
    stage.saw(
        "healing",
        all(&healed) && producer.ready.incarnation != before,
        format!(
            "incarnation {} pulled by the same consumer: {} of {blocks} blocks",
            healed.peer.incarnation,
            healed.loaded.len()
        ),
    );
    let held_blocks = stage.consumer.blocks_held();
    stage.saw(
        "quiet",
        held_blocks == 0 && stage.consumer.wedged() == 0,
        format!("{} pulls ended, {held_blocks} local blocks still held", stage.pulls.len()),
    );
    let held = stage.seen.iter().all(|s| s.held);
    if text {
        println!("\n{:<10} {:<6} what was seen", "promise", "held");
        for s in &stage.seen {
            println!("{:<10} {:<6} {}", s.promise, if s.held { "yes" } else { "NO" }, s.seen);
        }
        println!(
            "\n{} in {:.1} s",
            if held { "all of it held" } else { "NOT all of it held" },
            started.elapsed().as_secs_f64()
        );
    }
    let record = Record {
        promises: stage.seen,
        pulls: stage.pulls,
        decided_after_kill_us: crate::report::us(killed_at),
        held,
        seconds: started.elapsed().as_secs_f64(),
    };
    args.json.write(&record)?;
    Ok(if held { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Act 2. Returns the time from the kill to the decision.
fn kill_in_mid_pull(stage: &mut Stage, producer: &mut Serve, addr: &str) -> Result<Duration, Failure> {
    let (peer, offer) = stage.offer(addr)?;
    let started = Instant::now();
    let pull = stage.start(offer, stage.far)?;
    let mut at = 0.0;
    while started.elapsed() < LIMIT {
        let Some((done, all)) = stage.consumer.progress(pull) else { break };
        at = done as f64 / all.max(1) as f64;
        if all > 0 && at >= 0.6 {
            break;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    let killed = started.elapsed();
    producer.kill()?;
    stage.say(format!("SIGKILL to process {} with {:.0} % loaded", producer.pid(), at * 100.0));
    let (ended, r) = stage.end(&peer)?;
    let decided = Duration::from_micros(r.decided_us.unwrap_or(u64::MAX / 2)).saturating_sub(killed);
    stage.say(format!("decided {:.1} ms after the kill", decided.as_secs_f64() * 1e3));
    stage.say(format!(
        "loaded  {} ({:.0} %), {} bytes verified, {} wrong",
        ranges(&r.loaded),
        100.0 * r.loaded.len() as f64 / r.blocks as f64,
        r.verified_bytes,
        r.mismatched_bytes
    ));
    let causes: Vec<_> = r.causes.iter().map(|(c, s)| format!("{c}: {}", ranges(s))).collect();
    stage.say(format!("invalid {} ({})", ranges(&r.invalid), causes.join("; ")));
    let blocks = stage.blocks;
    // Over several queue pairs a later chunk may have arrived before an earlier one.
    let prefix = r.loaded.ranges().first().filter(|p| p[0] == 0).map_or(0, |p| p[1] + 1);
    stage.saw(
        "exact",
        r.loaded.len() + r.invalid.len() == u64::from(blocks) && !ended.outcome.complete(),
        format!("{} loaded and {} invalid, together {blocks}", r.loaded.len(), r.invalid.len()),
    );
    stage.saw(
        "fresh",
        r.mismatched_bytes == 0,
        format!("{} bytes of loaded blocks verified, {} wrong", r.verified_bytes, r.mismatched_bytes),
    );
    stage.saw(
        "timely",
        decided <= DECIDE,
        format!("decided {:.1} ms after SIGKILL, within {} ms", decided.as_secs_f64() * 1e3, DECIDE.as_millis()),
    );
    stage.saw(
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
    stage.saw("isolated", known, format!("the consumer lives on; cause: {}", causes.join("; ")));
    Ok(decided)
}
