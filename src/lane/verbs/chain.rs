//! The chain of READ requests of one queue pair: filled in place, posted in one call, and accounted for one by one.
//!
//! Owns the work requests, which are linked once and re-used, and the purpose of each. A request is *filled*, then *posted*,
//! then *retired*, in that order and each exactly once. After construction nothing is allocated.
//!
//! Every Nth request, every [`SIGNALED_BYTES`] and the last request of a chain report their completion. A report retires all
//! requests before it, since a queue pair completes its requests in order. An id of no posted request retires nothing.
//!
//! A post that fails is not taken apart: the owner keeps no more than `depth` requests unretired, so a queue is never full.
//! Whatever else fails is fatal for the queue pair, and any part of the chain may have been posted.

use std::{io, ptr};

use ibverbs_sys::{ibv_send_wr, ibv_sge, ibv_wr_opcode};

use super::qp::Qp;

/// Largest depth.
pub(crate) const MAX_DEPTH: u32 = 1 << 12;

/// Bytes after which a request reports, however few requests they are: room for the next requests is known in time, and a
/// queue of long READs never runs empty. 400 Gbit/s take 5 us for so many bytes.
pub(crate) const SIGNALED_BYTES: u64 = 256 << 10;

/// IBV_SEND_SIGNALED.
const SIGNALED: u32 = 2;

/// Bits of an id that hold a request's number. The bits above hold the queue pair.
const NUMBER: u64 = (1 << 56) - 1;

/// A READ, as the device sees it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request {
    /// Its destination.
    pub local: u64,
    pub lkey: u32,
    /// In bytes.
    pub len: u32,
    /// Its source.
    pub remote: u64,
    pub rkey: u32,
}

/// A ring of requests; `T` is the purpose of a request.
pub(crate) struct Chain<T> {
    /// Linked in a circle.
    wrs: Box<[ibv_send_wr]>,
    /// One for each request, at the same index; the requests point into it.
    _sges: Box<[ibv_sge]>,
    sges: *mut ibv_sge,
    work: Box<[T]>,
    mask: u64,
    /// High bits of every id: the queue pair.
    tag: u64,
    signal_every: u64,
    /// Bytes filled since the last request that reports.
    unsignaled: u64,
    /// Requests before these numbers are retired, posted, filled. The numbers only grow, and at most `depth` requests lie
    /// between the first number and the last.
    retired: u64,
    posted: u64,
    filled: u64,
}

// SAFETY: the raw pointers point into the boxes, which move along and are not shared.
unsafe impl<T: Send> Send for Chain<T> {}

impl<T: Copy + Default> Chain<T> {
    /// A chain of `depth` requests (a power of two, at most [`MAX_DEPTH`]) of the queue pair with the index `pair`.
    pub(crate) fn new(depth: u32, signal_every: u32, pair: u8) -> Self {
        let depth = depth.clamp(1, MAX_DEPTH).next_power_of_two();
        let n = depth as usize;
        let mut sges = vec![ibv_sge::default(); n].into_boxed_slice();
        let base = sges.as_mut_ptr();
        let mut wrs = vec![ibv_send_wr::default(); n].into_boxed_slice();
        for (i, wr) in wrs.iter_mut().enumerate() {
            wr.sg_list = base.wrapping_add(i);
            wr.num_sge = 1;
            wr.opcode = ibv_wr_opcode::IBV_WR_RDMA_READ;
        }
        let first = wrs.as_mut_ptr();
        for (i, wr) in wrs.iter_mut().enumerate() {
            wr.next = first.wrapping_add((i + 1) % n);
        }
        Self {
            wrs,
            _sges: sges,
            sges: base,
            work: vec![T::default(); n].into_boxed_slice(),
            mask: u64::from(depth) - 1,
            tag: u64::from(pair) << 56,
            signal_every: u64::from(signal_every.clamp(1, depth)),
            unsignaled: 0,
            retired: 0,
            posted: 0,
            filled: 0,
        }
    }

    /// Requests that may be filled now.
    #[inline]
    pub(crate) fn room(&self) -> usize {
        (self.mask + 1 - (self.filled - self.retired)) as usize
    }

    /// Requests that are posted and not retired.
    #[inline]
    pub(crate) fn in_flight(&self) -> usize {
        (self.posted - self.retired) as usize
    }

    /// The id of a request: the queue pair, and the request's number. The number consists of the slot and of how often the
    /// slot was used, since the depth is a power of two.
    #[inline]
    fn id(&self, number: u64) -> u64 {
        self.tag | number & NUMBER
    }

