//! The control network: dials, streams, and frames that are lost, late, doubled and out of order.

use std::sync::Arc;

use kvferry_proto::{
    ClientBody, ClientFrame, HelloError, Mismatch, Model, PeerId, ServerBody, ServerFrame, hello::Welcome, session,
    table,
};

use crate::{
    trace::Micros,
    world::{Event, World, say},
};

/// A stream between a consumer's session and a producer's process.
pub(crate) struct Conn {
    pub consumer: usize,
    pub life: u64,
    pub producer: usize,
    pub proc: usize,
    pub stream: u64,
    pub from: Option<PeerId>,
    pub broken: bool,
    /// Carries nothing, without an error.
    pub dead: bool,
    /// When it was opened, until it is answered.
    pub opening: Option<Micros>,
    /// From then on it carries nothing, without an error.
    forgotten: Option<Micros>,
    last_up: Micros,
    last_down: Micros,
}

impl Conn {
    fn carries_nothing(&self, now: Micros) -> bool {
        self.dead || self.forgotten.is_some_and(|t| t <= now)
    }
}

/// How a dial ended.
#[derive(Debug, Clone)]
pub(crate) enum Answer {
    Welcome(usize, Arc<Welcome>),
    Failed(HelloError),
}

impl World {
    /// A consumer's session dials: its Hello arrives after a while.
    pub(crate) fn dial(&mut self, c: usize, p: usize) {
        let t = self.now + self.delay();
        let e = self.consumers[c].life;
        let since = self.now;
        if let Some(s) = self.consumers[c].session(p) {
            s.dialing = Some(since);
        }
        self.at(t, Event::Hello { c, e, p, since });
    }

    /// A Hello arrives at an address.
    pub(crate) fn hello(&mut self, c: usize, e: u64, p: usize, since: Micros) {
        let net = self.weather.net.clone();
        let addr = self.producers[p].addr.to_string();
        let timeout = self.weather.session.hello_timeout.as_micros() as Micros;
        let unreachable = |refused: bool| {
            let why = if refused { "connection refused" } else { "timed out" };
            Answer::Failed(HelloError::Unreachable { addr: addr.clone(), why: why.into(), refused })
        };
        // A stopped process answers once it continues. The network sends a lost packet again until its host is back.
        let proc = self.producers[p].proc;
        let nobody = proc.map_or(self.producers[p].dead_silent, |q| self.procs[q].stopped);
        if nobody && self.now < since + timeout {
            let t = self.now + 500;
            return self.at(t, Event::Hello { c, e, p, since });
        }
        let (wait, answer) = match proc {
            _ if self.rng.chance(net.dial_timeout) => (timeout, unreachable(false)),
            _ if self.rng.chance(net.dial_refused) => (0, unreachable(true)),
            _ if nobody => (0, unreachable(false)),
            None => (0, unreachable(true)),
            Some(_) if self.producers[p].wrong_model => {
                let other = Model { dtype: "u32".into(), ..self.model.clone() };
                let error = Model::matches(&self.model, &other).err().unwrap_or_else(|| Mismatch {
                    field: String::new(),
                    consumer: String::new(),
                    producer: String::new(),
                });
                (0, Answer::Failed(error.into()))
            }
            Some(q) => (0, Answer::Welcome(q, self.procs[q].welcome.clone())),
        };
        let t = self.now + wait + self.delay();
        self.at(t, Event::Dialed { c, e, p, answer });
    }

    /// The answer arrives.
    pub(crate) fn dialed(&mut self, c: usize, e: u64, p: usize, answer: Answer) {
        if self.consumers[c].life != e {
            return;
        }
        if let Some(s) = self.consumers[c].session(p) {
            s.dialing = None;
        }
        match answer {
            Answer::Welcome(q, welcome) => {
                say!(self, "consumer {c}: {} says it is process {q}", self.producers[p].addr);
                let peer = welcome.peer.clone();
                let Some(s) = self.consumers[c].session(p) else { return };
                s.welcome = Some((q, welcome));
                self.session(c, p, session::In::Welcomed(peer));
            }
            Answer::Failed(error) => {
                say!(self, "consumer {c}: {error}");
                if self.calm.is_none() {
                    self.excuse_peer(c, p, "a dial failed");
                }
                self.session(c, p, session::In::DialFailed(error));
            }
        }
    }

