//! Producers in processes of their own, which run this test binary, and lanes to them.

use std::{
    io::{BufRead, BufReader, Read as _, Write},
    os::fd::BorrowedFd,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    ptr::NonNull,
    sync::Arc,
    time::{Duration, Instant},
};

use kvferry_proto::{Attempt, Cause, FenceSlot, Grant, Incarnation, Lane, LaneEvent, Limits, Nonce, PoolLayout, Read};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::runtime::{Handle, Runtime};

use super::super::{LocalLane, Server, connect::connect_host};
use crate::{
    config::LocalConfig,
    lane::{LaneError, WakingLane},
    memory::{Export, FenceWords, Memory},
};

pub(super) const SLOT: u32 = 3;
pub(super) const LIMIT: Duration = Duration::from_secs(20);

pub(super) fn layout() -> Arc<PoolLayout> {
    let mut layout = PoolLayout::uniform(64, 3, 20_000, 16);
    layout.segments.push(5000);
    Arc::new(layout)
}

pub(super) fn stamp(segment: u16, i: u64) -> u8 {
    (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8 ^ segment as u8
}

/// Memory that kvferry allocates, or memory of an engine.
pub(super) fn pool(layout: &PoolLayout, ours: bool) -> Memory {
    let memory = if ours {
        Memory::alloc(&layout.segments).unwrap()
    } else {
        let segments: Vec<_> = layout
            .segments
            .iter()
            .map(|&len| (NonNull::from(Vec::leak(vec![0u8; len as usize])).cast::<u8>(), len))
            .collect();
        // SAFETY: the vectors are leaked, and nothing else refers to them.
        unsafe { Memory::from_raw(&segments, None) }
    };
    for (segment, &len) in layout.segments.iter().enumerate() {
        let bytes: Vec<u8> = (0..len).map(|i| stamp(segment as u16, i)).collect();
        memory.write_from(segment as u16, 0, &bytes).unwrap();
    }
    memory
}

pub(super) fn export(ours: bool) -> (Arc<Export>, Nonce) {
    let layout = layout();
    let memory = pool(&layout, ours);
    let export = Arc::new(Export::new(layout, memory, Arc::new(FenceWords::new(8).unwrap())));
    let nonce = Nonce::random();
    export.publish(SLOT, nonce, Arc::default());
    (export, nonce)
}

pub(super) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// A runtime on a thread of its own, until the sender is dropped.
pub(super) fn background() -> (Handle, tokio::sync::oneshot::Sender<()>) {
    let runtime = runtime();
    let handle = runtime.handle().clone();
    let (until, gone) = tokio::sync::oneshot::channel::<()>();
    std::thread::spawn(move || runtime.block_on(gone));
    (handle, until)
}

/// Not a test by itself: [`Producer::start`] starts it as a process.
#[expect(clippy::zombie_processes, reason = "the process that it starts outlives this one on purpose")]
#[test]
#[ignore = "a role: other tests start it"]
fn as_a_producer() {
    let Ok(kind) = std::env::var("KVFERRY_TEST_LOCAL_PRODUCER") else { return };
    if kind.contains("undumpable") {
        rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable).unwrap();
    }
    let (export, nonce) = match &*kind {
        #[cfg(feature = "cuda")]
        kind if kind.starts_with("gpu") => super::gpu::export(kind),
        kind => export(kind.contains("memfd")),
    };
    let incarnation = Incarnation::random();
    let (handle, _until) = background();
    let server =
        Server::start(export.clone(), incarnation, handle, &LocalConfig::default(), &Limits::default()).unwrap();
    server.admit(1, KEY);
    if kind.starts_with("gpu") {
        server.admit(2, KEY);
        server.admit(3, KEY);
    }
    let hex: String = server.name().iter().map(|b| format!("{b:02x}")).collect();
    println!("\nproducer {hex} {:x} {:x}", incarnation.get(), nonce.get());
    for line in std::io::stdin().lines() {
        match line.unwrap().as_str() {
            "withdraw" => {
                export.withdraw(SLOT);
                export.memory.write_from(0, 0, &[0xee; 20_000]).unwrap();
            }
            "dismiss" => server.dismiss(1),
            "leave a child" => {
                for fd in 3..64 {
                    // SAFETY: used for this one call, which fails when there is no such descriptor.
                    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
                    let _ = rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty());
                }
                let (none, also) = (Stdio::null(), Stdio::null());
                Command::new("sleep").arg("5").stdin(none).stdout(also).stderr(Stdio::null()).spawn().unwrap();
            }
            other => panic!("{other}"),
        }
        println!("\ndone");
    }
}

