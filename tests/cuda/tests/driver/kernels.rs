use crate::rig::*;

const PTX: &std::ffi::CStr = c".version 6.3\n.visible .entry kvferry_copy(.param .u64 list, .param .u32 count) {}";

fn load() -> sys::CUfunction {
    let (mut module, mut function) = (std::ptr::null_mut(), std::ptr::null_mut());
    cu!(cuModuleLoadData(&mut module, PTX.as_ptr().cast()));
    cu!(cuModuleGetFunction(&mut function, module, c"another".as_ptr()) => 500);
    cu!(cuModuleGetFunction(&mut function, module, c"kvferry_copy".as_ptr()));
    function
}

fn launch(function: sys::CUfunction, mut list: u64, mut count: u32, stream: sys::CUstream) {
    let mut parameters = [(&raw mut list).cast(), (&raw mut count).cast()];
    let none = std::ptr::null_mut();
    cu!(cuLaunchKernel(function, 16, 1, 1, 256, 1, 1, 0, stream, parameters.as_mut_ptr(), none));
}

#[test]
fn the_kernel_copies_a_list_that_it_reads_when_it_runs() {
    alone("kernels::the_kernel_copies_a_list_that_it_reads_when_it_runs", "", || {
        let control = begin();
        let (function, stream, address) = (load(), stream(), alloc(4096));
        let mut host = vec![0_u64; 1024];
        cu!(cuMemHostRegister_v2(host.as_mut_ptr().cast(), 8192, 0));
        upload(address, &(0..=255).collect::<Vec<u8>>());
        let list = host.as_mut_ptr() as u64;
        control.hang(true);
        launch(function, list, 2, stream);
        host[..6].copy_from_slice(&[address, address + 1024, 256, address + 16, list + 1024, 32]);
        control.hang(false);
        cu!(cuStreamSynchronize(stream));
        assert_eq!(download(address + 1024, 256), (0..=255).collect::<Vec<u8>>());
        let word = unsafe { host.as_ptr().add(128).read_volatile() };
        assert_eq!(word.to_le_bytes(), [16, 17, 18, 19, 20, 21, 22, 23]);
        let counts = control.counts();
        assert_eq!((counts.launches, counts.kernel_copies), (1, 2));
    });
}

fn fault(entry: impl Fn(u64, u64) -> [u64; 3], expected: i32) {
    begin();
    let (function, stream, address) = (load(), stream(), alloc(4096));
    let unregistered = vec![0_u64; 64];
    let list = alloc(24);
    let entry = entry(address, unregistered.as_ptr() as u64 & !15);
    upload(list, &entry.map(u64::to_le_bytes).concat());
    launch(function, list, 1, stream);
    cu!(cuStreamSynchronize(stream) => expected);
    cu!(cuMemAlloc_v2(&mut 0, 8) => expected);
}

#[test]
fn a_length_that_is_no_multiple_of_16_is_a_sticky_error() {
    alone("kernels::a_length_that_is_no_multiple_of_16_is_a_sticky_error", "", || {
        fault(|device, _| [device, device + 1024, 24], 716);
    });
}

#[test]
fn an_unaligned_address_is_a_sticky_error() {
    alone("kernels::an_unaligned_address_is_a_sticky_error", "", || fault(|d, _| [d + 8, d + 1024, 32], 716));
}

#[test]
fn memory_behind_the_end_is_a_sticky_error() {
    alone("kernels::memory_behind_the_end_is_a_sticky_error", "", || fault(|d, _| [d, d + 4080, 32], 700));
}

#[test]
fn unregistered_host_memory_is_a_sticky_error() {
    alone("kernels::unregistered_host_memory_is_a_sticky_error", "", || fault(|d, host| [d, host, 32], 700));
}

#[test]
fn a_module_needs_the_entry() {
    alone("kernels::a_module_needs_the_entry", "", || {
        begin();
        cu!(cuModuleLoadData(&mut std::ptr::null_mut(), c".entry other".as_ptr().cast()) => 218);
    });
}

#[test]
fn a_driver_without_compiler_loads_no_module() {
    alone("kernels::a_driver_without_compiler_loads_no_module", "kernel=no", || {
        begin();
        cu!(cuModuleLoadData(&mut std::ptr::null_mut(), PTX.as_ptr().cast()) => 221);
    });
}

#[test]
fn a_kernel_touches_memory_of_a_peer_only_when_allowed() {
    alone("kernels::a_kernel_touches_memory_of_a_peer_only_when_allowed", "devices=2", || {
        begin();
        let near = alloc(64);
        let list = alloc(24);
        let peer = set_context(1);
        let far = alloc(64);
        set_context(0);
        upload(list, &[far, near, 64].map(u64::to_le_bytes).concat());
        let (function, stream) = (load(), stream());
        cu!(cuCtxEnablePeerAccess(peer, 0));
        cu!(cuCtxEnablePeerAccess(peer, 0) => 704);
        launch(function, list, 1, stream);
        cu!(cuStreamSynchronize(stream));
        // The other way round nobody has allowed it.
        cu!(cuCtxSetCurrent(peer));
        let list = alloc(24);
        upload(list, &[far, near, 64].map(u64::to_le_bytes).concat());
        let (function, stream) = (load(), crate::rig::stream());
        launch(function, list, 1, stream);
        cu!(cuStreamSynchronize(stream) => 700);
        set_context(0);
        cu!(cuCtxSynchronize());
    });
}
