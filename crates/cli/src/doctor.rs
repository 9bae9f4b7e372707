//! `kvferry doctor`: checks this machine. Where possible, a check tries the real operation.

mod gpu;
mod host;
mod pci;

use std::{process::ExitCode, time::Duration};

use kvferry::{Consumer, GroupId, LaneKind, Memory};
use kvferry_testkit::serve::Serve;
use serde::Serialize;

use crate::{
    args::{self, JsonArg, ModelArgs},
    out::say,
    peer::{self, Peer},
    pool::PoolPlace,
    report::{Failure, size},
};

/// Flags of `doctor`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// The line "local lane, this side" that `kvferry doctor` prints in another container: says whether the local lane can work
    /// between the two.
    #[arg(long, value_name = "IDS", value_parser = host::parse)]
    other: Option<String>,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
enum Status {
    Ok,
    Warn,
    Fail,
}

/// One check.
#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    status: Status,
    found: String,
    /// The remedy; empty if the check is OK.
    advice: String,
}

impl Finding {
    fn new(check: &'static str, status: Status, found: impl Into<String>, advice: &str) -> Self {
        let advice = if status == Status::Ok { String::new() } else { advice.into() };
        Self { check, status, found: found.into(), advice }
    }
}

/// Runs all checks. The exit code is 1 if one failed.
pub(crate) fn run(args: Args) -> Result<ExitCode, Failure> {
    let mut findings = vec![cores(), memory(), files(), memfd(), huge_pages(), shared_huge_pages(), ptrace(), pidfd()];
    findings.extend(host::findings(args.other.as_deref()));
    findings.extend(lanes());
    findings.extend(verbs());
    findings.extend(gpu::findings());
    if args.json.text() {
        for f in &findings {
            let status = format!("{:?}", f.status).to_uppercase();
            say!("{status:<5} {:<22} {}", f.check, f.found);
            if !f.advice.is_empty() {
                say!("      {:<22} -> {}", "", f.advice);
            }
        }
    }
    args.json.write(&findings)?;
    let failed = findings.iter().any(|f| f.status == Status::Fail);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn cores() -> Finding {
    let n = std::thread::available_parallelism().map_or(1, usize::from);
    let status = if n >= 2 { Status::Ok } else { Status::Warn };
    Finding::new(
        "cores",
        status,
        format!("{n}"),
        "a transfer needs one core beside the engine's on each side: provide two",
    )
}

/// A setting of the system that cannot be read, so that there is nothing to advise but that.
fn unreadable(check: &'static str, path: &str) -> Finding {
    let mount = if path.starts_with("/proc") { "mount -t proc proc /proc" } else { "mount -t sysfs sysfs /sys" };
    let advice = format!("if this kernel has the setting, make it readable: {mount}");
    Finding::new(check, Status::Warn, format!("unknown: cannot read {path}"), &advice)
}

fn memory() -> Finding {
    let Some(available) = args::available_memory() else { return unreadable("memory", "/proc/meminfo") };
    let status = if available >= 1 << 30 { Status::Ok } else { Status::Warn };
    let found = format!("{} available", size(available));
    Finding::new("memory", status, found, "the demo needs 2 GiB: use --total-bytes 100M")
}

fn files() -> Finding {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let soft = limit.current.unwrap_or(u64::MAX);
    let status = if soft >= 4096 { Status::Ok } else { Status::Warn };
    Finding::new(
        "open files",
        status,
        format!("{soft} allowed"),
        "each peer needs two descriptors or more: use `ulimit -n 65536` for a thousand peers",
    )
}

fn memfd() -> Finding {
    match Memory::alloc(&[1 << 20]) {
        Ok(_) => Finding::new("shared pools", Status::Ok, "memfds can be created and sealed", ""),
        Err(e) => Finding::new(
            "shared pools",
            Status::Fail,
            e.to_string(),
            "allow memfd_create (a seccomp filter may forbid it), or pass your own memory",
        ),
    }
}

/// Compares the selected word of a setting such as `always [madvise] never` with good ones.
fn setting(check: &'static str, path: &str, good: &[&str], advice: &str) -> Finding {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let Some(word) = text.split(['[', ']']).nth(1) else { return unreadable(check, path) };
    let status = if good.contains(&word) { Status::Ok } else { Status::Warn };
    Finding::new(check, status, word, &format!("{advice} > {path}"))
}

fn huge_pages() -> Finding {
    let advice = "small blocks are copied up to twice as fast from huge pages: echo madvise";
    setting("huge pages", "/sys/kernel/mm/transparent_hugepage/enabled", &["always", "madvise"], advice)
}

fn shared_huge_pages() -> Finding {
    let path = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let advice = "pools that kvferry allocates get no huge pages: echo advise";
    setting("huge pages in pools", path, &["always", "within_size", "advise", "force"], advice)
}

fn ptrace() -> Finding {
    let Ok(text) = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope") else {
        // A kernel without Yama has the folder, and not the file.
        return match std::path::Path::new("/proc/sys/kernel").is_dir() {
            true => Finding::new("ptrace scope", Status::Ok, "not restricted", ""),
            false => unreadable("ptrace scope", "/proc/sys/kernel"),
        };
    };
    let scope = text.trim().to_owned();
    let status = if scope == "0" { Status::Ok } else { Status::Warn };
    Finding::new(
        "ptrace scope",
        status,
        scope,
        "the local lane cannot read an engine's own memory: sysctl kernel.yama.ptrace_scope=0, give CAP_SYS_PTRACE, or use pools that kvferry allocates",
    )
}

