//! The command line over verbs, as a person or a script uses it.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Output, Stdio},
    time::Instant,
};

use kvferry_testkit::{
    rdma::{all_up, ip, need_wires, objects, settled},
    rig::SOON,
};
use serde_json::Value;

const KVFERRY: &str = env!("CARGO_BIN_EXE_kvferry");

fn kvferry(args: &str) -> Output {
    command(KVFERRY, args).output().expect("it runs")
}

/// With the default log.
fn command(program: &str, args: &str) -> Command {
    let mut c = Command::new(program);
    c.args(args.split_whitespace()).env_remove("KVFERRY_LOG").stdin(Stdio::null());
    c
}

/// The only line on standard error of a command that failed.
fn refused(args: &str) -> String {
    let out = kvferry(args);
    let text = String::from_utf8_lossy(&out.stderr).trim_end().to_owned();
    assert_eq!(out.status.code(), Some(1), "{args}: {text}");
    assert!(text.starts_with("error: ") && text.lines().count() == 1, "{args}: {text}");
    text
}

/// A `kvferry serve`, killed when dropped.
struct Serve {
    child: Child,
    addr: String,
}

impl Serve {
    fn start(args: &str) -> Self {
        let args = format!("serve --listen 127.0.0.1:0 --json --blocks 64 --regions 2 --block-size 16K {args}");
        let child = command(KVFERRY, &args).stdout(Stdio::piped()).spawn().expect("it runs");
        let mut it = Self { child, addr: String::new() };
        let mut line = String::new();
        BufReader::new(it.child.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
        let ready: Value = serde_json::from_str(&line).expect("JSON when it is ready");
        it.addr = ready["listen"].as_str().expect("an address").to_owned();
        it
    }

    fn try_pull(&self, args: &str) -> Output {
        kvferry(&format!("pull --from {} --blocks 64 --lane verbs --deadline 60s --json {args}", self.addr))
    }

    /// A pull of everything over verbs, verified.
    fn pull(&self, args: &str) {
        let out = self.try_pull(args);
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success(), "{args}: {text}{}", String::from_utf8_lossy(&out.stderr));
        let record: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!((&record["lane"], &record["mismatched_bytes"]), (&"verbs".into(), &0.into()), "{record}");
        assert_eq!(record["verified_bytes"], 64 * 2 * (16 << 10), "{record}");
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A link that is down until this is dropped.
struct Down(&'static str);

impl Down {
    fn on(end: &'static str) -> Self {
        ip(&format!("link set {end} down"));
        Self(end)
    }
}

impl Drop for Down {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "set", self.0, "up"]).status();
        if !std::thread::panicking() {
            all_up();
        }
    }
}

