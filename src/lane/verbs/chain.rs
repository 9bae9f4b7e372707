//! The chain of READ requests of one queue pair: filled in place, posted in one call, accounted for to the last request.
//!
//! Owns the work requests, which are linked once and re-used for ever, and what each of them is for. A request is *filled*,
//! then *posted*, then *retired*, always in that order and each exactly once. Never allocates after it was made.
//!
//! Completions come for every Nth request, for every [`SIGNALED_BYTES`] and for the last of a chain; one of them retires
//! everything before it, for a queue pair completes its requests in order. An id that does not belong to a posted request retires nothing.

use std::ptr;

use ibverbs_sys::{ibv_send_wr, ibv_sge, ibv_wr_opcode};

use super::qp::Qp;

/// Largest depth: the slot's bits in a request's id.
pub(crate) const MAX_DEPTH: u32 = 1 << 12;

/// Bytes after which a completion is asked for, however few requests they are: room for the next ones is known of in time,
/// and a queue of long READs never runs dry. 400 Gbit/s take 5 us for so much.
pub(crate) const SIGNALED_BYTES: u64 = 256 << 10;

const SIGNALED: u32 = 2;

/// A READ, as the device sees it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request {
    /// Where it lands.
    pub local: u64,
    pub lkey: u32,
    /// In bytes.
    pub len: u32,
    /// What it reads.
    pub remote: u64,
    pub rkey: u32,
}

/// How a chain went out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Posted {
    /// Everything that was filled.
    All,
    /// Not everything: what is left is filled still. The queue was full, or the error says why.
    Part { os: i32 },
    /// The device failed, and does not say where: all of it may be in flight.
    Unknown { os: i32 },
}

/// A ring of requests; `T` is what each is for.
pub(crate) struct Chain<T> {
    /// Linked in a circle.
    wrs: Box<[ibv_send_wr]>,
    /// One for each, at the same index; the requests point into it.
    _sges: Box<[ibv_sge]>,
    sges: *mut ibv_sge,
    what: Box<[T]>,
    mask: u64,
    bits: u32,
    /// High bits of every id: the queue pair.
    tag: u64,
    signal_every: u64,
    /// Bytes filled since the last request that is signaled.
    silent: u64,
    /// Requests before these numbers are retired, posted, filled. They only grow, and at most `depth` lie between the
    /// first and the last.
    retired: u64,
    posted: u64,
    filled: u64,
    /// Number after the last posted request that will complete by itself.
    signaled: u64,
}

// SAFETY: the raw pointers lead into the boxes that go along.
unsafe impl<T: Send> Send for Chain<T> {}

