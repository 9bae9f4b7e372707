//! One connection of a lane, on the consumer's side: requests out, replies in.
//!
//! Owns the socket and the order of what was asked on it. Data goes from the socket straight into the blocks that were
//! asked for; a reply that is not exactly the one that is due ends the connection before a byte of it is written anywhere.
//! Never waits, and never writes for a request whose attempt was given up (promise 4, Quiet).

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use kvferry_proto::{
    lane::{Attempt, Grant, LaneEvent},
    plan::Read,
};
use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags},
};

use super::frames::{BadFrame, Entry, Reply, Request, Status, Trailer};
use crate::memory::{Memory, Span, set_low_water};

/// Most entries of a request of ours: its frame, 64 KiB, fits into a socket buffer, and a reply is long by then.
pub(super) const ENTRIES: usize = 2048;
/// What a reply is thrown away into, a piece at a time, when nobody wants it any more.
const SCRATCH: usize = 256 << 10;
/// A trailer and the head of the reply behind it: what may be received in one piece after a request's data.
const BETWEEN: usize = Trailer::LEN + Reply::LEN;

/// A request whose reply is not complete.
struct Asked {
    tag: u64,
    attempt: Attempt,
    chunk: u32,
    /// Its trailer's word is the chunk's fence.
    fence: bool,
    /// The attempt was given up: the reply is received and thrown away.
    dead: bool,
    /// Destinations in `Link::spans` that are not full yet; one for each read.
    spans: usize,
    total: u64,
}

/// Where in a reply the connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    Head,
    /// So many bytes of data, still.
    Data(u64),
    Trailer,
}

/// Why a call of [`Link::receive`] came back.
#[derive(Debug)]
pub(super) enum Stop {
    /// Nothing more to receive now.
    Empty,
    /// The bound on bytes was reached.
    Bound,
    /// A request was refused. The connection is in step.
    Refused(Attempt, Status),
    /// The connection is of no more use.
    Lost(Lost),
}

/// Why a connection is of no more use.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lost {
    #[error("the producer closed the connection")]
    Closed,
    #[error("the connection broke: {0}")]
    Broken(io::Error),
    #[error("the producer's reply breaks the protocol: {0}")]
    Nonsense(BadFrame),
    #[error("the producer's reply breaks the protocol: it is not the one that is due")]
    NotDue,
}

/// With a long reply on its way, the owner sleeps until this much of it is here. Waking up for every packet instead costs
/// both sides a context switch each time: over loopback 16 KiB blocks went at 3.4 GB/s without this and at 5.3 GB/s with it
/// (5.9 for a bare copy); less than 1 MiB gains less, and more gains nothing.
const LOW_WATER: u64 = 1 << 20;

/// One connection.
pub(super) struct Link {
    fd: OwnedFd,
    /// Requests that are not sent yet, from `sent` on.
    out: Vec<u8>,
    sent: usize,
    /// Why nothing more can be sent. What was received before that is still good.
    mute: Option<Errno>,
    asked: VecDeque<Asked>,
    /// Destinations of all that was asked, in order. Full ones are gone; `filled` bytes of the first are in.
    spans: VecDeque<Span>,
    filled: u64,
    due: Due,
    /// Bytes of a head or trailer that have come; `have` of them.
    frame: [u8; BETWEEN],
    have: usize,
    next_tag: u64,
    /// Bytes asked for and not received.
    pub(super) outstanding: u64,
    /// Whether the owner's epoll waits for room to send.
    pub(super) wants_room: bool,
    /// Bytes that must have come before the socket is readable.
    low_water: u32,
}

