//! `kvferry bench`: measures pulls of scattered blocks for several block sizes, with the columns of nixlbench.
//!
//! Each iteration is a complete pull of a new offer: claim, read, fence, decide, release. With `--vs-raw`, pulls alternate
//! with bare copies of the same blocks, so that a drift of the machine's speed affects both.

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use indicatif::{ProgressBar, ProgressStyle};
use kvferry::{ChunkSize, Config, Consumer, LaneKind, Offer, PoolLayout, Times};
use kvferry_testkit::serve::Serve;

use crate::{
    args::{self, JsonArg, LaneChoice, ModelArgs, TcpArgs, VerbsArgs},
    out,
    peer::{self, Peer},
    perftest::Perftest,
    plot,
    pool::{MemoryRecord, PoolArgs, PoolPlace},
    raw::Raw,
    report::{Failure, FailureRecord, us},
    row::{self, FailedRows, Latency, OneAtATime, Row},
    serve,
};

/// Flags of `bench`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Address of a `kvferry serve --views SIZES` on another machine. By default bench starts a producer here.
    #[arg(long, value_name = "HOST:PORT", value_parser = args::address)]
    connect: Option<String>,
    /// Lanes to measure. `auto` measures every lane that works.
    #[arg(long, value_enum, default_value = "auto")]
    lane: LaneChoice,
    #[command(flatten)]
    verbs: VerbsArgs,
    #[command(flatten)]
    tcp: TcpArgs,
    #[command(flatten)]
    pool: PoolArgs,
    /// RDMA ports of the producer that bench starts. The default is the consumer's ports.
    #[arg(long, value_name = "RAIL,…", value_delimiter = ',', conflicts_with = "connect")]
    serve_rails: Vec<String>,
    /// Where the pool of the producer that bench starts lies. The default is the consumer's place.
    #[arg(long, value_name = "PLACE", conflicts_with = "connect")]
    serve_memory: Option<PoolPlace>,
    /// Smallest block size.
    #[arg(long, value_name = "BYTES", default_value = "4K", value_parser = args::bytes)]
    start_block_size: u64,
    /// Largest block size. Each size is four times the one before.
    #[arg(long, value_name = "BYTES", default_value = "1M", value_parser = args::bytes)]
    max_block_size: u64,
    /// Bytes per pull.
    #[arg(long, value_name = "BYTES", default_value = "256M", value_parser = args::bytes)]
    total_bytes: u64,
    /// Measured pulls for each size.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    iterations: u32,
    /// Pulls for each size before the measured ones.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(..=100_000))]
    warmup: u32,
    /// Compare every pulled byte with the pattern.
    #[arg(long)]
    check_consistency: bool,
    /// Also measure bare copies of the same blocks, alternating with pulls: process_vm_readv or memcpy for local, one
    /// loopback connection for tcp, ib_read_bw and ib_read_lat of perftest over the first rail for verbs.
    #[arg(long)]
    vs_raw: bool,
    /// Use anonymous memory on both sides, like an engine's own, instead of pools that other processes can map.
    #[arg(long)]
    engine_memory: bool,
    /// Draw the results as an SVG file.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

/// Rounds in which pulls and bare READs alternate.
const ROUNDS: usize = 7;

const LIMIT: Duration = Duration::from_secs(60);

