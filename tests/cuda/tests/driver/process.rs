use crate::rig::*;

#[test]
fn cudarc_finds_the_loaded_library() {
    alone("process::cudarc_finds_the_loaded_library", "devices=2,version=12090,memory=1G", || {
        let control = Control::new().expect("the stand-in");
        assert!(unsafe { sys::is_culib_present() });
        let mut count = 0;
        cu!(cuDeviceGetCount(&mut count) => 3);
        cu!(cuDriverGetVersion(&mut count));
        assert_eq!(count, 12090);
        cu!(cuInit(0));
        cu!(cuDeviceGetCount(&mut count));
        assert_eq!(count, 2);
        let mut name = [0; 64];
        cu!(cuDeviceGetName(name.as_mut_ptr(), 64, 1));
        assert_eq!(unsafe { std::ffi::CStr::from_ptr(name.as_ptr()) }, c"Stand-in GPU 1");
        let mut ids: [sys::CUuuid; 2] = unsafe { std::mem::zeroed() };
        cu!(cuDeviceGetUuid_v2(&mut ids[0], 0));
        cu!(cuDeviceGetUuid_v2(&mut ids[1], 1));
        assert_ne!(ids[0].bytes, ids[1].bytes);
        cu!(cuMemAlloc_v2(&mut 0, 8) => 201);
        let calls = control.counts().calls;
        assert_eq!(control.counts().calls, calls);
        set_context(1);
        assert_eq!(control.counts().calls, calls + 2);
        let mut text = std::ptr::null();
        cu!(cuGetErrorName(sys::CUresult::CUDA_ERROR_ILLEGAL_ADDRESS, &mut text));
        assert_eq!(unsafe { std::ffi::CStr::from_ptr(text) }, c"CUDA_ERROR_ILLEGAL_ADDRESS");
    });
}

#[test]
fn a_stub_library_says_so() {
    alone("process::a_stub_library_says_so", "stub=yes", || {
        Control::new().expect("the stand-in");
        cu!(cuInit(0) => 34);
    });
}

#[test]
fn a_machine_without_a_device_says_so() {
    alone("process::a_machine_without_a_device_says_so", "nodevice=yes", || {
        Control::new().expect("the stand-in");
        cu!(cuInit(0) => 100);
    });
}

#[test]
fn an_unknown_setting_fails_the_start() {
    alone("process::an_unknown_setting_fails_the_start", "colour=blue", || {
        Control::new().expect("the stand-in");
        cu!(cuInit(0) => 999);
    });
}

#[test]
fn calls_of_one_function_fail_or_block_as_a_test_wants_it() {
    alone("process::calls_of_one_function_fail_or_block_as_a_test_wants_it", "memory=1M", || {
        let control = begin();
        control.fail_calls(c"cuMemAlloc_v2", 719, 1, 1);
        let at = alloc(4096);
        cu!(cuMemAlloc_v2(&mut 0, 8) => 719);
        assert_eq!(control.caught(c"cuMemAlloc_v2"), 1);
        alloc(8);
        control.block_calls(c"cuMemFree_v2", true);
        let freed = std::thread::spawn(move || {
            set_context(0);
            cu!(cuMemFree_v2(at));
        });
        while control.caught(c"cuMemFree_v2") == 0 {
            std::thread::yield_now();
        }
        alloc(8);
        assert!(!freed.is_finished());
        control.block_calls(c"cuMemFree_v2", false);
        freed.join().expect("it goes on");
    });
}

#[test]
fn a_released_context_frees_its_resources() {
    alone("process::a_released_context_frees_its_resources", "memory=1M", || {
        let control = begin();
        let (_address, _stream, _event) = (alloc(4096), stream(), event());
        control.raise(0, 700, 0);
        cu!(cuCtxSynchronize() => 700);
        cu!(cuDevicePrimaryCtxRelease_v2(0));
        cu!(cuCtxSynchronize() => 201);
        let counts = control.counts();
        assert_eq!((counts.allocations, counts.streams, counts.events), (0, 0, 0));
        set_context(0);
        cu!(cuCtxSynchronize());
        assert_eq!(free_memory(), 1 << 20);
    });
}

#[test]
fn a_private_folder_is_removed_at_exit() {
    let test = "process::a_private_folder_is_removed_at_exit";
    let folder = |pid: u32| format!("/dev/shm/kvferry-standin-{}-{pid}", unsafe { libc::getuid() });
    if has_role(test) {
        begin();
        alloc(4096);
        assert!(std::path::Path::new(&folder(std::process::id())).exists());
        return;
    }
    let mut child = start(test, "");
    assert!(child.wait().expect("an end").success());
    assert!(!std::path::Path::new(&folder(child.id())).exists());
}

#[test]
fn a_context_that_ends_takes_nothing_of_the_next_one_with_it() {
    alone("process::a_context_that_ends_takes_nothing_of_the_next_one_with_it", "memory=1M", || {
        let _control = Control::new().expect("the stand-in");
        cu!(cuInit(0));
        let lives = || {
            for _ in 0..2000 {
                set_context(0);
                let (stream, event) = (stream(), event());
                cu!(cuEventRecord(event, stream));
                cu!(cuEventSynchronize(event));
                cu!(cuEventDestroy_v2(event));
                cu!(cuStreamDestroy_v2(stream));
                cu!(cuDevicePrimaryCtxRelease_v2(0));
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(lives);
            scope.spawn(lives);
        });
    });
}