impl Link {
    /// A connection whose handshake is done. The socket does not block.
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            out: Vec::new(),
            sent: 0,
            mute: None,
            asked: VecDeque::new(),
            spans: VecDeque::new(),
            filled: 0,
            due: Due::Head,
            frame: [0; BETWEEN],
            have: 0,
            next_tag: 0,
            outstanding: 0,
            wants_room: false,
            low_water: 1,
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Adds one request. `reads` are of one chunk, 1 to [`ENTRIES`] of them; nothing is sent before [`Link::flush`].
    pub(super) fn ask(&mut self, attempt: Attempt, grant: Grant, reads: &[Read], fence: bool) {
        let Some(first) = reads.first() else { return };
        let tag = self.next_tag;
        self.next_tag += 1;
        let (count, nonce) = (reads.len() as u32, grant.nonce.get());
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
        self.outstanding += total;
        let spans = reads.len();
        self.asked.push_back(Asked { tag, attempt, chunk: first.chunk, fence, dead: false, spans, total });
    }

    /// From now on nothing of this attempt is written to its blocks, or reported.
    pub(super) fn give_up(&mut self, attempt: Attempt) {
        self.asked.iter_mut().filter(|a| a.attempt == attempt).for_each(|a| a.dead = true);
    }

    /// Whether a reply is due that somebody still wants.
    pub(super) fn owes(&self, attempt: Attempt) -> bool {
        self.asked.iter().any(|a| a.attempt == attempt && !a.dead)
    }

