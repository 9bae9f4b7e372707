//! A handle to a GPU of this process, and a description of it.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, OnceLock, Weak, mpsc},
    time::Duration,
};

use parking_lot::Mutex;

use super::{
    Context,
    error::GpuError,
    queue::{Order, Setup},
};
use crate::mailbox::Mailbox;

/// How long a caller waits for a call that sets something up. Creating a context takes up to a second, and drivers were seen
/// to block for half a minute; a caller that waits longer reports a hang.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// A GPU, as the driver describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct GpuInfo {
    /// Its number in this process, as in CUDA_VISIBLE_DEVICES.
    pub ordinal: u32,
    /// Its name.
    pub name: String,
    /// Its UUID: the same in every process and container.
    pub uuid: [u8; 16],
    /// Its PCI address, such as `0000:41:00.0`.
    pub pci: String,
    /// Bytes of its memory.
    pub memory: u64,
    /// Compute capability: major, minor.
    pub capability: (u32, u32),
    /// The CUDA version of the driver: `1000 * major + 10 * minor`.
    pub driver: u32,
    /// NICs may be given its memory at all (GPU_DIRECT_RDMA_SUPPORTED).
    pub rdma: bool,
    /// Its memory can be exported as a dmabuf, which NICs register.
    pub dmabuf: bool,
    /// Writes of NICs are visible to its kernels in order, without a flush (GPU_DIRECT_RDMA_WRITES_ORDERING of owner or all
    /// devices).
    pub ordered: bool,
    /// The host can flush writes of NICs (GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS has the host's bit).
    pub flush: bool,
    /// Memory can be allocated with the virtual memory functions, and shared as a descriptor.
    pub shareable: bool,
    /// Why the copy kernel is not loaded. `None`: it is loaded, or the GPU is not open (see [`survey`](crate::survey_gpus)).
    pub kernel: Option<String>,
    /// The driver has `cuMemcpyBatchAsync`.
    pub batch: bool,
}

impl GpuInfo {
    /// The UUID as `nvidia-smi -L` prints it.
    pub fn uuid_text(&self) -> String {
        uuid_text(self.uuid)
    }
}

