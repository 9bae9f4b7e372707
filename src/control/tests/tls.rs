//! Certificates: both ends prove their identity, and for which engines they speak.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use kvferry_proto::{Cause, HelloError, OfferId, hello::Hello};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
    version::TLS13,
};
use tokio_rustls::TlsConnector;
use tonic::{Code, Status, transport::Channel};

use super::rig::{Consumer, Rig, config, hello, peer_id, run};
use crate::{
    config::{Config, TlsConfig},
    control::{
        call::Caller,
        dial::Dialer,
        once::Once,
        proto::{self, ferry_client::FerryClient},
    },
    tls::{
        TlsIdentity,
        tests::{Authority, NAME},
    },
};

fn with(tls: TlsConfig) -> Config {
    Config { tls: Some(tls), ..config() }
}

fn refused(addr: SocketAddr, as_client: Config) -> String {
    let error = run(Caller::new(as_client).hello(&addr.to_string(), &hello())).expect_err("a Hello that must fail");
    assert!(matches!(error, HelloError::Refused { .. }), "{error:?}");
    error.to_string()
}

/// A client that checks nothing of itself: with these certificates, or with none.
async fn raw(addr: SocketAddr, ca: &[u8], own: Option<&TlsConfig>) -> Result<FerryClient<Channel>, std::io::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca).unwrap()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut tls = match own {
        None => builder.with_no_client_auth(),
        Some(own) => {
            let chain = vec![CertificateDer::from_pem_slice(&own.certificate).unwrap()];
            builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(&own.key).unwrap()).unwrap()
        }
    };
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let io = tokio::net::TcpStream::connect(addr).await?;
    let io = TlsConnector::from(Arc::new(tls)).connect(ServerName::try_from(NAME).unwrap(), io).await?;
    let endpoint = tonic::transport::Endpoint::from_static("http://raw");
    Ok(FerryClient::new(endpoint.connect_with_connector(Once::new(io)).await.map_err(std::io::Error::other)?))
}

#[test]
fn ranks_of_one_authority_trust_each_other_at_any_address() {
    let authority = Authority::new();
    let rig = Rig::new(&with(authority.issue("prefill-0")));
    let consumer = Consumer::new(rig.addr, with(authority.issue("decode-0")));
    let claim = consumer.claim(1, &rig.desk.me);
    assert_eq!(consumer.answer(), (claim, None));
    // Certificates that a deployment shares.
    let rig = Rig::new(&with(authority.issue("*")));
    let consumer = Consumer::new(rig.addr, with(authority.issue("*")));
    let claim = consumer.claim(1, &rig.desk.me);
    assert_eq!(consumer.answer(), (claim, None));
}

#[test]
fn a_client_without_a_trusted_certificate_is_refused() {
    let authority = Authority::new();
    let rig = Rig::new(&with(authority.issue("prefill-0")));
    // In plain text: the consumer sees the close, or bytes that are not HTTP/2, whichever comes first.
    let error = run(Caller::new(config()).hello(&rig.addr.to_string(), &hello())).expect_err("plain text");
    assert!(matches!(error, HelloError::Unreachable { refused: false, .. } | HelloError::Protocol { .. }), "{error:?}");
    // It trusts the producer, but its own certificate is another authority's.
    let mut stranger = Authority::new().issue("decode-0");
    stranger.ca = authority.issue("x").ca;
    let why = refused(rig.addr, with(stranger.clone()));
    assert!(why.contains("does not trust this side's certificate"), "{why}");
    // A pull hears it at once, as `refused`.
    let consumer = Consumer::new(rig.addr, with(stranger));
    let claim = consumer.claim(1, &rig.desk.me);
    assert_eq!(consumer.answer(), (claim, Some(Cause::Refused)));
    // Without any certificate. With TLS 1.3 the refusal comes after the client's side of the handshake is done.
    run(async {
        let client = raw(rig.addr, &authority.issue("x").ca, None).await;
        let said = match client {
            Ok(mut ferry) => ferry.hello(proto::HelloRequest::from(&hello())).await.map(|_| ()).map_err(|_| ()),
            Err(_) => Err(()),
        };
        assert_eq!(said, Err(()));
    });
}

#[test]
fn a_producer_of_another_authority_or_name_is_not_trusted() {
    let authority = Authority::new();
    let rig = Rig::new(&with(authority.issue("prefill-0")));
    let why = refused(rig.addr, with(Authority::new().issue("decode-0")));
    assert!(why.contains("the peer's certificate is not trusted here"), "{why}");
    let renamed = TlsConfig { server_name: "another.name".into(), ..authority.issue("decode-0") };
    let why = refused(rig.addr, with(renamed));
    assert!(why.contains("the peer's certificate is not trusted here"), "{why}");
}

#[test]
fn an_expired_certificate_is_refused_in_both_directions() {
    let authority = Authority::new();
    let short = |engine| authority.issue_for(engine, Duration::from_secs(2));
    let dialer = |rig: &Rig, tls: &TlsConfig| {
        let identity = TlsIdentity::new(tls, None).unwrap();
        Dialer::new(rig.addr.to_string().into(), &config(), Some(identity))
    };
    // Dials until the certificate has expired: no session is resumed, each handshake checks it.
    let expired = |dialer: Dialer| {
        run(async {
            loop {
                if let Err(error) = dialer.hello(&hello()).await {
                    assert_eq!(error.cause(), Cause::Refused, "{error}");
                    return error.to_string().to_lowercase();
                }
            }
        })
    };
    let rig = Rig::new(&with(authority.issue("prefill-0")));
    let why = expired(dialer(&rig, &short("decode-0")));
    assert!(why.contains("expired") && why.contains("this side's certificate"), "{why}");
    let rig = Rig::new(&with(short("prefill-0")));
    let why = expired(dialer(&rig, &authority.issue("decode-0")));
    assert!(why.contains("expired") && why.contains("the peer's certificate"), "{why}");
}