fn pidfd() -> Finding {
    match rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty()) {
        Ok(_) => Finding::new("pidfd", Status::Ok, "works", ""),
        Err(e) => Finding::new(
            "pidfd",
            Status::Fail,
            e.to_string(),
            "the local lane needs Linux 5.3 or newer; use --lane tcp",
        ),
    }
}

#[cfg(not(feature = "verbs"))]
fn verbs() -> Vec<Finding> {
    let advice = "pulls use local or tcp; build with the feature `verbs` for RDMA";
    vec![Finding::new("verbs lane", Status::Warn, "not in this build", advice)]
}

/// Devices, ports, addresses and memory registration, and a small pull.
#[cfg(feature = "verbs")]
fn verbs() -> Vec<Finding> {
    use kvferry::verbs::{Dmabuf, LinkLayer, survey};

    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    let mut found = vec![Finding::new(
        "locked memory",
        if limit.is_none() { Status::Ok } else { Status::Warn },
        limit.map_or("unlimited".into(), |l| format!("{} without CAP_IPC_LOCK", size(l))),
        "verbs lock pools in memory: use `ulimit -l unlimited` or LimitMEMLOCK=infinity",
    )];
    let devices = match survey() {
        Ok(devices) => devices,
        Err(e) => {
            found.push(Finding::new("verbs lane", Status::Warn, e.to_string(), "pulls use local or tcp instead"));
            return found;
        }
    };
    for (name, report) in devices {
        let report = match report {
            Ok(r) => r,
            Err(e) => {
                found.push(Finding::new("verbs device", Status::Warn, format!("{name}: {e}"), "pulls do not use it"));
                continue;
            }
        };
        let l = report.limits;
        let can = |tried: &Result<(), std::io::Error>| match tried {
            Ok(()) => "yes".to_owned(),
            Err(e) => format!("no ({e})"),
        };
        let line = format!(
            "{name}: {} READs in flight as reader, {} as responder; relaxed ordering {}, ODP {}, dmabuf {}",
            l.max_rd_atomic,
            l.max_dest_rd_atomic,
            match &report.relaxed_ordering {
                Ok(()) => "accepted (a device without it ignores it)".into(),
                tried => can(tried),
            },
            can(&report.odp),
            match &report.dmabuf {
                Dmabuf::Tried(tried) => can(tried),
                Dmabuf::NotTried(reason) => format!("supported by its driver, not tried ({reason})"),
            },
        );
        let good = if report.register.is_ok() { Status::Ok } else { Status::Warn };
        found.push(Finding::new("verbs device", good, line, "memory registration failed: see locked memory above"));
        for p in report.ports {
            let layer = match p.port.link_layer {
                Some(LinkLayer::InfiniBand) => format!("InfiniBand, LID {}", p.port.lid),
                Some(LinkLayer::Ethernet) => "RoCE".into(),
                None => "another link layer".into(),
            };
            let gids: Vec<_> =
                p.gids.iter().map(|g| format!("{}{g}", if p.chosen == Some(g.index) { "*" } else { "" })).collect();
            let reachable = p.port.link_layer == Some(LinkLayer::InfiniBand) || p.chosen.is_some();
            let status = if p.port.active && reachable { Status::Ok } else { Status::Warn };
            let line = format!(
                "{name}:{} {}, {layer}, MTU {}, GIDs {}",
                p.port.number,
                p.port.state,
                p.port.mtu,
                if gids.is_empty() { "none".into() } else { gids.join(", ") },
            );
            let advice = if p.port.active {
                "no RoCE v2 GID: give the port's network interface an IP address"
            } else {
                "check the cable and the switch, and use `ip link set up`"
            };
            found.push(Finding::new("verbs port", status, line, advice));
        }
    }
    let advice = "pulls use local or tcp instead; see the log (KVFERRY_LOG=info)";
    found.push(match try_lane(LaneKind::Verbs, true, PoolPlace::Host) {
        Ok(line) => Finding::new("verbs lane", Status::Ok, line, ""),
        Err(e) => Finding::new("verbs lane", Status::Warn, e.message, advice),
    });
    found
}

