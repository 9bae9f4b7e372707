//! Reaching a producer: connect, prove one's identity, say Hello. Each dial makes a connection of its own. A broken
//! connection is never reopened silently: another process may serve the address by then, and only a new Hello tells.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use kvferry_proto::{
    EngineId, HelloError, Mismatch,
    hello::{Hello, Welcome},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, rustls};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

use super::{
    once::Once,
    proto::{self, ferry_client::FerryClient},
    secret::Secret,
};
use crate::{
    config::Config,
    dial_list::DialList,
    error::with_sources,
    tls::{EngineNames, Protocol, TlsIdentity, peer_engines},
};

/// HTTP/2 windows. The largest message to a consumer is a Welcome: some kilobytes for each hundred regions.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 512 << 10;

/// How to reach one address.
#[derive(Debug, Clone)]
pub(crate) struct Dialer {
    addr: Arc<str>,
    endpoint: Result<Endpoint, HelloError>,
    /// Shown in every Hello to this address.
    secret: Option<Secret>,
    timeout: Duration,
    frame_bytes: usize,
    tls: Option<Arc<TlsIdentity>>,
    /// The engines that may answer; empty: all.
    engines: Vec<EngineId>,
}

/// A connection to a producer.
#[derive(Clone)]
pub(crate) struct Connection {
    channel: Channel,
    pub(crate) to: SocketAddr,
    frame_bytes: usize,
    /// The engines that the peer's certificate names; `None`: plain text.
    engines: Option<EngineNames>,
}

impl Connection {
    pub(crate) fn ferry(&self) -> FerryClient<Channel> {
        FerryClient::new(self.channel.clone())
            .max_decoding_message_size(self.frame_bytes)
            .max_encoding_message_size(self.frame_bytes)
    }
}

impl Dialer {
    /// A dialer of `addr`, `HOST:PORT`. A bad address, or one that `config` forbids, fails each dial.
    pub(crate) fn new(addr: Arc<str>, config: &Config, tls: Option<Arc<TlsIdentity>>) -> Self {
        let secret = Secret::random();
        let endpoint = endpoint(&addr, config)
            .and_then(|e| secret.as_ref().map(|_| e).map_err(Clone::clone))
            .map_err(|why| HelloError::Unreachable { addr: addr.to_string(), why, refused: false });
        let allowed = DialList::new(&config.dial).is_ok_and(|list| list.allows_addr(&addr));
        Self {
            endpoint: if allowed { endpoint } else { Err(not_listed(&addr)) },
            addr,
            secret: secret.ok(),
            timeout: config.session.hello_timeout,
            frame_bytes: config.limits.frame_bytes,
            tls,
            engines: config.engines.clone(),
        }
    }

    /// Connects.
    pub(crate) async fn connect(&self) -> Result<Connection, HelloError> {
        let unreachable = |why: String, refused| HelloError::Unreachable { addr: self.addr.to_string(), why, refused };
        let endpoint = self.endpoint.as_ref().map_err(Clone::clone)?;
        let connect = async {
            let io = TcpStream::connect(&*self.addr)
                .await
                .map_err(|e| unreachable(e.to_string(), e.kind() == io::ErrorKind::ConnectionRefused))?;
            let to = io.peer_addr().map_err(|e| unreachable(e.to_string(), false))?;
            // Small frames must not wait for each other.
            let _ = io.set_nodelay(true);
            let broken = |e: tonic::transport::Error| {
                let why = with_sources(&e);
                self.distrusted(&why).unwrap_or_else(|| unreachable(why, false))
            };
            let (channel, engines) = match &self.tls {
                None => (endpoint.connect_with_connector(Once::new(io)).await.map_err(broken)?, None),
                Some(tls) => {
                    let name = tls.server_name().map_err(|why| unreachable(why, false))?;
                    let connector = TlsConnector::from(tls.client(Protocol::Control));
                    let io = connector.connect(name, io).await.map_err(|e| self.untrusted(&e))?;
                    let engines = peer_engines(io.get_ref().1.peer_certificates().unwrap_or_default());
                    (endpoint.connect_with_connector(Once::new(io)).await.map_err(broken)?, Some(engines))
                }
            };
            Ok(Connection { channel, to, frame_bytes: self.frame_bytes, engines })
        };
        self.in_time(connect).await
    }

