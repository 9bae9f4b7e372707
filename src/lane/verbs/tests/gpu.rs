//! Pools in GPU memory: how a NIC registers them, and when its writes count. On the stand-in for libcuda.

use std::time::{Duration, Instant};

use kvferry_cuda_standin::Control;
use kvferry_proto::LaneEvent;

use super::{
    fake::{CUDA, FakeDevice},
    rig::{A, Rig, SEGMENTS},
};
use crate::{
    config::VerbsConfig,
    lane::{
        WakingLane,
        verbs::{
            error::VerbsError,
            gpu::{Dmabufs, GpuReach, Part, probe, register},
            memory::{Access, Pd},
            rail::Role,
            rails::Rails,
        },
    },
    memory::{Memory, gpu::testing},
};

const LIMIT: Duration = Duration::from_secs(20);

/// Runs `body` with a driver with these settings, which the fake devices know.
fn with_driver<T: Fn()>(test: T, settings: &str, body: impl FnOnce(Control)) {
    testing::with_driver(test, settings, |control| body(*CUDA.get_or_init(|| control)));
}

fn on_gpu() -> Memory {
    Memory::alloc_gpu(0, &SEGMENTS).unwrap()
}

/// A rig with both pools in GPU memory.
fn rig() -> Rig {
    Rig::between(on_gpu(), on_gpu(), 1, VerbsConfig { queue_pairs: 1, ..VerbsConfig::default() })
}

/// Pulls blocks, up to their fence.
fn pull(r: &mut Rig) {
    assert_eq!(r.post(A, 0..8), 8);
    let word = r.nonce.get();
    assert_eq!(r.fence(), LaneEvent::Fence { attempt: A, chunk: 0, word });
    r.check(0..8);
}

/// The findings for a device that refuses dmabufs and GPU addresses with these errors, with the same answer for a probe.
fn reach(refuse_dmabuf: i32, refuse_gpu: i32) -> GpuReach {
    let device = FakeDevice::new("fake");
    let handle = device.handle();
    {
        let mut control = handle.lock().unwrap();
        (control.refuse_dmabuf, control.refuse_gpu) = (refuse_dmabuf, refuse_gpu);
    }
    let (pd, pool) = (Pd::new(device.device).unwrap(), on_gpu());
    let gpu = pool.gpu().unwrap();
    let found = GpuReach::of("fake:1", &pd, gpu, &pool);
    let probed = probe(&pd, gpu, &pool, Access::Landing { relaxed: false });
    assert_eq!((probed.is_ok(), found.rail.as_str()), (found.is_served(), "fake:1"), "{probed:?}");
    if let Err(e) = probed {
        let VerbsError::GpuMemory { dmabuf, peermem, .. } = &e else { panic!("{e}") };
        assert_eq!((Err(dmabuf.clone()), Err(peermem.clone())), (found.dmabuf.clone(), found.address.clone()));
    }
    found
}

/// That a way was refused, for this reason.
fn refused(way: &Result<(), String>, why: &str) {
    assert!(way.as_ref().is_err_and(|e| e.contains(why)), "{way:?}");
}

#[test]
fn each_way_to_gpu_memory_is_tried_and_has_its_reason() {
    with_driver(each_way_to_gpu_memory_is_tried_and_has_its_reason, "dmabuf=1", |_| {
        assert!(matches!(reach(0, 0), GpuReach { dmabuf: Ok(()), address: Ok(()), unordered: None, .. }));
        let by_dmabuf = reach(0, libc::EFAULT);
        assert!(by_dmabuf.dmabuf.is_ok() && by_dmabuf.is_direct());
        refused(&by_dmabuf.address, "nvidia_peermem is not loaded");
        let by_address = reach(libc::EOPNOTSUPP, 0);
        assert!(by_address.address.is_ok() && by_address.is_direct());
        refused(&by_address.dmabuf, "os error 95");
        let neither = reach(libc::EOPNOTSUPP, libc::EFAULT);
        assert!(!neither.is_served() && !neither.is_direct(), "its reads go through the ring");
        refused(&neither.dmabuf, "os error 95");
        refused(&neither.address, "os error 14");
    });
}

#[test]
fn a_driver_without_dmabufs_leaves_the_address() {
    with_driver(a_driver_without_dmabufs_leaves_the_address, "dmabuf=0", |_| {
        let found = reach(0, 0);
        assert!(found.address.is_ok() && found.is_direct());
        refused(&found.dmabuf, "exports no dmabuf");
        let mut r = rig();
        assert_eq!(r.device().dmabufs, 0);
        pull(&mut r);
    });
}

#[test]
fn blocks_land_in_gpu_memory_and_need_no_flush_where_the_gpu_orders_them() {
    with_driver(blocks_land_in_gpu_memory_and_need_no_flush_where_the_gpu_orders_them, "dmabuf=1", |control| {
        let mut r = rig();
        assert_eq!((r.device().dmabufs, r.served[0].lock().unwrap().dmabufs), (1, 1));
        pull(&mut r);
        assert_eq!(control.counts().flushes, 0);
    });
}

