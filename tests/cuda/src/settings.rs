//! The environment variable `KVFERRY_STANDIN`: a list of `key=value`, separated by commas, read once.
//!
//! | key | default | |
//! | --- | --- | --- |
//! | `devices` | 1 | number of devices, up to 16 |
//! | `memory` | 4G | memory of each device |
//! | `dir` | private | folder of the device memory; processes that share it share the devices |
//! | `delay` | 0 | a stream operation starts at least this long after its submission and after the one before it |
//! | `version` | 12080 | driver version |
//! | `kernel`, `batch`, `ipc` | yes | `no`: modules, batched copies or legacy IPC are missing |
//! | `ordering` | 100 | the attribute `GPU_DIRECT_RDMA_WRITES_ORDERING` |
//! | `flush` | 1 | the host bit of `GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS` |
//! | `dmabuf` | 0 | the attribute `DMA_BUF_SUPPORTED` |
//! | `stub` | no | `yes`: `cuInit` fails as in the toolkit's stub library |
//! | `nodevice` | no | `yes`: `cuInit` finds no device |
//! | `hang_after` | never | no data operation starts after this many |
//! | `sticky_after` | never | after this many data operations of a device its context fails |
//! | `sticky` | 700 | the error of `sticky_after` |
//! | `oom_after` | never | allocations fail once this process has allocated this many bytes, freed or not |
//!
//! A data operation is a copy, a batch of copies, a memset or a kernel launch.

use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) devices: i32,
    pub(crate) memory: u64,
    pub(crate) dir: Option<PathBuf>,
    pub(crate) delay: Duration,
    pub(crate) version: i32,
    pub(crate) kernel: bool,
    pub(crate) batch: bool,
    pub(crate) ipc: bool,
    pub(crate) ordering: i32,
    pub(crate) flush: bool,
    pub(crate) dmabuf: bool,
    pub(crate) stub: bool,
    pub(crate) nodevice: bool,
    pub(crate) hang_after: Option<u64>,
    pub(crate) sticky_after: Option<u64>,
    pub(crate) sticky: i32,
    pub(crate) oom_after: Option<u64>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            devices: 1,
            memory: 4 << 30,
            dir: None,
            delay: Duration::ZERO,
            version: 12080,
            kernel: true,
            batch: true,
            ipc: true,
            ordering: 100,
            flush: true,
            dmabuf: false,
            stub: false,
            nodevice: false,
            hang_after: None,
            sticky_after: None,
            sticky: 700,
            oom_after: None,
        }
    }
}

static SETTINGS: LazyLock<Result<Settings, String>> =
    LazyLock::new(|| parse(&std::env::var("KVFERRY_STANDIN").unwrap_or_default()));

/// The settings of this process. Invalid ones make `cuInit` fail, and the control functions see the defaults.
pub(crate) fn settings() -> &'static Result<Settings, String> {
    &SETTINGS
}

fn parse(text: &str) -> Result<Settings, String> {
    let mut s = Settings::default();
    for item in text.split(',').filter(|item| !item.is_empty()) {
        let (key, value) = item.split_once('=').ok_or_else(|| format!("{item}: not key=value"))?;
        let bad = |expected: &str| format!("{item}: expected {expected}");
        let number = || value.parse::<u64>().map_err(|_| bad("a number"));
        let small = || value.parse::<i32>().map_err(|_| bad("a number"));
        let switch = || match value {
            "yes" | "1" => Ok(true),
            "no" | "0" => Ok(false),
            _ => Err(bad("yes or no")),
        };
        match key {
            "devices" => s.devices = small().ok().filter(|n| (0..=16).contains(n)).ok_or(bad("0 to 16"))?,
            "memory" => s.memory = size(value).ok_or(bad("a size, such as 1G"))?,
            "dir" => s.dir = Some(PathBuf::from(value)),
            "delay" => s.delay = duration(value).ok_or(bad("a duration, such as 100us"))?,
            "version" => s.version = small()?,
            "kernel" => s.kernel = switch()?,
            "batch" => s.batch = switch()?,
            "ipc" => s.ipc = switch()?,
            "ordering" => s.ordering = small()?,
            "flush" => s.flush = switch()?,
            "dmabuf" => s.dmabuf = switch()?,
            "stub" => s.stub = switch()?,
            "nodevice" => s.nodevice = switch()?,
            "hang_after" => s.hang_after = Some(number()?),
            "sticky_after" => s.sticky_after = Some(number()?),
            "sticky" => s.sticky = small()?,
            "oom_after" => s.oom_after = Some(size(value).ok_or(bad("a size, such as 64M"))?),
            _ => return Err(format!("{key}: unknown key")),
        }
    }
    Ok(s)
}

fn size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 10),
        b'M' => (&text[..text.len() - 1], 20),
        b'G' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn duration(text: &str) -> Option<Duration> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let n = digits.parse::<u64>().ok()?;
    match &text[digits.len()..] {
        "ns" => Some(Duration::from_nanos(n)),
        "us" => Some(Duration::from_micros(n)),
        "ms" => Some(Duration::from_millis(n)),
        "s" => Some(Duration::from_secs(n)),
        "" if n == 0 => Some(Duration::ZERO),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_from_a_list() {
        let s = parse("devices=2,memory=64M,delay=100us,kernel=no,dmabuf=1,hang_after=3").unwrap();
        assert_eq!((s.devices, s.memory, s.kernel, s.dmabuf), (2, 64 << 20, false, true));
        assert_eq!((s.delay, s.hang_after), (Duration::from_micros(100), Some(3)));
        assert_eq!(parse("").unwrap().memory, 4 << 30);
    }

    #[test]
    fn an_unknown_key_or_a_bad_value_is_an_error() {
        for text in ["color=blue", "devices", "delay=5", "memory=1X", "kernel=maybe", "devices=17"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
