//! Scatter and gather between a descriptor and spans of memory, without a copy in user space and without allocation.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd},
};

use super::segments::Memory;

/// A range of bytes of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Span {
    /// The segment.
    pub segment: u16,
    /// Offset from its start, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Most pieces of one system call: the kernel's UIO_MAXIOV.
const MAX_PIECES: usize = 1024;

/// The pieces of one call, on the stack.
struct Pieces {
    list: [MaybeUninit<libc::iovec>; MAX_PIECES],
    used: usize,
    /// Bytes, from the front, that earlier calls moved.
    skip: u64,
}

impl Pieces {
    fn new(skip: u64) -> Self {
        Self { list: [const { MaybeUninit::uninit() }; MAX_PIECES], used: 0, skip }
    }

    /// How many of the next `len` bytes to skip; `None`: all of them.
    fn cut(&mut self, len: u64) -> Option<u64> {
        let cut = self.skip.min(len);
        self.skip -= cut;
        (cut < len).then_some(cut)
    }

    fn push(&mut self, base: *mut u8, len: u64) {
        self.list[self.used].write(libc::iovec { iov_base: base.cast(), iov_len: len as usize });
        self.used += 1;
    }

    fn full(&self) -> bool {
        self.used == MAX_PIECES
    }

    /// Adds bytes that lie outside the memory.
    fn bytes(&mut self, base: *mut u8, len: usize) {
        if !self.full()
            && let Some(cut) = self.cut(len as u64)
        {
            self.push(base.wrapping_add(cut as usize), len as u64 - cut);
        }
    }

    /// Adds as many spans as fit. Each is checked against its segment first.
    fn spans(&mut self, memory: &Memory, spans: &[Span]) -> io::Result<()> {
        for s in spans {
            if self.full() {
                break;
            }
            if let Some(cut) = self.cut(s.len) {
                let base = memory.at(s.segment, s.offset, s.len)?;
                self.push(base.as_ptr().wrapping_add(cut as usize), s.len - cut);
            }
        }
        Ok(())
    }
}

/// Repeats a system call that a signal interrupted.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(n) => return Ok(n),
            Err(_) => {
                let e = io::Error::last_os_error();
                if e.kind() != io::ErrorKind::Interrupted {
                    return Err(e);
                }
            }
        }
    }
}

/// In all four calls, `skip` is the number of bytes, from the front of all pieces, that earlier calls moved. Each makes one
/// system call of at most 1024 pieces, so it may move only a part; with no bytes left it makes none and returns 0.
/// `WouldBlock` is returned to the caller. A span that leaves its segment fails the call before any byte moves, if it is
/// among those 1024.
impl Memory {
    /// Receives into spans.
    pub fn readv(&self, fd: BorrowedFd<'_>, spans: &[Span], skip: u64) -> io::Result<usize> {
        self.readv_with(fd, spans, skip, &mut [])
    }

    /// Receives into spans and then into `tail`. 0 with bytes left means that the peer has closed.
    pub(crate) fn readv_with(
        &self,
        fd: BorrowedFd<'_>,
        spans: &[Span],
        skip: u64,
        tail: &mut [u8],
    ) -> io::Result<usize> {
        let mut pieces = Pieces::new(skip);
        pieces.spans(self, spans)?;
        pieces.bytes(tail.as_mut_ptr(), tail.len());
        if pieces.used == 0 {
            return Ok(0);
        }
        // SAFETY: the first `used` pieces are initialised. Each lies in a checked span of memory that `self` keeps alive, or
        // in `tail`, which is borrowed for the call; all are writable.
        retry(|| unsafe { libc::readv(fd.as_raw_fd(), pieces.list.as_ptr().cast(), pieces.used as libc::c_int) })
    }

    /// Sends spans. The descriptor must be a socket; a closed peer is an error, never a signal.
    pub fn writev(&self, fd: BorrowedFd<'_>, spans: &[Span], skip: u64) -> io::Result<usize> {
        self.writev_with(fd, &[], spans, skip)
    }

