//! The two messages of the local lane's socket, in a fixed format. Both ends run on one host: numbers are little-endian, and
//! a message is one packet.
//!
//! ```text
//! request: magic[8] version:u32 gpu:u32 lane:u64 incarnation:u64 key[32] uuid[16]
//! reply:   magic[8] version:u32 status:u32 incarnation:u64 words:u64 slots:u32 files:u32 segments:u32 gpu:u32
//!          then, if status is not 0, the reason, in UTF-8;
//!          else, if gpu is 0, an address:u64 for each segment;
//!          else the description of GPU memory: see `exported.rs`
//! ```
//! `key` is the lane's key, from the control plane. `gpu` is 1 if the sender's pool is GPU memory, and `uuid` then names its
//! GPU. `words` is the address of the fence table and `slots` its length in words. With `files` = 1 the packet carries
//! descriptors: for host memory those of the segments' memfds, for GPU memory those that open allocations, and last, for
//! both, the fence table's memfd. GPU memory is described without addresses, and always with files.
//!
//! A later packet from the server, of any content, announces that it closes the lane on purpose; a close without one means
//! that the process died.

use kvferry_proto::{Incarnation, PoolLayout};

use super::exported::{self, GpuPool};

const MAGIC: [u8; 8] = *b"kvferryL";
const VERSION: u32 = 3;
const REPLY_HEAD: usize = 48;

/// Bytes of a request.
pub(super) const REQUEST: usize = 80;
/// Longest reply, in bytes. It fits the send buffer of a socket, 208 KiB by default.
pub(super) const MAX_REPLY: usize = REPLY_HEAD + exported::MAX_BYTES;
const _: () = assert!(PoolLayout::MAX_SEGMENTS * 8 <= exported::MAX_BYTES && MAX_REPLY < 160 << 10);
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
    /// UUID of the GPU that holds the sender's pool; `None`: host memory.
    pub gpu: Option<[u8; 16]>,
}

impl Request {
    pub(super) fn encode(self) -> [u8; REQUEST] {
        let mut b = [0; REQUEST];
        b[..8].copy_from_slice(&MAGIC);
        b[8..12].copy_from_slice(&VERSION.to_le_bytes());
        b[12..16].copy_from_slice(&u32::from(self.gpu.is_some()).to_le_bytes());
        b[16..24].copy_from_slice(&self.lane.to_le_bytes());
        b[24..32].copy_from_slice(&self.incarnation.to_le_bytes());
        b[32..64].copy_from_slice(&self.key);
        b[64..].copy_from_slice(&self.gpu.unwrap_or_default());
        b
    }

    pub(super) fn decode(b: &[u8]) -> Result<Self, &'static str> {
        let mut r = Fields(b);
        // First: a request of another version may have another length.
        r.head()?;
        if b.len() != REQUEST {
            return Err("a request of the wrong length");
        }
        let gpu = r.flag()?;
        let (lane, incarnation, key, uuid) = (r.u64()?, r.u64()?, r.take()?, r.take()?);
        Ok(Self { lane, incarnation, key, gpu: gpu.then_some(uuid) })
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
    /// Of a pool in host memory.
    Granted {
        incarnation: Incarnation,
        words: u64,
        slots: u32,
        files: bool,
        segments: Vec<u64>,
    },
    /// Of a pool in GPU memory, with this number of segments.
    GrantedGpu {
        incarnation: Incarnation,
        slots: u32,
        segments: u32,
        pool: GpuPool,
    },
    Refused {
        refusal: Refusal,
        why: String,
    },
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
            Self::GrantedGpu { incarnation, slots, segments, pool } => {
                b.extend(0u32.to_le_bytes());
                b.extend(incarnation.get().to_le_bytes());
                b.extend(0u64.to_le_bytes());
                for n in [*slots, 1, *segments, 1] {
                    b.extend(n.to_le_bytes());
                }
                pool.encode(&mut b);
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
        let (slots, files, segments, gpu) = (r.u32()?, r.flag()?, r.u32()?, r.flag()?);
        if status != 0 {
            if r.0.len() > MAX_WHY {
                return Err("a refusal that is too long");
            }
            let refusal = if status == Refusal::Restarted as u32 { Refusal::Restarted } else { Refusal::Other };
            // It goes into a log line: no control characters.
            let why = String::from_utf8_lossy(r.0).replace(char::is_control, " ");
            return Ok(Self::Refused { refusal, why });
        }
        let incarnation = Incarnation::from_wire(incarnation).ok_or("a reply without incarnation")?;
        if segments as usize > PoolLayout::MAX_SEGMENTS {
            return Err("a reply with too many segments");
        }
        if gpu {
            if !files || words != 0 {
                return Err("a reply with addresses in GPU memory");
            }
            let pool = GpuPool::decode(&mut r, segments)?;
            return if r.0.is_empty() {
                Ok(Self::GrantedGpu { incarnation, slots, segments, pool })
            } else {
                Err("a reply of the wrong length")
            };
        }
        if r.0.len() != segments as usize * 8 {
            return Err("a reply of the wrong length");
        }
        let segments = (0..segments).map(|_| r.u64()).collect::<Result<_, _>>()?;
        Ok(Self::Granted { incarnation, words, slots, files, segments })
    }
}

