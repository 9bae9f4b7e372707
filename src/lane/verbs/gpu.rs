//! NICs and GPU memory: how a NIC reaches a GPU's pool, and when its writes are visible there.
//!
//! A NIC registers GPU memory as a dmabuf, or through a peer-memory module (nvidia-peermem) by address. Where neither works, a
//! consumer reads through its pinned ring, and a producer does not serve verbs: a one-sided READ cannot make a producer stage.
//! Writes of a NIC into GPU memory are visible to the GPU's kernels once they are flushed, unless the GPU orders them.

use std::{
    collections::{HashMap, VecDeque},
    io,
    os::fd::{AsFd, OwnedFd},
    ptr::NonNull,
    sync::Arc,
};

use kvferry_proto::LaneEvent;
use parking_lot::Mutex;

use super::{
    error::VerbsError,
    memory::{Access, Pd, Region, Source},
};
use crate::{
    config::CopyMethod,
    memory::{
        Memory,
        gpu::{CopyQueue, Gpu},
    },
};

/// Bytes at the start of a segment with which registration is tried.
const PROBE: u64 = 2 << 20;

/// The dmabufs of a GPU pool: one for each segment, for all rails. A second one of the same memory would take room in the
/// GPU's address window on the bus again.
#[derive(Debug, Default)]
pub(super) struct Dmabufs(Mutex<HashMap<usize, Arc<Exported>>>);

/// A dmabuf, and the segment's offset in it, in bytes.
type Exported = (OwnedFd, u64);

impl Dmabufs {
    /// The dmabuf of a part, and the part's offset in it. A failed export is tried again by the next registration.
    fn of(&self, part: Part<'_>) -> Result<Arc<Exported>, String> {
        let mut known = self.0.lock();
        if let Some(dmabuf) = known.get(&part.segment) {
            return Ok(dmabuf.clone());
        }
        let exported = part.gpu.dmabuf(part.memory.base(part.segment as u16), part.len);
        let dmabuf = Arc::new(exported.map_err(|e| e.to_string())?);
        known.insert(part.segment, dmabuf.clone());
        Ok(dmabuf)
    }
}

/// A part of a GPU pool: a segment, and bytes from its first one on.
#[derive(Clone, Copy)]
pub(super) struct Part<'a> {
    pub(super) gpu: &'a Gpu,
    pub(super) memory: &'a Memory,
    pub(super) segment: usize,
    pub(super) len: u64,
}

/// Registers a segment of a GPU pool: as a dmabuf, else by address.
pub(super) fn register(
    pd: &Arc<Pd>,
    part: Part<'_>,
    access: Access,
    dmabufs: &Dmabufs,
) -> Result<Region<Memory>, VerbsError> {
    let dmabuf = match as_dmabuf(pd, part, access, dmabufs) {
        Ok(region) => return Ok(region),
        Err(why) => why,
    };
    by_address(pd, part, access).map_err(|peermem| VerbsError::GpuMemory {
        device: pd.device().name().into(),
        dmabuf,
        peermem,
    })
}

fn as_dmabuf(pd: &Arc<Pd>, part: Part<'_>, access: Access, dmabufs: &Dmabufs) -> Result<Region<Memory>, String> {
    let Part { gpu, memory, segment, len } = part;
    if !gpu.info().dmabuf {
        return Err("the GPU or its driver exports no dmabuf".into());
    }
    let dmabuf = dmabufs.of(part)?;
    let (fd, offset) = (dmabuf.0.as_fd(), dmabuf.1);
    let source = Source::Dmabuf { fd, offset, len, address: memory.base(segment as u16) };
    // SAFETY: the dmabuf holds the GPU memory of the segment, which stays mapped as long as a clone of the memory lives.
    unsafe { Region::register(pd, source, access, memory.clone()) }.map_err(|e| e.to_string())
}

fn by_address(pd: &Arc<Pd>, part: Part<'_>, access: Access) -> Result<Region<Memory>, String> {
    let Part { memory, segment, len, .. } = part;
    let address = memory.base(segment as u16);
    let base = NonNull::new(std::ptr::without_provenance_mut(address as usize)).unwrap_or(NonNull::dangling());
    // SAFETY: the segment is GPU memory that stays mapped as long as a clone of the memory lives. Only the device accesses it:
    // without a peer-memory module the kernel finds no pages at this address, and refuses.
    let region = unsafe { Region::register(pd, Source::Address { base, len }, access, memory.clone()) };
    region.map_err(|e| format!("{e}{}", if peermem_is_loaded() { "" } else { " (nvidia_peermem is not loaded)" }))
}

fn peermem_is_loaded() -> bool {
    ["nvidia_peermem", "nv_peer_mem"].iter().any(|m| std::path::Path::new("/sys/module").join(m).exists())
}

/// The first bytes of a pool: exporting all of a large one takes longer. `None`: an empty pool.
fn probed<'a>(gpu: &'a Gpu, memory: &'a Memory) -> Option<Part<'a>> {
    let (segment, len) = memory.segments().iter().enumerate().find(|(_, len)| **len > 0)?;
    Some(Part { gpu, memory, segment, len: PROBE.min(*len) })
}

