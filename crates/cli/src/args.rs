//! Flags that several commands share, and the parsers of their values.

use std::{path::PathBuf, time::Duration};

use kvferry::{LaneKind, Model, SealKey, TcpConfig, VerbsConfig};

use crate::{
    out::{self, say},
    report::Failure,
};

/// The lanes of a pull or a producer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LaneChoice {
    /// The best lane that works.
    Auto,
    /// TCP only.
    Tcp,
    /// Same host only.
    Local,
    /// RDMA READ only.
    Verbs,
}

impl LaneChoice {
    /// The lanes, best first.
    pub(crate) fn lanes(self) -> Vec<LaneKind> {
        match self {
            Self::Auto => kvferry::built_lanes().to_vec(),
            Self::Tcp => vec![LaneKind::Tcp],
            Self::Local => vec![LaneKind::Local],
            Self::Verbs => vec![LaneKind::Verbs],
        }
    }
}

/// Refuses verbs if this build has none.
fn built() -> Result<(), Failure> {
    match kvferry::built_lanes().contains(&LaneKind::Verbs) {
        true => Ok(()),
        false => Err(Failure::failed(
            "this build has no verbs: build with `--features verbs` (tests/vm/packages lists the packages that it needs)",
        )),
    }
}

/// The RDMA ports, and their settings.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct VerbsArgs {
    /// RDMA device, such as mlx5_0. The default is all devices with a port that is up.
    #[arg(long, value_name = "DEVICE", conflicts_with = "rails")]
    pub device: Option<String>,
    /// RDMA ports, each DEVICE or DEVICE:PORT. Reads are striped over them.
    #[arg(long, value_name = "RAIL,…", value_delimiter = ',')]
    pub rails: Vec<String>,
    /// Index of the GID on each port. By default it is chosen by type and scope.
    #[arg(long, value_name = "INDEX")]
    pub gid_index: Option<u8>,
    /// Queue pairs for each peer and rail.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=4))]
    pub queue_pairs: Option<u8>,
    /// Most bytes in flight on a rail.
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub window: Option<u64>,
    /// Most bytes of one READ. Longer reads are split.
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub max_read: Option<u64>,
    /// Transport timeout of queue pairs: 4.096 us * 2^CODE for an answer.
    #[arg(long, value_name = "CODE", value_parser = clap::value_parser!(u8).range(1..=20))]
    pub qp_timeout: Option<u8>,
}

impl VerbsArgs {
    /// If the lane or any of these flags selects verbs, checks that this build and this machine have them. `serve`
    /// accepts a link that is down, since it may come up later.
    pub(crate) fn check(&self, lane: LaneChoice, serves: bool) -> Result<(), Failure> {
        if lane != LaneChoice::Verbs && self.config() == VerbsConfig::default() {
            return Ok(());
        }
        built()?;
        #[cfg(feature = "verbs")]
        {
            use kvferry::verbs::{self, VerbsError};
            match verbs::check(&self.config()) {
                Err(VerbsError::PortDown { .. }) if serves => Ok(()),
                checked => checked.map_err(|e| Failure::failed(e.to_string())),
            }
        }
        #[cfg(not(feature = "verbs"))]
        {
            let _ = serves;
            Ok(())
        }
    }

    /// The configuration that these flags describe.
    pub(crate) fn config(&self) -> VerbsConfig {
        let mut c = VerbsConfig::default();
        c.rails = self.device.iter().chain(&self.rails).cloned().collect();
        c.gid_index = self.gid_index;
        c.queue_pairs = self.queue_pairs.map_or(c.queue_pairs, usize::from);
        c.window = self.window.unwrap_or(c.window);
        c.max_read = self.max_read.map_or(c.max_read, |n| u32::try_from(n).unwrap_or(u32::MAX));
        c.timeout = self.qp_timeout.unwrap_or(c.timeout);
        c
    }

    /// The rails of a producer on this machine: `rails`, or this side's own rails if there are none.
    pub(crate) fn served(&self, rails: &[String]) -> Vec<String> {
        if rails.is_empty() { self.config().rails } else { rails.to_vec() }
    }

    /// The flags of `serve` for these rails.
    pub(crate) fn serve_flags(&self, rails: &[String]) -> Vec<String> {
        let (rails, mut flags) = (self.served(rails), Vec::new());
        if !rails.is_empty() {
            flags.extend(["--rails".to_owned(), rails.join(",")]);
        }
        if let Some(index) = self.gid_index {
            flags.extend(["--gid-index".to_owned(), index.to_string()]);
        }
        flags
    }
}

/// The settings of the TCP lane.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct TcpArgs {
    /// Checksum the data of the tcp lane, if the other side does too. A chunk that was changed on its way is read again.
    #[arg(long)]
    pub checksum: bool,
}

impl TcpArgs {
    /// The configuration that these flags describe.
    pub(crate) fn config(&self) -> TcpConfig {
        let mut c = TcpConfig::default();
        c.checksum = self.checksum;
        c
    }

    /// The flags of `serve`.
    pub(crate) fn serve_flags(&self) -> Vec<String> {
        self.checksum.then(|| "--checksum".to_owned()).into_iter().collect()
    }
}

/// Keys that both sides share to seal offers.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct SealArgs {
    /// File with a seal key, 32 bytes or more, the same on both sides. Offers are sealed with the first key, and only offers
    /// that one of the keys has sealed are pulled.
    #[arg(long, value_name = "FILE,…", value_delimiter = ',')]
    seal_key: Vec<PathBuf>,
}

