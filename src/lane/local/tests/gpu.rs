//! The lane between the GPU memory of two processes, on the stand-in for libcuda. Each test runs in a process of its own,
//! since a process has one driver.

mod copies;
mod endings;
mod refusals;

use std::{path::PathBuf, time::Duration};

use kvferry_cuda_standin::{Control, Counts};

use super::*;
use crate::{
    config::GpuConfig,
    lane::{
        local::{connect::connect_gpu, gpu::GpuLane},
        staged::stage,
    },
    memory::gpu::{Gpu, PinnedRing, testing},
};

const MIB: u64 = 1 << 20;
const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
/// Long enough for every copy that is not kept from ending.
const LONG: Duration = Duration::from_secs(60);

/// As [`testing::with_driver`]. Producers that `body` starts have the same GPUs.
fn with_driver<T: Fn()>(test: T, settings: &str, body: impl FnOnce(Control)) {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let folder = Folder(PathBuf::from(format!("/dev/shm/kvferry-test-{}-{number}", std::process::id())));
    testing::with_driver(test, &format!("dir={},{settings}", folder.0.display()), body);
}

struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn driver() -> Control {
    Control::new().expect("the stand-in is built with the tests")
}

fn layout() -> Arc<PoolLayout> {
    Arc::new(PoolLayout { segments: vec![6 * MIB, 3000, 4 * MIB], groups: vec![] })
}

/// A pool of a producer of this kind, filled.
fn pool(kind: &str) -> Memory {
    driver();
    let lengths = layout().segments.clone();
    let addresses = match kind {
        "gpu descriptors" => None,
        // Two segments in one allocation.
        "gpu handles" => {
            let second = testing::malloc(0, 4 * MIB + 8192);
            Some([testing::malloc(0, 6 * MIB), second + 256, second + 8192])
        }
        // Several allocations in one segment.
        "gpu both" => {
            let last = [testing::malloc(0, 2 * MIB), testing::malloc(0, 2 * MIB)];
            assert_eq!(last[1], last[0] + 2 * MIB, "the stand-in fills its address space from the bottom");
            Some([testing::expandable(0, 2 * MIB, 3), testing::malloc(0, 3000), last[0]])
        }
        "gpu many" => return taken((0..253).map(|_| (testing::malloc(0, 4096), 4096)).collect()),
        other => panic!("{other}"),
    };
    let memory = match addresses {
        Some(addresses) => taken(addresses.into_iter().zip(lengths.clone()).collect()),
        None => Memory::alloc_gpu(0, &lengths).unwrap(),
    };
    for (segment, &len) in lengths.iter().enumerate() {
        let bytes: Vec<u8> = (0..len).map(|i| stamp(segment as u16, i)).collect();
        memory.write_from(segment as u16, 0, &bytes).unwrap();
    }
    memory
}

fn taken(segments: Vec<(u64, u64)>) -> Memory {
    // SAFETY: memory of `testing` is never freed.
    unsafe { Memory::from_gpu(&segments, None) }.unwrap()
}

/// What a producer of this kind exports.
pub(super) fn export(kind: &str) -> (Arc<Export>, Nonce) {
    let memory = pool(kind);
    let layout = Arc::new(PoolLayout { segments: memory.segments().to_vec(), groups: vec![] });
    let export = Arc::new(Export::new(layout, memory, Arc::new(FenceWords::new(8).unwrap())));
    let nonce = Nonce::random();
    export.publish(SLOT, nonce, Arc::default());
    (export, nonce)
}

/// This process's memory.
fn memory() -> Memory {
    Memory::alloc_gpu(0, &[16 * MIB, 9000]).unwrap()
}

fn gpu(memory: &Memory) -> Gpu {
    memory.gpu().unwrap().clone()
}

fn free(memory: &Memory) -> u64 {
    gpu(memory).memory().unwrap().0
}

/// Waits until so much device memory is free.
fn wait_free(memory: &Memory, bytes: u64) {
    let start = Instant::now();
    while free(memory) != bytes {
        assert!(start.elapsed() < LIMIT, "{} bytes are free and not {bytes}", free(memory));
        std::thread::yield_now();
    }
}

fn wait_for(control: Control, what: impl Fn(&Counts) -> bool) {
    let start = Instant::now();
    while !what(&control.counts()) {
        assert!(start.elapsed() < LIMIT, "{:?}", control.counts());
        std::thread::yield_now();
    }
}

fn wait_imports(control: Control, imports: u64) {
    wait_for(control, |c| c.imports == imports);
}

fn connect(
    name: &[u8],
    lane: u64,
    incarnation: Incarnation,
    memory: &Memory,
    bound: Duration,
) -> Result<GpuLane, LaneError> {
    let config = GpuConfig { copy_bound: bound, ..GpuConfig::default() };
    let at = (memory.clone(), gpu(memory));
    runtime().block_on(connect_gpu(name, (lane, KEY), incarnation, layout(), at, &[], &config))
}

/// A lane to this producer, with attempt `A` begun.
fn lane(p: &Producer, memory: &Memory, bound: Duration) -> GpuLane {
    let mut lane = connect(&p.name, 1, p.incarnation, memory, bound).unwrap();
    lane.begin(A, grant(p));
    lane
}

fn grant(p: &Producer) -> Grant {
    Grant { slot: SLOT, nonce: Nonce::from_wire(p.nonce).unwrap() }
}

/// Posts the reads of a chunk, and waits for its fence.
fn pull(lane: &mut GpuLane, reads: &[Read]) -> Vec<LaneEvent> {
    let (mut posted, mut all) = (0, vec![]);
    while posted < reads.len() {
        posted += lane.post(A, &reads[posted..]);
        if posted < reads.len() {
            all.extend(drive(lane, |e| !e.is_empty()));
        }
    }
    while !all.iter().any(|e| matches!(e, LaneEvent::Fence { .. } | LaneEvent::Failed { .. })) {
        all.extend(drive(lane, |e| !e.is_empty()));
    }
    all
}

/// What `pull` returns for a chunk in one job.
fn pulled(reads: u32, word: u64) -> Vec<LaneEvent> {
    vec![LaneEvent::Done { attempt: A, chunk: 5, reads }, LaneEvent::Fence { attempt: A, chunk: 5, word }]
}

fn quiet() -> LaneEvent {
    LaneEvent::Quiet { attempt: A }
}

/// The events of one poll.
fn poll_once(lane: &mut GpuLane) -> Vec<LaneEvent> {
    let mut events = vec![];
    lane.poll(&mut events);
    events
}

fn bytes(memory: &Memory, segment: u16, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read_into(segment, offset, &mut bytes).unwrap();
    bytes
}

fn stamps(segment: u16, offset: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| stamp(segment, offset + i)).collect()
}
