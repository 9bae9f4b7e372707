//! A producer and a consumer in this process, with pools of one layout.

use std::{
    ffi::c_void,
    time::{Duration, Instant},
};

use cudarc::driver::{result, sys};
use kvferry::{
    BlockId, Config, Consumer, CudaStream, Ended, GroupId, LaneKind, LocalBlocks, Memory, Model, Offer, OfferGroup,
    OfferSpec, PoolLayout, Producer, Pull, Ready,
};
use kvferry_testkit::{
    gpu,
    rig::{self, SOON},
};

/// Blocks of the pools.
pub(crate) const BLOCKS: u32 = 64;

/// Bytes of a pool, which is one segment.
pub(crate) const BYTES: usize = (BLOCKS as usize) << 16;

pub(crate) fn layout() -> PoolLayout {
    PoolLayout::uniform(BLOCKS, 4, 16 << 10, 16)
}

fn model() -> Model {
    rig::model("m", "uint8")
}

/// Host memory whose pages are there.
pub(crate) fn on_host() -> Memory {
    Memory::alloc(&layout().segments).unwrap()
}

pub(crate) fn on_gpu() -> Memory {
    gpu::memory(&layout())
}

/// A producer and a consumer, whose pulls use tcp.
pub(crate) struct Pair {
    pub(crate) producer: Producer,
    pub(crate) consumer: Consumer,
}

impl Pair {
    pub(crate) fn new(theirs: Memory, ours: Memory) -> Self {
        Self::with(theirs, ours, Config::default())
    }

    pub(crate) fn with(theirs: Memory, ours: Memory, config: Config) -> Self {
        Self::of(&layout(), theirs, ours, config)
    }

    /// As [`Pair::with`], of pools with another layout of as many blocks.
    pub(crate) fn of(layout: &PoolLayout, theirs: Memory, ours: Memory, config: Config) -> Self {
        let producer = Producer::builder("prefill".parse().unwrap(), model(), layout.clone())
            .memory(theirs)
            .config(config.clone())
            .lanes(vec![LaneKind::Tcp])
            .build()
            .unwrap();
        let consumer = Consumer::builder("decode".parse().unwrap(), model(), layout.clone())
            .memory(ours)
            .config(config)
            .build()
            .unwrap();
        Self { producer, consumer }
    }

    /// Fills the producer's pool: each block with bytes of its own.
    pub(crate) fn fill(&self, salt: u8) {
        self.producer.memory().write_from(0, 0, &pool_of(salt)).unwrap();
    }

    /// Offers every block, in the order of the pool.
    pub(crate) fn offer(&self, ready: Ready) -> Offer {
        let blocks = (0..BLOCKS).map(|b| Some(BlockId(b))).collect();
        let groups = vec![OfferGroup { group: GroupId(0), first_position: 0, blocks }];
        self.producer.offer(OfferSpec::new(u64::from(BLOCKS) * 16, groups), ready).unwrap()
    }

    pub(crate) fn ended(&self) -> Ended {
        self.consumer.wait(SOON).expect("the pull ends")
    }

    /// Whether the consumer's pool holds what [`Pair::fill`] wrote.
    pub(crate) fn arrived(&self, salt: u8) -> bool {
        let mut found = vec![0; BYTES];
        self.consumer.memory().read_into(0, 0, &mut found).unwrap();
        found == pool_of(salt)
    }
}

fn pool_of(salt: u8) -> Vec<u8> {
    (0..BYTES).map(|i| (i / 61) as u8 ^ (i >> 14) as u8 ^ salt).collect()
}

/// A pull of every block into the block of the same number.
pub(crate) fn pull(offer: &Offer) -> Pull {
    let blocks = (0..BLOCKS).map(|b| Some(BlockId(b))).collect();
    let wanted = LocalBlocks { group: GroupId(0), first_position: 0, blocks };
    Pull::new(offer.clone(), vec![wanted]).lanes(vec![LaneKind::Tcp]).deadline(SOON)
}

/// A pull of one block into the block of the same number: one chunk, so one job of four copies.
pub(crate) fn pull_block(offer: &Offer, block: u32) -> Pull {
    let wanted = LocalBlocks { group: GroupId(0), first_position: block, blocks: vec![Some(BlockId(block))] };
    Pull::new(offer.clone(), vec![wanted]).lanes(vec![LaneKind::Tcp]).deadline(SOON)
}

/// A stream of the engine, in the primary context of GPU 0, which it makes current in this thread.
pub(crate) struct Engine {
    pub(crate) stream: sys::CUstream,
    device: sys::CUdeviceptr,
}

impl Engine {
    const BYTES: usize = 1 << 16;

    pub(crate) fn new() -> Self {
        result::init().unwrap();
        let device = result::device::get(0).unwrap();
        unsafe { result::ctx::set_current(result::primary_ctx::retain(device).unwrap()).unwrap() };
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).unwrap();
        Self { stream, device: unsafe { result::malloc_sync(Self::BYTES).unwrap() } }
    }

    /// Another stream of the context, which it makes current in this thread. Allocates nothing.
    pub(crate) fn attached() -> Self {
        let device = result::device::get(0).unwrap();
        unsafe { result::ctx::set_current(result::primary_ctx::retain(device).unwrap()).unwrap() };
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).unwrap();
        Self { stream, device: 0 }
    }

    /// Queues work on the stream.
    pub(crate) fn work(&self) {
        unsafe { result::memset_d8_async(self.device, 7, Self::BYTES, self.stream).unwrap() };
    }

    /// The stream, as the engine gives it to kvferry.
    pub(crate) fn stream(&self) -> CudaStream {
        unsafe { CudaStream::from_raw(self.stream.cast::<c_void>()) }
    }
}

/// Waits until `done`, for a while.
pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < until, "waited {SOON:?} until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
