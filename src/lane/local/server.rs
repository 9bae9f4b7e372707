//! The producer's end of the local lane: it tells admitted lanes of the same user where the pool is.
//!
//! Owns the listening socket and one idle connection for each lane. Never touches the pool, and moves no block. Another user of
//! the host holds no connection, not even for a moment (promise 7, Isolated).

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use kvferry_proto::{Incarnation, Limits};
use parking_lot::Mutex;
use rustix::net::{RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags};
use subtle::ConstantTimeEq as _;
use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime::Handle,
    sync::{OnceCell, oneshot},
    task::JoinSet,
};

use super::{
    exported::GpuPool,
    socket,
    wire::{self, Refusal, Reply, Request},
};
use crate::{
    config::LocalConfig,
    lane::log_limit::LogLimit,
    memory::{Export, Place, gpu::Gpu},
};

/// How long a connection has for its request. Consumers send it right after the connect.
const REQUEST_TIMEOUT: Duration = if cfg!(test) { Duration::from_millis(100) } else { Duration::from_secs(5) };

/// Wait after a failed accept, which mostly fails for lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A producer rank's socket for local lanes. Dropping it closes them all.
pub(crate) struct Server {
    name: Vec<u8>,
    lanes: Arc<Lanes>,
    accept: tokio::task::AbortHandle,
}

impl Server {
    /// Listens under a random abstract name, which vanishes with the process. At most `limits.lanes` connections are held.
    /// The runtime must have its I/O and time drivers on.
    pub(crate) fn start(
        export: Arc<Export>,
        incarnation: Incarnation,
        runtime: Handle,
        config: &LocalConfig,
        limits: &Limits,
    ) -> io::Result<Self> {
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(io::Error::other)?;
        let mut name = b"\0kvferry-".to_vec();
        name.extend(random.iter().flat_map(|b| [b >> 4, b & 15]).map(|n| b"0123456789abcdef"[usize::from(n)]));
        let socket = socket::new()?;
        rustix::net::bind(&socket, &SocketAddrUnix::new_abstract_name(&name[1..])?)?;
        rustix::net::listen(&socket, 128)?;
        let lanes = Arc::new(Lanes::default());
        let (uids, refusals, exported) = (config.uids.clone(), Mutex::default(), OnceCell::new());
        let shared = Arc::new(Shared { export, incarnation, uids, lanes: lanes.clone(), refusals, exported });
        let max = limits.lanes;
        let guard = runtime.enter();
        let socket = socket::watch(socket)?;
        drop(guard);
        let accept = runtime.spawn(accept(socket, shared, max)).abort_handle();
        Ok(Self { name, lanes, accept })
    }

    /// The socket's name: a zero byte, then an abstract name.
    pub(crate) fn name(&self) -> Vec<u8> {
        self.name.clone()
    }

    /// Admits one connection under this number, to a peer that shows `key`.
    pub(crate) fn admit(&self, lane: u64, key: [u8; 32]) {
        self.lanes.lock().entry(lane).or_insert(State::Expected { key });
    }

    /// Closes the lane's connection, or cancels its admission.
    pub(crate) fn dismiss(&self, lane: u64) {
        // Dropping the state's sender ends the task of its connection.
        self.lanes.lock().remove(&lane);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accept.abort();
    }
}

/// A lane as the server knows it.
enum State {
    /// Admitted, and not connected yet.
    Expected { key: [u8; 32] },
    /// Connected. Dropping it closes the connection.
    Open { _close: oneshot::Sender<()> },
}

type Lanes = Mutex<HashMap<u64, State>>;

struct Shared {
    export: Arc<Export>,
    incarnation: Incarnation,
    uids: Vec<u32>,
    lanes: Arc<Lanes>,
    /// Log lines about refused lanes.
    refusals: Mutex<LogLimit>,
    /// The pool's GPU memory and its descriptors, or the reason why it cannot be exported. Set by the first lane; the memory
    /// never changes.
    exported: OnceCell<(GpuPool, Vec<OwnedFd>)>,
}