    /// Connects and says Hello.
    pub(crate) async fn hello(&self, me: &Hello) -> Result<(Connection, Welcome), HelloError> {
        let call = async {
            let connection = self.connect().await?;
            let mut request = proto::HelloRequest::from(me);
            request.secret = self.secret.iter().flat_map(|s| s.bytes()).copied().collect();
            let reply = connection.ferry().hello(request).await.map_err(|s| self.failed(&s))?;
            let welcome = self.answer(me, reply.into_inner())?;
            self.check_engine(&connection, &welcome.peer.engine)?;
            Ok((connection, welcome))
        };
        self.in_time(call).await
    }

    /// Checks that the peer speaks for the engine that it says it is, and that this side accepts that engine.
    fn check_engine(&self, connection: &Connection, engine: &EngineId) -> Result<(), HelloError> {
        let refused = |why| HelloError::Refused { addr: self.addr.to_string(), why };
        if let Some(names) = &connection.engines {
            names.check(engine).map_err(|why| refused(format!("the peer's certificate {why}")))?;
        }
        if !self.engines.is_empty() && !self.engines.contains(engine) {
            return Err(refused(format!("engine {engine:?} is not in this rank's list of engines")));
        }
        Ok(())
    }

    /// The error of a failed TLS handshake.
    fn untrusted(&self, error: &io::Error) -> HelloError {
        let addr = self.addr.to_string();
        match error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
            Some(e @ rustls::Error::InvalidCertificate(_)) => {
                HelloError::Refused { addr, why: format!("the peer's certificate is not trusted here: {e}") }
            }
            Some(rustls::Error::AlertReceived(alert)) => {
                HelloError::Refused { addr, why: format!("the peer does not trust this side's certificate: {alert:?}") }
            }
            Some(e) => HelloError::Protocol { addr, what: format!("{e} (is tls on at both ends?)") },
            None => HelloError::Unreachable { addr, why: format!("TLS handshake: {error}"), refused: false },
        }
    }

    /// The error of a connection that the peer broke because of this side's certificate. In TLS 1.3 a client hears of that
    /// only after the handshake.
    fn distrusted(&self, why: &str) -> Option<HelloError> {
        let (_, alert) = why.split_once("received fatal alert: ").filter(|_| self.tls.is_some())?;
        let why = format!("the peer does not trust this side's certificate: {alert}");
        Some(HelloError::Refused { addr: self.addr.to_string(), why })
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
        if let Some(refused) = self.distrusted(&said(status)) {
            return refused;
        }
        match status.code() {
            Code::PermissionDenied => HelloError::Refused { addr, why: said(status) },
            Code::ResourceExhausted => HelloError::Limit { addr, why: said(status) },
            // Plain text was sent and the answer is not HTTP/2: the peer most likely expected a TLS handshake.
            Code::Internal if self.tls.is_none() && std::error::Error::source(status).is_some() => {
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
        let behind = with_sources(e);
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
    kvferry_proto::check_address(addr).map_err(|e| e.to_string())?;
    let scheme = if config.tls.is_some() { "https" } else { "http" };
    let endpoint = Endpoint::from_shared(format!("{scheme}://{addr}"))
        .map_err(|e| with_sources(&e))?
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keep_alive_interval(config.session.idle_heartbeat)
        .keep_alive_timeout(config.session.down)
        .keep_alive_while_idle(true)
        // It holds one session and a call or two at a time.
        .buffer_size(16);
    Ok(endpoint)
}

/// The refusal of an address that [`Config::dial`] does not list.
pub(crate) fn not_listed(addr: &str) -> HelloError {
    HelloError::Refused {
        addr: addr.into(),
        why: "this rank may not connect there: the setting `dial` does not list it".into(),
    }
}
