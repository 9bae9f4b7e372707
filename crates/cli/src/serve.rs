//! `kvferry serve`: a producer whose pool holds a pattern, with a service that makes offers of it.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use kvferry::{
    BlockId, Config, EngineId, Group, GroupId, GroupKind, OfferGroup, OfferSpec, PoolLayout, Producer, Region,
    StartError,
};
use kvferry_testkit::pattern;
use serde::Serialize;

use crate::{
    args::{self, JsonArg, LaneChoice, ModelArgs, SealArgs, TcpArgs, VerbsArgs},
    offers::Bench,
    out::{self, say},
    pool::{MemoryRecord, PoolArgs, PoolPlace},
    report::{Failure, size},
};

/// Flags of `serve`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Listening address of the control plane. Port 0 selects a free port.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7400")]
    listen: String,
    /// HOST:PORT in offers, if consumers need another address than the listening one: always with 0.0.0.0 and [::]. Port 0
    /// stands for the listening port.
    #[arg(long, value_name = "HOST:PORT", value_parser = args::advertised)]
    advertise: Option<String>,
    /// Blocks in the pool.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    blocks: u32,
    /// Regions (layers) of the pool.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    regions: u32,
    /// Bytes per block and region, a multiple of 512.
    #[arg(long, value_name = "BYTES", default_value = "32K", value_parser = args::bytes)]
    block_size: u64,
    /// Engine id.
    #[arg(long, default_value = "serve")]
    engine: EngineId,
    /// Lanes to serve.
    #[arg(long, value_enum, default_value = "auto")]
    lane: LaneChoice,
    #[command(flatten)]
    verbs: VerbsArgs,
    #[command(flatten)]
    tcp: TcpArgs,
    #[command(flatten)]
    pool: PoolArgs,
    #[command(flatten)]
    seal: SealArgs,
    /// Use anonymous memory, like an engine's own, instead of a pool that consumers on this host can map.
    #[arg(long)]
    engine_memory: bool,
    /// Add groups over the same memory with one region and blocks of these sizes, for `bench`.
    #[arg(long, value_name = "BYTES,…", value_delimiter = ',', value_parser = args::bytes)]
    views: Vec<u64>,
    /// Offer all blocks, and write the offer (JSON) to this file for `pull --offer`.
    #[arg(long, value_name = "FILE")]
    offer: Option<PathBuf>,
    /// Lease of an offer without a claim.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = args::duration)]
    unclaimed_lease: Duration,
    /// Lease of a claim after its last renewal; at least two heartbeats (1s).
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = args::duration)]
    claim_lease: Duration,
    /// Longest life of an offer, even if its claim is renewed.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = args::duration)]
    hard_cap: Duration,
    /// End when the parent process does.
    #[arg(long, hide = true)]
    exit_with_parent: bool,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

/// The line that `serve` prints when it is ready.
#[derive(Debug, Serialize)]
struct Ready<'a> {
    listen: &'a str,
    engine: &'a str,
    incarnation: String,
    blocks: u32,
    regions: u32,
    block_size: u64,
    bytes: u64,
    pid: u32,
    base: u64,
    memory: MemoryRecord,
}

/// The layout of the pool: group 0, and a group for each view.
pub(crate) fn layout(
    blocks: u32,
    regions: u32,
    block_size: u64,
    tokens: u32,
    views: &[u64],
) -> Result<PoolLayout, Failure> {
    if let Some(bad) = views.iter().chain([&block_size]).find(|b| **b % pattern::PAGE != 0) {
        return Err(Failure::usage(format!("block size {bad} is not a multiple of {}: round it up", pattern::PAGE)));
    }
    let mut layout = PoolLayout::uniform(blocks, regions, block_size, tokens);
    let total = layout.segments[0];
    for (i, &bytes) in views.iter().enumerate() {
        let fits = u32::try_from(total / bytes).ok().filter(|n| *n > 0 && *n < u32::MAX);
        let blocks = fits.ok_or_else(|| Failure::usage(format!("a view of {bytes} bytes does not fit the pool")))?;
        let region = Region { name: "view".into(), segment: 0, offset: 0, block_bytes: bytes, stride: bytes };
        layout.groups.push(Group {
            id: GroupId(i as u16 + 1),
            kind: GroupKind::Full,
            block_tokens: tokens,
            blocks,
            regions: vec![region],
        });
    }
    layout.check().map_err(|e| Failure::usage(e.to_string()))?;
    Ok(layout)
}

/// An offer of all blocks in pool order.
fn all_blocks(blocks: u32, block_tokens: u32) -> OfferSpec {
    let all = (0..blocks).map(|b| Some(BlockId(b))).collect();
    let groups = vec![OfferGroup { group: GroupId(0), first_position: 0, blocks: all }];
    OfferSpec::new(u64::from(blocks) * u64::from(block_tokens), groups).request("serve")
}

