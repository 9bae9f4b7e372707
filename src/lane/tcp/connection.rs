//! One data connection on the producer's side: a proof in, then requests in and replies out.
//!
//! Owns the socket and the reply in progress. Serves one request at a time and receives no more than it can decode, so a
//! consumer that requests more than it receives is slowed down by its own socket. Loads the fence word of a reply only after
//! its last byte has been copied out of the pool, and before the trailer leaves (promise 2, Fresh). Never waits.
//!
//! Data of GPU memory is sent from the slices that [`ReadAhead`] copies; the replies to requests that have come are then copied
//! ahead too.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use kvferry_proto::Incarnation;
use rustix::{
    event::{PollFd, PollFlags, Timespec, epoll::EventFlags, poll},
    io::Errno,
    net::{RecvFlags, SendFlags},
};

use super::{
    frames::{Answer, Challenge, Entry, Proof, Reply, Request, SUM, Status, Trailer, Verdict, check_request},
    gather::gather,
    handshake::{Key, Keyed},
    readahead::{MOST_SLICES, Place, ReadAhead, Slices},
    sum::DataSum,
    tls::{Sealer, blocks},
};
use crate::memory::{Export, Span};

/// Buffer bytes that a connection keeps between requests; a rare large request's memory is freed.
const KEEP: usize = 64 << 10;
/// Bytes of its turn that a connection pays for each looked-up block, also of a refused request. A lookup takes 2 to 4 ns, in
/// which some 20 bytes could be copied: a turn of lookups takes no longer than a turn of data.
const LOOKUP: u64 = 32;
/// Out-of-bounds requests of a connection that are answered; after one more it is closed. A rightful consumer plans its
/// requests granted blocks only and sends none; a wrong plan may have some on their way before the first answer.
const MOST_OUT_OF_BOUNDS: u32 = 8;

/// Shared by the connections of a server.
pub(super) struct Shared<'a> {
    pub(super) export: &'a Export,
    pub(super) incarnation: Incarnation,
    /// The key of an admitted lane.
    pub(super) key: &'a dyn Fn(u64) -> Option<Key>,
    /// Whether a lane has all connections that it may have.
    pub(super) is_full: &'a dyn Fn(u64) -> bool,
    /// The buffer that receives requests, before they go to their connection.
    pub(super) scratch: &'a mut [u8],
    /// If the pool is GPU memory.
    pub(super) ahead: Option<&'a mut ReadAhead>,
    /// The connection's token.
    pub(super) token: u64,
}

/// A connection's next step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Next {
    /// Go on when the socket is ready for this.
    Wait(EventFlags),
    /// Go on when a copy of its data has ended, or when it is admitted to the ring.
    WaitForCopies,
    /// Close it. The reason, if the peer broke a protocol.
    Close(Option<String>),
}

enum Phase {
    /// The proof is outstanding.
    Proving(Challenge),
    /// The lane may send requests.
    Serving { lane: u64 },
    /// `head` is sent, then the connection closes.
    Closing,
}

/// An answered request, before anything of the answer was sent.
struct Resolved {
    head: [u8; Reply::LEN],
    /// `None`: a refusal.
    serving: Option<Serving>,
    spans: Vec<Span>,
}

/// The reply in progress.
struct Serving {
    tag: u64,
    /// The request's checksum.
    request: u64,
    slot: u32,
    nonce: u64,
    /// Bytes of data not sent yet.
    left: u64,
}

/// One connection.
pub(super) struct Connection {
    fd: OwnedFd,
    tls: Option<Box<Sealer>>,
    phase: Phase,
    /// Received requests; decoded up to `decoded`.
    input: Vec<u8>,
    decoded: usize,
    /// Heads and trailers to send before any data; sent up to `sent`.
    head: Vec<u8>,
    sent: usize,
    serving: Option<Serving>,
    /// The checksum of the data that was sent of the reply in progress; `None` if the two sides have not agreed on it.
    sum: Option<DataSum>,
    /// Data to send, from `at` on.
    spans: Vec<Span>,
    at: Place,
    /// Its part of the ring, if the pool is GPU memory.
    slices: Slices,
    /// The replies after the one in progress, as far as they are copied ahead.
    upcoming: VecDeque<Resolved>,
    /// Its requests that were out of bounds.
    out_of_bounds: u32,
    /// The socket holds back partial segments.
    corked: bool,
    /// The events that the server's epoll waits for.
    pub(super) interest: EventFlags,
}

