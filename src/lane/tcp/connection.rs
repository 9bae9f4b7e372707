//! One data connection on the producer's side: a proof in, then requests in and replies out.
//!
//! Owns the socket and the reply that is being sent. Serves one request at a time and reads no further ahead than it can
//! take apart, so a consumer that asks for more than it takes is held up by its own socket. Loads the fence word of a reply
//! only after its last byte has been copied out of the pool, and before the trailer leaves (promise 2, Fresh). Never waits.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kvferry_proto::block::Incarnation;
use rustix::{
    event::epoll::EventFlags,
    io::Errno,
    net::{RecvFlags, SendFlags},
};

use super::{
    frames::{Answer, Challenge, Entry, Proof, Reply, Request, Status, Trailer, Verdict},
    gather::gather,
    handshake::{Key, Keyed},
};
use crate::memory::{Export, Span};

/// Buffers that a connection keeps between requests; what a rare large request took beyond that is given back.
const KEEP: usize = 64 << 10;

/// What connections of a server share.
pub(super) struct Shared<'a> {
    pub(super) export: &'a Export,
    pub(super) incarnation: Incarnation,
    /// The key of a lane that may connect.
    pub(super) key: &'a dyn Fn(u64) -> Option<Key>,
    /// What requests are received into, before they go to their connection.
    pub(super) scratch: &'a mut [u8],
}

/// What a connection does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// It goes on when its socket is ready for this.
    Wait(EventFlags),
    /// It is over.
    Close,
}

enum Phase {
    /// The proof has not come.
    Proving(Challenge),
    /// Requests may come.
    Serving { lane: u64 },
    /// What is in `head` is said, then it is over.
    Closing,
}

/// The reply whose data is being sent.
struct Serving {
    tag: u64,
    slot: u32,
    nonce: u64,
    /// Bytes of data not sent.
    left: u64,
}

/// One connection.
pub(super) struct Connection {
    fd: OwnedFd,
    phase: Phase,
    /// Requests received; taken apart up to `eaten`.
    input: Vec<u8>,
    eaten: usize,
    /// Heads and trailers to be sent before any data; sent up to `said`.
    head: Vec<u8>,
    said: usize,
    serving: Option<Serving>,
    /// Data to be sent: from `spans[at]` on, without its first `skip` bytes.
    spans: Vec<Span>,
    at: usize,
    skip: u64,
    /// The socket holds back what does not fill a segment.
    corked: bool,
    /// What the server's epoll waits for.
    pub(super) interest: EventFlags,
}

/// Why a connection does not go on by itself.
enum Halt {
    /// Its socket has no room.
    Full,
    /// Nothing came.
    Empty,
    /// Its turn is over.
    Turn,
    /// The peer is gone, or breaks the protocol.
    Over,
}

