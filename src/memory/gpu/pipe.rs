//! Copies in flight: two streams for each direction, and the way in which a job's ranges are copied.
//!
//! A job of long runs is copied run by run. A job of many short ones goes through a bounce buffer on the GPU: a kernel gathers
//! into it (or scatters from it), and the copy engine moves it in one piece. Copies of short runs one by one are limited by
//! the driver's cost for each, some 2 to 4 us (facts from NCCL #2177, torchcomms #2195); a kernel that reads across PCIe is
//! slower than the copy engine, and holds multiprocessors. Jobs of a direction end in the order in which they came.

use std::{
    collections::VecDeque,
    ffi::{c_uint, c_void},
    rc::Rc,
    time::{Duration, Instant},
};

use cudarc::driver::sys::{
    CUdeviceptr, CUevent, CUfunction, CUmemLocation, CUmemLocationType, CUmemcpyAttributes, CUmemcpySrcAccessOrder,
    CUmodule, CUstream,
};

use super::{
    context::Context,
    error::GpuError,
    library::{Library, NOT_READY, is_fatal},
    queue::{CopyOrder, Direction, Piece, Ticket},
    stats,
    thread::DIRECTIONS,
    way::{KERNEL_RANGE, MOST_RANGES, Way, choose},
};
use crate::{config::CopyMethod, memory::mapping::Mapping};

/// Bytes of one part of a job: the size of a bounce buffer. A chunk fits.
const PART: u64 = 8 << 20;
/// Thread blocks of a kernel, and their threads. Each thread has four loads of 16 bytes in flight, so 32 blocks keep 512 KiB in
/// flight, and leave most multiprocessors to the engine. Not measured by us on a GPU.
const BLOCKS: c_uint = 32;
const THREADS: c_uint = 256;
/// Parts of a direction that are in flight.
const MOST_RUNNING: usize = 8;
/// CUDA_ERROR_NOT_SUPPORTED.
const NOT_SUPPORTED: u32 = 801;

/// An entry of the kernel's list, as the kernel reads it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Entry {
    src: u64,
    dst: u64,
    len: u64,
}

const LIST: usize = MOST_RANGES * size_of::<Entry>();

/// The copy kernel, as text for the driver's compiler.
const PTX: &str = include_str!("copy.ptx");

struct Kernel {
    module: CUmodule,
    function: CUfunction,
}

/// The streams and jobs of all directions.
pub(super) struct Pipes {
    context: Rc<Context>,
    pipes: Vec<Pipe>,
    kernel: Result<Kernel, String>,
    scratch: Scratch,
    /// The context is unusable.
    stopped: bool,
}

#[derive(Default)]
struct Scratch {
    part: Vec<Piece>,
    dsts: Vec<CUdeviceptr>,
    srcs: Vec<CUdeviceptr>,
    sizes: Vec<usize>,
    /// The device has refused a batch.
    no_batch: bool,
}

struct Pipe {
    direction: Direction,
    streams: [CUstream; 2],
    waiting: VecDeque<Job>,
    running: VecDeque<Running>,
    /// Events that are not in use.
    events: Vec<CUevent>,
    /// Parts begun so far: selects the stream and the list.
    begun: usize,
    /// Jobs of it may be written indefinitely, so no later one ends.
    abandoned: bool,
    bounce: Bounce,
}

/// A job whose parts have not all begun.
struct Job {
    pieces: std::vec::IntoIter<Piece>,
    /// The rest of a piece that was cut.
    rest: Option<Piece>,
    method: CopyMethod,
    ticket: Ticket,
    submitted: Instant,
    /// When its first part began.
    began: Option<Instant>,
}

struct Running {
    event: CUevent,
    /// With the job's last part: its ticket, and when its first part began.
    job: Option<(Ticket, Instant)>,
    failed: bool,
}

enum Bounce {
    /// No job needed it so far.
    Unused,
    /// The GPU or the host had no memory for it.
    None,
    Ready(Buffers),
}

