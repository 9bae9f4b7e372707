//! A device: the list of them, and one that is open.
//!
//! Owns the open context. Every object of the context holds it, so it closes last. Whether it closed is known afterwards,
//! since closing is the last stage of a teardown.

use std::{
    ffi::CStr,
    fmt, io,
    os::fd::{BorrowedFd, RawFd},
    path::Path,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use ibverbs_sys::{ibv_context, ibv_device_attr, ibv_gid, ibv_gid_entry, ibv_port_attr, ibv_port_state};

use super::{
    error::VerbsError,
    exchange::LinkLayer,
    gid::{self, GidEntry},
    library::Library,
};

/// Where the kernel lists RDMA devices.
pub(super) const SYS: &str = "/sys/class/infiniband";

/// A port, as it was when it was queried.
#[derive(Debug, Clone, Copy)]
pub struct Port {
    /// Its number, from 1.
    pub number: u8,
    /// Whether its link is up.
    pub active: bool,
    /// Its state, in the words of `ibv_devinfo`.
    pub state: &'static str,
    /// Its link layer; `None`: neither InfiniBand nor Ethernet.
    pub link_layer: Option<LinkLayer>,
    /// Its local identifier; 0 on RoCE.
    pub lid: u16,
    /// Whether every packet needs a global header, on InfiniBand too.
    pub grh_required: bool,
    /// Path MTU that the link takes now, in bytes.
    pub mtu: u32,
    /// Longest message, in bytes.
    pub max_message: u32,
}

/// A device's limits.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Ports.
    pub ports: u8,
    /// READs that a queue pair may have outstanding as their initiator.
    pub max_rd_atomic: u8,
    /// READs that a queue pair answers at once.
    pub max_dest_rd_atomic: u8,
    /// Work requests of a queue pair.
    pub max_wr: u32,
    /// Entries of a completion queue.
    pub max_cqe: u32,
    /// Longest region, in bytes.
    pub max_region: u64,
}

/// The state of a device that is being closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Closed {
    /// It is still open.
    NotYet,
    /// It is closed, and reaches no memory.
    Yes,
    /// It could not be closed.
    Failed,
}

/// Tells whether a device has closed, after its last object is gone.
#[derive(Debug, Clone)]
pub(crate) struct Closing(Arc<AtomicU8>);

impl Closing {
    pub(crate) fn state(&self) -> Closed {
        match self.0.load(Ordering::Acquire) {
            0 => Closed::NotYet,
            1 => Closed::Yes,
            _ => Closed::Failed,
        }
    }
}

/// An open device.
pub(crate) struct Device {
    lib: &'static Library,
    context: NonNull<ibv_context>,
    name: String,
    closed: Arc<AtomicU8>,
}

// SAFETY: libibverbs allows every call on a context from any thread. Polling and posting need a single caller, and take `&mut`
// of the owner of the queue.
unsafe impl Send for Device {}
// SAFETY: as for `Send`: concurrent calls on one context are allowed.
unsafe impl Sync for Device {}