/// A GPU's UUID as `nvidia-smi -L` prints it.
pub(crate) fn uuid_text(uuid: [u8; 16]) -> String {
    let hex: String = uuid.iter().map(|b| format!("{b:02x}")).collect();
    format!("GPU-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// The GPUs of this host, without opening any: no context is created.
///
/// # Errors
/// There is no usable driver, or no GPU.
pub fn survey() -> Result<Vec<GpuInfo>, GpuError> {
    #[cfg(feature = "cuda")]
    return super::context::survey();
    #[cfg(not(feature = "cuda"))]
    Err(GpuError::NotBuilt)
}

/// A GPU whose threads run. A clone is another handle; the threads end with the last one.
#[derive(Clone)]
pub(crate) struct Gpu(Arc<Shared>);

struct Shared {
    info: GpuInfo,
    orders: Mailbox<Order>,
    /// To the set-up thread.
    setup: mpsc::Sender<Setup>,
    state: Arc<State>,
}

/// What the thread tells about itself.
#[derive(Default)]
pub(super) struct State {
    /// The first error after which the context is unusable.
    pub unusable: OnceLock<GpuError>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The threads are not joined: they may be inside a driver that hangs.
        self.orders.send(Order::End);
    }
}

/// The GPUs that are open.
static OPEN: Mutex<Option<HashMap<u32, Weak<Shared>>>> = Mutex::new(None);

impl Gpu {
    /// Opens a GPU, or returns the handle to the open one. Retains the primary context: the one of the engine, if it has one.
    pub(crate) fn open(ordinal: u32) -> Result<Self, GpuError> {
        let mut open = OPEN.lock();
        let open = open.get_or_insert_default();
        if let Some(shared) = open.get(&ordinal).and_then(Weak::upgrade) {
            return Ok(Self(shared));
        }
        let gpu = Self::start(ordinal)?;
        open.insert(ordinal, Arc::downgrade(&gpu.0));
        Ok(gpu)
    }

    #[cfg(not(feature = "cuda"))]
    fn start(_: u32) -> Result<Self, GpuError> {
        Err(GpuError::NotBuilt)
    }

    #[cfg(feature = "cuda")]
    fn start(ordinal: u32) -> Result<Self, GpuError> {
        super::library::init()?;
        let spawn = |name: String, work: Box<dyn FnOnce() + Send>| {
            let spawned = std::thread::Builder::new().name(name).spawn(work);
            spawned.map(drop).map_err(GpuError::os("cannot start the GPU's thread"))
        };
        let (setup, calls) = mpsc::channel();
        let (tx, rx) = mpsc::sync_channel(1);
        let work = move || super::thread::set_up(ordinal, &calls, &tx);
        spawn(format!("kvferry-setup{ordinal}"), Box::new(work))?;
        answer(&rx)??;
        let orders = Mailbox::new().map_err(GpuError::os("cannot create an eventfd"))?;
        let state = Arc::<State>::default();
        let (tx, rx) = mpsc::sync_channel(1);
        let (theirs, told) = (orders.clone(), state.clone());
        let work = move || super::thread::run(ordinal, theirs, told, &tx);
        spawn(format!("kvferry-gpu{ordinal}"), Box::new(work))?;
        let info = answer(&rx)??;
        Ok(Self(Arc::new(Shared { info, orders, setup, state })))
    }

    /// Its description.
    pub(crate) fn info(&self) -> &GpuInfo {
        &self.0.info
    }

    /// The error after which its context is unusable, if there was one.
    pub(crate) fn check(&self) -> Result<(), GpuError> {
        match self.0.state.unusable.get() {
            Some(e) => Err(self.unusable(e)),
            None => Ok(()),
        }
    }

    fn unusable(&self, first: &GpuError) -> GpuError {
        GpuError::Unusable { ordinal: self.0.info.ordinal, first: first.to_string() }
    }

    pub(super) fn send(&self, order: Order) {
        self.0.orders.send(order);
    }

    /// Runs `call` on the set-up thread, after those that were given before. It is given up without a result if the thread has
    /// ended, which it does with the last handle.
    pub(super) fn set_up(&self, call: impl FnOnce(&Context) + Send + 'static) {
        let _ = self.0.setup.send(Box::new(call));
    }

    /// Runs `work` on the set-up thread and waits for its result. Never from a lane.
    pub(super) fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Context) -> Result<T, GpuError> + Send + 'static,
    ) -> Result<T, GpuError> {
        self.check()?;
        let (tx, rx) = mpsc::sync_channel(1);
        // The receiver is gone if it has given up.
        self.set_up(move |context| drop(tx.send(work(context))));
        answer(&rx)?
    }

    /// As [`Gpu::call`], for async code.
    pub(super) async fn call_async<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Context) -> Result<T, GpuError> + Send + 'static,
    ) -> Result<T, GpuError> {
        self.check()?;
        let (tx, rx) = tokio::sync::oneshot::channel();
        self.set_up(move |context| drop(tx.send(work(context))));
        match tokio::time::timeout(CALL_TIMEOUT, rx).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(GpuError::Os { what: "the GPU's set-up thread", error: "it has panicked".into() }),
            Err(_) => Err(GpuError::Hung { seconds: CALL_TIMEOUT.as_secs() }),
        }
    }
}

fn answer<T>(rx: &mpsc::Receiver<T>) -> Result<T, GpuError> {
    rx.recv_timeout(CALL_TIMEOUT).map_err(|e| match e {
        mpsc::RecvTimeoutError::Timeout => GpuError::Hung { seconds: CALL_TIMEOUT.as_secs() },
        mpsc::RecvTimeoutError::Disconnected => {
            GpuError::Os { what: "the GPU's set-up thread", error: "it has panicked".into() }
        }
    })
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gpu").field("ordinal", &self.0.info.ordinal).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_printed_as_the_vendors_tool_prints_it() {
        let info = GpuInfo { uuid: std::array::from_fn(|i| i as u8 * 17), ..GpuInfo::default() };
        assert_eq!(info.uuid_text(), "GPU-00112233-4455-6677-8899-aabbccddeeff");
    }
}
