//! Prometheus metrics. A counter counts final results, so it never goes down.
//!
//! Register a consumer's or a producer's metrics in the engine's registry and serve it with the engine's own; kvferry opens
//! no port for it. [`GpuMetrics`] are the whole process's: register them once, beside those of its consumer and producer.

use kvferry_proto::{Gone, Outcome};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CauseLabel {
    /// Why a block is invalid: see [`Cause`](crate::Cause).
    cause: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LaneLabel {
    /// `local`, `tcp`, …
    lane: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    /// `loaded`: all blocks; `partial`: some; `failed`: none.
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GoneLabel {
    /// Why an offer ended: `released`, `expired`, `revoked`, `hard_cap`.
    why: &'static str,
}

/// A consumer's metrics.
#[derive(Debug, Clone)]
pub struct ConsumerMetrics {
    pulls: Family<ResultLabel, Counter>,
    loaded: Counter,
    invalid: Family<CauseLabel, Counter>,
    bytes: Family<LaneLabel, Counter>,
    retries: Counter,
    decided: Histogram,
    ended: Histogram,
    pub(crate) running: Gauge,
    pub(crate) wedged: Gauge,
}

/// 100 µs to 30 s: from one small block inside a host to a long prompt over a slow network.
const SECONDS: [f64; 12] = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0];

impl Default for ConsumerMetrics {
    fn default() -> Self {
        Self {
            pulls: Family::default(),
            loaded: Counter::default(),
            invalid: Family::default(),
            bytes: Family::default(),
            retries: Counter::default(),
            decided: Histogram::new(SECONDS),
            ended: Histogram::new(SECONDS),
            running: Gauge::default(),
            wedged: Gauge::default(),
        }
    }
}

impl ConsumerMetrics {
    /// Adds them to a registry, under `kvferry_`.
    pub fn register(&self, registry: &mut Registry) {
        let r = registry.sub_registry_with_prefix("kvferry");
        r.register("pulls", "Pulls that have ended, by result", self.pulls.clone());
        r.register("blocks_loaded", "Blocks that pulls loaded", self.loaded.clone());
        r.register("blocks_invalid", "Blocks that pulls did not load, by cause", self.invalid.clone());
        r.register("bytes_loaded", "Bytes of loaded blocks, by the lane that finished", self.bytes.clone());
        r.register("pull_retries", "Attempts after a pull's first", self.retries.clone());
        r.register("pull_decided_seconds", "From the call to the decision", self.decided.clone());
        r.register("pull_ended_seconds", "From the call to the end", self.ended.clone());
        r.register("pulls_running", "Pulls that have not ended", self.running.clone());
        r.register("pulls_wedged", "Pulls whose blocks are withheld until a restart", self.wedged.clone());
        #[cfg(feature = "verbs")]
        r.register_collector(Box::new(teardown::Stages));
    }

    pub(crate) fn ended(&self, o: &Outcome) {
        let result = match (o.complete(), o.loaded()) {
            (true, _) => "loaded",
            (false, 0) => "failed",
            (false, _) => "partial",
        };
        self.pulls.get_or_create(&ResultLabel { result }).inc();
        self.loaded.inc_by(o.loaded());
        for (cause, set) in o.groups.iter().flat_map(|g| &g.causes) {
            self.invalid.get_or_create(&CauseLabel { cause: cause.as_str() }).inc_by(set.len());
        }
        if let Some(lane) = o.lanes.last() {
            self.bytes.get_or_create(&LaneLabel { lane: lane.as_str() }).inc_by(o.bytes);
        }
        self.retries.inc_by(u64::from(o.retries));
        for (h, t) in [(&self.decided, o.times.decided), (&self.ended, o.times.ended)] {
            if let Some(t) = t {
                h.observe(t.as_secs_f64());
            }
        }
    }
}

/// A producer's metrics.
#[derive(Debug, Clone, Default)]
pub struct ProducerMetrics {
    pub(crate) offers: Counter,
    ends: Family<GoneLabel, Counter>,
    pub(crate) live: Gauge,
    pub(crate) claims: Gauge,
    pub(crate) sessions: Gauge,
    pub(crate) wrong_tokens: Counter,
}

impl ProducerMetrics {
    /// Adds them to a registry, under `kvferry_`.
    pub fn register(&self, registry: &mut Registry) {
        let r = registry.sub_registry_with_prefix("kvferry");
        r.register("offers", "Offers made", self.offers.clone());
        r.register("offers_ended", "Offers whose blocks came back, by reason", self.ends.clone());
        r.register("offers_live", "Offers whose blocks are held", self.live.clone());
        r.register("claims_live", "Claims on live offers", self.claims.clone());
        r.register("sessions", "Open sessions of consumers", self.sessions.clone());
        let help = "Claims and releases whose token was not the offer's: the name was changed on its way, or guessed";
        r.register("wrong_tokens", help, self.wrong_tokens.clone());
    }

    pub(crate) fn freed(&self, why: Gone) {
        let why = why.as_str();
        self.ends.get_or_create(&GoneLabel { why }).inc();
    }
}

/// The metrics of GPU memory in this whole process, under `kvferry_gpu_`:
///
/// - `landed_bytes{landing}`: bytes in place in a consumer's GPU memory. `direct`: a NIC wrote it; `ring`: through the pinned
///   ring; `ipc`: from another process's GPU memory on this host. Only a fence says which of them count as loaded.
/// - `jobs{direction}` and `jobs_failed{direction}`: copy jobs that ended, and those among them that failed. A job is about a
///   chunk of a pull. `to_gpu`: out of a consumer's ring; `to_host`: into a producer's; `between`: from GPU memory to GPU
///   memory. Tools that read or write GPU memory make jobs too.
/// - `job_queue_seconds{direction}` and `job_copy_seconds{direction}`: the sums of their times from submission to the first
///   copy, and from there to the end. Divided by `jobs` they are means.
/// - `unusable`: GPUs of this process whose context is unusable: a pull into one fails until the process is restarted.
#[derive(Debug, Clone, Copy, Default)]
pub struct GpuMetrics;

impl GpuMetrics {
    /// Adds them to a registry. Once: a registry with two copies has every name twice.
    pub fn register(self, registry: &mut Registry) {
        registry.sub_registry_with_prefix("kvferry").register_collector(Box::new(gpu::Process));
    }
}

mod gpu {
    //! What [`GpuMetrics`](super::GpuMetrics) reports.

    use prometheus_client::{
        collector::Collector,
        encoding::{DescriptorEncoder, EncodeMetric},
        metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    };

    use crate::memory::gpu::stats::{COUNTERS, JobCounts};

    #[derive(Debug)]
    pub(super) struct Process;

    impl Collector for Process {
        fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
            let help = "Bytes in place in GPU memory, by the way that they took";
            let mut landed = encoder.encode_descriptor("gpu_landed_bytes", help, None, MetricType::Counter)?;
            for (landing, bytes) in COUNTERS.landed() {
                ConstCounter::new(bytes).encode(landed.encode_family(&[("landing", landing)])?)?;
            }
            let counts: [(_, _, fn(&JobCounts) -> u64); 2] = [
                ("gpu_jobs", "Copy jobs that ended, failed ones included", |j| j.ended),
                ("gpu_jobs_failed", "Copy jobs that failed", |j| j.failed),
            ];
            for (name, help, of) in counts {
                let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
                for job in COUNTERS.jobs() {
                    ConstCounter::new(of(&job)).encode(family.encode_family(&[("direction", job.direction)])?)?;
                }
            }
            let times: [(_, _, fn(&JobCounts) -> f64); 2] = [
                ("gpu_job_queue_seconds", "Seconds from submissions of copy jobs to their first copies", |j| {
                    j.queue.as_secs_f64()
                }),
                ("gpu_job_copy_seconds", "Seconds from the first copies of copy jobs to their ends", |j| {
                    j.copy.as_secs_f64()
                }),
            ];
            for (name, help, of) in times {
                let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
                for job in COUNTERS.jobs() {
                    ConstCounter::new(of(&job)).encode(family.encode_family(&[("direction", job.direction)])?)?;
                }
            }
            let help = "GPUs whose context is unusable until this process is restarted";
            let gauge = encoder.encode_descriptor("gpu_unusable", help, None, MetricType::Gauge)?;
            ConstGauge::new(u64::from(COUNTERS.unusable())).encode(gauge)
        }
    }
}

