//! The command line from the outside: exit codes, one-line errors, stable JSON.

use std::process::{Command, Output, Stdio};

use kvferry_testkit::serve::Serve;
use serde_json::Value;

fn kvferry(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvferry")).args(args).stdin(Stdio::null()).output().expect("it runs")
}

fn serve(flags: &[&str]) -> Serve {
    let flags = [&["--listen", "127.0.0.1:0"], flags].concat();
    Serve::start(env!("CARGO_BIN_EXE_kvferry"), &flags).expect("it serves")
}

/// The command failed with this exit code, and printed one line with these words on standard error.
fn assert_one_line(out: &Output, code: i32, words: &[&str]) {
    let text = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{text}");
    assert_eq!(text.trim_end().lines().count(), 1, "{text}");
    assert!(text.starts_with("error: "), "{text}");
    assert!(!text.contains("panicked") && !text.contains("backtrace"), "{text}");
    for w in words {
        assert!(text.contains(w), "{w:?} is missing in {text:?}");
    }
}

#[test]
fn wrong_flags_are_usage_errors_of_one_line() {
    let cases: &[(&[&str], &[&str])] = &[
        (&[], &["--help"]),
        (&["fly"], &["fly", "--help"]),
        (&["pull"], &["--from"]),
        (&["pull", "--from", "127.0.0.1:1", "--deadline", "soon"], &["soon", "5s"]),
        (&["pull", "--from", "127.0.0.1:1", "--lane", "pigeon"], &["pigeon"]),
        (&["pull", "--from", "127.0.0.1:1", "--blocks", "0"], &["0"]),
        (&["pull", "--from", "127.0.0.1:1", "--fault", "explode"], &["explode", "down@BYTES"]),
        (&["serve", "--block-size", "1000"], &["1000", "512"]),
        (&["serve", "--blocks", "many"], &["many"]),
        (&["serve", "--engine", ""], &["engine"]),
        (&["bench", "--start-block-size", "1M", "--max-block-size", "4K"], &["--start-block-size"]),
        (&["bench", "--total-bytes", "4K"], &["--total-bytes"]),
        (&["demo", "--total-bytes", "1M"], &["--total-bytes"]),
    ];
    for (args, words) in cases {
        assert_one_line(&kvferry(args), 2, words);
    }
}

