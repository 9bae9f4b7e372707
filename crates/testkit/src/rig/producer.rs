//! A producer in a process of its own, driven line by line.
//!
//! The process is the calling binary again, which runs [`super::play`] first: no other binary has to be built, and the
//! producer is the library's own, with whatever settings a test wants.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    time::{Duration, Instant},
};

use kvferry::{Model, Offer, OfferId, PoolLayout};
use serde::{Deserialize, Serialize};

use super::{SOON, model};

/// The environment variable that makes this binary a producer.
pub const ROLE: &str = "KVFERRY_TEST_PRODUCER";

/// The environment variable that makes this binary a consumer.
pub const CONSUMER: &str = "KVFERRY_TEST_CONSUMER";

/// The environment variables that make the tests of the TCP lane those of verbs: rails of the consumers, and of the
/// producers. Set in the virtual machine of tests/vm.
pub const READER_RAILS: &str = "KVFERRY_TEST_READER_RAILS";
pub const SERVED_RAILS: &str = "KVFERRY_TEST_SERVED_RAILS";

pub(super) fn rails(of: &str) -> Vec<String> {
    std::env::var(of).map(|v| v.split(',').map(String::from).collect()).unwrap_or_default()
}

/// A producer's settings.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Spec {
    pub listen: String,
    pub engine: String,
    pub model: String,
    pub dtype: String,
    pub blocks: u32,
    pub regions: u32,
    pub block_size: u64,
    pub engine_memory: bool,
    pub local: bool,
    pub tcp: bool,
    /// Serve verbs, on these rails; none: not at all.
    pub rails: Vec<String>,
    pub unclaimed_ms: u64,
    pub claimed_ms: u64,
    pub hard_cap_ms: u64,
    pub early_grace_ms: u64,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:0".into(),
            engine: "prefill".into(),
            model: "m".into(),
            dtype: "uint8".into(),
            blocks: 256,
            regions: 4,
            block_size: 16 << 10,
            engine_memory: false,
            local: true,
            tcp: true,
            rails: rails(SERVED_RAILS),
            unclaimed_ms: 30_000,
            claimed_ms: 10_000,
            hard_cap_ms: 600_000,
            early_grace_ms: 2_000,
        }
    }
}

impl Spec {
    pub fn layout(&self) -> PoolLayout {
        PoolLayout::uniform(self.blocks, self.regions, self.block_size, 16)
    }

    pub fn kv_model(&self) -> Model {
        model(&self.model, &self.dtype)
    }

    /// Bytes of one block over all regions.
    pub fn block_bytes(&self) -> u64 {
        u64::from(self.regions) * self.block_size
    }
}

/// What a producer process is told, one line each.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Say {
    /// Offer these blocks; answered by `Offered`. With an id: under that one.
    Offer { blocks: Vec<u32>, ready: bool, id: Option<OfferId> },
    /// The offer's blocks are filled.
    Ready(OfferId),
    /// Take the offer back, and overwrite its blocks as soon as they are freed.
    Revoke(OfferId),
    /// Overwrite blocks whenever an offer is freed, as an engine does that uses them again at once.
    ReuseAtOnce,
    /// Make no new offers.
    Drain,
    /// Say how many offers, claims and sessions there are.
    Count,
    /// Take something away from the producer behind its back; answered by `Taken`.
    Take(Belongings),
}

/// What can be taken away from a producer's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Belongings {
    /// The mapping of the pool, whose pages devices have pinned.
    Pool,
    /// Its queue pairs.
    QueuePairs,
    /// The registrations of the pool and the fence table.
    Regions,
}

/// What a producer process says, one line each.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Heard {
    /// It serves.
    Up { addr: String, tcp_hint: u16, incarnation: String, seed: u64 },
    /// The offer that was asked for, or why there is none.
    Offered(Result<Offer, String>),
    /// An offer's blocks came back, this long after the process started.
    Freed { offer: OfferId, why: String, at_us: u64 },
    /// What was asked for with `Count`.
    Counted { offers: usize, claims: usize, sessions: usize },
    /// So many of what was to be taken were taken.
    Taken(usize),
}

/// A producer in a process of its own. Killed when dropped.
pub struct Producer {
    child: Child,
    stdin: ChildStdin,
    heard: Receiver<Heard>,
    later: Vec<Heard>,
    pub spec: Spec,
    pub addr: String,
    pub seed: u64,
    pub incarnation: String,
}

