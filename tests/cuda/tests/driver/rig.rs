//! What the tests share: processes of their own, and short names for calls.

use std::process::{Child, Command, Stdio};

pub(crate) use cudarc::driver::sys;
pub(crate) use kvferry_cuda_standin::Control;

const ROLE: &str = "STANDIN_TEST_ROLE";

/// Runs `body` in a new process with these settings: the caller starts itself again with the name of its test.
pub(crate) fn alone(test: &str, settings: &str, body: impl FnOnce()) {
    if std::env::var(ROLE).is_ok_and(|role| role == test) {
        return body();
    }
    let output = itself(test, settings).stdout(Stdio::piped()).stderr(Stdio::piped()).output().expect("a child");
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    // A misspelt name would run nothing, and succeed.
    assert!(output.status.success() && text.contains("1 passed"), "{test} in its process: {text}");
}

/// Starts the test binary again as `test`, whose `alone` then runs its body.
pub(crate) fn start(test: &str, settings: &str) -> Child {
    itself(test, settings).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a child")
}

fn itself(test: &str, settings: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("a path"));
    command.args(["--exact", test, "--nocapture", "--include-ignored", "-q"]);
    command.env(ROLE, test).env("KVFERRY_STANDIN", settings);
    command
}

/// Whether this process is the one that `start` started for a test.
pub(crate) fn has_role(test: &str) -> bool {
    std::env::var(ROLE).is_ok_and(|role| role == test)
}

/// The code of a result.
pub(crate) fn code(result: sys::CUresult) -> i32 {
    result as i32
}

/// Calls the driver, and expects success or the code after `=>`.
macro_rules! cu {
    ($name:ident($($arg:expr),* $(,)?)) => { cu!($name($($arg),*) => 0) };
    ($name:ident($($arg:expr),* $(,)?) => $code:expr) => {{
        let result = unsafe { crate::rig::sys::$name($($arg),*) };
        assert_eq!(crate::rig::code(result), $code, "{}", stringify!($name));
    }};
}
pub(crate) use cu;

/// Loads the stand-in, and makes the context of device 0 current.
pub(crate) fn begin() -> Control {
    let control = Control::new().expect("the stand-in");
    cu!(cuInit(0));
    set_context(0);
    control
}

pub(crate) fn set_context(device: i32) -> sys::CUcontext {
    let mut context = std::ptr::null_mut();
    cu!(cuDevicePrimaryCtxRetain(&mut context, device));
    cu!(cuCtxSetCurrent(context));
    context
}

pub(crate) fn alloc(len: usize) -> u64 {
    let mut address = 0;
    cu!(cuMemAlloc_v2(&mut address, len));
    address
}

pub(crate) fn stream() -> sys::CUstream {
    let mut stream = std::ptr::null_mut();
    cu!(cuStreamCreateWithPriority(&mut stream, 1, 0));
    stream
}

pub(crate) fn event() -> sys::CUevent {
    let mut event = std::ptr::null_mut();
    cu!(cuEventCreate(&mut event, 2));
    event
}

pub(crate) fn upload(address: u64, bytes: &[u8]) {
    cu!(cuMemcpyHtoD_v2(address, bytes.as_ptr().cast(), bytes.len()));
}

pub(crate) fn download(address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    cu!(cuMemcpyDtoH_v2(bytes.as_mut_ptr().cast(), address, len));
    bytes
}

pub(crate) fn free_memory() -> usize {
    let (mut free, mut total) = (0, 0);
    cu!(cuMemGetInfo_v2(&mut free, &mut total));
    free
}

/// A folder for the devices of several processes, removed at the end.
pub(crate) struct Folder(pub(crate) std::path::PathBuf);

impl Folder {
    pub(crate) fn new(test: &str) -> Folder {
        let path = std::path::PathBuf::from(format!("/dev/shm/standin-test-{}-{test}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a folder");
        Folder(path)
    }

    pub(crate) fn setting(&self) -> String {
        format!("dir={}", self.0.display())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