impl<T: Copy + Default> Chain<T> {
    /// A chain of `depth` requests (a power of two, at most [`MAX_DEPTH`]) of the queue pair number `qp` of its owner.
    pub(crate) fn new(depth: u32, signal_every: u32, qp: u8) -> Self {
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
            what: vec![T::default(); n].into_boxed_slice(),
            mask: u64::from(depth) - 1,
            bits: depth.trailing_zeros(),
            tag: u64::from(qp) << 56,
            signal_every: u64::from(signal_every.clamp(1, depth)),
            silent: 0,
            retired: 0,
            posted: 0,
            filled: 0,
            signaled: 0,
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

    /// Requests that are filled and not posted.
    #[cfg(test)]
    pub(crate) fn waiting(&self) -> usize {
        (self.filled - self.posted) as usize
    }

    /// Whether a completion will come by itself for everything that is in flight, unless the queue pair hangs.
    pub(crate) fn will_complete(&self) -> bool {
        self.signaled >= self.posted
    }

    /// The id of a request: the queue pair, how often its slot was used, and the slot.
    #[inline]
    fn id(&self, number: u64) -> u64 {
        // The number itself is generation and slot, side by side: depth is a power of two.
        self.tag | number & ((1 << 56) - 1)
    }

    /// Fills the next request. There must be room.
    #[inline]
    pub(crate) fn fill(&mut self, r: Request, what: T) {
        debug_assert!(self.room() > 0);
        let i = (self.filled & self.mask) as usize;
        let id = self.id(self.filled);
        self.silent += u64::from(r.len);
        let signal = (self.filled + 1).is_multiple_of(self.signal_every) || self.silent >= SIGNALED_BYTES;
        if signal {
            self.silent = 0;
        }
        self.what[i] = what;
        let wr = &mut self.wrs[i];
        wr.wr_id = id;
        wr.send_flags = if signal { SIGNALED } else { 0 };
        wr.wr.rdma.remote_addr = r.remote;
        wr.wr.rdma.rkey = r.rkey;
        // SAFETY: `sges` has as many entries as `wrs`, and nothing else refers to them while `&mut self` is held.
        unsafe { *self.sges.add(i) = ibv_sge { addr: r.local, length: r.len, lkey: r.lkey } };
        self.filled += 1;
    }

    /// Posts what is filled, as one chain whose last request is signaled.
    ///
    /// # Safety
    /// The memory that the filled requests name must be registered, and stay valid until they have completed or the queue
    /// pair is destroyed.
    pub(crate) unsafe fn post(&mut self, qp: &mut Qp) -> Posted {
        // SAFETY: passed on to the caller.
        unsafe { self.post_with(|first| qp.post(first)) }
    }

    /// As `post`, through any function that takes a chain.
    ///
    /// # Safety
    /// What `post` needs must be true for `send`.
    unsafe fn post_with(
        &mut self,
        send: impl FnOnce(*mut ibv_send_wr) -> Result<(), (std::io::Error, *mut ibv_send_wr)>,
    ) -> Posted {
        if self.filled == self.posted {
            return Posted::All;
        }
        let base = self.wrs.as_mut_ptr();
        let first = base.wrapping_add((self.posted & self.mask) as usize);
        let last = &mut self.wrs[((self.filled - 1) & self.mask) as usize];
        last.send_flags = SIGNALED;
        self.silent = 0;
        let link = std::mem::replace(&mut last.next, ptr::null_mut());
        let sent = send(first);
        self.wrs[((self.filled - 1) & self.mask) as usize].next = link;
        let (error, bad) = match sent {
            Ok(()) => {
                self.posted = self.filled;
                self.signaled = self.filled;
                return Posted::All;
            }
            Err(e) => e,
        };
        let os = error.raw_os_error().unwrap_or(libc::EIO);
        // The first that was not posted. Anything but one of this chain is a device that does not say.
        let at = bad.addr().wrapping_sub(base.addr());
        let i = (at / size_of::<ibv_send_wr>()) as u64;
        let whole = at.is_multiple_of(size_of::<ibv_send_wr>()) && i <= self.mask && bad.addr() >= base.addr();
        let behind = i.wrapping_sub(self.posted) & self.mask;
        if bad.is_null() || !whole || behind >= self.filled - self.posted {
            self.posted = self.filled;
            self.signaled = self.filled;
            return Posted::Unknown { os };
        }
        for n in self.posted..self.posted + behind {
            if self.wrs[(n & self.mask) as usize].send_flags == SIGNALED {
                self.signaled = n + 1;
            }
        }
        self.posted += behind;
        Posted::Part { os }
    }

    /// Takes back what is filled and not posted, first to last.
    pub(crate) fn unfill(&mut self, mut each: impl FnMut(T)) {
        for n in self.posted..self.filled {
            each(self.what[(n & self.mask) as usize]);
        }
        self.filled = self.posted;
    }

    /// The request that an id belongs to, as the number of requests before it that are not retired; `None`: to none that is
    /// in flight.
    #[inline]
    pub(crate) fn find(&self, id: u64) -> Option<u64> {
        if id & !((1 << 56) - 1) != self.tag {
            return None;
        }
        // Numbers in flight are consecutive, and there are fewer than an id's bits can count.
        let ahead = id.wrapping_sub(self.retired) & ((1 << 56) - 1);
        (ahead < self.posted - self.retired).then_some(ahead)
    }

    /// Retires the next `n` requests that are in flight, first to last.
    #[inline]
    pub(crate) fn retire(&mut self, n: u64, mut each: impl FnMut(T)) {
        let n = n.min(self.posted - self.retired);
        for number in self.retired..self.retired + n {
            each(self.what[(number & self.mask) as usize]);
        }
        self.retired += n;
    }

    /// Slots of a chain: how many bits of an id they take.
    #[cfg(test)]
    fn slot_of(&self, id: u64) -> (u64, u64) {
        let number = id & ((1 << 56) - 1);
        (number & self.mask, number >> self.bits)
    }
}

impl<T> std::fmt::Debug for Chain<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chain")
            .field("depth", &(1u64 << self.bits))
            .field("retired", &self.retired)
            .field("posted", &self.posted)
            .field("filled", &self.filled)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    fn request(i: u64) -> Request {
        Request { local: i * 10, lkey: 1, len: 4096, remote: i * 100, rkey: 2 }
    }

