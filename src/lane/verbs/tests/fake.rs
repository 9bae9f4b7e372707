//! A fake device: the functions of libibverbs and a context's operations table, over memory of this process. READs are copies,
//! made when the test says so. The test decides how posts, completions, registration, destruction and closing fail.
//!
//! Memory of the stand-in for libcuda can be registered too, and is reached behind the driver's back, as by a network card.

use std::{
    collections::{BTreeMap, VecDeque},
    ffi::{c_char, c_int, c_uint, c_void},
    os::fd::{AsRawFd, OwnedFd},
    ptr::{self, NonNull},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU32, Ordering},
    },
};

use ibverbs_sys::*;

use crate::lane::verbs::{
    cq::{Completion, Status},
    device::Device,
    library::Library,
};

/// A posted request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Op {
    pub wr_id: u64,
    signaled: bool,
    pub local: u64,
    pub len: u32,
    pub remote: u64,
    rkey: u32,
}

/// A queue pair.
#[derive(Debug, Default)]
pub(super) struct Pair {
    cq: usize,
    pub ops: VecDeque<Op>,
    failed: bool,
}

/// The test's orders, and the device's state.
#[derive(Debug, Default)]
pub(super) struct Control {
    pub pairs: BTreeMap<u32, Pair>,
    completions: BTreeMap<usize, VecDeque<Completion>>,
    armed: BTreeMap<usize, bool>,
    channels: BTreeMap<usize, Arc<OwnedFd>>,
    /// Registered: key, first byte, length.
    regions: BTreeMap<u32, (u64, u64)>,
    /// How many requests of the next post are accepted before it fails, and the error.
    pub refuse: Option<(usize, i32)>,
    /// ERR flushes nothing.
    pub no_flush: bool,
    /// Error of destroying a queue pair.
    pub destroy: i32,
    /// Error of closing the context.
    pub close: i32,
    /// The value of undefined fields.
    pub undefined: u32,
    /// Error of registering a dmabuf, and of registering GPU memory by address.
    pub refuse_dmabuf: i32,
    pub refuse_gpu: i32,
    /// Dmabufs that were registered.
    pub dmabufs: u32,
    pub destroyed: u32,
    pub closed: u32,
    pub posts: u32,
    /// All registrations: first byte, length, access flags.
    pub registered: Vec<(u64, u64, u32)>,
    /// The capacities of all queue pairs, and the attributes that were set: number, attributes, mask.
    pub made: Vec<(u32, ibv_qp_cap)>,
    pub set: Vec<(u32, Set, i32)>,
}

/// Attributes of a queue pair. The C type is not Debug.
#[derive(Clone, Copy)]
pub(super) struct Set(pub ibv_qp_attr);

impl std::fmt::Debug for Set {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Set").field(&self.0.qp_state).finish()
    }
}

impl Control {
    fn push(&mut self, cq: usize, c: Completion) {
        self.completions.entry(cq).or_default().push_back(c);
        if self.armed.insert(cq, false) == Some(true)
            && let Some(fd) = self.channels.get(&cq)
        {
            rustix::io::write(&**fd, &1u64.to_ne_bytes()).unwrap();
        }
    }

    /// Executes the next `n` requests of a queue pair; none if it was destroyed meanwhile.
    pub(super) fn complete(&mut self, number: u32, n: usize) {
        for _ in 0..n {
            let Some(pair) = self.pairs.get_mut(&number) else { return };
            let Some(op) = pair.ops.pop_front() else { return };
            let cq = pair.cq;
            assert!(
                REGIONS
                    .lock()
                    .unwrap()
                    .iter()
                    .any(|&(k, at, len)| k == op.rkey && op.remote >= at && op.remote + u64::from(op.len) <= at + len)
            );
            read(op);
            if op.signaled {
                self.push(cq, Completion::new(op.wr_id, 0, number, self.undefined));
            }
        }
    }