    /// Opens a stream on the connection that was dialled last.
    pub(crate) fn open(&mut self, c: usize, p: usize, stream: u64) {
        let life = self.consumers[c].life;
        let blackhole = self.weather.net.blackhole;
        let dead = self.rng.chance(blackhole);
        let forgets = self.weather.net.forgets;
        let forgotten = (forgets > 0).then(|| self.now + forgets / 2 + self.rng.below(forgets));
        let conn = self.conns.len();
        let Some(s) = self.consumers[c].session(p) else { return };
        let Some((proc, _)) = s.welcome else { return };
        if let Some(old) = s.conn.replace(conn) {
            self.conns[old].broken = true;
            self.server_forgets(old);
        }
        self.conns.push(Conn {
            consumer: c,
            life,
            producer: p,
            proc,
            stream,
            from: None,
            broken: false,
            dead,
            opening: Some(self.now),
            forgotten,
            last_up: 0,
            last_down: 0,
        });
        let breaks = self.weather.net.breaks;
        if breaks > 0 {
            let t = self.now + self.rng.below(2 * breaks);
            self.at(t, Event::Break { conn });
        }
        if !self.procs[proc].alive {
            let t = self.now + self.delay();
            self.at(t, Event::Break { conn });
        }
    }

    pub(crate) fn hang_up(&mut self, c: usize, p: usize) {
        if let Some(conn) = self.consumers[c].session(p).and_then(|s| s.conn.take()) {
            self.conns[conn].broken = true;
            self.server_forgets(conn);
        }
    }

    fn server_forgets(&mut self, conn: usize) {
        let q = self.conns[conn].proc;
        let closed = self.procs[q].sessions.iter().find(|(_, c)| **c == conn).map(|(consumer, _)| *consumer);
        if let Some(consumer) = closed {
            self.procs[q].sessions.remove(&consumer);
            if self.procs[q].alive {
                self.table(q, table::In::Closed(consumer));
            }
        }
    }

    pub(crate) fn send_to_server(&mut self, conn: usize, frame: ClientFrame) {
        let net = self.weather.net.clone();
        if self.rng.chance(net.loss) {
            return;
        }
        let copies = if self.rng.chance(net.dup) { 2 } else { 1 };
        for _ in 0..copies {
            let mut t = self.now + self.delay();
            if !self.rng.chance(net.reorder) {
                t = t.max(self.conns[conn].last_up + 1);
                self.conns[conn].last_up = t;
            }
            self.at(t, Event::ToServer { conn, frame: frame.clone() });
        }
    }

    pub(crate) fn send_to_client(&mut self, conn: usize, frame: ServerFrame) {
        let net = self.weather.net.clone();
        if self.conns[conn].broken || self.rng.chance(net.loss) {
            return;
        }
        let copies = if self.rng.chance(net.dup) { 2 } else { 1 };
        for _ in 0..copies {
            let mut t = self.now + self.delay();
            if !self.rng.chance(net.reorder) {
                t = t.max(self.conns[conn].last_down + 1);
                self.conns[conn].last_down = t;
            }
            self.at(t, Event::ToClient { conn, frame: frame.clone() });
        }
    }

    pub(crate) fn reach_server(&mut self, conn: usize, frame: ClientFrame) {
        let q = self.conns[conn].proc;
        if self.conns[conn].carries_nothing(self.now) || !self.procs[q].alive {
            return;
        }
        // A frame that was sent before a hang-up may still arrive, or not.
        if self.conns[conn].broken && self.rng.chance(500) {
            return;
        }
        if !matches!(frame.body, ClientBody::Ping(_)) {
            say!(self, "process {q} hears on {conn}: {frame:?}");
        }
        if self.procs[q].stopped {
            self.procs[q].inbox.push_back((conn, frame));
        } else {
            self.serve(conn, frame);
        }
    }

    pub(crate) fn reach_client(&mut self, conn: usize, frame: ServerFrame) {
        let k = &self.conns[conn];
        let (c, p, stream) = (k.consumer, k.producer, k.stream);
        if k.broken || k.carries_nothing(self.now) || self.consumers[c].life != k.life {
            return;
        }
        self.conns[conn].opening = None;
        if !matches!(frame.body, Some(ServerBody::Pong(_))) {
            say!(self, "consumer {c} hears on {conn}: {frame:?}");
        }
        self.session(c, p, session::In::Frame(stream, frame));
    }

    pub(crate) fn break_conn(&mut self, conn: usize) {
        if std::mem::replace(&mut self.conns[conn].broken, true) {
            return;
        }
        self.server_forgets(conn);
        let k = &self.conns[conn];
        let (c, p, stream) = (k.consumer, k.producer, k.stream);
        if self.consumers[c].life == k.life {
            say!(self, "consumer {c}: stream {stream} to {} breaks", self.producers[p].addr);
            self.session(c, p, session::In::Broken(stream));
        }
    }
}
