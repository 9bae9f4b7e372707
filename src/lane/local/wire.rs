//! The two messages of the local lane's socket, in a fixed format. Both ends run on one host: numbers are little-endian, and
//! a message is one packet.
//!
//! ```text
//! request: magic[8] version:u32 0:u32 lane:u64 incarnation:u64 key[32]
//! reply:   magic[8] version:u32 status:u32 incarnation:u64 words:u64 slots:u32 files:u32 segments:u32 0:u32
//!          then, if status is 0, an address:u64 for each segment; else the reason, in UTF-8
//! ```
//! `key` is the lane's key, from the control plane. `words` is the address of the fence table and `slots` its length in words. With `files` = 1 the packet carries the
//! segments' memfds and, last, the fence table's. A later packet from the server, of any content, announces that it closes
//! the lane on purpose; a close without one means that the process died.

use kvferry_proto::{Incarnation, PoolLayout};

const MAGIC: [u8; 8] = *b"kvferryL";
const VERSION: u32 = 2;
const REPLY_HEAD: usize = 48;

/// Bytes of a request.
pub(super) const REQUEST: usize = 64;
/// Longest reply, in bytes.
pub(super) const MAX_REPLY: usize = REPLY_HEAD + PoolLayout::MAX_SEGMENTS * 8;
/// Longest reason of a refusal, in bytes.
const MAX_WHY: usize = 512;
/// Most files in one packet: the kernel's SCM_MAX_FD.
pub(super) const MAX_FILES: usize = 253;
/// The server's packet before it closes a lane on purpose.
pub(super) const BYE: &[u8] = b"bye";

/// A consumer's request.
#[derive(Clone, Copy, PartialEq, Eq)]
#[cfg_attr(test, derive(Debug))]
pub(super) struct Request {
    pub lane: u64,
    pub incarnation: u64,
    /// Proves that the control plane gave this lane to the sender. Never printed outside of tests.
    pub key: [u8; 32],
}

impl Request {
    pub(super) fn encode(self) -> [u8; REQUEST] {
        let mut b = [0; REQUEST];
        b[..8].copy_from_slice(&MAGIC);
        b[8..12].copy_from_slice(&VERSION.to_le_bytes());
        b[16..24].copy_from_slice(&self.lane.to_le_bytes());
        b[24..32].copy_from_slice(&self.incarnation.to_le_bytes());
        b[32..].copy_from_slice(&self.key);
        b
    }

    pub(super) fn decode(b: &[u8]) -> Result<Self, &'static str> {
        if b.len() != REQUEST {
            return Err("a request of the wrong length");
        }
        let mut r = Fields(b);
        r.head()?;
        r.u32()?;
        Ok(Self { lane: r.u64()?, incarnation: r.u64()?, key: r.take()? })
    }
}

/// The kind of a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Any other reason.
    Other = 1,
    /// The request names another incarnation.
    Restarted = 2,
}

/// A producer's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reply {
    Granted { incarnation: Incarnation, words: u64, slots: u32, files: bool, segments: Vec<u64> },
    Refused { refusal: Refusal, why: String },
}

impl Reply {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut b = Vec::with_capacity(REPLY_HEAD + 64);
        b.extend(MAGIC);
        b.extend(VERSION.to_le_bytes());
        match self {
            Self::Granted { incarnation, words, slots, files, segments } => {
                b.extend(0u32.to_le_bytes());
                b.extend(incarnation.get().to_le_bytes());
                b.extend(words.to_le_bytes());
                for n in [*slots, u32::from(*files), segments.len() as u32, 0] {
                    b.extend(n.to_le_bytes());
                }
                b.extend(segments.iter().flat_map(|s| s.to_le_bytes()));
            }
            Self::Refused { refusal, why } => {
                b.extend((*refusal as u32).to_le_bytes());
                b.resize(REPLY_HEAD, 0);
                b.extend(&why.as_bytes()[..why.len().min(MAX_WHY)]);
            }
        }
        b
    }

    pub(super) fn decode(b: &[u8]) -> Result<Self, &'static str> {
        let mut r = Fields(b);
        r.head()?;
        let (status, incarnation, words) = (r.u32()?, r.u64()?, r.u64()?);
        let (slots, files, segments, _) = (r.u32()?, r.u32()?, r.u32()?, r.u32()?);
        if status != 0 {
            if r.0.len() > MAX_WHY {
                return Err("a refusal that is too long");
            }
            let refusal = if status == Refusal::Restarted as u32 { Refusal::Restarted } else { Refusal::Other };
            // It goes into a log line: no control characters.
            let why = String::from_utf8_lossy(r.0).replace(char::is_control, " ");
            return Ok(Self::Refused { refusal, why });
        }
        if segments as usize > PoolLayout::MAX_SEGMENTS || r.0.len() != segments as usize * 8 {
            return Err("a reply of the wrong length");
        }
        let incarnation = Incarnation::from_wire(incarnation).ok_or("a reply without incarnation")?;
        let segments = (0..segments).map(|_| r.u64()).collect::<Result<_, _>>()?;
        Ok(Self::Granted { incarnation, words, slots, files: files == 1, segments })
    }
}

/// Reads fields off the front.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], &'static str> {
        let (front, rest) = self.0.split_first_chunk().ok_or("a message that is too short")?;
        self.0 = rest;
        Ok(*front)
    }

    fn u32(&mut self) -> Result<u32, &'static str> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, &'static str> {
        self.take().map(u64::from_le_bytes)
    }

    fn head(&mut self) -> Result<(), &'static str> {
        if self.take()? != MAGIC {
            return Err("a message without the magic of a local lane");
        }
        if self.u32()? != VERSION { Err("another version of the local lane") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn messages_survive_the_wire() {
        let q = Request { lane: 77, incarnation: u64::MAX, key: [9; 32] };
        assert_eq!(Request::decode(&q.encode()), Ok(q));
        let incarnation = Incarnation::random();
        for segments in [vec![], vec![1, u64::MAX], vec![7; PoolLayout::MAX_SEGMENTS]] {
            let r = Reply::Granted { incarnation, words: 4096, slots: 9, files: true, segments };
            assert!(r.encode().len() <= MAX_REPLY);
            assert_eq!(Reply::decode(&r.encode()), Ok(r));
        }
        let r = Reply::Refused { refusal: Refusal::Restarted, why: "so".into() };
        assert_eq!(Reply::decode(&r.encode()), Ok(r));
        let long = Reply::Refused { refusal: Refusal::Other, why: "ä".repeat(1000) };
        assert!(Reply::decode(&long.encode()).is_ok());
    }

    proptest! {
        #[test]
        fn malformed_messages_are_refused_without_a_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..200), like_a_reply: bool,
        ) {
            if like_a_reply && bytes.len() >= 12 {
                bytes[..8].copy_from_slice(&MAGIC);
                bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
            }
            let _ = Request::decode(&bytes);
            let _ = Reply::decode(&bytes);
        }
    }
}