    /// As soft-RoCE does when an answer comes out of sequence: the next request completes successfully, nothing is written, and
    /// the queue pair goes to ERR.
    pub(super) fn complete_falsely(&mut self, number: u32) {
        let pair = self.pairs.get_mut(&number).unwrap();
        pair.failed = true;
        let cq = pair.cq;
        if let Some(op) = pair.ops.pop_front().filter(|op| op.signaled) {
            self.push(cq, Completion::new(op.wr_id, 0, number, self.undefined));
        }
        self.flush(number);
    }

    /// Fails the next request of a queue pair, and flushes the requests behind it.
    pub(super) fn fail(&mut self, number: u32, status: u32) {
        let pair = self.pairs.get_mut(&number).unwrap();
        pair.failed = true;
        let cq = pair.cq;
        if let Some(op) = pair.ops.pop_front() {
            self.push(cq, Completion::new(op.wr_id, status, number, self.undefined));
        }
        self.flush(number);
    }

    fn flush(&mut self, number: u32) {
        let pair = self.pairs.get_mut(&number).unwrap();
        pair.failed = true;
        let (cq, ops) = (pair.cq, std::mem::take(&mut pair.ops));
        for op in ops {
            self.push(cq, Completion::new(op.wr_id, Status::FLUSHED.0, number, self.undefined));
        }
    }

    /// A completion that the test makes up.
    pub(super) fn forge(&mut self, wr_id: u64, status: u32, number: u32) {
        if let Some(cq) = self.pairs.get(&number).map(|p| p.cq).or(self.completions.keys().next().copied()) {
            self.push(cq, Completion::new(wr_id, status, number, self.undefined));
        }
    }

    /// Numbers of all queue pairs.
    pub(super) fn numbers(&self) -> Vec<u32> {
        self.pairs.keys().copied().collect()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.pairs.values().map(|p| p.ops.len()).sum()
    }
}

/// Copies the bytes of a READ.
fn read(op: Op) {
    let mut bytes = vec![0; op.len as usize];
    match gpu(op.remote) {
        Some(gpu) => gpu.read(op.remote, &mut bytes).unwrap(),
        // SAFETY: the source lies in a registered region, which the tests keep.
        None => unsafe { ptr::copy_nonoverlapping(op.remote as *const u8, bytes.as_mut_ptr(), bytes.len()) },
    }
    match gpu(op.local) {
        Some(gpu) => gpu.write(op.local, &bytes).unwrap(),
        // SAFETY: the lane checked the local end, which the tests keep.
        None => unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), op.local as *mut u8, bytes.len()) },
    }
}

/// The stand-in for libcuda, in a test with GPU memory.
pub(super) static CUDA: std::sync::OnceLock<kvferry_cuda_standin::Control> = std::sync::OnceLock::new();

/// The stand-in, if this address is GPU memory.
fn gpu(address: u64) -> Option<kvferry_cuda_standin::Control> {
    CUDA.get().copied().filter(|c| c.read(address, &mut [0]).is_ok())
}

/// Registered regions of all fake devices: a READ crosses from one to another.
static REGIONS: Mutex<Vec<(u32, u64, u64)>> = Mutex::new(Vec::new());
static NEXT: AtomicU32 = AtomicU32::new(0x100);

#[repr(C)]
struct Context {
    /// First, so that a pointer to it is a pointer to this.
    context: ibv_context,
    control: Arc<Mutex<Control>>,
}

/// A fake device.
pub(super) struct FakeDevice {
    pub device: Arc<Device>,
    control: Arc<Mutex<Control>>,
}

impl FakeDevice {
    pub(super) fn new(name: &str) -> Self {
        let control = Arc::<Mutex<Control>>::default();
        let mut context = ibv_context::default();
        context.ops.poll_cq = Some(poll_cq);
        context.ops.post_send = Some(post_send);
        context.ops.req_notify_cq = Some(req_notify_cq);
        // Never freed, for late calls of a lane under test.
        let context = Box::leak(Box::new(Context { context, control: control.clone() }));
        let device = Device::new(&LIBRARY, NonNull::from(context).cast(), name);
        Self { device: Arc::new(device), control }
    }

