//! What an operator watches, as Prometheus metrics. Counters are counted when something is final, so none ever goes down.
//!
//! Register a consumer's or a producer's metrics in your own registry and serve it as you serve yours; kvferry opens no
//! port for it.

use kvferry_proto::{frame::Gone, outcome::Outcome};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

/// One label.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Cause {
    /// Why a block is invalid: see [`kvferry_proto::error::Cause`].
    cause: &'static str,
}

/// One label.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Lane {
    /// `local`, `tcp`, …
    lane: &'static str,
}

/// One label.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Result {
    /// `loaded`: all blocks; `partial`: some; `failed`: none.
    result: &'static str,
}

/// One label.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct End {
    /// Why an offer ended: `released`, `expired`, `revoked`, `hard_cap`.
    why: &'static str,
}

/// A consumer's metrics.
#[derive(Debug, Clone)]
pub struct ConsumerMetrics {
    pulls: Family<Result, Counter>,
    loaded: Counter,
    invalid: Family<Cause, Counter>,
    bytes: Family<Lane, Counter>,
    retries: Counter,
    decided: Histogram,
    ended: Histogram,
    pub(crate) running: Gauge,
    pub(crate) wedged: Gauge,
}

/// 100 µs to 30 s: from one small block inside a host to a long prompt over a slow wire.
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
        r.register_collector(Box::new(ladder::Rungs));
    }

    pub(crate) fn ended(&self, o: &Outcome) {
        let result = match (o.complete(), o.loaded()) {
            (true, _) => "loaded",
            (false, 0) => "failed",
            (false, _) => "partial",
        };
        self.pulls.get_or_create(&Result { result }).inc();
        self.loaded.inc_by(o.loaded());
        for (cause, set) in o.groups.iter().flat_map(|g| &g.causes) {
            self.invalid.get_or_create(&Cause { cause: cause.as_str() }).inc_by(set.len());
        }
        if let Some(lane) = o.lanes.last() {
            self.bytes.get_or_create(&Lane { lane: lane.as_str() }).inc_by(o.bytes);
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
    ends: Family<End, Counter>,
    pub(crate) live: Gauge,
    pub(crate) claims: Gauge,
    pub(crate) sessions: Gauge,
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
    }

    pub(crate) fn freed(&self, why: Gone) {
        let why = why.as_str();
        self.ends.get_or_create(&End { why }).inc();
    }
}

#[cfg(feature = "verbs")]
mod ladder {
    //! What became of verbs rails that failed: of this whole process.

    use prometheus_client::{
        collector::Collector,
        encoding::{DescriptorEncoder, EncodeMetric},
        metrics::{MetricType, counter::ConstCounter},
    };

    use crate::lane::verbs::COUNTERS;

    #[derive(Debug)]
    pub(super) struct Rungs;

    impl Collector for Rungs {
        fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
            let help = "Verbs reads that were stopped (drain) and rails that failed, by the rung of the ladder that made them quiet";
            let mut ends = encoder.encode_descriptor("verbs_rungs", help, None, MetricType::Counter)?;
            for (rung, n, _) in COUNTERS.rungs() {
                ConstCounter::new(n).encode(ends.encode_family(&[("rung", rung)])?)?;
            }
            let help = "Seconds that was stood on each rung of the ladder";
            let mut times = encoder.encode_descriptor("verbs_rung_seconds", help, None, MetricType::Counter)?;
            for (rung, _, time) in COUNTERS.rungs() {
                if let Some(time) = time {
                    ConstCounter::new(time.as_secs_f64()).encode(times.encode_family(&[("rung", rung)])?)?;
                }
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvferry_proto::{
        block::{GroupId, PositionSet},
        error,
        lane::LaneKind,
        outcome::{GroupOutcome, Times},
    };

    #[test]
    fn an_ended_pull_is_counted_once_by_block_and_cause() {
        let m = ConsumerMetrics::default();
        let set = |r: std::ops::Range<u32>| r.collect::<PositionSet>();
        m.ended(&Outcome {
            groups: vec![GroupOutcome {
                group: GroupId(0),
                loaded: set(0..6),
                invalid: set(6..10),
                causes: vec![(error::Cause::PeerDown, set(6..10))],
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
            "kvferry_verbs_rungs_total{rung=\"wedged\"}",
            #[cfg(feature = "verbs")]
            "kvferry_verbs_rung_seconds_total{rung=\"destroy\"}",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
    }
}
