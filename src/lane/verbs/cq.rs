//! A completion queue with the descriptor that wakes its owner.
//!
//! Owns both. Of a failed completion only the fields that the specification defines are read: the request's id, the status,
//! the vendor's error and the queue pair's number.

use std::{
    ffi::c_int,
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd},
    ptr::{self, NonNull},
    sync::Arc,
};

use ibverbs_sys::{ibv_comp_channel, ibv_cq, ibv_wc};

use super::{
    device::{Device, check},
    error::VerbsError,
};

/// Most completions of one poll. Other engines use 16 to 64.
pub(crate) const BATCH: usize = 32;

/// A completion, in the layout of the C header. Its other fields are undefined for failed requests, and not needed for
/// successful ones.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Completion {
    /// The request's id.
    pub wr_id: u64,
    status: u32,
    _opcode: u32,
    /// The vendor's code of a failure.
    pub vendor_err: u32,
    _byte_len: u32,
    _imm_data: u32,
    /// The queue pair.
    pub qp_num: u32,
    _src_qp: u32,
    _wc_flags: u32,
    _rest: [u32; 2],
}

const _: () =
    assert!(size_of::<Completion>() == size_of::<ibv_wc>() && align_of::<Completion>() == align_of::<ibv_wc>());

impl Completion {
    /// A completion of a fake device, with this value in the undefined fields.
    #[cfg(test)]
    pub(crate) fn new(wr_id: u64, status: u32, qp_num: u32, undefined: u32) -> Self {
        Self {
            wr_id,
            status,
            _opcode: undefined,
            vendor_err: undefined,
            _byte_len: undefined,
            _imm_data: undefined,
            qp_num,
            _src_qp: undefined,
            _wc_flags: undefined,
            _rest: [undefined; 2],
        }
    }

    /// `None`: the request succeeded.
    pub(crate) fn failure(&self) -> Option<Status> {
        (self.status != 0).then_some(Status(self.status))
    }
}

/// Why a request failed: an `ibv_wc_status` other than success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Status(pub u32);

impl Status {
    /// The request was behind one that failed.
    #[cfg(test)]
    pub(crate) const FLUSHED: Self = Self(5);
    /// The peer did not answer.
    pub(crate) const RETRIES_EXCEEDED: Self = Self(12);

    /// Whether the cause is on this side: its requests, its queue pair or its memory.
    pub(crate) fn is_local(self) -> bool {
        matches!(self.0, 1..=4 | 6)
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = match self.0 {
            1 => "the request was longer than its buffer",
            2 => "the queue pair failed locally (is its port down?)",
            4 => "the local memory is not registered for this",
            5 => "flushed behind another failure",
            9 => "the peer cannot serve this request",
            10 => "the peer's memory is not registered any more, or its process is gone",
            11 => "the peer's queue pair failed",
            12 => "the peer did not answer: it, its queue pair or the path is gone",
            13 => "the peer was never ready to receive",
            21 => "general error",
            _ => "failed",
        };
        write!(f, "{text} (status {})", self.0)
    }
}

/// A completion queue.
#[derive(Debug)]
pub(crate) struct Cq {
    cq: NonNull<ibv_cq>,
    channel: NonNull<ibv_comp_channel>,
    device: Arc<Device>,
    /// Events that are taken and not acknowledged yet.
    unacked: u32,
}

// SAFETY: libibverbs allows calls from any thread, and polling, which needs a single caller, takes `&mut self`.
unsafe impl Send for Cq {}