/// The index of a device's RoCE v2 GID with an IPv4 address, in the kernel's table.
fn ipv4_gid(device: &str) -> u32 {
    let port = format!("/sys/class/infiniband/{device}/ports/1");
    let read = |path: String| std::fs::read_to_string(path).unwrap_or_default();
    let ipv4 = |i: &u32| {
        read(format!("{port}/gids/{i}")).contains("0000:0000:0000:0000:0000:ffff:")
            && read(format!("{port}/gid_attrs/types/{i}")).contains("v2")
    };
    (0..16).find(ipv4).expect("a GID with an IPv4 address")
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn a_wrong_name_of_a_rail_is_refused_in_one_line_before_anything_else() {
    need_wires(2);
    all_up();
    // No producer listens there: that would be the next error.
    let pull = |args: &str| refused(&format!("pull --from 127.0.0.1:1 {args}"));
    let mistakes = [
        ("--lane verbs --device rxnone", "rxnone"),
        ("--rails rxa1,rxnone", "rxnone"),
        ("--device rxa1:7", "port 7"),
        ("--device rxa1 --gid-index 77", "77"),
        ("--device :1", "\":1\" is not a rail"),
    ];
    for (args, word) in mistakes {
        let text = pull(args);
        assert!(text.contains(word), "{args}: {text}");
    }
    for command in
        ["serve --listen 127.0.0.1:0 --blocks 64", "demo --lane verbs --total-bytes 128M", "bench --lane verbs"]
    {
        let text = refused(&format!("{command} --rails rxa1,rxnone"));
        assert!(text.contains("rxnone"), "{command}: {text}");
    }
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn a_link_that_is_down_is_refused_if_no_other_is_up_and_accepted_by_serve() {
    need_wires(2);
    all_up();
    let before = objects();
    let down = Down::on("a1");
    let text = refused("pull --from 127.0.0.1:1 --lane verbs --device rxa1");
    assert!(text.contains("rxa1") && text.contains("`ip link`"), "{text}");
    // One of two, on either side.
    let serve = Serve::start("--rails rxb1,rxb2");
    serve.pull("--rails rxa1,rxa2");
    drop(serve);
    let serve = Serve::start("--rails rxb1");
    drop(down);
    // The producer looks at it again from time to time, and a pull does not wait for that.
    let until = Instant::now() + SOON;
    while !serve.try_pull("--device rxa1").status.success() {
        assert!(Instant::now() < until, "a link that came up is not used");
    }
    serve.pull("--device rxa1");
    drop(serve);
    settled(before);
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn the_configured_gid_is_used() {
    need_wires(1);
    all_up();
    let (here, there) = (ipv4_gid("rxa1"), ipv4_gid("rxb1"));
    let serve = Serve::start(&format!("--rails rxb1 --gid-index {there}"));
    serve.pull(&format!("--device rxa1 --gid-index {here}"));
    // The link-local GID of this end: no packet goes from there to an IPv4 address, and the error says so.
    let other = (0..16).find(|i| *i != here).expect("another one");
    let pull = format!("pull --from {} --blocks 1 --lane verbs --deadline 60s --json", serve.addr);
    let out = kvferry(&format!("{pull} --device rxa1 --gid-index {other}"));
    let (record, text) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert_eq!(out.status.code(), Some(3), "{record}{text}");
    let record: Value = serde_json::from_str(&record).expect("JSON");
    assert_eq!(record["causes"]["unreachable"], record["invalid"], "{record}");
    assert!(text.contains("no rail of one end reaches one of the other") && text.contains("fe80::"), "{text}");
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn doctor_names_devices_ports_addresses_and_tried_abilities() {
    need_wires(2);
    all_up();
    let out = {
        let _down = Down::on("a2");
        kvferry("doctor --json")
    };
    let findings: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    let of = |check: &str| -> Vec<(String, String)> {
        let all = findings.as_array().expect("a list").iter().filter(|f| f["check"] == check);
        all.map(|f| (f["status"].as_str().unwrap().to_owned(), f["found"].as_str().unwrap().to_owned())).collect()
    };
    let devices = of("verbs device");
    for d in ["rxa1", "rxb1", "rxa2", "rxb2"] {
        let found = devices.iter().find(|(_, f)| f.starts_with(d)).unwrap_or_else(|| panic!("no {d}: {findings}"));
        for word in ["relaxed ordering", "ODP", "dmabuf", "READs in flight"] {
            assert!(found.1.contains(word), "{found:?}");
        }
    }
    let port = |d: &str| {
        let all = of("verbs port");
        all.into_iter().find(|(_, f)| f.starts_with(d)).unwrap_or_else(|| panic!("no port of {d}: {findings}"))
    };
    let (status, up) = port("rxa1:1");
    assert_eq!(status, "OK", "{up}");
    for word in ["RoCE", "MTU 4096", "10.98.1.1", ", a1)", "*"] {
        assert!(up.contains(word), "{word:?} is missing in {up}");
    }
    let (status, down) = port("rxa2:1");
    assert!(status == "WARN" && down.contains("DOWN"), "{down}");
    assert!(of("verbs lane").iter().any(|(s, f)| s == "OK" && f.contains("verified")), "{findings}");
    assert_eq!(of("locked memory").len(), 1, "{findings}");
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn too_little_lockable_memory_is_reported_with_the_fix_and_other_lanes_go_on() {
    need_wires(1);
    all_up();
    let serve = Serve::start("--rails rxb1");
    // Root may lock any amount, until it loses that capability.
    let limited = |lane: &str| {
        let args = format!(
            "--bounding-set=-ipc_lock prlimit --memlock=65536:65536 {KVFERRY} pull --from {} --blocks 64 {lane} --json --deadline 20s",
            serve.addr
        );
        command("setpriv", &args).output().expect("setpriv")
    };
    let out = limited("--lane verbs --device rxa1");
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_ne!(out.status.code(), Some(0), "{text}");
    for word in ["RLIMIT_MEMLOCK", "65536", "ulimit -l", "CAP_IPC_LOCK"] {
        assert!(text.contains(word), "{word:?} is missing in {text}");
    }
    let out = limited("--device rxa1");
    let record: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert!(out.status.success() && record["lane"] != "verbs", "{record}");
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn a_benchmark_beside_perftest_has_both_rates_and_both_latencies_in_one_row() {
    need_wires(1);
    let before = objects();
    let out = kvferry(
        "bench --lane verbs --device rxa1 --serve-rails rxb1 --vs-raw --json --start-block-size 64K --max-block-size 64K \
         --total-bytes 1M --iterations 2 --warmup 0 --qp-timeout 18",
    );
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{text}{}", String::from_utf8_lossy(&out.stderr));
    let rows: Value = serde_json::from_str(&text).expect("JSON");
    let row = &rows[0];
    let more = |v: &Value| v.as_f64().is_some_and(|v| v > 0.0);
    assert!(["gb_per_s", "raw_gb_per_s", "raw_ratio"].iter().all(|f| more(&row[f])), "{row}");
    let one = &row["one_at_a_time"];
    let fields = ["block_us", "first_block_us", "raw_us", "ratio", "first_ratio"];
    assert!(fields.iter().all(|f| more(&one[f])), "{row}");
    settled(before);
}