#[cfg(feature = "verbs")]
mod teardown {
    //! How verbs reads were stopped and failed rails torn down, in this whole process.

    use prometheus_client::{
        collector::Collector,
        encoding::{DescriptorEncoder, EncodeMetric},
        metrics::{MetricType, counter::ConstCounter},
    };

    use crate::lane::verbs::COUNTERS;

    #[derive(Debug)]
    pub(super) struct Stages;

    impl Collector for Stages {
        fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
            let help = "Stopped verbs reads (drain) and failed rails, by the teardown stage that made them quiet";
            let mut ends = encoder.encode_descriptor("verbs_teardowns", help, None, MetricType::Counter)?;
            for (stage, n, _) in COUNTERS.stages() {
                ConstCounter::new(n).encode(ends.encode_family(&[("stage", stage)])?)?;
            }
            let help = "Seconds spent in each teardown stage";
            let mut times = encoder.encode_descriptor("verbs_teardown_seconds", help, None, MetricType::Counter)?;
            for (stage, _, time) in COUNTERS.stages() {
                if let Some(time) = time {
                    ConstCounter::new(time.as_secs_f64()).encode(times.encode_family(&[("stage", stage)])?)?;
                }
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvferry_proto::{GroupId, GroupOutcome, LaneKind, PositionSet, Times};

    #[test]
    fn gpu_metrics_are_there_without_a_gpu() {
        let mut registry = Registry::default();
        GpuMetrics.register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "kvferry_gpu_landed_bytes_total{landing=\"direct\"}",
            "kvferry_gpu_landed_bytes_total{landing=\"ring\"}",
            "kvferry_gpu_landed_bytes_total{landing=\"ipc\"}",
            "kvferry_gpu_jobs_total{direction=\"to_gpu\"}",
            "kvferry_gpu_jobs_failed_total{direction=\"to_host\"}",
            "kvferry_gpu_job_queue_seconds_total{direction=\"between\"}",
            "kvferry_gpu_job_copy_seconds_total{direction=\"to_gpu\"}",
            "kvferry_gpu_unusable ",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
    }

    #[test]
    fn an_ended_pull_is_counted_once_by_block_and_cause() {
        let m = ConsumerMetrics::default();
        let set = |r: std::ops::Range<u32>| r.collect::<PositionSet>();
        m.ended(&Outcome {
            groups: vec![GroupOutcome {
                group: GroupId(0),
                loaded: set(0..6),
                invalid: set(6..10),
                causes: vec![(kvferry_proto::Cause::PeerDown, set(6..10))],
            }],
            bytes: 6 * 4096,
            lanes: vec![LaneKind::Local, LaneKind::Tcp],
            retries: 1,
            times: Times::default(),
        });
        let mut registry = Registry::default();
        m.register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "kvferry_pulls_total{result=\"partial\"} 1",
            "kvferry_blocks_loaded_total 6",
            "kvferry_blocks_invalid_total{cause=\"peer_down\"} 4",
            "kvferry_bytes_loaded_total{lane=\"tcp\"} 24576",
            "kvferry_pull_retries_total 1",
            #[cfg(feature = "verbs")]
            "kvferry_verbs_teardowns_total{stage=\"wedged\"}",
            #[cfg(feature = "verbs")]
            "kvferry_verbs_teardown_seconds_total{stage=\"destroy\"}",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
    }
}
