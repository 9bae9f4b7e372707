//! Runs the command line.

use std::process::{Command, Output, Stdio};

use kvferry_testkit::serve::Serve;

pub(crate) fn kvferry(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvferry")).args(args).stdin(Stdio::null()).output().expect("it runs")
}

pub(crate) fn serve(flags: &[&str]) -> Serve {
    let flags = [&["--listen", "127.0.0.1:0"], flags].concat();
    Serve::start(env!("CARGO_BIN_EXE_kvferry"), &flags).expect("it serves")
}

/// The command failed with this exit code, and printed one line with these words on standard error.
pub(crate) fn assert_one_line(out: &Output, code: i32, words: &[&str]) {
    let text = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{text}");
    assert_eq!(text.trim_end().lines().count(), 1, "{text}");
    assert!(text.starts_with("error: "), "{text}");
    assert!(!text.contains("panicked") && !text.contains("backtrace"), "{text}");
    for w in words {
        assert!(text.contains(w), "{w:?} is missing in {text:?}");
    }
}
