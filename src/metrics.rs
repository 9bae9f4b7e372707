//! Prometheus metrics. A counter counts final results, so it never goes down.
//!
//! Register a consumer's or a producer's metrics in the engine's registry and serve it with the engine's own; kvferry opens
//! no port for it.

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