/// Memory of the kernel's way.
struct Buffers {
    /// On the GPU, for each stream: a list, and a part's data.
    device: CUdeviceptr,
    stride: u64,
    /// Pinned lists, one for each part in flight.
    lists: Mapping,
}

impl Pipes {
    pub(super) fn new(context: &Rc<Context>) -> Result<Self, GpuError> {
        let lib = context.lib;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: the context is current; the function writes two ints.
        lib.check("cuCtxGetStreamPriorityRange", unsafe {
            (lib.cuCtxGetStreamPriorityRange)(&mut least, &mut greatest)
        })?;
        let mut pipes = Self {
            context: context.clone(),
            pipes: Vec::with_capacity(DIRECTIONS.len()),
            kernel: load(lib),
            scratch: Scratch::default(),
            stopped: false,
        };
        for direction in DIRECTIONS {
            let mut pipe = Pipe {
                direction,
                streams: [std::ptr::null_mut(); 2],
                waiting: VecDeque::new(),
                running: VecDeque::with_capacity(MOST_RUNNING),
                events: Vec::with_capacity(MOST_RUNNING),
                begun: 0,
                abandoned: false,
                bounce: Bounce::Unused,
            };
            for stream in &mut pipe.streams {
                /// CU_STREAM_NON_BLOCKING: not ordered after the engine's legacy default stream.
                const NON_BLOCKING: c_uint = 1;
                // SAFETY: the context is current; the function writes one handle.
                let code = unsafe { (lib.cuStreamCreateWithPriority)(stream, NON_BLOCKING, greatest) };
                lib.check("cuStreamCreateWithPriority", code)?;
            }
            pipes.pipes.push(pipe);
        }
        if let Err(why) = &pipes.kernel {
            tracing::info!(gpu = context.ordinal, why, "no copy kernel: short ranges are copied in batches");
        }
        Ok(pipes)
    }

    /// Why there is no kernel; `None` if there is one.
    pub(super) fn no_kernel(&self) -> Option<String> {
        self.kernel.as_ref().err().cloned()
    }

    /// Whether nothing waits or runs.
    pub(super) fn is_idle(&self) -> bool {
        self.pipes.iter().all(|p| p.waiting.is_empty() && p.running.is_empty())
    }

    pub(super) fn add(&mut self, order: CopyOrder) {
        let CopyOrder { direction, pieces, method, ticket, submitted } = order;
        let job = Job { pieces: pieces.into_iter(), rest: None, method, ticket, submitted, began: None };
        if let Some(pipe) = self.pipes.iter_mut().find(|p| p.direction == direction) {
            pipe.waiting.push_back(job);
        }
    }

    /// Ends finished parts, and begins waiting ones while there is room. Returns whether anything moved, and the error after which the
    /// context is unusable. A part ends only when the driver says that its event is over, also then.
    pub(super) fn advance(&mut self, context: &Context) -> (bool, Option<GpuError>) {
        let (mut moved, mut fatal) = (false, None);
        for pipe in &mut self.pipes {
            while let Some(first) = pipe.running.front() {
                // SAFETY: the event exists as long as the pipe does.
                let over = match unsafe { (context.lib.cuEventQuery)(first.event) } {
                    NOT_READY => break,
                    code => context.lib.check("cuEventQuery", code),
                };
                if let Err(error) = &over
                    && !is_fatal(error)
                {
                    // The copies may still run, and the event does not tell.
                    fatal.get_or_insert(error.clone());
                    pipe.abandon();
                    moved = true;
                    break;
                }
                let Some(mut done) = pipe.running.pop_front() else { break };
                pipe.events.push(done.event);
                if let Err(error) = over {
                    done.failed = true;
                    fatal.get_or_insert(error);
                }
                if let Some((ticket, began)) = done.job {
                    stats::ended(pipe.direction, began.elapsed(), done.failed);
                    if done.failed {
                        ticket.fail();
                    }
                }
                moved = true;
            }
            if self.stopped || fatal.is_some() {
                // In order: a job's end tells that the earlier ones have ended.
                if pipe.running.is_empty() && !pipe.waiting.is_empty() {
                    moved = true;
                    if pipe.abandoned {
                        pipe.abandon();
                    } else {
                        pipe.fail_waiting();
                    }
                }
                continue;
            }
            while pipe.running.len() < MOST_RUNNING && !pipe.waiting.is_empty() {
                match pipe.begin(context, self.kernel.as_ref().ok(), &mut self.scratch) {
                    Ok(true) => moved = true,
                    Ok(false) => break,
                    Err(error) => {
                        fatal.get_or_insert(error);
                        break;
                    }
                }
            }
        }
        (moved, fatal)
    }

