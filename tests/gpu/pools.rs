//! Which memory can be a pool, and how the host reaches it.

use cudarc::driver::{result, sys};
use kvferry::{Config, CopyMethod, GpuError, LaneKind, Memory, Place, Ready};

use crate::{
    alone::{alone, on_standin},
    pair::{BLOCKS, Engine, Pair, on_gpu, on_host, pull},
};

#[test]
fn the_host_reaches_gpu_memory_by_copies_only() {
    alone!("pools::the_host_reaches_gpu_memory_by_copies_only");
    let memory = on_gpu();
    assert!(matches!(memory.place(), Place::Gpu { ordinal: 0, .. }));
    assert!(memory.memfds().is_none());
    let mut found = vec![1; 3 << 20];
    memory.read_into(0, 0, &mut found[..1 << 20]).unwrap();
    assert!(found[..1 << 20].iter().all(|b| *b == 0), "fresh memory is zero");
    let bytes: Vec<u8> = (0..found.len() as u32 / 4).flat_map(u32::to_le_bytes).collect();
    for (segment, offset, len) in
        [(0, 0, 1 << 20), (0, 5, 70_001), (0, (1 << 20) + 5, 1), (0, 4 << 20, 0), (0, 7, 3 << 20)]
    {
        memory.write_from(segment, offset, &bytes[..len]).unwrap();
        memory.read_into(segment, offset, &mut found[..len]).unwrap();
        assert_eq!(found[..len], bytes[..len]);
    }
    for (segment, offset) in [(0, 4 << 20), (1, 0), (0, u64::MAX)] {
        assert!(
            memory.read_into(segment, offset, &mut [0]).is_err() && memory.write_from(segment, offset, &[0]).is_err()
        );
    }
    // Between places.
    let host = on_host();
    host.copy_from(&memory, (0, 7), (0, 3), 70_001).unwrap();
    host.read_into(0, 3, &mut found[..70_001]).unwrap();
    assert_eq!(found[..70_001], bytes[..70_001]);
    // A system call on it is refused, rather than crash.
    let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
    let span = kvferry::Span { segment: 0, offset: 0, len: 8 };
    let error = memory.writev(std::os::fd::AsFd::as_fd(&a), &[span], 0).unwrap_err();
    assert!(error.to_string().contains("the host cannot access GPU memory"), "{error}");
}

#[test]
fn only_memory_of_one_gpu_is_taken_as_a_pool() {
    let _ = on_standin!("pools::only_memory_of_one_gpu_is_taken_as_a_pool", "devices=2,memory=1G");
    let take = |segments: &[(u64, u64)]| unsafe { Memory::from_gpu(segments, None) };
    let host = vec![0u8; 4096];
    let refused = take(&[(host.as_ptr() as u64, 4096)]).unwrap_err();
    assert!(matches!(refused, GpuError::NotGpuMemory { segment: 0, .. }), "{refused}");
    let on = |ordinal: i32, bytes: usize| {
        let device = result::device::get(ordinal).unwrap();
        unsafe {
            result::ctx::set_current(result::primary_ctx::retain(device).unwrap()).unwrap();
            result::malloc_sync(bytes).unwrap()
        }
    };
    let (first, second, other) = (on(0, 1 << 20), on(0, 4096), on(1, 1 << 20));
    let memory = take(&[(first, 1 << 20), (second, 4096)]).unwrap();
    assert_eq!((memory.base(0), memory.base(1)), (first, second));
    assert!(take(&[(first + 4096, 8192)]).is_ok(), "a part of an allocation");
    assert_eq!(
        take(&[(first, 4096), (other, 4096)]).unwrap_err(),
        GpuError::SeveralDevices { segment: 1, has: 1, first: 0 }
    );
    assert!(matches!(take(&[(other, 4096)]).unwrap().place(), Place::Gpu { ordinal: 1, .. }));
    for past in [(first, 64 << 30), (second + (1 << 30), 1), (first, u64::MAX), (16, 16)] {
        let refused = take(&[past]).unwrap_err();
        assert!(matches!(refused, GpuError::NotGpuMemory { .. }), "{past:?}: {refused}");
    }
    let absent = Memory::alloc_gpu(2, &[4096]).unwrap_err();
    assert_eq!(absent, GpuError::NoSuchDevice { ordinal: 2, devices: 2 });
    let large = Memory::alloc_gpu(0, &[2 << 30]).unwrap_err();
    assert!(large.to_string().contains("out of memory"), "{large}");
    assert!(Memory::alloc_gpu(0, &[4096]).is_ok(), "the GPU goes on");
}

