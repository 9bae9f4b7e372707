//! A connector that returns an existing connection, once.
//!
//! A channel whose connection broke connects again, and reports only that this failed. So the connection's own error is kept
//! for the report: it may say that the peer does not trust this side's certificate.

use std::{
    future::{Ready, ready},
    io,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
};

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::codegen::{Service, http::Uri};

/// The connector.
pub(super) struct Once<IO> {
    io: Option<IO>,
    why: Arc<OnceLock<String>>,
}

impl<IO> Once<IO> {
    pub(super) fn new(io: IO) -> Self {
        Self { io: Some(io), why: Arc::default() }
    }
}

impl<IO> Service<Uri> for Once<IO> {
    type Response = TokioIo<Noted<IO>>;
    type Error = io::Error;
    type Future = Ready<io::Result<Self::Response>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let gone = || {
            let why = self.why.get().map_or(String::new(), |why| format!(": {why}"));
            io::Error::new(io::ErrorKind::NotConnected, format!("this connection broke{why}"))
        };
        ready(self.io.take().map(|io| TokioIo::new(Noted { io, why: self.why.clone() })).ok_or_else(gone))
    }
}

/// A connection that notes its first error.
pub(super) struct Noted<IO> {
    io: IO,
    why: Arc<OnceLock<String>>,
}

impl<IO> Noted<IO> {
    fn note<T>(&self, done: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if let Poll::Ready(Err(e)) = &done {
            // The first one counts.
            let _ = self.why.set(e.to_string());
        }
        done
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Noted<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.io).poll_read(cx, buf);
        self.note(read)
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Noted<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.io).poll_write(cx, buf);
        self.note(done)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.note(done)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let done = Pin::new(&mut self.io).poll_flush(cx);
        self.note(done)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