    /// Fills the next request. There must be room.
    #[inline]
    pub(crate) fn fill(&mut self, r: Request, work: T) {
        debug_assert!(self.room() > 0);
        let i = (self.filled & self.mask) as usize;
        let id = self.id(self.filled);
        self.unsignaled += u64::from(r.len);
        let signal = (self.filled + 1).is_multiple_of(self.signal_every) || self.unsignaled >= SIGNALED_BYTES;
        if signal {
            self.unsignaled = 0;
        }
        self.work[i] = work;
        let wr = &mut self.wrs[i];
        wr.wr_id = id;
        wr.send_flags = if signal { SIGNALED } else { 0 };
        wr.wr.rdma.remote_addr = r.remote;
        wr.wr.rdma.rkey = r.rkey;
        // SAFETY: `sges` has as many entries as `wrs`, and no other reference to them exists while `&mut self` is held.
        unsafe { *self.sges.add(i) = ibv_sge { addr: r.local, length: r.len, lkey: r.lkey } };
        self.filled += 1;
    }

    /// Posts the filled requests as one chain, whose last request reports. After an error all of them count as posted.
    ///
    /// # Safety
    /// The memory that the filled requests name must be registered, and stay valid until they have completed or the queue
    /// pair is destroyed.
    pub(crate) unsafe fn post(&mut self, qp: &mut Qp) -> io::Result<()> {
        // SAFETY: the chain ends with a null link (see `post_with`), and the caller vouches for the memory.
        self.post_with(|first| unsafe { qp.post(first) })
    }

    /// As `post`, through any function that takes a chain which ends with a null link.
    fn post_with(&mut self, send: impl FnOnce(*mut ibv_send_wr) -> io::Result<()>) -> io::Result<()> {
        if self.filled == self.posted {
            return Ok(());
        }
        let first = self.wrs.as_mut_ptr().wrapping_add((self.posted & self.mask) as usize);
        let last = ((self.filled - 1) & self.mask) as usize;
        self.wrs[last].send_flags = SIGNALED;
        self.unsignaled = 0;
        let link = std::mem::replace(&mut self.wrs[last].next, ptr::null_mut());
        let sent = send(first);
        self.wrs[last].next = link;
        self.posted = self.filled;
        sent
    }

    /// The request with this id, as the number of unretired requests before it; `None` if no request in flight has it.
    #[inline]
    pub(crate) fn find(&self, id: u64) -> Option<u64> {
        if id & !NUMBER != self.tag {
            return None;
        }
        // Numbers in flight are consecutive, and fewer than `NUMBER`.
        let ahead = id.wrapping_sub(self.retired) & NUMBER;
        (ahead < self.posted - self.retired).then_some(ahead)
    }

    /// Retires the next `n` requests that are in flight, first to last.
    #[inline]
    pub(crate) fn retire(&mut self, n: u64, mut each: impl FnMut(T)) {
        let n = n.min(self.posted - self.retired);
        for number in self.retired..self.retired + n {
            each(self.work[(number & self.mask) as usize]);
        }
        self.retired += n;
    }
}

