//! The control server of a producer: Ferry, the standard health and reflection services, and services that its owner adds.
//!
//! Owns the listening socket, its connections and the sessions' streams. It decides nothing about offers: it asks the
//! producer through [`Desk`]. A peer that breaks a bound, sends a malformed message, falls silent or does not read loses its
//! own session, with a text that names the reason (promise 7).

use std::{
    fmt,
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{runtime::Handle, sync::watch};
use tonic::service::Routes;
use tonic_health::ServingStatus;

use super::{
    desk::Desk,
    guard::{Guard, Incoming},
    health,
    proto::{DESCRIPTORS, ferry_server::FerryServer},
    requests::Requests,
    service::{FerryService, Hub},
};
use crate::{
    config::Config,
    error::{StartError, with_sources},
    tls::TlsIdentity,
};

/// Additional gRPC services on the control plane's port.
#[derive(Default)]
pub(crate) struct Extra {
    /// The services.
    pub(crate) routes: Routes,
    /// Their names, such as `package.Service`, with their encoded descriptors, for the reflection service.
    pub(crate) described: Vec<(String, Vec<u8>)>,
}

/// How long sessions have to end by themselves in a shutdown, before their connections are closed.
const GRACE: Duration = Duration::from_millis(500);
/// Most concurrent streams of a connection. A consumer needs a session and a few calls.
pub(super) const STREAMS: u32 = 64;
/// Largest message from a consumer. The largest legitimate one is a `Renew` of 4096 claims, of 40 KiB. Messages to a consumer
/// are far larger, so `limits.frame_bytes` would let a stranger occupy 16 MiB with each of its streams.
pub(super) const MESSAGE_BYTES: usize = 128 << 10;
/// Largest reflection request: the name of a symbol or a file.
const REFLECTION_BYTES: usize = 4 << 10;
/// HTTP/2 windows. Messages to a producer are small; small windows bound the memory that a bad peer can occupy.
const STREAM_WINDOW: u32 = 64 << 10;
const CONNECTION_WINDOW: u32 = 128 << 10;

/// A running control server. Dropping it shuts it down.
pub(crate) struct Server {
    #[cfg(test)]
    hub: Arc<Hub>,
    stop: watch::Sender<bool>,
    addr: SocketAddr,
    /// Closed when the server's task has ended, also when its runtime was dropped.
    #[cfg(test)]
    running: watch::Receiver<()>,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("addr", &self.addr).finish_non_exhaustive()
    }
}

impl Server {
    /// Serves on `listener`, on the runtime of `handle`, with the certificates of `tls`, and the limits and times of `config`.
    pub(crate) fn start(
        handle: &Handle,
        listener: TcpListener,
        desk: Arc<dyn Desk>,
        config: &Config,
        tls: Option<Arc<TlsIdentity>>,
        extra: Option<Extra>,
    ) -> Result<Self, StartError> {
        let addr = listener.local_addr().map_err(StartError::os("cannot learn the listening address"))?;
        listener.set_nonblocking(true).map_err(StartError::os("cannot make the listening socket non-blocking"))?;
        let listener = {
            let _in_runtime = handle.enter();
            tokio::net::TcpListener::from_std(listener)
                .map_err(StartError::os("cannot register the listening socket"))?
        };
        // A consumer that dials again holds two connections for a moment; health and reflection need a few more.
        let limits = &config.limits;
        let guard = Guard::new(limits.sessions.saturating_mul(2).saturating_add(64), limits.connections_per_peer);
        let hub = Hub::new(desk, guard.clone(), config);

        let builder = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(config.session.idle_heartbeat))
            .http2_keepalive_timeout(Some(config.session.down))
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_concurrent_streams(STREAMS)
            .http2_max_header_list_size(16 << 10);
        let (reporter, health_service) = tonic_health::server::health_reporter();
        let ferry = FerryServer::new(FerryService(hub.clone()))
            .max_decoding_message_size(MESSAGE_BYTES)
            .max_encoding_message_size(config.limits.frame_bytes);
        let Extra { routes, described } = extra.unwrap_or_default();
        let reflection = || {
            let ours = tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                .with_service_name(FERRY)
                .with_service_name(HEALTH);
            described
                .iter()
                .fold(ours, |b, (name, d)| b.register_encoded_file_descriptor_set(d).with_service_name(name.as_str()))
        };
        let broken =
            |e: tonic_reflection::server::Error| StartError::Config { field: "reflection", why: e.to_string() };
        let v1 = reflection().build_v1().map_err(broken)?.max_decoding_message_size(REFLECTION_BYTES);
        let v1alpha = reflection().build_v1alpha().map_err(broken)?.max_decoding_message_size(REFLECTION_BYTES);
        let router = builder
            .layer(Requests { time: config.session.hello_timeout })
            .add_routes(routes.add_service(ferry).add_service(health_service).add_service(v1).add_service(v1alpha));

