//! The consumer's end of a TCP lane.
//!
//! Owns the connections to one producer rank, the window of bytes in flight, and the running attempts. A chunk stays on one
//! connection: its replies come in order, so the last reply's trailer is the fence of all of them. Writes local blocks only
//! inside [`Lane::poll`], on the owner's thread, so an attempt is quiet the moment it is stopped (promise 4).

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use kvferry_proto::{Attempt, Cause, FenceKind, Grant, Incarnation, Lane, LaneCaps, LaneEvent, LaneKind, Read};
use rustix::event::epoll;

use super::{
    dial,
    frames::{BadFrame, MAX_BLOCKS, Options, Status},
    handshake::Key,
    link::{ENTRIES, Link, Lost, Stop},
    tls::is_change,
};
use crate::{
    config::TcpConfig,
    lane::{LaneError, WakingLane},
    memory::Memory,
    tls::TlsIdentity,
};

/// Longest read. A read is one destination of a `readv` and one event, so longer reads gain nothing.
const MAX_READ: u64 = 8 << 20;
/// Chunks of one attempt that may arrive corrupt. Each is read again on this attempt, which costs little after a rare fault;
/// a network that changes more than these needs another connection, which may take another path.
const MOST_CORRUPT: u32 = 3;
/// Room in the window that is worth a request while others are outstanding. Short reads then share a request and a reply
/// instead of having one each, with a head, a trailer and records of their own.
const WORTH_A_REQUEST: u64 = 1 << 20;
/// About how many bytes one `poll` moves at most: enough to be efficient, and little enough (about 1 ms) for other lanes.
const POLL_BYTES: u64 = 4 << 20;

/// A TCP lane to one producer rank.
pub(crate) struct TcpLane {
    peer: SocketAddr,
    memory: Memory,
    window: u64,
    links: Vec<Link>,
    /// Readable when one of the links has something to do.
    epoll: OwnedFd,
    attempts: BTreeMap<Attempt, AttemptState>,
    /// Events of calls other than `poll`.
    pending: Vec<LaneEvent>,
    /// The last `poll` stopped at its byte limit.
    more: bool,
    scratch: Vec<u8>,
    /// The link that `poll` begins with, so that none starves.
    first: usize,
}

/// An attempt that is not quiet.
struct AttemptState {
    grant: Grant,
    /// A read of it failed: it posts no more.
    failed: bool,
    /// Chunks of it that arrived corrupt.
    corrupt: u32,
    /// A chunk whose reads are not all posted, and its connection.
    open: Option<(u32, usize)>,
}

impl TcpLane {
    /// Connects to a producer rank's data port; both sides prove to have the lane's key. `lane` and `key` come from
    /// `ConnectLane`; `incarnation` comes from the rank's Hello. With `tls`, only over TLS. Takes 5 s at most for each
    /// connection.
    pub(crate) async fn connect(
        addr: SocketAddr,
        lane: u64,
        key: &Key,
        incarnation: Incarnation,
        memory: Memory,
        config: &TcpConfig,
        tls: Option<&TlsIdentity>,
    ) -> Result<Self, LaneError> {
        let failed = |e: rustix::io::Errno| LaneError::io("epoll")(e.into());
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed)?;
        let mut links = Vec::with_capacity(config.connections.max(1));
        // TLS itself sees every change.
        let options = Options::new(config.checksum && tls.is_none());
        for _ in 0..config.connections.max(1) {
            let dialed = dial::dial(addr, lane, key, incarnation, options, tls).await?;
            epoll::add(&epoll, &dialed.fd, epoll::EventData::new_u64(links.len() as u64), epoll::EventFlags::IN)
                .map_err(failed)?;
            links.push(Link::new(dialed));
        }
        Ok(Self {
            peer: addr,
            memory,
            window: config.window,
            links,
            epoll,
            attempts: BTreeMap::new(),
            pending: Vec::new(),
            more: false,
            scratch: Vec::new(),
            first: 0,
        })
    }

    /// Whether the lane is unusable.
    fn is_down(&self) -> bool {
        self.links.is_empty()
    }

    fn outstanding(&self) -> u64 {
        self.links.iter().map(|l| l.outstanding).sum()
    }

    /// Fails an attempt.
    fn fail(&mut self, a: Attempt, cause: Cause, out: &mut Vec<LaneEvent>) {
        self.links.iter_mut().for_each(|l| l.stop(a));
        if let Some(t) = self.attempts.get_mut(&a)
            && !t.failed
        {
            t.failed = true;
            out.push(LaneEvent::Failed { attempt: a, cause });
        }
    }

    /// A chunk arrived corrupt: has it read again, or fails the attempt.
    fn corrupt(&mut self, attempt: Attempt, chunk: u32, out: &mut Vec<LaneEvent>) {
        let Some(t) = self.attempts.get_mut(&attempt).filter(|t| !t.failed) else { return };
        t.corrupt += 1;
        if t.corrupt == 1 {
            tracing::warn!(
                peer = %self.peer, chunk,
                "bytes were changed on their way, and are read again; look for the NIC, cable or proxy that does it"
            );
        }
        if t.corrupt > MOST_CORRUPT {
            self.fail(attempt, Cause::Corrupt, out);
        } else {
            out.push(LaneEvent::Again { attempt, chunk });
        }
    }

    /// Closes everything. A closed connection writes nothing, so all attempts are quiet. Attempts that miss replies fail
    /// with `failed`.
    fn go_down(&mut self, cause: Cause, failed: Option<Cause>, out: &mut Vec<LaneEvent>) {
        for (attempt, t) in std::mem::take(&mut self.attempts) {
            let owed = t.open.is_some() || self.links.iter().any(|l| l.owes(attempt));
            if let Some(cause) = failed.filter(|_| owed && !t.failed) {
                out.push(LaneEvent::Failed { attempt, cause });
            }
            out.push(LaneEvent::Quiet { attempt });
        }
        out.push(LaneEvent::Down { cause });
        self.links.clear();
        self.more = false;
        self.scratch = Vec::new();
    }
}