/// The kernel's devices, by name, sorted.
pub(super) fn names(sys: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(sys).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.filter_map(|e| e.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// Whether a device's device file exists and may be opened.
fn may_open(sys: &Path, dev: &Path, name: &str) -> bool {
    let mine = |uverbs: &Path| std::fs::read_to_string(uverbs.join("ibdev")).is_ok_and(|n| n.trim() == name);
    let listed = std::fs::read_dir(sys.with_file_name("infiniband_verbs")).into_iter().flatten().flatten();
    let file = listed.map(|e| e.path()).find(|p| mine(p)).and_then(|p| Some(dev.join(p.file_name()?)));
    file.is_some_and(|f| std::fs::OpenOptions::new().read(true).write(true).open(f).is_ok())
}

impl Device {
    /// Opens a device by its name.
    pub(crate) fn open(lib: &'static Library, name: &str) -> Result<Arc<Self>, VerbsError> {
        let mut have = Vec::new();
        let mut n = 0;
        // SAFETY: `n` is a valid place for the length.
        let list = unsafe { (lib.get_device_list)(&mut n) };
        if list.is_null() {
            let source = io::Error::last_os_error();
            return Err(match source.raw_os_error() {
                Some(libc::ENOSYS | libc::ENOENT) => VerbsError::NoDevice,
                _ => VerbsError::Os { what: "ibv_get_device_list", device: name.into(), source },
            });
        }
        let (mut context, mut iwarp) = (None, false);
        for i in 0..usize::try_from(n).unwrap_or(0) {
            // SAFETY: the list has `n` entries, each a device until the list is freed; its name is a C string inside it.
            let (device, found) = unsafe {
                let device = *list.add(i);
                (device, CStr::from_ptr((lib.get_device_name)(device)).to_string_lossy().into_owned())
            };
            if found == name {
                // iWARP ports have the link layer Ethernet, as those of RoCE have.
                // SAFETY: the entry is a device until the list is freed.
                iwarp = unsafe { (*device).transport_type } == ibverbs_sys::IBV_TRANSPORT_IWARP;
                if iwarp {
                    break;
                }
                // SAFETY: `device` is in the list, which is not freed yet; an open context keeps its device.
                let opened = NonNull::new(unsafe { (lib.open_device)(device) });
                context = Some(opened.ok_or_else(io::Error::last_os_error));
                break;
            }
            have.push(found);
        }
        // SAFETY: `list` came from `get_device_list` and is freed once.
        unsafe { (lib.free_device_list)(list) };
        if iwarp {
            return Err(VerbsError::Iwarp { device: name.into() });
        }
        match context {
            Some(Ok(context)) => Ok(Arc::new(Self::new(lib, context, name))),
            Some(Err(e)) if matches!(e.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::ENOENT)) => {
                Err(VerbsError::NotPermitted { device: name.into() })
            }
            Some(Err(source)) => Err(VerbsError::Os { what: "ibv_open_device", device: name.into(), source }),
            None if have.is_empty() && names(Path::new(SYS)).iter().any(|n| n == name) => {
                // The kernel lists it, and the library does not.
                Err(match may_open(Path::new(SYS), Path::new("/dev/infiniband"), name) {
                    true => VerbsError::NoProvider { device: name.into() },
                    false => VerbsError::NotPermitted { device: name.into() },
                })
            }
            None if have.is_empty() => Err(VerbsError::NoDevice),
            None => Err(VerbsError::NoSuchDevice { name: name.into(), have: have.join(", ") }),
        }
    }

    /// Owns an open context.
    pub(crate) fn new(lib: &'static Library, context: NonNull<ibv_context>, name: &str) -> Self {
        Self { lib, context, name: name.into(), closed: Arc::default() }
    }

    pub(crate) fn lib(&self) -> &'static Library {
        self.lib
    }

    pub(crate) fn context(&self) -> *mut ibv_context {
        self.context.as_ptr()
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Whether the kernel still has a device of this name.
    pub(crate) fn is_listed(&self) -> bool {
        Path::new(SYS).join(&self.name).exists()
    }

    /// Tells whether it has closed.
    pub(crate) fn closing(&self) -> Closing {
        Closing(self.closed.clone())
    }

    pub(crate) fn async_fd(&self) -> RawFd {
        // SAFETY: the context is open as long as `self` lives; the field is set when it opens.
        unsafe { (*self.context()).async_fd }
    }

    pub(crate) fn os(&self, what: &'static str, source: io::Error) -> VerbsError {
        VerbsError::Os { what, device: self.name.clone(), source }
    }

    pub(crate) fn limits(&self) -> Result<Limits, VerbsError> {
        let mut a = ibv_device_attr::default();
        // SAFETY: the context is open, and `a` is a valid place for the answer.
        let rc = unsafe { (self.lib.query_device)(self.context(), &mut a) };
        check(rc).map_err(|e| self.os("ibv_query_device", e))?;
        let small = |n: i32| u8::try_from(n.clamp(0, 255)).unwrap_or(0);
        let large = |n: i32| u32::try_from(n).unwrap_or(0);
        Ok(Limits {
            ports: a.phys_port_cnt,
            // A queue pair's READs as initiator, and as target.
            max_rd_atomic: small(a.max_qp_init_rd_atom),
            max_dest_rd_atomic: small(a.max_qp_rd_atom),
            max_wr: large(a.max_qp_wr),
            max_cqe: large(a.max_cqe),
            max_region: a.max_mr_size,
        })
    }

    /// A port's GIDs that are not empty, as they are now.
    pub(crate) fn gids(&self, port: u8) -> Vec<GidEntry> {
        let sys = Path::new(SYS);
        match self.gid_rows(port) {
            Some(rows) => gid::rows(sys, self.name(), port, rows.into_iter()),
            None => gid::table(sys, self.name(), port),
        }
    }

    /// The used rows of a port's table, in one call if the library has it. With a file for each of 256 rows, a connection took
    /// 2 s on an emulated machine.
    fn gid_rows(&self, port: u8) -> Option<Vec<u8>> {
        /// Rows of all ports together. With more rows the call fails, and the rows are read one by one.
        const MOST: usize = 1024;
        let query = self.lib.query_gid_table?;
        let empty =
            ibv_gid_entry { gid: ibv_gid { raw: [0; 16] }, gid_index: 0, port_num: 0, gid_type: 0, ndev_ifindex: 0 };
        let mut space = vec![empty; MOST];
        // SAFETY: the context is open, and the space holds as many entries of this size as it is said to.
        let n = unsafe { query(self.context(), space.as_mut_ptr(), MOST, 0, size_of::<ibv_gid_entry>()) };
        let used = space.get(..usize::try_from(n).ok()?)?.iter().filter(|e| e.port_num == u32::from(port));
        Some(used.filter_map(|e| u8::try_from(e.gid_index).ok()).collect())
    }

    /// A port, as it is now.
    pub(crate) fn port(&self, number: u8) -> Result<Port, VerbsError> {
        let mut a = ibv_port_attr::default();
        // SAFETY: the context is open. The function fills the fields that its oldest form knows; the others stay zero.
        let rc = unsafe { (self.lib.query_port)(self.context(), number, &mut a) };
        check(rc).map_err(|e| self.os("ibv_query_port", e))?;
        let state = match a.state {
            ibv_port_state::IBV_PORT_DOWN => "DOWN",
            ibv_port_state::IBV_PORT_INIT => "INIT",
            ibv_port_state::IBV_PORT_ARMED => "ARMED",
            ibv_port_state::IBV_PORT_ACTIVE => "ACTIVE",
            ibv_port_state::IBV_PORT_ACTIVE_DEFER => "ACTIVE_DEFER",
            _ => "NOP",
        };
        let link_layer = match u32::from(a.link_layer) {
            // Unspecified: a kernel from before RoCE, where everything is InfiniBand.
            0 | 1 => Some(LinkLayer::InfiniBand),
            2 => Some(LinkLayer::Ethernet),
            _ => None,
        };
        Ok(Port {
            number,
            active: a.state == ibv_port_state::IBV_PORT_ACTIVE,
            state,
            link_layer,
            lid: a.lid,
            // IBV_QPF_GRH_REQUIRED
            grh_required: a.flags & 1 != 0,
            mtu: mtu_bytes(a.active_mtu),
            max_message: a.max_msg_sz,
        })
    }

    /// Its descriptor of async events, valid while `self` lives.
    pub(crate) fn async_events(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the context's, which is open as long as `self` lives, and is not -1.
        unsafe { BorrowedFd::borrow_raw(self.async_fd()) }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: every object of the context holds this owner, so it is gone, or a teardown gave it up as wedged.
        let rc = unsafe { (self.lib.close_device)(self.context()) };
        let closed = check(rc);
        if let Err(error) = &closed {
            tracing::warn!(device = %self.name, %error, "the device cannot be closed");
        }
        self.closed.store(if closed.is_ok() { 1 } else { 2 }, Ordering::Release);
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Device").field(&self.name).finish()
    }
}

/// The result of a verbs call: 0, an errno, or -1 with errno set.
pub(super) fn check(rc: i32) -> io::Result<()> {
    match rc {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        n => Err(io::Error::from_raw_os_error(n.saturating_abs())),
    }
}

/// Bytes of an `ibv_mtu`; 0 for an undefined value.
pub(super) fn mtu_bytes(mtu: u32) -> u32 {
    if (1..=5).contains(&mtu) { 128 << mtu } else { 0 }
}

/// The largest `ibv_mtu` of at most that many bytes; `None` under 256.
pub(super) fn mtu_code(bytes: u32) -> Option<u32> {
    (1..=5).rev().find(|&m| mtu_bytes(m) <= bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_file_that_can_be_opened_means_that_the_library_lacks_a_driver() {
        let root = std::env::temp_dir().join(format!("kvferry-devices-{}", std::process::id()));
        let (sys, dev) = (root.join("infiniband"), root.join("dev"));
        std::fs::create_dir_all(root.join("infiniband_verbs/uverbs0")).unwrap();
        std::fs::create_dir_all(&dev).unwrap();
        std::fs::write(root.join("infiniband_verbs/uverbs0/ibdev"), "nic0\n").unwrap();
        assert!(!may_open(&sys, &dev, "nic0"), "no device file: a container without the device");
        std::fs::write(dev.join("uverbs0"), "").unwrap();
        assert!(may_open(&sys, &dev, "nic0"));
        assert!(!may_open(&sys, &dev, "nic1"));
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn mtus_are_rounded_down_and_never_up() {
        for (bytes, code) in [(255, None), (256, Some(1)), (1023, Some(2)), (4096, Some(5)), (9000, Some(5))] {
            assert_eq!(mtu_code(bytes), code);
        }
        assert_eq!([0, 1, 5, 6].map(mtu_bytes), [0, 256, 4096, 0]);
    }

    #[test]
    fn errors_are_returned_as_numbers_or_in_errno() {
        assert!(check(0).is_ok());
        assert_eq!(check(libc::ENOMEM).unwrap_err().raw_os_error(), Some(libc::ENOMEM));
        assert_eq!(check(-libc::EINVAL).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
}
