//! The traps that a newcomer would step into: output that cannot be written, few descriptors, other namespaces, bad addresses.

mod common;

use std::{
    fs::{self, File, OpenOptions},
    io::Read as _,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::channel,
    thread,
    time::{Duration, Instant},
};

use kvferry_testkit::serve::Serve;
use serde_json::Value;

use self::common::{assert_one_line, kvferry, serve};

const KVFERRY: &str = env!("CARGO_BIN_EXE_kvferry");
/// For events on a loaded machine.
const LIMIT: Duration = Duration::from_secs(120);

/// A process that is killed when the test ends.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Repeats until there is a value.
fn until<T>(event: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + LIMIT;
    loop {
        if let Some(value) = look() {
            return value;
        }
        assert!(Instant::now() < end, "not within {LIMIT:?}: {event}");
        thread::sleep(Duration::from_millis(2));
    }
}

fn scratch(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("kvferry-{name}-{}", std::process::id()))
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn a_producer_answers_only_when_its_pool_is_filled() {
    let at = format!("127.0.0.1:{}", free_port());
    let flags = ["serve", "--listen", &at, "--blocks", "64", "--regions", "32", "--block-size", "128K"];
    let mut child = Killed(Command::new(KVFERRY).args(flags).stdout(Stdio::null()).spawn().unwrap());
    until("it listens", || {
        assert!(child.0.try_wait().unwrap().is_none(), "it ended");
        TcpStream::connect(&at).ok()
    });
    let out = kvferry(&["pull", "--from", &at, "--deadline", "60s", "--json"]);
    let v: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((&v["result"], &v["mismatched_bytes"]), (&Value::from("complete"), &Value::from(0)), "{v}");
}

#[test]
fn an_address_that_means_nothing_on_other_hosts_is_refused_with_the_flag_to_set() {
    for addr in ["0.0.0.0:0", "[::]:0"] {
        assert_one_line(&kvferry(&["serve", "--blocks", "8", "--listen", addr]), 2, &["--listen", "--advertise"]);
    }
    for addr in ["foo", "a@host:1", "fe80::1%eth0", "[fe80::1%eth0]:1", "[fe80::1]:1", "0.0.0.0:1"] {
        assert_one_line(&kvferry(&["serve", "--advertise", addr]), 2, &[addr, "--advertise", "it"]);
        assert_one_line(&kvferry(&["pull", "--from", addr]), 2, &[addr, "--from", "it"]);
        assert_one_line(&kvferry(&["bench", "--connect", addr]), 2, &[addr, "--connect", "it"]);
    }
    let file = scratch("advertised");
    let path = file.to_str().unwrap();
    let flags =
        ["--blocks", "8", "--regions", "1", "--listen", "0.0.0.0:0", "--advertise", "127.0.0.1:0", "--offer", path];
    let producer = Serve::start(KVFERRY, &flags).expect("it serves");
    let out = kvferry(&["pull", "--offer", path]);
    assert!(out.status.success(), "{} {}", producer.ready.listen, String::from_utf8_lossy(&out.stderr));
    fs::remove_file(file).unwrap();
}

#[test]
fn wrong_usage_names_the_help_of_the_command() {
    for (args, help) in [
        (&["pull", "--blocks", "0", "--from", "127.0.0.1:1"][..], "`kvferry pull --help`"),
        (&["pull", "--from", "127.0.0.1:1", "--seal-key", "/nowhere"], "`kvferry pull --help`"),
        (&["bench", "--total-bytes", "4K"], "`kvferry bench --help`"),
        (&["serve", "--block-size", "1000"], "`kvferry serve --help`"),
        (&["demo", "--total-bytes", "many"], "`kvferry demo --help`"),
        (&["doctor", "--other", "x"], "`kvferry doctor --help`"),
        (&["fly"], "`kvferry --help`"),
        (&[], "`kvferry --help`"),
    ] {
        assert_one_line(&kvferry(args), 2, &[help]);
    }
}

#[test]
fn one_rule_and_one_sentence_hold_for_all_sizes() {
    for bad in ["1.5M", "64Kbib", "x"] {
        let fault = format!("down@{bad}");
        for args in [
            &["serve", "--block-size", bad][..],
            &["bench", "--total-bytes", bad],
            &["pull", "--from", "127.0.0.1:1", "--fault", &fault],
        ] {
            assert_one_line(&kvferry(args), 2, &[&format!("{bad:?} is not a size: write a whole number of bytes")]);
        }
    }
    assert_one_line(&kvferry(&["serve", "--block-size", "0"]), 2, &["positive"]);
    assert_one_line(&kvferry(&["pull", "--from", "127.0.0.1:1", "--fault", "throttle=0"]), 2, &["positive"]);
}

