//! Producers in processes of their own, driven line by line, and what the tests need around them.
//!
//! The process is this test binary again, running the one "test" [`crate::role`]: so no other binary has to be built, and
//! the producer is the library's own, with whatever settings a test wants.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    time::{Duration, Instant},
};

use kvferry::{
    block::{BlockId, GroupId, OfferId},
    config::Config,
    consumer::{Consumer, Ended, Pull},
    group::PoolLayout,
    lane::LaneKind,
    model::Model,
    offer::Offer,
    plan::LocalBlocks,
};
use serde::{Deserialize, Serialize};

#[path = "../vm/taken.rs"]
mod taken;

use crate::pattern::{self, Check};

/// Longest that a test waits for something that should happen soon. A loaded machine is slow, not broken.
pub const SOON: Duration = Duration::from_secs(20);

/// The environment variable that makes this binary a producer.
pub const ROLE: &str = "KVFERRY_TEST_PRODUCER";

/// The environment variable that makes this binary a consumer.
pub const CONSUMER: &str = "KVFERRY_TEST_CONSUMER";

/// The environment variables that make the tests of the TCP lane those of verbs: rails of the consumers, and of the
/// producers. Set in the virtual machine of tests/vm.
pub const READER_RAILS: &str = "KVFERRY_TEST_READER_RAILS";
pub const SERVED_RAILS: &str = "KVFERRY_TEST_SERVED_RAILS";