    /// Sends `head`, then spans; see [`Memory::writev`].
    pub(crate) fn writev_with(&self, fd: BorrowedFd<'_>, head: &[u8], spans: &[Span], skip: u64) -> io::Result<usize> {
        let mut pieces = Pieces::new(skip);
        pieces.bytes(head.as_ptr().cast_mut(), head.len());
        pieces.spans(self, spans)?;
        if pieces.used == 0 {
            return Ok(0);
        }
        // SAFETY: a `msghdr` is plain data for which zero bytes are valid: no address, no control data, no flags.
        let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
        msg.msg_iov = pieces.list.as_mut_ptr().cast();
        msg.msg_iovlen = pieces.used as _;
        // SAFETY: the first `used` pieces are initialised. Each lies in a checked span of memory that `self` keeps alive, or
        // in `head`, which is borrowed for the call; the kernel only reads them.
        retry(|| unsafe { libc::sendmsg(fd.as_raw_fd(), &msg, libc::MSG_NOSIGNAL) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{Read, Write},
        os::{fd::AsFd, unix::net::UnixStream},
    };

    fn filled(len: u64) -> Memory {
        let m = Memory::alloc(&[len, len]).unwrap();
        for segment in 0..2u16 {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 7 + i / 251) as u8 ^ segment as u8).collect();
            m.write_from(segment, 0, &bytes).unwrap();
        }
        m
    }

    fn spans(n: u64) -> Vec<Span> {
        (0..n).map(|i| Span { segment: (i % 2) as u16, offset: (n - i) * 32, len: (i % 3) * 10 }).collect()
    }

    #[test]
    fn spans_arrive_in_order_however_the_calls_are_cut() {
        let (from, to) = (filled(1 << 17), Memory::alloc(&[1 << 17, 1 << 17]).unwrap());
        let spans = spans(3000);
        let total = spans.iter().map(|s| s.len).sum::<u64>();
        let (a, b) = UnixStream::pair().unwrap();
        let sender = std::thread::spawn({
            let spans = spans.clone();
            move || {
                let mut done = 0;
                while done < total + 4 {
                    done += from.writev_with(a.as_fd(), b"head", &spans, done).unwrap() as u64;
                }
                assert_eq!(from.writev_with(a.as_fd(), b"head", &spans, done).unwrap(), 0);
                (&a).write_all(b"trail").unwrap();
                from
            }
        });
        let mut head = [0; 4];
        (&b).read_exact(&mut head).unwrap();
        let (mut done, mut tail) = (0, [0; 5]);
        while done < total + 5 {
            done += to.readv_with(b.as_fd(), &spans, done, &mut tail).unwrap() as u64;
        }
        let from = sender.join().unwrap();
        assert_eq!((&head, &tail), (b"head", b"trail"));
        for s in spans {
            let (mut x, mut y) = (vec![0; s.len as usize], vec![1; s.len as usize]);
            from.read_into(s.segment, s.offset, &mut x).unwrap();
            to.read_into(s.segment, s.offset, &mut y).unwrap();
            assert_eq!(x, y, "{s:?}");
        }
    }

    #[test]
    fn a_span_that_leaves_its_segment_moves_nothing() {
        let m = filled(4096);
        let (a, b) = UnixStream::pair().unwrap();
        b.set_nonblocking(true).unwrap();
        for bad in [(0, 4090, 7), (2, 0, 1), (0, u64::MAX, 1), (0, 1, u64::MAX)] {
            let spans = [Span { segment: 0, offset: 0, len: 8 }, Span { segment: bad.0, offset: bad.1, len: bad.2 }];
            let e = m.writev(a.as_fd(), &spans, 0).unwrap_err();
            assert_eq!(e.kind(), io::ErrorKind::InvalidInput);
            (&a).write_all(b"data").unwrap();
            assert_eq!(m.readv(b.as_fd(), &spans, 0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
            let mut four = [0; 4];
            (&b).read_exact(&mut four).unwrap();
            assert_eq!(&four, b"data");
        }
        assert_eq!(m.readv(b.as_fd(), &spans(9), 0).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn sending_to_a_closed_socket_is_an_error_without_a_signal() {
        let m = filled(4096);
        let (a, b) = UnixStream::pair().unwrap();
        drop(b);
        let e = m.writev(a.as_fd(), &[Span { segment: 0, offset: 0, len: 8 }], 0).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::BrokenPipe);
    }
}
