//! The frames of a data connection: fixed sizes, little endian, no I/O, no allocation. Any bytes decode to a frame or to
//! [`BadFrame`], without a panic. See [the module](super) for the order of frames.

use super::sum::sum;

/// The magic of a challenge and of an answer.
const HELLO: u32 = u32::from_le_bytes(*b"KVFd");
/// The magic of a request.
const REQUEST: u32 = u32::from_le_bytes(*b"KVFq");
/// The magic of a reply.
const REPLY: u32 = u32::from_le_bytes(*b"KVFr");
/// Version of these frames.
const VERSION: u32 = 2;
/// Length of the checksum that ends a request, a reply's head and its trailer, in bytes.
pub(super) const SUM: usize = 8;

/// Most entries of a request: 2 MiB, the most that a producer buffers for one connection.
pub(super) const MAX_ENTRIES: u32 = 1 << 16;
/// Most blocks of a request, over all entries: each costs the producer a lookup.
pub(super) const MAX_BLOCKS: u64 = 1 << 20;
/// Most contiguous pieces of the producer's memory in the reply to a request.
pub(super) const MAX_PIECES: usize = 1 << 16;

/// Bytes that are not a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadFrame {
    /// A wrong magic: another protocol, or a stream out of step.
    #[error("the frame begins with a wrong magic")]
    Magic,
    /// Another version of the protocol.
    #[error("version {0} of the data protocol; this side speaks version {VERSION}")]
    Version(u32),
    /// A field is out of range.
    #[error("{0} is out of range")]
    Field(&'static str),
    /// The frame was changed on its way.
    #[error("the frame's checksum does not match: the network changes bytes")]
    Sum,
}

/// The options that a side offers for a connection. An option is in force if both sides want it. Both proofs cover both
/// sides' options, so a change on the way turns none off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Options(u32);

impl Options {
    /// `sums`: checksum the data of every reply.
    pub(super) fn new(sums: bool) -> Self {
        Self(u32::from(sums))
    }

    /// The options that both sides want.
    pub(super) fn both(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether the data of every reply is checksummed.
    pub(super) fn sums(self) -> bool {
        self.0 & 1 != 0
    }

    pub(super) fn to_le_bytes(self) -> [u8; 4] {
        self.0.to_le_bytes()
    }
}

/// First frame, from the producer: an input of the proof.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Challenge {
    /// The producer's options.
    pub options: Options,
    /// Random, new for every connection.
    pub random: [u8; 32],
}

/// Second frame, from the consumer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Proof {
    /// The lane, as `ConnectLane` named it.
    pub lane: u64,
    /// The consumer's options.
    pub options: Options,
    /// Random, new for every connection: an input of the producer's proof.
    pub random: [u8; 32],
    /// See [`super::handshake::Keyed::consumer`].
    pub mac: [u8; 32],
}

/// Third frame, from the producer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Answer {
    /// The verdict on the proof.
    pub verdict: Verdict,
    /// See [`super::handshake::Keyed::producer`]; zeros unless the verdict is `Welcome`.
    pub mac: [u8; 32],
}

/// A producer's verdict on a proof.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The consumer may send requests.
    Welcome,
    /// The proof is wrong, or the lane is not admitted.
    Refused,
    /// The producer, or the lane, is at its limit of connections.
    Full,
    /// The proof did not come in time.
    TooLate,
}

/// A request for pieces of blocks: `count` entries follow, then a checksum of all bytes before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    /// Entries that follow; 1 to [`MAX_ENTRIES`].
    pub count: u32,
    /// Repeated in the reply; opaque to the producer.
    pub tag: u64,
    /// The nonce of the grant.
    pub nonce: u64,
    /// The slot of the grant.
    pub slot: u32,
}

/// One run of a request: the same piece of each of some consecutive blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    /// The group.
    pub group: u16,
    /// Index into the producer's regions of the group.
    pub region: u16,
    /// First position.
    pub position: u32,
    /// Number of consecutive positions.
    pub blocks: u32,
    /// Offset of the piece in each block, in bytes.
    pub within: u64,
    /// Length of the piece, in bytes.
    pub piece: u64,
}

/// The status of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    /// `total` bytes follow, then a [`Trailer`].
    Ok,
    /// No live offer has that slot and nonce. No data follows.
    Stale,
    /// An entry names blocks outside of the offer or the pool. No data follows.
    OutOfBounds,
}

/// Head of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reply {
    /// The status; data follows only [`Status::Ok`].
    pub status: Status,
    /// The request's tag.
    pub tag: u64,
    /// Bytes of data that follow.
    pub total: u64,
}

