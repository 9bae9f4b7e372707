//! One connection of a lane, on the consumer's side: requests out, replies in.
//!
//! Owns the socket and the order of its requests. Data goes from the socket straight into the requested blocks; an
//! unexpected reply ends the connection before any of its bytes is written. A chunk whose bytes were changed on their way is
//! reported as corrupt instead of fenced (promise 1, Exact). Never waits, and never writes for a request whose attempt was
//! stopped (promise 4, Quiet).

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use kvferry_proto::{Attempt, Grant, LaneEvent, Read};
use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags},
};

use super::{
    dial::Dialed,
    frames::{BadFrame, Entry, Reply, Request, Status, Trailer, seal_request},
    sum::DataSum,
    tls::{Opener, Pause},
};
use crate::memory::{Memory, Span, set_low_water};

/// Most entries of a request: its frame, 64 KiB, fits into a socket buffer, and its reply is long enough.
pub(super) const ENTRIES: usize = 2048;
/// Size of the buffer that receives, piece by piece, the reply to a stopped attempt.
const SCRATCH: usize = 256 << 10;
/// A trailer and the head of the next reply, which one call may receive after a request's data.
const BETWEEN: usize = Trailer::LEN + Reply::LEN;

/// A request whose reply is incomplete.
struct Pending {
    tag: u64,
    /// The request's checksum: its reply's frames are bound to it.
    sum: u64,
    attempt: Attempt,
    chunk: u32,
    /// Its trailer's word is the chunk's fence.
    fence: bool,
    /// The attempt was stopped: the reply is received and discarded.
    dead: bool,
    /// Destinations in `Link::spans` that are not full yet; one for each read.
    spans: usize,
    total: u64,
}

/// The next part of the reply in progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    Head,
    /// This many bytes of data.
    Data(u64),
    Trailer,
}

/// Why [`Link::receive`] returned.
#[derive(Debug)]
pub(super) enum Stop {
    /// The socket is empty.
    Empty,
    /// The byte limit was reached.
    Bound,
    /// A request was refused. The connection goes on.
    Refused(Attempt, Status),
    /// All of a chunk has come, and bytes of it were changed on their way. The connection goes on.
    Corrupt(Attempt, u32),
    /// The connection is unusable.
    Lost(Lost),
}

/// Why a connection is unusable.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lost {
    #[error("the producer closed the connection")]
    Closed,
    #[error("the connection broke: {0}")]
    Broken(io::Error),
    #[error("the producer's reply breaks the protocol: {0}")]
    Malformed(BadFrame),
    #[error("the producer's reply breaks the protocol: it does not answer the oldest request")]
    NotDue,
    #[error("TLS: {0}")]
    Tls(rustls::Error),
}

/// During a long reply, the owner sleeps until this many bytes have come. A wake-up for every packet costs both sides a
/// context switch: over loopback, 16 KiB blocks went at 3.4 GB/s without this and at 5.3 GB/s with it (5.9 for a bare copy).
/// Less than 1 MiB gains less, and more gains nothing.
const LOW_WATER: u64 = 1 << 20;

/// One connection.
pub(super) struct Link {
    fd: OwnedFd,
    tls: Option<Box<Opener>>,
    /// Encoded requests, sent up to `sent`.
    out: Vec<u8>,
    sent: usize,
    /// The error that ended sending. Earlier replies can still be received.
    send_error: Option<Errno>,
    pending: VecDeque<Pending>,
    /// Destinations of all pending requests, in order, without the full ones; the first holds `filled` bytes.
    spans: VecDeque<Span>,
    filled: u64,
    due: Due,
    /// Received bytes of a head or trailer; `have` of them.
    frame: [u8; BETWEEN],
    have: usize,
    next_tag: u64,
    /// The checksum of the received data of the first pending request; `None` if the two sides have not agreed on it.
    data: Option<DataSum>,
    /// Chunks of which a reply was changed on its way, until their last reply.
    corrupt: Vec<(Attempt, u32)>,
    /// Bytes requested and not received.
    pub(super) outstanding: u64,
    /// Whether the owner's epoll waits for room to send.
    pub(super) wants_room: bool,
    /// Bytes that the socket must hold before it is readable.
    low_water: u32,
}