fn rails(of: &str) -> Vec<String> {
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
        Model {
            name: self.model.clone(),
            dtype: self.dtype.clone(),
            scales: String::new(),
            attention: "HND".into(),
            block_tokens: 16,
        }
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
        Self::start_in(&[], spec)
    }

    /// Starts it behind another command, such as one that enters a network namespace.
    pub fn start_in(before: &[&str], spec: &Spec) -> Self {
        let exe = std::env::current_exe().expect("this binary has a path");
        let mut command = match before {
            [] => Command::new(exe),
            [program, args @ ..] => {
                let mut c = Command::new(program);
                c.args(args).arg(exe);
                c
            }
        };
        let mut child = command
            .args(["--exact", "role", "--nocapture", "--test-threads=1"])
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

/// Settings of a consumer whose lanes have these faults.
pub fn throttled(faults: &str) -> Config {
    let mut config = Config::default();
    config.pull.faults = Some(faults.parse().expect("faults"));
    config
}

/// Settings of a consumer that reads so slowly that its peer can be killed in the middle of 32 MiB: an emulated processor runs
/// the killer late, and takes its time with a killed process before that one's queue pairs go.
pub fn killable() -> Config {
    throttled(if really(LaneKind::Tcp) == LaneKind::Verbs { "throttle=8M" } else { "throttle=64M" })
}

/// Settings of a consumer whose pull of 16 MiB outlasts two others of it: over an emulated wire those take half a second each.
pub fn outlasting() -> Config {
    throttled(if really(LaneKind::Tcp) == LaneKind::Verbs { "throttle=3M" } else { "throttle=32M" })
}

/// A consumer with the same pool as the producers of `spec`.
pub fn consumer(spec: &Spec, mut config: Config) -> Consumer {
    if config.verbs.rails.is_empty() {
        config.verbs.rails = rails(READER_RAILS);
    }
    Consumer::builder("decode".parse().expect("an id"), spec.kv_model(), spec.layout())
        .config(config)
        .build()
        .expect("a consumer starts")
}

/// All of an offer's positions, into local blocks of the same numbers.
pub fn all_of(offer: &Offer) -> Vec<LocalBlocks> {
    let n = offer.groups[0].blocks.len() as u32;
    vec![LocalBlocks { group: GroupId(0), first_position: 0, blocks: (0..n).map(|b| Some(BlockId(b))).collect() }]
}

/// The lane that a test runs over which asks for this one: verbs take the place of tcp where there are rails.
pub fn really(lane: LaneKind) -> LaneKind {
    let verbs = lane == LaneKind::Tcp && std::env::var_os(READER_RAILS).is_some();
    if verbs { LaneKind::Verbs } else { lane }
}

/// A deadline that leaves `reading` of itself for reading. Verbs need up to 1.2 s to be quiet, and start to stop so much
/// earlier; an emulated rail takes a moment to connect.
pub fn deadline(lane: LaneKind, reading: Duration) -> Duration {
    reading + if really(lane) == LaneKind::Verbs { Duration::from_millis(2_000) } else { Duration::ZERO }
}

/// A pull of everything over one lane.
pub fn pull_all(offer: &Offer, lane: LaneKind, deadline: Duration) -> Pull {
    Pull::new(offer.clone(), all_of(offer)).lanes(vec![really(lane)]).deadline(deadline)
}

/// Waits for the next end.
pub fn ended(consumer: &Consumer) -> Ended {
    consumer.wait(SOON).expect("the pull ends")
}

/// Waits until this share of the pull's chunks is loaded.
pub fn wait_until_loaded(consumer: &Consumer, pull: kvferry::consumer::PullId, share: f64) {
    let until = Instant::now() + SOON;
    loop {
        let Some((loaded, all)) = consumer.progress(pull) else {
            panic!("the pull ended before {share} of it was loaded: {:?}", ended(consumer).outcome);
        };
        if all > 0 && loaded as f64 >= share * all as f64 {
            return;
        }
        assert!(Instant::now() < until, "{loaded} of {all} chunks after {SOON:?}");
        std::thread::yield_now();
    }
}

/// Every loaded position must hold what the producer's block holds; returns how many were compared. `never:` tells
/// tests/vm/run that no busy host excuses it.
pub fn assert_loaded_is_exact(ended: &Ended, consumer: &Consumer, spec: &Spec, seed: u64) -> u64 {
    let layout = spec.layout();
    let mut check = Check::new();
    let mut compared = 0;
    for (g, offered) in ended.outcome.groups.iter().zip(&ended.offer.groups) {
        assert!(g.loaded.iter().all(|p| !g.invalid.contains(p)), "never: loaded and invalid share a position");
        for position in g.loaded.iter() {
            let src = offered.blocks[position as usize].expect("a loaded position was offered");
            let (_, bad) = check
                .block(seed, (&layout, src.0), (consumer.memory(), &layout, position), g.group)
                .expect("the blocks are in the pool");
            assert_eq!(bad, 0, "never: position {position} does not hold block {}", src.0);
            compared += 1;
        }
    }
    compared
}

/// What the process does that [`Producer::start`] starts.
pub fn run_producer(spec: &str) {
    use kvferry::{
        memory::Memory,
        offer::OfferGroup,
        producer::{OfferSpec, Ready},
    };
    let spec: Spec = serde_json::from_str(spec).expect("a spec");
    let started = Instant::now();
    let layout = spec.layout();
    let memory = if spec.engine_memory { Memory::anonymous(&layout.segments) } else { Memory::alloc(&layout.segments) };
    let mut config = Config::default();
    config.lease.unclaimed = Duration::from_millis(spec.unclaimed_ms);
    config.lease.claimed = Duration::from_millis(spec.claimed_ms);
    config.lease.hard_cap = Duration::from_millis(spec.hard_cap_ms);
    config.lease.early_grace = Duration::from_millis(spec.early_grace_ms);
    config.verbs.rails = spec.rails.clone();
    let lanes = [(spec.local, LaneKind::Local), (spec.tcp, LaneKind::Tcp), (!spec.rails.is_empty(), LaneKind::Verbs)];
    let producer =
        kvferry::producer::Producer::builder(spec.engine.parse().expect("an id"), spec.kv_model(), layout.clone())
            .memory(memory.expect("memory"))
            .listen(spec.listen.clone())
            .lanes(lanes.iter().filter(|(on, _)| *on).map(|(_, l)| *l).collect())
            .config(config)
            .build()
            .expect("a producer starts");
    let seed = producer.me().incarnation.get();
    pattern::write(seed, producer.memory()).expect("the pool can be filled");
    let tell = |h: &Heard| println!("@@{}", serde_json::to_string(h).expect("JSON"));
    tell(&Heard::Up {
        addr: producer.addr().into(),
        tcp_hint: 0,
        incarnation: producer.me().incarnation.to_string(),
        seed,
    });
    let mut offered: std::collections::HashMap<OfferId, Vec<u32>> = std::collections::HashMap::new();
    let mut reuse = false;
    let mut revoked = std::collections::HashSet::new();
    let (tx, said) = channel::<Say>();
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if let Ok(say) = serde_json::from_str(&line)
                && tx.send(say).is_err()
            {
                return;
            }
        }
        // The test is gone, and so is the reason for this process.
        std::process::exit(0);
    });
    // The engine's loop: a step a millisecond.
    loop {
        match said.recv_timeout(Duration::from_millis(1)) {
            Ok(Say::Offer { blocks, ready, id }) => {
                let group = OfferGroup {
                    group: GroupId(0),
                    first_position: 0,
                    blocks: blocks.iter().map(|b| Some(BlockId(*b))).collect(),
                };
                let tokens = blocks.len() as u64 * 16;
                let made = producer.offer(
                    OfferSpec { id, request: "test".into(), tokens, groups: vec![group] },
                    if ready { Ready::Now } else { Ready::Later },
                );
                if let Ok(o) = &made {
                    offered.insert(o.id, blocks);
                }
                tell(&Heard::Offered(made.map_err(|e| e.to_string())));
            }
            Ok(Say::Ready(id)) => producer.ready(id),
            Ok(Say::Revoke(id)) => {
                revoked.insert(id);
                producer.revoke(id);
            }
            Ok(Say::ReuseAtOnce) => reuse = true,
            Ok(Say::Drain) => producer.drain(),
            Ok(Say::Count) => {
                let (offers, claims) = producer.live();
                tell(&Heard::Counted { offers, claims, sessions: producer.sessions() });
            }
            Ok(Say::Take(what)) => tell(&Heard::Taken(taken::take(what, producer.memory()))),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        while let Some(f) = producer.poll_freed() {
            if reuse || revoked.contains(&f.offer) {
                // Another request's KV.
                for b in offered.get(&f.offer).into_iter().flatten() {
                    for r in &layout.groups[0].regions {
                        let other = vec![0xEE; r.block_bytes as usize];
                        producer.memory().write_from(r.segment, r.block_offset(*b), &other).expect("in the pool");
                    }
                }
            }
            tell(&Heard::Freed {
                offer: f.offer,
                why: format!("{:?}", f.why),
                at_us: started.elapsed().as_micros() as u64,
            });
        }
    }
}