    /// A handle that does not keep the device open.
    pub(super) fn handle(&self) -> Arc<Mutex<Control>> {
        self.control.clone()
    }
}

fn control<'a>(context: *mut ibv_context) -> MutexGuard<'a, Control> {
    // SAFETY: every context that these functions see is the first field of a `Context` that is never freed.
    unsafe { &*context.cast::<Context>() }.control.lock().unwrap()
}

pub(super) static LIBRARY: Library = Library {
    get_device_list,
    free_device_list,
    get_device_name,
    open_device,
    close_device,
    query_device,
    query_port,
    alloc_pd,
    dealloc_pd,
    reg_mr,
    dereg_mr,
    create_comp_channel,
    destroy_comp_channel,
    create_cq,
    destroy_cq,
    get_cq_event,
    ack_cq_events,
    create_qp,
    modify_qp,
    destroy_qp,
    get_async_event,
    ack_async_event,
    reg_mr_iova2: Some(reg_mr_iova2),
    reg_dmabuf_mr: Some(reg_dmabuf_mr),
    fork_init: None,
    query_gid_table: None,
};

unsafe extern "C" fn get_device_list(_: *mut c_int) -> *mut *mut ibv_device {
    ptr::null_mut()
}
unsafe extern "C" fn free_device_list(_: *mut *mut ibv_device) {}
unsafe extern "C" fn get_device_name(_: *mut ibv_device) -> *const c_char {
    c"fake".as_ptr()
}
unsafe extern "C" fn open_device(_: *mut ibv_device) -> *mut ibv_context {
    ptr::null_mut()
}
unsafe extern "C" fn close_device(context: *mut ibv_context) -> c_int {
    let mut c = control(context);
    c.closed += 1;
    c.close
}
unsafe extern "C" fn query_device(_: *mut ibv_context, a: *mut ibv_device_attr) -> c_int {
    // SAFETY: the caller passes a valid place.
    let a = unsafe { &mut *a };
    (a.phys_port_cnt, a.max_qp_init_rd_atom, a.max_qp_rd_atom) = (1, 8, 200);
    (a.max_qp_wr, a.max_cqe) = (4096, 1 << 16);
    0
}
unsafe extern "C" fn query_port(_: *mut ibv_context, _: u8, a: *mut ibv_port_attr) -> c_int {
    // SAFETY: the caller passes a valid place.
    let a = unsafe { &mut *a };
    (a.state, a.active_mtu, a.lid, a.link_layer) = (ibv_port_state::IBV_PORT_ACTIVE, 5, 7, 1);
    a.max_msg_sz = 1 << 30;
    0
}
unsafe extern "C" fn alloc_pd(context: *mut ibv_context) -> *mut ibv_pd {
    Box::into_raw(Box::new(ibv_pd { context, ..Default::default() }))
}
unsafe extern "C" fn dealloc_pd(pd: *mut ibv_pd) -> c_int {
    // SAFETY: it was made by `alloc_pd`, and the caller destroys it once.
    drop(unsafe { Box::from_raw(pd) });
    0
}
unsafe extern "C" fn reg_mr_iova2(
    pd: *mut ibv_pd,
    at: *mut c_void,
    len: usize,
    iova: u64,
    access: c_uint,
) -> *mut ibv_mr {
    assert_eq!(iova, at as u64);
    // SAFETY: both functions have the same contract.
    unsafe { reg_mr(pd, at, len, access as c_int) }
}
unsafe extern "C" fn reg_mr(pd: *mut ibv_pd, at: *mut c_void, len: usize, access: c_int) -> *mut ibv_mr {
    // SAFETY: the domain is alive.
    let error = control(unsafe { (*pd).context }).refuse_gpu;
    if error != 0 && gpu(at as u64).is_some() { refused(error) } else { region(pd, at as u64, len, access) }
}
unsafe extern "C" fn reg_dmabuf_mr(
    pd: *mut ibv_pd,
    _: u64,
    len: usize,
    iova: u64,
    _: c_int,
    access: c_int,
) -> *mut ibv_mr {
    // SAFETY: the domain is alive.
    let mut c = control(unsafe { (*pd).context });
    if c.refuse_dmabuf != 0 {
        return refused(c.refuse_dmabuf);
    }
    c.dmabufs += 1;
    drop(c);
    region(pd, iova, len, access)
}
fn refused(error: i32) -> *mut ibv_mr {
    // SAFETY: the place of this thread's error.
    unsafe { *libc::__errno_location() = error };
    ptr::null_mut()
}
fn region(pd: *mut ibv_pd, at: u64, len: usize, access: c_int) -> *mut ibv_mr {
    let key = NEXT.fetch_add(1, Ordering::Relaxed);
    REGIONS.lock().unwrap().push((key, at, len as u64));
    // SAFETY: the domain is alive.
    let context = unsafe { (*pd).context };
    let mut c = control(context);
    c.regions.insert(key, (at, len as u64));
    c.registered.push((at, len as u64, access as u32));
    drop(c);
    Box::into_raw(Box::new(ibv_mr { context, pd, lkey: key, rkey: key, ..Default::default() }))
}
unsafe extern "C" fn dereg_mr(mr: *mut ibv_mr) -> c_int {
    // SAFETY: it was made by `reg_mr`, and the caller destroys it once.
    let mr = unsafe { Box::from_raw(mr) };
    REGIONS.lock().unwrap().retain(|r| r.0 != mr.rkey);
    control(mr.context).regions.remove(&mr.rkey);
    0
}
unsafe extern "C" fn create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel {
    let fd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let channel = ibv_comp_channel { context, fd: fd.as_raw_fd(), refcnt: 0 };
    let channel = Box::into_raw(Box::new(channel));
    control(context).channels.insert(channel as usize, Arc::new(fd));
    channel
}
unsafe extern "C" fn destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int {
    // SAFETY: it was made by `create_comp_channel`, and the caller destroys it once.
    let c = unsafe { Box::from_raw(channel) };
    control(c.context).channels.remove(&(channel as usize));
    0
}
unsafe extern "C" fn create_cq(
    context: *mut ibv_context,
    _: c_int,
    _: *mut c_void,
    channel: *mut ibv_comp_channel,
    _: c_int,
) -> *mut ibv_cq {
    let cq = Box::into_raw(Box::new(ibv_cq { context, channel, ..Default::default() }));
    let mut c = control(context);
    let fd = c.channels[&(channel as usize)].clone();
    c.channels.insert(cq as usize, fd);
    c.completions.insert(cq as usize, VecDeque::new());
    cq
}
unsafe extern "C" fn destroy_cq(cq: *mut ibv_cq) -> c_int {
    // SAFETY: it was made by `create_cq`, and the caller destroys it once.
    let context = unsafe { Box::from_raw(cq) }.context;
    let mut c = control(context);
    c.channels.remove(&(cq as usize));
    c.completions.remove(&(cq as usize));
    0
}
unsafe extern "C" fn get_cq_event(channel: *mut ibv_comp_channel, _: *mut *mut ibv_cq, _: *mut *mut c_void) -> c_int {
    // SAFETY: the channel is alive.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw((*channel).fd) };
    rustix::io::read(fd, &mut [0u8; 8]).map_or(-1, |_| 0)
}
unsafe extern "C" fn ack_cq_events(_: *mut ibv_cq, _: c_uint) {}
unsafe extern "C" fn create_qp(pd: *mut ibv_pd, init: *mut ibv_qp_init_attr) -> *mut ibv_qp {
    // SAFETY: both are alive.
    let (context, cq) = unsafe { ((*pd).context, (*init).send_cq) };
    let qp_num = NEXT.fetch_add(1, Ordering::Relaxed);
    let mut c = control(context);
    c.pairs.insert(qp_num, Pair { cq: cq as usize, ..Pair::default() });
    // SAFETY: the caller's attributes are valid during the call.
    c.made.push((qp_num, unsafe { (*init).cap }));
    drop(c);
    Box::into_raw(Box::new(ibv_qp { context, pd, send_cq: cq, qp_num, ..Default::default() }))
}
unsafe extern "C" fn modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, fields: c_int) -> c_int {
    // SAFETY: both are alive.
    let (qp, attr) = unsafe { (&*qp, &*attr) };
    control(qp.context).set.push((qp.qp_num, Set(*attr), fields));
    if attr.qp_state == ibv_qp_state::IBV_QPS_ERR {
        let mut c = control(qp.context);
        if c.no_flush {
            c.pairs.get_mut(&qp.qp_num).unwrap().failed = true;
        } else {
            c.flush(qp.qp_num);
        }
    }
    0
}
unsafe extern "C" fn destroy_qp(qp: *mut ibv_qp) -> c_int {
    // SAFETY: the pair is alive.
    let (context, number) = unsafe { ((*qp).context, (*qp).qp_num) };
    let mut c = control(context);
    if c.destroy != 0 {
        return c.destroy;
    }
    c.pairs.remove(&number);
    c.destroyed += 1;
    // SAFETY: it was made by `create_qp`, and the caller destroys it once.
    drop(unsafe { Box::from_raw(qp) });
    0
}
unsafe extern "C" fn get_async_event(_: *mut ibv_context, _: *mut ibv_async_event) -> c_int {
    -1
}
unsafe extern "C" fn ack_async_event(_: *mut ibv_async_event) {}

