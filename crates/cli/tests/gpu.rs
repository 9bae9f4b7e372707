//! The command line and GPU memory: on the stand-in for libcuda, and on hosts that lack a driver.
#![cfg(not(target_env = "musl"))]

use std::{
    ffi::{OsStr, OsString},
    path::PathBuf,
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use kvferry_testkit::serve::Serve;
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_kvferry");

/// A driver for child processes: the stand-in with these settings.
struct Standin {
    library: OsString,
    settings: OsString,
    /// Processes that share it share the GPUs.
    folder: PathBuf,
}

impl Standin {
    fn new(settings: &str) -> Self {
        let library = kvferry_cuda_standin::library();
        assert!(library.exists(), "{} is built with the tests", library.display());
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("kvferry-cli-gpu-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let settings = format!("dir={},{settings}", folder.display());
        Self { library: library.into(), settings: settings.into(), folder }
    }

    /// The loader returns the preloaded library for every later `dlopen("libcuda.so")`, which is the name inside it.
    fn environment(&self) -> [(&str, &OsStr); 2] {
        [("LD_PRELOAD", &self.library), ("KVFERRY_STANDIN", &self.settings)]
    }

    fn kvferry(&self, args: &[&str]) -> Output {
        Command::new(PROGRAM).args(args).envs(self.environment()).stdin(Stdio::null()).output().expect("it runs")
    }

    fn serve(&self, flags: &[&str]) -> Serve {
        let flags = [&["--listen", "127.0.0.1:0", "--blocks", "64", "--regions", "4"], flags].concat();
        Serve::start_with(PROGRAM, &flags, &self.environment()).expect("it serves")
    }

    /// The findings of the doctor, each as its check, status and text.
    fn doctor(&self) -> Vec<(String, String, String)> {
        findings(&self.kvferry(&["doctor", "--json"]))
    }
}

impl Drop for Standin {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn findings(out: &Output) -> Vec<(String, String, String)> {
    let found: Vec<Value> = serde_json::from_slice(&out.stdout).expect("a list of findings");
    let all = found.iter().map(|f| {
        let field = |name: &str| f[name].as_str().expect("a text").to_owned();
        assert_eq!(field("advice").is_empty(), field("status") == "OK", "{f}");
        (field("check"), field("status"), field("found"))
    });
    all.collect()
}

/// The findings of one check.
fn of<'a>(found: &'a [(String, String, String)], check: &str) -> Vec<(&'a str, &'a str)> {
    found.iter().filter(|f| f.0 == check).map(|f| (f.1.as_str(), f.2.as_str())).collect()
}

/// The command failed with this exit code, and one line with these words.
fn assert_one_line(out: &Output, code: i32, words: &[&str]) {
    let line = text(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{line}");
    assert_eq!(line.trim_end().lines().count(), 1, "{line}");
    assert!(line.starts_with("error: "), "{line}");
    for w in words {
        assert!(line.contains(w), "{w:?} is missing in {line:?}");
    }
}

/// A folder in which the libraries of drivers are unreadable files, so that none on this host is found.
struct NoDrivers(PathBuf);

impl NoDrivers {
    fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("kvferry-no-drivers-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        // cudarc tries these names and some more that no driver installs.
        for name in ["libcuda.so", "libcuda.so.1", "libcuda.so.12", "libcuda.so.11", "libibverbs.so.1"] {
            std::fs::write(folder.join(name), "not a library").unwrap();
        }
        Self(folder)
    }

    fn kvferry(&self, args: &[&str]) -> Output {
        let mut command = Command::new(PROGRAM);
        command.args(args).env("LD_LIBRARY_PATH", &self.0).env_remove("LD_PRELOAD").stdin(Stdio::null());
        command.output().expect("it runs")
    }
}

impl Drop for NoDrivers {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn one_binary_starts_on_a_host_without_drivers_and_says_what_it_lacks() {
    let linked = Command::new("ldd").arg(PROGRAM).output().expect("ldd runs");
    assert!(linked.status.success(), "{}", text(&linked.stderr));
    for library in ["libcuda", "libibverbs"] {
        assert!(!text(&linked.stdout).contains(library), "{}", text(&linked.stdout));
    }
    let host = NoDrivers::new();
    let out = host.kvferry(&["doctor", "--json"]);
    let found = findings(&out);
    let driver = of(&found, "GPU driver");
    assert_eq!(driver.len(), 1, "{found:?}");
    assert!(driver[0].0 == "WARN" && driver[0].1.contains("libcuda.so.1 is absent"), "{driver:?}");
    assert!(of(&found, "GPU").is_empty());
    let verbs = of(&found, "verbs lane");
    let words = if cfg!(feature = "verbs") { "libibverbs.so.1" } else { "not in this build" };
    assert!(verbs.len() == 1 && verbs[0].0 == "WARN" && verbs[0].1.contains(words), "{verbs:?}");
    assert_ne!(out.status.code(), None, "{}", text(&out.stderr));
    // Before anything is dialled or started.
    for command in [&["serve"][..], &["pull", "--from", "127.0.0.1:1"], &["bench"], &["demo"]] {
        let out = host.kvferry(&[command, &["--memory", "gpu"]].concat());
        assert_one_line(&out, 1, &["--memory gpu:0", "libcuda.so.1 is absent"]);
    }
}

#[test]
fn drivers_without_a_usable_gpu_get_a_sentence_each() {
    for (settings, words) in [
        ("stub=yes", "libcuda.so is a CUDA toolkit's stub"),
        ("nodevice=yes", "the CUDA driver finds no GPU"),
        ("version=11020", "supports CUDA 11.2: install a driver of CUDA 11.4"),
    ] {
        let host = Standin::new(settings);
        let found = host.doctor();
        let driver = of(&found, "GPU driver");
        assert!(driver.len() == 1 && driver[0].0 == "WARN" && driver[0].1.contains(words), "{settings}: {driver:?}");
        assert_one_line(&host.kvferry(&["pull", "--from", "127.0.0.1:1", "--memory", "gpu"]), 1, &[words]);
    }
}

#[test]
fn the_doctor_lists_each_gpu_and_pulls_into_it() {
    let found = Standin::new("devices=2").doctor();
    assert_eq!(of(&found, "GPU driver"), [("OK", "CUDA 12.8, visible GPUs: 2")]);
    let gpus = of(&found, "GPU");
    assert_eq!(gpus.len(), 2, "{found:?}");
    for (i, (status, line)) in gpus.iter().enumerate() {
        assert_eq!(*status, "OK", "{line}");
        let words = [&format!("{i}: Stand-in GPU {i}, GPU-"), "PCI ", "compute capability 9.0", "4.00 GiB"];
        assert!(words.iter().all(|w| line.contains(*w)), "{line}");
    }
    for check in ["GPU copies", "GPU sharing", "GPU pull, local", "GPU pull, tcp"] {
        assert!(of(&found, check).iter().map(|f| f.0).eq(["OK", "OK"]), "{found:?}");
    }
    // The stand-in's GPUs are on no PCI bus, and export no dmabuf.
    assert!(of(&found, "GPU window (BAR1)")[0].1.contains("unknown"), "{found:?}");
    assert!(of(&found, "GPU and NICs")[0].1.contains("dmabuf export no"), "{found:?}");
}

#[test]
fn the_doctor_tells_what_follows_from_a_gpus_attributes() {
    for (settings, check, status, words) in [
        ("dmabuf=1", "GPU and NICs", "OK", "reads land directly, without a flush"),
        ("dmabuf=1,ordering=0", "GPU and NICs", "OK", "reads land directly, with a flush"),
        ("dmabuf=1,ordering=0,flush=0", "GPU and NICs", "WARN", "reads land through the pinned ring"),
        ("kernel=no,batch=no", "GPU copies", "WARN", "no copy kernel"),
        ("oom_after=1K", "GPU", "WARN", "cannot be used"),
    ] {
        let found = Standin::new(settings).doctor();
        let found = of(&found, check);
        assert!(found.len() == 1 && found[0].0 == status && found[0].1.contains(words), "{settings}: {found:?}");
    }
}

#[test]
fn a_place_that_does_not_exist_is_named() {
    let host = Standin::new("devices=1");
    for command in [&["serve"][..], &["pull", "--from", "127.0.0.1:1"], &["bench"], &["demo"]] {
        let out = host.kvferry(&[command, &["--memory", "gpu:7"]].concat());
        assert_one_line(&out, 1, &["--memory gpu:7", "there is no GPU 7: 1 are visible"]);
        for bad in ["vram", "gpu:x"] {
            let out = host.kvferry(&[command, &["--memory", bad]].concat());
            assert_one_line(&out, 2, &[bad, "gpu:N"]);
        }
    }
    assert_one_line(&host.kvferry(&["serve", "--memory", "gpu", "--engine-memory"]), 2, &["--engine-memory"]);
    assert_one_line(&host.kvferry(&["bench", "--memory", "gpu", "--vs-raw"]), 2, &["--vs-raw"]);
    assert_one_line(&host.kvferry(&["bench", "--serve-memory", "gpu:7"]), 1, &["there is no GPU 7"]);
}

/// Pulls into GPU memory, and checks the whole record. Returns where the producer's pool lies.
fn pull_is_exact(host: &Standin, producer: &Serve, flags: &[&str]) -> Value {
    let pull = ["pull", "--from", &producer.ready.listen, "--memory", "gpu", "--deadline", "30s", "--json"];
    let out = host.kvferry(&[&pull[..], flags].concat());
    assert_eq!(out.status.code(), Some(0), "{flags:?}: {}", text(&out.stderr));
    let v: Value = serde_json::from_slice(&out.stdout).expect("only JSON");
    assert_eq!(v["loaded"], serde_json::json!([[0, 63]]), "{v}");
    assert_eq!((v["verified_bytes"].as_u64(), v["mismatched_bytes"].as_u64()), (v["bytes"].as_u64(), Some(0)), "{v}");
    assert_eq!((&v["memory"]["place"], &v["memory"]["name"]), (&"gpu".into(), &"Stand-in GPU 0".into()), "{v}");
    assert!(v["memory"]["uuid"].as_str().unwrap().starts_with("GPU-"), "{v}");
    v["peer_memory"].clone()
}

#[test]
fn a_pull_into_gpu_memory_is_exact_over_every_lane_and_way_to_copy() {
    let host = Standin::new("");
    for size in ["4K", "256K"] {
        let producer = host.serve(&["--block-size", size]);
        for copy in ["auto", "copies", "batch", "kernel"] {
            for lane in ["tcp", "local"] {
                let from = pull_is_exact(&host, &producer, &["--lane", lane, "--gpu-copy", copy]);
                assert_eq!(from, serde_json::json!({"place": "host", "name": null, "uuid": null}));
            }
        }
    }
}

#[test]
fn a_pull_between_gpu_memory_is_exact_over_every_lane_and_way_to_copy() {
    let host = Standin::new("");
    for size in ["4K", "256K"] {
        let producer = host.serve(&["--block-size", size, "--memory", "gpu"]);
        for copy in ["auto", "copies", "batch", "kernel"] {
            for lane in ["tcp", "local"] {
                let from = pull_is_exact(&host, &producer, &["--lane", lane, "--gpu-copy", copy]);
                assert_eq!((&from["place"], &from["name"]), (&"gpu".into(), &"Stand-in GPU 0".into()));
            }
        }
    }
}

#[test]
fn an_offer_from_a_file_leaves_the_producers_place_unknown() {
    let host = Standin::new("");
    let file = std::env::temp_dir().join(format!("kvferry-gpu-offer-{}.json", std::process::id()));
    let path = file.to_str().unwrap();
    let producer = host.serve(&["--block-size", "4K", "--offer", path]);
    assert_eq!(pull_is_exact(&host, &producer, &["--offer", path]), Value::Null);
    std::fs::remove_file(&file).unwrap();
}

#[test]
fn the_demo_holds_its_promises_with_the_consumer_in_gpu_memory() {
    demo_holds("host");
}

/// The demo with the consumer's pool in GPU memory, and the producer's there.
fn demo_holds(served: &str) {
    let args = ["demo", "--total-bytes", "128M", "--memory", "gpu", "--serve-memory", served, "--json"];
    let out = Standin::new("").kvferry(&args);
    let v: Value = serde_json::from_slice(&out.stdout).expect("only JSON");
    assert_eq!((out.status.code(), &v["held"]), (Some(0), &Value::Bool(true)), "{v}");
    for pull in v["pulls"].as_array().unwrap() {
        assert_eq!((&pull["memory"]["place"], &pull["peer_memory"]["place"]), (&"gpu".into(), &served.into()));
    }
}

#[test]
fn the_demo_holds_its_promises_with_both_pools_in_gpu_memory() {
    demo_holds("gpu");
}

#[test]
fn rows_of_a_benchmark_name_the_places_of_both_pools() {
    let args =
        ["bench", "--lane", "tcp", "--total-bytes", "4M", "--start-block-size", "64K", "--max-block-size", "256K"];
    let more = ["--iterations", "1", "--warmup", "0", "--check-consistency", "--json"];
    let places = ["--memory", "gpu", "--serve-memory", "host"];
    let out = Standin::new("").kvferry(&[&args[..], &more, &places].concat());
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    let rows: Vec<Value> = serde_json::from_slice(&out.stdout).expect("a list of rows");
    assert_eq!(rows.len(), 2);
    for row in rows {
        assert_eq!((&row["memory"]["place"], &row["peer_memory"]["place"]), (&"gpu".into(), &"host".into()), "{row}");
    }
}