    /// Begins nothing more: every job that has not begun fails once those before it are over.
    pub(super) fn stop(&mut self) {
        self.stopped = true;
    }

    /// Leaves what runs unfinished for good: it may still be written.
    pub(super) fn abandon(&mut self) {
        self.pipes.iter_mut().for_each(Pipe::abandon);
    }
}

/// Loads the kernel; the error is a sentence.
fn load(lib: &Library) -> Result<Kernel, String> {
    let (Some(load), Some(get)) = (lib.cuModuleLoadData, lib.cuModuleGetFunction) else {
        return Err("the driver has no cuModuleLoadData".into());
    };
    let text = std::ffi::CString::new(PTX).map_err(|e| e.to_string())?;
    let mut module: CUmodule = std::ptr::null_mut();
    // SAFETY: the context is current; the text ends with a zero byte, and the function writes one handle.
    lib.check("cuModuleLoadData", unsafe { load(&mut module, text.as_ptr().cast()) }).map_err(|e| e.to_string())?;
    let mut function: CUfunction = std::ptr::null_mut();
    // SAFETY: the module is loaded; the name ends with a zero byte, and the function writes one handle.
    let found = unsafe { get(&mut function, module, c"kvferry_copy".as_ptr()) };
    lib.check("cuModuleGetFunction", found).map_err(|e| e.to_string())?;
    Ok(Kernel { module, function })
}

impl Job {
    /// Moves the next part's runs to `part`. At least one, unless the job is empty. Neighbours are not merged: they may lie in
    /// two allocations of `cudaMalloc`, and the driver refuses a copy that crosses from one into the other.
    fn next_part(&mut self, part: &mut Vec<Piece>) {
        part.clear();
        let mut room = PART;
        while room > 0 && part.len() < MOST_RANGES {
            let Some(mut piece) = self.rest.take().or_else(|| self.pieces.next()) else { return };
            if piece.len > room {
                let (src, dst) = (piece.src + room, piece.dst + room);
                self.rest = Some(Piece { src, dst, len: piece.len - room });
                piece.len = room;
            }
            room -= piece.len;
            part.push(piece);
        }
    }

    fn is_over(&self) -> bool {
        self.rest.is_none() && self.pieces.as_slice().is_empty()
    }
}

impl Pipe {
    /// The tickets of all jobs, which count as failed.
    fn take_all(&mut self) -> impl Iterator<Item = Ticket> {
        let running = self.running.drain(..).filter_map(|r| r.job);
        let waiting = self.waiting.drain(..).map(|j| (j.ticket, j.began.unwrap_or_else(Instant::now)));
        running.chain(waiting).map(|(ticket, began)| {
            stats::ended(self.direction, began.elapsed(), true);
            ticket
        })
    }

