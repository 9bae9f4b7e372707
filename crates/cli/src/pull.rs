//! `kvferry pull`: one pull from a `kvferry serve`. It checks every loaded byte against the pattern.

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use kvferry::{BadOffer, Config, Consumer, EngineId, Faults, Offer};

use crate::{
    args::{self, JsonArg, LaneChoice, ModelArgs, SealArgs, TcpArgs, VerbsArgs},
    out::say,
    peer::{self, Peer},
    pool::{MemoryRecord, PoolArgs, PoolPlace},
    report::{Ending, Failure, PullRecord, ranges, size, us},
};

/// Flags of `pull`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Address of the `kvferry serve`.
    #[arg(long, value_name = "HOST:PORT", required_unless_present = "offer", value_parser = args::address)]
    from: Option<String>,
    /// Number of blocks. The default is all blocks of the peer.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    blocks: Option<u32>,
    /// Time from the start of the command to the decision: Hello, the fresh offer and the pull.
    #[arg(long, default_value = "5s", value_parser = args::duration)]
    deadline: Duration,
    /// Lanes to use.
    #[arg(long, value_enum, default_value = "auto")]
    lane: LaneChoice,
    #[command(flatten)]
    verbs: VerbsArgs,
    #[command(flatten)]
    tcp: TcpArgs,
    #[command(flatten)]
    pool: PoolArgs,
    /// Pull the offer in this file (JSON) instead of a new one.
    #[arg(long, value_name = "FILE")]
    offer: Option<PathBuf>,
    /// Hosts to connect to: networks, addresses, host names, or .SUFFIX of host names. The default is every host.
    #[arg(long, value_name = "HOST,…", value_delimiter = ',')]
    dial: Vec<String>,
    #[command(flatten)]
    seal: SealArgs,
    /// Break the lane on purpose. A list of: throttle=BYTES (per second), down@BYTES, silent@BYTES, stale@BYTES,
    /// panic@BYTES, noquiet, wedge, lanes=N (break only the first N connections).
    #[arg(long, value_name = "FAULT,…")]
    fault: Option<Faults>,
    /// Engine id of this side.
    #[arg(long, default_value = "pull")]
    engine: EngineId,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

/// Reads an offer from a file.
fn read_offer(path: &PathBuf) -> Result<Offer, Failure> {
    let bad = |what: String| Failure::of(Ending::BadOffer, what);
    let text = std::fs::read_to_string(path)
        .map_err(|e| bad(format!("cannot read {}: {e}; the file must hold an offer", path.display())))?;
    Offer::from_json(&text).map_err(|e| bad(format!("{}: {e}", path.display())))
}

/// Pulls once, if the command can run at all.
pub(crate) fn run(args: Args, ready: Result<(), Failure>) -> Result<ExitCode, Failure> {
    let mut record = PullRecord::new(args.deadline);
    let done = ready.and_then(|()| pull(&args, &mut record));
    if let Err(failure) = &done {
        record.failed(failure);
    }
    if args.json.text() && record.decided_us.is_some() {
        print(&record);
    }
    let written = args.json.write(&record);
    done?;
    written?;
    Ok(match record.result {
        Ending::Complete => ExitCode::SUCCESS,
        Ending::Incomplete => ExitCode::from(3),
        _ => ExitCode::from(1),
    })
}

