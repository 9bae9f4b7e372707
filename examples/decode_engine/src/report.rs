//! The properties that must hold, and the observations.

use std::time::Duration;

/// A table of properties: whether each held, and the observation.
#[derive(Debug, Default)]
pub struct Report(Vec<(bool, String, String)>);

impl Report {
    /// Adds a property.
    pub fn saw(&mut self, what: &str, held: bool, seen: impl Into<String>) {
        self.0.push((held, what.into(), seen.into()));
    }

    /// Adds a property that fails with an error.
    pub fn check(&mut self, what: &str, seen: anyhow::Result<String>) {
        match seen {
            Ok(seen) => self.saw(what, true, seen),
            Err(e) => self.saw(what, false, format!("{e:#}")),
        }
    }

    /// Prints the table, and returns whether all properties held.
    pub fn print(&self) -> bool {
        println!("\n{:<24} {:<6} observation", "property", "held");
        for (held, what, seen) in &self.0 {
            println!("{what:<24} {:<6} {seen}", if *held { "yes" } else { "NO" });
        }
        let all = self.0.iter().all(|s| s.0);
        println!("\n{}", if all { "all properties held" } else { "NOT all properties held" });
        all
    }
}

/// The quantile of the values; zero if there are none.
pub fn quantile(all: &[Duration], part: f64) -> Duration {
    let mut all = all.to_vec();
    all.sort();
    let at = (part * all.len().saturating_sub(1) as f64).round() as usize;
    all.get(at).copied().unwrap_or_default()
}

/// The median.
pub fn median(all: &[Duration]) -> Duration {
    quantile(all, 0.5)
}
