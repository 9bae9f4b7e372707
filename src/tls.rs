//! Certificates: this rank's own, and the engines that a peer's certificate names.
//!
//! Owns the TLS settings of every connection: both ends prove their identity under one authority, over TLS 1.3 only. The
//! files are read again when they change; each new handshake takes the newest settings, and open connections go on. A file
//! that cannot be used leaves the settings before it in force. Without session resumption every handshake checks the
//! peer's certificate, so an expired one is refused.

mod names;

#[cfg(test)]
pub(crate) mod tests;

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use kvferry_proto::EngineId;
use parking_lot::{Mutex, RwLock};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::{Resumption, WebPkiServerVerifier},
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    version::TLS13,
};

pub(crate) use self::names::{EngineNames, NAMELESS, peer_engines};
use crate::{config::TlsConfig, error::StartError};

/// Shortest time between two looks at the files. A look is three calls of `stat`.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The protocol inside a TLS connection. Each has its own ALPN name, so that a connection to one port cannot be passed on
/// to the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// gRPC.
    Control,
    /// The tcp lane.
    Lane,
}

/// The TLS settings of one rank, for both roles. Shared by everything that opens or accepts connections.
pub(crate) struct TlsIdentity {
    config: TlsConfig,
    /// The rank's engine, which the certificate must name.
    engine: Option<EngineId>,
    current: RwLock<Settings>,
    files: Mutex<Watched>,
}

#[derive(Clone)]
struct Settings {
    /// By [`Protocol`].
    server: [Arc<ServerConfig>; 2],
    client: [Arc<ClientConfig>; 2],
}

/// The files, as they were when they were last read.
struct Watched {
    looked: Instant,
    read: [Option<Stamp>; 3],
}

/// What changes when a file is replaced or written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl std::fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsIdentity").field("config", &self.config).finish_non_exhaustive()
    }
}

impl TlsIdentity {
    /// Reads the certificates and keys. `engine`: the rank's engine, if it has one.
    pub(crate) fn new(config: &TlsConfig, engine: Option<&EngineId>) -> Result<Arc<Self>, StartError> {
        let (read, settings) = load_settled(config, engine);
        let settings = settings.map_err(StartError::Tls)?;
        Ok(Arc::new(Self {
            config: config.clone(),
            engine: engine.cloned(),
            current: RwLock::new(settings),
            files: Mutex::new(Watched { looked: Instant::now(), read }),
        }))
    }

    /// The settings for a connection to accept. Requires a certificate of the authority; see [`peer_engines`] for the
    /// engines that it names.
    pub(crate) fn server(&self, protocol: Protocol) -> Arc<ServerConfig> {
        self.look();
        self.current.read().server[protocol as usize].clone()
    }

    /// The settings for a connection to open, to [`TlsIdentity::server_name`].
    pub(crate) fn client(&self, protocol: Protocol) -> Arc<ClientConfig> {
        self.look();
        self.current.read().client[protocol as usize].clone()
    }

    /// The name in producers' certificates.
    pub(crate) fn server_name(&self) -> Result<ServerName<'static>, String> {
        server_name(&self.config)
    }

    /// Reads the files again if they have changed. Looks at most once a second.
    pub(crate) fn look(&self) {
        let now = Instant::now();
        let mut files = self.files.lock();
        if now.saturating_duration_since(files.looked) >= LOOK_EVERY {
            self.read_again(now, &mut files);
        }
    }

    fn read_again(&self, now: Instant, files: &mut Watched) {
        files.looked = now;
        if stamps(&self.config) == files.read {
            return;
        }
        // Noted even if the files are unusable: they are complained about once, and read again when they change again.
        let (stamps, settings) = load_settled(&self.config, self.engine.as_ref());
        files.read = stamps;
        match settings {
            Ok(settings) => {
                *self.current.write() = settings;
                tracing::info!("certificates and keys have changed: new connections use the new ones");
            }
            Err(why) => tracing::warn!(
                why,
                "certificates or keys have changed and are unusable: keeping the old ones until they change again"
            ),
        }
    }
}

fn server_name(config: &TlsConfig) -> Result<ServerName<'static>, String> {
    ServerName::try_from(config.server_name.clone())
        .map_err(|_| format!("server_name {:?} is not a DNS name or an IP address", config.server_name))
}

fn stamps(config: &TlsConfig) -> [Option<Stamp>; 3] {
    [&config.certificate_file, &config.key_file, &config.ca_file].map(|file| {
        let meta = fs::metadata(file.as_ref()?).ok()?;
        Some(Stamp { inode: meta.ino(), size: meta.size(), modified: (meta.mtime(), meta.mtime_nsec()) })
    })
}