/// Pulls once, and enters into the record what happens. One deadline covers Hello, the offer and the pull.
fn pull(args: &Args, record: &mut PullRecord) -> Result<(), Failure> {
    let started = Instant::now();
    let left = || args.deadline.saturating_sub(started.elapsed());
    args.verbs.check(args.lane, false)?;
    args.pool.memory.check()?;
    let bad = |e: BadOffer| Failure::of(Ending::BadOffer, e);
    let file = args.offer.as_ref().map(read_offer).transpose()?;
    let mut config = Config::default();
    config.names.seal_keys = args.seal.keys()?;
    if let Some(offer) = &file {
        // Before anything is dialled: the address comes from the offer.
        offer.check().and_then(|()| offer.check_seal(&config.names.seal_keys)).map_err(bad)?;
    }
    let from = match (&args.from, &file) {
        (Some(addr), _) => addr.clone(),
        (None, Some(offer)) => offer.ranks[0].addr.clone(),
        (None, None) => return Err(Failure::usage("--from or --offer is missing")),
    };
    config.dial = args.dial.clone();
    config.check().map_err(|e| Failure::usage(e.to_string()))?;
    let mut peer = Peer::probe_listed(&from, &args.engine, &args.model.model(), left(), &args.dial)?;
    let offer = match file {
        Some(offer) => offer,
        None => peer.offer(args.blocks.unwrap_or(0), 0, left())?,
    };
    record.offer(&offer);
    record.peer_memory = peer.memory.clone();
    // `kvferry serve` offers blocks of its first group, from position 0 on.
    let group = peer.welcome.pool.groups.first().ok_or_else(|| Failure::failed("the peer's pool has no groups"))?;
    let offered = u32::try_from(offer.tokens.div_ceil(group.block_tokens.into())).unwrap_or(u32::MAX).min(group.blocks);
    let blocks = args.blocks.unwrap_or(offered).min(offered);
    let layout = peer.local_layout(group.id, blocks)?;
    PoolPlace::check_sizes(&[args.pool.memory], layout.segments[0])?;
    let memory = args.pool.memory.allocate(&layout, false)?;
    record.memory = Some(MemoryRecord::from(&memory));
    config.verbs = args.verbs.config();
    config.tcp = args.tcp.config();
    config.gpu = args.pool.config();
    config.pull.faults = args.fault.clone();
    config.pull.lanes = args.lane.lanes();
    let consumer =
        Consumer::builder(args.engine.clone(), args.model.model(), layout).memory(memory).config(config).build()?;
    record.setup_us = Some(us(started.elapsed()));
    let pull = peer::pull(&consumer, (offer, 0), blocks, args.lane.lanes(), left())?;
    // A pull ends soon after its deadline, or it never does.
    match consumer.wait(left() + Duration::from_secs(30)) {
        Ok(ended) => {
            record.outcome(&ended.outcome);
            let (verified, mismatched) = peer.verify(&ended, &consumer)?;
            record.checked(verified, mismatched);
            Ok(())
        }
        Err(error) => {
            // Its blocks still belong to it, so the bytes that arrived are not compared.
            if let Some(outcome) = consumer.decided(pull) {
                record.outcome(&outcome);
            }
            Err(Failure::waiting(&error))
        }
    }
}

fn print(r: &PullRecord) {
    let seconds = r.data_us.or(r.decided_us).unwrap_or(0) as f64 / 1e6;
    say!(
        "{} of {} blocks loaded, {} over {} into {}; verified {} bytes, mismatched {}",
        r.loaded.len(),
        r.blocks,
        size(r.bytes),
        r.lane.unwrap_or("no lane"),
        r.memory.as_ref().map_or("memory".into(), MemoryRecord::text),
        r.verified_bytes,
        r.mismatched_bytes
    );
    say!("loaded  {}", ranges(&r.loaded));
    say!("invalid {}", ranges(&r.invalid));
    for (cause, set) in &r.causes {
        say!("  {cause}: {}", ranges(set));
    }
    let ms = |t: Option<u64>| t.map_or("-".into(), |t| format!("{:.3} ms", t as f64 / 1e3));
    say!(
        "claimed {} | data {} | decided {} | ended {} | {:.2} GB/s",
        ms(r.claim_us),
        ms(r.data_us),
        ms(r.decided_us),
        ms(r.ended_us),
        if seconds > 0.0 { r.bytes as f64 / seconds / 1e9 } else { 0.0 }
    );
}
