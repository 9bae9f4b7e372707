//! `ib_read_bw` and `ib_read_lat` of the package perftest, to compare the verbs lane with.

use std::{
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use kvferry::VerbsConfig;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};

use crate::report::Failure;

/// Longest time of a measurement, for the slowest emulated device, and the extra time for each READ.
const LIMIT: Duration = Duration::from_secs(120);
const EACH: Duration = Duration::from_millis(10);

/// perftest between two devices of this machine, with the lane's settings: queue pairs, depth, READs in flight, GID,
/// timeout, service level.
pub(crate) struct Perftest {
    reader: String,
    served: String,
    settings: VerbsConfig,
    port: u16,
}

impl Perftest {
    /// Reads from the first rail of `served` over the first rail of `reader`.
    pub(crate) fn new(reader: &VerbsConfig, served: &[String]) -> Result<Self, Failure> {
        let first = |rails: &[String]| {
            rails.first().cloned().ok_or_else(|| Failure::usage("--vs-raw over verbs needs a device: give --device"))
        };
        Ok(Self { reader: first(&reader.rails)?, served: first(served)?, settings: reader.clone(), port: 18_515 })
    }

    /// The time for `total` bytes in READs of `size`, from the average of one run.
    pub(crate) fn bandwidth(&mut self, size: u64, total: u64) -> Result<Duration, Failure> {
        let (pairs, depth) = (self.settings.queue_pairs.to_string(), self.settings.depth.to_string());
        let each = (total / size / self.settings.queue_pairs as u64).max(5);
        // Columns: size, iterations, peak and average in MiB per second, messages per second.
        let mib = self.run("ib_read_bw", size, each, &["-q", &pairs, "-t", &depth], 3)?;
        Ok(Duration::from_secs_f64(total as f64 / (mib * f64::from(1 << 20)).max(1.0)))
    }

    /// The median time of `n` READs of `size`, one at a time.
    pub(crate) fn latency(&mut self, size: u64, n: u64) -> Result<Duration, Failure> {
        // Columns: size, iterations, minimum, maximum and median in microseconds, and more.
        Ok(Duration::from_secs_f64(self.run("ib_read_lat", size, n, &[], 4)? / 1e6))
    }

    /// Runs both ends, and returns a column of the output line for `size`.
    fn run(&mut self, program: &str, size: u64, n: u64, more: &[&str], column: usize) -> Result<f64, Failure> {
        // A port that was just closed cannot be reused at once.
        self.port = 18_515 + (self.port - 18_515 + 1) % 1000;
        let mut server = self
            .command(program, &self.served, size, n, more)
            .spawn()
            .map_err(|e| Failure::failed(format!("cannot run {program} ({e}): install the package perftest")))?;
        let read = self.client(program, size, n, more, &mut server);
        // It ends with its client, but without a client it waits indefinitely.
        let _ = server.kill();
        let _ = server.wait();
        let text = read?;
        let line = text.lines().map(|l| l.split_whitespace().collect::<Vec<_>>());
        let mut line = line.filter(|l| l.first().is_some_and(|f| *f == size.to_string()));
        let value = line.next().and_then(|l| l.get(column)?.parse::<f64>().ok());
        value.ok_or_else(|| Failure::failed(format!("{program} printed an unexpected result:\n{text}")))
    }

    /// The client's output. It is started again while the server does not listen yet.
    fn client(&self, program: &str, size: u64, n: u64, more: &[&str], server: &mut Child) -> Result<String, Failure> {
        let until = Instant::now() + LIMIT + EACH * u32::try_from(n).unwrap_or(u32::MAX);
        loop {
            let mut client = self.command(program, &self.reader, size, n, more).arg("127.0.0.1").spawn()?;
            let ended = ends(&client, until);
            if !matches!(ended, Ok(true)) {
                // perftest's queue pairs retry without a limit.
                client.kill()?;
                client.wait()?;
                ended?;
                return Err(Failure::failed(format!("{program} did not end in time: is the link up?")));
            }
            let done = client.wait_with_output()?;
            if done.status.success() {
                return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
            }
            if server.try_wait()?.is_some() || Instant::now() > until {
                let reason = String::from_utf8_lossy(&done.stderr).into_owned();
                return Err(Failure::failed(format!("{program} failed: {}", reason.trim())));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn command(&self, program: &str, rail: &str, size: u64, n: u64, more: &[&str]) -> Command {
        let (device, port) = rail.split_once(':').unwrap_or((rail, "1"));
        let mut c = Command::new(program);
        c.args(["-F", "-d", device, "-i", port, "-p", &self.port.to_string()]);
        c.args(["-s", &size.to_string(), "-n", &n.to_string(), "-o", &self.settings.rd_atomic.to_string()]);
        c.args(["-u", &self.settings.timeout.to_string(), "-S", &self.settings.service_level.to_string()]).args(more);
        if let Some(index) = self.settings.gid_index {
            c.args(["-x", &index.to_string()]);
        }
        c.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        c
    }
}

/// Waits until a process has ended or the time is over. It does not poll, because that would disturb the measurement.
fn ends(child: &Child, until: Instant) -> Result<bool, Failure> {
    let os = |e: rustix::io::Errno| Failure::failed(format!("cannot wait for a process: {e}"));
    let fd = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).map_err(os)?;
    let left = until.saturating_duration_since(Instant::now());
    let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
    Ok(poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&left)).map_err(os)? > 0)
}
