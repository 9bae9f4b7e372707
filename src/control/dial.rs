//! Reaching a producer: connect, prove one's identity, say Hello. Each dial makes a connection of its own. A broken
//! connection is never reopened silently: another process may serve the address by then, and only a new Hello tells.

use std::{
    future::{Ready, ready},
    io,
    net::SocketAddr,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use kvferry_proto::{
    HelloError, Mismatch,
    hello::{Hello, Welcome},
};
use tokio::net::TcpStream;
use tonic::{
    Code, Status,
    codegen::{Service, http::Uri},
    transport::{Channel, Endpoint},
};

use super::{
    proto::{self, ferry_client::FerryClient},
    tls,
};
use crate::config::Config;

/// HTTP/2 windows. The largest message to a consumer is a Welcome: some kilobytes for each hundred regions.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 512 << 10;

/// How to reach one address.
#[derive(Debug, Clone)]
pub(crate) struct Dialer {
    addr: Arc<str>,
    endpoint: Result<Endpoint, String>,
    timeout: Duration,
    frame_bytes: usize,
    tls: bool,
}

/// A connection to a producer.
#[derive(Clone)]
pub(crate) struct Connection {
    channel: Channel,
    pub(crate) to: SocketAddr,
    frame_bytes: usize,
}

impl Connection {
    pub(crate) fn ferry(&self) -> FerryClient<Channel> {
        FerryClient::new(self.channel.clone())
            .max_decoding_message_size(self.frame_bytes)
            .max_encoding_message_size(self.frame_bytes)
    }
}

impl Dialer {
    /// A dialer of `addr`, `HOST:PORT`. A bad address or certificate fails each dial.
    pub(crate) fn new(addr: Arc<str>, config: &Config) -> Self {
        let endpoint = endpoint(&addr, config);
        Self {
            addr,
            endpoint,
            timeout: config.session.hello_timeout,
            frame_bytes: config.limits.frame_bytes,
            tls: config.tls.is_some(),
        }
    }

    /// Connects.
    pub(crate) async fn connect(&self) -> Result<Connection, HelloError> {
        let unreachable = |why: String, refused| HelloError::Unreachable { addr: self.addr.to_string(), why, refused };
        let endpoint = self.endpoint.as_ref().map_err(|why| unreachable(why.clone(), false))?;
        let connect = async {
            let io = TcpStream::connect(&*self.addr)
                .await
                .map_err(|e| unreachable(e.to_string(), e.kind() == io::ErrorKind::ConnectionRefused))?;
            let to = io.peer_addr().map_err(|e| unreachable(e.to_string(), false))?;
            // Small frames must not wait for each other.
            let _ = io.set_nodelay(true);
            let channel =
                endpoint.connect_with_connector(Once(Some(io))).await.map_err(|e| unreachable(tls::why(&e), false))?;
            Ok(Connection { channel, to, frame_bytes: self.frame_bytes })
        };
        self.in_time(connect).await
    }

    /// Connects and says Hello.
    pub(crate) async fn hello(&self, me: &Hello) -> Result<(Connection, Welcome), HelloError> {
        let call = async {
            let connection = self.connect().await?;
            let reply = connection.ferry().hello(proto::HelloRequest::from(me)).await.map_err(|s| self.failed(&s))?;
            let welcome = self.answer(me, reply.into_inner())?;
            Ok((connection, welcome))
        };
        self.in_time(call).await
    }

    async fn in_time<T>(&self, work: impl Future<Output = Result<T, HelloError>>) -> Result<T, HelloError> {
        tokio::time::timeout(self.timeout, work).await.unwrap_or_else(|_| {
            Err(HelloError::Unreachable {
                addr: self.addr.to_string(),
                why: format!("no answer within {:?}", self.timeout),
                refused: false,
            })
        })
    }

    fn answer(&self, me: &Hello, reply: proto::HelloReply) -> Result<Welcome, HelloError> {
        let malformed = |what: String| HelloError::Protocol { addr: self.addr.to_string(), what };
        let version =
            |there: String| HelloError::Version { here: format!("{} to {}", me.versions.0, me.versions.1), there };
        match reply.result {
            None => Err(malformed("result: is missing".into())),
            Some(proto::hello_reply::Result::Mismatch(m)) => {
                let m = Mismatch::from(m);
                Err(if m.field == "version" { version(m.producer) } else { m.into() })
            }
            Some(proto::hello_reply::Result::Welcome(w)) => {
                let w = Welcome::try_from(w).map_err(|e| malformed(format!("welcome.{e}")))?;
                if !(me.versions.0..=me.versions.1).contains(&w.version) {
                    return Err(version(w.version.to_string()));
                }
                Ok(w)
            }
        }
    }

    /// The error of a failed call.
    fn failed(&self, status: &Status) -> HelloError {
        let addr = self.addr.to_string();
        match status.code() {
            // Plain text was sent and the answer is not HTTP/2: the peer most likely expected a TLS handshake.
            Code::Internal if !self.tls && std::error::Error::source(status).is_some() => {
                HelloError::Protocol { addr, what: format!("{} (is tls on at both ends?)", said(status)) }
            }
            // The peer answers, but not as a kvferry of this version does.
            Code::Unimplemented | Code::InvalidArgument | Code::Internal | Code::OutOfRange | Code::DataLoss => {
                HelloError::Protocol { addr, what: said(status) }
            }
            _ => HelloError::Unreachable { addr, why: said(status), refused: false },
        }
    }
}

/// A status as one line for a log: with its sources, without control characters, at most 1024 bytes.
pub(crate) fn said(status: &Status) -> String {
    let mut text = status.message().to_owned();
    if let Some(e) = std::error::Error::source(status) {
        let behind = tls::why(e);
        text = if text.is_empty() || behind.contains(&text) { behind } else { format!("{text}: {behind}") };
    }
    if text.is_empty() {
        text = format!("{:?}", status.code());
    }
    if text.len() > 1024 {
        let end = (0..=1024).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
        text.truncate(end);
    }
    text.replace(char::is_control, " ")
}

/// Random bits for jitter. Without a random source there is no jitter, which is harmless.
pub(crate) fn random() -> u64 {
    getrandom::u64().unwrap_or(u64::MAX / 2)
}

fn endpoint(addr: &str, config: &Config) -> Result<Endpoint, String> {
    // An address comes with an offer, from an untrusted source: only HOST:PORT may get into the URI.
    let well_formed = addr.rsplit_once(':').is_some_and(|(host, port)| {
        port.parse::<u16>().is_ok_and(|p| p != 0)
            && !host.is_empty()
            && host.chars().all(|c| c.is_ascii_alphanumeric() || "-._:[]".contains(c))
    });
    if !well_formed {
        return Err("this is not a HOST:PORT".into());
    }
    let scheme = if config.tls.is_some() { "https" } else { "http" };
    let mut endpoint = Endpoint::from_shared(format!("{scheme}://{addr}"))
        .map_err(|e| tls::why(&e))?
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keep_alive_interval(config.session.idle_heartbeat)
        .keep_alive_timeout(config.session.down)
        .keep_alive_while_idle(true)
        // It holds one session and a call or two at a time.
        .buffer_size(16);
    if let Some(t) = &config.tls {
        let with_tls = tls::client(t, config.session.hello_timeout).map_err(|e| e.to_string())?;
        endpoint = endpoint.tls_config(with_tls).map_err(|e| format!("tls: {}", tls::why(&e)))?;
    }
    Ok(endpoint)
}

/// A connector that returns an existing TCP connection, once.
struct Once(Option<TcpStream>);

impl Service<Uri> for Once {
    type Response = TokioIo<TcpStream>;
    type Error = io::Error;
    type Future = Ready<io::Result<TokioIo<TcpStream>>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let gone = || io::Error::new(io::ErrorKind::NotConnected, "this connection broke");
        ready(self.0.take().map(TokioIo::new).ok_or_else(gone))
    }
}