#[test]
fn a_consumer_that_claims_another_engine_is_refused_by_name() {
    let authority = Authority::new();
    let rig = Rig::new(&with(authority.issue("prefill-0")));
    let named = "this certificate speaks for engine \"decode-1\", not \"decode-0\"";
    let why = refused(rig.addr, with(authority.issue("decode-1")));
    assert!(why.contains(named), "{why}");
    let consumer = Consumer::new(rig.addr, with(authority.issue("decode-1")));
    let claim = consumer.claim(1, &rig.desk.me);
    assert_eq!(consumer.answer(), (claim, Some(Cause::Refused)));

    // It says Hello as itself, and everything else as the other one.
    let own = authority.issue("decode-1");
    let (me, other) = (peer_id("decode-1"), hello().peer);
    let denied = |r: Result<(), Status>| {
        let status = r.expect_err("refused");
        assert_eq!(status.code(), Code::PermissionDenied, "{status}");
        assert!(status.message().contains(named), "{status}");
    };
    run(async {
        let mut ferry = raw(rig.addr, &own.ca, Some(&own)).await.unwrap();
        ferry.hello(proto::HelloRequest::from(&Hello { peer: me, ..hello() })).await.unwrap();
        let from = || Some((&other).into());
        let expect_incarnation = rig.desk.me.incarnation.get();
        let open = proto::client_frame::Frame::Open(proto::Open { from: from(), expect_incarnation });
        let frames = tokio_stream::iter([proto::ClientFrame { seq: 0, frame: Some(open) }]);
        let mut stream = ferry.session(frames).await.unwrap().into_inner();
        denied(stream.message().await.map(|_| ()));
        let kind = proto::LaneKind::Tcp.into();
        let lane = proto::LaneRequest { from: from(), expect_incarnation, kind, verbs: Vec::new() };
        denied(ferry.connect_lane(lane).await.map(|_| ()));
        let offer = Some(OfferId::random().into());
        let release = proto::ReleaseRequest { from: from(), offer, token: vec![1; 16].into(), expect_incarnation };
        denied(ferry.release(release.clone()).await.map(|_| ()));
        // On behalf of itself it may.
        ferry.release(proto::ReleaseRequest { from: None, ..release }).await.unwrap();
    });
}

#[test]
fn a_certificate_without_an_engine_may_not_call() {
    let authority = Authority::new();
    let rig = Rig::new(&with(authority.issue("prefill-0")));
    let nameless = authority.issue_uris(&["https://example.org/engine/decode-0"]);
    run(async {
        let mut ferry = raw(rig.addr, &nameless.ca, Some(&nameless)).await.unwrap();
        let hello = ferry.hello(proto::HelloRequest::from(&hello())).await.expect_err("a Hello");
        let offer = Some(OfferId::random().into());
        let release = proto::ReleaseRequest { from: None, offer, token: vec![1; 16].into(), expect_incarnation: 0 };
        let release = ferry.release(release).await.expect_err("a release");
        for status in [hello, release] {
            assert_eq!(status.code(), Code::PermissionDenied);
            assert!(status.message().contains("kvferry://engine/ID"), "{status}");
        }
    });
}

#[test]
fn a_producer_whose_certificate_does_not_name_its_engine_is_refused() {
    let authority = Authority::new();
    let rig = Rig::new(&with(authority.issue("prefill-9")));
    let why = refused(rig.addr, with(authority.issue("decode-0")));
    assert!(why.contains("the peer's certificate speaks for engine \"prefill-9\", not \"prefill-0\""), "{why}");
    let consumer = Consumer::new(rig.addr, with(authority.issue("decode-0")));
    let claim = consumer.claim(1, &rig.desk.me);
    assert_eq!(consumer.answer(), (claim, Some(Cause::Refused)));
    assert!(rig.seen.try_iter().all(|s| !matches!(s, super::rig::Seen::Opened(_))), "no session was opened");
}

#[test]
fn engines_that_are_not_listed_are_refused_by_both_sides() {
    let only = |engine: &str| Config { engines: vec![engine.parse().unwrap()], ..config() };
    let rig = Rig::new(&only("decode-1"));
    let why = refused(rig.addr, config());
    assert!(why.contains("engine \"decode-0\" is not in this rank's list"), "{why}");
    let rig = Rig::new(&only("decode-0"));
    run(Caller::new(only("prefill-0")).hello(&rig.addr.to_string(), &hello())).unwrap();
    let why = refused(rig.addr, only("prefill-1"));
    assert!(why.contains("engine \"prefill-0\" is not in this rank's list"), "{why}");
    let consumer = Consumer::new(rig.addr, only("prefill-1"));
    let claim = consumer.claim(1, &rig.desk.me);
    assert_eq!(consumer.answer(), (claim, Some(Cause::Refused)));
}