/// Why a connection stops for now.
enum Halt {
    /// The socket has no room.
    Full,
    /// No copy of its data has ended, or the ring has no slot for it.
    Copies,
    /// The socket is empty.
    Empty,
    /// Its turn is over.
    Turn,
    /// The peer is gone.
    Over,
    /// The peer breaks a protocol.
    Broken(String),
}

impl Connection {
    /// An accepted connection; its socket does not block.
    pub(super) fn new(fd: OwnedFd, tls: Option<Box<Sealer>>, challenge: Challenge) -> Self {
        Self {
            fd,
            tls,
            head: challenge.encode().to_vec(),
            phase: Phase::Proving(challenge),
            input: Vec::new(),
            decoded: 0,
            sent: 0,
            serving: None,
            sum: None,
            spans: Vec::new(),
            at: Place::default(),
            slices: Slices::default(),
            upcoming: VecDeque::new(),
            out_of_bounds: 0,
            corked: false,
            interest: EventFlags::empty(),
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The peer's address.
    pub(super) fn peer(&self) -> Option<SocketAddr> {
        rustix::net::getpeername(&self.fd).ok()??.try_into().ok()
    }

    /// Whether a TLS handshake is going on.
    pub(super) fn is_handshaking(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.is_handshaking())
    }

    /// Whether the proof is outstanding.
    pub(super) fn is_proving(&self) -> bool {
        matches!(self.phase, Phase::Proving(_))
    }

    /// The lane, once proven.
    pub(super) fn lane(&self) -> Option<u64> {
        match self.phase {
            Phase::Serving { lane } => Some(lane),
            Phase::Proving(_) | Phase::Closing => None,
        }
    }

    /// Refuses the peer, then closes.
    pub(super) fn refuse(&mut self, verdict: Verdict) {
        self.head.extend_from_slice(&Answer { verdict, mac: [0; 32] }.encode());
        self.phase = Phase::Closing;
    }

    /// Works until the socket blocks, or about `bytes` have moved, lookups included.
    pub(super) fn turn(&mut self, shared: &mut Shared<'_>, mut bytes: u64) -> Next {
        loop {
            match self.step(shared, &mut bytes) {
                Ok(()) => {}
                Err(halt @ (Halt::Full | Halt::Turn)) => {
                    self.yield_ring(shared, matches!(halt, Halt::Full));
                    return Next::Wait(EventFlags::OUT);
                }
                Err(Halt::Copies) => return Next::WaitForCopies,
                Err(Halt::Empty) => return Next::Wait(EventFlags::IN),
                Err(Halt::Over) => return Next::Close(None),
                Err(Halt::Broken(why)) => return Next::Close(Some(why)),
            }
        }
    }

    fn step(&mut self, shared: &mut Shared<'_>, bytes: &mut u64) -> Result<(), Halt> {
        if *bytes == 0 {
            return Err(Halt::Turn);
        }
        if let Some(tls) = &mut self.tls {
            tls.flush(self.fd.as_fd()).map_err(halt)?;
        }
        if self.serving.is_some() {
            if shared.ahead.is_some() && !self.is_copied(shared, bytes)? {
                if self.sent < self.head.len() {
                    return self.send_head();
                }
                // What is in the socket leaves now, whenever the copies end.
                self.cork(false);
                return Err(Halt::Copies);
            }
            if *bytes == 0 {
                return Err(Halt::Turn);
            }
            self.cork(true);
            return self.send_data(shared, bytes);
        }
        // Before sending a head or trailer, look for the next request: then they go with its data.
        match self.phase {
            Phase::Proving(challenge) => {
                if let Some(proof) = self.input[self.decoded..].first_chunk() {
                    let proof = Proof::decode(proof);
                    self.decoded += Proof::LEN;
                    self.judge(&challenge, &proof, shared);
                    return Ok(());
                }
            }
            Phase::Serving { .. } => {
                let next = match self.upcoming.pop_front() {
                    Some(next) => Some(next),
                    None => self.next_request(shared.export, bytes)?,
                };
                if let Some(next) = next {
                    self.begin(next);
                    return Ok(());
                }
            }
            Phase::Closing if self.sent == self.head.len() => return Err(Halt::Over),
            Phase::Closing => {}
        }
        if self.sent < self.head.len() {
            return self.send_head();
        }
        // Every requested byte is in the socket: flush the last segment.
        self.cork(false);
        self.receive(shared.scratch, bytes)
    }

    /// Sets whether the kernel sends full segments only. Without this, each acknowledgement during a copy sends a partial
    /// segment: with 16 KiB blocks three times as many segments, and a quarter less speed.
    fn cork(&mut self, corked: bool) {
        if self.corked != corked {
            self.corked = corked;
            // Without the option the socket only is slower.
            if let Err(error) = rustix::net::sockopt::set_tcp_cork(&self.fd, corked) {
                tracing::debug!(%error, corked, "TCP_CORK");
            }
        }
    }

    fn judge(&mut self, challenge: &Challenge, proof: &Proof, shared: &Shared<'_>) {
        let &Proof { lane, options, ref random, .. } = proof;
        let (key, incarnation) = ((shared.key)(lane), shared.incarnation);
        let keyed = key.as_ref().map(|key| Keyed { key, challenge, options, random, lane, incarnation });
        match keyed.filter(|k| k.is_consumer(&proof.mac)) {
            Some(_) if (shared.is_full)(lane) => self.refuse(Verdict::Full),
            Some(k) => {
                self.head.extend_from_slice(&Answer { verdict: Verdict::Welcome, mac: k.producer() }.encode());
                self.sum = options.both(challenge.options).sums().then(DataSum::default);
                self.phase = Phase::Serving { lane };
            }
            None => self.refuse(Verdict::Refused),
        }
    }

    /// Resolves the next request, if all of it has come. Its lookups are part of the turn.
    fn next_request(&mut self, export: &Export, bytes: &mut u64) -> Result<Option<Resolved>, Halt> {
        let input = &self.input[self.decoded..];
        let Some(header) = input.first_chunk() else { return Ok(None) };
        let request = Request::decode(header).map_err(|e| Halt::Broken(e.to_string()))?;
        let end = Request::LEN + request.count as usize * Entry::LEN + SUM;
        let Some(whole) = input.get(..end) else { return Ok(None) };
        let sum = check_request(whole).map_err(|e| Halt::Broken(e.to_string()))?;
        let entries = &whole[Request::LEN..end - SUM];
        let Request { tag, slot, nonce, .. } = request;
        // The spans of the last reply, if it is over.
        let mut spans = if self.serving.is_none() { std::mem::take(&mut self.spans) } else { Vec::new() };
        let mut blocks = 0;
        let result = match export.resolve(slot, nonce) {
            None => Err(Status::Stale),
            Some(offered) => {
                gather(&export.layout, &offered, entries, &mut spans, &mut blocks).map_err(|_| Status::OutOfBounds)
            }
        };
        *bytes = bytes.saturating_sub(blocks.saturating_mul(LOOKUP));
        self.decoded += end;
        if result == Err(Status::OutOfBounds) {
            self.out_of_bounds += 1;
            if self.out_of_bounds > MOST_OUT_OF_BOUNDS {
                return Err(Halt::Broken("it goes on requesting blocks that were not offered to it".into()));
            }
        }
        let (status, total) = (result.err().unwrap_or(Status::Ok), result.unwrap_or(0));
        let serving = result.ok().map(|left| Serving { tag, request: sum, slot, nonce, left });
        if serving.is_none() {
            spans.clear();
        }
        Ok(Some(Resolved { head: Reply { status, tag, total }.encode(sum), serving, spans }))
    }

    /// Begins the reply to a request.
    fn begin(&mut self, next: Resolved) {
        self.head.extend_from_slice(&next.head);
        (self.serving, self.spans, self.at) = (next.serving, next.spans, Place::default());
        if self.serving.is_none() {
            self.slices.next_reply();
        }
    }

    /// Begins copies of what comes next. Whether something of the reply in progress can be sent.
    fn is_copied(&mut self, shared: &mut Shared<'_>, bytes: &mut u64) -> Result<bool, Halt> {
        let (Some(ahead), export) = (&mut shared.ahead, shared.export) else { return Ok(true) };
        loop {
            let fence = |s: &Option<Serving>| s.as_ref().map_or((0, 0), |s| (s.slot, s.nonce));
            let first = (&self.spans[..], fence(&self.serving));
            let others = self.upcoming.iter().map(|r| (&r.spans[..], fence(&r.serving)));
            if !self.slices.fill(ahead, shared.token, std::iter::once(first).chain(others)) {
                return Err(Halt::Over);
            }
            if *bytes == 0 || !self.slices.wants_reply(1 + self.upcoming.len()) {
                break;
            }
            let Some(next) = self.next_request(export, bytes)? else { break };
            self.upcoming.push_back(next);
        }
        self.slices.load_words(ahead, export);
        Ok(self.slices.ready(ahead, &mut [Span::default(); MOST_SLICES]) > 0)
    }

    /// It was admitted to the ring and could not take its slot.
    pub(super) fn stop_waiting(&mut self) {
        self.slices.stop_waiting();
    }

    /// Loads the words of replies whose last byte has been copied.
    pub(super) fn load_words(&mut self, ahead: &ReadAhead, export: &Export) {
        self.slices.load_words(ahead, export);
    }

    /// Gives the ring back if others may need it, and the socket has no room. `full`: it is known to have none.
    fn yield_ring(&mut self, shared: &mut Shared<'_>, full: bool) {
        let Some(ahead) = &mut shared.ahead else { return };
        if self.slices.is_empty() || !ahead.is_scarce() {
            return;
        }
        // At the end of a turn the socket may be full too, and then no event would come.
        let is_full = || {
            let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
            poll(&mut fds, Some(&Timespec::default())).is_ok_and(|n| n == 0)
        };
        if full || is_full() {
            let at = if self.serving.is_some() { self.at } else { Place::default() };
            self.slices.give_back(ahead, at);
        }
    }

    /// The connection ends: its part of the ring is free once no copy writes it.
    pub(super) fn leave_ring(&mut self, ahead: &mut ReadAhead, token: u64) {
        self.slices.close(ahead, token);
    }

    /// Sends the head and data of the reply; after the last byte, queues the trailer.
    fn send_data(&mut self, shared: &mut Shared<'_>, bytes: &mut u64) -> Result<(), Halt> {
        let Some(serving) = &mut self.serving else { return Ok(()) };
        let head = &self.head[self.sent..];
        let mut in_ring = [Span::default(); MOST_SLICES];
        let (memory, rest, skip) = match &shared.ahead {
            None => (&shared.export.memory, &mut self.spans[self.at.span..], self.at.skip),
            Some(ahead) => {
                let n = self.slices.ready(ahead, &mut in_ring);
                (ahead.ring(), &mut in_ring[..n], 0)
            }
        };
        // As much as the turn allows: the last span is cut for the call, and restored afterwards.
        let (mut n, mut sum) = (0, 0);
        while n < rest.len().min(MOST_SPANS) && sum < *bytes + skip {
            sum += rest[n].len;
            n += 1;
        }
        let cut = sum.saturating_sub(*bytes + skip);
        let Some(last) = n.checked_sub(1) else { return Err(Halt::Over) };
        rest[last].len -= cut;
        let sent = match &mut self.tls {
            None => memory.writev_with(self.fd.as_fd(), head, &rest[..n], skip),
            Some(tls) => tls.seal_spans(head, memory, &rest[..n], skip, sum - cut - skip),
        };
        rest[last].len += cut;
        let sent = sent.map_err(halt)?;
        let wanted = head.len() as u64 + sum - cut - skip;
        let of_head = sent.min(head.len());
        self.sent += of_head;
        let data = (sent - of_head) as u64;
        if let Some(sum) = &mut self.sum {
            // The bytes are still in the cache.
            sum.add(memory, rest, skip, data);
        }
        *bytes = bytes.saturating_sub(data);
        serving.left = serving.left.saturating_sub(data);
        self.at.forward(data, &self.spans);
        let copied = shared.ahead.as_mut().map(|ahead| self.slices.sent(ahead, data));
        if serving.left == 0 {
            // Every byte has been copied into the socket, and added to the checksum, so the word loaded now covers all of
            // them: bytes that changed in between are stale. Bytes of the ring have a word since they left the pool.
            let word =
                copied.map_or_else(|| shared.export.still(serving.slot, serving.nonce), Option::unwrap_or_default);
            let data = self.sum.as_mut().map_or(0, DataSum::finish);
            let trailer = Trailer { tag: serving.tag, word, data }.encode(serving.request);
            self.head.clear();
            self.sent = 0;
            self.head.extend_from_slice(&trailer);
            self.serving = None;
            self.slices.next_reply();
            Ok(())
        } else if (sent as u64) < wanted && self.tls.is_none() {
            // A partial send: the next call would only return that there is no room.
            Err(Halt::Full)
        } else {
            Ok(())
        }
    }

    fn send_head(&mut self) -> Result<(), Halt> {
        if let Some(tls) = &mut self.tls {
            self.sent += tls.seal(&self.head[self.sent..]).map_err(halt)?;
            self.head_sent();
            return Ok(());
        }
        match rustix::net::send(&self.fd, &self.head[self.sent..], SendFlags::NOSIGNAL) {
            Ok(n) => self.sent += n,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Err(Halt::Full),
            Err(_) => return Err(Halt::Over),
        }
        self.head_sent();
        Ok(())
    }

    fn head_sent(&mut self) {
        if self.sent == self.head.len() {
            self.head.clear();
            self.head.shrink_to(KEEP);
            self.sent = 0;
        }
    }

    /// Receives requests. Called only when every complete request has been answered.
    fn receive(&mut self, scratch: &mut [u8], bytes: &mut u64) -> Result<(), Halt> {
        self.input.drain(..self.decoded);
        self.decoded = 0;
        if self.input.is_empty() {
            self.input.shrink_to(KEEP);
            self.spans.clear();
            self.spans.shrink_to(KEEP / size_of::<Span>());
        }
        match rustix::net::recv(&self.fd, &mut *scratch, RecvFlags::empty()) {
            Ok((0, _)) => Err(Halt::Over),
            Ok((n, _)) => {
                *bytes = bytes.saturating_sub(n as u64);
                let Some(tls) = &mut self.tls else {
                    self.input.extend_from_slice(&scratch[..n]);
                    return Ok(());
                };
                let opened = tls.open(&scratch[..n], &mut self.input);
                match opened {
                    Ok(true) => Ok(()),
                    Ok(false) => Err(Halt::Over),
                    Err(e) => {
                        // The alert tells the peer why.
                        let _ = tls.flush(self.fd.as_fd());
                        Err(Halt::Broken(format!("TLS: {e}")))
                    }
                }
            }
            Err(Errno::INTR) => Ok(()),
            Err(Errno::AGAIN) => Err(Halt::Empty),
            Err(_) => Err(Halt::Over),
        }
    }
}

fn halt(e: std::io::Error) -> Halt {
    if blocks(&e) { Halt::Full } else { Halt::Over }
}

/// Most spans of one call: 1024 pieces, one of them the head.
const MOST_SPANS: usize = 1023;
