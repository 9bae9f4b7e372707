//! The settings that an operator may change. All others keep the library's defaults.

use std::path::PathBuf;

use kvferry::{Config, CopyMethod, LaneKind, OnWedge, TlsConfig};
use pyo3::{exceptions::PyValueError, prelude::*};

use crate::{
    handle::seconds,
    pool::{self, value_error},
};

/// `(certificate, key, authority, server name)`, the first three paths of PEM files.
type PyTls = (PathBuf, PathBuf, PathBuf, String);

/// Settings of a producer and a consumer. Times are in seconds.
#[pyclass(frozen, module = "kvferry._native")]
pub struct Settings {
    pub config: Config,
    pub lanes: Vec<LaneKind>,
}

#[pymethods]
impl Settings {
    #[new]
    #[pyo3(signature = (*, lanes = None, deadline = None, unclaimed_lease = None, claim_lease = None, hard_cap = None,
        early_grace = None, chunk_min = None, chunk_max = None, tcp_connections = None, on_wedge = None, fault = None,
        tls = None, seal_keys = Vec::new(), patience = None, dial = Vec::new(), engines = Vec::new(), tcp_checksum = false,
        gpu_copy = None, gpu_ring = None, queued = None, stalled = None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        lanes: Option<Vec<String>>,
        deadline: Option<f64>,
        unclaimed_lease: Option<f64>,
        claim_lease: Option<f64>,
        hard_cap: Option<f64>,
        early_grace: Option<f64>,
        chunk_min: Option<u64>,
        chunk_max: Option<u64>,
        tcp_connections: Option<usize>,
        on_wedge: Option<&str>,
        fault: Option<&str>,
        tls: Option<PyTls>,
        seal_keys: Vec<Vec<u8>>,
        patience: Option<f64>,
        dial: Vec<String>,
        engines: Vec<String>,
        tcp_checksum: bool,
        gpu_copy: Option<&str>,
        gpu_ring: Option<u64>,
        queued: Option<f64>,
        stalled: Option<f64>,
    ) -> PyResult<Self> {
        let mut config = Config::default();
        let times = [
            (deadline, &mut config.pull.deadline),
            (unclaimed_lease, &mut config.lease.unclaimed),
            (claim_lease, &mut config.lease.claimed),
            (hard_cap, &mut config.lease.hard_cap),
            (early_grace, &mut config.lease.early_grace),
            (patience, &mut config.pull.patience),
            (queued, &mut config.pull.queued),
            (stalled, &mut config.pull.stalled),
        ];
        for (given, to) in times {
            if let Some(s) = given {
                *to = seconds(s)?;
            }
        }
        // A producer keeps the claims that wait for an offer at least as long as its consumers wait.
        config.lease.awaited = config.lease.awaited.max(config.pull.queued);
        // A retry may come as late as an unclaimed lease lasts. Until then it must still hear why its offer ended.
        config.lease.tombstone = config.lease.tombstone.max(config.lease.unclaimed);
        if let Some(bytes) = chunk_min {
            config.pull.chunk.min_bytes = bytes;
        }
        if let Some(bytes) = chunk_max {
            config.pull.chunk.max_bytes = bytes;
        }
        if let Some(n) = tcp_connections {
            config.tcp.connections = n;
        }
        config.tcp.checksum = tcp_checksum;
        config.gpu.copy = match gpu_copy {
            None | Some("auto") => CopyMethod::Auto,
            Some("copies") => CopyMethod::Copies,
            Some("batch") => CopyMethod::Batch,
            Some("kernel") => CopyMethod::Kernel,
            Some(other) => {
                return Err(PyValueError::new_err(format!(
                    "unknown gpu_copy {other:?}: use auto, copies, batch or kernel"
                )));
            }
        };
        if let Some(bytes) = gpu_ring {
            config.gpu.ring = bytes;
        }
        config.pull.on_wedge = match on_wedge {
            None | Some("withhold") => OnWedge::Withhold,
            Some("exit") => OnWedge::Exit,
            Some(other) => {
                return Err(PyValueError::new_err(format!("unknown on_wedge {other:?}: use withhold or exit")));
            }
        };
        if let Some(fault) = fault {
            config.pull.faults = Some(fault.parse().map_err(value_error)?);
        }
        if let Some((certificate, key, ca, server_name)) = tls {
            let mut tls = TlsConfig::default();
            // As files: they are read again when they change.
            (tls.certificate_file, tls.key_file, tls.ca_file) = (Some(certificate), Some(key), Some(ca));
            tls.server_name = server_name;
            config.tls = Some(tls);
        }
        config.names.seal_keys = pool::seal_keys(seal_keys)?;
        config.dial = dial;
        config.engines = engines.iter().map(|e| e.parse().map_err(value_error)).collect::<PyResult<_>>()?;
        let lanes = match lanes {
            Some(names) => names.iter().map(|n| lane(n)).collect::<PyResult<Vec<_>>>()?,
            None => config.pull.lanes.clone(),
        };
        config.pull.lanes.clone_from(&lanes);
        config.check().map_err(value_error)?;
        Ok(Self { config, lanes })
    }

    /// The allowed lanes, best first, each with the reason why it cannot work on this host, if there is one.
    fn lanes(&self, py: Python<'_>) -> Vec<(&'static str, Option<String>)> {
        py.detach(|| self.lanes.iter().map(|&kind| (kind.as_str(), self.reason(kind))).collect())
    }
}

impl Settings {
    fn reason(&self, kind: LaneKind) -> Option<String> {
        match kind {
            #[cfg(feature = "verbs")]
            LaneKind::Verbs => kvferry::verbs::check(&self.config.verbs).err().map(|e| e.to_string()),
            #[cfg(not(feature = "verbs"))]
            LaneKind::Verbs => Some("not in this build".into()),
            _ => None,
        }
    }
}

fn lane(name: &str) -> PyResult<LaneKind> {
    [LaneKind::Verbs, LaneKind::Local, LaneKind::Tcp]
        .into_iter()
        .find(|k| k.as_str() == name)
        .ok_or_else(|| PyValueError::new_err(format!("unknown lane {name:?}: use verbs, local or tcp")))
}