pub(super) struct Producer {
    pub(super) child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    pub(super) name: Vec<u8>,
    pub(super) incarnation: Incarnation,
    pub(super) nonce: u64,
}

impl Producer {
    pub(super) fn start(kind: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "lane::local::tests::rig::as_a_producer", "--ignored", "--nocapture", "--test-threads=1"])
            .env("KVFERRY_TEST_LOCAL_PRODUCER", kind)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (to, from) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let incarnation = Incarnation::random();
        let mut it = Self { child, to, from, name: vec![], incarnation, nonce: 0 };
        let said = it.hear("producer ");
        let [name, incarnation, nonce] = said.split(' ').collect::<Vec<_>>()[..] else { panic!("{said}") };
        let byte = |i: usize| u8::from_str_radix(&name[i..i + 2], 16).unwrap();
        it.name = (0..name.len()).step_by(2).map(byte).collect();
        it.incarnation = Incarnation::from_wire(u64::from_str_radix(incarnation, 16).unwrap()).unwrap();
        it.nonce = u64::from_str_radix(nonce, 16).unwrap();
        it
    }

    fn hear(&mut self, start: &str) -> String {
        let mut lines = self.from.by_ref().lines().map_while(Result::ok);
        lines.find_map(|l| l.strip_prefix(start).map(str::to_owned)).expect("the producer has ended")
    }

    pub(super) fn tell(&mut self, what: &str) {
        writeln!(self.to, "{what}").unwrap();
        self.hear("done");
    }

    /// A lane to this producer, with attempt `A` begun.
    pub(super) fn lane(&self, memory: &Memory) -> LocalLane {
        let mut lane = dial(&self.name, 1, self.incarnation, memory).unwrap();
        lane.begin(A, Grant { slot: SLOT, nonce: Nonce::from_wire(self.nonce).unwrap() });
        lane
    }

    pub(super) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The key that every lane of these tests is admitted with.
pub(super) const KEY: [u8; 32] = [7; 32];

pub(super) fn dial(name: &[u8], lane: u64, incarnation: Incarnation, memory: &Memory) -> Result<LocalLane, LaneError> {
    runtime().block_on(connect_host(name, (lane, KEY), incarnation, layout(), memory.clone(), &[]))
}

pub(super) const A: Attempt = Attempt(7);

/// Polls until `enough`, and returns all events.
pub(super) fn drive(lane: &mut dyn WakingLane, mut enough: impl FnMut(&[LaneEvent]) -> bool) -> Vec<LaneEvent> {
    let (start, mut events) = (Instant::now(), vec![]);
    while !enough(&events) {
        assert!(start.elapsed() < LIMIT, "nothing more came after {events:?}");
        match lane.arm() {
            Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::WouldBlock),
            Ok(None) => panic!("the lane is over after {events:?}"),
            Ok(Some(fd)) => {
                poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&Timespec { tv_sec: 20, tv_nsec: 0 })).unwrap();
            }
        }
        lane.poll(&mut events);
    }
    events
}

pub(super) fn done(events: &[LaneEvent], of: u32) -> u32 {
    let reads = events.iter().map(|e| match e {
        LaneEvent::Done { chunk, reads, attempt } if *chunk == of && *attempt == A => *reads,
        _ => 0,
    });
    reads.sum()
}

/// Posts reads as far as the window allows, and waits for all of them.
pub(super) fn pull(lane: &mut LocalLane, reads: &[Read]) -> Vec<LaneEvent> {
    let (mut posted, mut all) = (0, vec![]);
    while posted < reads.len() {
        posted += lane.post(A, &reads[posted..]);
        let before = all.len();
        all.extend(drive(lane, |events| !events.is_empty()));
        assert!(all.len() - before <= 2, "events are batched by chunk");
    }
    let of = reads[0].chunk;
    if done(&all, of) < reads.len() as u32 {
        let left = reads.len() as u32 - done(&all, of);
        all.extend(drive(lane, |events| done(events, of) >= left));
    }
    all
}

pub(super) fn fence(lane: &mut LocalLane) -> Vec<LaneEvent> {
    assert!(lane.post_fence(A, FenceSlot { chunk: 5, slot: SLOT }));
    drive(lane, |events| !events.is_empty())
}

pub(super) fn word(word: u64) -> Vec<LaneEvent> {
    vec![LaneEvent::Fence { attempt: A, chunk: 5, word }]
}

pub(super) fn dead(cause: Cause) -> Vec<LaneEvent> {
    vec![LaneEvent::Failed { attempt: A, cause }, LaneEvent::Down { cause }, LaneEvent::Quiet { attempt: A }]
}
