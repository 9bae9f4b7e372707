//! The producer's end of TCP lanes: one thread that serves every data connection of a rank.
//!
//! Owns the listening socket, the connections and the keys of admitted lanes. Gives each ready connection a turn of a
//! bounded number of bytes, so a greedy or a stalled peer takes nothing from the others (promise 7, Isolated); sleeps when
//! none is ready. No peer can end it, and it never panics.

use std::{
    collections::{HashMap, hash_map::Entry},
    io,
    net::{SocketAddr, TcpListener},
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use kvferry_proto::{Incarnation, Limits};
use parking_lot::{Mutex, MutexGuard};
use rustix::{
    event::{EventfdFlags, Timespec, epoll, epoll::EventFlags, eventfd},
    io::Errno,
    net::SocketFlags,
};

use super::{
    connection::{Connection, Next, Shared},
    frames::{Challenge, Options, Verdict},
    handshake::Key,
    options::tune,
    proving::Proving,
    readahead::ReadAhead,
    tls::Sealer,
};
use crate::{
    config::TcpConfig,
    lane::log_limit::LogLimit,
    memory::Export,
    tls::{Protocol, TlsIdentity},
};

/// Bytes that a connection may move before the next one's turn.
const TURN: u64 = 2 << 20;
/// Longest time from a connection to its proof.
const PROOF_TIMEOUT: Duration = Duration::from_secs(5);
/// Most connections without a proof. One more closes an old one: silent connections must not keep others out.
const MOST_PROVING: usize = 256;
/// TLS handshakes that advance between two waits. Each costs public-key operations, about as long as a connection's turn: a
/// flood of handshakes must not keep the data of others waiting. The epoll reports the rest again.
const MOST_HANDSHAKES: usize = 4;
/// Wait after the process ran out of descriptors: an immediate retry would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Receives a request of 64 KiB in one piece.
const SCRATCH: usize = 128 << 10;

// Tokens that no connection has: there are never that many connections.
const LISTENER: u64 = u64::MAX;
const WAKE: u64 = u64::MAX - 1;
const COPIES: u64 = u64::MAX - 2;

/// Serves a rank's pool over TCP until it is dropped.
pub(crate) struct Server {
    addr: SocketAddr,
    common: Arc<Common>,
    thread: Option<JoinHandle<()>>,
}

/// Shared by the handle and the thread.
struct Common {
    wake: OwnedFd,
    end: AtomicBool,
    lanes: Mutex<Lanes>,
}

#[derive(Default)]
struct Lanes {
    keys: HashMap<u64, Key>,
    dismissed: Vec<u64>,
}

impl Common {
    fn lanes(&self) -> MutexGuard<'_, Lanes> {
        self.lanes.lock()
    }

    fn wake(&self) {
        // Fails only when the counter is full, and then the thread is awake.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl Server {
    /// Listens on `bind` and serves `export`. Lanes may connect once they are admitted; `limits.lanes` bounds connections.
    ///
    /// # Errors
    /// The system refuses a socket or a thread, or the pool is GPU memory and the export has no ring for it.
    pub(crate) fn start(
        bind: SocketAddr,
        export: Arc<Export>,
        incarnation: Incarnation,
        limits: &Limits,
        config: &TcpConfig,
        tls: Option<Arc<TlsIdentity>>,
    ) -> io::Result<Self> {
        Self::start_with(bind, export, incarnation, limits, config, tls, (PROOF_TIMEOUT, MOST_PROVING))
    }

    pub(super) fn start_with(
        bind: SocketAddr,
        export: Arc<Export>,
        incarnation: Incarnation,
        limits: &Limits,
        config: &TcpConfig,
        tls: Option<Arc<TlsIdentity>>,
        (proof_timeout, most_proving): (Duration, usize),
    ) -> io::Result<Self> {
        let ahead = ReadAhead::new(&export)?;
        let listener = TcpListener::bind(bind)?;
        listener.set_nonblocking(true)?;
        let addr = listener.local_addr()?;
        let common = Arc::new(Common {
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            end: AtomicBool::new(false),
            lanes: Mutex::default(),
        });
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &listener, epoll::EventData::new_u64(LISTENER), EventFlags::IN)?;
        epoll::add(&epoll, &common.wake, epoll::EventData::new_u64(WAKE), EventFlags::IN)?;
        if let Some(ahead) = &ahead {
            epoll::add(&epoll, ahead.fd(), epoll::EventData::new_u64(COPIES), EventFlags::IN)?;
        }
        let mut round = Round {
            common: common.clone(),
            export,
            incarnation,
            // TLS itself sees every change.
            options: Options::new(config.checksum && tls.is_none()),
            tls,
            handshakes: 0,
            complaints: LogLimit::default(),
            of_lane: HashMap::new(),
            limit: limits.lanes,
            epoll,
            listener,
            slots: Vec::new(),
            vacant: Vec::new(),
            count: 0,
            proving: Proving::new(most_proving),
            accept_again: None,
            proof_timeout,
            scratch: vec![0; SCRATCH],
            ahead,
            ready: Vec::new(),
            reported: false,
        };
        let thread = std::thread::Builder::new().name("kvferry-tcp".into()).spawn(move || round.run())?;
        Ok(Self { addr, common, thread: Some(thread) })
    }

    /// The listening address.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Admits `lane`: a peer that proves to have `key` may connect to it.
    pub(crate) fn admit(&self, lane: u64, key: Key) {
        self.common.lanes().keys.insert(lane, key);
    }

    /// Closes the lane's connections, and refuses new ones.
    pub(crate) fn dismiss(&self, lane: u64) {
        let mut lanes = self.common.lanes();
        if lanes.keys.remove(&lane).is_some() {
            lanes.dismissed.push(lane);
            drop(lanes);
            self.common.wake();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.common.end.store(true, Ordering::Release);
        self.common.wake();
        if let Some(thread) = self.thread.take() {
            // Fails only if the thread panicked, and then it has ended too.
            let _ = thread.join();
        }
    }
}

/// The thread's state.
struct Round {
    common: Arc<Common>,
    export: Arc<Export>,
    incarnation: Incarnation,
    options: Options,
    /// Certificates; with them, every connection is TLS.
    tls: Option<Arc<TlsIdentity>>,
    /// Turns of connections in a TLS handshake since the last wait.
    handshakes: usize,
    /// Log lines about connections that broke a protocol.
    complaints: LogLimit,
    /// Number of connections of each lane that has any.
    of_lane: HashMap<u64, usize>,
    limit: usize,
    epoll: OwnedFd,
    listener: TcpListener,
    slots: Vec<Slot>,
    vacant: Vec<usize>,
    count: usize,
    proving: Proving,
    /// When to accept again after a lack of descriptors.
    accept_again: Option<Instant>,
    proof_timeout: Duration,
    scratch: Vec<u8>,
    /// If the pool is GPU memory.
    ahead: Option<ReadAhead>,
    /// Connections whose copies have ended.
    ready: Vec<u64>,
    /// That copies fail has been logged.
    reported: bool,
}

#[derive(Default)]
struct Slot {
    /// Changes with every connection, so that a late event of the former connection does not reach the new one.
    generation: u32,
    connection: Option<Box<Connection>>,
}

impl Round {
    fn run(&mut self) {
        self.serve();
        if let Some(ahead) = &mut self.ahead
            && !ahead.wait()
        {
            tracing::error!("copies out of GPU memory do not end: the engine must not unmap its pool");
        }
    }

    fn serve(&mut self) {
        let mut events = Vec::with_capacity(256);
        while !self.common.end.load(Ordering::Acquire) {
            let copied = self.ahead.as_ref().is_some_and(|a| !a.about_to_sleep());
            let timeout = if copied { Some(Timespec::default()) } else { self.next_timeout() };
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => {
                    // Impossible with a valid epoll descriptor. If it happens, a spinning thread would be worse.
                    tracing::error!("the tcp server cannot wait for its sockets and ends: {e}");
                    return;
                }
            }
            self.handshakes = 0;
            let mut woken = false;
            for event in events.drain(..) {
                match event.data.u64() {
                    LISTENER => self.accept(),
                    WAKE => self.woken(),
                    COPIES => woken = true,
                    token if self.waits_for_copies(token) => {
                        // It waits for no event of its socket, so the peer is gone.
                        self.close(token);
                    }
                    token => self.turn(token),
                }
            }
            self.copied(woken);
            self.expire();
        }
    }

    fn next_timeout(&self) -> Option<Timespec> {
        let next = self.proving.next().into_iter().chain(self.accept_again).min()?;
        let left = next.saturating_duration_since(Instant::now());
        // A millisecond more: a wake-up just before the time would spin until it has come.
        Timespec::try_from(left + Duration::from_millis(1)).ok()
    }

    fn expire(&mut self) {
        if self.proving.next().is_none() && self.accept_again.is_none() {
            return;
        }
        let now = Instant::now();
        while let Some(token) = self.proving.expired(now, |t| is_proving(&mut self.slots, t)) {
            self.too_late(token);
        }
        if self.accept_again.is_some_and(|at| at <= now) {
            self.accept_again = None;
            let _ = epoll::modify(&self.epoll, &self.listener, epoll::EventData::new_u64(LISTENER), EventFlags::IN);
            self.accept();
        }
    }

    /// The proof did not come in time: tells the peer if it can, and closes.
    fn too_late(&mut self, token: u64) {
        if let Some(c) = find(&mut self.slots, token) {
            c.refuse(Verdict::TooLate);
            self.turn(token);
            self.close(token);
        }
    }

    fn accept(&mut self) {
        loop {
            match rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(fd) => self.begin(fd),
                Err(Errno::AGAIN) => return,
                // The peer closed before the accept.
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(e) => {
                    tracing::warn!("the tcp server cannot accept: {e}; raise the limit of open files if it is reached");
                    self.accept_again = Some(Instant::now() + ACCEPT_PAUSE);
                    let none = EventFlags::empty();
                    let _ = epoll::modify(&self.epoll, &self.listener, epoll::EventData::new_u64(LISTENER), none);
                    return;
                }
            }
        }
    }

    fn begin(&mut self, fd: OwnedFd) {
        let mut random = [0; 32];
        if tune(&fd).is_err() || getrandom::fill(&mut random).is_err() {
            return;
        }
        let tls = match &self.tls {
            None => None,
            Some(identity) => match Sealer::new(identity.server(Protocol::Lane)) {
                Ok(sealer) => Some(Box::new(sealer)),
                Err(error) => return tracing::warn!(%error, "the tcp server cannot begin TLS"),
            },
        };
        let mut connection = Box::new(Connection::new(fd, tls, Challenge { options: self.options, random }));
        // It may be gone again.
        let Some(from) = connection.peer() else { return };
        if self.count >= self.limit {
            connection.refuse(Verdict::Full);
        }
        let index = self.vacant.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        let slot = &mut self.slots[index];
        slot.generation = slot.generation.wrapping_add(1);
        let token = token(index, slot.generation);
        let proving = connection.is_proving();
        if proving && connection.is_handshaking() {
            // The client speaks first, and its turn comes with those of the others.
            connection.interest = EventFlags::IN;
        }
        let registered =
            epoll::add(&self.epoll, connection.fd(), epoll::EventData::new_u64(token), connection.interest);
        let waits = connection.interest == EventFlags::IN;
        slot.connection = Some(connection);
        self.count += 1;
        if registered.is_err() {
            self.close(token);
            return;
        }
        if proving {
            let by = Instant::now() + self.proof_timeout;
            if let Some(old) = self.proving.add(by, token, from.ip(), |t| is_proving(&mut self.slots, t)) {
                self.too_late(old);
            }
        }
        if !waits {
            self.turn(token);
        }
        if !proving {
            // The refusal was sent, as far as the socket had room.
            self.close(token);
        }
    }

    /// Gives a turn to connections whose copies have ended, and to those that have waited for a slot that is free now.
    fn copied(&mut self, woken: bool) {
        let Some(ahead) = &mut self.ahead else { return };
        let mut ready = std::mem::take(&mut self.ready);
        ahead.look(woken, &mut ready);
        // First the words: they say what was true when the copies ended.
        for &token in &ready {
            if let Some(connection) = find(&mut self.slots, token) {
                connection.load_words(ahead, &self.export);
            }
        }
        for token in ready.drain(..) {
            if self.waits_for_copies(token) {
                self.turn(token);
            }
        }
        self.ready = ready;
        while let Some(token) = self.ahead.as_mut().and_then(ReadAhead::admit) {
            self.turn(token);
            // Its socket was full before it could take its slot: it asks again when there is room.
            if self.ahead.as_ref().is_some_and(|a| a.is_admitted(token))
                && let Some(connection) = find(&mut self.slots, token)
            {
                connection.stop_waiting();
            }
        }
        if self.ahead.as_ref().is_some_and(ReadAhead::has_failed) {
            self.close_all();
        }
    }

    fn waits_for_copies(&mut self, token: u64) -> bool {
        self.ahead.is_some() && find(&mut self.slots, token).is_some_and(|c| c.interest.is_empty())
    }

    /// There are no copies of the pool any more, so no request can be answered.
    fn close_all(&mut self) {
        if !std::mem::replace(&mut self.reported, true) {
            let gpu = self.export.memory.gpu().map(|g| g.check());
            let cause = gpu.and_then(Result::err).map_or_else(|| "a copy failed".into(), |e| e.to_string());
            tracing::error!(cause, "the GPU is unusable: the tcp server closes its connections; restart the process");
        }
        self.close_lanes(|_| true);
    }

    fn close_lanes(&mut self, which: impl Fn(u64) -> bool) {
        for index in 0..self.slots.len() {
            let slot = &self.slots[index];
            if slot.connection.as_ref().and_then(|c| c.lane()).is_some_and(&which) {
                self.close(token(index, slot.generation));
            }
        }
    }

    fn woken(&mut self) {
        let _ = rustix::io::read(&self.common.wake, &mut [0; 8]);
        let dismissed = std::mem::take(&mut self.common.lanes().dismissed);
        if !dismissed.is_empty() {
            self.close_lanes(|lane| dismissed.contains(&lane));
        }
    }

    fn turn(&mut self, token: u64) {
        let Some(connection) = find(&mut self.slots, token) else { return };
        if connection.is_handshaking() {
            self.handshakes += 1;
            if self.handshakes > MOST_HANDSHAKES {
                return;
            }
        }
        let was_proving = connection.is_proving();
        let (common, of_lane) = (&self.common, &self.of_lane);
        let mut shared = Shared {
            export: &self.export,
            incarnation: self.incarnation,
            key: &|lane| common.lanes().keys.get(&lane).copied(),
            is_full: &|lane| of_lane.get(&lane).is_some_and(|n| *n >= TcpConfig::MOST_CONNECTIONS),
            scratch: &mut self.scratch,
            ahead: self.ahead.as_mut(),
            token,
        };
        let next = connection.turn(&mut shared, TURN);
        if was_proving && let Some(lane) = connection.lane() {
            *self.of_lane.entry(lane).or_default() += 1;
        }
        let keep = match next {
            Next::Close(why) => {
                if let Some(why) = why
                    && let Some(others) = self.complaints.admit(Instant::now())
                {
                    let peer = connection.peer().map_or_else(|| "unknown".into(), |a| a.to_string());
                    tracing::warn!(peer, why, others, "tcp connection closed: it breaks the protocol");
                }
                false
            }
            Next::Wait(interest) => wait(&self.epoll, connection, token, interest),
            // The epoll then reports only that the peer is gone.
            Next::WaitForCopies => wait(&self.epoll, connection, token, EventFlags::empty()),
        };
        if !keep {
            self.close(token);
        }
    }

    fn close(&mut self, token: u64) {
        let index = token as u32 as usize;
        let Some(connection) = find(&mut self.slots, token) else { return };
        if let Some(ahead) = &mut self.ahead {
            connection.leave_ring(ahead, token);
        }
        if let Some(lane) = connection.lane()
            && let Entry::Occupied(mut n) = self.of_lane.entry(lane)
        {
            *n.get_mut() -= 1;
            if *n.get() == 0 {
                n.remove();
            }
        }
        if let Some(slot) = self.slots.get_mut(index) {
            // Closing the socket's last descriptor removes it from the epoll.
            slot.connection = None;
            self.vacant.push(index);
            self.count -= 1;
        }
    }
}

/// The connection's next turn comes with one of these events. `false`: the epoll refuses.
fn wait(epoll: &OwnedFd, connection: &mut Connection, token: u64, interest: EventFlags) -> bool {
    let changed = std::mem::replace(&mut connection.interest, interest) != interest;
    !changed || epoll::modify(epoll, connection.fd(), epoll::EventData::new_u64(token), interest).is_ok()
}

/// The token of a connection's events.
fn token(index: usize, generation: u32) -> u64 {
    u64::from(generation) << 32 | index as u64
}

/// The connection with this token, unless it is gone.
fn find(slots: &mut [Slot], token: u64) -> Option<&mut Connection> {
    let slot = slots.get_mut(token as u32 as usize)?;
    slot.connection.as_deref_mut().filter(|_| u64::from(slot.generation) == token >> 32)
}

/// Whether the proof of the connection with this token is outstanding.
fn is_proving(slots: &mut [Slot], token: u64) -> bool {
    find(slots, token).is_some_and(|c| c.is_proving())
}
