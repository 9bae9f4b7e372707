//! What the metrics of GPU memory tell.

use kvferry::{Ready, metrics::GpuMetrics};
use prometheus_client::{encoding::text::encode, registry::Registry};

use crate::{
    alone::{alone, on_standin},
    pair::{BYTES, Pair, on_gpu, on_host, pull, wait_until},
};

/// The value of a metric, by its name with labels.
pub(crate) fn value(of: &str) -> f64 {
    let (mut registry, mut text) = (Registry::default(), String::new());
    GpuMetrics.register(&mut registry);
    encode(&mut text, &registry).unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix("kvferry_gpu_")?.strip_prefix(of));
    line.unwrap_or_else(|| panic!("{of} is missing in\n{text}")).trim().parse().unwrap()
}

#[test]
fn bytes_jobs_and_their_times_are_counted_where_they_happen() {
    let standin = on_standin!("metrics::bytes_jobs_and_their_times_are_counted_where_they_happen");
    let pair = Pair::new(on_host(), on_gpu());
    pair.fill(1);
    let landed = |landing: &str| value(&format!("landed_bytes_total{{landing=\"{landing}\"}}"));
    let jobs = |name: &str| value(&format!("{name}_total{{direction=\"to_gpu\"}}"));
    assert_eq!((landed("ring"), jobs("jobs"), value("unusable")), (0.0, 0.0, 0.0));
    // Each of a chunk's copies waits at least this long for its start, so no job is shorter.
    const DELAY: std::time::Duration = std::time::Duration::from_millis(2);
    standin.set_delay(DELAY);
    pair.consumer.pull(pull(&pair.offer(Ready::Now))).unwrap();
    assert!(pair.ended().outcome.complete());
    standin.set_delay(std::time::Duration::ZERO);
    assert_eq!((landed("ring"), landed("direct"), landed("ipc")), (BYTES as f64, 0.0, 0.0));
    let ended = jobs("jobs");
    assert!(ended >= 1.0 && jobs("jobs_failed") == 0.0, "{ended}");
    assert!(jobs("job_copy_seconds") >= ended * DELAY.as_secs_f64(), "{}", jobs("job_copy_seconds"));
    assert!(jobs("job_queue_seconds") > 0.0);
    // Reading the pool back is a job too, in the other direction, and lands nothing.
    assert!(pair.arrived(1));
    assert!(value("jobs_total{direction=\"to_host\"}") >= 1.0);
    assert_eq!(landed("ring"), BYTES as f64);
}

#[test]
fn failed_jobs_and_unusable_gpus_are_counted() {
    let standin = on_standin!("metrics::failed_jobs_and_unusable_gpus_are_counted");
    const ILLEGAL_ADDRESS: i32 = 700;
    let pair = Pair::new(on_host(), on_gpu());
    pair.fill(2);
    standin.raise(0, ILLEGAL_ADDRESS, 0);
    pair.consumer.pull(pull(&pair.offer(Ready::Now))).unwrap();
    assert!(!pair.ended().outcome.complete());
    wait_until("the GPU counts as unusable", || value("unusable") == 1.0);
    assert!(value("jobs_failed_total{direction=\"to_gpu\"}") >= 1.0);
    assert_eq!(value("landed_bytes_total{landing=\"ring\"}"), 0.0);
}
