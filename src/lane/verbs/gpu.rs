//! NICs and GPU memory: how a NIC reaches a GPU's pool, and when its writes are visible there.
//!
//! A NIC registers GPU memory as a dmabuf, or through a peer-memory module (nvidia-peermem) by address. Where neither works, a
//! consumer reads through its pinned ring, and a producer does not serve verbs: a one-sided READ cannot make a producer stage.
//! Writes of a NIC into GPU memory are visible to the GPU's kernels once they are flushed, unless the GPU orders them.

use std::{
    collections::VecDeque,
    io,
    num::NonZeroUsize,
    os::fd::{AsFd, OwnedFd},
    ptr::NonNull,
    sync::{Arc, OnceLock},
};

use kvferry_proto::LaneEvent;

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
pub(super) struct Dmabufs(OnceLock<Result<Vec<Option<(OwnedFd, u64)>>, String>>);

impl Dmabufs {
    /// The dmabuf of a segment, and the segment's offset in it.
    fn of(&self, gpu: &Gpu, memory: &Memory, segment: usize) -> Result<&(OwnedFd, u64), String> {
        let all = self.0.get_or_init(|| {
            let one = |(i, &len): (usize, &u64)| match len {
                0 => Ok(None),
                len => gpu.dmabuf(memory.base(i as u16), len).map(Some).map_err(|e| e.to_string()),
            };
            memory.segments().iter().enumerate().map(one).collect()
        });
        let all = all.as_ref().map_err(Clone::clone)?;
        all.get(segment).and_then(Option::as_ref).ok_or_else(|| "the segment is empty".into())
    }
}

/// Registers a segment of a GPU pool: as a dmabuf, else by address.
pub(super) fn register(
    pd: &Arc<Pd>,
    gpu: &Gpu,
    memory: &Memory,
    (segment, len): (usize, u64),
    access: Access,
    dmabufs: &Dmabufs,
) -> Result<Region<Memory>, VerbsError> {
    let address = memory.base(segment as u16);
    let dmabuf = if gpu.info().dmabuf {
        dmabufs.of(gpu, memory, segment).and_then(|(fd, offset)| {
            let source = Source::Dmabuf { fd: fd.as_fd(), offset: *offset, len, address };
            // SAFETY: the dmabuf holds the GPU memory of the segment, which stays mapped as long as a clone of the memory lives.
            unsafe { Region::register(pd, source, access, memory.clone()) }.map_err(|e| e.to_string())
        })
    } else {
        Err("the GPU or its driver exports no dmabuf".into())
    };
    let dmabuf = match dmabuf {
        Ok(region) => return Ok(region),
        Err(why) => why,
    };
    let base = NonZeroUsize::new(address as usize).map_or(NonNull::dangling(), NonNull::without_provenance);
    // SAFETY: the segment is GPU memory that stays mapped as long as a clone of the memory lives. Only the device accesses it:
    // without a peer-memory module the kernel finds no pages at this address, and refuses.
    let region = unsafe { Region::register(pd, Source::Address { base, len }, access, memory.clone()) };
    region.map_err(|e| VerbsError::GpuMemory {
        device: pd.device().name().into(),
        dmabuf,
        peermem: format!("{e}{}", if peermem_is_loaded() { "" } else { " (nvidia_peermem is not loaded)" }),
    })
}

fn peermem_is_loaded() -> bool {
    ["nvidia_peermem", "nv_peer_mem"].iter().any(|m| std::path::Path::new("/sys/module").join(m).exists())
}

/// Whether a device can write, or be read from, GPU memory, tried with the first bytes of the pool.
pub(super) fn probe(pd: &Arc<Pd>, gpu: &Gpu, memory: &Memory, access: Access) -> Result<(), VerbsError> {
    let Some((segment, len)) = memory.segments().iter().enumerate().find(|(_, len)| **len > 0) else { return Ok(()) };
    // A dmabuf of the probed part only: exporting all of a large pool takes longer.
    let part = gpu.dmabuf(memory.base(segment as u16), PROBE.min(*len)).map_err(|e| e.to_string());
    let dmabufs = Dmabufs::default();
    let mut all: Vec<_> = memory.segments().iter().map(|_| None).collect();
    let filled = part.map(|part| {
        all[segment] = Some(part);
        all
    });
    let _ = dmabufs.0.set(filled);
    register(pd, gpu, memory, (segment, PROBE.min(*len)), access, &dmabufs).map(drop)
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
        while let Some((_, event)) = self.held.pop_front_if(|(ticket, _)| *ticket <= up_to) {
            report(event);
        }
        !failed
    }

    /// Whether the lane may sleep: nothing is held, or the descriptor tells.
    pub(super) fn may_sleep(&self) -> bool {
        self.fresh.is_empty() && (self.held.is_empty() || self.queue.about_to_sleep())
    }
}
