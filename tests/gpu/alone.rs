//! A test in a process of its own, with settings of the stand-in.

use std::process::Command;

use kvferry_cuda_standin::Control;
use kvferry_testkit::gpu;

const CHILD: &str = "KVFERRY_TEST_ALONE";

/// Whether this is the process of the test `name`. If not, runs it in one, with these settings of the stand-in and, for the
/// test rig, pools in this place; and fails if the test fails.
pub(crate) fn in_own_process(name: &str, standin: &str, place: Option<&str>) -> bool {
    if std::env::var(CHILD).as_deref() == Ok(name) {
        gpu::driver();
        return true;
    }
    let done = Command::new(std::env::current_exe().expect("this binary has a path"))
        .args(["--exact", name, "--nocapture", "--include-ignored", "--test-threads=1"])
        .env(CHILD, name)
        .env("KVFERRY_STANDIN", standin)
        .envs(place.map(|p| ("KVFERRY_TEST_MEMORY", p)))
        .output()
        .expect("this binary can run");
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    out.lines().filter(|l| l.contains("figure ")).for_each(|l| println!("{l}"));
    assert!(done.status.success(), "{name} in its own process: {}\n{out}\n{err}", done.status);
    // A name that matches no test would pass otherwise.
    assert!(out.contains("1 passed"), "{name} is not a test: {out}");
    false
}

/// The stand-in's controls, in the process of a test that cannot run on a real GPU.
pub(crate) fn standin() -> Option<Control> {
    gpu::driver()
}

/// Runs the rest of a test in a process of its own.
macro_rules! alone {
    ($name:expr) => {
        alone!($name, "memory=1G", None)
    };
    ($name:expr, $standin:expr, $place:expr) => {
        if !$crate::alone::in_own_process($name, $standin, $place) {
            return;
        }
    };
}

/// As [`alone!`], and gives the stand-in's controls; skips the test on a real GPU.
macro_rules! on_standin {
    ($name:expr) => {
        on_standin!($name, "memory=1G")
    };
    ($name:expr, $standin:expr) => {
        on_standin!(@ $name, $standin, None)
    };
    ($name:expr, $standin:expr, $place:expr) => {
        on_standin!(@ $name, $standin, Some($place))
    };
    (@ $name:expr, $standin:expr, $place:expr) => {{
        if kvferry_testkit::gpu::is_real() {
            // tests/gpu/run lists them.
            println!("left out on a real GPU: {}", $name);
            return;
        }
        alone!($name, $standin, $place);
        $crate::alone::standin().expect("the stand-in is loaded")
    }};
}

pub(crate) use {alone, on_standin};
