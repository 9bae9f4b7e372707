use crate::rig::*;

const MIB: usize = 1 << 20;

#[test]
fn fresh_memory_has_a_pattern_and_copies_keep_bytes() {
    alone("memory::fresh_memory_has_a_pattern_and_copies_keep_bytes", "", || {
        begin();
        let address = alloc(1000);
        assert_eq!(download(address, 1000), vec![0xCD; 1000]);
        let bytes: Vec<u8> = (0..1000).map(|i| i as u8).collect();
        upload(address, &bytes);
        assert_eq!(download(address + 10, 100), bytes[10..110]);
        cu!(cuMemFree_v2(address));
        cu!(cuMemFree_v2(address) => 1);
    });
}

#[test]
fn a_host_access_crashes_and_the_kernel_refuses_device_memory() {
    let test = "memory::a_host_access_crashes_and_the_kernel_refuses_device_memory";
    if has_role(test) {
        begin();
        let address = alloc(MIB);
        // As for registering memory with a network card, the kernel finds no page to pin.
        let (pipe, file) = std::io::pipe().expect("a pipe");
        drop(pipe);
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        let written = unsafe { libc::write(fd, address as *const libc::c_void, 8) };
        assert!(written < 0);
        println!("reads");
        let byte = unsafe { (address as *const u8).read_volatile() };
        println!("read {byte}");
        return;
    }
    let output = start(test, "").wait_with_output().expect("a child");
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&output.status), Some(libc::SIGSEGV));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("reads") && !text.contains("read "), "{text}");
}

#[test]
fn memory_is_counted_and_limited() {
    alone("memory::memory_is_counted_and_limited", "memory=8M", || {
        let control = begin();
        let all = free_memory();
        assert_eq!(all, 8 * MIB);
        let address = alloc(6 * MIB);
        assert_eq!(free_memory(), 2 * MIB);
        let mut other = 0;
        cu!(cuMemAlloc_v2(&mut other, 3 * MIB) => 2);
        control.fail_allocations(1);
        cu!(cuMemAlloc_v2(&mut other, MIB) => 2);
        cu!(cuMemAlloc_v2(&mut other, MIB));
        cu!(cuMemFree_v2(other));
        cu!(cuMemFree_v2(address));
        assert_eq!(free_memory(), all);
        assert_eq!(control.counts().allocations, 0);
    });
}

#[test]
fn a_limit_from_the_environment_fails_allocations() {
    alone("memory::a_limit_from_the_environment_fails_allocations", "oom_after=2M", || {
        begin();
        cu!(cuMemFree_v2(alloc(2 * MIB)));
        let mut address = 0;
        cu!(cuMemAlloc_v2(&mut address, 4096) => 2);
    });
}

#[test]
fn a_copy_outside_of_the_allocation_is_an_error_at_the_call() {
    alone("memory::a_copy_outside_of_the_allocation_is_an_error_at_the_call", "", || {
        begin();
        let (address, stream) = (alloc(4096), stream());
        let bytes = [0_u8; 64];
        cu!(cuMemcpyHtoDAsync_v2(address + 4064, bytes.as_ptr().cast(), 64, stream) => 1);
        cu!(cuMemcpyHtoDAsync_v2(bytes.as_ptr() as u64, bytes.as_ptr().cast(), 64, stream) => 1);
        cu!(cuMemcpyHtoDAsync_v2(address + 4032, bytes.as_ptr().cast(), 64, stream));
        cu!(cuStreamSynchronize(stream));
    });
}

#[test]
fn host_memory_is_registered_once() {
    alone("memory::host_memory_is_registered_once", "", || {
        begin();
        let mut memory = vec![0_u8; 2 * 4096];
        let at = memory.as_mut_ptr();
        cu!(cuMemHostRegister_v2(at.cast(), 8192, 1));
        cu!(cuMemHostRegister_v2(at.wrapping_add(4096).cast(), 64, 1) => 712);
        cu!(cuMemHostRegister_v2(alloc(4096) as *mut _, 4096, 1) => 1);
        cu!(cuMemHostUnregister(at.wrapping_add(8).cast()) => 713);
        cu!(cuMemHostUnregister(at.cast()));
        cu!(cuMemHostUnregister(at.cast()) => 713);
    });
}

