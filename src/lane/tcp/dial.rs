//! The consumer's half of the handshake: connects, proves itself, and has the producer prove itself.
//!
//! Bounded in time as a whole, whatever the other side does or does not send.

use std::{io, net::SocketAddr, os::fd::OwnedFd, time::Duration};

use kvferry_proto::block::Incarnation;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{
    frames::{Answer, Challenge, Proof, Verdict},
    handshake::{Key, Keyed},
};
use crate::lane::LaneError;

/// Longest time for a connection and its handshake.
pub(super) const TIMEOUT: Duration = Duration::from_secs(5);

/// A connection that is ready for requests. It does not block, and no runtime knows of it any more.
pub(super) async fn dial(
    addr: SocketAddr,
    lane: u64,
    key: &Key,
    incarnation: Incarnation,
) -> Result<OwnedFd, LaneError> {
    match tokio::time::timeout(TIMEOUT, shake_hands(addr, lane, key, incarnation)).await {
        Ok(result) => result,
        Err(_) => Err(LaneError::Silent { after: TIMEOUT }),
    }
}

async fn shake_hands(addr: SocketAddr, lane: u64, key: &Key, incarnation: Incarnation) -> Result<OwnedFd, LaneError> {
    let connect = |source: io::Error| LaneError::Connect { to: addr.to_string(), source };
    let refused = |why: &str| Err(LaneError::Refused { why: format!("{addr}: {why}") });

    let mut stream = TcpStream::connect(addr).await.map_err(connect)?;
    let mut bytes = [0; Challenge::LEN];
    stream.read_exact(&mut bytes).await.map_err(connect)?;
    let challenge = Challenge::decode(&bytes).map_err(|e| LaneError::protocol(e.to_string()))?;

    let mut random = [0; 32];
    getrandom::fill(&mut random).map_err(|e| LaneError::io("random bytes")(io::Error::other(e)))?;
    let keyed = Keyed { key, challenge: &challenge, random: &random, lane, incarnation };
    stream.write_all(&Proof { lane, random, mac: keyed.consumer() }.encode()).await.map_err(connect)?;

    let mut bytes = [0; Answer::LEN];
    stream.read_exact(&mut bytes).await.map_err(connect)?;
    let answer = Answer::decode(&bytes).map_err(|e| LaneError::protocol(e.to_string()))?;
    match answer.verdict {
        Verdict::Welcome if keyed.is_producer(&answer.mac) => {}
        Verdict::Welcome => return refused("it has not this lane's key: another process has taken the port"),
        Verdict::Refused => return refused("it does not know this lane: it was restarted, or the session ended"),
        Verdict::Full => return refused("it has as many data connections as it may: raise limits.lanes there"),
        Verdict::TooLate => {
            return refused("the proof came too late: this host is overloaded, or the network slow");
        }
    }
    let stream = stream.into_std().map_err(connect)?;
    super::tune(&stream).map_err(connect)?;
    Ok(stream.into())
}