    /// Begins the next part of the first waiting job; `false`: not now. An error: the context is unusable.
    fn begin(&mut self, context: &Context, kernel: Option<&Kernel>, scratch: &mut Scratch) -> Result<bool, GpuError> {
        let event = match self.events.pop().map_or_else(|| context.event(), Ok) {
            Ok(event) => event,
            Err(error) if is_fatal(&error) => return Err(error),
            // The events in flight come back.
            Err(_) if !self.running.is_empty() => return Ok(false),
            Err(error) => {
                tracing::error!(gpu = context.ordinal, %error, direction = ?self.direction, "a copy was refused");
                self.waiting.pop_front().into_iter().for_each(|job| job.ticket.fail());
                return Ok(true);
            }
        };
        let Some(job) = self.waiting.front_mut() else { return Ok(false) };
        let mut part = std::mem::take(&mut scratch.part);
        job.next_part(&mut part);
        let (method, over) = (job.method, job.is_over());
        let began = *job.began.get_or_insert_with(|| {
            let now = Instant::now();
            stats::waited(self.direction, now.saturating_duration_since(job.submitted));
            now
        });
        let stream = self.streams[self.begun % 2];
        let enqueued = self.enqueue(context, kernel, method, &part, scratch, stream);
        scratch.part = part;
        self.begun += 1;
        if let Err(error) = &enqueued {
            tracing::error!(gpu = context.ordinal, %error, direction = ?self.direction, "a copy was refused");
        }
        // A job ends with its last part, or with the first one that was refused.
        let ends = over || enqueued.is_err();
        let job = ends.then(|| self.waiting.pop_front()).flatten().map(|j| (j.ticket, began));
        // Also after a refusal: a part of the copies may be running.
        // SAFETY: the event and the stream are ours.
        let recorded = context.lib.check("cuEventRecord", unsafe { (context.lib.cuEventRecord)(event, stream) });
        self.running.push_back(Running { event, job, failed: enqueued.is_err() });
        if let Err(error) = recorded {
            if !is_fatal(&error) {
                // Copies run, and no event tells when they end.
                self.abandon();
            }
            return Err(error);
        }
        Ok(true)
    }

    /// Leaves what runs unfinished for good: it may still be written. A job that has not begun may have a part in flight, and
    /// the end of a later one would tell that the earlier ones have ended.
    fn abandon(&mut self) {
        self.abandoned = true;
        self.take_all().for_each(std::mem::forget);
    }

    fn fail_waiting(&mut self) {
        for job in self.waiting.drain(..) {
            stats::ended(self.direction, Duration::ZERO, true);
            job.ticket.fail();
        }
    }

    fn enqueue(
        &mut self,
        context: &Context,
        kernel: Option<&Kernel>,
        method: CopyMethod,
        runs: &[Piece],
        scratch: &mut Scratch,
        stream: CUstream,
    ) -> Result<(), GpuError> {
        let can_batch = context.lib.cuMemcpyBatchAsync.is_some() && !scratch.no_batch;
        let way = choose(method, self.direction, runs, kernel.is_some(), can_batch);
        if way == Way::Kernel
            && let Some(kernel) = kernel
            && self.has_bounce(context)
        {
            return self.by_kernel(context.lib, kernel, runs, stream);
        }
        if way != Way::Copies && can_batch {
            match batch(context, runs, scratch, stream) {
                // The driver knows the call, and the device does not support it: nothing was queued.
                Err(GpuError::Call { code: NOT_SUPPORTED, .. }) => scratch.no_batch = true,
                done => return done,
            }
        }
        copies(context.lib, self.direction, runs, stream)
    }

    fn has_bounce(&mut self, context: &Context) -> bool {
        if matches!(self.bounce, Bounce::Unused) {
            self.bounce = match Buffers::new(context, self.direction) {
                Ok(buffers) => Bounce::Ready(buffers),
                Err(error) => {
                    tracing::warn!(gpu = context.ordinal, %error, "no memory for the copy kernel: copying in batches");
                    Bounce::None
                }
            };
        }
        matches!(self.bounce, Bounce::Ready(_))
    }

