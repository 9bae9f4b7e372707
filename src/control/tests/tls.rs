//! Certificates: both ends prove their identity.

use kvferry_proto::HelloError;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

use super::rig::{Consumer, Rig, config, hello, run};
use crate::{
    config::{Config, TlsConfig},
    control::{call::Caller, server::Server},
    driver::runtime::Runtime,
    error::StartError,
};

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn issue(&self) -> TlsConfig {
        let key = KeyPair::generate().unwrap();
        let certificate =
            CertificateParams::new(vec!["prefill.kvferry".into()]).unwrap().signed_by(&key, &self.0).unwrap();
        TlsConfig {
            certificate: certificate.pem().into(),
            key: key.serialize_pem().into(),
            ca: self.0.pem().into(),
            server_name: "prefill.kvferry".into(),
        }
    }
}

fn with(tls: TlsConfig) -> Config {
    Config { tls: Some(tls), ..config() }
}

fn refused(rig: &Rig, as_client: Config) -> String {
    let error = run(Caller::new(as_client).hello(&rig.addr.to_string(), &hello())).expect_err("a Hello that must fail");
    let refused = matches!(error, HelloError::Unreachable { refused: false, .. } | HelloError::Protocol { .. });
    assert!(refused, "{error:?}");
    error.to_string()
}

#[test]
fn ranks_of_one_authority_trust_each_other_at_any_address() {
    let authority = Authority::new();
    let rig = Rig::new(&with(authority.issue()));
    let consumer = Consumer::new(rig.addr, with(authority.issue()));
    let claim = consumer.claim(1, &rig.desk.me);
    assert_eq!(consumer.answer(), (claim, None));
}

#[test]
fn a_client_without_a_trusted_certificate_is_refused() {
    let authority = Authority::new();
    let rig = Rig::new(&with(authority.issue()));
    // In plain text: the consumer sees the close, or bytes that are not HTTP/2, whichever comes first.
    refused(&rig, config());
    // It trusts the producer, but its own certificate is another authority's.
    let mut stranger = Authority::new().issue();
    stranger.ca = authority.issue().ca;
    refused(&rig, with(stranger));
    // Without any certificate.
    let error = run(async {
        let tls = tonic::transport::ClientTlsConfig::new()
            .ca_certificate(tonic::transport::Certificate::from_pem(authority.issue().ca))
            .domain_name("prefill.kvferry");
        let endpoint = tonic::transport::Endpoint::from_shared(format!("https://{}", rig.addr)).unwrap();
        // With TLS 1.3 the refusal comes after the client's side of the handshake is done.
        let channel = endpoint.tls_config(tls).unwrap().connect().await.map_err(|e| e.to_string())?;
        let mut ferry = crate::control::proto::ferry_client::FerryClient::new(channel);
        ferry.hello(crate::control::proto::HelloRequest::from(&hello())).await.map_err(|e| e.to_string())?;
        Ok::<_, String>(())
    });
    assert!(error.is_err());
}

#[test]
fn a_producer_of_another_authority_or_name_is_not_trusted() {
    let authority = Authority::new();
    let rig = Rig::new(&with(authority.issue()));
    let why = refused(&rig, with(Authority::new().issue()));
    assert!(why.contains("certificate"), "{why}");
    let why = refused(&rig, with(TlsConfig { server_name: "another.name".into(), ..authority.issue() }));
    assert!(why.contains("certificate"), "{why}");
}

#[test]
fn a_bad_certificate_or_key_is_a_clear_error_at_the_start() {
    let good = Authority::new().issue();
    let bad = [
        ("the certificate", TlsConfig { certificate: b"not PEM".to_vec(), ..good.clone() }),
        ("the key", TlsConfig { key: Vec::new(), ..good.clone() }),
        ("authority", TlsConfig { ca: good.key.clone(), ..good.clone() }),
        ("server_name", TlsConfig { server_name: String::new(), ..good.clone() }),
        ("", TlsConfig { key: Authority::new().issue().key, ..good.clone() }),
    ];
    let runtime = Runtime::start("test").unwrap();
    for (named, tls) in bad {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let desk = Rig::new(&config()).desk;
        let error = Server::start(runtime.handle(), listener, desk, &with(tls), None).expect_err(named);
        assert!(matches!(&error, StartError::Tls(why) if why.contains(named)), "{named}: {error}");
    }
}