#[test]
fn a_segment_of_several_mappings_is_a_pool_and_one_with_a_hole_is_not() {
    let _ = on_standin!("pools::a_segment_of_several_mappings_is_a_pool_and_one_with_a_hole_is_not");
    let _engine = Engine::new();
    // As torch's expandable segments: one reservation, mapped piece by piece.
    const PIECE: usize = 2 << 20;
    let mut at = 0;
    let map = |at: u64| unsafe {
        let mut properties: sys::CUmemAllocationProp = std::mem::zeroed();
        properties.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        properties.location = location();
        let mut handle = 0;
        sys::cuMemCreate(&mut handle, PIECE, &properties, 0).result().unwrap();
        sys::cuMemMap(at, PIECE, 0, handle, 0).result().unwrap();
        let flags = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        sys::cuMemSetAccess(at, PIECE, &sys::CUmemAccessDesc { location: location(), flags }, 1).result().unwrap();
    };
    unsafe { sys::cuMemAddressReserve(&mut at, 4 * PIECE, 0, 0, 0).result().unwrap() };
    [0, 1, 3].into_iter().for_each(|i| map(at + (i * PIECE) as u64));
    let take = |from: u64, len: usize| unsafe { Memory::from_gpu(&[(from, len as u64)], None) };
    let memory = take(at, 2 * PIECE).unwrap();
    // Over the place where the mappings meet.
    let bytes: Vec<u8> = (0..9000u32).map(|i| i as u8).collect();
    memory.write_from(0, PIECE as u64 - 4500, &bytes).unwrap();
    let mut found = vec![0; 9000];
    memory.read_into(0, PIECE as u64 - 4500, &mut found).unwrap();
    assert_eq!(found, bytes);
    let hole = take(at, 4 * PIECE).unwrap_err();
    assert!(matches!(hole, GpuError::NotGpuMemory { .. }), "{hole}");
}

fn location() -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: 0 }
}

/// Pulls between all places by each method of copying, with the given parts of the driver.
fn every_method(launches: bool, batches: bool) {
    let standin = crate::alone::standin().unwrap();
    for method in [CopyMethod::Auto, CopyMethod::Copies, CopyMethod::Batch, CopyMethod::Kernel] {
        for (theirs, ours) in [(on_gpu(), on_host()), (on_host(), on_gpu()), (on_gpu(), on_gpu())] {
            let mut config = Config::default();
            config.gpu.copy = method;
            let before = standin.counts();
            let pair = Pair::with(theirs, ours, config);
            pair.fill(method as u8);
            pair.consumer.pull(pull(&pair.offer(Ready::Now))).unwrap();
            let end = pair.ended();
            assert!(end.outcome.complete(), "{method:?}: {:?}", end.outcome);
            assert_eq!((end.outcome.loaded(), &end.outcome.lanes[..]), (u64::from(BLOCKS), &[LaneKind::Tcp][..]));
            assert!(pair.arrived(method as u8), "{method:?}");
            let after = standin.counts();
            let kernel = matches!(method, CopyMethod::Kernel) && launches;
            assert_eq!(
                after.launches > before.launches,
                kernel || (method == CopyMethod::Auto && launches),
                "{method:?}"
            );
            if method == CopyMethod::Batch {
                assert_eq!(after.batches > before.batches, batches);
            }
        }
    }
}

#[test]
fn every_way_to_copy_is_exact() {
    let _ = on_standin!("pools::every_way_to_copy_is_exact");
    every_method(true, true);
}

#[test]
fn a_driver_without_kernels_copies_in_batches() {
    let _ = on_standin!("pools::a_driver_without_kernels_copies_in_batches", "memory=1G,kernel=no");
    every_method(false, true);
}

#[test]
fn a_driver_without_kernels_and_batches_copies_one_by_one() {
    let _ =
        on_standin!("pools::a_driver_without_kernels_and_batches_copies_one_by_one", "memory=1G,kernel=no,batch=no");
    every_method(false, false);
}