/// End of a reply with data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Trailer {
    /// The request's tag.
    pub tag: u64,
    /// The fence word, as it was after the last byte had been copied.
    pub word: u64,
    /// Checksum of the data, as it was copied; 0 unless both sides want it.
    pub data: u64,
}

impl Challenge {
    /// Length of the frame, in bytes.
    pub(super) const LEN: usize = 44;

    /// The frame's bytes.
    pub(super) fn encode(&self) -> [u8; Self::LEN] {
        let mut b = [0; Self::LEN];
        put(&mut b, 0, HELLO.to_le_bytes());
        put(&mut b, 4, VERSION.to_le_bytes());
        put(&mut b, 8, self.options.to_le_bytes());
        put(&mut b, 12, self.random);
        b
    }

    /// Decodes the frame.
    pub(super) fn decode(b: &[u8; Self::LEN]) -> Result<Self, BadFrame> {
        if u32_at(b, 0) != HELLO {
            return Err(BadFrame::Magic);
        }
        match u32_at(b, 4) {
            VERSION => Ok(Self { options: Options(u32_at(b, 8)), random: get(b, 12) }),
            other => Err(BadFrame::Version(other)),
        }
    }
}

impl Proof {
    /// Length of the frame, in bytes.
    pub(super) const LEN: usize = 76;

    /// The frame's bytes.
    pub(super) fn encode(&self) -> [u8; Self::LEN] {
        let mut b = [0; Self::LEN];
        put(&mut b, 0, self.lane.to_le_bytes());
        put(&mut b, 8, self.options.to_le_bytes());
        put(&mut b, 12, self.random);
        put(&mut b, 44, self.mac);
        b
    }

    /// Decodes the frame. Any bytes are a frame; the proof itself is checked separately.
    pub(super) fn decode(b: &[u8; Self::LEN]) -> Self {
        Self { lane: u64_at(b, 0), options: Options(u32_at(b, 8)), random: get(b, 12), mac: get(b, 44) }
    }
}

impl Answer {
    /// Length of the frame, in bytes.
    pub(super) const LEN: usize = 40;

    /// The frame's bytes.
    pub(super) fn encode(&self) -> [u8; Self::LEN] {
        let code: u32 = match self.verdict {
            Verdict::Welcome => 0,
            Verdict::Refused => 1,
            Verdict::Full => 2,
            Verdict::TooLate => 3,
        };
        let mut b = [0; Self::LEN];
        put(&mut b, 0, HELLO.to_le_bytes());
        put(&mut b, 4, code.to_le_bytes());
        put(&mut b, 8, self.mac);
        b
    }

    /// Decodes the frame.
    pub(super) fn decode(b: &[u8; Self::LEN]) -> Result<Self, BadFrame> {
        if u32_at(b, 0) != HELLO {
            return Err(BadFrame::Magic);
        }
        let verdict = match u32_at(b, 4) {
            0 => Verdict::Welcome,
            1 => Verdict::Refused,
            2 => Verdict::Full,
            3 => Verdict::TooLate,
            _ => return Err(BadFrame::Field("verdict")),
        };
        Ok(Self { verdict, mac: get(b, 8) })
    }
}

impl Request {
    /// Length of the header, in bytes.
    pub(super) const LEN: usize = 32;

    /// The header's bytes.
    pub(super) fn encode(&self) -> [u8; Self::LEN] {
        let mut b = [0; Self::LEN];
        put(&mut b, 0, REQUEST.to_le_bytes());
        put(&mut b, 4, self.count.to_le_bytes());
        put(&mut b, 8, self.tag.to_le_bytes());
        put(&mut b, 16, self.nonce.to_le_bytes());
        put(&mut b, 24, self.slot.to_le_bytes());
        b
    }

    /// Decodes the header.
    pub(super) fn decode(b: &[u8; Self::LEN]) -> Result<Self, BadFrame> {
        if u32_at(b, 0) != REQUEST {
            return Err(BadFrame::Magic);
        }
        let count = u32_at(b, 4);
        if count == 0 || count > MAX_ENTRIES {
            return Err(BadFrame::Field("number of entries"));
        }
        if u32_at(b, 28) != 0 {
            return Err(BadFrame::Field("reserved"));
        }
        Ok(Self { count, tag: u64_at(b, 8), nonce: u64_at(b, 16), slot: u32_at(b, 24) })
    }
}

impl Entry {
    /// Length of an entry, in bytes.
    pub(super) const LEN: usize = 32;

