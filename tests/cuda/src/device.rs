//! The driver of this process and its devices: `cuInit`, queries, and the state of each primary context.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering::SeqCst};

use libc::c_char;
use parking_lot::Mutex;

use crate::abi::{In, Out, api};
use crate::error::{Error, Result};
use crate::settings::{Settings, settings};
use crate::store::Store;

pub(crate) struct Driver {
    pub(crate) settings: Settings,
    pub(crate) store: Store,
    devices: Vec<Device>,
    /// The driver does not work in a child of the process that initialised it.
    pid: u32,
}

/// A device with its primary context, the only context that it can have.
pub(crate) struct Device {
    pub(crate) ordinal: i32,
    pub(crate) retained: Mutex<u32>,
    /// Held while the context is retained or released: a context that is destroyed has no resources of the next one.
    pub(crate) lifetime: Mutex<()>,
    /// The error that every call in the context returns from now on; 0 is none.
    sticky: AtomicI32,
    /// The error to raise, and the data operations before it.
    planned: AtomicI32,
    countdown: AtomicU64,
    /// Devices whose memory its kernels may touch, one bit each.
    peers: AtomicU32,
}

static DRIVER: OnceLock<Driver> = OnceLock::new();

/// The initialised driver.
pub(crate) fn driver() -> Result<&'static Driver> {
    DRIVER.get().filter(|driver| driver.pid == std::process::id()).ok_or(Error::NOT_INITIALIZED)
}

impl Driver {
    pub(crate) fn device(&self, ordinal: i32) -> Result<&Device> {
        usize::try_from(ordinal).ok().and_then(|i| self.devices.get(i)).ok_or(Error::INVALID_DEVICE)
    }
}

impl Device {
    fn new(ordinal: i32, settings: &Settings) -> Device {
        let (planned, countdown) = match settings.sticky_after {
            Some(after) => (settings.sticky, after),
            None => (0, 0),
        };
        Device {
            ordinal,
            retained: Mutex::new(0),
            lifetime: Mutex::new(()),
            sticky: AtomicI32::new(0),
            planned: AtomicI32::new(planned),
            countdown: AtomicU64::new(countdown),
            peers: AtomicU32::new(1 << ordinal),
        }
    }

    /// The handle of the primary context.
    pub(crate) fn context(&self) -> usize {
        CONTEXTS + self.ordinal as usize * 0x100
    }

    pub(crate) fn is_active(&self) -> bool {
        *self.retained.lock() > 0
    }

    /// Fails with the sticky error, if there is one.
    pub(crate) fn healthy(&self) -> Result {
        match self.sticky.load(SeqCst) {
            0 => Ok(()),
            code => Err(Error(code)),
        }
    }

    /// Makes the context fail, unless it has failed already.
    pub(crate) fn fail(&self, error: Error) {
        let _ = self.sticky.compare_exchange(0, error.0, SeqCst, SeqCst);
    }

    pub(crate) fn raise_after(&self, error: Error, operations: u64) {
        if operations == 0 {
            return self.fail(error);
        }
        self.countdown.store(operations, SeqCst);
        self.planned.store(error.0, SeqCst);
    }

    /// Notes that a data operation is about to start, and raises the planned error instead when its time has come.
    pub(crate) fn starts(&self) -> Result {
        let planned = self.planned.load(SeqCst);
        if planned != 0 && self.countdown.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1)).is_err() {
            self.planned.store(0, SeqCst);
            self.fail(Error(planned));
        }
        self.healthy()
    }

    pub(crate) fn peers(&self) -> u32 {
        self.peers.load(SeqCst)
    }

    /// Whether the peer was new.
    pub(crate) fn add_peer(&self, ordinal: i32) -> bool {
        self.peers.fetch_or(1 << ordinal, SeqCst) & (1 << ordinal) == 0
    }

    /// A new primary context has neither errors nor peers.
    pub(crate) fn reset(&self) {
        self.sticky.store(0, SeqCst);
        self.peers.store(1 << self.ordinal, SeqCst);
    }

    fn bus_id(&self) -> String {
        format!("{DOMAIN:04X}:{:02X}:00.0", self.bus())
    }

    fn bus(&self) -> i32 {
        0x10 + self.ordinal
    }

    fn attribute(&self, attribute: i32, settings: &Settings) -> Result<i32> {
        Ok(match attribute {
            1 => 1024,                     // MAX_THREADS_PER_BLOCK
            2 | 3 => 1024,                 // MAX_BLOCK_DIM_X, Y
            4 => 64,                       // MAX_BLOCK_DIM_Z
            5 => i32::MAX,                 // MAX_GRID_DIM_X
            6 | 7 => 65535,                // MAX_GRID_DIM_Y, Z
            10 => 32,                      // WARP_SIZE
            16 => 132,                     // MULTIPROCESSOR_COUNT
            19 | 31 | 41 => 1,             // CAN_MAP_HOST_MEMORY, CONCURRENT_KERNELS, UNIFIED_ADDRESSING
            33 => self.bus(),              // PCI_BUS_ID
            34 => 0,                       // PCI_DEVICE_ID
            40 => 3,                       // ASYNC_ENGINE_COUNT
            50 => DOMAIN,                  // PCI_DOMAIN_ID
            75 => 9,                       // COMPUTE_CAPABILITY_MAJOR
            76 => 0,                       // COMPUTE_CAPABILITY_MINOR
            78 | 91 => 1,                  // STREAM_PRIORITIES_SUPPORTED, CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
            99 => 1,                       // HOST_REGISTER_SUPPORTED
            102 | 103 => 1,                // VIRTUAL_MEMORY_MANAGEMENT, HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
            110 | 116 => 1,                // GPU_DIRECT_RDMA_WITH_CUDA_VMM, GPU_DIRECT_RDMA
            117 => settings.flush.into(),  // GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS
            118 => settings.ordering,      // GPU_DIRECT_RDMA_WRITES_ORDERING
            124 => settings.dmabuf.into(), // DMA_BUF_SUPPORTED
            ..=0 | 150.. => return Err(Error::INVALID_VALUE),
            _ => 0,
        })
    }
}