impl SealArgs {
    /// The keys in the files.
    pub(crate) fn keys(&self) -> Result<Vec<SealKey>, Failure> {
        let key = |path: &PathBuf| {
            let bad = |why: String| Failure::usage(format!("--seal-key {}: {why}", path.display()));
            SealKey::new(&std::fs::read(path).map_err(|e| bad(e.to_string()))?).map_err(bad)
        };
        self.seal_key.iter().map(key).collect()
    }
}

/// The model. Both sides must have the same one.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ModelArgs {
    /// Model name or hash of the weights; must be the same on both sides.
    #[arg(long, default_value = "pattern")]
    pub model: String,
    /// Data type of the cache; must be the same on both sides.
    #[arg(long, default_value = "uint8")]
    pub dtype: String,
    /// Tokens per block; must be the same on both sides.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    pub block_tokens: u32,
}

impl Default for ModelArgs {
    fn default() -> Self {
        Self { model: "pattern".into(), dtype: "uint8".into(), block_tokens: 16 }
    }
}

impl ModelArgs {
    /// The model that these flags describe.
    pub(crate) fn model(&self) -> Model {
        Model {
            name: self.model.clone(),
            dtype: self.dtype.clone(),
            scales: String::new(),
            weights: String::new(),
            attention: "pattern".into(),
            block_tokens: self.block_tokens,
        }
    }
}

/// A positive duration, such as `250ms`, `5s` or `2m`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let parsed = humantime::parse_duration(text).ok().filter(|d| !d.is_zero());
    parsed.ok_or_else(|| "not a positive duration: write 250ms, 5s or 2m".into())
}

/// A positive number of bytes, such as `4096`, `64K` or `2GiB`.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    match kvferry::parse_bytes(text) {
        Ok(0) => Err("the size must be positive: write one such as 65536, 64K or 1M".into()),
        parsed => parsed.map_err(|e| e.to_string()),
    }
}

/// The address of a producer.
pub(crate) fn address(text: &str) -> Result<String, String> {
    kvferry::check_address(text).map(|()| text.into()).map_err(|e| e.to_string())
}

/// An address for offers: port 0 stands for the port that is listened on.
pub(crate) fn advertised(text: &str) -> Result<String, String> {
    address(&text.strip_suffix(":0").map_or(text.into(), |host| format!("{host}:1"))).map(|_| text.into())
}

/// This program, to start it again. Without /proc it is the name under which it was started.
pub(crate) fn program() -> PathBuf {
    std::env::current_exe().unwrap_or_else(|_| std::env::args_os().next().unwrap_or_default().into())
}

/// Bytes of memory that are available; `None`: unknown.
pub(crate) fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib << 10)
}

/// Refuses a pool that does not fit into memory: otherwise the kernel would kill a process.
pub(crate) fn check_memory(bytes: u64) -> Result<(), Failure> {
    match available_memory() {
        Some(has) if bytes > has => Err(Failure::failed(format!(
            "a pool of {bytes} bytes does not fit: {has} bytes of memory are available; ask for fewer blocks or regions"
        ))),
        _ => Ok(()),
    }
}

/// `--json`: prints to standard output, or writes a file.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct JsonArg {
    /// Print JSON instead of text. With FILE, print text and write the JSON to FILE.
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    pub json: Option<Option<PathBuf>>,
}

impl JsonArg {
    /// Whether the command prints text.
    pub(crate) fn text(&self) -> bool {
        !matches!(self.json, Some(None))
    }

    /// Fails if the file cannot be written.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        self.file().map_or(Ok(()), |path| out::check_file(path))
    }

    /// The file to write.
    pub(crate) fn file(&self) -> Option<&PathBuf> {
        self.json.as_ref()?.as_ref()
    }

    /// Writes a record as `--json` says.
    pub(crate) fn write(&self, record: &impl serde::Serialize) -> Result<(), Failure> {
        let Some(to) = &self.json else { return Ok(()) };
        let text = serde_json::to_string(record).map_err(|e| Failure::failed(e.to_string()))?;
        match to {
            None => say!("{text}"),
            Some(path) => out::write_file(path, &(text + "\n"))?,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_sizes_are_parsed_or_refused() {
        for (text, ms) in [("5s", 5_000), ("250ms", 250), ("2m", 120_000), ("10m", 600_000), ("1m 30s", 90_000)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)));
        }
        for bad in ["", "5", "s", "-1s", "0s", "1e400s", "5 parsecs", "nans"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        for (text, n) in [("4096", 4096), ("64K", 65536), ("1m", 1 << 20), ("2GiB", 2 << 30), ("3tb", 3 << 40)] {
            assert_eq!(bytes(text), Ok(n));
        }
        for bad in ["", "0", "0K", "-1", "+1", "1X", "K", "1.5K", "64Kbib", "99999999999T"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_advertised_address_may_leave_the_port_open() {
        for good in ["prefill-0:0", "10.0.0.1:7400", "[fd00::1]:0"] {
            assert_eq!(advertised(good).as_deref(), Ok(good));
        }
        for bad in ["foo", "a@host:1", "a@host:0", "fe80::1%eth0", "[fe80::1]:0", "0.0.0.0:0", "host:00"] {
            assert!(advertised(bad).is_err(), "{bad}");
        }
        assert!(address("prefill-0:0").is_err());
    }
}
