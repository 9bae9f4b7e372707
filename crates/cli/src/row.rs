//! The rows of `kvferry bench`, as text and as JSON.

use serde::Serialize;

use crate::{out::say, pool::MemoryRecord, report::FailureRecord};

/// Latencies of a pull, in microseconds.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Latency {
    /// Mean.
    pub avg: f64,
    /// Median.
    pub p50: u64,
    /// 99th percentile.
    pub p99: u64,
}

/// One lane at one block size.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    /// The lane.
    pub lane: &'static str,
    /// Always `pull`.
    pub op: &'static str,
    /// Where this side's pool lies.
    pub memory: MemoryRecord,
    /// Where the producer's pool lies; `null` if it does not say.
    pub peer_memory: Option<MemoryRecord>,
    /// Bytes per block.
    pub block_size: u64,
    /// Blocks per pull.
    pub blocks: u32,
    /// Bytes per pull by the median latency, in 10^9 bytes per second.
    pub gb_per_s: f64,
    /// The same for bare copies; `null` without `--vs-raw`.
    pub raw_gb_per_s: Option<f64>,
    /// Median of the ratios of a pull's rate to the rate of the bare copy right after it. A drift of the machine's speed
    /// affects both. `null` without `--vs-raw`.
    pub raw_ratio: Option<f64>,
    /// From the call to the end of the pull.
    pub lat_us: Latency,
    /// Figures for one block at a time; only for verbs with `--vs-raw` and more than one block per pull, otherwise `null`.
    pub one_at_a_time: Option<OneAtATime>,
    /// Median from the call to the granted claim.
    pub prep_us: u64,
    /// Median from the last fence to the end.
    pub post_us: u64,
    /// Version of kvferry.
    pub version: &'static str,
    /// Name of this machine.
    pub host: String,
    /// When the row was finished, such as `2026-11-27T08:00:00Z`.
    pub date: String,
}

/// The failure of a benchmark, with the rows that were finished before it.
#[derive(Debug, Serialize)]
pub(crate) struct FailedRows<'a> {
    #[serde(flatten)]
    pub failure: FailureRecord,
    pub rows: &'a [Row],
}

/// READ and fence of one block at a time, compared with one bare READ at a time. Medians over the rounds.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct OneAtATime {
    /// Microseconds for a block after the first: the mean over a pull, the median over a round.
    pub block_us: f64,
    /// Microseconds from the granted claim to the first block's fence. The threads were asleep before.
    pub first_block_us: f64,
    /// Microseconds for a bare READ: the median over a round.
    pub raw_us: f64,
    /// `block_us` divided by `raw_us` of the same round.
    pub ratio: f64,
    /// `first_block_us` divided by `raw_us` of the same round.
    pub first_ratio: f64,
}

impl OneAtATime {
    pub(crate) fn of(block_us: f64, first_block_us: f64, raw_us: f64) -> Self {
        Self { block_us, first_block_us, raw_us, ratio: block_us / raw_us, first_ratio: first_block_us / raw_us }
    }
}

/// Prints the names of the columns.
pub(crate) fn header(raw: bool) {
    let more = if raw { format!(" {:>13} {:>6}", "Raw (GB/Sec)", "ratio") } else { String::new() };
    say!(
        "{:<6} {:>15} {:>10} {:>12}{more} {:>14} {:>14} {:>14} {:>14}",
        "Lane",
        "Block Size (B)",
        "Batch Size",
        "B/W (GB/Sec)",
        "Avg Lat. (us)",
        "P99 Lat. (us)",
        "Avg Prep (us)",
        "Avg Post (us)"
    );
}

/// Prints a row.
pub(crate) fn print(r: &Row) {
    let raw = r.raw_gb_per_s.zip(r.raw_ratio);
    let more = raw.map_or(String::new(), |(raw, ratio)| format!(" {raw:>13.2} {ratio:>6.2}"));
    say!(
        "{:<6} {:>15} {:>10} {:>12.2}{more} {:>14.1} {:>14} {:>14} {:>14}",
        r.lane,
        r.block_size,
        r.blocks,
        r.gb_per_s,
        r.lat_us.avg,
        r.lat_us.p99,
        r.prep_us,
        r.post_us
    );
    if let Some(o) = r.one_at_a_time {
        say!(
            "       one block at a time, READ and fence: {:.0} us; ib_read_lat: {:.0} us; ratio {:.2}; first of a pull: {:.0} us, {:.2}",
            o.block_us,
            o.raw_us,
            o.ratio,
            o.first_block_us,
            o.first_ratio
        );
    }
}