/// Serves until SIGTERM or SIGINT.
pub(crate) fn run(args: Args) -> Result<ExitCode, Failure> {
    args.verbs.check(args.lane, true)?;
    args.pool.memory.check()?;
    if args.exit_with_parent {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    }
    let bytes = args.block_size.saturating_mul(u64::from(args.blocks)).saturating_mul(u64::from(args.regions));
    PoolPlace::check_sizes(&[args.pool.memory], bytes)?;
    if let Some(path) = &args.offer {
        out::check_file(path)?;
    }
    let layout = layout(args.blocks, args.regions, args.block_size, args.model.block_tokens, &args.views)?;
    let memory = args.pool.memory.allocate(&layout, args.engine_memory)?;
    let mut config = Config::default();
    config.verbs = args.verbs.config();
    config.tcp = args.tcp.config();
    config.gpu = args.pool.config();
    config.names.seal_keys = args.seal.keys()?;
    config.lease.unclaimed = args.unclaimed_lease;
    config.lease.claimed = args.claim_lease;
    config.lease.hard_cap = args.hard_cap;
    let bench = Bench::default();
    let (routes, described) = bench.routes();
    let mut builder = Producer::builder(args.engine, args.model.model(), layout)
        .memory(memory)
        .listen(args.listen)
        .lanes(args.lane.lanes())
        .fill(|me, memory| pattern::write(me.incarnation.get(), memory))
        .config(config)
        .services(routes, described);
    if let Some(addr) = args.advertise {
        builder = builder.advertise(addr);
    }
    let producer = Arc::new(builder.build().map_err(not_started)?);
    let me = producer.me().clone();
    bench.set(&producer);
    if let Some(path) = &args.offer {
        let offer = bench.offer(&producer, all_blocks(args.blocks, args.model.block_tokens))?;
        out::write_file(path, &(offer.to_json() + "\n"))?;
    }
    let ready = Ready {
        listen: producer.addr(),
        engine: me.engine.as_str(),
        incarnation: me.incarnation.to_string(),
        blocks: args.blocks,
        regions: args.regions,
        block_size: args.block_size,
        bytes,
        pid: std::process::id(),
        base: producer.memory().base(0),
        memory: MemoryRecord::from(producer.memory()),
    };
    if args.json.text() {
        say!(
            "serving {} of {} ({} blocks, {} regions of {} each) as {:?} on {}; pull with: kvferry pull --from {}",
            size(bytes),
            ready.memory.text(),
            args.blocks,
            args.regions,
            size(args.block_size),
            ready.engine,
            ready.listen,
            ready.listen
        );
    }
    args.json.write(&ready)?;
    // Whoever started it waits for this line.
    out::check()?;
    let shown = (args.json.text() && out::is_live()).then(|| Rate::new(&bench, &producer));
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(stay(&producer, &bench, shown))?;
    out::end_live();
    Ok(ExitCode::SUCCESS)
}

/// Serves until SIGTERM or Ctrl-C. On a terminal, shows its offers and consumers each second.
async fn stay(producer: &Producer, bench: &Bench, mut shown: Option<Rate>) -> std::io::Result<()> {
    let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut second = tokio::time::interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            freed = producer.freed() => {
                bench.freed(&freed);
                tracing::info!(offer = %freed.offer, reason = ?freed.why, "offer freed");
            }
            _ = second.tick(), if shown.is_some() => {
                if let Some(rate) = &mut shown {
                    out::live(&rate.next(bench, producer));
                }
            }
            _ = term.recv() => return Ok(()),
            stop = tokio::signal::ctrl_c() => return stop,
        }
    }
}

/// The rate at which consumers release bytes. A producer does not see the reads of `local` and `verbs` lanes themselves.
struct Rate {
    at: Instant,
    bytes: u64,
}

impl Rate {
    fn new(bench: &Bench, producer: &Producer) -> Self {
        Self { at: Instant::now(), bytes: bench.usage(producer).1 }
    }

    /// The live offers, the consumers, and the rate since the last call.
    fn next(&mut self, bench: &Bench, producer: &Producer) -> String {
        let (usage, bytes) = bench.usage(producer);
        let (passed, new) = (self.at.elapsed().as_secs_f64(), bytes - self.bytes);
        *self = Self { at: Instant::now(), bytes };
        let mut sessions = BTreeMap::<_, usize>::new();
        for consumer in producer.consumers() {
            *sessions.entry(consumer.engine.as_str().to_owned()).or_default() += 1;
        }
        let to: Vec<_> = sessions.iter().map(|(e, n)| if *n == 1 { e.clone() } else { format!("{e} x{n}") }).collect();
        format!(
            "{} | {} offers with {} blocks, {} claims | {:.2} GB/s | {} offers released, {} ended otherwise",
            if to.is_empty() { "no consumers".into() } else { format!("to {}", to.join(", ")) },
            usage.offers,
            usage.blocks,
            usage.claims,
            if passed > 0.0 { new as f64 / passed / 1e9 } else { 0.0 },
            usage.released,
            usage.ended
        )
    }
}

/// The failure of a start, with the names of flags.
fn not_started(e: StartError) -> Failure {
    match e {
        StartError::Config { field: field @ ("listen" | "advertise"), why } => {
            Failure::usage(format!("--{field}: {}", why.replace("`advertise`", "--advertise")))
        }
        e => Failure::from(e),
    }
}
