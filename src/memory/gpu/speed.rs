//! Rates of copies, printed as `figure NAME VALUE UNIT`, for `tests/gpu/run`. On the stand-in for libcuda they say nothing about
//! a GPU.
//!
//! `KVFERRY_TEST_CUDA=real cargo test --release --lib gpu::speed -- --ignored --nocapture --test-threads=1`
#![allow(clippy::undocumented_unsafe_blocks, reason = "calls of the driver, on memory of the test that outlives them")]

use std::{
    ffi::c_void,
    sync::Arc,
    time::{Duration, Instant},
};

use cudarc::driver::{
    result::{self, stream::StreamKind},
    sys::{CUmemLocation, CUmemLocationType, CUmemcpyAttributes, CUmemcpySrcAccessOrder, CUstream},
};
use kvferry_testkit::gpu;

use super::{CopyQueue, Direction, Gpu, Piece, library, queue::Keep};
use crate::{config::CopyMethod, memory::Memory};

/// Bytes of a job: a chunk of a pull.
const JOB: u64 = 8 << 20;
const ROUNDS: usize = 7;
const BLOCKS: [u64; 3] = [4 << 10, 16 << 10, 64 << 10];
const METHODS: [(&str, CopyMethod); 4] = [
    ("auto", CopyMethod::Auto),
    ("kernel", CopyMethod::Kernel),
    ("batch", CopyMethod::Batch),
    ("copies", CopyMethod::Copies),
];

/// Bytes for a real GPU, or fewer for the stand-in.
fn bytes(real: u64) -> u64 {
    if gpu::is_real() { real } else { 2 * JOB }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn print(name: &str, value: f64, unit: &str) {
    println!("figure {name} {value:.3} {unit}");
}

/// A memory and a stream of the driver's own calls, in the primary context of GPU 0.
struct Bare {
    stream: CUstream,
}

impl Bare {
    fn new() -> Self {
        let device = result::device::get(0).unwrap();
        unsafe { result::ctx::set_current(result::primary_ctx::retain(device).unwrap()).unwrap() };
        Self { stream: result::stream::create(StreamKind::NonBlocking).unwrap() }
    }

    /// The time from a call that queues work to the end of the work.
    fn time(&self, queue: impl FnOnce(CUstream)) -> Duration {
        let began = Instant::now();
        queue(self.stream);
        unsafe { result::stream::synchronize(self.stream).unwrap() };
        began.elapsed()
    }
}

/// The jobs that copy scattered blocks of `from` to `to`, which gets them in order; or, `back`, the other way.
fn jobs((from, to): (&Memory, &Memory), block: u64, back: bool) -> Vec<Vec<Piece>> {
    let blocks = from.segments()[0] / block;
    // 7919 is prime, and the number of blocks is a power of two.
    let piece = |i: u64| {
        let (scattered, ordered) = ((from, 0, i * 7919 % blocks * block), (to, 0, i * block));
        if back { Piece::new(ordered, scattered, block) } else { Piece::new(scattered, ordered, block) }.unwrap()
    };
    let per_job = JOB / block;
    (0..blocks / per_job).map(|j| (0..per_job).map(|i| piece(j * per_job + i)).collect()).collect()
}

/// The time in which a queue copies these jobs.
fn copy(queue: &mut CopyQueue, direction: Direction, jobs: Vec<Vec<Piece>>, keep: &Keep) -> Duration {
    const LIMIT: Duration = Duration::from_secs(60);
    let began = Instant::now();
    for job in jobs {
        while queue.outstanding() >= 128 {
            assert!(began.elapsed() < LIMIT, "{queue:?}");
            queue.finished();
        }
        queue.submit(direction, job, keep.clone()).expect("the GPU works");
    }
    assert!(queue.wait(LIMIT), "{queue:?}");
    let took = began.elapsed();
    assert!(!queue.finished().1, "a copy has failed");
    took
}

/// Gather from GPU to host memory, and scatter back, against one copy of the same bytes between pinned memory and the GPU.
#[test]
#[ignore = "a measurement, for a release build and a GPU"]
fn ring_copies() {
    gpu::driver();
    let size = bytes(256 << 20);
    let device = Memory::alloc_gpu(0, &[size]).unwrap();
    let host = Memory::anonymous(&[size]).unwrap();
    host.touch().unwrap();
    let gpu: Gpu = device.gpu().unwrap().clone();
    let pinned = gpu.pin(&host).unwrap();
    let keep: Keep = Arc::new((device.clone(), host.clone(), pinned));
    let bare = Bare::new();
    let (there, here) = (device.base(0), std::ptr::with_exposed_provenance_mut::<c_void>(host.base(0) as usize));
    let lib = library::init().unwrap();
    let len = size as usize;
    for (name, direction, back) in [("gather", Direction::ToHost, false), ("scatter", Direction::ToGpu, true)] {
        let one = || {
            bare.time(|stream| {
                let code = match back {
                    true => unsafe { (lib.cuMemcpyHtoDAsync_v2)(there, here, len, stream) },
                    false => unsafe { (lib.cuMemcpyDtoHAsync_v2)(here, there, len, stream) },
                };
                lib.check("cuMemcpyAsync", code).unwrap();
            })
            .as_secs_f64()
        };
        let mut queues = METHODS.map(|(_, m)| CopyQueue::new(&gpu, m).unwrap());
        let mut ratios = vec![Vec::new(); BLOCKS.len() * METHODS.len()];
        let mut single = Vec::new();
        for round in 0..=ROUNDS {
            let mut ratio = ratios.iter_mut();
            for block in BLOCKS {
                for queue in &mut queues {
                    let raw = one();
                    let ours = copy(queue, direction, jobs((&device, &host), block, back), &keep).as_secs_f64();
                    let ratio = ratio.next().unwrap();
                    // The first round allocates the kernel's buffers.
                    if round > 0 {
                        ratio.push(raw / ours);
                        single.push(size as f64 / raw / 1e9);
                    }
                }
            }
        }
        print(&format!("{name}/one-copy"), median(single), "GB/s");
        let mut ratio = ratios.into_iter();
        for block in BLOCKS {
            for (method, _) in METHODS {
                let name = format!("{name}/{}K/{method}", block >> 10);
                print(&name, median(ratio.next().unwrap()), "of one pinned copy");
            }
        }
    }
}

/// One driver's call for a job, on a stream.
fn batch(lib: &library::Library, job: &[Piece], stream: CUstream) -> Option<()> {
    let call = lib.cuMemcpyBatchAsync?;
    let of = |f: fn(&Piece) -> u64| job.iter().map(f).collect::<Vec<_>>();
    let (mut dsts, mut srcs) = (of(|p| p.dst), of(|p| p.src));
    let mut sizes: Vec<usize> = job.iter().map(|p| p.len as usize).collect();
    let anywhere = CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID, id: 0 };
    let mut attributes = CUmemcpyAttributes {
        srcAccessOrder: CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
        srcLocHint: anywhere,
        dstLocHint: anywhere,
        flags: 0,
    };
    let (mut first, mut failed) = (0, 0);
    let (to, from, n) = (dsts.as_mut_ptr(), srcs.as_mut_ptr(), job.len());
    let code = unsafe { call(to, from, sizes.as_mut_ptr(), n, &mut attributes, &mut first, 1, &mut failed, stream) };
    lib.check("cuMemcpyBatchAsync", code).ok()
}