        let (stop, mut stopping) = watch::channel(false);
        let mut good = health::watch();
        let (done, _running) = watch::channel(());
        let inner = hub.clone();
        let incoming = Incoming::new(listener, guard.clone(), tls.clone());
        let mut signal = stop.subscribe();
        handle.spawn(async move {
            let _done = done;
            let now = *good.borrow_and_update();
            report(&reporter, now).await;
            let serve = router.serve_with_incoming_shutdown(incoming, async move {
                // An error means that the server was dropped, which also stops it.
                let _ = signal.wait_for(|s| *s).await;
            });
            tokio::pin!(serve);
            let mut sweep = tokio::time::interval(inner.sweep_every());
            sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            let mut cut = std::pin::pin!(None);
            loop {
                tokio::select! {
                    served = &mut serve => {
                        if let Err(e) = served {
                            tracing::error!(%addr, error = with_sources(&e), "the control server failed");
                        }
                        break;
                    }
                    _ = sweep.tick() => {
                        inner.sweep(Instant::now());
                        if let Some(tls) = &tls {
                            tls.look();
                        }
                    }
                    Ok(()) = good.changed() => {
                        let now = *good.borrow_and_update();
                        report(&reporter, now).await;
                    }
                    r = stopping.changed(), if cut.is_none() => {
                        if r.is_err() || *stopping.borrow() {
                            report(&reporter, false).await;
                            inner.stop();
                            cut.set(Some(tokio::time::sleep(GRACE)));
                        }
                    }
                    Some(()) = async { match cut.as_mut().as_pin_mut() { Some(c) => { c.await; Some(()) } None => None } },
                        if cut.is_some() => {
                        guard.kill_all();
                        cut.set(Some(tokio::time::sleep(GRACE)));
                    }
                }
            }
        });
        tracing::info!(%addr, tls = config.tls.is_some(), "the control plane is listening");
        Ok(Self {
            #[cfg(test)]
            hub,
            stop,
            addr,
            #[cfg(test)]
            running: _running,
        })
    }

    /// The address that it listens on.
    #[cfg(test)]
    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Number of session streams, including those without an Open yet.
    #[cfg(test)]
    pub(crate) fn sessions(&self) -> usize {
        self.hub.sessions()
    }

    /// Number of connections.
    #[cfg(test)]
    pub(crate) fn connections(&self) -> usize {
        self.hub.guard().count()
    }

    /// Refusals of a peer at this address since the last line about them in the log; `None`: none was refused.
    #[cfg(test)]
    pub(crate) fn refusals(&self, from: std::net::IpAddr, kind: &'static str) -> Option<u64> {
        self.hub.guard().log.told(&super::peer::PeerKey::new(from, None), kind)
    }

    /// Begins to shut down, and returns at once: the port closes, sessions end with UNAVAILABLE, and after half a second the
    /// remaining connections are closed.
    pub(crate) fn shutdown(&self) {
        self.stop.send_replace(true);
    }

    /// Waits until a shutdown is complete.
    #[cfg(test)]
    pub(crate) async fn stopped(&self) {
        // No value is ever sent: the wait ends when the sender is dropped.
        let _ = self.running.clone().changed().await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown();
    }
}

const FERRY: &str = "kvferry.v1.Ferry";
const HEALTH: &str = "grpc.health.v1.Health";

async fn report(reporter: &tonic_health::server::HealthReporter, good: bool) {
    let status = if good { ServingStatus::Serving } else { ServingStatus::NotServing };
    reporter.set_service_status("", status).await;
    reporter.set_service_status(FERRY, status).await;
}
