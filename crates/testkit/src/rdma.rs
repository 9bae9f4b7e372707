//! The wires of the virtual machine: cutting and mending them, and counting the kernel's verbs objects.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use kvferry::Config;

use crate::rig::{Producer, SOON, Spec, consumer};

/// Panics outside of the virtual machine, and if it has fewer wires.
pub fn need_wires(n: usize) {
    assert!(std::env::var_os("KVFERRY_VM").is_some(), "this is not the virtual machine: run tests/vm/run");
    let exist = (1..=n).all(|i| std::path::Path::new(&format!("/sys/class/infiniband/rxb{i}")).exists());
    assert!(exist, "the virtual machine has no {n} wires: set WIRES={n}");
}

pub fn run(program: &str, args: &str) -> String {
    let out = Command::new(program).args(args.split_whitespace()).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(out.status.success(), "{program} {args}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

pub fn ip(args: &str) {
    run("ip", args);
}

pub fn tc(args: &str) {
    run("tc", args);
}

/// Loses this percentage of an interface's packets until dropped.
pub struct Loss(&'static str);

impl Loss {
    pub fn on(end: &'static str, percent: u32) -> Self {
        tc(&format!("qdisc add dev {end} root netem loss {percent}% limit 10000"));
        Self(end)
    }
}

impl Drop for Loss {
    fn drop(&mut self) {
        let _ = Command::new("tc").args(["qdisc", "del", "dev", self.0, "root"]).status();
    }
}

/// Delays packets from the far ends of the first wires until dropped: during a pull, the answers of a full window of READs are
/// on the wire.
pub struct Slow(Vec<i64>);

impl Slow {
    /// Half of the transport's timeout. With 1 MiB in flight it leaves a third of the wire's rate. (A rate limit would send a
    /// packet at each tick of an emulated clock.)
    pub const DELAY: &str = "delay 30ms limit 10000";

    pub fn on(wires: usize) -> Self {
        let it = Self((1..=wires).map(ahead).collect());
        for n in 1..=wires {
            tc(&format!("qdisc add dev b{n} root netem {}", Self::DELAY));
        }
        it
    }

    /// Waits until answers are on every wire, and returns the numbers of packets, of up to 4 KiB each. They are read from
    /// counters, not from `tc`: on a loaded host a process takes most of a second to start, and the pull would be over.
    pub fn in_flight(&self) -> Vec<i64> {
        let until = Instant::now() + SOON;
        loop {
            let waiting: Vec<i64> = (1..).zip(&self.0).map(|(n, before)| ahead(n) - before).collect();
            if waiting.iter().all(|packets| *packets >= 8) {
                return waiting;
            }
            assert!(Instant::now() < until, "too little is in flight: {waiting:?} packets are on the wires");
        }
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        for n in 1..=self.0.len() {
            let _ = Command::new("tc").args(["qdisc", "del", "dev", &format!("b{n}"), "root"]).status();
        }
    }
}

/// Packets that the device at a wire's far end has sent, minus those that have left its interface.
fn ahead(wire: usize) -> i64 {
    let count = |path: String| -> i64 { std::fs::read_to_string(path).unwrap().trim().parse().unwrap() };
    count(format!("/sys/class/infiniband/rxb{wire}/ports/1/hw_counters/sent_pkts"))
        - count(format!("/sys/class/net/b{wire}/statistics/tx_packets"))
}

/// Lets packets overtake each other on all wires until dropped, as on a veth pair by default.
pub struct Unordered(Vec<(String, String)>);

impl Unordered {
    pub fn on(wires: usize) -> Self {
        let ends = (1..=wires).flat_map(|n| [format!("a{n}"), format!("b{n}")]);
        let masks = ends.map(|end| {
            let path = format!("/sys/class/net/{end}/queues/rx-0/rps_cpus");
            let was = std::fs::read_to_string(&path).unwrap();
            std::fs::write(&path, "0").unwrap();
            (path, was)
        });
        Self(masks.collect())
    }
}

impl Drop for Unordered {
    fn drop(&mut self) {
        for (path, was) in &self.0 {
            let _ = std::fs::write(path, was.trim());
        }
    }
}

/// Waits until the ports of all wires are up.
pub fn all_up() {
    let until = Instant::now() + SOON;
    let up = || {
        let devices = std::fs::read_dir("/sys/class/infiniband").unwrap().flatten();
        devices
            .filter_map(|d| std::fs::read_to_string(d.path().join("ports/1/state")).ok())
            .all(|s| s.contains("ACTIVE"))
    };
    while !up() {
        assert!(Instant::now() < until, "a port stays down");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Verbs objects in the kernel, over all devices: queue pairs, completion queues, regions, domains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Objects {
    pub qp: u32,
    pub cq: u32,
    pub mr: u32,
    pub pd: u32,
    /// KiB of this process that devices have pinned.
    pub pinned: u64,
}

/// A line of this process's status, in KiB.
pub fn status(what: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix(what)).unwrap_or_else(|| panic!("no {what} in {text}"));
    line.trim_matches([':', '\t', ' ']).trim_end_matches(" kB").parse().unwrap()
}

/// Bytes that an interface has received.
pub fn came_in(interface: &str) -> u64 {
    let path = format!("/sys/class/net/{interface}/statistics/rx_bytes");
    std::fs::read_to_string(path).unwrap().trim().parse().unwrap()
}

pub fn objects() -> Objects {
    let text = run("rdma", "resource show");
    let sum = |kind: &str| {
        let mut words = text.split_whitespace();
        let mut n = 0;
        while let Some(w) = words.next() {
            if w == kind {
                n += words.next().and_then(|w| w.parse::<u32>().ok()).unwrap_or(0);
            }
        }
        n
    };
    Objects { qp: sum("qp"), cq: sum("cq"), mr: sum("mr"), pd: sum("pd"), pinned: status("VmPin") }
}

/// Waits until the kernel has these objects again.
pub fn settled(want: Objects) {
    let until = Instant::now() + SOON;
    loop {
        let have = objects();
        if have == want {
            return;
        }
        if Instant::now() > until {
            let whose = ["qp", "cq", "mr", "pd"].map(|kind| run("rdma", &format!("resource show {kind}")));
            // The cause may be the kernel: it warns when it cannot destroy the objects of a dead process.
            let log = run("dmesg", "");
            let log: Vec<_> = log.lines().filter(|l| l.contains("WARNING") || l.contains("rxe")).collect();
            panic!("verbs objects leak: {have:?}, {want:?} before\n{}{}", whose.join(""), log.join("\n"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A producer on the far ends of the first `n` wires, and a consumer's settings for the near ones.
pub fn spec(n: usize, blocks: u32, regions: u32, block_size: u64) -> Spec {
    Spec {
        blocks,
        regions,
        block_size,
        local: false,
        tcp: false,
        engine_memory: true,
        rails: (1..=n).map(|i| format!("rxb{i}")).collect(),
        ..Spec::default()
    }
}

pub fn config(n: usize, throttle: Option<&str>) -> Config {
    let mut config = Config::default();
    config.verbs.rails = (1..=n).map(|i| format!("rxa{i}")).collect();
    // An emulated wire carries about 100 MB/s and drops packets beyond its backlog: with a larger window, answers are lost until
    // the queue pair gives up.
    config.verbs.window = 1 << 20;
    config.verbs.max_read = 128 << 10;
    config.pull.faults = throttle.map(|t| format!("throttle={t}").parse().expect("faults"));
    config
}

/// Both ends over `n` wires.
pub fn ends(n: usize, spec: &Spec, throttle: Option<&str>) -> (Producer, kvferry::Consumer) {
    (Producer::start(spec), consumer(spec, config(n, throttle)))
}