impl<T> std::fmt::Debug for Chain<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chain")
            .field("depth", &(self.mask + 1))
            .field("retired", &self.retired)
            .field("posted", &self.posted)
            .field("filled", &self.filled)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(i: u64) -> Request {
        Request { local: i * 10, lkey: 1, len: 4096, remote: i * 100, rkey: 2 }
    }

    /// Walks a chain as a device would, and returns its requests: id, number, whether it reports.
    fn device(first: *mut ibv_send_wr) -> Vec<(u64, u64, bool)> {
        let (mut at, mut seen) = (first, Vec::new());
        while !at.is_null() {
            // SAFETY: the chain under test ends with null, and its requests are alive.
            let (wr, sge) = unsafe { (*at, *(*at).sg_list) };
            // SAFETY: every request is a READ.
            let remote = unsafe { wr.wr.rdma.remote_addr };
            assert_eq!((wr.num_sge, sge.addr * 10), (1, remote));
            seen.push((wr.wr_id, remote / 100, wr.send_flags & SIGNALED != 0));
            at = wr.next;
        }
        seen
    }

    /// Posts the filled requests, and returns them as the device sees them.
    fn post(c: &mut Chain<u64>) -> Vec<(u64, u64, bool)> {
        let mut seen = Vec::new();
        let sent = c.post_with(|first| {
            seen = device(first);
            Ok(())
        });
        assert!(sent.is_ok());
        seen
    }

    /// Not a test: `cargo test --release --lib --features verbs chain -- --ignored --nocapture`.
    #[test]
    #[ignore = "prints figures"]
    fn speed() {
        use std::{hint::black_box, time::Instant};
        let mut c = Chain::<[u64; 2]>::new(128, 16, 0);
        let (mut best, mut n) = (f64::MAX, 0);
        for _ in 0..20 {
            let started = Instant::now();
            for _ in 0..1000 {
                while c.room() > 0 {
                    c.fill(black_box(request(n)), [n, n]);
                    n += 1;
                }
                let posted = c.post_with(|first| {
                    black_box(first);
                    Ok(())
                });
                assert!(posted.is_ok());
                c.retire(128, |w| {
                    black_box(w);
                });
            }
            best = best.min(started.elapsed().as_nanos() as f64 / 128e3);
        }
        println!("{best:.1} ns to fill, post and retire a request, chains of 128");
    }

    #[test]
    fn every_request_is_posted_once_and_in_order_from_every_place_in_the_ring() {
        for start in 0..8u64 {
            for fill in 1..=8u64 {
                let mut c = Chain::<u64>::new(8, 3, 0);
                for n in 0..start {
                    c.fill(request(n), n);
                    post(&mut c);
                    c.retire(1, |w| assert_eq!(w, n));
                }
                for n in start..start + fill {
                    c.fill(request(n), n);
                }
                assert_eq!((c.room() as u64, c.in_flight()), (8 - fill, 0));
                let seen = post(&mut c);
                let numbers: Vec<u64> = seen.iter().map(|s| s.1).collect();
                assert_eq!(numbers, (start..start + fill).collect::<Vec<_>>());
                assert!(seen.last().unwrap().2, "the last request of a chain reports");
                assert!(post(&mut c).is_empty(), "nothing is posted twice");
                let mut done = Vec::new();
                let all = c.find(seen.last().unwrap().0).unwrap();
                assert_eq!(all, fill - 1);
                c.retire(all + 1, |w| done.push(w));
                assert_eq!(done, numbers);
                assert_eq!(c.room(), 8);
            }
        }
    }

    #[test]
    fn after_a_failed_post_every_request_may_be_in_flight() {
        let mut c = Chain::<u64>::new(8, 4, 0);
        for n in 0..3 {
            c.fill(request(n), n);
        }
        let posted = c.post_with(|_| Err(io::Error::from_raw_os_error(libc::ENOMEM)));
        assert_eq!(posted.unwrap_err().raw_os_error(), Some(libc::ENOMEM));
        assert_eq!((c.in_flight(), c.room()), (3, 5));
        c.retire(9, |_| ());
        assert_eq!(c.room(), 8);
    }

    #[test]
    fn an_id_of_an_earlier_use_of_a_slot_finds_nothing() {
        let mut c = Chain::<u64>::new(4, 4, 3);
        let mut ids = Vec::new();
        for n in 0..40 {
            c.fill(request(n), n);
            let id = post(&mut c)[0].0;
            assert_eq!(id, 3 << 56 | n);
            assert_eq!(c.find(id), Some(0));
            for &old in &ids {
                assert_eq!(c.find(old), None, "late completions retire nothing");
            }
            for wrong in [id ^ 1 << 56, id + 1, id.wrapping_sub(1), u64::MAX, id ^ 1 << 40] {
                assert_eq!(c.find(wrong), None);
            }
            ids.push(id);
            c.retire(1, |_| ());
            assert_eq!(c.find(id), None);
        }
    }

    #[test]
    fn every_nth_request_reports() {
        let mut c = Chain::<u64>::new(16, 4, 0);
        for n in 0..10 {
            c.fill(request(n), n);
        }
        let seen = post(&mut c);
        let signaled: Vec<usize> = seen.iter().enumerate().filter(|(_, s)| s.2).map(|(i, _)| i).collect();
        assert_eq!(signaled, [3, 7, 9]);
    }

    #[test]
    fn long_requests_report_by_their_bytes() {
        let lengths = [128 << 10, 128 << 10, 1 << 20, 4096, 4096, 255 << 10, 4096];
        let mut c = Chain::<u64>::new(16, 16, 0);
        for (n, len) in lengths.into_iter().enumerate() {
            c.fill(Request { len, ..request(n as u64) }, n as u64);
        }
        let seen = post(&mut c);
        let signaled: Vec<usize> = seen.iter().enumerate().filter(|(_, s)| s.2).map(|(i, _)| i).collect();
        assert_eq!(signaled, [1, 2, 5, 6]);
    }
}
