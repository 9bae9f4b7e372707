//! The consumer's half of the handshake: it connects, proves that it has the lane's key, and checks the producer's proof.
//!
//! Bounded in time as a whole, whatever the other side sends.

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
};
use crate::lane::LaneError;

/// Longest time for a connection and its handshake.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A connection that is ready for requests, and the options that both sides want. It does not block, and is registered with
/// no runtime.
pub(super) async fn dial(
    addr: SocketAddr,
    lane: u64,
    key: &Key,
    incarnation: Incarnation,
    options: Options,
) -> Result<(OwnedFd, Options), LaneError> {
    match tokio::time::timeout(TIMEOUT, shake_hands(addr, lane, key, incarnation, options)).await {
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
) -> Result<(OwnedFd, Options), LaneError> {
    let connect = |source: io::Error| LaneError::Connect { to: addr.to_string(), source };
    let refused = |why: &str| Err(LaneError::Refused { why: format!("{addr}: {why}") });

    let mut stream = TcpStream::connect(addr).await.map_err(connect)?;
    let mut bytes = [0; Challenge::LEN];
    stream.read_exact(&mut bytes).await.map_err(connect)?;
    let challenge = Challenge::decode(&bytes).map_err(|e| LaneError::protocol(e.to_string()))?;

    let mut random = [0; 32];
    getrandom::fill(&mut random).map_err(|e| LaneError::io("random bytes")(io::Error::other(e)))?;
    let keyed = Keyed { key, challenge: &challenge, options, random: &random, lane, incarnation };
    stream.write_all(&Proof { lane, options, random, mac: keyed.consumer() }.encode()).await.map_err(connect)?;

    let mut bytes = [0; Answer::LEN];
    stream.read_exact(&mut bytes).await.map_err(connect)?;
    let answer = Answer::decode(&bytes).map_err(|e| LaneError::protocol(e.to_string()))?;
    match answer.verdict {
        Verdict::Welcome if keyed.is_producer(&answer.mac) => {}
        Verdict::Welcome => return refused("it does not have this lane's key: another process has taken the port"),
        Verdict::Refused => {
            return refused(
                "it does not know this lane: it has restarted, or the session has ended, or the network changed the handshake",
            );
        }
        Verdict::Full => return refused("it is at its limit of data connections: raise limits.lanes there"),
        Verdict::TooLate => {
            return refused("the proof came too late: this host is overloaded, or the network is slow");
        }
    }
    let stream = stream.into_std().map_err(connect)?;
    tune(&stream).map_err(connect)?;
    Ok((stream.into(), options.both(challenge.options)))
}
