//! Where a side's pool lies: the flag `--memory`, the pool's allocation, and its description in the JSON.

use std::str::FromStr;

use kvferry::{CopyMethod, GpuConfig, GpuError, Memory, Place, PoolLayout, survey_gpus};
use serde::Serialize;

use crate::{args, report::Failure};

/// The value of `--memory`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum PoolPlace {
    /// Host memory.
    #[default]
    Host,
    /// The GPU with this number.
    Gpu(u32),
}

impl FromStr for PoolPlace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = match text {
            "host" => return Ok(Self::Host),
            "gpu" => Some(0),
            _ => {
                text.strip_prefix("gpu:").filter(|n| n.bytes().all(|b| b.is_ascii_digit())).and_then(|n| n.parse().ok())
            }
        };
        number
            .map(Self::Gpu)
            .ok_or_else(|| "not a place of memory: write host, gpu, or gpu:N with a GPU's number".into())
    }
}

impl std::fmt::Display for PoolPlace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Host => f.write_str("host"),
            Self::Gpu(n) => write!(f, "gpu:{n}"),
        }
    }
}

impl PoolPlace {
    /// Checks that the driver and the GPU exist. For the place of a producer on this machine too, before it is started.
    pub(crate) fn check(self) -> Result<(), Failure> {
        let Self::Gpu(ordinal) = self else { return Ok(()) };
        let unusable = |why: String| Failure::failed(format!("--memory {self}: {why}"));
        let gpus = survey_gpus().map_err(|e| unusable(e.to_string()))?;
        match gpus.iter().any(|g| g.ordinal == ordinal) {
            true => Ok(()),
            false => Err(unusable(GpuError::NoSuchDevice { ordinal, devices: gpus.len() as u32 }.to_string())),
        }
    }

    /// Allocates the pool of a layout, with every page of host memory backed. `engine`: anonymous memory, like an engine's own.
    pub(crate) fn allocate(self, layout: &PoolLayout, engine: bool) -> Result<Memory, Failure> {
        let memory = match self {
            Self::Gpu(_) if engine => {
                return Err(Failure::usage(format!(
                    "--engine-memory is host memory: leave it out with --memory {self}"
                )));
            }
            Self::Gpu(ordinal) => {
                let failed = |e| Failure::failed(format!("--memory {self}: {e}"));
                Memory::alloc_gpu(ordinal, &layout.segments).map_err(failed)?
            }
            Self::Host if engine => Memory::anonymous(&layout.segments)?,
            Self::Host => Memory::alloc(&layout.segments)?,
        };
        memory.touch()?;
        Ok(memory)
    }

    /// Refuses pools that do not fit into host memory, each of `bytes` bytes; GPU memory is checked when it is allocated.
    pub(crate) fn check_sizes(pools: &[Self], bytes: u64) -> Result<(), Failure> {
        let hosts = pools.iter().filter(|p| **p == Self::Host).count() as u64;
        args::check_memory(bytes.saturating_mul(hosts))
    }
}

/// How ranges are copied between GPU memory and the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum GpuCopy {
    /// By their length.
    Auto,
    /// One copy for each range.
    Copies,
    /// One batch for all ranges.
    Batch,
    /// A kernel, also for long ranges.
    Kernel,
}

impl GpuCopy {
    fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Copies => "copies",
            Self::Batch => "batch",
            Self::Kernel => "kernel",
        }
    }
}

/// The pool of this side.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct PoolArgs {
    /// Where the pool lies: host, gpu, or gpu:N for the GPU with the number N.
    #[arg(long, value_name = "PLACE", default_value_t = PoolPlace::Host)]
    pub memory: PoolPlace,
    /// How ranges of GPU memory are copied. The default is auto: by their length.
    #[arg(long, value_enum)]
    pub gpu_copy: Option<GpuCopy>,
}

impl PoolArgs {
    /// The configuration that these flags describe.
    pub(crate) fn config(&self) -> GpuConfig {
        let mut c = GpuConfig::default();
        c.copy = match self.gpu_copy {
            None | Some(GpuCopy::Auto) => CopyMethod::Auto,
            Some(GpuCopy::Copies) => CopyMethod::Copies,
            Some(GpuCopy::Batch) => CopyMethod::Batch,
            Some(GpuCopy::Kernel) => CopyMethod::Kernel,
        };
        c
    }

    /// The place of the pool of a producer on this machine: `serve`, or this side's own place.
    pub(crate) fn served(&self, serve: Option<PoolPlace>) -> PoolPlace {
        serve.unwrap_or(self.memory)
    }

    /// The flags of `serve` for a pool there.
    pub(crate) fn serve_flags(&self, serve: Option<PoolPlace>) -> Vec<String> {
        let mut flags = vec!["--memory".to_owned(), self.served(serve).to_string()];
        if let Some(copy) = self.gpu_copy {
            flags.extend(["--gpu-copy".to_owned(), copy.name().to_owned()]);
        }
        flags
    }
}

/// The place of a pool, in JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct MemoryRecord {
    /// `host` or `gpu`.
    pub place: String,
    /// The GPU's name; `null` for host memory.
    pub name: Option<String>,
    /// The GPU's UUID, as `nvidia-smi -L` prints it; `null` for host memory.
    pub uuid: Option<String>,
}

impl From<&Memory> for MemoryRecord {
    fn from(memory: &Memory) -> Self {
        match (memory.place(), memory.gpu_info()) {
            (Place::Gpu { .. }, Some(gpu)) => {
                Self { place: "gpu".into(), name: Some(gpu.name.clone()), uuid: Some(gpu.uuid_text()) }
            }
            _ => Self { place: "host".into(), name: None, uuid: None },
        }
    }
}

impl MemoryRecord {
    /// As text: `host memory`, or the GPU's name.
    pub(crate) fn text(&self) -> String {
        self.name.clone().unwrap_or_else(|| format!("{} memory", self.place))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_become_settings_and_the_flags_of_a_producer() {
        let of = |memory, gpu_copy| PoolArgs { memory, gpu_copy };
        let own = of(PoolPlace::Gpu(2), Some(GpuCopy::Batch));
        assert_eq!(own.config().copy, CopyMethod::Batch);
        assert_eq!(own.serve_flags(None), ["--memory", "gpu:2", "--gpu-copy", "batch"]);
        assert_eq!(own.serve_flags(Some(PoolPlace::Host))[..2], ["--memory", "host"]);
        assert_eq!(of(PoolPlace::Host, None).serve_flags(None), ["--memory", "host"]);
        let methods =
            [GpuCopy::Auto, GpuCopy::Copies, GpuCopy::Kernel].map(|c| of(PoolPlace::Host, Some(c)).config().copy);
        assert_eq!(methods, [CopyMethod::Auto, CopyMethod::Copies, CopyMethod::Kernel]);
    }

    #[test]
    fn a_place_is_host_or_a_gpu_and_its_text_reads_back() {
        for (text, place) in [("host", PoolPlace::Host), ("gpu", PoolPlace::Gpu(0)), ("gpu:7", PoolPlace::Gpu(7))] {
            assert_eq!(text.parse(), Ok(place));
            assert_eq!(place.to_string().parse(), Ok(place));
        }
        for bad in ["", "GPU", "gpu:", "gpu:-1", "gpu:+1", "gpu: 1", "gpu:99999999999", "cuda:0", "disk"] {
            assert!(bad.parse::<PoolPlace>().is_err(), "{bad}");
        }
    }
}
