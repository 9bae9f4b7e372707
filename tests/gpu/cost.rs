//! What kvferry costs an engine in the same process: the rate of the engine's kernels, and processor time when nothing moves.
//!
//! Figures are printed as `figure NAME VALUE UNIT`, for `tests/gpu/run`. On the stand-in they mean nothing.

use std::{
    ffi::{CString, c_void},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use cudarc::driver::{
    result::{self, event, module, stream},
    sys::{self, CUdeviceptr, CUevent, CUevent_flags, CUfunction, CUstream},
};
use kvferry::{Config, Memory, PoolLayout, Ready};
use kvferry_testkit::{gpu, rig::SOON};

use crate::{
    alone::alone,
    pair::{BLOCKS, Engine, Pair, on_gpu, pull, wait_until},
};

const PTX: &str = include_str!("product.ptx");

/// Rows and columns of the matrices: 16,384 blocks of 256 threads, several times what any GPU runs at once.
const N: u32 = 2048;

/// Products that are queued on the stream, so that the GPU always has one.
const QUEUED: usize = 4;

/// Matrix products, one after another. The stand-in runs no kernel of ours but the copy kernel: there, memsets.
struct Products {
    stream: CUstream,
    function: Option<CUfunction>,
    matrices: [CUdeviceptr; 3],
    events: [CUevent; QUEUED],
}

impl Products {
    const BYTES: usize = (N as usize).pow(2) * 4;

    fn new(engine: &Engine) -> Self {
        let function = gpu::is_real().then(|| {
            let (text, name) = (CString::new(PTX).unwrap(), CString::new("kvferry_product").unwrap());
            unsafe { module::get_function(module::load_data(text.as_ptr().cast()).unwrap(), name).unwrap() }
        });
        let matrices = [0; 3].map(|_| unsafe { result::malloc_sync(Self::BYTES).unwrap() });
        let events = [0; QUEUED].map(|_| event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING).unwrap());
        let this = Self { stream: engine.stream, function, matrices, events };
        this.check();
        this
    }

    fn queue(&self) {
        let Some(function) = self.function else {
            return unsafe { result::memset_d8_async(self.matrices[2], 7, Self::BYTES, self.stream).unwrap() };
        };
        let (mut matrices, mut n) = (self.matrices, N);
        let pointer = |m: &mut CUdeviceptr| (&raw mut *m).cast::<c_void>();
        let [a, b, c] = &mut matrices;
        let mut parameters = [pointer(a), pointer(b), pointer(c), (&raw mut n).cast::<c_void>()];
        let grid = (N / 16, N / 16, 1);
        unsafe { result::launch_kernel(function, grid, (16, 16, 1), 0, self.stream, &mut parameters).unwrap() };
    }

    /// Checks one product: of ones and halves.
    fn check(&self) {
        if self.function.is_none() {
            return;
        }
        let mut product = vec![0f32; Self::BYTES / 4];
        unsafe {
            for (matrix, value) in self.matrices.iter().zip([1f32, 0.5, 0.0]) {
                sys::cuMemsetD32Async(*matrix, value.to_bits(), Self::BYTES / 4, self.stream).result().unwrap();
            }
            self.queue();
            stream::synchronize(self.stream).unwrap();
            result::memcpy_dtoh_sync(&mut product, self.matrices[2]).unwrap();
        }
        assert!(product.iter().all(|x| *x == N as f32 / 2.0), "the product is wrong: {:?}", &product[..4]);
    }

    /// Products per second, over about this time.
    fn rate(&self, time: Duration) -> f64 {
        let next = |i: usize| {
            self.queue();
            unsafe { event::record(self.events[i % QUEUED], self.stream).unwrap() };
        };
        let ended = |i: usize| unsafe { event::synchronize(self.events[i % QUEUED]).unwrap() };
        (0..QUEUED).for_each(next);
        ended(0);
        let (began, mut done) = (Instant::now(), 0);
        while began.elapsed() < time {
            next(done);
            done += 1;
            ended(done);
        }
        let rate = done as f64 / began.elapsed().as_secs_f64();
        unsafe { stream::synchronize(self.stream).unwrap() };
        rate
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Ranges of 16 KiB: 64 MiB a pull.
fn many_layers() -> PoolLayout {
    PoolLayout::uniform(BLOCKS, 64, 16 << 10, 16)
}

/// Sets a flag when dropped, also by a panic: the other thread must end too.
struct Sets<'a>(&'a AtomicBool);

impl Drop for Sets<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Pulls until told to stop, over tcp, with both pools on the GPU of the products: each pull gathers and scatters there.
fn keep_pulling(pair: &Pair, on: &AtomicBool, end: &AtomicBool, pulled: &AtomicU64) {
    const DEADLINE: Duration = Duration::from_secs(2);
    while !end.load(Ordering::Relaxed) {
        if !on.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        let offer = pair.offer(Ready::Now);
        pair.consumer.pull(pull(&offer).deadline(DEADLINE)).unwrap();
        let ended = pair.ended();
        let decided = ended.outcome.times.decided.expect("it has ended");
        assert!(decided <= DEADLINE + Duration::from_millis(200), "decided after {decided:?}");
        assert!(ended.outcome.complete(), "within {DEADLINE:?}: {:?}", ended.outcome);
        pulled.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
#[ignore = "a measurement, for a release build and a GPU"]
fn products_beside_pulls() {
    alone!("cost::products_beside_pulls");
    let (round, rounds) = if gpu::is_real() { (Duration::from_secs(1), 7) } else { (Duration::from_millis(500), 3) };
    let layout = many_layers();
    let memory = || gpu::memory(&layout);
    let pair = Pair::of(&layout, memory(), memory(), Config::default());
    let bytes: Vec<u8> = (0..layout.segments[0]).map(|i| (i / 61) as u8 ^ (i >> 14) as u8).collect();
    pair.producer.memory().write_from(0, 0, &bytes).unwrap();
    let engine = Engine::new();
    let products = Products::new(&engine);
    let (on, end, pulled) = (AtomicBool::new(false), AtomicBool::new(false), AtomicU64::new(0));
    let (mut ratios, mut rates, mut pulls) = (Vec::new(), Vec::new(), Vec::new());
    std::thread::scope(|s| {
        s.spawn(|| keep_pulling(&pair, &on, &end, &pulled));
        let _end = Sets(&end);
        for i in 0..=rounds {
            on.store(false, Ordering::Relaxed);
            wait_until("the last pull has ended", || pair.consumer.pulls() == 0);
            let alone = products.rate(round);
            on.store(true, Ordering::Relaxed);
            let before = pulled.load(Ordering::Relaxed);
            wait_until("pulls run", || pulled.load(Ordering::Relaxed) > before);
            let (before, began) = (pulled.load(Ordering::Relaxed), Instant::now());
            let beside = products.rate(round);
            let moved = (pulled.load(Ordering::Relaxed) - before) * layout.segments[0];
            // The first round warms up.
            if i > 0 {
                ratios.push(beside / alone);
                rates.push(alone);
                pulls.push(moved as f64 / began.elapsed().as_secs_f64() / 1e9);
            }
        }
    });
    let mut found = vec![0; bytes.len()];
    pair.consumer.memory().read_into(0, 0, &mut found).unwrap();
    assert!(found == bytes, "what was pulled beside products is wrong");
    let tflops = median(rates) * 2.0 * f64::from(N).powi(3) / 1e12;
    println!("figure product/alone {tflops:.3} TFLOP/s of a plain kernel");
    println!("figure product/beside-pulls {:.4} of its rate alone", median(ratios));
    println!("figure product/pulls {:.3} GB/s beside it, tcp, both pools on this GPU", median(pulls));
}

/// Processor time of this process.
fn processor_time() -> Duration {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
}

#[test]
#[ignore = "a measurement, for a release build and a GPU"]
fn idle_ranks_take_no_processor_time() {
    alone!("cost::idle_ranks_take_no_processor_time");
    // As much as the driver's own threads take, without kvferry.
    let _engine = Engine::new();
    let watch = if gpu::is_real() { Duration::from_secs(8) } else { Duration::from_secs(2) };
    let percent = || {
        let (before, began) = (processor_time(), Instant::now());
        std::thread::sleep(watch);
        100.0 * (processor_time() - before).as_secs_f64() / began.elapsed().as_secs_f64()
    };
    let driver = percent();
    let pools: [Memory; 2] = [on_gpu(), on_gpu()];
    let [theirs, ours] = pools;
    let pair = Pair::new(theirs, ours);
    pair.fill(5);
    pair.consumer.pull(pull(&pair.offer(Ready::Now)).deadline(SOON)).unwrap();
    assert!(pair.ended().outcome.complete());
    wait_until("the producer has its blocks back", || pair.producer.live() == (0, 0));
    let ranks = percent();
    println!("figure idle/driver {driver:.3} % of a core: a process with a context and no kvferry");
    println!("figure idle/ranks {ranks:.3} % of a core: the same with an idle producer and an idle consumer");
    // A pair with a session sends heartbeats. A thread that polls the GPU would take a whole core.
    assert!(ranks < driver + 2.0, "idle ranks take {ranks:.2} % of a core, the driver alone {driver:.2} %");
}