impl Lane for TcpLane {
    fn caps(&self) -> LaneCaps {
        LaneCaps {
            kind: LaneKind::Tcp,
            max_read: MAX_READ,
            // The lane itself does not wait: this is the time until the owner's next `poll`.
            quiet_bound: Duration::from_millis(5),
            fence: FenceKind::Trailer,
        }
    }

    fn begin(&mut self, a: Attempt, grant: Grant) {
        if self.is_down() {
            self.pending.push(LaneEvent::Failed { attempt: a, cause: Cause::LaneFailed });
            self.pending.push(LaneEvent::Quiet { attempt: a });
        } else {
            self.attempts.insert(a, AttemptState { grant, failed: false, corrupt: 0, open: None });
        }
    }

    fn post(&mut self, a: Attempt, reads: &[Read]) -> usize {
        let mut room = self.window.saturating_sub(self.outstanding());
        if self.outstanding() == 0 {
            room = room.max(1);
        } else if room < WORTH_A_REQUEST.min(self.window / 8) {
            return 0;
        }
        let Some(t) = self.attempts.get_mut(&a) else { return 0 };
        let Some(chunk) = reads.first().map(|r| r.chunk) else { return 0 };
        if t.failed {
            return 0;
        }
        let taken = reads
            .iter()
            .take_while(|r| {
                let take = room > 0 && r.chunk == chunk;
                room = room.saturating_sub(r.len);
                take
            })
            .count();
        if taken == 0 {
            return 0;
        }
        let at = match t.open {
            Some((open, at)) if open == chunk => at,
            _ => (0..self.links.len()).min_by_key(|&i| self.links[i].outstanding).unwrap_or(0),
        };
        let Some(link) = self.links.get_mut(at) else { return 0 };
        let complete = taken == reads.len();
        let mut rest = &reads[..taken];
        while !rest.is_empty() {
            let mut blocks = 0;
            let fits = |r: &&Read| {
                blocks += u64::from(r.blocks);
                blocks <= MAX_BLOCKS
            };
            let n = rest.iter().take(ENTRIES).take_while(fits).count().max(1);
            let (now, then) = rest.split_at(n);
            link.request(a, t.grant, now, complete && then.is_empty());
            rest = then;
        }
        t.open = (!complete).then_some((chunk, at));
        taken
    }

    fn stop(&mut self, a: Attempt) {
        if self.attempts.remove(&a).is_some() {
            self.links.iter_mut().for_each(|l| l.stop(a));
            self.pending.push(LaneEvent::Quiet { attempt: a });
        }
    }

    fn kill(&mut self) {
        if !self.is_down() {
            let mut pending = std::mem::take(&mut self.pending);
            self.go_down(Cause::LaneFailed, None, &mut pending);
            self.pending = pending;
        }
    }

    fn poll(&mut self, out: &mut Vec<LaneEvent>) {
        out.append(&mut self.pending);
        self.more = false;
        let mut lost: Option<Lost> = None;
        let mut bound = POLL_BYTES;
        let n = self.links.len();
        for i in 0..n {
            let at = (self.first + i) % n;
            self.links[at].flush();
            loop {
                match self.links[at].receive(&self.memory, &mut self.scratch, &mut bound, out) {
                    Stop::Empty => break,
                    Stop::Bound => {
                        self.more = true;
                        break;
                    }
                    Stop::Refused(attempt, status) => {
                        let cause = if status == Status::Stale { Cause::Stale } else { Cause::BadOffer };
                        self.fail(attempt, cause, out);
                    }
                    Stop::Corrupt(attempt, chunk) => self.corrupt(attempt, chunk, out),
                    Stop::Lost(why) => {
                        lost = Some(why);
                        break;
                    }
                }
            }
            if self.more {
                self.first = at + 1;
                break;
            }
        }
        // The other connections are drained first: they are polled again, and the lost one reports the same error again.
        if let Some(why) = lost.filter(|_| !self.more) {
            let (cause, failed) = match why {
                Lost::Closed | Lost::Broken(_) => (Cause::PeerDown, Cause::LaneFailed),
                Lost::Malformed(BadFrame::Sum) => (Cause::Corrupt, Cause::Corrupt),
                Lost::Tls(ref e) if is_change(e) => (Cause::Corrupt, Cause::Corrupt),
                Lost::Malformed(_) | Lost::NotDue | Lost::Tls(_) => (Cause::LaneFailed, Cause::LaneFailed),
            };
            tracing::warn!(peer = %self.peer, "tcp lane lost: {why}");
            self.go_down(cause, Some(failed), out);
        }
    }
}

impl WakingLane for TcpLane {
    fn arm(&mut self) -> io::Result<Option<BorrowedFd<'_>>> {
        if self.more || !self.pending.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if self.is_down() {
            return Ok(None);
        }
        for (i, link) in self.links.iter_mut().enumerate() {
            let blocked = link.flush();
            link.set_low_water();
            if link.has_send_error() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            if blocked != link.wants_room {
                let mut interest = epoll::EventFlags::IN;
                interest.set(epoll::EventFlags::OUT, blocked);
                epoll::modify(&self.epoll, link.fd(), epoll::EventData::new_u64(i as u64), interest)?;
                link.wants_room = blocked;
            }
        }
        Ok(Some(self.epoll.as_fd()))
    }
}