/// Small pulls from a producer process on this machine, over each lane and kind of memory.
fn lanes() -> Vec<Finding> {
    let lanes = [
        ("local lane, pools", LaneKind::Local, false, "pulls use tcp instead; see the log (KVFERRY_LOG=info)"),
        ("local lane, engine", LaneKind::Local, true, "pulls use tcp instead; see ptrace scope above"),
        (
            "tcp lane",
            LaneKind::Tcp,
            false,
            "every setup needs it: check that loopback is up and that this user may listen",
        ),
    ];
    lanes
        .into_iter()
        .map(|(check, lane, engine_memory, advice)| {
            let bad = if lane == LaneKind::Tcp { Status::Fail } else { Status::Warn };
            if lane == LaneKind::Local && !std::path::Path::new("/proc/self/ns").is_dir() {
                return unreadable(check, "/proc/self/ns");
            }
            match try_lane(lane, engine_memory, PoolPlace::Host) {
                Ok(found) => Finding::new(check, Status::Ok, found, ""),
                Err(e) => Finding::new(check, bad, e.message, advice),
            }
        })
        .collect()
}

/// A small pull between two pools at `place`.
fn try_lane(lane: LaneKind, engine_memory: bool, place: PoolPlace) -> Result<String, Failure> {
    const BLOCKS: u32 = 64;
    let limit = Duration::from_secs(5);
    let mut flags: Vec<String> =
        ["--listen", "127.0.0.1:0", "--blocks", "64", "--regions", "4", "--block-size", "64K"].map(String::from).into();
    if engine_memory {
        flags.push("--engine-memory".into());
    }
    flags.extend(["--memory".into(), place.to_string()]);
    let serve = Serve::start(args::program(), &flags)?;
    let addr = &serve.ready.listen;
    let model = ModelArgs::default().model();
    let mut peer = Peer::probe(addr, &"doctor".parse()?, &model, limit)?;
    let layout = peer.local_layout(GroupId(0), BLOCKS)?;
    let memory = place.allocate(&layout, false)?;
    let consumer = Consumer::builder("doctor".parse()?, model, layout).memory(memory).build()?;
    peer::pull(&consumer, (peer.offer(BLOCKS, 0, limit)?, 0), BLOCKS, vec![lane], limit)?;
    let ended = consumer.wait(limit * 2).map_err(|e| Failure::waiting(&e))?;
    let (good, bad) = peer.verify(&ended, &consumer)?;
    if let Some(cause) = ended.outcome.cause() {
        return Err(Failure::failed(format!("a small pull failed: {cause}")));
    }
    if bad > 0 {
        return Err(Failure::failed(format!("{bad} bytes were wrong")));
    }
    let took = ended.outcome.times.ended.unwrap_or_default();
    Ok(format!("{} pulled and verified in {:.1} ms, handshake included", size(good), took.as_secs_f64() * 1e3))
}
