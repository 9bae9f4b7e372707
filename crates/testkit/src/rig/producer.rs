//! A producer in a process of its own, driven by one line of JSON per command.
//!
//! The process runs the calling binary again, which calls [`super::play`] first. So no other binary has to be built, and
//! a test can choose any settings.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Mutex,
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    time::{Duration, Instant},
};

use kvferry::{Offer, OfferId};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use serde::{Deserialize, Serialize};

use super::spec::{SOON, Spec};

/// The environment variable that makes this binary a producer.
pub(super) const ROLE: &str = "KVFERRY_TEST_PRODUCER";

/// A command to a producer process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Say {
    /// Offer these blocks. The answer is `Offered`.
    Offer { blocks: Vec<u32>, ready: bool },
    /// Enter an offer of these blocks under a name that was made before. The answer is `Offered`.
    Enter { name: Offer, blocks: Vec<u32>, ready: bool },
    /// Open an offer of these blocks. Unless they are `filled` already, their bytes are wrong until they are computed. The
    /// answer is `Offered`.
    Open { name: Option<Offer>, blocks: Vec<u32>, filled: bool },
    /// Compute an open offer's blocks below the mark of `tokens`, and grow it by its next blocks up to `listed`.
    Grow { offer: OfferId, listed: usize, tokens: u64 },
    /// Compute the rest of an open offer's blocks, list them, and finish it.
    Finish(OfferId),
    /// The offer's blocks are filled.
    Ready(OfferId),
    /// Revoke the offer, and overwrite its blocks as soon as they are freed.
    Revoke(OfferId),
    /// Overwrite the blocks of every freed offer, as an engine does that reuses them at once.
    ReuseAtOnce,
    /// Make no new offers.
    Drain,
    /// Count offers, claims and sessions. The answer is `Counted`.
    Count,
    /// Take a resource away from the producer without its knowledge. The answer is `Taken`.
    Take(Belongings),
}

/// A resource that can be taken away from a producer process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Belongings {
    /// The mapping of the pool, whose pages devices have pinned.
    Pool,
    /// Its queue pairs.
    QueuePairs,
    /// The registrations of the pool and the fence table.
    Regions,
}

/// An answer or event of a producer process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Heard {
    /// It serves.
    Up {
        addr: String,
        incarnation: String,
        seed: u64,
    },
    /// The new offer, or the reason for refusing it.
    Offered(Result<(Offer, Vec<u32>), String>),
    /// An offer was freed, this long after the process started.
    Freed {
        offer: OfferId,
        why: String,
        at_us: u64,
    },
    Counted {
        offers: usize,
        claims: usize,
        sessions: usize,
    },
    /// Resources that were taken.
    Taken(usize),
}

/// Settings for a producer whose pool is GPU memory.
#[cfg(feature = "gpu")]
fn devices(spec: &Spec) -> Option<(&'static str, String)> {
    spec.gpu.then(crate::gpu::settings_for_child).flatten()
}

#[cfg(not(feature = "gpu"))]
fn devices(_: &Spec) -> Option<(&'static str, String)> {
    None
}

/// The blocks of the offers that this process's producers made: names do not list them.
static OFFERED: Mutex<BTreeMap<OfferId, Vec<u32>>> = Mutex::new(BTreeMap::new());

/// The blocks of an offer, by position, as its producer was told to offer them.
pub fn offered_blocks(offer: OfferId) -> Vec<u32> {
    OFFERED.lock().expect("no test panics with it").get(&offer).cloned().unwrap_or_default()
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
            .envs(devices(spec))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a producer process starts");
        let stdin = child.stdin.take().expect("piped");
        let out = BufReader::new(child.stdout.take().expect("piped"));
        let (tx, heard) = channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                // The test harness prints to the same line.
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
            Heard::Up { addr, incarnation, seed } => Some((addr.clone(), incarnation.clone(), *seed)),
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

    /// Waits for a line that `pick` accepts. Keeps other lines for later calls.
    pub fn wait_for<T>(&mut self, what: &str, mut pick: impl FnMut(&Heard) -> Option<T>) -> T {
        if let Some(i) = self.later.iter().position(|h| pick(h).is_some()) {
            return pick(&self.later.remove(i)).expect("`pick` accepted it just now");
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

    /// Whether no line arrives within this time, and none has arrived before, that `pick` accepts.
    pub fn silent_for(&mut self, time: Duration, mut pick: impl FnMut(&Heard) -> bool) -> bool {
        let until = Instant::now() + time;
        while let Ok(h) = self.heard.recv_timeout(until.saturating_duration_since(Instant::now())) {
            self.later.push(h);
        }
        !self.later.iter().any(&mut pick)
    }

    pub fn offer(&mut self, blocks: &[u32]) -> Offer {
        self.say(&Say::Offer { blocks: blocks.to_vec(), ready: true });
        self.offered().expect("the offer is made")
    }

    /// Opens an offer of these blocks, 16 tokens each.
    pub fn open(&mut self, blocks: &[u32]) -> Offer {
        self.say(&Say::Open { name: None, blocks: blocks.to_vec(), filled: false });
        self.offered().expect("the offer is opened")
    }

    /// Computes the first `blocks` blocks of an open offer, and lists two more.
    pub fn grow(&mut self, offer: OfferId, blocks: usize) {
        self.say(&Say::Grow { offer, listed: blocks + 2, tokens: blocks as u64 * 16 });
    }

    pub fn offered(&mut self) -> Result<Offer, String> {
        self.wait_for("whether it made the offer", |h| match h {
            Heard::Offered(o) => Some(o.clone()),
            _ => None,
        })
        .map(|(offer, blocks)| {
            OFFERED.lock().expect("no test panics with it").insert(offer.id, blocks);
            offer
        })
    }

    /// Offers all blocks, in another order than the pool's.
    pub fn offer_all(&mut self) -> Offer {
        let n = self.spec.blocks;
        // 7919 is prime, so this is a permutation of any pool whose size it does not divide.
        let blocks: Vec<u32> = (0..n).map(|i| i.wrapping_mul(7919) % n).collect();
        self.offer(&blocks)
    }

    /// Waits until the offer is freed. Returns the reason, and the time by the producer's clock.
    pub fn freed(&mut self, offer: OfferId) -> (String, Duration) {
        self.wait_for("that the offer was freed", |h| match h {
            Heard::Freed { offer: o, why, at_us } if *o == offer => Some((why.clone(), Duration::from_micros(*at_us))),
            _ => None,
        })
    }

    /// The numbers of live offers, claims and sessions.
    pub fn count(&mut self) -> (usize, usize, usize) {
        self.say(&Say::Count);
        self.wait_for("its counts", |h| match h {
            Heard::Counted { offers, claims, sessions } => Some((*offers, *claims, *sessions)),
            _ => None,
        })
    }

    /// Sends a signal. After SIGSTOP, waits until all threads of the process have stopped.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id() as i32).expect("a process id");
        kill_process(pid, signal).expect("the process is there");
        if signal == Signal::STOP {
            waitid(WaitId::Pid(pid), WaitIdOptions::STOPPED).expect("it stops");
        }
    }

    /// Sends SIGKILL, and waits for the end of the process. A second call does nothing.
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