    /// The entry's bytes.
    pub(super) fn encode(&self) -> [u8; Self::LEN] {
        let mut b = [0; Self::LEN];
        put(&mut b, 0, self.group.to_le_bytes());
        put(&mut b, 2, self.region.to_le_bytes());
        put(&mut b, 4, self.position.to_le_bytes());
        put(&mut b, 8, self.blocks.to_le_bytes());
        put(&mut b, 16, self.within.to_le_bytes());
        put(&mut b, 24, self.piece.to_le_bytes());
        b
    }

    /// Decodes an entry. [`super::gather`] checks it against the producer's tables.
    pub(super) fn decode(b: &[u8; Self::LEN]) -> Result<Self, BadFrame> {
        if u32_at(b, 12) != 0 {
            return Err(BadFrame::Field("reserved"));
        }
        Ok(Self {
            group: u16::from_le_bytes(get(b, 0)),
            region: u16::from_le_bytes(get(b, 2)),
            position: u32_at(b, 4),
            blocks: u32_at(b, 8),
            within: u64_at(b, 16),
            piece: u64_at(b, 24),
        })
    }
}

/// Ends a request's bytes, which begin at `from`, with their checksum. Returns the checksum.
pub(super) fn seal_request(out: &mut Vec<u8>, from: usize) -> u64 {
    let sum = sum(&out[from..], 0);
    out.extend_from_slice(&sum.to_le_bytes());
    sum
}

/// The checksum of a whole request, if it matches.
pub(super) fn check_request(b: &[u8]) -> Result<u64, BadFrame> {
    let Some((bytes, &end)) = b.split_last_chunk::<SUM>() else { return Err(BadFrame::Sum) };
    let sum = sum(bytes, 0);
    if sum == u64::from_le_bytes(end) { Ok(sum) } else { Err(BadFrame::Sum) }
}

impl Reply {
    /// Length of the header, in bytes.
    pub(super) const LEN: usize = 24 + SUM;

    /// The header's bytes, in reply to the request with this checksum.
    pub(super) fn encode(&self, request: u64) -> [u8; Self::LEN] {
        let status: u32 = match self.status {
            Status::Ok => 0,
            Status::Stale => 1,
            Status::OutOfBounds => 2,
        };
        let mut b = [0; Self::LEN];
        put(&mut b, 0, REPLY.to_le_bytes());
        put(&mut b, 4, status.to_le_bytes());
        put(&mut b, 8, self.tag.to_le_bytes());
        put(&mut b, 16, self.total.to_le_bytes());
        let sum = sum(&b[..24], request);
        put(&mut b, 24, sum.to_le_bytes());
        b
    }

    /// Decodes the header of the reply to the request with this checksum.
    pub(super) fn decode(b: &[u8; Self::LEN], request: u64) -> Result<Self, BadFrame> {
        if u32_at(b, 0) != REPLY {
            return Err(BadFrame::Magic);
        }
        if u64_at(b, 24) != sum(&b[..24], request) {
            return Err(BadFrame::Sum);
        }
        let status = match u32_at(b, 4) {
            0 => Status::Ok,
            1 => Status::Stale,
            2 => Status::OutOfBounds,
            _ => return Err(BadFrame::Field("status")),
        };
        Ok(Self { status, tag: u64_at(b, 8), total: u64_at(b, 16) })
    }
}

impl Trailer {
    /// Length of the trailer, in bytes.
    pub(super) const LEN: usize = 24 + SUM;

    /// The trailer's bytes, in reply to the request with this checksum.
    pub(super) fn encode(&self, request: u64) -> [u8; Self::LEN] {
        let mut b = [0; Self::LEN];
        put(&mut b, 0, self.tag.to_le_bytes());
        put(&mut b, 8, self.word.to_le_bytes());
        put(&mut b, 16, self.data.to_le_bytes());
        let sum = sum(&b[..24], request);
        put(&mut b, 24, sum.to_le_bytes());
        b
    }

    /// Decodes the trailer of the reply to the request with this checksum.
    pub(super) fn decode(b: &[u8; Self::LEN], request: u64) -> Result<Self, BadFrame> {
        if u64_at(b, 24) != sum(&b[..24], request) {
            return Err(BadFrame::Sum);
        }
        Ok(Self { tag: u64_at(b, 0), word: u64_at(b, 8), data: u64_at(b, 16) })
    }
}

/// `b[at..at + N]`. Every caller's offset is a constant inside a frame of fixed length.
fn get<const N: usize>(b: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&b[at..at + N]);
    out
}