/// A consumer process: claims an offer, and reads it so slowly that it is never done.
pub fn run_consumer(what: &str) {
    let (spec, offer): (Spec, Offer) = serde_json::from_str(what).expect("a spec and an offer");
    let consumer = consumer(&spec, throttled("throttle=64K"));
    consumer.pull(pull_all(&offer, LaneKind::Tcp, Duration::from_secs(600))).expect("a pull");
    let _ = consumer.wait(Duration::from_secs(600));
}

/// Inodes of the sockets that a process has open.
fn sockets(pid: u32) -> std::collections::HashSet<String> {
    let links = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors");
    links
        .filter_map(|e| std::fs::read_link(e.ok()?.path()).ok())
        .filter_map(|l| Some(l.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect()
}

/// TCP ports of 127.0.0.1 that a process listens on.
pub fn listening_ports(pid: u32) -> Vec<u16> {
    let mine = sockets(pid);
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/tcp")).expect("its sockets");
    table
        .lines()
        .skip(1)
        .filter_map(|l| {
            let f: Vec<_> = l.split_whitespace().collect();
            // State 0A is LISTEN; field 9 is the inode.
            (f.get(3) == Some(&"0A") && mine.contains(*f.get(9)?))
                .then(|| u16::from_str_radix(f[1].split(':').nth(1)?, 16).ok())?
        })
        .collect()
}

/// Abstract unix names that a process listens on.
pub fn listening_names(pid: u32) -> Vec<Vec<u8>> {
    let mine = sockets(pid);
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/unix")).expect("its sockets");
    table
        .lines()
        .skip(1)
        .filter_map(|l| {
            let f: Vec<_> = l.split_whitespace().collect();
            // Flags 00010000 mean that it listens; field 6 is the inode, field 7 the name.
            let name = f.get(7)?.strip_prefix('@')?;
            (f.get(3) == Some(&"00010000") && mine.contains(*f.get(6)?)).then(|| name.as_bytes().to_vec())
        })
        .collect()
}
