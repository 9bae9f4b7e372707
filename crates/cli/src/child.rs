//! A `kvferry serve` as a child process: for the demo and the benchmark, which bring both ends.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
};

use serde::Deserialize;

use crate::report::Failure;

/// A running `kvferry serve`. Killed when dropped.
pub(crate) struct Serve {
    child: Child,
    /// What it said when it was ready.
    pub ready: Ready,
}

/// The part of its first line that is used here.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Ready {
    /// `HOST:PORT` of its control plane.
    pub listen: String,
    /// Its incarnation.
    pub incarnation: String,
    /// Its process id.
    pub pid: u32,
    /// Where its memory begins, in its own address space.
    pub base: u64,
}

impl Serve {
    /// Starts one with these flags, and waits until it serves.
    pub(crate) fn start(flags: &[String]) -> Result<Self, Failure> {
        let exe = std::env::current_exe()?;
        let mut child = Command::new(exe)
            .args(["serve", "--json", "--exit-with-parent"])
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        let out = child.stdout.take().ok_or_else(|| Failure::failed("the producer has no output"))?;
        BufReader::new(out).read_line(&mut line)?;
        match serde_json::from_str(&line) {
            Ok(ready) => Ok(Self { child, ready }),
            Err(_) => {
                // It said why on standard error, which is ours too.
                let status = child.wait()?;
                Err(Failure::failed(format!("the producer did not start ({status})")))
            }
        }
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it the hard way: SIGKILL, with no chance to say goodbye. Returns when the signal is sent.
    pub(crate) fn kill(&mut self) -> Result<(), Failure> {
        Ok(self.child.kill()?)
    }

    /// Waits until the process is gone.
    pub(crate) fn wait(&mut self) -> Result<(), Failure> {
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