/// Copies inside one GPU in one process, in jobs of the same ranges as pulls over the `local` lane have: by the driver's own
/// calls, and by the kernel. `tests/gpu/run` compares pulls between two processes with the fastest of them.
#[test]
#[ignore = "a measurement, for a release build and a GPU"]
fn bare_copies_inside_a_gpu() {
    gpu::driver();
    let size = bytes(4 << 30);
    let (from, to) = (Memory::alloc_gpu(0, &[size]).unwrap(), Memory::alloc_gpu(0, &[size]).unwrap());
    let gpu: Gpu = from.gpu().unwrap().clone();
    let keep: Keep = Arc::new((from.clone(), to.clone()));
    let mut kernel = CopyQueue::new(&gpu, CopyMethod::Kernel).unwrap();
    let bare = Bare::new();
    let lib = library::init().unwrap();
    for block in &BLOCKS[1..] {
        let jobs = jobs((&from, &to), *block, false);
        let mut rates: [Vec<f64>; 3] = Default::default();
        for round in 0..=ROUNDS {
            let mut batches = true;
            let times = [
                copy(&mut kernel, Direction::Between, jobs.clone(), &keep),
                bare.time(|stream| batches = jobs.iter().all(|j| batch(lib, j, stream).is_some())),
                bare.time(|stream| {
                    for p in jobs.iter().flatten() {
                        let code = unsafe { (lib.cuMemcpyDtoDAsync_v2)(p.dst, p.src, p.len as usize, stream) };
                        lib.check("cuMemcpyDtoDAsync", code).unwrap();
                    }
                }),
            ];
            for (i, (rates, t)) in rates.iter_mut().zip(times).enumerate() {
                if round > 0 && (i != 1 || batches) {
                    rates.push(size as f64 / t.as_secs_f64() / 1e9);
                }
            }
        }
        for (method, rates) in ["kernel", "batch", "copies"].into_iter().zip(rates).filter(|(_, r)| !r.is_empty()) {
            print(&format!("bare/{}K/{method}", block >> 10), median(rates), "GB/s");
        }
    }
}