async fn accept(socket: AsyncFd<OwnedFd>, shared: Arc<Shared>, max: usize) {
    let mut connections = JoinSet::new();
    loop {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let next = socket.async_io(Interest::READABLE, |s| Ok(rustix::net::accept_with(s, flags)?)).await;
        while connections.try_join_next().is_some() {}
        let accepted = match next {
            Ok(fd) => match shared.check_user(fd.as_fd()) {
                // Before it counts: another user must not take the places of this one's consumers.
                Err(why) => {
                    shared.turn_away(fd, why);
                    continue;
                }
                // Over the limit: the connection is closed at once, and the consumer takes another lane.
                Ok(()) if connections.len() >= max => continue,
                Ok(()) => socket::watch(fd),
            },
            Err(error) => Err(error),
        };
        match accepted {
            Ok(fd) => {
                connections.spawn(serve(fd, shared.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a local lane; raise the limit of open files if it is reached");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// One connection, from its request to its end.
async fn serve(fd: AsyncFd<OwnedFd>, shared: Arc<Shared>) {
    let mut packet = [0; wire::REQUEST + 1];
    let Ok(Ok(len)) = tokio::time::timeout(REQUEST_TIMEOUT, receive(&fd, &mut packet)).await else { return };
    let (lane, closed) = match shared.decide(&packet[..len.min(packet.len())]) {
        Ok(open) => open,
        Err((refusal, why)) => {
            shared.refuse(fd.as_fd(), refusal, why);
            return;
        }
    };
    // From here on the lane is open. However this task ends, `Open` removes the lane and tells the consumer if it can.
    let open = Open { fd, lane, lanes: &shared.lanes };
    let granted = match shared.export.memory.gpu() {
        None => shared.grant(open.fd.as_fd()),
        Some(gpu) => match shared.exported(gpu).await {
            Ok((pool, files)) => shared.grant_gpu(open.fd.as_fd(), pool, files),
            // Logged already.
            Err(why) => {
                let (refusal, why) = (Refusal::Other, why.clone());
                return drop(socket::send(open.fd.as_fd(), &Reply::Refused { refusal, why }.encode(), &[]));
            }
        },
    };
    if let Err(error) = granted {
        tracing::warn!(%error, "cannot answer a local lane");
        return;
    }
    tokio::select! {
        _ = closed => {}
        // A consumer sends nothing more: it has closed, or sent a malformed message.
        _ = receive(&open.fd, &mut packet) => {}
    }
}

async fn receive(fd: &AsyncFd<OwnedFd>, into: &mut [u8]) -> io::Result<usize> {
    fd.async_io(Interest::READABLE, |s| {
        let (_, len) = rustix::net::recv(s, &mut *into, RecvFlags::TRUNC | RecvFlags::DONTWAIT)?;
        Ok(len)
    })
    .await
}

struct Open<'a> {
    fd: AsyncFd<OwnedFd>,
    lane: u64,
    lanes: &'a Lanes,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        let _ = rustix::net::send(&self.fd, wire::BYE, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        // A lane is used once: its number is not admitted again.
        self.lanes.lock().remove(&self.lane);
    }
}

impl Shared {
    /// Whether the consumer's user may have a lane. The reason, if not.
    fn check_user(&self, fd: BorrowedFd<'_>) -> Result<(), String> {
        let peer = socket::peer(fd).map_err(|e| format!("cannot read the peer's credentials: {e}"))?;
        if peer.may_share(&self.uids) {
            return Ok(());
        }
        let here = rustix::process::geteuid().as_raw();
        Err(format!(
            "the consumer runs as user {}, the producer as user {here}; use one user for both, or list {} in the \
             producer's local.uids",
            peer.uid, peer.uid
        ))
    }

    /// Refuses a connection before its request, and closes it.
    fn turn_away(&self, fd: OwnedFd, why: String) {
        self.refuse(fd.as_fd(), Refusal::Other, why);
        // A close with an unread request would give the consumer a reset instead of the reason.
        let _ = rustix::net::shutdown(&fd, Shutdown::Read);
        let _ = rustix::net::recv(&fd, &mut [0; wire::REQUEST], RecvFlags::TRUNC | RecvFlags::DONTWAIT);
    }

    /// Tells the consumer the reason, if its socket has room for it, and logs it.
    fn refuse(&self, fd: BorrowedFd<'_>, refusal: Refusal, why: String) {
        let line = self.refusals.lock().admit(Instant::now());
        if let Some(others) = line {
            tracing::warn!(why, others, "refused a local lane");
        }
        // The socket does not block.
        let _ = socket::send(fd, &Reply::Refused { refusal, why }.encode(), &[]);
    }

    /// Opens the connection's lane, or refuses it. Returns the lane's number, and a receiver that ends when the lane is
    /// dismissed.
    fn decide(&self, packet: &[u8]) -> Result<(u64, oneshot::Receiver<()>), (Refusal, String)> {
        let other = |why: String| (Refusal::Other, why);
        let request = Request::decode(packet).map_err(|what| other(format!("malformed request: {what}")))?;
        if request.incarnation != self.incarnation.get() {
            let why =
                format!("the request is for incarnation {:016x}, this is {}", request.incarnation, self.incarnation);
            return Err((Refusal::Restarted, why));
        }
        self.check_place(request.gpu.is_some()).map_err(|why| other(why.into()))?;
        match self.lanes.lock().get_mut(&request.lane) {
            None => Err(other("the lane was not admitted, or was dismissed: request a new one".into())),
            Some(State::Open { .. }) => Err(other("the lane is in use: request a new one".into())),
            Some(State::Expected { key }) if !bool::from(key.ct_eq(&request.key)) => {
                Err(other("the key is not the one that the control plane gave out for this lane".into()))
            }
            Some(state) => {
                let (close, closed) = oneshot::channel();
                *state = State::Open { _close: close };
                Ok((request.lane, closed))
            }
        }
    }

    /// Whether a consumer with its pool in this kind of memory can read the producer's. The reason, if not.
    fn check_place(&self, on_gpu: bool) -> Result<(), &'static str> {
        match (self.export.memory.place(), on_gpu) {
            (Place::Gpu { .. }, false) => {
                Err("the producer's pool is GPU memory, this pool is host memory: the tcp lane copies between them")
            }
            (Place::Host, true) => Err(
                "the producer's pool is host memory, and this lane was opened into GPU memory: open it into host memory",
            ),
            _ => Ok(()),
        }
    }

    /// Exports the pool's GPU memory, the first time.
    async fn exported(&self, gpu: &Gpu) -> Result<&(GpuPool, Vec<OwnedFd>), String> {
        let export = async || {
            let memory = &self.export.memory;
            let segments = memory.segments().iter().enumerate();
            let segments = segments.map(|(i, &len)| (memory.base(i as u16), len)).collect();
            let e = gpu.export(segments).await.map_err(|e| e.to_string())?;
            let pool = GpuPool { uuid: gpu.info().uuid, allocations: e.allocations, parts: e.parts };
            pool.check().map(|()| (pool, e.files))
        };
        let logged = async || {
            export().await.map_err(|why| {
                let why = format!("the producer cannot share its GPU memory: {why}");
                tracing::warn!(why, "no consumer on this host gets a local lane");
                why
            })
        };
        // A failure may pass, such as a lack of descriptors: the next lane tries again.
        self.exported.get_or_try_init(logged).await
    }

    /// Sends the consumer the handles and descriptors of the GPU memory.
    fn grant_gpu(&self, fd: BorrowedFd<'_>, pool: &GpuPool, files: &[OwnedFd]) -> io::Result<()> {
        let e = &self.export;
        let (slots, segments) = (e.words.len(), e.memory.segments().len() as u32);
        let reply = Reply::GrantedGpu { incarnation: self.incarnation, slots, segments, pool: pool.clone() };
        let files: Vec<_> = files.iter().map(AsFd::as_fd).chain([e.words.fd()]).collect();
        let sent = socket::send(fd, &reply.encode(), &files);
        if let Err(error) = &sent {
            let why = format!("the producer cannot send the descriptors of its GPU memory: {error}");
            let _ = socket::send(fd, &Reply::Refused { refusal: Refusal::Other, why }.encode(), &[]);
        }
        sent
    }

    /// Sends the consumer the addresses and files.
    fn grant(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        let e = &self.export;
        let mut files = e.memory.memfds().unwrap_or_default();
        files.push(e.words.fd());
        // Without files (too many for a packet, or memory of the engine) the consumer reads with process_vm_readv.
        let with_files = files.len() <= wire::MAX_FILES && e.memory.memfds().is_some();
        let reply = |files| {
            Reply::Granted {
                incarnation: self.incarnation,
                words: e.words.address(),
                slots: e.words.len(),
                files,
                segments: (0..e.memory.segments().len()).map(|i| e.memory.base(i as u16)).collect(),
            }
            .encode()
        };
        if with_files {
            match socket::send(fd, &reply(true), &files) {
                // Too many files in flight for this user's limit: send the slower way to read.
                Err(e) if e.raw_os_error() == Some(libc::ETOOMANYREFS) => {}
                sent => return sent,
            }
        }
        socket::send(fd, &reply(false), &[])
    }
}
