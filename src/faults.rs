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

/// A text that names no faults.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadFault(String);

/// A text that is not a number of bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a size: write a whole number of bytes, or one with K, M, G or T for powers of 1024, such as 65536, 64K or \
     1536K"
)]
pub struct BadSize(String);

impl FromStr for Faults {
    type Err = BadFault;

    fn from_str(text: &str) -> Result<Self, BadFault> {
        let mut f = Self::default();
        for part in text.split(',').map(str::trim) {
            let (name, value) = part.split_once(['@', '=']).map_or((part, None), |(n, v)| (n, Some(v)));
            let bytes = || parse_bytes(value.unwrap_or_default()).map_err(|e| BadFault(format!("{part}: {e}")));
            let bad = |why: &str| BadFault(format!("{part:?} {why}"));
            match name {
                "throttle" => {
                    f.throttle = Some(bytes()?).filter(|n| *n > 0);
                    f.throttle.ok_or_else(|| bad("lets no byte pass: write a positive number of bytes a second"))?;
                }
                "down" => f.down_at = Some(bytes()?),
                "silent" => f.silent_at = Some(bytes()?),
                "stale" => f.stale_at = Some(bytes()?),
                "panic" => f.panic_at = Some(bytes()?),
                "lanes" => {
                    let number = value.and_then(|v| v.parse().ok());
                    f.lanes = Some(number.ok_or_else(|| bad("has no number of lanes: write lanes=1"))?);
                }
                "noquiet" if value.is_none() => f.no_quiet = true,
                "wedge" if value.is_none() => (f.no_quiet, f.wedge) = (true, true),
                _ => {
                    return Err(bad(
                        "is not a fault: use throttle=BYTES, down@BYTES, silent@BYTES, stale@BYTES, panic@BYTES, noquiet, \
                         wedge, lanes=N",
                    ));
                }
            }
        }
        Ok(f)
    }
}

/// A number of bytes: digits, then nothing or `K`, `M`, `G` or `T`, in either case, for powers of 1024. `B` or `iB` may
/// follow the letter. The one rule for sizes in faults and on the command line.
///
/// # Errors
/// The text is not a byte count, or the number is over 2^64 - 1.
pub fn parse_bytes(text: &str) -> Result<u64, BadSize> {
    let bad = || BadSize(text.into());
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(bad()),
    };
    digits.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift)).ok_or_else(bad)
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
        for bad in ["", "down", "noquiet=1", "explode", "throttle=0", "throttle=0K", "lanes=1K", "lanes=", "lanes=-1"] {
            assert!(bad.parse::<Faults>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_bad_size_in_a_fault_gets_the_same_sentence_as_elsewhere() {
        for bad in ["", "x", "1Q", "64Kbib", "1.5M", "-1", "99999999999T"] {
            let sentence = parse_bytes(bad).unwrap_err().to_string();
            for fault in ["throttle=", "down@", "silent@", "stale@", "panic@"] {
                let text = format!("{fault}{bad}");
                assert_eq!(text.parse::<Faults>().unwrap_err().to_string(), format!("{text}: {sentence}"));
            }
        }
        assert_eq!(parse_bytes("200MiB"), Ok(200 << 20));
    }
}
