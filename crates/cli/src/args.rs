//! Flags that several commands share, and how their values are read.

use std::{path::PathBuf, time::Duration};

use kvferry::{LaneKind, Model, VerbsConfig};

use crate::report::Failure;

/// Which lanes may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LaneChoice {
    /// The best that works.
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

/// Refuses verbs where this build has none.
fn built() -> Result<(), Failure> {
    match kvferry::built_lanes().contains(&LaneKind::Verbs) {
        true => Ok(()),
        false => Err(Failure::failed(
            "this build has no verbs: build with `--features verbs` (see tests/vm/packages for what that takes)",
        )),
    }
}

/// Which RDMA ports are used, and how they are addressed.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct VerbsArgs {
    /// RDMA device to use, such as mlx5_0; by default all whose ports are up.
    #[arg(long, value_name = "DEVICE", conflicts_with = "rails")]
    pub device: Option<String>,
    /// RDMA ports to use, DEVICE or DEVICE:PORT each; reads are striped over them.
    #[arg(long, value_name = "RAIL,…", value_delimiter = ',')]
    pub rails: Vec<String>,
    /// Index of the GID to use on each port; by default chosen by type and reach.
    #[arg(long, value_name = "INDEX")]
    pub gid_index: Option<u8>,
    /// Queue pairs to a peer on each rail.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=4))]
    pub queue_pairs: Option<u8>,
    /// Bytes in flight on a rail.
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub window: Option<u64>,
    /// Longest READ; longer ones are cut.
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub max_read: Option<u64>,
    /// Transport timeout of queue pairs: an answer is waited for 4.096 us * 2^CODE.
    #[arg(long, value_name = "CODE", value_parser = clap::value_parser!(u8).range(1..=20))]
    pub qp_timeout: Option<u8>,
}

impl VerbsArgs {
    /// Where verbs are asked for, by the lane or by any of these flags: refuses what this build or this machine does not
    /// have. A link that is down is not refused to who serves: it may come up.
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

    /// The settings that they stand for.
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

    /// What a producer on this machine serves: `rails`, or the same as this side's where there are none.
    pub(crate) fn served(&self, rails: &[String]) -> Vec<String> {
        if rails.is_empty() { self.config().rails } else { rails.to_vec() }
    }

    /// The flags of `serve` for that.
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

/// What the bytes mean. Both sides must agree.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ModelArgs {
    /// Model name or weights hash; both sides must agree.
    #[arg(long, default_value = "pattern")]
    pub model: String,
    /// Data type of the cache; both sides must agree.
    #[arg(long, default_value = "uint8")]
    pub dtype: String,
    /// Tokens in a block; both sides must agree.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    pub block_tokens: u32,
}

impl Default for ModelArgs {
    fn default() -> Self {
        Self { model: "pattern".into(), dtype: "uint8".into(), block_tokens: 16 }
    }
}

impl ModelArgs {
    /// The model that they name.
    pub(crate) fn model(&self) -> Model {
        Model {
            name: self.model.clone(),
            dtype: self.dtype.clone(),
            scales: String::new(),
            attention: "pattern".into(),
            block_tokens: self.block_tokens,
        }
    }
}

/// A length of time: `5s`, `250ms`, `1.5m`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("{text:?} is no length of time: write 250ms, 5s or 2m");
    let split = text.find(|c: char| c.is_ascii_alphabetic()).ok_or_else(bad)?;
    let number: f64 = text[..split].trim().parse().map_err(|_| bad())?;
    let scale = match &text[split..] {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(bad()),
    };
    Duration::try_from_secs_f64(number * scale).ok().filter(|d| !d.is_zero()).ok_or_else(bad)
}

/// A number of bytes: `4096`, `64K`, `1M`, `2GiB`.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let bad = || format!("{text:?} is no number of bytes: write 65536, 64K, 1M or 2G");
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let number: u64 = text[..split].trim().parse().map_err(|_| bad())?;
    let shift = match text[split..].to_ascii_lowercase().trim_end_matches("ib").trim_end_matches('b') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(bad()),
    };
    number.checked_mul(1 << shift).filter(|n| *n > 0).ok_or_else(bad)
}

/// Refuses a pool that this machine cannot hold, before the kernel ends somebody for it.
pub(crate) fn check_memory(bytes: u64) -> Result<(), Failure> {
    let available = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib << 10)
    });
    match available {
        Some(has) if bytes > has => Err(Failure::failed(format!(
            "a pool of {bytes} bytes does not fit: {has} bytes of memory are available; ask for fewer blocks or regions"
        ))),
        _ => Ok(()),
    }
}

/// `--json`: to standard output, or to a file.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct JsonArg {
    /// Print JSON instead of text; with FILE, write it there beside the text.
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    pub json: Option<Option<PathBuf>>,
}

impl JsonArg {
    /// Whether text is for a person to read.
    pub(crate) fn text(&self) -> bool {
        !matches!(self.json, Some(None))
    }

    /// Writes a record where it was asked for, if it was.
    pub(crate) fn write(&self, record: &impl serde::Serialize) -> Result<(), Failure> {
        let Some(to) = &self.json else { return Ok(()) };
        let text = serde_json::to_string(record).map_err(|e| Failure::failed(e.to_string()))?;
        match to {
            None => println!("{text}"),
            Some(path) => std::fs::write(path, text + "\n").map_err(|e| {
                Failure::failed(format!("cannot write {}: {e}; name a file in a folder that exists", path.display()))
            })?,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time_and_bytes_are_read_or_refused_by_name() {
        assert_eq!(duration("5s"), Ok(Duration::from_secs(5)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("1.5m"), Ok(Duration::from_secs(90)));
        for bad in ["", "5", "s", "-1s", "0s", "1e400s", "5 parsecs", "nans"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        assert_eq!(bytes("64K"), Ok(65536));
        assert_eq!(bytes("2GiB"), Ok(2 << 30));
        assert_eq!(bytes("4096"), Ok(4096));
        for bad in ["", "0", "-1", "1X", "99999999999T"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }
}