/// The commands, small, with a producer to pull from.
fn commands(from: &str) -> Vec<Vec<&str>> {
    let bench =
        ["bench", "--lane", "tcp", "--total-bytes", "1M", "--iterations", "1", "--warmup", "0", "--connect", from];
    vec![
        vec!["--help"],
        vec!["--version"],
        vec!["pull", "--help"],
        vec!["pull", "--from", from, "--blocks", "8"],
        vec!["pull", "--from", from, "--blocks", "8", "--json"],
        bench.to_vec(),
        [&bench[..], &["--json"]].concat(),
        vec!["doctor"],
        vec!["doctor", "--json"],
        vec!["demo", "--total-bytes", "100M"],
    ]
}

#[test]
fn a_closed_or_full_output_is_no_panic() {
    let views = "4096,16384,65536,262144,1048576";
    let producer = serve(&["--blocks", "64", "--regions", "1", "--block-size", "1M", "--views", views]);
    let full = || OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut all = commands(&producer.ready.listen);
    all.push(vec!["serve", "--listen", "127.0.0.1:0", "--blocks", "8"]);
    all.push(vec!["serve", "--listen", "127.0.0.1:0", "--blocks", "8", "--json"]);
    for args in &all {
        let out = Command::new(KVFERRY).args(args).stdout(full()).output().unwrap();
        let text = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{args:?}: {text}");
        assert!(text.contains("cannot write to standard output") && !text.contains("panicked"), "{args:?}: {text}");
    }
    for args in commands(&producer.ready.listen) {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let out = Command::new(KVFERRY).args(&args).stdout(writer).output().unwrap();
        let text = String::from_utf8_lossy(&out.stderr);
        // The demo keeps a promise of 100 ms, which a loaded machine may break.
        let codes: &[i32] = if ["demo", "doctor"].contains(&args[0]) { &[0, 1] } else { &[0] };
        assert!(out.status.code().is_some_and(|c| codes.contains(&c)), "{args:?}: {} {text}", out.status);
        assert!(!text.contains("panicked"), "{args:?}: {text}");
    }
    // A closed standard error too.
    for args in [&["fly"][..], &["pull", "--from", "127.0.0.1:1"], &["serve", "--listen", &producer.ready.listen]] {
        let status = Command::new(KVFERRY).args(args).env("KVFERRY_LOG", "debug").stderr(full()).status().unwrap();
        assert!(status.code().is_some_and(|c| c == 1 || c == 2), "{args:?}: {status}");
    }
}

#[test]
fn a_file_that_cannot_be_written_is_found_before_the_run() {
    let bad = "/nonexistent/file";
    // Nothing listens there, so that a run would end with another error.
    let from = ["--from", "127.0.0.1:1"];
    for args in [
        &["bench", "--json", bad][..],
        &["bench", "--plot", bad],
        &["demo", "--json", bad],
        &["doctor", "--json", bad],
        &["serve", "--json", bad],
        &["serve", "--offer", bad],
        &["pull", from[0], from[1], "--json", bad],
        &["pull", from[0], from[1], "--json", "/proc"],
    ] {
        let file = args[args.len() - 1];
        assert_one_line(&kvferry(args), 1, &[&format!("cannot write {file}: ")]);
    }
    // Of a run that fails early, no empty file stays.
    let plot = scratch("plot.svg");
    let out = kvferry(&["bench", "--connect", "127.0.0.1:1", "--plot", plot.to_str().unwrap()]);
    assert_one_line(&out, 1, &["cannot reach"]);
    assert!(!plot.exists());
}

fn rows(path: &Path) -> Option<Vec<Value>> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

