//! `kvferry pull`: one pull from a `kvferry serve`. It checks every loaded byte against the pattern.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use kvferry::{Config, Consumer, EngineId, Faults, Offer};

use crate::{
    args::{self, JsonArg, LaneChoice, ModelArgs, TcpArgs, VerbsArgs},
    peer::{self, Peer},
    report::{Failure, PullRecord, ranges, size},
};

/// Flags of `pull`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Address of the `kvferry serve`.
    #[arg(long, value_name = "HOST:PORT", required_unless_present = "offer")]
    from: Option<String>,
    /// Number of blocks. The default is all blocks of the peer.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    blocks: Option<u32>,
    /// Time from the start of the pull to its decision.
    #[arg(long, default_value = "5s", value_parser = args::duration)]
    deadline: Duration,
    /// Lanes to use.
    #[arg(long, value_enum, default_value = "auto")]
    lane: LaneChoice,
    #[command(flatten)]
    verbs: VerbsArgs,
    #[command(flatten)]
    tcp: TcpArgs,
    /// Pull the offer in this file (JSON) instead of a new one.
    #[arg(long, value_name = "FILE")]
    offer: Option<PathBuf>,
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
    json: JsonArg,
}

/// Reads an offer from a file.
fn read_offer(path: &PathBuf) -> Result<Offer, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| Failure::failed(format!("cannot read {}: {e}; the file must hold an offer", path.display())))?;
    Offer::from_json(&text).map_err(|e| Failure::failed(format!("{}: {e}", path.display())))
}

/// Pulls once.
pub(crate) fn run(args: Args) -> Result<ExitCode, Failure> {
    args.verbs.check(args.lane, false)?;
    let file = args.offer.as_ref().map(read_offer).transpose()?;
    if let Some(offer) = &file {
        offer.check(1 << 20)?;
    }
    let from = match (&args.from, &file) {
        (Some(addr), _) => addr.clone(),
        (None, Some(offer)) => offer.ranks[0].addr.clone(),
        (None, None) => return Err(Failure::usage("--from or --offer is missing")),
    };
    let peer = Peer::probe(&from, &args.engine, &args.model.model(), args.deadline)?;
    let offer = match file {
        Some(offer) => offer,
        None => peer.offer(args.blocks.unwrap_or(0), 0)?,
    };
    let group = offer.groups.first().ok_or_else(|| Failure::failed("the offer names no blocks"))?;
    if group.first_position != 0 {
        return Err(Failure::failed("the offer does not start at position 0: it was not made by `kvferry serve`"));
    }
    let blocks = args.blocks.unwrap_or(u32::MAX).min(u32::try_from(group.blocks.len()).unwrap_or(u32::MAX));
    let layout = peer.local_layout(group.group, blocks)?;
    args::check_memory(layout.segments[0])?;
    let mut config = Config::default();
    config.verbs = args.verbs.config();
    config.tcp = args.tcp.config();
    config.pull.faults = args.fault;
    config.pull.lanes = args.lane.lanes();
    let consumer = Consumer::builder(args.engine, args.model.model(), layout).config(config).build()?;
    consumer.pull(peer::pull(offer, blocks, args.lane.lanes(), args.deadline)?)?;
    // A pull ends soon after its deadline, unless a lane is wedged.
    let ended = consumer
        .wait(args.deadline + Duration::from_secs(30))
        .ok_or_else(|| Failure::failed("the pull decided but did not end: its lane is wedged, see the log"))?;
    let (verified, mismatched) = peer.verify(&ended, &consumer)?;
    let record = PullRecord::new(&ended, verified, mismatched);
    if args.json.text() {
        print(&record);
    }
    args.json.write(&record)?;
    Ok(match (&record, ended.outcome.complete()) {
        (r, _) if r.mismatched_bytes > 0 => ExitCode::from(1),
        (_, true) => ExitCode::SUCCESS,
        (_, false) => ExitCode::from(3),
    })
}

fn print(r: &PullRecord) {
    let seconds = r.data_us.or(r.decided_us).unwrap_or(0) as f64 / 1e6;
    println!(
        "{} of {} blocks loaded, {} over {}; verified {} bytes, mismatched {}",
        r.loaded.len(),
        r.blocks,
        size(r.bytes),
        r.lane.unwrap_or("no lane"),
        r.verified_bytes,
        r.mismatched_bytes
    );
    println!("loaded  {}", ranges(&r.loaded));
    println!("invalid {}", ranges(&r.invalid));
    for (cause, set) in &r.causes {
        println!("  {cause}: {}", ranges(set));
    }
    let ms = |t: Option<u64>| t.map_or("-".into(), |t| format!("{:.3} ms", t as f64 / 1e3));
    println!(
        "claimed {} | data {} | decided {} | ended {} | {:.2} GB/s",
        ms(r.claim_us),
        ms(r.data_us),
        ms(r.decided_us),
        ms(r.ended_us),
        if seconds > 0.0 { r.bytes as f64 / seconds / 1e9 } else { 0.0 }
    );
}