/// Whether a device can write, or be read from, GPU memory, tried with the first bytes of the pool.
pub(super) fn probe(pd: &Arc<Pd>, gpu: &Gpu, memory: &Memory, access: Access) -> Result<(), VerbsError> {
    let Some(part) = probed(gpu, memory) else { return Ok(()) };
    register(pd, part, access, &Dmabufs::default()).map(drop)
}

/// How one rail reaches GPU memory: each way was tried, for READs by peers and for landing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct GpuReach {
    /// `DEVICE:PORT`.
    pub rail: String,
    /// Registration as a dmabuf; the error says why it failed, or was not tried.
    pub dmabuf: Result<(), String>,
    /// Registration by address, which needs a peer-memory module; the error says why it failed, or was not tried.
    pub address: Result<(), String>,
    /// Why a consumer lets no NIC write this GPU's memory although it may be registered.
    pub unordered: Option<String>,
}

impl GpuReach {
    /// Whether a producer serves its pool over this rail. If not, its consumers use another lane.
    pub fn is_served(&self) -> bool {
        self.dmabuf.is_ok() || self.address.is_ok()
    }

    /// Whether a consumer's reads land in GPU memory directly. If not, they go through the pinned ring.
    pub fn is_direct(&self) -> bool {
        self.is_served() && self.unordered.is_none()
    }

    /// A rail that cannot be used.
    pub(super) fn unusable(rail: &str, why: &VerbsError) -> Self {
        let why = why.to_string();
        Self { rail: rail.into(), dmabuf: Err(why.clone()), address: Err(why), unordered: None }
    }

    /// Tries each way with the first bytes of the pool.
    pub(super) fn of(rail: &str, pd: &Arc<Pd>, gpu: &Gpu, memory: &Memory) -> Self {
        let unordered = unordered(gpu).err();
        let dmabufs = Dmabufs::default();
        let Some(part) = probed(gpu, memory) else {
            return Self { rail: rail.into(), dmabuf: Ok(()), address: Ok(()), unordered };
        };
        let uses = [Access::Exported { relaxed: false }, Access::Landing { relaxed: false }];
        let each = |one: &dyn Fn(Access) -> Result<Region<Memory>, String>| {
            uses.into_iter().try_for_each(|access| one(access).map(drop))
        };
        Self {
            rail: rail.into(),
            dmabuf: each(&|access| as_dmabuf(pd, part, access, &dmabufs)),
            address: each(&|access| by_address(pd, part, access)),
            unordered,
        }
    }
}

/// Why NICs must not write this GPU's memory although they could, if so.
pub(super) fn unordered(gpu: &Gpu) -> Result<(), String> {
    match gpu.info() {
        i if i.ordered || i.flush => Ok(()),
        i => Err(format!("GPU {} neither orders the writes of NICs nor can the host flush them", i.ordinal)),
    }
}

/// Fences whose chunks count once the NIC's writes are flushed.
#[derive(Debug)]
pub(crate) struct Flushes {
    queue: CopyQueue,
    /// Events that no flush was submitted for.
    fresh: Vec<LaneEvent>,
    /// Events, each after the flush of this number.
    held: VecDeque<(u64, LaneEvent)>,
}

impl Flushes {
    /// For a lane into this memory; `None` where no flush is needed.
    pub(super) fn new(memory: &Memory) -> io::Result<Option<Self>> {
        let Some(gpu) = memory.gpu().filter(|g| !g.info().ordered) else { return Ok(None) };
        let queue = CopyQueue::new(gpu, CopyMethod::Auto)?;
        Ok(Some(Self { queue, fresh: Vec::new(), held: VecDeque::new() }))
    }

    pub(super) fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.queue.fd()
    }

    /// Reports this event after the next flush.
    pub(super) fn hold(&mut self, event: LaneEvent) {
        self.fresh.push(event);
    }

    /// Submits one flush for all new events, and reports those whose flush is done. `false`: the GPU is unusable.
    pub(super) fn advance(&mut self, mut report: impl FnMut(LaneEvent)) -> bool {
        if !self.fresh.is_empty()
            && let Some(ticket) = self.queue.flush()
        {
            self.held.extend(self.fresh.drain(..).map(|e| (ticket, e)));
        }
        if self.fresh.is_empty() && self.held.is_empty() {
            return true;
        }
        let (up_to, failed) = self.queue.finished();
        while self.held.front().is_some_and(|(ticket, _)| *ticket <= up_to)
            && let Some((_, event)) = self.held.pop_front()
        {
            report(event);
        }
        if failed {
            self.fresh.clear();
            self.held.clear();
        }
        !failed
    }

    /// Whether the lane may sleep: nothing is held, or the descriptor tells.
    pub(super) fn may_sleep(&self) -> bool {
        self.fresh.is_empty() && (self.held.is_empty() || self.queue.about_to_sleep())
    }
}