#[test]
fn a_pointer_tells_its_device_and_its_allocation() {
    alone("memory::a_pointer_tells_its_device_and_its_allocation", "devices=2", || {
        use sys::CUpointer_attribute_enum as A;
        begin();
        let context = set_context(1);
        let address = alloc(3000);
        let (mut owner, mut kind, mut ordinal, mut start, mut size) = (0_usize, 0_u32, 0_i32, 0_u64, 0_usize);
        let mut names = [
            A::CU_POINTER_ATTRIBUTE_CONTEXT,
            A::CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
            A::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
            A::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR,
            A::CU_POINTER_ATTRIBUTE_RANGE_SIZE,
        ];
        let mut data: [*mut std::ffi::c_void; 5] = [
            (&raw mut owner).cast(),
            (&raw mut kind).cast(),
            (&raw mut ordinal).cast(),
            (&raw mut start).cast(),
            (&raw mut size).cast(),
        ];
        cu!(cuPointerGetAttributes(5, names.as_mut_ptr(), data.as_mut_ptr(), address + 17));
        assert_eq!((owner, kind, ordinal, start, size), (context as usize, 2, 1, address, 3000));
        let host = 5_u64;
        cu!(cuPointerGetAttributes(5, names.as_mut_ptr(), data.as_mut_ptr(), &raw const host as u64));
        assert_eq!((owner, kind, ordinal), (0, 0, -2));
        cu!(cuPointerGetAttribute((&raw mut kind).cast(), names[1], &raw const host as u64) => 1);
    });
}

/// The properties of pinned memory of device 0.
pub(crate) fn prop(shareable: bool) -> sys::CUmemAllocationProp {
    let mut prop: sys::CUmemAllocationProp = unsafe { std::mem::zeroed() };
    prop.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
    if shareable {
        prop.requestedHandleTypes = sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    }
    prop.allocFlags.gpuDirectRDMACapable = 1;
    prop
}

pub(crate) fn allow(address: u64, len: usize) {
    let access = sys::CUmemAccessDesc {
        location: prop(false).location,
        flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
    };
    cu!(cuMemSetAccess(address, len, &access, 1));
}

#[test]
fn mappings_need_access_and_follow_each_other_in_a_reservation() {
    alone("memory::mappings_need_access_and_follow_each_other_in_a_reservation", "memory=8M", || {
        let control = begin();
        let page = 2 * MIB;
        let (mut address, mut first, mut second) = (0, 0, 0);
        cu!(cuMemAddressReserve(&mut address, 2 * page, 0, 0, 0));
        cu!(cuMemCreate(&mut first, page, &prop(false), 0));
        cu!(cuMemCreate(&mut second, page, &prop(false), 0));
        cu!(cuMemCreate(&mut 0, page + 4096, &prop(false), 0) => 1);
        cu!(cuMemMap(address, page, 0, first, 0));
        cu!(cuMemMap(address, page, 0, second, 0) => 1);
        cu!(cuMemMap(address + page as u64, page, 0, second, 0));
        let bytes: Vec<u8> = (0..page).map(|i| (i / 7) as u8).collect();
        let middle = address + page as u64 / 2;
        cu!(cuMemcpyHtoD_v2(middle, bytes.as_ptr().cast(), page) => 1);
        allow(address, 2 * page);
        upload(middle, &bytes);
        assert_eq!(download(middle, page), bytes);
        let (mut base, mut size) = (0, 0);
        cu!(cuMemGetAddressRange_v2(&mut base, &mut size, middle));
        assert_eq!((base, size), (address, page));
        let mut again = 0;
        cu!(cuMemRetainAllocationHandle(&mut again, middle as *mut _));
        assert_eq!(again, first);
        for handle in [first, first, second] {
            cu!(cuMemRelease(handle));
        }
        cu!(cuMemRelease(first) => 1);
        assert_eq!(free_memory(), 8 * MIB - 2 * page);
        cu!(cuMemAddressFree(address, 2 * page) => 1);
        cu!(cuMemUnmap(address, 2 * page));
        assert_eq!(free_memory(), 8 * MIB);
        cu!(cuMemAddressFree(address, 2 * page));
        let counts = control.counts();
        assert_eq!((counts.physical, counts.mappings, counts.reservations), (0, 0, 0));
    });
}

#[test]
fn a_range_is_exported_only_with_dmabuf_and_page_aligned() {
    use sys::CUmemRangeHandleType_enum::CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD as FD;
    alone("memory::a_range_is_exported_only_with_dmabuf_and_page_aligned", "dmabuf=1", || {
        begin();
        let address = alloc(3 * 4096);
        upload(address + 4096, b"second page");
        let mut fd = -1_i32;
        let at = (&raw mut fd).cast();
        cu!(cuMemGetHandleForAddressRange(at, address + 64, 4096, FD, 0) => 1);
        cu!(cuMemGetHandleForAddressRange(at, address, 4096, FD, 1) => 1);
        cu!(cuMemGetHandleForAddressRange(at, address, 4 * 4096, FD, 0) => 1);
        cu!(cuMemGetHandleForAddressRange(at, address + 4096, 4096, FD, 0));
        let mut bytes = [0_u8; 11];
        assert_eq!(unsafe { libc::read(fd, bytes.as_mut_ptr().cast(), 11) }, 11);
        assert_eq!(&bytes, b"second page");
        let before = free_memory();
        cu!(cuMemFree_v2(address));
        assert_eq!(free_memory(), before, "the descriptor holds the memory");
        unsafe { libc::close(fd) };
        assert_eq!(free_memory(), before + 3 * 4096);
    });
}
