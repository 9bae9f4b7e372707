//! The bytes of an accepted connection: plain text, or TLS whose handshake runs with the first read or write.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Instant,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::{
    TlsAcceptor,
    server::{FallibleAccept, TlsStream},
};
use tonic::transport::server::Connected;

use super::guard::ConnInfo;
use crate::tls::{Protocol, TlsIdentity, peer_engines};

/// An accepted connection.
pub(crate) struct Conn {
    io: Io,
    number: u64,
    info: ConnInfo,
}

enum Io {
    Plain(TcpStream),
    Handshake(Box<FallibleAccept<TcpStream>>),
    Tls(Box<TlsStream<TcpStream>>),
    /// The handshake failed, and the peer has the reason. What it sent meanwhile is read until it closes: with unread bytes
    /// the system would reset the connection, and the peer might lose the reason.
    Refused(TcpStream),
}

/// Largest piece that is read to be thrown away.
const DISCARDED: usize = 4096;

impl Conn {
    pub(super) fn new(io: TcpStream, tls: Option<&TlsIdentity>, number: u64, info: ConnInfo) -> Self {
        let io = match tls {
            None => Io::Plain(io),
            Some(tls) => {
                let accept = TlsAcceptor::from(tls.server(Protocol::Control)).accept(io);
                Io::Handshake(Box::new(accept.into_fallible()))
            }
        };
        Self { io, number, info }
    }

    /// Drives the handshake. Ready when the connection can be read and written.
    fn poll_handshake(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Io::Handshake(accept) = &mut self.io else { return Poll::Ready(Ok(())) };
        match ready!(Pin::new(accept.as_mut()).poll(cx)) {
            Ok(stream) => {
                let engines = peer_engines(stream.get_ref().1.peer_certificates().unwrap_or_default());
                self.info.guard.identified(&self.info.state, engines);
                self.io = Io::Tls(Box::new(stream));
                Poll::Ready(Ok(()))
            }
            Err((error, io)) => {
                let (state, log) = (&self.info.state, &self.info.guard.log);
                let why = format!("the TLS handshake failed: {error}");
                // An orderly close before the first byte is a port check.
                if error.kind() != io::ErrorKind::UnexpectedEof {
                    log.refused(Instant::now(), &state.peer(), "handshake", &why);
                }
                self.io = Io::Refused(io);
                Poll::Ready(Ok(()))
            }
        }
    }

    fn poll_read_inner(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_handshake(cx))?;
        match &mut self.io {
            Io::Plain(io) => Pin::new(io).poll_read(cx, buf),
            Io::Tls(io) => Pin::new(io.as_mut()).poll_read(cx, buf),
            Io::Refused(io) => loop {
                let mut bytes = [0; DISCARDED];
                let mut discarded = ReadBuf::new(&mut bytes);
                ready!(Pin::new(&mut *io).poll_read(cx, &mut discarded))?;
                if discarded.filled().is_empty() {
                    return Poll::Ready(Err(refused()));
                }
            },
            Io::Handshake(_) => Poll::Pending,
        }
    }
}

fn refused() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the TLS handshake failed")
}

impl Drop for Conn {
    fn drop(&mut self) {
        self.info.guard.dropped(self.number);
    }
}

impl Connected for Conn {
    type ConnectInfo = ConnInfo;
    fn connect_info(&self) -> ConnInfo {
        self.info.clone()
    }
}

impl AsyncRead for Conn {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.info.state.check()?;
        let read = self.poll_read_inner(cx, buf);
        if read.is_pending() {
            let mut reader = self.info.state.reader.lock();
            match &mut *reader {
                Some(w) => w.clone_from(cx.waker()),
                none => *none = Some(cx.waker().clone()),
            }
            drop(reader);
            // `kill` may have come before the waker.
            self.info.state.check()?;
        }
        read
    }
}

impl AsyncWrite for Conn {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored_inner(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored_inner(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Plain(io) => io.is_write_vectored(),
            // Of a handshake the stream will follow.
            Io::Handshake(_) | Io::Tls(_) | Io::Refused(_) => true,
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(io) => Pin::new(io).poll_flush(cx),
            Io::Tls(io) => Pin::new(io.as_mut()).poll_flush(cx),
            // Nothing was written.
            Io::Handshake(_) | Io::Refused(_) => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(io) | Io::Refused(io) => Pin::new(io).poll_shutdown(cx),
            Io::Tls(io) => Pin::new(io.as_mut()).poll_shutdown(cx),
            Io::Handshake(_) => Poll::Ready(Ok(())),
        }
    }
}

impl Conn {
    fn poll_write_vectored_inner(&mut self, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        self.info.state.check()?;
        ready!(self.poll_handshake(cx))?;
        match &mut self.io {
            Io::Plain(io) => Pin::new(io).poll_write_vectored(cx, bufs),
            Io::Tls(io) => Pin::new(io.as_mut()).poll_write_vectored(cx, bufs),
            // The bytes are discarded. An error would end the connection before the peer has read the reason.
            Io::Refused(_) => Poll::Ready(Ok(bufs.iter().map(|b| b.len()).sum())),
            Io::Handshake(_) => Poll::Pending,
        }
    }
}