impl Link {
    /// A connection whose handshake is done.
    pub(super) fn new(Dialed { fd, options, tls }: Dialed) -> Self {
        Self {
            fd,
            tls,
            out: Vec::new(),
            sent: 0,
            send_error: None,
            pending: VecDeque::new(),
            spans: VecDeque::new(),
            filled: 0,
            due: Due::Head,
            frame: [0; BETWEEN],
            have: 0,
            next_tag: 0,
            data: options.sums().then(DataSum::default),
            corrupt: Vec::new(),
            outstanding: 0,
            wants_room: false,
            low_water: 1,
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Queues one request for 1 to [`ENTRIES`] reads of one chunk. [`Link::flush`] sends it.
    pub(super) fn request(&mut self, attempt: Attempt, grant: Grant, reads: &[Read], fence: bool) {
        let Some(first) = reads.first() else { return };
        let tag = self.next_tag;
        self.next_tag += 1;
        let (count, nonce) = (reads.len() as u32, grant.nonce.get());
        let begin = self.out.len();
        self.out.extend_from_slice(&Request { count, tag, nonce, slot: grant.slot }.encode());
        let mut total = 0;
        for r in reads {
            let entry = Entry {
                group: r.group.0,
                region: r.region,
                position: r.position,
                blocks: r.blocks,
                within: r.within,
                piece: r.piece,
            };
            self.out.extend_from_slice(&entry.encode());
            self.spans.push_back(Span { segment: r.dst_segment, offset: r.dst_offset, len: r.len });
            total += r.len;
        }
        let sum = seal_request(&mut self.out, begin);
        self.outstanding += total;
        let spans = reads.len();
        self.pending.push_back(Pending { tag, sum, attempt, chunk: first.chunk, fence, dead: false, spans, total });
    }

    /// Stops an attempt: from now on its replies are neither written to its blocks nor reported.
    pub(super) fn stop(&mut self, attempt: Attempt) {
        self.pending.iter_mut().filter(|a| a.attempt == attempt).for_each(|a| a.dead = true);
        self.corrupt.retain(|(a, _)| *a != attempt);
    }

    /// Whether a reply to this attempt, not stopped, is outstanding.
    pub(super) fn owes(&self, attempt: Attempt) -> bool {
        self.pending.iter().any(|a| a.attempt == attempt && !a.dead)
    }

    /// Sends queued requests. True if the socket has no room for the rest.
    pub(super) fn flush(&mut self) -> bool {
        let (out, sent) = match &mut self.tls {
            None => (&mut self.out, &mut self.sent),
            Some(tls) => {
                if !self.out.is_empty() && tls.seal(&self.out).is_err() {
                    self.send_error = Some(Errno::PIPE);
                }
                self.out.clear();
                let Opener { sealed, sent, .. } = &mut **tls;
                (sealed, sent)
            }
        };
        while *sent < out.len() && self.send_error.is_none() {
            match rustix::net::send(&self.fd, &out[*sent..], SendFlags::NOSIGNAL) {
                Ok(n) => *sent += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    out.drain(..*sent);
                    *sent = 0;
                    return true;
                }
                Err(e) => self.send_error = Some(e),
            }
        }
        out.clear();
        *sent = 0;
        false
    }

    /// Whether sending failed: then [`Link::receive`] has an error to report, even if no byte comes.
    pub(super) fn has_send_error(&self) -> bool {
        self.send_error.is_some()
    }

    /// Called before the owner sleeps: sets the number of bytes that wake it. Never more than are certain to come.
    pub(super) fn set_low_water(&mut self) {
        // Sealed bytes are more than the bytes in them, and a part of a record has come already.
        let held = self.tls.as_ref().map_or(0, |tls| tls.held());
        let sure = match self.due {
            Due::Data(left) => (left + Trailer::LEN as u64).saturating_sub(held).max(1),
            // Any byte completes a step.
            Due::Head | Due::Trailer => 1,
        };
        let low = sure.min(LOW_WATER) as u32;
        // A failure leaves the socket's value as it was, and `low_water` with it.
        if low != self.low_water && set_low_water(self.fd(), low).is_ok() {
            self.low_water = low;
        }
    }

    /// Subtracts received bytes from `bound`. `true` if the socket is empty.
    fn count(&mut self, wanted: u64, got: io::Result<usize>, bound: &mut u64) -> Result<bool, Stop> {
        match got {
            Ok(0) => Err(Stop::Lost(Lost::Closed)),
            Ok(n) => {
                *bound = bound.saturating_sub(n as u64);
                // A partial receive emptied the socket: a call to confirm that is saved.
                Ok((n as u64) < wanted)
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(false),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(self.empty()),
            Err(e) => Err(Stop::Lost(Lost::Broken(e))),
        }
    }

    /// Receives at most about `bound` bytes, subtracts the received bytes from it, and appends events.
    pub(super) fn receive(
        &mut self,
        memory: &Memory,
        scratch: &mut Vec<u8>,
        bound: &mut u64,
        out: &mut Vec<LaneEvent>,
    ) -> Stop {
        if let Some(mut tls) = self.tls.take() {
            let stop = self.receive_sealed(&mut tls, memory, bound, out);
            self.tls = Some(tls);
            return stop;
        }
        let mut drained = false;
        loop {
            // First decode what `frame` holds already.
            if let Err(stop) = self.decode(out) {
                return stop;
            }
            if drained {
                return self.empty();
            }
            if *bound == 0 {
                return Stop::Bound;
            }
            let (wanted, got) = match self.due {
                Due::Data(left) => self.receive_data(left, *bound, memory, scratch, out),
                Due::Head | Due::Trailer => self.receive_frame(),
            };
            match self.count(wanted, got, bound) {
                Ok(all) => drained = all,
                Err(stop) => return stop,
            }
        }
    }

    /// The same over TLS.
    fn receive_sealed(&mut self, tls: &mut Opener, memory: &Memory, bound: &mut u64, out: &mut Vec<LaneEvent>) -> Stop {
        let mut drained = false;
        loop {
            // Opened bytes that follow an earlier stop.
            let rest = std::mem::take(&mut tls.rest);
            let (taken, stop) = self.take_in(&rest, memory, out);
            tls.rest.extend_from_slice(&rest[taken..]);
            if let Some(stop) = stop {
                return stop;
            }
            let mut stop = None;
            let opened = tls.open(|bytes, rest| {
                let taken = match stop {
                    Some(_) => 0,
                    None => {
                        let (taken, why) = self.take_in(bytes, memory, out);
                        stop = why;
                        taken
                    }
                };
                rest.extend_from_slice(&bytes[taken..]);
            });
            match (stop, opened) {
                (Some(stop), Ok(_)) => return stop,
                (_, Err(e)) => return Stop::Lost(Lost::Tls(e)),
                (None, Ok(Pause::Closed)) => return Stop::Lost(Lost::Closed),
                (None, Ok(Pause::Empty)) => {}
            }
            if drained {
                return self.empty();
            }
            if *bound == 0 {
                return Stop::Bound;
            }
            let (wanted, got) = tls.receive(self.fd.as_fd());
            match self.count(wanted, got, bound) {
                Ok(all) => drained = all,
                Err(stop) => return stop,
            }
        }
    }

    /// Takes bytes of replies in, up to one that the owner must handle first. Returns the number that it took.
    fn take_in(&mut self, bytes: &[u8], memory: &Memory, out: &mut Vec<LaneEvent>) -> (usize, Option<Stop>) {
        let mut at = 0;
        loop {
            if let Err(stop) = self.decode(out) {
                return (at, Some(stop));
            }
            let rest = &bytes[at..];
            if rest.is_empty() {
                return (at, None);
            }
            at += match self.due {
                Due::Data(left) => {
                    let n = left.min(rest.len() as u64) as usize;
                    if let Err(e) = self.write_data(&rest[..n], memory, out) {
                        return (at, Some(Stop::Lost(Lost::Broken(e))));
                    }
                    n
                }
                Due::Head | Due::Trailer => {
                    let whole = if self.due == Due::Head { Reply::LEN } else { Trailer::LEN };
                    let n = whole.saturating_sub(self.have).min(rest.len());
                    self.frame[self.have..self.have + n].copy_from_slice(&rest[..n]);
                    self.have += n;
                    n
                }
            };
        }
    }

    /// Writes data of the first request into its blocks, unless its attempt was stopped.
    fn write_data(&mut self, bytes: &[u8], memory: &Memory, out: &mut Vec<LaneEvent>) -> io::Result<()> {
        if self.pending.front().is_some_and(|front| !front.dead) {
            let (mut at, mut skip) = (0, self.filled);
            for s in &self.spans {
                let n = (s.len - skip).min((bytes.len() - at) as u64) as usize;
                memory.write_from(s.segment, s.offset + skip, &bytes[at..at + n])?;
                (at, skip) = (at + n, 0);
                if at == bytes.len() {
                    break;
                }
            }
        }
        self.advance(bytes.len() as u64, out);
        Ok(())
    }

    /// Data of the first request has come.
    fn advance(&mut self, data: u64, out: &mut Vec<LaneEvent>) {
        self.outstanding = self.outstanding.saturating_sub(data);
        if let Due::Data(left) = self.due {
            self.due = due_after(left.saturating_sub(data));
        }
        let Some(front) = self.pending.front_mut().filter(|front| !front.dead) else { return };
        let mut full = 0;
        self.filled += data;
        while let Some(s) = self.spans.get(full)
            && full < front.spans
            && self.filled >= s.len
        {
            self.filled -= s.len;
            full += 1;
        }
        self.spans.drain(..full);
        front.spans -= full;
        report_done(front.attempt, front.chunk, full as u32, out);
    }

    /// The socket is empty. If sending has failed too, no more replies will come.
    fn empty(&self) -> Stop {
        match self.send_error {
            Some(e) => Stop::Lost(Lost::Broken(e.into())),
            None => Stop::Empty,
        }
    }

    /// How many bytes of head and trailer may come before the next data.
    fn frame_room(&self) -> usize {
        match self.due {
            Due::Head => Reply::LEN,
            // The head of the next reply only if one is due. Data follows it, and must not end up here.
            Due::Data(_) | Due::Trailer if self.pending.len() > 1 => BETWEEN,
            Due::Data(_) | Due::Trailer => Trailer::LEN,
        }
    }

    fn receive_frame(&mut self) -> (u64, io::Result<usize>) {
        let room = self.frame_room();
        let wanted = room.saturating_sub(self.have);
        let got = rustix::net::recv(&self.fd, &mut self.frame[self.have..room], RecvFlags::empty());
        let got = got.map(|(n, _)| n).map_err(io::Error::from);
        if let Ok(n) = got {
            self.have += n;
        }
        (wanted as u64, got)
    }

    /// Receives data into the blocks, and the bytes behind it into `frame`.
    fn receive_data(
        &mut self,
        left: u64,
        bound: u64,
        memory: &Memory,
        scratch: &mut Vec<u8>,
        out: &mut Vec<LaneEvent>,
    ) -> (u64, io::Result<usize>) {
        let room = self.frame_room();
        let Some(front) = self.pending.front() else { return (0, Err(io::ErrorKind::InvalidData.into())) };
        if front.dead {
            scratch.resize(SCRATCH, 0);
            let most = (SCRATCH as u64).min(left) as usize;
            let got = rustix::net::recv(&self.fd, &mut scratch[..most], RecvFlags::empty());
            let got = got.map(|(n, _)| n).map_err(io::Error::from);
            if let Ok(n) = got {
                self.advance(n as u64, out);
            }
            return (most as u64, got);
        }
        // The ring's first slice may end before the request does: then this call receives less, and no frame.
        let ring = self.spans.as_slices().0;
        let (mut count, mut bytes) = (0, 0);
        while count < ring.len().min(front.spans) && count < MOST_SPANS && bytes < bound {
            bytes += ring[count].len;
            count += 1;
        }
        let bytes = bytes - self.filled;
        let tail = if bytes == left { &mut self.frame[..room] } else { &mut [] };
        let wanted = bytes + tail.len() as u64;
        let got = memory.readv_with(self.fd.as_fd(), &ring[..count], self.filled, tail);
        if let Ok(n) = got {
            let data = (n as u64).min(bytes);
            if let Some(sum) = &mut self.data {
                // The bytes are still in the cache.
                sum.add(memory, &ring[..count], self.filled, data);
            }
            self.have = n - data as usize;
            self.advance(data, out);
        }
        (wanted, got)
    }

    /// Decodes complete heads and trailers in `frame`. An error is the owner's to handle before it goes on.
    fn decode(&mut self, out: &mut Vec<LaneEvent>) -> Result<(), Stop> {
        let malformed = |e| Stop::Lost(Lost::Malformed(e));
        loop {
            let Some(front) = self.pending.front() else {
                // Bytes without a request.
                return if self.have > 0 { Err(Stop::Lost(Lost::NotDue)) } else { Ok(()) };
            };
            let (attempt, chunk, dead) = (front.attempt, front.chunk, front.dead);
            match self.due {
                Due::Data(_) => return Ok(()),
                Due::Head => {
                    let Some(head) = self.frame[..self.have].first_chunk() else { return Ok(()) };
                    let head = Reply::decode(head, front.sum).map_err(malformed)?;
                    let total = if head.status == Status::Ok { front.total } else { 0 };
                    if head.tag != front.tag || head.total != total {
                        return Err(Stop::Lost(Lost::NotDue));
                    }
                    let asked = front.total;
                    self.consume(Reply::LEN);
                    if head.status != Status::Ok {
                        self.outstanding = self.outstanding.saturating_sub(asked);
                        self.finish();
                        if dead {
                            continue;
                        }
                        return Err(Stop::Refused(attempt, head.status));
                    }
                    self.due = due_after(total);
                }
                Due::Trailer => {
                    let Some(trailer) = self.frame[..self.have].first_chunk() else { return Ok(()) };
                    // A trailer that was changed leaves the stream in step.
                    let trailer = Trailer::decode(trailer, front.sum).ok();
                    if trailer.is_some_and(|t| t.tag != front.tag) {
                        return Err(Stop::Lost(Lost::NotDue));
                    }
                    let fence = front.fence;
                    self.consume(Trailer::LEN);
                    self.finish();
                    let data = self.data.as_mut().map(DataSum::finish);
                    if dead {
                        continue;
                    }
                    let exact = trailer.is_some_and(|t| data.is_none_or(|d| d == t.data));
                    let before = self.corrupt.iter().position(|c| *c == (attempt, chunk));
                    if !fence {
                        if !exact && before.is_none() {
                            self.corrupt.push((attempt, chunk));
                        }
                        continue;
                    }
                    before.map(|i| self.corrupt.swap_remove(i));
                    match trailer {
                        // The data of a revoked offer may have changed while it was sent: it is stale then, not corrupt.
                        Some(t) if t.word == 0 || (exact && before.is_none()) => {
                            out.push(LaneEvent::Fence { attempt, chunk, word: t.word });
                        }
                        _ => return Err(Stop::Corrupt(attempt, chunk)),
                    }
                }
            }
        }
    }

    /// Drops `n` bytes from the front of `frame`.
    fn consume(&mut self, n: usize) {
        self.frame.copy_within(n..self.have, 0);
        self.have -= n;
    }

    /// The first request's reply is over.
    fn finish(&mut self) {
        if let Some(done) = self.pending.pop_front()
            && done.spans > 0
        {
            // It was refused, or stopped in the middle.
            self.spans.drain(..done.spans);
            self.filled = 0;
        }
        self.due = Due::Head;
    }
}

/// Most spans of one call: 1024 pieces, one of them the frame.
const MOST_SPANS: usize = 1023;

fn due_after(left: u64) -> Due {
    if left == 0 { Due::Trailer } else { Due::Data(left) }
}

/// Adds to the last event, if it is of the same chunk.
fn report_done(attempt: Attempt, chunk: u32, n: u32, out: &mut Vec<LaneEvent>) {
    if n == 0 {
        return;
    }
    match out.last_mut() {
        Some(LaneEvent::Done { attempt: a, chunk: c, reads }) if *a == attempt && *c == chunk => *reads += n,
        _ => out.push(LaneEvent::Done { attempt, chunk, reads: n }),
    }
}
