//! One data connection on the producer's side: a proof in, then requests in and replies out.
//!
//! Owns the socket and the reply in progress. Serves one request at a time and receives no more than it can decode, so a
//! consumer that requests more than it receives is slowed down by its own socket. Loads the fence word of a reply only after
//! its last byte has been copied out of the pool, and before the trailer leaves (promise 2, Fresh). Never waits.

use std::{
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use kvferry_proto::Incarnation;
use rustix::{
    event::epoll::EventFlags,
    io::Errno,
    net::{RecvFlags, SendFlags},
};

use super::{
    ahead::{Ahead, Slices},
    frames::{Answer, Challenge, Entry, Proof, Reply, Request, SUM, Status, Trailer, Verdict, check_request},
    gather::gather,
    handshake::{Key, Keyed},
    sum::DataSum,
    tls::{Sealer, blocks},
};
use crate::memory::{Export, Memory, Span};

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
    /// The ring, if the pool is GPU memory.
    pub(super) ahead: Option<&'a mut Ahead>,
    /// Names this connection to the ring.
    pub(super) token: u64,
}

/// A connection's next step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Next {
    /// Go on when the socket is ready for this.
    Wait(EventFlags),
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

/// The reply in progress.
struct Serving {
    tag: u64,
    /// The request's checksum.
    request: u64,
    slot: u32,
    nonce: u64,
    /// Bytes of data not sent yet.
    left: u64,
    /// Of a pool in GPU memory: the word after the last byte was gathered.
    word: Option<u64>,
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
    /// Data to send: from `spans[at]` on, without its first `skip` bytes.
    spans: Vec<Span>,
    at: usize,
    skip: u64,
    /// Data that was gathered out of GPU memory.
    slices: Slices,
    /// It waits for copies.
    gathering: bool,
    /// Its requests that were out of bounds.
    out_of_bounds: u32,
    /// The socket holds back partial segments.
    corked: bool,
    /// The events that the server's epoll waits for.
    pub(super) interest: EventFlags,
}

/// Why a connection stops for now.
pub(super) enum Halt {
    /// Its data is not gathered yet.
    Copies,
    /// The socket has no room.
    Full,
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
            at: 0,
            skip: 0,
            slices: Slices::default(),
            gathering: false,
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

    /// Whether it waits for copies.
    pub(super) fn is_gathering(&self) -> bool {
        self.gathering
    }

    /// It is closed: gives what it has gathered back.
    pub(super) fn drop_slices(&mut self, ahead: &mut Ahead) {
        ahead.drop_all(&mut self.slices);
    }

    /// Refuses the peer, then closes.
    pub(super) fn refuse(&mut self, verdict: Verdict) {
        self.head.extend_from_slice(&Answer { verdict, mac: [0; 32] }.encode());
        self.phase = Phase::Closing;
    }

