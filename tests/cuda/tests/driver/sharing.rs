use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout};

use crate::memory::{allow, prop};
use crate::rig::*;

const MIB: usize = 1 << 20;

/// A child that allocates, prints the handle of its memory in hex, and waits for its input to close.
struct Exporter {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Exporter {
    fn start(role: &str, settings: &str) -> Exporter {
        let mut child = start(role, settings);
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        Exporter { child, output }
    }

    /// The next line of the role; the test harness prints lines of its own.
    fn line(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(self.output.read_line(&mut line).expect("a line"), 0, "the child ended");
            if let Some((_, text)) = line.split_once("role: ") {
                return text.trim().to_owned();
            }
        }
    }

    fn handle(&mut self) -> sys::CUipcMemHandle {
        let line = self.line();
        let byte = |i| u8::from_str_radix(&line[2 * i..2 * i + 2], 16).expect("hex") as std::ffi::c_char;
        sys::CUipcMemHandle { reserved: std::array::from_fn(byte) }
    }

    fn kill(&mut self) {
        self.child.kill().expect("a child");
        self.child.wait().expect("an end");
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait_for_the_end_of_input() {
    let _ = std::io::stdin().read_line(&mut String::new());
}

const LEGACY: &str = "sharing::exporter_of_a_legacy_handle";

#[test]
#[ignore = "the other process of tests"]
fn exporter_of_a_legacy_handle() {
    if !has_role(LEGACY) {
        return;
    }
    begin();
    let address = alloc(2 * MIB);
    upload(address, b"of the exporter");
    let mut handle: sys::CUipcMemHandle = unsafe { std::mem::zeroed() };
    cu!(cuIpcGetMemHandle(&mut handle, address + 4096));
    let hex: String = handle.reserved.iter().map(|&b| format!("{:02x}", b as u8)).collect();
    println!("role: {hex}");
    wait_for_the_end_of_input();
}

#[test]
fn a_legacy_import_maps_the_allocation_and_holds_it_after_a_kill() {
    let test = "sharing::a_legacy_import_maps_the_allocation_and_holds_it_after_a_kill";
    let folder = Folder::new("legacy");
    let settings = std::env::var("KVFERRY_STANDIN").unwrap_or_else(|_| folder.setting() + ",memory=8M");
    alone(test, &settings.clone(), || {
        let control = begin();
        let mut exporter = Exporter::start(LEGACY, &settings);
        let handle = exporter.handle();
        let flags = 1;
        let mut address = 0;
        cu!(cuIpcOpenMemHandle_v2(&mut address, handle, flags));
        assert_eq!(download(address, 15), b"of the exporter");
        cu!(cuIpcOpenMemHandle_v2(&mut 0, handle, flags) => 208);
        cu!(cuMemFree_v2(address) => 1);
        let mut broken = handle;
        broken.reserved[20] ^= 1;
        cu!(cuIpcOpenMemHandle_v2(&mut 0, broken, flags) => 400);
        assert_eq!((free_memory(), control.counts().imports), (6 * MIB, 1));
        exporter.kill();
        assert_eq!(free_memory(), 6 * MIB, "the importer holds the memory of the dead");
        assert_eq!(download(address, 15), b"of the exporter");
        cu!(cuIpcCloseMemHandle(address));
        assert_eq!((free_memory(), control.counts().imports), (8 * MIB, 0));
        cu!(cuIpcOpenMemHandle_v2(&mut 0, handle, flags) => 1);
    });
}

#[test]
fn a_killed_process_gives_its_memory_back() {
    let test = "sharing::a_killed_process_gives_its_memory_back";
    let folder = Folder::new("killed");
    let settings = std::env::var("KVFERRY_STANDIN").unwrap_or_else(|_| folder.setting() + ",memory=8M");
    alone(test, &settings.clone(), || {
        begin();
        let mut exporter = Exporter::start(LEGACY, &settings);
        let handle = exporter.handle();
        assert_eq!(free_memory(), 6 * MIB);
        exporter.kill();
        assert_eq!(free_memory(), 8 * MIB);
        cu!(cuIpcOpenMemHandle_v2(&mut 0, handle, 1) => 1);
    });
}

#[test]
fn a_process_cannot_open_its_own_handle() {
    alone("sharing::a_process_cannot_open_its_own_handle", "", || {
        begin();
        let mut handle: sys::CUipcMemHandle = unsafe { std::mem::zeroed() };
        cu!(cuIpcGetMemHandle(&mut handle, alloc(64)));
        cu!(cuIpcOpenMemHandle_v2(&mut 0, handle, 1) => 201);
        cu!(cuIpcGetMemHandle(&mut handle, 4096) => 1);
    });
}

#[test]
fn handles_are_missing_without_ipc() {
    alone("sharing::handles_are_missing_without_ipc", "ipc=no", || {
        begin();
        let mut handle: sys::CUipcMemHandle = unsafe { std::mem::zeroed() };
        cu!(cuIpcGetMemHandle(&mut handle, alloc(64)) => 801);
    });
}

fn mapped(handle: u64, len: usize) -> u64 {
    let mut address = 0;
    cu!(cuMemAddressReserve(&mut address, len, 0, 0, 0));
    cu!(cuMemMap(address, len, 0, handle, 0));
    allow(address, len);
    address
}

const SHAREABLE: &str = "sharing::exporter_of_a_descriptor";

#[test]
#[ignore = "the other process of tests"]
fn exporter_of_a_descriptor() {
    if !has_role(SHAREABLE) {
        return;
    }
    begin();
    let (mut handle, mut fd) = (0, -1_i32);
    let kind = sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    cu!(cuMemCreate(&mut handle, 2 * MIB, &prop(false), 0));
    cu!(cuMemExportToShareableHandle((&raw mut fd).cast(), handle, kind, 0) => 1);
    cu!(cuMemRelease(handle));
    cu!(cuMemCreate(&mut handle, 2 * MIB, &prop(true), 0));
    upload(mapped(handle, 2 * MIB), b"of the exporter");
    cu!(cuMemExportToShareableHandle((&raw mut fd).cast(), handle, kind, 0));
    println!("role: {fd}");
    std::io::stdout().flush().expect("a pipe");
    wait_for_the_end_of_input();
}

/// Takes a copy of a descriptor of a child.
fn take_descriptor(child: &Child, fd: i32) -> i32 {
    let process = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
    assert!(process >= 0);
    let copy = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process, fd, 0) };
    assert!(copy >= 0, "{}", std::io::Error::last_os_error());
    unsafe { libc::close(process as i32) };
    copy as i32
}

