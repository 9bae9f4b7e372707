//! Faults to inject into lanes, as text such as `down@64M`.

use std::{fmt, str::FromStr};

/// Faults to inject into lanes. Parsed from text such as `down@64M`, `throttle=200M`, `silent@10M,noquiet`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Faults {
    /// Bytes a second, at most.
    pub throttle: Option<u64>,
    /// The lane goes down after accepting this many bytes.
    pub down_at: Option<u64>,
    /// Completions stop after accepting this many bytes: reads in flight neither fail nor finish.
    pub silent_at: Option<u64>,
    /// Fences read a wrong word after accepting this many bytes.
    pub stale_at: Option<u64>,
    /// A stopped attempt becomes quiet only when the lane is killed.
    pub no_quiet: bool,
    /// Even a killed lane does not become quiet: it wedges.
    pub wedge: bool,
    /// The data thread panics after accepting this many bytes, as a bug would make it.
    pub panic_at: Option<u64>,
    /// Number of lanes that get faults, counted from the first; `None`: every lane.
    pub lanes: Option<u32>,
}

/// An unknown fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a fault: use throttle=BYTES, down@BYTES, silent@BYTES, stale@BYTES, panic@BYTES, noquiet, wedge, lanes=N"
)]
pub struct BadFault(String);

impl FromStr for Faults {
    type Err = BadFault;

    fn from_str(text: &str) -> Result<Self, BadFault> {
        let mut f = Self::default();
        for part in text.split(',').map(str::trim) {
            let bad = || BadFault(part.into());
            let (name, value) = part.split_once(['@', '=']).map_or((part, None), |(n, v)| (n, Some(v)));
            let number = || value.and_then(parse_bytes).ok_or_else(bad);
            match name {
                "throttle" => f.throttle = Some(number()?.max(1)),
                "down" => f.down_at = Some(number()?),
                "silent" => f.silent_at = Some(number()?),
                "stale" => f.stale_at = Some(number()?),
                "panic" => f.panic_at = Some(number()?),
                "lanes" => f.lanes = Some(u32::try_from(number()?).map_err(|_| bad())?),
                "noquiet" if value.is_none() => f.no_quiet = true,
                "wedge" if value.is_none() => (f.no_quiet, f.wedge) = (true, true),
                _ => return Err(bad()),
            }
        }
        Ok(f)
    }
}

/// A number of bytes: digits, then nothing or `K`, `M`, `G` or `T`, in either case, for powers of 1024. `B` or `iB` may
/// follow the letter. The one rule for sizes in faults and on the command line.
pub fn parse_bytes(text: &str) -> Option<u64> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers = [
            ("throttle=", self.throttle),
            ("down@", self.down_at),
            ("silent@", self.silent_at),
            ("stale@", self.stale_at),
            ("panic@", self.panic_at),
            ("lanes=", self.lanes.map(u64::from)),
        ];
        let mut parts: Vec<String> = numbers.iter().filter_map(|(n, v)| v.map(|v| format!("{n}{v}"))).collect();
        if self.wedge {
            parts.push("wedge".into());
        } else if self.no_quiet {
            parts.push("noquiet".into());
        }
        f.write_str(&parts.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read_as_they_are_written() {
        for text in ["throttle=1048576", "down@64", "silent@1024,noquiet", "stale@0,lanes=1", "panic@7", "wedge"] {
            let f: Faults = text.parse().unwrap();
            assert_eq!(f.to_string(), text);
        }
        assert_eq!("down@2M".parse::<Faults>().unwrap().down_at, Some(2 << 20));
        for bad in ["", "down", "down@", "down@x", "noquiet=1", "explode", "throttle=1Q"] {
            assert!(bad.parse::<Faults>().is_err(), "{bad}");
        }
    }
}