impl Producer {
    pub fn start(spec: &Spec) -> Self {
        let exe = std::env::current_exe().expect("this binary has a path");
        let mut child = Command::new(exe)
            .args(["--exact", "role", "--ignored", "--nocapture", "--test-threads=1"])
            .env(ROLE, serde_json::to_string(spec).expect("a spec is JSON"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a producer process starts");
        let stdin = child.stdin.take().expect("piped");
        let out = BufReader::new(child.stdout.take().expect("piped"));
        let (tx, heard) = channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                // The test harness prints lines of its own, and may leave ours behind one of them.
                if let Some(at) = line.find("@@")
                    && let Ok(h) = serde_json::from_str(&line[at + 2..])
                    && tx.send(h).is_err()
                {
                    return;
                }
            }
        });
        let mut this = Self {
            child,
            stdin,
            heard,
            later: Vec::new(),
            spec: spec.clone(),
            addr: String::new(),
            seed: 0,
            incarnation: String::new(),
        };
        let (addr, incarnation, seed) = this.wait_for("that it serves", |h| match h {
            Heard::Up { addr, incarnation, seed, .. } => Some((addr.clone(), incarnation.clone(), *seed)),
            _ => None,
        });
        (this.addr, this.incarnation, this.seed) = (addr, incarnation, seed);
        this
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn say(&mut self, say: &Say) {
        let line = serde_json::to_string(say).expect("JSON");
        writeln!(self.stdin, "{line}").and_then(|()| self.stdin.flush()).expect("the producer listens");
    }

    /// Waits for a line that `pick` takes; others are kept for later.
    pub fn wait_for<T>(&mut self, what: &str, mut pick: impl FnMut(&Heard) -> Option<T>) -> T {
        if let Some(i) = self.later.iter().position(|h| pick(h).is_some()) {
            return pick(&self.later.remove(i)).expect("it was picked before");
        }
        let until = Instant::now() + SOON;
        loop {
            match self.heard.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(h) => match pick(&h) {
                    Some(t) => return t,
                    None => self.later.push(h),
                },
                Err(RecvTimeoutError::Timeout) => panic!("waited {SOON:?} for the producer to say {what}"),
                Err(RecvTimeoutError::Disconnected) => panic!("the producer ended before it said {what}"),
            }
        }
    }

    /// Whether nothing that `pick` takes was said up to now.
    pub fn silent(&mut self, mut pick: impl FnMut(&Heard) -> bool) -> bool {
        self.later.extend(self.heard.try_iter());
        !self.later.iter().any(&mut pick)
    }

    pub fn offer(&mut self, blocks: &[u32]) -> Offer {
        self.say(&Say::Offer { blocks: blocks.to_vec(), ready: true, id: None });
        self.offered().expect("the offer is made")
    }

    pub fn offered(&mut self) -> Result<Offer, String> {
        self.wait_for("what became of the offer", |h| match h {
            Heard::Offered(o) => Some(o.clone()),
            _ => None,
        })
    }

    /// Offers all blocks, in an order that is not the pool's.
    pub fn offer_all(&mut self) -> Offer {
        let n = self.spec.blocks;
        // 7919 is prime, so this is a permutation of any pool whose size it does not divide.
        let blocks: Vec<u32> = (0..n).map(|i| i.wrapping_mul(7919) % n).collect();
        self.offer(&blocks)
    }

    /// Waits for the offer to be freed. Returns why, and when by the producer's clock.
    pub fn freed(&mut self, offer: OfferId) -> (String, Duration) {
        self.wait_for("that the offer was freed", |h| match h {
            Heard::Freed { offer: o, why, at_us } if *o == offer => Some((why.clone(), Duration::from_micros(*at_us))),
            _ => None,
        })
    }

    /// Live offers, claims, sessions.
    pub fn count(&mut self) -> (usize, usize, usize) {
        self.say(&Say::Count);
        self.wait_for("its counts", |h| match h {
            Heard::Counted { offers, claims, sessions } => Some((*offers, *claims, *sessions)),
            _ => None,
        })
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.child.id() as i32).expect("a process id");
        rustix::process::kill_process(pid, signal).expect("the process is there");
    }

    /// SIGKILL, and wait until it is gone. Does nothing the second time.
    pub fn kill(&mut self) {
        self.child.kill().expect("it can be killed");
        self.child.wait().expect("it can be waited for");
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