#[test]
fn the_file_of_a_benchmark_has_every_finished_row_after_ctrl_c() {
    let file = scratch("rows.json");
    fs::write(&file, "older text, longer than the first row: ".repeat(100)).unwrap();
    let path = file.to_str().unwrap();
    let flags = ["bench", "--lane", "tcp", "--total-bytes", "4M", "--start-block-size", "64K", "--iterations", "100"];
    let mut bench = Command::new(KVFERRY);
    bench.args(flags).args(["--json", path]).stdout(Stdio::null()).stderr(Stdio::null());
    let mut bench = Killed(bench.spawn().unwrap());
    until("a row is finished", || rows(&file).filter(|r| !r.is_empty()));
    let pid = rustix::process::Pid::from_child(&bench.0);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    bench.0.wait().unwrap();
    let rows = rows(&file).expect("a list of rows");
    assert_eq!(rows[0]["block_size"], 65536);
    for r in &rows {
        assert_eq!(r["version"], env!("CARGO_PKG_VERSION"));
        assert!(!r["host"].as_str().unwrap().is_empty());
        assert!(r["date"].as_str().unwrap().ends_with('Z'), "{r}");
    }
    fs::remove_file(file).unwrap();
}

#[test]
fn few_descriptors_are_one_sentence() {
    for limit in [12, 16, 32, 63] {
        for command in ["serve --listen 127.0.0.1:0", "pull --from 127.0.0.1:1", "bench", "demo"] {
            let script = format!("ulimit -n {limit} && exec {KVFERRY} {command}");
            let out = Command::new("sh").args(["-c", &script]).output().unwrap();
            assert_one_line(&out, 1, &["open files", "ulimit -n"]);
        }
    }
    let script = format!("ulimit -n 16 && exec {KVFERRY} doctor");
    let out = Command::new("sh").args(["-c", &script]).output().unwrap();
    assert!(String::from_utf8_lossy(&out.stdout).contains("16 allowed"));
    assert!(!String::from_utf8_lossy(&out.stderr).contains("panicked"));
}

#[test]
fn the_advice_for_an_address_fits_the_reason() {
    let producer = serve(&["--blocks", "8", "--regions", "1"]);
    for (listen, advice) in [
        (&*producer.ready.listen, "stop the process that holds it"),
        ("192.0.2.1:0", "`ip address`"),
        ("nowhere.invalid:0", "HOST:PORT"),
        ("127.0.0.1", "HOST:PORT"),
    ] {
        assert_one_line(&kvferry(&["serve", "--blocks", "8", "--listen", listen]), 1, &[listen, advice]);
    }
}

/// `unshare` with these flags, if this user may.
fn unshare(flags: &[&str]) -> Option<Command> {
    let works = Command::new("unshare").args(flags).arg("true").output().is_ok_and(|o| o.status.success());
    if !works {
        eprintln!("skipped: this user may not run `unshare {}`", flags.join(" "));
    }
    let mut command = Command::new("unshare");
    command.args(flags);
    works.then_some(command)
}

#[test]
fn a_benchmark_says_once_and_before_its_table_that_a_lane_cannot_work() {
    let Some(mut other) = unshare(&["--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"])
    else {
        return;
    };
    let at = format!("127.0.0.1:{}", free_port());
    let views = "4096,16384,65536";
    let flags = ["serve", "--listen", &at, "--blocks", "64", "--regions", "1", "--block-size", "64K", "--views", views];
    let _serve = Killed(other.arg(KVFERRY).args(flags).stdout(Stdio::null()).spawn().unwrap());
    until("it listens", || TcpStream::connect(&at).ok());
    let flags = "--total-bytes 1M --max-block-size 64K --iterations 1 --warmup 0";
    let script = format!("exec {KVFERRY} bench --connect {at} {flags} 2>&1");
    let out = Command::new("sh").args(["-c", &script]).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{text}");
    assert_eq!(text.matches("in other namespaces").count(), 1, "{text}");
    let lines: Vec<_> = text.lines().collect();
    let table = lines.iter().position(|l| l.starts_with("Lane")).expect("a table");
    assert_eq!(lines[table + 1..].len(), 3, "{text}");
    assert!(lines[table + 1..].iter().all(|l| l.starts_with("tcp ")), "{text}");
}

#[test]
fn the_demo_shows_every_promise() {
    let out = kvferry(&["demo", "--total-bytes", "100M", "--json"]);
    let v: Value = serde_json::from_slice(&out.stdout).expect("only JSON");
    let promises = v["promises"].as_array().unwrap();
    for name in ["exact", "fresh", "timely", "quiet", "frugal", "leak-free", "isolated", "healing"] {
        let shown = promises.iter().filter(|p| p["promise"] == name);
        // A loaded machine may break the 100 ms.
        assert!(shown.clone().count() > 0, "{name} is missing");
        assert!(name == "timely" || shown.clone().all(|p| p["held"] == true), "{v}");
    }
    assert_eq!(String::from_utf8_lossy(&out.stderr), "", "it warns of nothing that it does on purpose");
    let seen = promises.iter().find(|p| p["promise"] == "leak-free").unwrap()["seen"].as_str().unwrap();
    for word in ["offers released", "descriptors", "0 blocks", "0 leases", "iB"] {
        assert!(seen.contains(word), "{word}: {seen}");
    }
}