#[test]
fn a_chunk_counts_only_after_a_flush_where_the_gpu_orders_nothing() {
    with_driver(a_chunk_counts_only_after_a_flush_where_the_gpu_orders_nothing, "dmabuf=1,ordering=0", |control| {
        const FLUSH: &std::ffi::CStr = c"cuFlushGPUDirectRDMAWrites";
        assert!(reach(0, 0).is_direct());
        let mut r = rig();
        control.block_calls(FLUSH, true);
        assert_eq!(r.post(A, 0..8), 8);
        // The data has landed, and its fence word too.
        let limit = Instant::now() + LIMIT;
        while control.caught(FLUSH) == 0 {
            assert!(Instant::now() < limit, "no flush after {:?}", r.events);
            r.execute(|_| ());
            r.poll();
        }
        assert_eq!(r.done(), 8);
        // It looks for a while, and then its owner may sleep until the flush is done.
        while let Err(e) = r.lane.arm().map(drop) {
            assert_eq!(e.kind(), std::io::ErrorKind::WouldBlock);
            r.poll();
        }
        let counts = |e: &LaneEvent| matches!(e, LaneEvent::Fence { .. });
        assert!(!r.events.iter().any(counts), "it is not visible to kernels yet: {:?}", r.events);
        control.block_calls(FLUSH, false);
        r.until(counts);
        assert_eq!(control.counts().flushes, 1);
        pull(&mut r);
        assert_eq!(control.counts().flushes, 2);
    });
}

#[test]
fn a_flush_that_fails_fails_its_chunk() {
    with_driver(a_flush_that_fails_fails_its_chunk, "dmabuf=1,ordering=0", |control| {
        let mut r = rig();
        const INVALID_VALUE: i32 = 1;
        control.fail_calls(c"cuFlushGPUDirectRDMAWrites", INVALID_VALUE, 0, 1);
        assert_eq!(r.post(A, 0..8), 8);
        let limit = Instant::now() + LIMIT;
        while !r.poll().iter().any(|e| matches!(e, LaneEvent::Failed { attempt: A, .. })) {
            assert!(Instant::now() < limit, "{:?}", r.events);
            r.execute(|_| ());
        }
        assert!(!r.events.iter().any(|e| matches!(e, LaneEvent::Fence { .. })), "{:?}", r.events);
    });
}

#[test]
fn a_gpu_that_neither_orders_writes_nor_can_be_flushed_is_read_into_through_the_ring() {
    let test = a_gpu_that_neither_orders_writes_nor_can_be_flushed_is_read_into_through_the_ring;
    with_driver(test, "dmabuf=1,ordering=0,flush=0", |_| {
        let found = reach(0, 0);
        assert!(found.is_served() && !found.is_direct());
        assert!(found.unordered.is_some_and(|why| why.contains("neither orders")));
        // This decides whether a consumer's rails read into the ring.
        let reached = Rails::reach(&VerbsConfig::default(), &on_gpu(), &Role::Reader);
        assert!(matches!(reached, Err(VerbsError::Unordered { .. })), "{reached:?}");
        // Its own memory can be read by others.
        let host = Memory::alloc(&SEGMENTS).unwrap();
        let mut r = Rig::between(host, on_gpu(), 1, VerbsConfig::default());
        pull(&mut r);
    });
}

#[test]
fn a_dmabuf_that_could_not_be_exported_is_exported_for_the_next_registration() {
    let test = a_dmabuf_that_could_not_be_exported_is_exported_for_the_next_registration;
    with_driver(test, "dmabuf=1", |control| {
        let device = FakeDevice::new("fake");
        device.handle().lock().unwrap().refuse_gpu = libc::EFAULT;
        let (pd, pool) = (Pd::new(device.device).unwrap(), on_gpu());
        let (dmabufs, access) = (Dmabufs::default(), Access::Landing { relaxed: false });
        let part = Part { gpu: pool.gpu().unwrap(), memory: &pool, segment: 0, len: SEGMENTS[0] };
        const OUT_OF_MEMORY: i32 = 2;
        control.fail_calls(c"cuMemGetHandleForAddressRange", OUT_OF_MEMORY, 0, 1);
        let error = register(&pd, part, access, &dmabufs).map(drop).unwrap_err();
        assert!(error.to_string().contains("out of memory"), "{error}");
        assert!(register(&pd, part, access, &dmabufs).is_ok());
        // One dmabuf is enough for all devices.
        control.fail_calls(c"cuMemGetHandleForAddressRange", OUT_OF_MEMORY, 0, 1);
        assert!(register(&pd, part, access, &dmabufs).is_ok());
    });
}
