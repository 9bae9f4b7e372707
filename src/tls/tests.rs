//! An authority for tests, and the reloading of files.

use std::{fs, path::PathBuf, time::Duration};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use time::OffsetDateTime;

use super::{Protocol, TlsIdentity, peer_engines};
use crate::{config::TlsConfig, error::StartError};

/// The server name in every certificate of these tests.
pub(crate) const NAME: &str = "prefill.kvferry";

/// A certificate authority.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// A certificate with these URIs as further names, which expires at `until`.
    fn issue_with(&self, uris: &[&str], until: OffsetDateTime) -> TlsConfig {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![NAME.into()]).unwrap();
        params.subject_alt_names.extend(uris.iter().map(|u| SanType::URI((*u).try_into().unwrap())));
        params.not_after = until;
        TlsConfig {
            certificate: params.signed_by(&key, &self.0).unwrap().pem().into(),
            key: key.serialize_pem().into(),
            ca: self.0.pem().into(),
            server_name: NAME.into(),
            ..TlsConfig::default()
        }
    }

    /// A certificate with these URIs as further names.
    pub(crate) fn issue_uris(&self, uris: &[&str]) -> TlsConfig {
        self.issue_with(uris, OffsetDateTime::now_utc() + Duration::from_secs(86_400))
    }

    /// A certificate for one engine.
    pub(crate) fn issue(&self, engine: &str) -> TlsConfig {
        self.issue_uris(&[&format!("kvferry://engine/{engine}")])
    }

    /// A certificate for one engine that lasts for `valid`.
    pub(crate) fn issue_for(&self, engine: &str, valid: Duration) -> TlsConfig {
        self.issue_with(&[&format!("kvferry://engine/{engine}")], OffsetDateTime::now_utc() + valid)
    }
}

/// Certificate files in a folder of their own.
pub(crate) struct Files(PathBuf);