    fn by_kernel(&self, lib: &Library, kernel: &Kernel, runs: &[Piece], stream: CUstream) -> Result<(), GpuError> {
        let (Bounce::Ready(buffers), Some(launch)) = (&self.bounce, lib.cuLaunchKernel) else { return Ok(()) };
        let (Some(first), Some(last)) = (runs.first(), runs.last()) else { return Ok(()) };
        let device_list = buffers.device + (self.begun % 2) as u64 * buffers.stride;
        let data = device_list + LIST as u64;
        let list = buffers.lists.base().as_ptr().wrapping_add(self.begun % MOST_RUNNING * LIST).cast::<Entry>();
        let mut entries = 0;
        for run in runs {
            let (src, dst) = match self.direction {
                Direction::ToGpu => (data + (run.src - first.src), run.dst),
                Direction::ToHost => (run.src, data + (run.dst - first.dst)),
                Direction::Between => (run.src, run.dst),
            };
            let mut at = 0;
            while at < run.len {
                let len = KERNEL_RANGE.min(run.len - at);
                // SAFETY: `fits_kernel` bounds the number of entries by a list's. The list is ours, pinned, and free: the part
                // that used it before has ended, since at most MOST_RUNNING are in flight.
                unsafe { list.add(entries).write(Entry { src: src + at, dst: dst + at, len }) };
                entries += 1;
                at += len;
            }
        }
        // SAFETY: the list lies in pinned memory that outlives the copy, and fits the buffer on the GPU.
        let code =
            unsafe { (lib.cuMemcpyHtoDAsync_v2)(device_list, list.cast(), entries * size_of::<Entry>(), stream) };
        lib.check("cuMemcpyHtoDAsync", code)?;
        if self.direction == Direction::ToGpu {
            let from = std::ptr::with_exposed_provenance(first.src as usize);
            let len = (last.src + last.len - first.src) as usize;
            // SAFETY: the runs have no gaps, so the range is host memory that the job keeps alive; a part fits the buffer.
            lib.check("cuMemcpyHtoDAsync", unsafe { (lib.cuMemcpyHtoDAsync_v2)(data, from, len, stream) })?;
        }
        let (mut list_at, mut count) = (device_list, entries as u32);
        let mut parameters: [*mut c_void; 2] = [(&raw mut list_at).cast(), (&raw mut count).cast()];
        let blocks = BLOCKS.min(count);
        // SAFETY: the parameters have the kernel's types, and are copied during the call. Each entry lies in the job's memory
        // or in the buffer, aligned as the kernel demands.
        let code = unsafe {
            launch(
                kernel.function,
                blocks,
                1,
                1,
                THREADS,
                1,
                1,
                0,
                stream,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        lib.check("cuLaunchKernel", code)?;
        if self.direction == Direction::ToHost {
            let to = std::ptr::with_exposed_provenance_mut(first.dst as usize);
            let len = (last.dst + last.len - first.dst) as usize;
            // SAFETY: as above, in the other direction.
            lib.check("cuMemcpyDtoHAsync", unsafe { (lib.cuMemcpyDtoHAsync_v2)(to, data, len, stream) })?;
        }
        Ok(())
    }
}

fn copies(lib: &Library, direction: Direction, runs: &[Piece], stream: CUstream) -> Result<(), GpuError> {
    for &Piece { src, dst, len } in runs {
        let n = len as usize;
        let (call, code) = match direction {
            Direction::ToGpu => {
                let from = std::ptr::with_exposed_provenance(src as usize);
                // SAFETY: both ranges were checked against memory that the job keeps alive.
                ("cuMemcpyHtoDAsync", unsafe { (lib.cuMemcpyHtoDAsync_v2)(dst, from, n, stream) })
            }
            Direction::ToHost => {
                let to = std::ptr::with_exposed_provenance_mut(dst as usize);
                // SAFETY: both ranges were checked against memory that the job keeps alive.
                ("cuMemcpyDtoHAsync", unsafe { (lib.cuMemcpyDtoHAsync_v2)(to, src, n, stream) })
            }
            // SAFETY: both ranges were checked against memory that the job keeps alive.
            Direction::Between => ("cuMemcpyDtoDAsync", unsafe { (lib.cuMemcpyDtoDAsync_v2)(dst, src, n, stream) }),
        };
        lib.check(call, code)?;
    }
    Ok(())
}

fn batch(context: &Context, runs: &[Piece], scratch: &mut Scratch, stream: CUstream) -> Result<(), GpuError> {
    let lib = context.lib;
    let Some(batch) = lib.cuMemcpyBatchAsync else {
        return Err(GpuError::MissingSymbol { symbol: "cuMemcpyBatchAsync" });
    };
    if runs.is_empty() {
        return Ok(());
    }
    for (into, of) in [(&mut scratch.dsts, (|r| r.dst) as fn(&Piece) -> u64), (&mut scratch.srcs, |r| r.src)] {
        into.clear();
        into.extend(runs.iter().map(of));
    }
    scratch.sizes.clear();
    scratch.sizes.extend(runs.iter().map(|r| r.len as usize));
    let anywhere = CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID, id: 0 };
    let mut attributes = CUmemcpyAttributes {
        // In stream order: with ANY, a source may be read before work that the stream waits for (vLLM #39306).
        srcAccessOrder: CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
        srcLocHint: anywhere,
        dstLocHint: anywhere,
        flags: 0,
    };
    let (mut from_first, mut failed) = (0usize, 0usize);
    // SAFETY: the arrays have `runs.len()` elements, and the one attribute counts from the first copy on; all are read during
    // the call. The ranges were checked against memory that the job keeps alive.
    let code = unsafe {
        batch(
            scratch.dsts.as_mut_ptr(),
            scratch.srcs.as_mut_ptr(),
            scratch.sizes.as_mut_ptr(),
            runs.len(),
            &mut attributes,
            &mut from_first,
            1,
            &mut failed,
            stream,
        )
    };
    lib.check("cuMemcpyBatchAsync", code)
}

impl Buffers {
    fn new(context: &Context, direction: Direction) -> Result<Self, GpuError> {
        /// CU_MEMHOSTREGISTER_PORTABLE: pinned for every context.
        const PORTABLE: c_uint = 1;
        let lib = context.lib;
        let lists = Mapping::anonymous((MOST_RUNNING * LIST) as u64).map_err(GpuError::os("cannot map memory"))?;
        let at: *mut c_void = lists.base().as_ptr().cast();
        // SAFETY: the range is ours, and stays mapped until it is unregistered in `drop`.
        let code = unsafe { (lib.cuMemHostRegister_v2)(at, MOST_RUNNING * LIST, PORTABLE) };
        lib.check("cuMemHostRegister", code)?;
        let stride = LIST as u64 + if direction == Direction::Between { 0 } else { PART };
        let mut device = 0;
        // SAFETY: the context is current; the function writes one address.
        let code = unsafe { (lib.cuMemAlloc_v2)(&mut device, 2 * stride as usize) };
        if let Err(e) = lib.check("cuMemAlloc", code) {
            // SAFETY: the range was registered above, and nothing uses it.
            let _ = unsafe { (lib.cuMemHostUnregister)(at) };
            return Err(e);
        }
        Ok(Self { device, stride, lists })
    }
}

impl Drop for Pipes {
    fn drop(&mut self) {
        // Runs when nothing is in flight, or the context is unusable: then every call fails, and the driver frees all with the
        // context.
        let lib = self.context.lib;
        for pipe in &mut self.pipes {
            if let Bounce::Ready(buffers) = &pipe.bounce {
                // SAFETY: both are ours, and nothing uses them.
                unsafe {
                    (lib.cuMemFree_v2)(buffers.device);
                    (lib.cuMemHostUnregister)(buffers.lists.base().as_ptr().cast());
                }
            }
            for event in pipe.events.drain(..) {
                // SAFETY: the event is ours, and not in use.
                unsafe { (lib.cuEventDestroy_v2)(event) };
            }
            for stream in pipe.streams.into_iter().filter(|s| !s.is_null()) {
                // SAFETY: the stream is ours.
                unsafe { (lib.cuStreamDestroy_v2)(stream) };
            }
        }
        if let (Ok(kernel), Some(unload)) = (&self.kernel, lib.cuModuleUnload) {
            // SAFETY: the module is ours, and nothing runs of it.
            unsafe { unload(kernel.module) };
        }
    }
}
