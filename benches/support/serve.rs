//! A `kvferry serve` of eight small blocks in a process of its own, and what a consumer of it needs.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
};

use kvferry::{group::PoolLayout, model::Model};

/// A running producer. Killed when dropped.
pub struct Serve {
    child: Child,
    /// `HOST:PORT` that it said it listens on.
    pub addr: String,
}

impl Serve {
    /// Starts one on `listen`, and waits until it serves.
    pub fn start(listen: &str) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_kvferry"))
            .args(["serve", "--json", "--exit-with-parent", "--listen", listen])
            .args(["--blocks", "8", "--regions", "1", "--block-size", "4K"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("kvferry serve starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
        let ready: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        Self { child, addr: ready["listen"].as_str().expect("an address").to_owned() }
    }

    /// Its process id.
    #[allow(dead_code, reason = "one of two benchmarks looks at the process")]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The model that `serve` has by default.
pub fn model() -> Model {
    Model {
        name: "pattern".into(),
        dtype: "uint8".into(),
        scales: String::new(),
        attention: "pattern".into(),
        block_tokens: 16,
    }
}

/// A pool like the producer's.
pub fn layout() -> PoolLayout {
    PoolLayout::uniform(8, 1, 4096, 16)
}