/// A pseudo-terminal: its master, and its other end.
fn terminal() -> (File, File) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
    let size = rustix::termios::Winsize { ws_row: 24, ws_col: 200, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&master, size).unwrap();
    (File::from(master), OpenOptions::new().read(true).write(true).open(name).unwrap())
}

#[test]
fn serve_shows_what_it_serves_on_a_terminal_and_nothing_elsewhere() {
    let at = format!("127.0.0.1:{}", free_port());
    let flags = ["serve", "--listen", &at, "--blocks", "64", "--regions", "1"];
    let pull = || assert!(kvferry(&["pull", "--from", &at]).status.success());
    let (mut master, end) = terminal();
    let shown = Command::new(KVFERRY).args(flags).stdout(end).spawn().unwrap();
    let mut shown = Killed(shown);
    let (tx, rx) = channel();
    thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(n @ 1..) = master.read(&mut bytes) {
            if tx.send(String::from_utf8_lossy(&bytes[..n]).into_owned()).is_err() {
                return;
            }
        }
    });
    let mut text = String::new();
    let mut read_until = |word: &str| {
        until(word, || {
            text.extend(rx.try_iter());
            text.contains(word).then_some(())
        });
    };
    read_until("no consumers | 0 offers with 0 blocks, 0 claims");
    pull();
    read_until("GB/s | 1 offers released");
    shown.0.kill().unwrap();
    shown.0.wait().unwrap();

    let child = Command::new(KVFERRY).args(flags).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    until("it listens", || TcpStream::connect(&at).ok());
    pull();
    // Longer than the second after which a terminal would show another line.
    thread::sleep(Duration::from_millis(1500));
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM).unwrap();
    let out = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("serving ") && !text.contains('\r'), "{text:?}");
    assert_eq!(String::from_utf8_lossy(&out.stderr), "");
}

#[test]
fn the_doctor_claims_nothing_about_what_it_cannot_read() {
    let Some(mut bare) = unshare(&["--user", "--map-root-user", "--mount"]) else { return };
    let script = format!("mount -t tmpfs none /proc && exec {KVFERRY} doctor --json");
    let out = bare.args(["sh", "-c", &script]).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    let found: Vec<Value> = serde_json::from_slice(&out.stdout).unwrap_or_else(|_| panic!("{text} {out:?}"));
    let of = |check: &str| found.iter().find(|f| f["check"] == check).unwrap_or_else(|| panic!("{check} in {text}"));
    for check in ["memory", "ptrace scope", "local lane, this side", "local lane, pools", "local lane, engine"] {
        assert_eq!(of(check)["status"], "WARN", "{text}");
        assert!(of(check)["found"].as_str().unwrap().contains("cannot read /proc"), "{text}");
        assert!(of(check)["advice"].as_str().unwrap().contains("mount"), "{text}");
    }
    assert_eq!(of("tcp lane")["status"], "OK", "{text}");
}

#[test]
fn two_doctors_say_whether_a_local_lane_can_work_between_them() {
    let ids = |findings: &[u8]| -> String {
        let found: Vec<Value> = serde_json::from_slice(findings).unwrap();
        let side = found.iter().find(|f| f["check"] == "local lane, this side").unwrap();
        side["found"].as_str().unwrap().to_owned()
    };
    let compared = |other: &str| -> Value {
        let out = kvferry(&["doctor", "--json", "--other", other]);
        let found: Vec<Value> = serde_json::from_slice(&out.stdout).unwrap();
        found.into_iter().find(|f| f["check"] == "local lane, both sides").unwrap()
    };
    let here = ids(&kvferry(&["doctor", "--json"]).stdout);
    assert_eq!(compared(&here)["status"], "OK");
    let Some(mut other) = unshare(&["--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]) else { return };
    let there = ids(&other.args([KVFERRY, "doctor", "--json"]).output().unwrap().stdout);
    let found = compared(&there);
    assert_eq!(found["status"], "WARN");
    assert!(found["found"].as_str().unwrap().contains("pid, user differ"), "{found}");
}
