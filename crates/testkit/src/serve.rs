//! A `kvferry serve` in a process of its own. The command line starts it where it needs both ends; so do its tests.

use std::{
    ffi::OsStr,
    io::{self, BufRead as _, BufReader},
    process::{Child, Command, Stdio},
};

use serde::Deserialize;

/// A running `kvferry serve`. Killed when dropped, and when this thread ends.
pub struct Serve {
    child: Child,
    pub ready: Ready,
}

/// Some fields of the JSON that it prints once it serves.
#[derive(Debug, Clone, Deserialize)]
pub struct Ready {
    /// `HOST:PORT` of its control plane.
    pub listen: String,
    pub incarnation: String,
    pub pid: u32,
    /// Address of its first segment.
    pub base: u64,
}

impl Serve {
    /// Starts `program serve FLAGS`, and returns when it serves.
    pub fn start(program: impl AsRef<OsStr>, flags: &[impl AsRef<OsStr>]) -> io::Result<Self> {
        Self::start_with(program, flags, &[])
    }

    /// As [`Serve::start`], with these variables in its environment.
    pub fn start_with(
        program: impl AsRef<OsStr>,
        flags: &[impl AsRef<OsStr>],
        environment: &[(&str, &OsStr)],
    ) -> io::Result<Self> {
        let mut child = Command::new(program)
            .envs(environment.iter().copied())
            .args(["serve", "--json", "--exit-with-parent"])
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?).read_line(&mut line)?;
        match serde_json::from_str(&line) {
            Ok(ready) => Ok(Self { child, ready }),
            // It printed the reason on standard error, which it shares with this process.
            Err(_) => Err(io::Error::other(format!("the producer did not start ({})", child.wait()?))),
        }
    }

    /// Sends SIGKILL, and returns without waiting for the end of the process.
    pub fn kill(&mut self) -> io::Result<()> {
        self.child.kill()
    }

    /// Waits until the process has ended.
    pub fn wait(&mut self) -> io::Result<()> {
        self.child.wait().map(drop)
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