/// The bytes of a setting that is given as PEM or as a file.
fn bytes(what: &str, pem: &[u8], file: &Option<PathBuf>) -> Result<Vec<u8>, String> {
    match file {
        None => Ok(pem.to_vec()),
        Some(_) if !pem.is_empty() => Err(format!("{what} is given as PEM and as a file: give one of them")),
        Some(path) => fs::read(path).map_err(|e| format!("cannot read {what}, {}: {e}", path.display())),
    }
}

fn certificates(what: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match all {
        Ok(all) if all.is_empty() => Err(format!("{what} is not PEM: it has no BEGIN CERTIFICATE")),
        Ok(all) => Ok(all),
        Err(e) => Err(format!("{what} is not PEM: {e}")),
    }
}

/// Reads the files, and again if they were replaced meanwhile: a key and its certificate change one after the other.
/// Returns how they were before.
fn load_settled(config: &TlsConfig, engine: Option<&EngineId>) -> ([Option<Stamp>; 3], Result<Settings, String>) {
    /// A folder of files that is replaced as a whole settles at the second try.
    const TRIES: usize = 4;
    let mut before = stamps(config);
    let mut settings = load(config, engine);
    for _ in 1..TRIES {
        let now = stamps(config);
        if settings.is_ok() || now == before {
            break;
        }
        before = now;
        settings = load(config, engine);
    }
    (before, settings)
}

/// Reads and checks everything. The error is a sentence for the operator.
fn load(config: &TlsConfig, engine: Option<&EngineId>) -> Result<Settings, String> {
    const CERTIFICATE: &str = "the certificate";
    const AUTHORITY: &str = "the authority's certificate";
    const KEY: &str = "the key";
    if config.server_name.is_empty() {
        return Err("server_name is empty: give the name that producers' certificates carry".into());
    }
    server_name(config)?;
    let chain = certificates(CERTIFICATE, &bytes(CERTIFICATE, &config.certificate, &config.certificate_file)?)?;
    let key = PrivateKeyDer::from_pem_slice(&bytes(KEY, &config.key, &config.key_file)?)
        .map_err(|e| format!("the key is not PEM: it has no BEGIN PRIVATE KEY ({e})"))?;
    let mut roots = RootCertStore::empty();
    for authority in certificates(AUTHORITY, &bytes(AUTHORITY, &config.ca, &config.ca_file)?)? {
        roots.add(authority).map_err(|e| format!("{AUTHORITY} is unusable: {e}"))?;
    }
    let provider = Arc::new(ring::default_provider());
    check_own(&chain, &roots, &provider, engine)?;

    let unusable = |e: rustls::Error| format!("the certificate and the key are unusable: {e}");
    let verifier = |e: rustls::client::VerifierBuilderError| format!("{AUTHORITY} is unusable: {e}");
    let roots = Arc::new(roots);
    let clients =
        WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build().map_err(verifier)?;
    let servers = WebPkiServerVerifier::builder_with_provider(roots, provider.clone()).build().map_err(verifier)?;
    let server = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .map_err(unusable)?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain.clone(), key.clone_key())
        .map_err(unusable)?;
    let client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(unusable)?
        .with_webpki_verifier(servers)
        .with_client_auth_cert(chain, key)
        .map_err(unusable)?;
    let names: [&[u8]; 2] = [b"h2", b"kvferry-lane"];
    Ok(Settings {
        server: names.map(|alpn| {
            let mut c = server.clone();
            c.alpn_protocols = vec![alpn.to_vec()];
            c.session_storage = Arc::new(NoServerSessionStorage {});
            c.send_tls13_tickets = 0;
            Arc::new(c)
        }),
        client: names.map(|alpn| {
            let mut c = client.clone();
            c.alpn_protocols = vec![alpn.to_vec()];
            c.resumption = Resumption::disabled();
            Arc::new(c)
        }),
    })
}

/// Refuses a certificate that every peer would refuse. Whether the peers trust its authority cannot be checked here.
fn check_own(
    chain: &[CertificateDer<'_>],
    roots: &RootCertStore,
    provider: &CryptoProvider,
    engine: Option<&EngineId>,
) -> Result<(), String> {
    let own = webpki::EndEntityCert::try_from(&chain[0]).map_err(|e| format!("the certificate is unusable: {e}"))?;
    let valid = own.verify_for_usage(
        provider.signature_verification_algorithms.all,
        &roots.roots,
        &chain[1..],
        UnixTime::now(),
        webpki::KeyUsage::client_auth(),
        None,
        None,
    );
    match valid.err() {
        Some(webpki::Error::CertExpired { .. }) => return Err("the certificate has expired: renew it".into()),
        Some(webpki::Error::CertNotValidYet { .. }) => {
            return Err("the certificate is not valid yet: check this host's clock".into());
        }
        _ => {}
    }
    let names = peer_engines(chain);
    let named = match engine {
        Some(engine) => names.check(engine),
        None if names.is_empty() => Err(NAMELESS.into()),
        None => Ok(()),
    };
    named.map_err(|why| format!("the certificate {why}"))
}
