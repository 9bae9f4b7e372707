//! TLS 1.3 of a data connection, driven by hand: no task and no thread of its own. It never blocks, and buffers at most about
//! a megabyte for each connection.
//!
//! Both sides see every byte that was changed on its way: such a record ends the connection.

use std::{
    io::{self, Read as _, Write},
    os::fd::BorrowedFd,
    sync::Arc,
};

use rustix::{
    io::Errno,
    net::{RecvFlags, SendAncillaryBuffer, SendFlags},
};
use rustls::{
    AlertDescription, ClientConfig, ServerConfig, ServerConnection,
    client::UnbufferedClientConnection,
    pki_types::ServerName,
    unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus},
};

use crate::memory::{Memory, Span};

/// Bytes of one record: a record is copied out of the pool as a whole.
const RECORD: usize = 16 << 10;
/// Sealed bytes that a producer holds for a socket without room.
const SEALED: usize = 512 << 10;
/// A consumer's buffer of received records: enough that a call for more is rare, and small enough for the second-level cache.
const RECEIVED: usize = 256 << 10;

/// The producer's end.
pub(super) struct Sealer {
    tls: ServerConnection,
    piece: Box<[u8]>,
}

impl Sealer {
    pub(super) fn new(config: Arc<ServerConfig>) -> Result<Self, rustls::Error> {
        let mut tls = ServerConnection::new(config)?;
        tls.set_buffer_limit(Some(SEALED));
        Ok(Self { tls, piece: vec![0; RECORD].into() })
    }

    /// Whether the peer's certificate is outstanding: its next bytes cost public-key operations.
    pub(super) fn is_handshaking(&self) -> bool {
        self.tls.is_handshaking()
    }

    /// Seals bytes, as many as there is room for.
    pub(super) fn seal(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tls.writer().write(bytes)
    }

    /// Seals `head`, then up to `len` bytes of the spans without their first `skip`, until the buffer is full. Returns the
    /// number of sealed bytes. All of them have been copied out of the memory.
    pub(super) fn seal_spans(
        &mut self,
        head: &[u8],
        memory: &Memory,
        spans: &[Span],
        mut skip: u64,
        mut len: u64,
    ) -> io::Result<usize> {
        let (mut spans, mut head, mut sealed) = (spans.iter(), head, 0);
        let mut span = spans.next();
        loop {
            // Whole records, also of small spans.
            let n = head.len().min(RECORD);
            self.piece[..n].copy_from_slice(&head[..n]);
            let mut held = n;
            head = &head[n..];
            while let Some(s) = span
                && held < RECORD
                && len > 0
            {
                let take = (s.len - skip).min(len).min((RECORD - held) as u64);
                memory.read_into(s.segment, s.offset + skip, &mut self.piece[held..held + take as usize])?;
                held += take as usize;
                len -= take;
                skip += take;
                if skip == s.len {
                    (span, skip) = (spans.next(), 0);
                }
            }
            let n = self.tls.writer().write(&self.piece[..held])?;
            sealed += n;
            if n < held || (head.is_empty() && len == 0) || span.is_none() {
                return Ok(sealed);
            }
        }
    }

    /// Sends sealed records. `WouldBlock` if the socket has no room for all of them.
    pub(super) fn flush(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        while self.tls.wants_write() {
            self.tls.write_tls(&mut Socket(fd))?;
        }
        Ok(())
    }

