//! Takes kernel resources away from a producer process without the library's knowledge, as a bug in an engine could.

use std::os::fd::BorrowedFd;

use kvferry::Memory;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

use super::producer::Belongings;

/// More than the number of verbs objects that a test process has on one device.
const HANDLES: u32 = 256;

/// Takes all resources of this kind, and returns their number.
pub(super) fn take(what: Belongings, memory: &Memory) -> usize {
    match what {
        Belongings::Pool => unmap(memory),
        Belongings::QueuePairs => destroy(|handle, answer| {
            // struct ib_uverbs_destroy_qp: the answer's address, the handle, padding.
            let (low, high) = (answer as u32, (answer >> 32) as u32);
            // IB_USER_VERBS_CMD_DESTROY_QP, whose answer has one word.
            vec![27, 6 | 1 << 16, low, high, handle, 0]
        }),
        // IB_USER_VERBS_CMD_DEREG_MR, which has no answer.
        Belongings::Regions => destroy(|handle, _| vec![13, 3, handle]),
    }
}

/// Unmaps the pool. Its addresses stay reserved, so that nothing else is mapped there: an access raises SIGSEGV.
fn unmap(memory: &Memory) -> usize {
    for (segment, &len) in memory.segments().iter().enumerate() {
        let at = std::ptr::with_exposed_provenance_mut(memory.base(segment as u16) as usize);
        // SAFETY: the range is the segment's own mapping, of whole pages. This process does not access it again: only
        // `Say::Revoke` and `Say::ReuseAtOnce` write blocks, and no test combines them with `Take`. Devices keep the pages.
        unsafe { mmap_anonymous(at, len as usize, ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::FIXED) }.unwrap();
    }
    memory.segments().len()
}

/// Writes this command for every handle of every open device. The kernel refuses handles of other objects.
fn destroy(command: impl Fn(u32, u64) -> Vec<u32>) -> usize {
    let mut answer = 0u32;
    let mut destroyed = 0;
    for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        let link = std::fs::read_link(entry.path()).unwrap_or_default();
        if !link.starts_with("/dev/infiniband") {
            continue;
        }
        let number = entry.file_name().to_str().and_then(|n| n.parse().ok()).unwrap();
        // SAFETY: the device was open just now, and a producer closes it only when it ends.
        let device = unsafe { BorrowedFd::borrow_raw(number) };
        for handle in 0..HANDLES {
            let words = command(handle, (&raw mut answer).expose_provenance() as u64);
            let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
            destroyed += usize::from(rustix::io::write(device, &bytes).is_ok());
        }
    }
    destroyed
}