/// Context handles: distinct from all other handles, and never a valid address.
const CONTEXTS: usize = 0xC0_0000;

/// A PCI domain that no real bus has, so that a look-up in sysfs finds nothing.
const DOMAIN: i32 = 0x7FFF;

/// The device of a context handle.
pub(crate) fn of_context(handle: usize) -> Result<&'static Device> {
    let offset = handle.checked_sub(CONTEXTS).filter(|o| o.is_multiple_of(0x100)).ok_or(Error::INVALID_CONTEXT)?;
    driver()?.device((offset / 0x100) as i32).map_err(|_| Error::INVALID_CONTEXT)
}

fn init() -> Result {
    let settings = settings().as_ref().map_err(|error| {
        eprintln!("kvferry stand-in: KVFERRY_STANDIN: {error}");
        Error::UNKNOWN
    })?;
    if settings.stub {
        return Err(Error::STUB_LIBRARY);
    }
    if settings.nodevice || settings.devices == 0 {
        return Err(Error::NO_DEVICE);
    }
    static ONCE: Mutex<()> = Mutex::new(());
    let _once = ONCE.lock();
    if DRIVER.get().is_none() {
        let store = Store::open(settings.dir.as_deref()).map_err(|error| {
            eprintln!("kvferry stand-in: cannot open the folder of the device memory: {error}");
            Error::UNKNOWN
        })?;
        let devices = (0..settings.devices).map(|ordinal| Device::new(ordinal, settings)).collect();
        let _ = DRIVER.set(Driver { settings: settings.clone(), store, devices, pid: std::process::id() });
    }
    driver().map(drop)
}

api! {
    Always fn cuInit(flags: u32) {
        if flags != 0 {
            return Err(Error::INVALID_VALUE);
        }
        init()
    }

    Always fn cuDriverGetVersion(version: Out<i32>) {
        version.put(settings().as_ref().map_or(12080, |s| s.version))
    }

    AfterInit fn cuDeviceGet(device: Out<i32>, ordinal: i32) {
        device.put(driver()?.device(ordinal)?.ordinal)
    }

    AfterInit fn cuDeviceGetCount(count: Out<i32>) {
        count.put(driver()?.settings.devices)
    }

    AfterInit fn cuDeviceGetName(name: Out<c_char>, len: i32, device: i32) {
        name.put_text(&format!("Stand-in GPU {}", driver()?.device(device)?.ordinal), len)
    }

    AfterInit fn cuDeviceGetUuid(uuid: Out<[u8; 16]>, device: i32) {
        uuid.put(driver()?.store.uuid(driver()?.device(device)?.ordinal))
    }

    AfterInit fn cuDeviceGetUuid_v2(uuid: Out<[u8; 16]>, device: i32) {
        uuid.put(driver()?.store.uuid(driver()?.device(device)?.ordinal))
    }

    AfterInit fn cuDeviceGetAttribute(value: Out<i32>, attribute: i32, device: i32) {
        value.put(driver()?.device(device)?.attribute(attribute, &driver()?.settings)?)
    }

    AfterInit fn cuDeviceGetPCIBusId(id: Out<c_char>, len: i32, device: i32) {
        id.put_text(&driver()?.device(device)?.bus_id(), len)
    }

    AfterInit fn cuDeviceGetByPCIBusId(device: Out<i32>, id: In<c_char>) {
        let id = id.text()?;
        let found = driver()?.devices.iter().find(|d| d.bus_id().eq_ignore_ascii_case(&id));
        device.put(found.ok_or(Error::INVALID_DEVICE)?.ordinal)
    }

    AfterInit fn cuDeviceTotalMem_v2(bytes: Out<usize>, device: i32) {
        driver()?.device(device)?;
        bytes.put(driver()?.settings.memory as usize)
    }

    AfterInit fn cuDeviceCanAccessPeer(can: Out<i32>, device: i32, peer: i32) {
        let (device, peer) = (driver()?.device(device)?, driver()?.device(peer)?);
        can.put((device.ordinal != peer.ordinal).into())
    }
}
