//! Engine and router processes as children, for the demo, the soak, the benchmark and the tests.

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::serve::Ready;

/// A child process. Killed when dropped.
pub struct Process {
    exe: PathBuf,
    args: Vec<String>,
    child: Child,
    pub ready: Ready,
}

impl Process {
    /// Starts `exe ARGS`, and waits until it serves.
    pub fn start(exe: &Path, args: &[&str]) -> Result<Self> {
        let args = args.iter().map(|a| (*a).to_owned()).collect();
        Self::spawn(exe.to_owned(), args)
    }

    fn spawn(exe: PathBuf, args: Vec<String>) -> Result<Self> {
        let mut child = Command::new(&exe)
            .args(&args)
            .arg("--exit-with-parent")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", exe.display()))?;
        let mut line = String::new();
        let out = child.stdout.take().context("a child has no output")?;
        BufReader::new(out).read_line(&mut line)?;
        match serde_json::from_str(&line) {
            Ok(ready) => Ok(Self { exe, args, child, ready }),
            // It printed the reason on standard error, which it shares with this process.
            Err(_) => anyhow::bail!("`{}` did not start ({})", args.join(" "), child.wait()?),
        }
    }

    /// `HOST:PORT` of its HTTP front.
    pub fn addr(&self) -> &str {
        &self.ready.listen
    }

    /// Kills it with SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Starts it again with the same addresses.
    pub fn restart(&mut self) -> Result<()> {
        let mut args: Vec<String> = Vec::new();
        let mut old = self.args.iter();
        while let Some(a) = old.next() {
            if a == "--listen" || a == "--kv-listen" {
                old.next();
            } else {
                args.push(a.clone());
            }
        }
        args.extend(["--listen".into(), self.ready.listen.clone()]);
        if !self.ready.kv.is_empty() {
            args.extend(["--kv-listen".into(), self.ready.kv.clone()]);
        }
        // A client's connection may use the port for a moment.
        let mut tries = 0;
        *self = loop {
            match Self::spawn(self.exe.clone(), args.clone()) {
                Ok(p) => break p,
                Err(e) if tries == 10 => return Err(e),
                Err(_) => tries += 1,
            }
            std::thread::sleep(Duration::from_millis(100));
        };
        Ok(())
    }

    /// Whether the process runs.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
