//! `kvferry pull`: one pull from a `kvferry serve`, every loaded byte checked against the pattern.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use kvferry::{
    BlockId, Config, Consumer, Ended, EngineId, Faults, GroupId, LocalBlocks, Memory, Offer, PoolLayout, Pull,
};
use kvferry_testkit::pattern::Check;

use crate::{
    args::{self, JsonArg, LaneChoice, ModelArgs, VerbsArgs},
    offers,
    report::{Failure, PullRecord, ranges, size},
};

/// Flags of `pull`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Where `kvferry serve` listens.
    #[arg(long, value_name = "HOST:PORT", required_unless_present = "offer")]
    from: Option<String>,
    /// Blocks to pull; all of the peer's by default.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    blocks: Option<u32>,
    /// From the call to the decision.
    #[arg(long, default_value = "5s", value_parser = args::duration)]
    deadline: Duration,
    /// Lanes to use.
    #[arg(long, value_enum, default_value = "auto")]
    lane: LaneChoice,
    #[command(flatten)]
    verbs: VerbsArgs,
    /// Pull the offer in this file (JSON) instead of a fresh one.
    #[arg(long, value_name = "FILE")]
    offer: Option<PathBuf>,
    /// Break the lane on purpose: throttle=BYTES (a second), down@BYTES, silent@BYTES, stale@BYTES, noquiet, wedge, lanes=N
    /// (break only the first N connections); joined by commas.
    #[arg(long, value_name = "FAULTS")]
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
    let text = std::fs::read_to_string(path).map_err(|e| {
        Failure::failed(format!("cannot read {}: {e}; name a file that holds an offer", path.display()))
    })?;
    Offer::from_json(&text).map_err(|e| Failure::failed(format!("{}: {e}", path.display())))
}

/// A layout of the same shape as the peer's group, for `blocks` blocks.
pub(crate) fn local_layout(theirs: &PoolLayout, group: GroupId, blocks: u32) -> Result<PoolLayout, Failure> {
    let g = theirs.group(group).ok_or_else(|| Failure::failed("the peer's pool lacks the offer's group"))?;
    let mut g = g.clone();
    let mut offset = 0;
    g.blocks = blocks.max(1);
    for r in &mut g.regions {
        (r.segment, r.offset, r.stride) = (0, offset, r.block_bytes);
        offset = u64::from(g.blocks)
            .checked_mul(r.block_bytes)
            .and_then(|n| n.checked_add(offset))
            .ok_or_else(|| Failure::failed("the peer's blocks are too large for this machine"))?;
    }
    Ok(PoolLayout { segments: vec![offset], groups: vec![g] })
}

/// Compares what was loaded with what the peer holds. Returns verified and mismatched bytes.
pub(crate) fn verify(
    ended: &Ended,
    memory: &Memory,
    ours: &PoolLayout,
    theirs: &PoolLayout,
    seed: u64,
) -> Result<(u64, u64), Failure> {
    let mut check = Check::new();
    let (mut good, mut bad) = (0, 0);
    for (g, offered) in ended.outcome.groups.iter().zip(&ended.offer.groups) {
        for position in g.loaded.iter() {
            let at = (position - offered.first_position) as usize;
            let Some(src) = offered.blocks[at] else { continue };
            let (ok, wrong) = check.block(seed, (theirs, src.0), (memory, ours, position), g.group)?;
            good += ok;
            bad += wrong;
        }
    }
    Ok((good, bad))
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
        (None, None) => return Err(Failure::usage("--from or --offer is needed")),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (welcome, offer) = runtime.block_on(async {
        let welcome = kvferry::probe(&from, &args.engine, &args.model.model(), args.deadline).await?;
        let offer = match file {
            Some(offer) => offer,
            None => offers::make_offer(&from, args.blocks.unwrap_or(0), true, 0, args.deadline).await?,
        };
        Ok::<_, Failure>((welcome, offer))
    })?;
    let group = offer.groups.first().ok_or_else(|| Failure::failed("the offer names no blocks"))?.clone();
    if group.first_position != 0 {
        return Err(Failure::failed("the offer does not start at position 0: it was not made by `kvferry serve`"));
    }
    let blocks = args.blocks.unwrap_or(u32::MAX).min(u32::try_from(group.blocks.len()).unwrap_or(u32::MAX));
    let layout = local_layout(&welcome.pool, group.group, blocks)?;
    args::check_memory(layout.segments[0])?;
    let mut config = Config::default();
    config.verbs = args.verbs.config();
    config.pull.faults = args.fault;
    config.pull.lanes = args.lane.lanes();
    let consumer = Consumer::builder(args.engine, args.model.model(), layout.clone()).config(config).build()?;
    let wanted =
        LocalBlocks { group: group.group, first_position: 0, blocks: (0..blocks).map(|b| Some(BlockId(b))).collect() };
    let pull = Pull::new(offer, vec![wanted]).deadline(args.deadline).lanes(args.lane.lanes());
    consumer.pull(pull)?;
    // The end comes soon after the deadline, or a lane is wedged.
    let ended = consumer
        .wait(args.deadline + Duration::from_secs(30))
        .ok_or_else(|| Failure::failed("the pull decided but did not end: its lane is wedged, see the log"))?;
    let (verified, mismatched) =
        verify(&ended, consumer.memory(), &layout, &welcome.pool, welcome.peer.incarnation.get())?;
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