/// Runs the benchmark, if the command can run at all. The file of `--json` has every finished row at any time.
pub(crate) fn run(args: Args, ready: Result<(), Failure>) -> Result<ExitCode, Failure> {
    let mut rows = Vec::new();
    match ready.and_then(|()| measure_all(&args, &mut rows)) {
        Ok(()) => {
            if args.json.file().is_none() || rows.is_empty() {
                args.json.write(&rows)?;
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(failure) => {
            // If that fails too, the first failure is the one to report.
            let _ = args.json.write(&FailedRows { failure: FailureRecord::from(&failure), rows: &rows });
            Err(failure)
        }
    }
}

fn measure_all(args: &Args, rows: &mut Vec<Row>) -> Result<(), Failure> {
    args.verbs.check(args.lane, false)?;
    let sizes = sizes(args)?;
    let total = args.total_bytes / args.max_block_size * args.max_block_size;
    let places = check_places(args)?;
    PoolPlace::check_sizes(&places, total)?;
    if let Some(path) = &args.plot {
        out::check_file(path)?;
    }
    let child = match &args.connect {
        Some(_) => None,
        None => Some(Serve::start(args::program(), &serve_flags(args, &sizes, total))?),
    };
    let addr = match (&args.connect, &child) {
        (Some(addr), _) => addr.clone(),
        (None, Some(serve)) => serve.ready.listen.clone(),
        (None, None) => return Err(Failure::failed("no producer")),
    };
    let peer = Peer::probe(&addr, &"bench".parse()?, &args.model.model(), LIMIT)?;
    let blocks = u32::try_from(total / args.max_block_size).map_err(|_| Failure::usage("--total-bytes: too large"))?;
    let layout = serve::layout(blocks, 1, args.max_block_size, args.model.block_tokens, &sizes)?;
    let memory = args.pool.memory.allocate(&layout, args.engine_memory)?;
    let perftest = (!args.verbs.config().rails.is_empty())
        .then(|| Perftest::new(&args.verbs.config(), &args.verbs.served(&args.serve_rails)))
        .transpose()?;
    let ready = child.as_ref().map(|c| c.ready.clone());
    let mut raw = args.vs_raw.then(|| Raw::new(&memory, ready, perftest)).transpose()?;
    let mut bench = Bench { args, peer, total };
    let served: Vec<_> = args.lane.lanes().into_iter().filter(|l| bench.peer.welcome.lanes.contains(l)).collect();
    if served.is_empty() {
        return Err(Failure::failed("the peer serves none of these lanes: choose another one with --lane"));
    }
    // Each lane has its own consumer, so that no lane profits from another one's warm-up. All lanes are tried before the table
    // begins: the log says why one does not work.
    let mut lanes = Vec::new();
    for lane in served {
        let mut config = Config::default();
        config.verbs = args.verbs.config();
        config.tcp = args.tcp.config();
        config.gpu = args.pool.config();
        config.pull.lanes = vec![lane];
        let consumer = Consumer::builder("bench".parse()?, args.model.model(), layout.clone())
            .memory(memory.clone())
            .config(config)
            .build()?;
        if bench.works(&consumer, lane, sizes[0])? {
            lanes.push((lane, consumer));
        } else if args.lane != LaneChoice::Auto {
            return Err(Failure::failed(format!("the {lane} lane does not work here: see `kvferry doctor`")));
        }
    }
    if lanes.is_empty() {
        return Err(Failure::failed("no lane to this peer works: see `kvferry doctor` on both sides"));
    }
    let bar = bench.bar(lanes.len() * sizes.len());
    if args.json.text() {
        row::header(args.vs_raw);
    }
    for (lane, consumer) in lanes {
        for &size in &sizes {
            let row = bench.measure(&consumer, lane, size, raw.as_mut(), &bar)?;
            if args.json.text() {
                bar.suspend(|| row::print(&row));
            }
            rows.push(row);
            if args.json.file().is_some() {
                args.json.write(rows)?;
            }
        }
    }
    bar.finish_and_clear();
    args.plot.as_ref().map_or(Ok(()), |path| plot::draw(path, rows))
}

/// The block sizes in ascending order.
fn sizes(args: &Args) -> Result<Vec<u64>, Failure> {
    if args.start_block_size > args.max_block_size {
        return Err(Failure::usage("--start-block-size is larger than --max-block-size"));
    }
    if args.total_bytes < args.max_block_size {
        return Err(Failure::usage("--total-bytes is smaller than one block of --max-block-size"));
    }
    let mut sizes: Vec<_> = std::iter::successors(Some(args.start_block_size), |s| s.checked_mul(4))
        .take_while(|s| *s < args.max_block_size)
        .collect();
    sizes.push(args.max_block_size);
    Ok(sizes)
}

fn serve_flags(args: &Args, sizes: &[u64], total: u64) -> Vec<String> {
    let views: Vec<_> = sizes.iter().map(u64::to_string).collect();
    let pairs = [
        ("--listen", "127.0.0.1:0".to_owned()),
        ("--blocks", (total / args.max_block_size).to_string()),
        ("--regions", "1".to_owned()),
        ("--block-size", args.max_block_size.to_string()),
        ("--views", views.join(",")),
        ("--model", args.model.model.clone()),
        ("--dtype", args.model.dtype.clone()),
        ("--block-tokens", args.model.block_tokens.to_string()),
    ];
    let mut flags: Vec<_> = pairs.into_iter().flat_map(|(k, v)| [k.to_owned(), v]).collect();
    if args.engine_memory {
        flags.push("--engine-memory".into());
    }
    flags.extend(args.verbs.serve_flags(&args.serve_rails));
    flags.extend(args.tcp.serve_flags());
    flags.extend(args.pool.serve_flags(args.serve_memory));
    flags
}

/// The places of all pools on this machine, with that of a bare copy's source. They must exist.
fn check_places(args: &Args) -> Result<Vec<PoolPlace>, Failure> {
    let mut places = vec![args.pool.memory];
    if args.connect.is_none() {
        places.push(args.pool.served(args.serve_memory));
    }
    if args.vs_raw && places.iter().any(|p| *p != PoolPlace::Host) {
        return Err(Failure::usage("--vs-raw compares with copies of host memory: leave it out for GPU memory"));
    }
    if args.vs_raw {
        places.push(PoolPlace::Host);
    }
    places.iter().try_for_each(|p| p.check())?;
    Ok(places)
}

struct Bench<'a> {
    args: &'a Args,
    peer: Peer,
    total: u64,
}

impl Bench<'_> {
    fn bar(&self, rows: usize) -> ProgressBar {
        let bar = ProgressBar::new((rows as u64) * u64::from(self.args.iterations + self.args.warmup));
        if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}") {
            bar.set_style(style);
        }
        bar
    }

    fn offer(&mut self, blocks: u32, size: u64) -> Result<Offer, Failure> {
        let size =
            u32::try_from(size).map_err(|_| Failure::usage("--max-block-size: a block must be smaller than 4 GiB"))?;
        self.peer.offer(blocks, size, LIMIT).map_err(|e| {
            let message = format!("{}; start the other side with `kvferry serve --views {size}`", e.message);
            Failure { message, ..e }
        })
    }

    /// Measures READ and fence of one block at a time, as perftest measures latency: one READ fills the window, and each
    /// block has a fence. Rounds of pulls alternate with rounds of bare READs, since a machine's speed drifts.
    fn one_at_a_time(&mut self, warm: &Consumer, size: u64, raw: &mut Raw) -> Result<OneAtATime, Failure> {
        let mut config = Config::default();
        config.verbs = self.args.verbs.config();
        config.verbs.window = 1;
        config.gpu = self.args.pool.config();
        config.pull.chunk = ChunkSize { per_pull: u32::MAX, min_bytes: size, max_bytes: size };
        let consumer = Consumer::builder("bench".parse()?, self.args.model.model(), PoolLayout::clone(warm.layout()))
            .memory(warm.memory().clone())
            .config(config)
            .build()?;
        let blocks = (self.total / size).min(64) as u32;
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let (mut block, mut first_block) = (Vec::new(), Vec::new());
            for i in 0..=self.args.iterations.div_ceil(2) {
                let offer = self.offer(blocks, size)?;
                peer::pull(&consumer, (offer, size), blocks, vec![LaneKind::Verbs], LIMIT)?;
                let ended = consumer.wait(LIMIT * 2).map_err(|e| Failure::waiting(&e))?;
                let Times { claim: Some(claim), first: Some(first), data: Some(data), .. } = ended.outcome.times else {
                    return Err(Failure::failed("a pull lost a block"));
                };
                // The first pull of a round finds cold caches, and the very first one also connects the lane.
                if i > 0 {
                    block.push(us_of(data.saturating_sub(first) / (blocks - 1)));
                    first_block.push(us_of(first.saturating_sub(claim)));
                }
            }
            let bare = us_of(raw.one_read(size, u64::from(self.args.iterations) * 10)?);
            rounds.push(OneAtATime::of(median(block), median(first_block), bare));
        }
        let of = |f: fn(&OneAtATime) -> f64| median(rounds.iter().map(f).collect());
        Ok(OneAtATime {
            block_us: of(|r| r.block_us),
            first_block_us: of(|r| r.first_block_us),
            raw_us: of(|r| r.raw_us),
            ratio: of(|r| r.ratio),
            first_ratio: of(|r| r.first_ratio),
        })
    }

    /// Whether a lane to the peer works: pulls one block.
    fn works(&mut self, consumer: &Consumer, lane: LaneKind, size: u64) -> Result<bool, Failure> {
        peer::pull(consumer, (self.offer(1, size)?, size), 1, vec![lane], LIMIT)?;
        let ended = consumer.wait(LIMIT * 2).map_err(|e| Failure::waiting(&e))?;
        Ok(!ended.outcome.lanes.is_empty())
    }

    /// Measures one row.
    fn measure(
        &mut self,
        consumer: &Consumer,
        lane: LaneKind,
        size: u64,
        mut raw: Option<&mut Raw>,
        bar: &ProgressBar,
    ) -> Result<Row, Failure> {
        bar.set_message(format!("{lane} {size}"));
        let blocks = u32::try_from(self.total / size).map_err(|_| Failure::usage("too many blocks"))?;
        let mut lat = Vec::new();
        let (mut prep, mut post, mut bare) = (Vec::new(), Vec::new(), Vec::new());
        for i in 0..self.args.warmup + self.args.iterations {
            let offer = self.offer(blocks, size)?;
            peer::pull(consumer, (offer, size), blocks, vec![lane], LIMIT)?;
            let ended = consumer.wait(LIMIT * 2).map_err(|e| Failure::waiting(&e))?;
            let o = &ended.outcome;
            if !o.complete() {
                let cause = o.cause().map_or("none", |c| c.as_str());
                return Err(Failure::failed(format!("a pull over {lane} lost {} blocks: {cause}", o.invalid())));
            }
            if self.args.check_consistency {
                let (_, bad) = self.peer.verify(&ended, consumer)?;
                if bad > 0 {
                    return Err(Failure::failed(format!("{bad} bytes of {lane} at {size} differ from the pattern")));
                }
            }
            if let Some(raw) = raw.as_deref_mut() {
                let granted = ended.contents.iter().flat_map(|c| &c.groups[0].blocks);
                let src: Vec<u32> = granted.flatten().map(|b| b.0).collect();
                let t = raw.copy(lane, size, &src)?;
                if i >= self.args.warmup {
                    bare.push(t);
                }
            }
            bar.inc(1);
            if i >= self.args.warmup {
                let t = o.times;
                let end = t.ended.unwrap_or_default();
                lat.push(end);
                prep.push(t.claim.unwrap_or_default());
                post.push(end.saturating_sub(t.data.unwrap_or(end)));
            }
        }
        let ratios = lat.iter().zip(&bare).map(|(l, b)| b.as_secs_f64() / l.as_secs_f64().max(1e-9));
        let raw_ratio = (!bare.is_empty()).then(|| median(ratios.collect()));
        for v in [&mut lat, &mut prep, &mut post, &mut bare] {
            v.sort();
        }
        let one = match raw {
            Some(raw) if lane == LaneKind::Verbs && blocks > 1 => Some(self.one_at_a_time(consumer, size, raw)?),
            _ => None,
        };
        let rate = |t: Duration| self.total as f64 / t.as_secs_f64().max(1e-9) / 1e9;
        Ok(Row {
            lane: lane.as_str(),
            op: "pull",
            memory: MemoryRecord::from(consumer.memory()),
            peer_memory: self.peer.memory.clone(),
            block_size: size,
            blocks,
            gb_per_s: rate(percentile(&lat, 50).unwrap_or_default()),
            raw_gb_per_s: percentile(&bare, 50).map(rate),
            raw_ratio,
            lat_us: Latency {
                avg: lat.iter().map(Duration::as_secs_f64).sum::<f64>() * 1e6 / lat.len().max(1) as f64,
                p50: us(percentile(&lat, 50).unwrap_or_default()),
                p99: us(percentile(&lat, 99).unwrap_or_default()),
            },
            one_at_a_time: one,
            prep_us: us(percentile(&prep, 50).unwrap_or_default()),
            post_us: us(percentile(&post, 50).unwrap_or_default()),
            version: env!("CARGO_PKG_VERSION"),
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        })
    }
}

fn us_of(t: Duration) -> f64 {
    t.as_secs_f64() * 1e6
}

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    percentile(&v, 50).unwrap_or_default()
}

/// The nearest-rank percentile of sorted values.
fn percentile<T: Copy>(sorted: &[T], p: usize) -> Option<T> {
    let rank = (sorted.len() * p).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let v: Vec<_> = (1..=10).map(Duration::from_secs).collect();
        assert_eq!(percentile(&v, 50), Some(Duration::from_secs(5)));
        assert_eq!(percentile(&v, 99), Some(Duration::from_secs(10)));
        assert_eq!(percentile(&v[..1], 50), Some(Duration::from_secs(1)));
        assert_eq!(percentile::<Duration>(&[], 50), None);
    }
}