    /// Works until the socket blocks, or about `bytes` have moved, lookups included.
    pub(super) fn turn(&mut self, shared: &mut Shared<'_>, mut bytes: u64) -> Next {
        self.gathering = false;
        loop {
            match self.step(shared, &mut bytes) {
                Ok(()) => {}
                Err(Halt::Turn) => return Next::Wait(EventFlags::OUT),
                Err(Halt::Full) => {
                    self.stall(shared.ahead.as_deref_mut());
                    return Next::Wait(EventFlags::OUT);
                }
                Err(Halt::Empty) => return Next::Wait(EventFlags::IN),
                Err(Halt::Copies) => {
                    self.gathering = true;
                    return Next::Wait(EventFlags::empty());
                }
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
                if self.next_request(shared.export, bytes)? {
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

    /// Decodes the next request, if all of it has come. Its lookups are part of the turn.
    fn next_request(&mut self, export: &Export, bytes: &mut u64) -> Result<bool, Halt> {
        let input = &self.input[self.decoded..];
        let Some(header) = input.first_chunk() else { return Ok(false) };
        let request = Request::decode(header).map_err(|e| Halt::Broken(e.to_string()))?;
        let end = Request::LEN + request.count as usize * Entry::LEN + SUM;
        let Some(whole) = input.get(..end) else { return Ok(false) };
        let sum = check_request(whole).map_err(|e| Halt::Broken(e.to_string()))?;
        let entries = &whole[Request::LEN..end - SUM];
        let Request { tag, slot, nonce, .. } = request;
        let mut blocks = 0;
        let result = match export.resolve(slot, nonce) {
            None => Err(Status::Stale),
            Some(offered) => gather(&export.layout, &offered.groups, entries, &mut self.spans, &mut blocks)
                .map_err(|_| Status::OutOfBounds),
        };
        *bytes = bytes.saturating_sub(blocks.saturating_mul(LOOKUP));
        self.decoded += end;
        if result == Err(Status::OutOfBounds) {
            self.out_of_bounds += 1;
            if self.out_of_bounds > MOST_OUT_OF_BOUNDS {
                return Err(Halt::Broken("it goes on requesting blocks that were not offered to it".into()));
            }
        }
        match result {
            Ok(left) => {
                self.head.extend_from_slice(&Reply { status: Status::Ok, tag, total: left }.encode(sum));
                self.serving = Some(Serving { tag, request: sum, slot, nonce, left, word: None });
                (self.at, self.skip) = (0, 0);
                self.slices.begin(0, 0, left);
            }
            Err(status) => self.head.extend_from_slice(&Reply { status, tag, total: 0 }.encode(sum)),
        }
        Ok(true)
    }

    /// Sends the head and data of the reply; after the last byte, queues the trailer.
    fn send_data(&mut self, shared: &mut Shared<'_>, bytes: &mut u64) -> Result<(), Halt> {
        let Some(serving) = &mut self.serving else { return Ok(()) };
        let export = shared.export;
        // Every byte of an empty reply has been copied.
        if serving.left == 0 {
            return self.end_reply(export);
        }
        let mut spans = std::mem::take(&mut self.spans);
        let sent = match &mut shared.ahead {
            None => {
                let skip = self.skip;
                self.send_spans(&export.memory, &mut spans[self.at..], skip, *bytes)
            }
            Some(ahead) => {
                let still = || export.still(serving.slot, serving.nonce);
                let word = &mut serving.word;
                let next = ahead.next(shared.token, &spans, &mut self.slices, || {
                    // Once: an offer that is live again under the same nonce is impossible.
                    word.get_or_insert_with(still);
                });
                match next {
                    Ok((ring, span)) => self.send_spans(ring, &mut [span], 0, *bytes),
                    Err(halt) => Err(halt),
                }
            }
        };
        self.spans = spans;
        if let Ok((data, _)) = sent {
            *bytes = bytes.saturating_sub(data);
            self.moved(data, shared.ahead.as_deref_mut());
        }
        let partial = matches!(sent, Ok((data, wanted)) if data < wanted) && self.tls.is_none();
        sent?;
        if self.serving.as_ref().is_some_and(|s| s.left == 0) {
            self.end_reply(export)
        } else if partial {
            // The next call would only return that there is no room.
            Err(Halt::Full)
        } else {
            Ok(())
        }
    }

    /// Sends the head, and spans without their first `skip` bytes, up to `most` bytes of data. Returns how many bytes of data
    /// were sent, and how many were tried.
    fn send_spans(&mut self, memory: &Memory, spans: &mut [Span], skip: u64, most: u64) -> Result<(u64, u64), Halt> {
        let head = &self.head[self.sent..];
        // As much as the turn allows: the last span is cut for the call, and restored afterwards.
        let (mut n, mut sum) = (0, 0);
        while n < spans.len().min(MOST_SPANS) && sum < most + skip {
            sum += spans[n].len;
            n += 1;
        }
        let cut = sum.saturating_sub(most + skip);
        let Some(last) = n.checked_sub(1) else { return Err(Halt::Over) };
        spans[last].len -= cut;
        let wanted = sum - cut - skip;
        let sent = match &mut self.tls {
            None => memory.writev_with(self.fd.as_fd(), head, &spans[..n], skip),
            Some(tls) => tls.seal_spans(head, memory, &spans[..n], skip, wanted),
        };
        spans[last].len += cut;
        let sent = sent.map_err(halt)?;
        let of_head = sent.min(head.len());
        self.sent += of_head;
        let data = (sent - of_head) as u64;
        if let Some(sum) = &mut self.sum {
            // The bytes are still in the cache.
            sum.add(memory, spans, skip, data);
        }
        Ok((data, wanted))
    }

    /// The socket is full: gives what is gathered back if the ring is short of room.
    fn stall(&mut self, ahead: Option<&mut Ahead>) {
        if let (Some(serving), Some(ahead)) = (&mut self.serving, ahead)
            && serving.left > 0
            && ahead.stalled(&mut self.slices)
        {
            // The rest is copied again, so its word must be newer.
            serving.word = None;
            self.slices.begin(self.at, self.skip, serving.left);
        }
    }

    /// Data of the reply was sent.
    fn moved(&mut self, data: u64, ahead: Option<&mut Ahead>) {
        if let Some(ahead) = ahead {
            ahead.sent(&mut self.slices, data);
        }
        if let Some(serving) = &mut self.serving {
            serving.left = serving.left.saturating_sub(data);
        }
        self.skip += data;
        while let Some(s) = self.spans.get(self.at)
            && self.skip >= s.len
        {
            self.skip -= s.len;
            self.at += 1;
        }
    }

    /// Every byte has been copied out of the pool, and added to the checksum, so a word loaded now, or after the last gather,
    /// covers all of them: bytes that changed in between are stale.
    fn end_reply(&mut self, export: &Export) -> Result<(), Halt> {
        let Some(serving) = self.serving.take() else { return Ok(()) };
        let word = serving.word.unwrap_or_else(|| export.still(serving.slot, serving.nonce));
        let data = self.sum.as_mut().map_or(0, DataSum::finish);
        let trailer = Trailer { tag: serving.tag, word, data }.encode(serving.request);
        // The head of an empty reply is still there.
        self.head.drain(..self.sent);
        self.sent = 0;
        self.head.extend_from_slice(&trailer);
        Ok(())
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
