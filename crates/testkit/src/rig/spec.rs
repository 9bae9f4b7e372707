//! Settings that both sides of a test share.

use std::{path::PathBuf, time::Duration};

use kvferry::{Model, PoolLayout, TlsConfig};
use serde::{Deserialize, Serialize};

/// Longest time that a test waits for an event. A loaded machine is slow, but not broken.
pub const SOON: Duration = Duration::from_secs(20);

/// The model of all tests: blocks of 16 tokens, whose bytes have no meaning.
pub fn model(name: &str, dtype: &str) -> Model {
    Model {
        name: name.into(),
        dtype: dtype.into(),
        scales: String::new(),
        weights: String::new(),
        attention: "HND".into(),
        block_tokens: 16,
    }
}

/// Environment variables that make tests of the TCP lane use verbs instead: the rails of the consumers and of the
/// producers. tests/vm/run sets them in the virtual machine.
pub(super) const READER_RAILS: &str = "KVFERRY_TEST_READER_RAILS";
const SERVED_RAILS: &str = "KVFERRY_TEST_SERVED_RAILS";

/// Environment variable that gives tests certificates: a folder with `certificate`, `key` and `ca`.
pub const TLS: &str = "KVFERRY_TEST_TLS";
/// The server name in these certificates.
pub const TLS_NAME: &str = "test.kvferry";

/// The certificates of both sides, if there are any.
pub(super) fn tls() -> Option<TlsConfig> {
    let folder = PathBuf::from(std::env::var_os(TLS)?);
    let mut tls = TlsConfig::default();
    tls.certificate_file = Some(folder.join("certificate"));
    tls.key_file = Some(folder.join("key"));
    tls.ca_file = Some(folder.join("ca"));
    tls.server_name = TLS_NAME.into();
    Some(tls)
}

/// Environment variable that puts the pools of tests into GPU memory: `gpu` those of both sides, `gpu-to-host` and
/// `host-to-gpu` one of them.
const MEMORY: &str = "KVFERRY_TEST_MEMORY";

/// Whether the pools of producers, and those of consumers, are GPU memory.
pub(super) fn on_gpu() -> (bool, bool) {
    match std::env::var(MEMORY).as_deref() {
        Ok("gpu") => (true, true),
        Ok("gpu-to-host") => (true, false),
        Ok("host-to-gpu") => (false, true),
        Ok(other) => panic!("{MEMORY} is {other:?}: it must be gpu, gpu-to-host or host-to-gpu"),
        Err(_) => (false, false),
    }
}

pub(super) fn rails(of: &str) -> Vec<String> {
    std::env::var(of).map(|v| v.split(',').map(String::from).collect()).unwrap_or_default()
}

/// Settings of a producer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Spec {
    pub listen: String,
    pub engine: String,
    pub model: String,
    pub dtype: String,
    pub blocks: u32,
    pub regions: u32,
    pub block_size: u64,
    pub engine_memory: bool,
    pub local: bool,
    pub tcp: bool,
    /// Checksum the data of tcp lanes.
    pub checksum: bool,
    /// Rails for verbs. Without any, it does not serve verbs.
    pub rails: Vec<String>,
    pub unclaimed_ms: u64,
    pub claimed_ms: u64,
    pub hard_cap_ms: u64,
    pub early_grace_ms: u64,
    /// A key to seal names with.
    pub seal: Option<String>,
    /// Most sessions of one peer; `None`: the default.
    pub sessions_per_peer: Option<usize>,
    /// The producer's pool is GPU memory.
    pub gpu: bool,
    /// Longest time of an idle step of the producer's engine.
    pub step_ms: u64,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:0".into(),
            engine: "prefill".into(),
            model: "m".into(),
            dtype: "uint8".into(),
            blocks: 256,
            regions: 4,
            block_size: 16 << 10,
            engine_memory: false,
            local: true,
            tcp: true,
            checksum: false,
            rails: rails(SERVED_RAILS),
            unclaimed_ms: 30_000,
            claimed_ms: 10_000,
            hard_cap_ms: 600_000,
            early_grace_ms: 2_000,
            seal: None,
            sessions_per_peer: None,
            step_ms: 1,
            gpu: on_gpu().0,
        }
    }
}

impl Spec {
    pub fn layout(&self) -> PoolLayout {
        PoolLayout::uniform(self.blocks, self.regions, self.block_size, 16)
    }

    pub fn kv_model(&self) -> Model {
        model(&self.model, &self.dtype)
    }

    /// Bytes of one block over all regions.
    pub fn block_bytes(&self) -> u64 {
        u64::from(self.regions) * self.block_size
    }
}