    /// Walks a chain as a device would, taking `take` requests of it.
    fn device(first: *mut ibv_send_wr, take: usize, seen: &mut Vec<(u64, u64, bool)>) -> *mut ibv_send_wr {
        let mut at = first;
        for _ in 0..take {
            if at.is_null() {
                break;
            }
            // SAFETY: the chain under test says that it ends with null, and its requests are alive.
            let (wr, sge) = unsafe { (*at, *(*at).sg_list) };
            // SAFETY: every request is a READ.
            let remote = unsafe { wr.wr.rdma.remote_addr };
            assert_eq!((wr.num_sge, sge.addr * 10), (1, remote));
            seen.push((wr.wr_id, remote / 100, wr.send_flags & SIGNALED != 0));
            at = wr.next;
        }
        at
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
                // SAFETY: nobody reads the chain.
                let posted = unsafe {
                    c.post_with(|first| {
                        black_box(first);
                        Ok(())
                    })
                };
                assert_eq!(posted, Posted::All);
                c.retire(128, |w| {
                    black_box(w);
                });
            }
            best = best.min(started.elapsed().as_nanos() as f64 / 128e3);
        }
        println!("{best:.1} ns to fill, post and retire a request, chains of 128");
    }

    #[test]
    fn a_partial_post_is_accounted_for_at_every_position() {
        // Every fill level, from every place in the ring, refused at every position.
        for start in 0..8u64 {
            for fill in 1..=8u64 {
                for stop in 0..fill {
                    let mut c = Chain::<u64>::new(8, 3, 0);
                    let mut seen = Vec::new();
                    for n in 0..start {
                        c.fill(request(n), n);
                        // SAFETY: the device of this test touches no memory.
                        let posted = unsafe {
                            c.post_with(|f| {
                                device(f, 9, &mut seen);
                                Ok(())
                            })
                        };
                        assert_eq!(posted, Posted::All);
                        c.retire(1, |w| assert_eq!(w, n));
                    }
                    for n in start..start + fill {
                        c.fill(request(n), n);
                    }
                    assert_eq!(c.room() as u64, 8 - fill);
                    seen.clear();
                    let refused =
                        |f| Err((io::Error::from_raw_os_error(libc::ENOMEM), device(f, stop as usize, &mut seen)));
                    // SAFETY: as above.
                    assert_eq!(unsafe { c.post_with(refused) }, Posted::Part { os: libc::ENOMEM });
                    assert_eq!((c.in_flight() as u64, c.waiting() as u64), (stop, fill - stop));
                    assert_eq!(seen.len() as u64, stop);
                    assert_eq!(
                        c.will_complete(),
                        seen.last().is_none_or(|s| s.2),
                        "a signaled one at the end will tell"
                    );
                    // SAFETY: as above. What was refused goes out the second time, and nothing twice.
                    let posted = unsafe {
                        c.post_with(|f| {
                            assert!(device(f, 9, &mut seen).is_null());
                            Ok(())
                        })
                    };
                    assert_eq!(posted, Posted::All);
                    let numbers: Vec<u64> = seen.iter().map(|s| s.1).collect();
                    assert_eq!(numbers, (start..start + fill).collect::<Vec<_>>());
                    assert!(seen.last().unwrap().2, "the last of a chain is signaled");
                    let mut done = Vec::new();
                    let all = c.find(seen.last().unwrap().0).unwrap();
                    assert_eq!(all, fill - 1);
                    c.retire(all + 1, |w| done.push(w));
                    assert_eq!(done, numbers);
                    assert_eq!(c.room(), 8);
                }
            }
        }
    }

    #[test]
    fn a_device_that_does_not_say_where_it_failed_may_have_posted_everything() {
        let mut c = Chain::<u64>::new(8, 4, 0);
        let outside: [fn(*mut ibv_send_wr) -> *mut ibv_send_wr; 4] =
            [|_| ptr::null_mut(), |f| f.wrapping_add(3), |f| f.wrapping_sub(1), |f| f.wrapping_byte_add(1)];
        for bad in outside {
            for n in 0..3 {
                c.fill(request(n), n);
            }
            // SAFETY: the device of this test touches no memory.
            let posted = unsafe { c.post_with(|f| Err((io::Error::from_raw_os_error(libc::EINVAL), bad(f)))) };
            assert_eq!(posted, Posted::Unknown { os: libc::EINVAL });
            assert_eq!((c.in_flight(), c.waiting()), (3, 0));
            c.retire(9, |_| ());
            assert_eq!(c.room(), 8);
        }
    }

    #[test]
    fn an_id_of_another_life_of_a_slot_finds_nothing() {
        let mut c = Chain::<u64>::new(4, 4, 3);
        let mut ids = Vec::new();
        for n in 0..40 {
            c.fill(request(n), n);
            let mut seen = Vec::new();
            // SAFETY: the device of this test touches no memory.
            unsafe {
                c.post_with(|f| {
                    device(f, 9, &mut seen);
                    Ok(())
                })
            };
            let id = seen[0].0;
            assert_eq!(c.slot_of(id), (n % 4, n / 4));
            assert_eq!(c.find(id), Some(0));
            for &old in &ids {
                assert_eq!(c.find(old), None, "late completions retire nothing");
            }
            for rubbish in [id ^ 1 << 56, id + 1, id.wrapping_sub(1), u64::MAX, id ^ 1 << 40] {
                assert_eq!(c.find(rubbish), None);
            }
            ids.push(id);
            c.retire(1, |_| ());
            assert_eq!(c.find(id), None);
        }
    }

    #[test]
    fn every_nth_request_is_signaled() {
        let mut c = Chain::<u64>::new(16, 4, 0);
        for n in 0..10 {
            c.fill(request(n), n);
        }
        let mut seen = Vec::new();
        // SAFETY: the device of this test touches no memory.
        unsafe {
            c.post_with(|f| {
                device(f, 99, &mut seen);
                Ok(())
            })
        };
        let signaled: Vec<usize> = seen.iter().enumerate().filter(|(_, s)| s.2).map(|(i, _)| i).collect();
        assert_eq!(signaled, [3, 7, 9]);
    }

    #[test]
    fn long_requests_are_signaled_by_their_bytes() {
        let lengths = [128 << 10, 128 << 10, 1 << 20, 4096, 4096, 255 << 10, 4096];
        for stop in 0..lengths.len() {
            let mut c = Chain::<u64>::new(16, 16, 0);
            for (n, len) in lengths.into_iter().enumerate() {
                c.fill(Request { len, ..request(n as u64) }, n as u64);
            }
            let mut seen = Vec::new();
            let refused = |f| Err((io::Error::from_raw_os_error(libc::ENOMEM), device(f, stop, &mut seen)));
            // SAFETY: the device of this test touches no memory.
            assert_eq!(unsafe { c.post_with(refused) }, Posted::Part { os: libc::ENOMEM });
            let signaled: Vec<usize> = seen.iter().enumerate().filter(|(_, s)| s.2).map(|(i, _)| i).collect();
            assert_eq!(signaled, [1, 2, 5].into_iter().filter(|&i| i < stop).collect::<Vec<_>>());
            assert_eq!(c.will_complete(), seen.last().is_none_or(|s| s.2), "what was signaled will tell, nothing else");
        }
    }

    #[test]
    fn what_was_not_posted_is_taken_back_in_order() {
        let mut c = Chain::<u64>::new(8, 4, 0);
        for n in 0..5 {
            c.fill(request(n), n);
        }
        // SAFETY: the device of this test touches no memory.
        unsafe { c.post_with(|f| Err((io::Error::from_raw_os_error(libc::ENOMEM), f.wrapping_add(2)))) };
        let mut back = Vec::new();
        c.unfill(|w| back.push(w));
        assert_eq!(back, [2, 3, 4]);
        assert_eq!((c.in_flight(), c.waiting(), c.room()), (2, 0, 6));
    }
}