    /// Sends what it can. True while something is left that the socket has no room for.
    pub(super) fn flush(&mut self) -> bool {
        while self.sent < self.out.len() && self.mute.is_none() {
            match rustix::net::send(&self.fd, &self.out[self.sent..], SendFlags::NOSIGNAL) {
                Ok(n) => self.sent += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.out.drain(..self.sent);
                    self.sent = 0;
                    return true;
                }
                Err(e) => self.mute = Some(e),
            }
        }
        self.out.clear();
        self.sent = 0;
        false
    }

    /// Whether sending failed, so that [`Link::receive`] has something to say even if nothing comes.
    pub(super) fn is_mute(&self) -> bool {
        self.mute.is_some()
    }

    /// Before the owner sleeps: says how much is worth waking up for. Never more than what is sure to come.
    pub(super) fn set_low_water(&mut self) {
        let sure = match self.due {
            Due::Data(left) => left + Trailer::LEN as u64,
            // Whatever comes is news.
            Due::Head | Due::Trailer => 1,
        };
        let low = sure.min(LOW_WATER) as u32;
        // Failing leaves it as it was when `low_water` was last right, so it is only kept where it took effect.
        if low != self.low_water && set_low_water(self.fd(), low).is_ok() {
            self.low_water = low;
        }
    }

    /// Receives at most about `bound` bytes, reduces it by what came, and appends what happened.
    pub(super) fn receive(
        &mut self,
        memory: &Memory,
        scratch: &mut Vec<u8>,
        bound: &mut u64,
        out: &mut Vec<LaneEvent>,
    ) -> Stop {
        let mut drained = false;
        loop {
            // First whatever is in `frame` already.
            match self.digest(out) {
                Ok(None) => {}
                Ok(Some((attempt, status))) => return Stop::Refused(attempt, status),
                Err(lost) => return Stop::Lost(lost),
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
            match got {
                Ok(0) => return Stop::Lost(Lost::Closed),
                Ok(n) => {
                    *bound = bound.saturating_sub(n as u64);
                    // Less than there was room for: the socket is empty. It would say so itself, at the price of a call.
                    drained = (n as u64) < wanted;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return self.empty(),
                Err(e) => return Stop::Lost(Lost::Broken(e)),
            }
        }
    }

    /// Nothing to receive: which is the end if nothing can be sent either, for nothing more will be answered.
    fn empty(&self) -> Stop {
        match self.mute {
            Some(e) => Stop::Lost(Lost::Broken(e.into())),
            None => Stop::Empty,
        }
    }

    /// How many bytes of head and trailer may come before data does.
    fn frame_room(&self) -> usize {
        match self.due {
            Due::Head => Reply::LEN,
            // The head of the next reply only where one is due: after it comes data, which must not end up here.
            Due::Data(_) | Due::Trailer if self.asked.len() > 1 => BETWEEN,
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

    /// Receives data into the blocks, and what comes behind it into `frame`.
    fn receive_data(
        &mut self,
        left: u64,
        bound: u64,
        memory: &Memory,
        scratch: &mut Vec<u8>,
        out: &mut Vec<LaneEvent>,
    ) -> (u64, io::Result<usize>) {
        let room = self.frame_room();
        let Some(front) = self.asked.front_mut() else { return (0, Err(io::ErrorKind::InvalidData.into())) };
        if front.dead {
            scratch.resize(SCRATCH, 0);
            let most = (SCRATCH as u64).min(left) as usize;
            let got = rustix::net::recv(&self.fd, &mut scratch[..most], RecvFlags::empty());
            let got = got.map(|(n, _)| n).map_err(io::Error::from);
            if let Ok(n) = got {
                self.outstanding = self.outstanding.saturating_sub(n as u64);
                self.due = due_after(left - n as u64);
            }
            return (most as u64, got);
        }
        // The ring's first slice may end before the request does: then this call brings less, and no frame.
        let ring = self.spans.as_slices().0;
        let (mut n, mut bytes) = (0, 0);
        while n < ring.len().min(front.spans) && n < MOST_SPANS && bytes < bound {
            bytes += ring[n].len;
            n += 1;
        }
        let bytes = bytes - self.filled;
        let tail = if bytes == left { &mut self.frame[..room] } else { &mut [] };
        let wanted = bytes + tail.len() as u64;
        let got = memory.readv_with(self.fd.as_fd(), &ring[..n], self.filled, tail);
        if let Ok(n) = got {
            let data = (n as u64).min(bytes);
            self.have = n - data as usize;
            self.outstanding = self.outstanding.saturating_sub(data);
            self.due = due_after(left - data);
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
        (wanted, got)
    }

    /// Takes heads and trailers out of `frame` as far as they are complete. Returns a refused request's attempt.
    fn digest(&mut self, out: &mut Vec<LaneEvent>) -> Result<Option<(Attempt, Status)>, Lost> {
        loop {
            let Some(front) = self.asked.front() else {
                // Bytes that nobody asked for are found by their connection's next request, or by this:
                return if self.have > 0 { Err(Lost::NotDue) } else { Ok(None) };
            };
            match self.due {
                Due::Data(_) => return Ok(None),
                Due::Head => {
                    let Some(head) = self.frame[..self.have].first_chunk() else { return Ok(None) };
                    let head = Reply::decode(head).map_err(Lost::Nonsense)?;
                    let total = if head.status == Status::Ok { front.total } else { 0 };
                    if head.tag != front.tag || head.total != total {
                        return Err(Lost::NotDue);
                    }
                    let (attempt, dead, asked) = (front.attempt, front.dead, front.total);
                    self.eat(Reply::LEN);
                    if head.status != Status::Ok {
                        self.outstanding = self.outstanding.saturating_sub(asked);
                        self.finish();
                        if dead {
                            continue;
                        }
                        return Ok(Some((attempt, head.status)));
                    }
                    self.due = due_after(total);
                }
                Due::Trailer => {
                    let Some(trailer) = self.frame[..self.have].first_chunk() else { return Ok(None) };
                    let trailer = Trailer::decode(trailer);
                    if trailer.tag != front.tag {
                        return Err(Lost::NotDue);
                    }
                    if front.fence && !front.dead {
                        let (attempt, chunk) = (front.attempt, front.chunk);
                        out.push(LaneEvent::Fence { attempt, chunk, word: trailer.word });
                    }
                    self.eat(Trailer::LEN);
                    self.finish();
                }
            }
        }
    }

    /// Drops `n` bytes from the front of `frame`.
    fn eat(&mut self, n: usize) {
        self.frame.copy_within(n..self.have, 0);
        self.have -= n;
    }

    /// The first request's reply is over.
    fn finish(&mut self) {
        if let Some(done) = self.asked.pop_front()
            && done.spans > 0
        {
            // Refused or given up in the middle.
            self.spans.drain(..done.spans);
            self.filled = 0;
        }
        self.due = Due::Head;
    }
}

/// Most spans of one call, which takes 1024 pieces with the frame behind them.
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