/// Reads fields off the front.
pub(super) struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    pub(super) fn take<const N: usize>(&mut self) -> Result<[u8; N], &'static str> {
        let (front, rest) = self.0.split_first_chunk().ok_or("a message that is too short")?;
        self.0 = rest;
        Ok(*front)
    }

    pub(super) fn u32(&mut self) -> Result<u32, &'static str> {
        self.take().map(u32::from_le_bytes)
    }

    fn flag(&mut self) -> Result<bool, &'static str> {
        match self.u32()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err("a flag that is neither 0 nor 1"),
        }
    }

    pub(super) fn u64(&mut self) -> Result<u64, &'static str> {
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
        for gpu in [None, Some([5; 16])] {
            let q = Request { lane: 77, incarnation: u64::MAX, key: [9; 32], gpu };
            assert_eq!(Request::decode(&q.encode()), Ok(q));
        }
        let incarnation = Incarnation::random();
        for segments in [vec![], vec![1, u64::MAX], vec![7; PoolLayout::MAX_SEGMENTS]] {
            let r = Reply::Granted { incarnation, words: 4096, slots: 9, files: true, segments };
            assert!(r.encode().len() <= MAX_REPLY);
            assert_eq!(Reply::decode(&r.encode()), Ok(r));
        }
        let pool = GpuPool::sample();
        let r = Reply::GrantedGpu { incarnation, slots: 9, segments: 4, pool };
        assert_eq!(Reply::decode(&r.encode()), Ok(r));
        let pool = GpuPool::longest();
        let r = Reply::GrantedGpu { incarnation, slots: 9, segments: PoolLayout::MAX_SEGMENTS as u32, pool };
        assert_eq!(r.encode().len(), MAX_REPLY);
        assert_eq!(Reply::decode(&r.encode()), Ok(r));
        let r = Reply::Refused { refusal: Refusal::Restarted, why: "so".into() };
        assert_eq!(Reply::decode(&r.encode()), Ok(r));
        let long = Reply::Refused { refusal: Refusal::Other, why: "ä".repeat(1000) };
        assert!(Reply::decode(&long.encode()).is_ok());
    }

    #[test]
    fn a_request_of_another_version_is_called_that() {
        let mut other = Request { lane: 1, incarnation: 1, key: [0; 32], gpu: None }.encode()[..64].to_vec();
        other[8] = 2;
        assert_eq!(Request::decode(&other), Err("another version of the local lane"));
    }

    #[test]
    fn flags_and_lengths_that_make_no_sense_are_refused() {
        let q = Request { lane: 1, incarnation: 1, key: [0; 32], gpu: Some([1; 16]) }.encode();
        let incarnation = Incarnation::random();
        let r = Reply::GrantedGpu { incarnation, slots: 1, segments: 4, pool: GpuPool::sample() }.encode();
        let with = |message: &[u8], at: usize, to: u8| {
            let mut changed = message.to_vec();
            changed[at] = to;
            changed
        };
        assert!(Request::decode(&with(&q, 12, 2)).is_err(), "gpu");
        assert!(Reply::decode(&with(&r, 24, 1)).is_err(), "an address of the words");
        assert!(Reply::decode(&with(&r, 36, 0)).is_err(), "no files");
        assert!(Reply::decode(&with(&r, 36, 2)).is_err(), "files");
        assert!(Reply::decode(&with(&r, 40, 3)).is_err(), "parts of a segment past the last");
        assert!(Reply::decode(&with(&r, 44, 0)).is_err(), "gpu");
        for len in 0..r.len() {
            assert!(Reply::decode(&r[..len]).is_err(), "{len} bytes");
        }
        assert!(Reply::decode(&[&r[..], &[0]].concat()).is_err(), "a byte more");
    }

    proptest! {
        #[test]
        fn changed_bytes_of_a_reply_never_make_a_part_leave_its_allocation(
            changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
        ) {
            let incarnation = Incarnation::random();
            let mut r = Reply::GrantedGpu { incarnation, slots: 1, segments: 4, pool: GpuPool::sample() }.encode();
            for (at, to) in changes {
                // The head is checked above.
                let at = 32 + at.index(r.len() - 32);
                r[at] = to;
            }
            if let Ok(Reply::GrantedGpu { segments, pool, .. }) = Reply::decode(&r) {
                for p in pool.parts {
                    prop_assert!(u32::from(p.segment) < segments);
                    let size = pool.allocations[p.allocation as usize].1;
                    prop_assert!(p.len > 0 && p.offset.checked_add(p.len).is_some_and(|end| end <= size));
                }
            }
        }

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