fn put<const N: usize>(b: &mut [u8], at: usize, v: [u8; N]) {
    b[at..at + N].copy_from_slice(&v);
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(get(b, at))
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(get(b, at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Random bytes, half of them behind a valid magic, so that decoders read past it.
    fn bytes<const N: usize>(magic: u32) -> impl Strategy<Value = [u8; N]> {
        (proptest::collection::vec(any::<u8>(), N), any::<bool>()).prop_map(move |(v, begin)| {
            let mut b: [u8; N] = get(&v, 0);
            if begin {
                put(&mut b, 0, magic.to_le_bytes());
            }
            b
        })
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_frame_or_an_error(
            challenge in bytes(HELLO), proof in bytes(HELLO), answer in bytes(HELLO), request in bytes(REQUEST),
            entry in bytes(0), reply in bytes(REPLY), trailer in bytes(0),
        ) {
            let _ = (Challenge::decode(&challenge), Answer::decode(&answer), Entry::decode(&entry));
            let _ = (Reply::decode(&reply, 0), Trailer::decode(&trailer, 0));
            if let Ok(r) = Request::decode(&request) {
                prop_assert!(r.count >= 1 && r.count <= MAX_ENTRIES);
            }
            prop_assert_eq!(Proof::decode(&proof).encode(), proof);
        }

        #[test]
        fn every_frame_decodes_as_it_was_encoded(
            count in 1..=MAX_ENTRIES, tag: u64, nonce: u64, slot: u32, group: u16, region: u16, position: u32,
            blocks: u32, within: u64, piece: u64, total: u64, random: [u8; 32], sums: bool, sum: u64,
        ) {
            let request = Request { count, tag, nonce, slot };
            prop_assert_eq!(Request::decode(&request.encode()), Ok(request));
            let entry = Entry { group, region, position, blocks, within, piece };
            prop_assert_eq!(Entry::decode(&entry.encode()), Ok(entry));
            for status in [Status::Ok, Status::Stale, Status::OutOfBounds] {
                let reply = Reply { status, tag, total };
                prop_assert_eq!(Reply::decode(&reply.encode(sum), sum), Ok(reply));
                prop_assert_eq!(Reply::decode(&reply.encode(sum), !sum), Err(BadFrame::Sum));
            }
            let trailer = Trailer { tag, word: nonce, data: total };
            prop_assert_eq!(Trailer::decode(&trailer.encode(sum), sum), Ok(trailer));
            prop_assert_eq!(Trailer::decode(&trailer.encode(sum), !sum), Err(BadFrame::Sum));
            let challenge = Challenge { options: Options::new(sums), random };
            prop_assert_eq!(Challenge::decode(&challenge.encode()), Ok(challenge));
            for verdict in [Verdict::Welcome, Verdict::Refused, Verdict::Full, Verdict::TooLate] {
                let answer = Answer { verdict, mac: random };
                prop_assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
            }
        }
    }

    #[test]
    fn a_frame_with_any_bit_flipped_is_refused() {
        let mut request = Request { count: 1, tag: 7, nonce: 8, slot: 9 }.encode().to_vec();
        let entry = Entry { group: 1, region: 2, position: 3, blocks: 4, within: 5, piece: 6 };
        request.extend_from_slice(&entry.encode());
        let sum = seal_request(&mut request, 0);
        assert_eq!(check_request(&request), Ok(sum));
        let reply = Reply { status: Status::Ok, tag: 7, total: 24 }.encode(sum);
        let trailer = Trailer { tag: 7, word: 8, data: 0 }.encode(sum);
        for bit in 0..request.len() * 8 {
            request[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(check_request(&request), Err(BadFrame::Sum), "bit {bit}");
            request[bit / 8] ^= 1 << (bit % 8);
        }
        for bit in 0..Reply::LEN * 8 {
            let (mut r, mut t) = (reply, trailer);
            r[bit / 8] ^= 1 << (bit % 8);
            t[bit / 8] ^= 1 << (bit % 8);
            assert!(Reply::decode(&r, sum).is_err(), "bit {bit}");
            assert_eq!(Trailer::decode(&t, sum), Err(BadFrame::Sum), "bit {bit}");
        }
    }

    #[test]
    fn another_version_is_named() {
        let mut b = Challenge { options: Options::default(), random: [7; 32] }.encode();
        b[4] = 9;
        assert_eq!(Challenge::decode(&b), Err(BadFrame::Version(9)));
        b[0] ^= 1;
        assert_eq!(Challenge::decode(&b), Err(BadFrame::Magic));
    }
}