impl Connection {
    /// A connection that was just accepted; its socket does not block.
    pub(super) fn new(fd: OwnedFd, challenge: Challenge) -> Self {
        Self {
            fd,
            head: challenge.encode().to_vec(),
            phase: Phase::Proving(challenge),
            input: Vec::new(),
            eaten: 0,
            said: 0,
            serving: None,
            spans: Vec::new(),
            at: 0,
            skip: 0,
            corked: false,
            interest: EventFlags::empty(),
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether the proof has not come.
    pub(super) fn is_proving(&self) -> bool {
        matches!(self.phase, Phase::Proving(_))
    }

    /// The lane that it was proven for.
    pub(super) fn lane(&self) -> Option<u64> {
        match self.phase {
            Phase::Serving { lane } => Some(lane),
            Phase::Proving(_) | Phase::Closing => None,
        }
    }

    /// Says no, and closes.
    pub(super) fn refuse(&mut self, verdict: Verdict) {
        self.head.extend_from_slice(&Answer { verdict, mac: [0; 32] }.encode());
        self.phase = Phase::Closing;
    }

    /// Goes on for about `bytes` at most.
    pub(super) fn turn(&mut self, shared: &mut Shared<'_>, mut bytes: u64) -> Next {
        loop {
            match self.step(shared, &mut bytes) {
                Ok(()) => {}
                Err(Halt::Full | Halt::Turn) => return Next::Wait(EventFlags::OUT),
                Err(Halt::Empty) => return Next::Wait(EventFlags::IN),
                Err(Halt::Over) => return Next::Close,
            }
        }
    }

    fn step(&mut self, shared: &mut Shared<'_>, bytes: &mut u64) -> Result<(), Halt> {
        if *bytes == 0 {
            return Err(Halt::Turn);
        }
        if self.serving.is_some() {
            self.cork(true);
            return self.send_data(shared.export, bytes);
        }
        // Before a head or trailer is sent, see whether the next request is here already: then they go with its data.
        match self.phase {
            Phase::Proving(challenge) => {
                if let Some(proof) = self.input[self.eaten..].first_chunk() {
                    let proof = Proof::decode(proof);
                    self.eaten += Proof::LEN;
                    self.judge(&challenge, &proof, shared);
                    return Ok(());
                }
            }
            Phase::Serving { .. } => {
                if self.next_request(shared.export)? {
                    return Ok(());
                }
            }
            Phase::Closing if self.said == self.head.len() => return Err(Halt::Over),
            Phase::Closing => {}
        }
        if self.said < self.head.len() {
            return self.send_head();
        }
        // All that was asked for is on its way: the last of it must not wait.
        self.cork(false);
        self.receive(shared.scratch, bytes)
    }

    /// Has the kernel send full segments only, or no longer. Without it, every acknowledgement that comes while data is
    /// being copied sends what there is: at 16 KiB blocks three times as many segments, and a quarter less speed.
    fn cork(&mut self, corked: bool) {
        if self.corked != corked {
            self.corked = corked;
            // A socket that cannot is slower, not wrong.
            if let Err(error) = rustix::net::sockopt::set_tcp_cork(&self.fd, corked) {
                tracing::debug!(%error, corked, "TCP_CORK");
            }
        }
    }

    fn judge(&mut self, challenge: &Challenge, proof: &Proof, shared: &Shared<'_>) {
        let (lane, random) = (proof.lane, &proof.random);
        let key = (shared.key)(lane);
        let keyed = key.as_ref().map(|key| Keyed { key, challenge, random, lane, incarnation: shared.incarnation });
        match keyed.filter(|k| k.is_consumer(&proof.mac)) {
            Some(k) => {
                self.head.extend_from_slice(&Answer { verdict: Verdict::Welcome, mac: k.producer() }.encode());
                self.phase = Phase::Serving { lane };
            }
            None => self.refuse(Verdict::Refused),
        }
    }

    /// Takes the next request apart, if all of it is here.
    fn next_request(&mut self, export: &Export) -> Result<bool, Halt> {
        let input = &self.input[self.eaten..];
        let Some(header) = input.first_chunk() else { return Ok(false) };
        let request = Request::decode(header).map_err(|_| Halt::Over)?;
        let end = Request::LEN + request.count as usize * Entry::LEN;
        let Some(entries) = input.get(Request::LEN..end) else { return Ok(false) };
        let Request { tag, slot, nonce, .. } = request;
        let result = match export.resolve(slot, nonce) {
            None => Err(Status::Stale),
            Some(offered) => {
                gather(&export.layout, &offered, entries, &mut self.spans).map_err(|_| Status::OutOfBounds)
            }
        };
        self.eaten += end;
        match result {
            Ok(left) => {
                self.head.extend_from_slice(&Reply { status: Status::Ok, tag, total: left }.encode());
                self.serving = Some(Serving { tag, slot, nonce, left });
                (self.at, self.skip) = (0, 0);
            }
            Err(status) => self.head.extend_from_slice(&Reply { status, tag, total: 0 }.encode()),
        }
        Ok(true)
    }

    /// Sends the head and data of the reply; with the last of it, has the trailer ready.
    fn send_data(&mut self, export: &Export, bytes: &mut u64) -> Result<(), Halt> {
        let Some(serving) = &mut self.serving else { return Ok(()) };
        let head = &self.head[self.said..];
        // As much as the turn allows: the last span of a call may be cut, and is whole again afterwards.
        let (mut n, mut sum) = (0, 0);
        let rest = &mut self.spans[self.at..];
        while n < rest.len().min(MOST_SPANS) && sum < *bytes + self.skip {
            sum += rest[n].len;
            n += 1;
        }
        let cut = sum.saturating_sub(*bytes + self.skip);
        let Some(last) = n.checked_sub(1) else { return Err(Halt::Over) };
        rest[last].len -= cut;
        let sent = export.memory.writev_with(self.fd.as_fd(), head, &rest[..n], &[], self.skip);
        rest[last].len += cut;
        let sent = match sent {
            Ok(sent) => sent,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Err(Halt::Full),
            Err(_) => return Err(Halt::Over),
        };
        let wanted = head.len() as u64 + sum - cut - self.skip;
        let of_head = sent.min(head.len());
        self.said += of_head;
        let data = (sent - of_head) as u64;
        *bytes = bytes.saturating_sub(data);
        serving.left = serving.left.saturating_sub(data);
        self.skip += data;
        while let Some(s) = self.spans.get(self.at)
            && self.skip >= s.len
        {
            self.skip -= s.len;
            self.at += 1;
        }
        if serving.left == 0 {
            // Every byte is in the socket: what the word says now, it says of all of them.
            let word = export.still(serving.slot, serving.nonce);
            let trailer = Trailer { tag: serving.tag, word }.encode();
            self.head.clear();
            self.said = 0;
            self.head.extend_from_slice(&trailer);
            self.serving = None;
            Ok(())
        } else if (sent as u64) < wanted {
            // It took less than it was given: it would only say that it has no room.
            Err(Halt::Full)
        } else {
            Ok(())
        }
    }

    fn send_head(&mut self) -> Result<(), Halt> {
        match rustix::net::send(&self.fd, &self.head[self.said..], SendFlags::NOSIGNAL) {
            Ok(n) => self.said += n,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Err(Halt::Full),
            Err(_) => return Err(Halt::Over),
        }
        if self.said == self.head.len() {
            self.head.clear();
            self.head.shrink_to(KEEP);
            self.said = 0;
        }
        Ok(())
    }

    /// Receives what comes. Only called when all that came before has been answered, but for a request in parts.
    fn receive(&mut self, scratch: &mut [u8], bytes: &mut u64) -> Result<(), Halt> {
        self.input.drain(..self.eaten);
        self.eaten = 0;
        if self.input.is_empty() {
            self.input.shrink_to(KEEP);
            self.spans.clear();
            self.spans.shrink_to(KEEP / size_of::<Span>());
        }
        match rustix::net::recv(&self.fd, &mut *scratch, RecvFlags::empty()) {
            Ok((0, _)) => Err(Halt::Over),
            Ok((n, _)) => {
                self.input.extend_from_slice(&scratch[..n]);
                *bytes = bytes.saturating_sub(n as u64);
                Ok(())
            }
            Err(Errno::INTR) => Ok(()),
            Err(Errno::AGAIN) => Err(Halt::Empty),
            Err(_) => Err(Halt::Over),
        }
    }
}

/// Most spans of one call, which takes 1024 pieces with the head before them.
const MOST_SPANS: usize = 1023;