#[test]
fn a_failed_command_prints_one_line_and_exits_with_1() {
    let producer = serve(&["--blocks", "8", "--regions", "1", "--block-size", "4K"]);
    assert_one_line(
        &kvferry(&["serve", "--listen", &producer.ready.listen]),
        1,
        &[&producer.ready.listen, "another port"],
    );
    assert_one_line(&kvferry(&["serve", "--listen", "nowhere.invalid:1"]), 1, &["nowhere.invalid:1"]);
    let huge = ["serve", "--listen", "127.0.0.1:0", "--blocks", "4000000000", "--regions", "64", "--block-size", "1M"];
    assert_one_line(&kvferry(&huge), 1, &["bytes", "fewer"]);
    assert_one_line(&kvferry(&["pull", "--from", "127.0.0.1:1"]), 1, &["127.0.0.1:1", "producer"]);
    assert_one_line(&kvferry(&["pull", "--from", "not-an-address"]), 1, &["not-an-address"]);
    assert_one_line(
        &kvferry(&["pull", "--from", &producer.ready.listen, "--model", "other"]),
        1,
        &["model", "other", "pattern"],
    );
    assert_one_line(
        &kvferry(&["pull", "--from", &producer.ready.listen, "--dtype", "float8"]),
        1,
        &["dtype", "float8", "uint8"],
    );
    assert_one_line(&kvferry(&["pull", "--from", &producer.ready.listen, "--blocks", "9"]), 1, &["9", "8"]);
    assert_one_line(&kvferry(&["pull", "--offer", "/nonexistent/offer.json"]), 1, &["/nonexistent/offer.json"]);
    let dir = std::env::temp_dir().join(format!("kvferry-cli-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let bad = dir.join("offer.json");
    for text in ["", "{}", "[1,2", "{\"id\":\"x\"}", "\u{0}"] {
        std::fs::write(&bad, text).unwrap();
        assert_one_line(&kvferry(&["pull", "--offer", bad.to_str().unwrap()]), 1, &["offer"]);
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn unavailable_verbs_are_an_error_before_anything_else_happens() {
    for command in [&["serve"][..], &["pull", "--from", "127.0.0.1:1"], &["bench"], &["demo"]] {
        for flags in [&["--device", "nosuch0"][..], &["--rails", "nosuch0:1,nosuch1:1"]] {
            let out = kvferry(&[command, flags].concat());
            assert_one_line(&out, 1, &[]);
            let text = String::from_utf8_lossy(&out.stderr);
            let reasons = ["--features verbs", "libibverbs.so.1", "has no RDMA device", "no RDMA device \"nosuch0\""];
            assert!(reasons.iter().any(|w| text.contains(w)), "{command:?} {flags:?}: {text}");
        }
    }
}

#[test]
fn the_json_of_a_pull_has_the_documented_fields() {
    let producer = serve(&["--blocks", "64", "--regions", "3", "--block-size", "8K"]);
    for lane in ["tcp", "local", "auto"] {
        let out = kvferry(&["pull", "--from", &producer.ready.listen, "--lane", lane, "--blocks", "40", "--json"]);
        assert_eq!(out.status.code(), Some(0), "{}", String::from_utf8_lossy(&out.stderr));
        let v: Value = serde_json::from_slice(&out.stdout).expect("only JSON");
        for field in [
            "offer",
            "request",
            "lane",
            "blocks",
            "loaded",
            "invalid",
            "causes",
            "verified_bytes",
            "mismatched_bytes",
            "bytes",
            "hello_us",
            "claim_us",
            "first_us",
            "data_us",
            "decided_us",
            "ended_us",
            "deadline_us",
            "retries",
            "peer",
        ] {
            assert!(v.get(field).is_some(), "{field} is missing in {v}");
        }
        assert_eq!(v["blocks"], 40);
        assert_eq!(v["loaded"], serde_json::json!([[0, 39]]));
        assert_eq!(v["invalid"], serde_json::json!([]));
        assert_eq!(v["causes"], serde_json::json!({}));
        assert_eq!(v["verified_bytes"], 40 * 3 * 8192);
        assert_eq!((&v["mismatched_bytes"], &v["bytes"]), (&Value::from(0), &Value::from(40 * 3 * 8192)));
        assert_eq!(v["deadline_us"], 5_000_000);
        assert_eq!(v["peer"]["engine"], "serve");
        assert_eq!(v["peer"]["incarnation"], producer.ready.incarnation);
        let order: Vec<u64> = ["claim_us", "first_us", "data_us", "decided_us", "ended_us"]
            .iter()
            .map(|f| v[f].as_u64().unwrap())
            .collect();
        assert!(order.is_sorted(), "{v}");
    }
}

#[test]
fn an_offer_in_a_file_can_be_pulled_once() {
    let file = std::env::temp_dir().join(format!("kvferry-offer-{}.json", std::process::id()));
    let file = file.to_str().unwrap();
    let producer = serve(&["--blocks", "32", "--regions", "2", "--block-size", "4K", "--offer", file]);
    let first = kvferry(&["pull", "--offer", file, "--json"]);
    assert_eq!(first.status.code(), Some(0), "{}", String::from_utf8_lossy(&first.stderr));
    let second = kvferry(&["pull", "--offer", file, "--json"]);
    assert_eq!(second.status.code(), Some(3), "{}", String::from_utf8_lossy(&second.stderr));
    let v: Value = serde_json::from_slice(&second.stdout).expect("JSON");
    assert_eq!(v["causes"], serde_json::json!({"released": [[0, 31]]}));
    drop(producer);
    std::fs::remove_file(file).unwrap();
}

#[test]
fn invalid_blocks_exit_with_3_and_have_a_cause() {
    let producer = serve(&["--blocks", "256", "--regions", "4", "--block-size", "64K"]);
    let args = [
        "pull",
        "--from",
        &producer.ready.listen,
        "--lane",
        "tcp",
        "--fault",
        "throttle=32M",
        "--deadline",
        "600ms",
        "--json",
    ];
    let out = kvferry(&args);
    assert_eq!(out.status.code(), Some(3), "{}", String::from_utf8_lossy(&out.stderr));
    let v: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!(v["invalid"], v["causes"]["deadline"]);
    assert_eq!(v["mismatched_bytes"], 0);
    let n = |set: &Value| -> u64 {
        set.as_array().unwrap().iter().map(|r| r[1].as_u64().unwrap() - r[0].as_u64().unwrap() + 1).sum()
    };
    assert_eq!(n(&v["loaded"]) + n(&v["invalid"]), 256);
    assert_eq!(v["verified_bytes"], n(&v["loaded"]) * 4 * 65536);
}

#[test]
fn a_benchmark_row_has_the_documented_fields() {
    let args = [
        "bench",
        "--lane",
        "tcp",
        "--total-bytes",
        "4M",
        "--start-block-size",
        "64K",
        "--max-block-size",
        "256K",
        "--iterations",
        "2",
        "--warmup",
        "0",
        "--vs-raw",
        "--check-consistency",
        "--json",
    ];
    let out = kvferry(&args);
    assert_eq!(out.status.code(), Some(0), "{}", String::from_utf8_lossy(&out.stderr));
    let rows: Vec<Value> = serde_json::from_slice(&out.stdout).expect("a list of rows");
    assert_eq!(rows.iter().map(|r| r["block_size"].as_u64().unwrap()).collect::<Vec<_>>(), [65536, 262144]);
    for r in &rows {
        for field in [
            "lane",
            "op",
            "block_size",
            "blocks",
            "gb_per_s",
            "raw_gb_per_s",
            "raw_ratio",
            "lat_us",
            "prep_us",
            "post_us",
        ] {
            assert!(r.get(field).is_some(), "{field} is missing in {r}");
        }
        for rate in ["gb_per_s", "raw_gb_per_s", "raw_ratio"] {
            assert!(r[rate].as_f64().unwrap() > 0.0, "{rate}");
        }
        for p in ["avg", "p50", "p99"] {
            assert!(r["lat_us"][p].as_f64().unwrap() > 0.0);
        }
    }
}

#[test]
fn the_doctor_gives_a_remedy_for_every_problem() {
    let out = kvferry(&["doctor", "--json"]);
    let found: Vec<Value> = serde_json::from_slice(&out.stdout).expect("a list of findings");
    assert!(found.len() >= 8);
    for f in &found {
        let status = f["status"].as_str().unwrap();
        assert!(["OK", "WARN", "FAIL"].contains(&status), "{f}");
        assert_eq!(f["advice"].as_str().unwrap().is_empty(), status == "OK", "{f}");
    }
    let failed = found.iter().any(|f| f["status"] == "FAIL");
    assert_eq!(out.status.code(), Some(i32::from(failed)));
}