impl Files {
    /// Writes the files of `tls`. `name` is unique to the test.
    pub(crate) fn new(name: &str, tls: &TlsConfig) -> Self {
        let folder = std::env::temp_dir().join(format!("kvferry-tls-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let files = Self(folder);
        files.replace(tls);
        files
    }

    /// Replaces all files at once: the link to their folder, as Kubernetes does.
    pub(crate) fn replace(&self, tls: &TlsConfig) {
        let folder = self.0.join(kvferry_proto::OfferId::random().to_string());
        fs::create_dir(&folder).unwrap();
        for (name, bytes) in [("key", &tls.key), ("certificate", &tls.certificate), ("ca", &tls.ca)] {
            fs::write(folder.join(name), bytes).unwrap();
        }
        let new = self.0.join("new");
        std::os::unix::fs::symlink(&folder, &new).unwrap();
        fs::rename(new, self.0.join("current")).unwrap();
    }

    pub(crate) fn config(&self) -> TlsConfig {
        TlsConfig {
            certificate_file: Some(self.0.join("current/certificate")),
            key_file: Some(self.0.join("current/key")),
            ca_file: Some(self.0.join("current/ca")),
            server_name: NAME.into(),
            ..TlsConfig::default()
        }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl TlsIdentity {
    /// Looks at the files now, however short ago the last look was.
    pub(crate) fn look_now(&self) {
        let mut files = self.files.lock();
        self.read_again(std::time::Instant::now(), &mut files);
    }
}

#[test]
fn a_certificate_names_its_engines_and_nothing_else_does() {
    let authority = Authority::new();
    let names = |uris: &[&str]| {
        let pem = authority.issue_uris(uris).certificate;
        peer_engines(&[CertificateDer::from_pem_slice(&pem).unwrap()])
    };
    let (a, b) = ("a".parse().unwrap(), "b/c".parse().unwrap());
    let one = names(&["https://example.org/x", "kvferry://engine/a"]);
    one.check(&a).unwrap();
    assert_eq!(one.check(&b).unwrap_err(), "speaks for engine \"a\", not \"b/c\"");
    let two = names(&["kvferry://engine/b%2Fc", "kvferry://engine/a"]);
    two.check(&a).and(two.check(&b)).unwrap();
    assert!(!two.is_any());
    let any = names(&["kvferry://engine/*"]);
    any.check(&a).and(any.check(&b)).unwrap();
    for none in
        [&[][..], &["kvferry://engine/"], &["kvferry://engine"], &["https://engine/a"], &["xkvferry://engine/a"]]
    {
        let names = names(none);
        assert!(names.is_empty(), "{none:?}");
        assert!(names.check(&a).unwrap_err().contains("kvferry://engine/ID"));
    }
    // A DNS name is the server's name, never an engine.
    assert!(names(&[]).check(&NAME.parse().unwrap()).is_err());
}

#[test]
fn a_bad_certificate_or_key_is_a_clear_error_at_the_start() {
    let authority = Authority::new();
    let good = authority.issue("a");
    let hour = Duration::from_secs(3600);
    let expired = authority.issue_with(&["kvferry://engine/a"], OffsetDateTime::now_utc() - hour);
    let missing = TlsConfig { ca: Vec::new(), ca_file: Some("/nonexistent/ca.pem".into()), ..good.clone() };
    let bad = [
        ("the certificate is not PEM", TlsConfig { certificate: b"not PEM".to_vec(), ..good.clone() }),
        ("the key is not PEM", TlsConfig { key: Vec::new(), ..good.clone() }),
        ("authority", TlsConfig { ca: good.key.clone(), ..good.clone() }),
        ("server_name", TlsConfig { server_name: String::new(), ..good.clone() }),
        ("server_name", TlsConfig { server_name: "a name".into(), ..good.clone() }),
        ("the certificate and the key", TlsConfig { key: authority.issue("a").key, ..good.clone() }),
        ("expired", expired),
        ("/nonexistent/ca.pem", missing),
        ("as PEM and as a file", TlsConfig { key_file: Some("/tmp/key".into()), ..good.clone() }),
        ("speaks for engine \"b\", not \"a\"", authority.issue("b")),
        ("names no engine", authority.issue_uris(&[])),
    ];
    let engine = "a".parse().unwrap();
    TlsIdentity::new(&good, Some(&engine)).unwrap();
    for (named, tls) in bad {
        let error = TlsIdentity::new(&tls, Some(&engine)).expect_err(named);
        assert!(matches!(&error, StartError::Tls(why) if why.contains(named)), "{named}: {error}");
    }
}

#[test]
fn both_ends_of_a_connection_learn_the_others_engines() {
    let authority = Authority::new();
    let identity = |engine| TlsIdentity::new(&authority.issue(engine), None).unwrap();
    let (ours, theirs) = (identity("decode-0"), identity("prefill-0"));
    let mut client = rustls::ClientConnection::new(ours.client(Protocol::Lane), ours.server_name().unwrap()).unwrap();
    let mut server = rustls::ServerConnection::new(theirs.server(Protocol::Lane)).unwrap();
    while client.is_handshaking() || server.is_handshaking() {
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        server.read_tls(&mut &bytes[..]).unwrap();
        server.process_new_packets().unwrap();
        bytes.clear();
        server.write_tls(&mut bytes).unwrap();
        client.read_tls(&mut &bytes[..]).unwrap();
        client.process_new_packets().unwrap();
    }
    let engines = |certificates: Option<&[CertificateDer<'static>]>| peer_engines(certificates.unwrap()).to_string();
    assert_eq!(engines(client.peer_certificates()), "\"prefill-0\"");
    assert_eq!(engines(server.peer_certificates()), "\"decode-0\"");
    assert_eq!(client.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    // Its bytes are of no use at the other port.
    let mut client = rustls::ClientConnection::new(ours.client(Protocol::Lane), ours.server_name().unwrap()).unwrap();
    let mut server = rustls::ServerConnection::new(theirs.server(Protocol::Control)).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    server.read_tls(&mut &bytes[..]).unwrap();
    server.process_new_packets().expect_err("another protocol");
}

#[test]
fn changed_files_are_read_again_and_unusable_ones_leave_the_old_settings() {
    let authority = Authority::new();
    let files = Files::new("reload", &authority.issue("a"));
    let engine = "a".parse().unwrap();
    let identity = TlsIdentity::new(&files.config(), Some(&engine)).unwrap();
    let settings = || (identity.server(Protocol::Control), identity.client(Protocol::Lane));
    let same = |a: &(_, _), b: &(_, _)| std::sync::Arc::ptr_eq(&a.0, &b.0) && std::sync::Arc::ptr_eq(&a.1, &b.1);
    let first = settings();
    identity.look_now();
    assert!(same(&first, &settings()), "nothing has changed");
    // A key without its certificate, a certificate for another engine, and no certificate at all.
    let next = authority.issue("a");
    for bad in [
        TlsConfig { key: next.key.clone(), ..authority.issue("a") },
        authority.issue("b"),
        TlsConfig { certificate: b"truncated".to_vec(), ..next.clone() },
    ] {
        files.replace(&bad);
        identity.look_now();
        assert!(same(&first, &settings()), "the old ones stay");
    }
    files.replace(&next);
    identity.look_now();
    assert!(!same(&first, &settings()), "and good ones are taken");
}