impl Cq {
    /// A queue of at least `entries` completions.
    pub(crate) fn new(device: &Arc<Device>, entries: u32) -> Result<Self, VerbsError> {
        let lib = device.lib();
        let last = |what| device.os(what, io::Error::last_os_error());
        // SAFETY: the context is open.
        let channel = NonNull::new(unsafe { (lib.create_comp_channel)(device.context()) })
            .ok_or_else(|| last("ibv_create_comp_channel"))?;
        let entries = c_int::try_from(entries).unwrap_or(c_int::MAX);
        // SAFETY: the context is open, and the channel was made just now.
        let cq = unsafe { (lib.create_cq)(device.context(), entries, ptr::null_mut(), channel.as_ptr(), 0) };
        let Some(cq) = NonNull::new(cq) else {
            let e = last("ibv_create_cq");
            // SAFETY: no queue uses the channel.
            unsafe { (lib.destroy_comp_channel)(channel.as_ptr()) };
            return Err(e);
        };
        let it = Self { cq, channel, device: device.clone(), unacked: 0 };
        rustix::io::ioctl_fionbio(it.fd(), true).map_err(|e| device.os("non-blocking completion channel", e.into()))?;
        Ok(it)
    }

    pub(crate) fn raw(&self) -> *mut ibv_cq {
        self.cq.as_ptr()
    }

    /// Readable after a completion came while the queue was armed.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel's descriptor is open as long as `self` lives.
        unsafe { BorrowedFd::borrow_raw((*self.channel.as_ptr()).fd) }
    }

    /// Takes up to [`BATCH`] completions.
    #[inline]
    pub(crate) fn poll<'a>(&mut self, space: &'a mut [MaybeUninit<Completion>; BATCH]) -> io::Result<&'a [Completion]> {
        // SAFETY: the queue is alive, and so is its context, whose operations were set when it was opened. The space holds
        // BATCH completions in the layout of `ibv_wc`; the call fills in as many as it returns.
        unsafe {
            let Some(poll) = (*(*self.raw()).context).ops.poll_cq else {
                return Err(io::ErrorKind::Unsupported.into());
            };
            let n = poll(self.raw(), BATCH as c_int, space.as_mut_ptr().cast::<ibv_wc>());
            match usize::try_from(n) {
                Ok(n) => Ok(std::slice::from_raw_parts(space.as_ptr().cast::<Completion>(), n.min(BATCH))),
                Err(_) => Err(io::Error::other("the completion queue is broken (overrun, or the device is gone)")),
            }
        }
    }

    /// Makes the next completion readable on the descriptor. Earlier completions do not count: poll afterwards.
    pub(crate) fn arm(&mut self) -> io::Result<()> {
        // SAFETY: the queue is alive, and so is its context, whose operations were set when it was opened.
        unsafe {
            let ops = &(*(*self.raw()).context).ops;
            let Some(notify) = ops.req_notify_cq else { return Err(io::ErrorKind::Unsupported.into()) };
            check(notify(self.raw(), 0))
        }
    }

    /// Takes the events that made the descriptor readable.
    pub(crate) fn take_events(&mut self) {
        let (mut cq, mut of) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the channel is alive and does not block; both places are valid.
        while unsafe { (self.device.lib().get_cq_event)(self.channel.as_ptr(), &mut cq, &mut of) } == 0 {
            self.unacked += 1;
        }
        // Acknowledging takes a lock, so it is done seldom; the count must not overflow.
        if self.unacked > 1 << 20 {
            self.ack();
        }
    }

    fn ack(&mut self) {
        if self.unacked > 0 {
            // SAFETY: exactly `unacked` events were taken and not acknowledged.
            unsafe { (self.device.lib().ack_cq_events)(self.raw(), self.unacked) };
            self.unacked = 0;
        }
    }
}

impl Drop for Cq {
    fn drop(&mut self) {
        // Destroying a queue waits until all of its events are acknowledged.
        self.ack();
        let lib = self.device.lib();
        // SAFETY: the owner of both drops its queue pairs first; each is destroyed once, the channel after its user.
        let rcs = unsafe { [(lib.destroy_cq)(self.raw()), (lib.destroy_comp_channel)(self.channel.as_ptr())] };
        for error in rcs.into_iter().filter_map(|rc| check(rc).err()) {
            tracing::warn!(device = self.device.name(), %error, "a completion queue cannot be destroyed");
        }
    }
}

impl AsFd for Cq {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd()
    }
}
