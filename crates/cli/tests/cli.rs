//! The command line from the outside: exit codes, one-line errors, stable JSON.

mod common;

use std::{
    net::{TcpListener, TcpStream},
    process::Output,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use self::common::{assert_one_line, kvferry, serve};

#[test]
fn wrong_flags_are_usage_errors_of_one_line() {
    let cases: &[(&[&str], &[&str])] = &[
        (&[], &["--help"]),
        (&["fly"], &["fly", "--help"]),
        (&["pull"], &["--from"]),
        (&["pull", "--from", "not-an-address"], &["not-an-address", "HOST:PORT"]),
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

/// The one JSON object that a pull prints, with all documented fields.
fn pull_record(out: &Output) -> Value {
    let v: Value = serde_json::from_slice(&out.stdout).expect("only JSON");
    for field in [
        "result",
        "error",
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
        "setup_us",
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
    v
}

/// Number of positions in a list of ranges.
fn positions(set: &Value) -> u64 {
    set.as_array().unwrap().iter().map(|r| r[1].as_u64().unwrap() - r[0].as_u64().unwrap() + 1).sum()
}

#[test]
fn the_json_of_a_pull_has_the_documented_fields() {
    let producer = serve(&["--blocks", "64", "--regions", "3", "--block-size", "8K"]);
    for lane in ["tcp", "local", "auto"] {
        let out = kvferry(&["pull", "--from", &producer.ready.listen, "--lane", lane, "--blocks", "40", "--json"]);
        assert_eq!(out.status.code(), Some(0), "{}", String::from_utf8_lossy(&out.stderr));
        let v = pull_record(&out);
        assert_eq!((&v["result"], &v["error"]), (&Value::from("complete"), &Value::Null));
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
    let v = pull_record(&out);
    assert_eq!(v["result"], "incomplete");
    assert_eq!(v["invalid"], v["causes"]["deadline"]);
    assert_eq!(v["mismatched_bytes"], 0);
    assert_eq!(positions(&v["loaded"]) + positions(&v["invalid"]), 256);
    assert_eq!(v["verified_bytes"], positions(&v["loaded"]) * 4 * 65536);
}

#[test]
fn a_pull_prints_one_json_object_however_it_fails() {
    let producer = serve(&["--blocks", "8", "--regions", "1", "--block-size", "4K"]);
    let at = &producer.ready.listen;
    let file = std::env::temp_dir().join(format!("kvferry-bad-offer-{}.json", std::process::id()));
    std::fs::write(&file, "{}").unwrap();
    let cases: &[(&[&str], &str)] = &[
        (&["--from", "127.0.0.1:1"], "unreachable"),
        (&["--from", at, "--model", "other"], "refused"),
        (&["--from", at, "--blocks", "9"], "refused"),
        (&["--offer", file.to_str().unwrap()], "bad_offer"),
        (&["--offer", "/nonexistent/offer.json"], "bad_offer"),
    ];
    for (flags, result) in cases {
        let out = kvferry(&[&["pull", "--json"], *flags].concat());
        assert_eq!(out.status.code(), Some(1), "{flags:?}");
        let v = pull_record(&out);
        assert_eq!(v["result"], *result, "{v}");
        let line = String::from_utf8_lossy(&out.stderr);
        assert_eq!(line.trim_end(), format!("error: {}", v["error"].as_str().unwrap()));
        assert_eq!((&v["blocks"], &v["decided_us"], &v["ended_us"]), (&Value::from(0), &Value::Null, &Value::Null));
    }
    // To a file, the same.
    let to = file.to_str().unwrap();
    assert_eq!(kvferry(&["pull", "--from", "127.0.0.1:1", "--json", to]).status.code(), Some(1));
    let v: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(v["result"], "unreachable");
    std::fs::remove_file(&file).unwrap();
}

#[test]
fn other_commands_print_their_failure_as_json_too() {
    let producer = serve(&["--blocks", "8", "--regions", "1", "--block-size", "4K"]);
    let cases: &[(&[&str], &str, i32)] = &[
        (&["bench", "--connect", "127.0.0.1:1"], "unreachable", 1),
        (&["bench", "--connect", &producer.ready.listen, "--total-bytes", "4M", "--dtype", "float8"], "refused", 1),
        (&["bench", "--total-bytes", "4K"], "usage", 2),
        (&["serve", "--listen", &producer.ready.listen], "failed", 1),
    ];
    for (args, result, code) in cases {
        let out = kvferry(&[*args, &["--json"]].concat());
        assert_eq!(out.status.code(), Some(*code), "{args:?}");
        let v: Value = serde_json::from_slice(&out.stdout).expect("only JSON");
        assert_eq!(v["result"], *result, "{v}");
        assert!(!v["error"].as_str().unwrap().is_empty());
    }
}

#[test]
fn a_pull_that_will_not_end_is_reported_at_once_with_its_decision() {
    let producer = serve(&["--blocks", "256", "--regions", "4", "--block-size", "16K"]);
    let began = Instant::now();
    let pull = |fault| {
        let at = &producer.ready.listen;
        kvferry(&["pull", "--from", at, "--lane", "tcp", "--fault", fault, "--deadline", "700ms", "--json"])
    };
    let died = pull_record(&pull("panic@0"));
    assert_eq!(died["result"], "died");
    let out = pull("silent@4M,wedge");
    assert_eq!(out.status.code(), Some(1));
    let wedged = pull_record(&out);
    assert_eq!(wedged["result"], "wedged");
    assert!(wedged["error"].as_str().unwrap().contains("wedged"));
    assert_eq!(wedged["blocks"], 256);
    assert_eq!(positions(&wedged["loaded"]) + positions(&wedged["invalid"]), 256);
    assert_eq!(wedged["invalid"], wedged["causes"]["lane_failed"]);
    assert!(wedged["decided_us"].is_u64() && wedged["ended_us"].is_null(), "{wedged}");
    assert_eq!((&wedged["verified_bytes"], &wedged["mismatched_bytes"]), (&Value::from(0), &Value::from(0)));
    // Each waited for more than 30 s before.
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

/// Passes connections on to `to`. The first bytes of each wait for `delay`.
fn slow_proxy(to: String, delay: Duration) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        for near in listener.incoming().flatten() {
            let Ok(far) = TcpStream::connect(&to) else { return };
            for (mut from, mut into) in [(near.try_clone(), far.try_clone()), (far.try_clone(), near.try_clone())]
                .map(|(a, b)| (a.unwrap(), b.unwrap()))
            {
                thread::spawn(move || {
                    thread::sleep(delay);
                    let _ = std::io::copy(&mut from, &mut into);
                    let _ = into.shutdown(std::net::Shutdown::Write);
                });
            }
        }
    });
    addr
}

#[test]
fn one_deadline_covers_hello_the_offer_and_the_pull() {
    let file = std::env::temp_dir().join(format!("kvferry-slow-offer-{}.json", std::process::id()));
    let file = file.to_str().unwrap();
    let producer = serve(&["--blocks", "8", "--regions", "1", "--block-size", "4K", "--offer", file]);
    let proxy = slow_proxy(producer.ready.listen.clone(), Duration::from_millis(600));
    // Each step alone is within the deadline; together they are not.
    let began = Instant::now();
    let out = kvferry(&["pull", "--from", &proxy, "--deadline", "1s", "--json"]);
    // A deadline for each step would let the pull complete.
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    let v = pull_record(&out);
    assert_eq!(v["result"], "unreachable", "{v}");
    // The pull gets what Hello has left.
    let text = std::fs::read_to_string(file).unwrap().replace(&producer.ready.listen, &proxy);
    std::fs::write(file, text).unwrap();
    let out = kvferry(&["pull", "--offer", file, "--deadline", "1s", "--json"]);
    let v = pull_record(&out);
    assert_eq!((&v["result"], out.status.code()), (&Value::from("incomplete"), Some(3)), "{v}");
    let decided = v["setup_us"].as_u64().unwrap() + v["decided_us"].as_u64().unwrap();
    assert!(decided < 1_550_000, "1 s, and slack below the second deadline's end at 1.6 s: {v}");
    assert_eq!(v["deadline_us"], 1_000_000);
    std::fs::remove_file(file).unwrap();
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
            "version",
            "host",
            "date",
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

#[test]
fn a_pull_connects_only_to_listed_hosts() {
    let producer = serve(&["--blocks", "8", "--regions", "1", "--block-size", "4K"]);
    let pull = |dial| kvferry(&["pull", "--from", &producer.ready.listen, "--dial", dial, "--json"]);
    assert_eq!(pull_record(&pull("127.0.0.0/8,.prefill.example"))["result"], "complete");
    let out = pull("10.0.0.0/8,.prefill.example");
    assert_eq!(out.status.code(), Some(1));
    let record = pull_record(&out);
    assert_eq!(record["result"], "refused");
    assert!(record["error"].as_str().unwrap().contains("`dial` does not list it"), "{record}");
    let out = pull("10.0.0.0/99");
    assert_eq!(out.status.code(), Some(2), "wrong usage");
}

#[test]
fn a_pull_with_a_seal_key_takes_only_offers_that_the_key_has_sealed() {
    let dir = std::env::temp_dir().join(format!("kvferry-seal-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let file = |name: &str, text: String| {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (key, other) = (file("key", "a".repeat(32) + "\n"), file("other", "b".repeat(32)));
    let offer = dir.join("offer.json").to_str().unwrap().to_owned();
    let flags = ["--blocks", "8", "--regions", "1", "--block-size", "4K", "--seal-key", &key, "--offer", &offer];
    let _producer = serve(&flags);
    let pull = |offer: &str, keys: &str| kvferry(&["pull", "--offer", offer, "--seal-key", keys, "--json"]);
    let elsewhere = std::fs::read_to_string(&offer).unwrap().replace("127.0.0.1:", "127.0.0.2:");
    let elsewhere = file("elsewhere.json", elsewhere);
    for bad in [pull(&offer, &other), pull(&elsewhere, &key)] {
        assert_eq!(pull_record(&bad)["result"], "bad_offer");
        assert!(pull_record(&bad)["error"].as_str().unwrap().contains("seal does not fit"));
    }
    assert_eq!(pull_record(&pull(&offer, &format!("{other},{key}")))["result"], "complete");
    assert_eq!(kvferry(&["pull", "--offer", &offer, "--seal-key", "/nowhere"]).status.code(), Some(2));
}