unsafe extern "C" fn post_send(qp: *mut ibv_qp, first: *mut ibv_send_wr, bad: *mut *mut ibv_send_wr) -> c_int {
    // SAFETY: the pair is alive.
    let (context, number) = unsafe { ((*qp).context, (*qp).qp_num) };
    let mut c = control(context);
    c.posts += 1;
    let mut refuse = c.refuse.take();
    let mut at = first;
    while !at.is_null() {
        if let Some((left, error)) = &mut refuse {
            if *left == 0 {
                // SAFETY: the caller passes a valid place.
                unsafe { *bad = at };
                return *error;
            }
            *left -= 1;
        }
        // SAFETY: the chain is valid, and ends with null.
        let (wr, sge) = unsafe { (&*at, &*(*at).sg_list) };
        assert_eq!((wr.opcode, wr.num_sge), (ibv_wr_opcode::IBV_WR_RDMA_READ, 1));
        let (at_local, len) = c.regions[&sge.lkey];
        assert!(sge.addr >= at_local && sge.addr + u64::from(sge.length) <= at_local + len, "outside the local region");
        // SAFETY: the request is a READ.
        let rdma = unsafe { wr.wr.rdma };
        let op = Op {
            wr_id: wr.wr_id,
            signaled: wr.send_flags & 2 != 0,
            local: sge.addr,
            len: sge.length,
            remote: rdma.remote_addr,
            rkey: rdma.rkey,
        };
        let pair = c.pairs.get_mut(&number).unwrap();
        pair.ops.push_back(op);
        if pair.failed {
            c.flush(number);
        }
        at = wr.next;
    }
    0
}
unsafe extern "C" fn poll_cq(cq: *mut ibv_cq, n: c_int, wc: *mut ibv_wc) -> c_int {
    // SAFETY: the queue is alive.
    let mut c = control(unsafe { (*cq).context });
    let queue = c.completions.get_mut(&(cq as usize)).unwrap();
    let n = queue.len().min(n as usize);
    for (i, completion) in queue.drain(..n).enumerate() {
        // SAFETY: the caller has room for `n`, and both have the same layout.
        unsafe { wc.cast::<Completion>().add(i).write(completion) };
    }
    n as c_int
}
unsafe extern "C" fn req_notify_cq(cq: *mut ibv_cq, _: c_int) -> c_int {
    // SAFETY: the queue is alive.
    control(unsafe { (*cq).context }).armed.insert(cq as usize, true);
    0
}