    /// Opens received records, and appends their content to `input`. `false` if the peer has closed.
    pub(super) fn open(&mut self, mut received: &[u8], input: &mut Vec<u8>) -> Result<bool, rustls::Error> {
        while !received.is_empty() {
            // Fails only if opened bytes are not taken, and they are.
            if self.tls.read_tls(&mut received).is_err() {
                return Ok(false);
            }
            let state = self.tls.process_new_packets()?;
            let begin = input.len();
            input.resize(begin + state.plaintext_bytes_to_read(), 0);
            // `WouldBlock` if there is nothing.
            let n = self.tls.reader().read(&mut input[begin..]).unwrap_or(0);
            input.truncate(begin + n);
            if state.peer_has_closed() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// A socket that sends without a signal.
struct Socket<'a>(BorrowedFd<'a>);

impl Write for Socket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[io::IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, pieces: &[io::IoSlice<'_>]) -> io::Result<usize> {
        let mut none = SendAncillaryBuffer::default();
        Ok(rustix::io::retry_on_intr(|| rustix::net::sendmsg(self.0, pieces, &mut none, SendFlags::NOSIGNAL))?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Why the consumer's end has stopped.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pause {
    /// Every whole record was opened.
    Empty,
    /// The peer has closed in an orderly way.
    Closed,
}

/// The consumer's end.
pub(super) struct Opener {
    tls: UnbufferedClientConnection,
    /// Received records, from `begin` to `end`.
    received: Box<[u8]>,
    begin: usize,
    end: usize,
    /// Sealed bytes to send; sent up to `sent`.
    pub(super) sealed: Vec<u8>,
    pub(super) sent: usize,
    /// Opened bytes that the owner has not taken.
    pub(super) rest: Vec<u8>,
}

impl Opener {
    pub(super) fn new(config: Arc<ClientConfig>, name: ServerName<'static>) -> Result<Self, rustls::Error> {
        let tls = UnbufferedClientConnection::new(config, name)?;
        let (received, sealed, rest) = (vec![0; RECEIVED].into(), Vec::new(), Vec::new());
        Ok(Self { tls, received, begin: 0, end: 0, sealed, sent: 0, rest })
    }

    /// Whether the handshake goes on.
    pub(super) fn is_handshaking(&self) -> bool {
        self.tls.is_handshaking()
    }

    /// Bytes received and not opened: a part of a record.
    pub(super) fn held(&self) -> u64 {
        (self.end - self.begin) as u64
    }

    /// The room for received bytes; the caller reports how many came with [`Opener::received`].
    pub(super) fn room(&mut self) -> &mut [u8] {
        // A part of a record is left, at most.
        self.received.copy_within(self.begin..self.end, 0);
        (self.begin, self.end) = (0, self.end - self.begin);
        &mut self.received[self.end..]
    }

    pub(super) fn received(&mut self, n: usize) {
        self.end += n;
    }

    /// Receives records. Returns the room and the received bytes.
    pub(super) fn receive(&mut self, fd: BorrowedFd<'_>) -> (u64, io::Result<usize>) {
        let room = self.room();
        let wanted = room.len() as u64;
        match rustix::net::recv(fd, room, RecvFlags::empty()) {
            Ok((n, _)) => {
                self.received(n);
                (wanted, Ok(n))
            }
            Err(e) => (wanted, Err(e.into())),
        }
    }

    /// Opens every whole record, and passes its content on; answers of TLS itself go to `sealed`.
    pub(super) fn open(&mut self, mut take: impl FnMut(&[u8], &mut Vec<u8>)) -> Result<Pause, rustls::Error> {
        loop {
            let UnbufferedStatus { discard, state } =
                self.tls.process_tls_records(&mut self.received[self.begin..self.end]);
            let pause = match state? {
                ConnectionState::ReadTraffic(mut records) => {
                    while let Some(record) = records.next_record() {
                        take(record?.payload, &mut self.rest);
                    }
                    None
                }
                ConnectionState::EncodeTlsData(mut data) => {
                    encode(&mut self.sealed, |out| match data.encode(out) {
                        Err(EncodeError::InsufficientSize(e)) => Err(Some(e.required_size)),
                        other => other.map_err(|_| None),
                    })?;
                    None
                }
                ConnectionState::TransmitTlsData(data) => {
                    // `sealed` is sent in order, before anything that is sealed later.
                    data.done();
                    None
                }
                ConnectionState::PeerClosed | ConnectionState::Closed => Some(Pause::Closed),
                _ => Some(Pause::Empty),
            };
            self.begin += discard;
            if let Some(pause) = pause {
                return Ok(pause);
            }
        }
    }

    /// Seals bytes after those in `sealed`. Only after the handshake.
    pub(super) fn seal(&mut self, bytes: &[u8]) -> Result<(), rustls::Error> {
        loop {
            // No received record: those are for `open`.
            match self.tls.process_tls_records(&mut []).state? {
                ConnectionState::WriteTraffic(mut traffic) => {
                    return encode(&mut self.sealed, |out| match traffic.encrypt(bytes, out) {
                        Err(EncryptError::InsufficientSize(e)) => Err(Some(e.required_size)),
                        other => other.map_err(|_| None),
                    });
                }
                ConnectionState::EncodeTlsData(mut data) => {
                    encode(&mut self.sealed, |out| match data.encode(out) {
                        Err(EncodeError::InsufficientSize(e)) => Err(Some(e.required_size)),
                        other => other.map_err(|_| None),
                    })?;
                }
                ConnectionState::TransmitTlsData(data) => data.done(),
                _ => return Err(rustls::Error::HandshakeNotComplete),
            }
        }
    }
}

/// Appends the output of `write`, which returns the room that it needs if it has too little.
fn encode(
    to: &mut Vec<u8>,
    mut write: impl FnMut(&mut [u8]) -> Result<usize, Option<usize>>,
) -> Result<(), rustls::Error> {
    let begin = to.len();
    let mut room = 512;
    loop {
        to.resize(begin + room, 0);
        match write(&mut to[begin..]) {
            Ok(n) => {
                to.truncate(begin + n);
                return Ok(());
            }
            Err(Some(required)) if required > room => room = required,
            Err(_) => {
                to.truncate(begin);
                return Err(rustls::Error::EncryptError);
            }
        }
    }
}

/// Whether an error says that bytes were changed on their way, as the record or the peer's alert shows.
pub(super) fn is_change(error: &rustls::Error) -> bool {
    matches!(
        error,
        rustls::Error::DecryptError
            | rustls::Error::InvalidMessage(_)
            | rustls::Error::AlertReceived(AlertDescription::BadRecordMac)
    )
}

/// Whether a call would have blocked.
pub(super) fn blocks(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::WouldBlock || e.raw_os_error() == Some(Errno::AGAIN.raw_os_error())
}

#[cfg(test)]
mod tests {
    use std::os::{fd::AsFd as _, unix::net::UnixStream};

    use rcgen::{CertifiedKey, KeyPair, generate_simple_self_signed};
    use rustls::{
        CipherSuiteCommon, RootCertStore, SupportedCipherSuite, Tls13CipherSuite,
        crypto::{CryptoProvider, ring},
        pki_types::{PrivateKeyDer, pem::PemObject as _},
        version::TLS13,
    };

    use super::*;

    /// Both ends, with keys that are good for `records`.
    fn ends(records: u64) -> (Sealer, Opener) {
        let suite = ring::cipher_suite::TLS13_AES_128_GCM_SHA256.tls13().unwrap();
        let CipherSuiteCommon { suite: name, hash_provider, .. } = suite.common;
        let common = CipherSuiteCommon { suite: name, hash_provider, confidentiality_limit: records };
        let Tls13CipherSuite { hkdf_provider, aead_alg, .. } = *suite;
        let suite = Box::leak(Box::new(Tls13CipherSuite { common, hkdf_provider, aead_alg, quic: None }));
        let cipher_suites = vec![SupportedCipherSuite::Tls13(suite)];
        let provider = Arc::new(CryptoProvider { cipher_suites, ..ring::default_provider() });
        let CertifiedKey::<KeyPair> { cert, signing_key } = generate_simple_self_signed(vec!["a.b".into()]).unwrap();
        let key = PrivateKeyDer::from_pem_slice(signing_key.serialize_pem().as_bytes()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(cert.der().clone()).unwrap();
        let server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key)
            .unwrap();
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from("a.b").unwrap();
        (Sealer::new(server.into()).unwrap(), Opener::new(client.into(), name).unwrap())
    }

    #[test]
    fn bytes_arrive_in_order_also_across_changes_of_the_keys() {
        let (mut sealer, mut opener) = ends(64);
        let (producer, consumer) = UnixStream::pair().unwrap();
        producer.set_nonblocking(true).unwrap();
        consumer.set_nonblocking(true).unwrap();
        // 8 MiB of small spans: 512 records, so the keys change several times.
        let memory = Memory::alloc(&[8 << 20]).unwrap();
        let bytes: Vec<u8> = (0..8u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        memory.write_from(0, 0, &bytes).unwrap();
        let spans: Vec<_> = (0..8 << 10).map(|i| Span { segment: 0, offset: i * 1024, len: 1024 }).collect();
        let (mut asked, mut sent, mut input, mut got) = (false, 0, Vec::new(), Vec::new());
        let mut scratch = vec![0; 1 << 16];
        while got.len() < bytes.len() + 4 {
            // The producer's turn.
            if let Ok(n @ 1..) = (&producer).read(&mut scratch) {
                assert!(sealer.open(&scratch[..n], &mut input).unwrap());
            }
            if input == b"ask" && sent < bytes.len() + 4 {
                let head = b"head".get(sent..).unwrap_or_default();
                let (at, skip) = (sent.saturating_sub(4) / 1024, sent.saturating_sub(4) % 1024);
                let left = bytes.len() - sent.saturating_sub(4);
                sent += sealer.seal_spans(head, &memory, &spans[at..], skip as u64, left as u64).unwrap();
            }
            match sealer.flush(producer.as_fd()) {
                Ok(()) => {}
                Err(e) => assert!(blocks(&e), "{e}"),
            }
            // The consumer's turn.
            let (_, received) = opener.receive(consumer.as_fd());
            assert!(received.map_or_else(|e| blocks(&e), |n| n > 0));
            assert_eq!(opener.open(|payload, _| got.extend_from_slice(payload)).unwrap(), Pause::Empty);
            if !asked && !opener.is_handshaking() {
                opener.seal(b"ask").unwrap();
                asked = true;
            }
            (&consumer).write_all(&std::mem::take(&mut opener.sealed)).unwrap();
        }
        assert!(got[..4] == *b"head" && got[4..] == bytes[..]);
    }
}
