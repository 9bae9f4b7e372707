//! The consumer's half of the handshake: it connects, over TLS where there are certificates, proves that it has the lane's
//! key, and checks the producer's proof.
//!
//! The whole handshake has one time limit.

use std::{io, net::SocketAddr, os::fd::OwnedFd, time::Duration};

use kvferry_proto::Incarnation;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{
    frames::{Answer, Challenge, Options, Proof, Verdict},
    handshake::{Key, Keyed},
    options::tune,
    tls::{Opener, Pause},
};
use crate::{
    lane::LaneError,
    tls::{Protocol, TlsIdentity},
};

/// Longest time for a connection and its handshake.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A connection that is ready for requests. It does not block, and is registered with no runtime.
pub(super) struct Dialed {
    pub(super) fd: OwnedFd,
    /// The options that both sides want.
    pub(super) options: Options,
    pub(super) tls: Option<Box<Opener>>,
}

/// Connects.
pub(super) async fn dial(
    addr: SocketAddr,
    lane: u64,
    key: &Key,
    incarnation: Incarnation,
    options: Options,
    tls: Option<&TlsIdentity>,
) -> Result<Dialed, LaneError> {
    match tokio::time::timeout(TIMEOUT, shake_hands(addr, lane, key, incarnation, options, tls)).await {
        Ok(result) => result,
        Err(_) => Err(LaneError::Silent { after: TIMEOUT }),
    }
}

async fn shake_hands(
    addr: SocketAddr,
    lane: u64,
    key: &Key,
    incarnation: Incarnation,
    options: Options,
    tls: Option<&TlsIdentity>,
) -> Result<Dialed, LaneError> {
    let connect = |source: io::Error| LaneError::Connect { to: addr.to_string(), source };
    let refused = |why: &str| Err(LaneError::Refused { why: format!("{addr}: {why}") });

    let stream = TcpStream::connect(addr).await.map_err(connect)?;
    let mut stream = Stream { addr, stream, tls: None };
    if let Some(tls) = tls {
        stream.begin_tls(tls).await?;
    }
    let bytes = stream.read().await?;
    let challenge = Challenge::decode(&bytes).map_err(|e| LaneError::protocol(e.to_string()))?;

    let mut random = [0; 32];
    getrandom::fill(&mut random).map_err(|e| LaneError::io("random bytes")(io::Error::other(e)))?;
    let keyed = Keyed { key, challenge: &challenge, options, random: &random, lane, incarnation };
    stream.write(&Proof { lane, options, random, mac: keyed.consumer() }.encode()).await?;

    let bytes = stream.read().await?;
    let answer = Answer::decode(&bytes).map_err(|e| LaneError::protocol(e.to_string()))?;
    match answer.verdict {
        Verdict::Welcome if keyed.is_producer(&answer.mac) => {}
        Verdict::Welcome => return refused("it does not have this lane's key: another process has taken the port"),
        Verdict::Refused => {
            return refused(
                "it does not know this lane: it has restarted, or the session has ended, or the network changed the handshake",
            );
        }
        Verdict::Full => {
            return refused("it, or this lane, is at its limit of data connections: raise limits.lanes there");
        }
        Verdict::TooLate => {
            return refused("the proof came too late: this host is overloaded, or the network is slow");
        }
    }
    let Stream { stream, tls, .. } = stream;
    let stream = stream.into_std().map_err(connect)?;
    tune(&stream).map_err(connect)?;
    Ok(Dialed { fd: stream.into(), options: options.both(challenge.options), tls })
}

/// A connection during the handshake.
struct Stream {
    addr: SocketAddr,
    stream: TcpStream,
    tls: Option<Box<Opener>>,
}

impl Stream {
    fn broken(&self, source: io::Error) -> LaneError {
        LaneError::Connect { to: self.addr.to_string(), source }
    }

    fn refused(&self, why: &rustls::Error) -> LaneError {
        LaneError::Tls { to: self.addr.to_string(), why: why.to_string() }
    }

    async fn begin_tls(&mut self, identity: &TlsIdentity) -> Result<(), LaneError> {
        let name = identity.server_name().map_err(LaneError::protocol)?;
        let tls = Opener::new(identity.client(Protocol::Lane), name).map_err(|e| self.refused(&e))?;
        self.tls = Some(Box::new(tls));
        while self.tls.as_ref().is_some_and(|tls| tls.is_handshaking()) {
            self.turn(true).await?;
        }
        // The last flight.
        self.turn(false).await
    }

    /// Opens the received records, sends the answers of TLS to them, and then receives more if `more`.
    async fn turn(&mut self, more: bool) -> Result<(), LaneError> {
        let Some(mut tls) = self.tls.take() else { return Ok(()) };
        let opened = tls.open(|bytes, rest| rest.extend_from_slice(bytes));
        // Before the error: the alert says why.
        let sent = self.stream.write_all(&tls.sealed).await;
        tls.sealed.clear();
        if opened.map_err(|e| self.refused(&e))? == Pause::Closed {
            return Err(self.broken(io::ErrorKind::UnexpectedEof.into()));
        }
        sent.map_err(|e| self.broken(e))?;
        if more && tls.rest.is_empty() {
            let n = self.stream.read(tls.room()).await.map_err(|e| self.broken(e))?;
            if n == 0 {
                let closed =
                    "the peer closed the connection: is it at its limit (limits.lanes), and has it certificates?";
                return Err(LaneError::Tls { to: self.addr.to_string(), why: closed.into() });
            }
            tls.received(n);
        }
        self.tls = Some(tls);
        Ok(())
    }

    async fn read<const N: usize>(&mut self) -> Result<[u8; N], LaneError> {
        if self.tls.is_none() {
            let mut bytes = [0; N];
            self.stream.read_exact(&mut bytes).await.map_err(|e| self.broken(e))?;
            return Ok(bytes);
        }
        loop {
            if let Some(tls) = &mut self.tls
                && let Some(&bytes) = tls.rest.first_chunk()
            {
                tls.rest.drain(..N);
                return Ok(bytes);
            }
            self.turn(true).await?;
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), LaneError> {
        let Some(tls) = &mut self.tls else {
            return self.stream.write_all(bytes).await.map_err(|e| self.broken(e));
        };
        tls.seal(bytes).map_err(|e| self.refused(&e))?;
        self.turn(false).await
    }
}