#[test]
fn a_descriptor_carries_memory_to_another_process() {
    let test = "sharing::a_descriptor_carries_memory_to_another_process";
    let folder = Folder::new("descriptor");
    let settings = std::env::var("KVFERRY_STANDIN").unwrap_or_else(|_| folder.setting() + ",memory=8M");
    alone(test, &settings.clone(), || {
        let control = begin();
        let kind = sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        let mut exporter = Exporter::start(SHAREABLE, &settings);
        let fd: i32 = exporter.line().parse().expect("a number");
        let fd = take_descriptor(&exporter.child, fd);
        let mut handle = 0;
        cu!(cuMemImportFromShareableHandle(&mut 0, std::ptr::null_mut(), kind) => 1);
        cu!(cuMemImportFromShareableHandle(&mut handle, fd as usize as *mut _, kind));
        exporter.kill();
        assert_eq!(free_memory(), 6 * MIB);
        unsafe { libc::close(fd) };
        let mut properties = prop(false);
        cu!(cuMemGetAllocationPropertiesFromHandle(&mut properties, handle));
        assert_eq!((properties.requestedHandleTypes, properties.allocFlags.gpuDirectRDMACapable), (kind, 1));
        let address = mapped(handle, 2 * MIB);
        assert_eq!(download(address, 15), b"of the exporter");
        cu!(cuMemRelease(handle));
        assert_eq!((free_memory(), control.counts().imports), (6 * MIB, 1));
        cu!(cuMemUnmap(address, 2 * MIB));
        assert_eq!((free_memory(), control.counts().imports), (8 * MIB, 0));
    });
}
