//! One peer against the others: stolen incarnations, and more than its share.

use std::{net::SocketAddr, time::Duration};

use kvferry_proto::{Cause, PeerId, hello::Hello};
use tokio::net::{TcpSocket, TcpStream};
use tonic::{Code, Status, Streaming, transport::Channel};

use super::rig::{Consumer, NoLanes, Rig, config, hello, peer_id, run};
use crate::{
    config::Config,
    control::{
        call::Caller,
        dial::Dialer,
        once::Once,
        proto::{self, client_frame::Frame, ferry_client::FerryClient},
    },
    driver::runtime::Runtime,
};

type Ferry = FerryClient<Channel>;

/// Another host than the consumers of these tests, which are at 127.0.0.1.
pub(super) async fn from_elsewhere(to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    socket.connect(to).await.unwrap()
}

pub(super) async fn ferry(io: TcpStream) -> Ferry {
    let endpoint = tonic::transport::Endpoint::from_static("http://raw");
    FerryClient::new(endpoint.connect_with_connector(Once::new(io)).await.unwrap())
}

pub(super) async fn say_hello(ferry: &mut Ferry, me: &PeerId, secret: &[u8]) -> Result<(), Status> {
    let mut request = proto::HelloRequest::from(&Hello { peer: me.clone(), ..hello() });
    request.secret = secret.to_vec().into();
    ferry.hello(request).await.map(|_| ())
}

/// Opens a session and returns its stream, which lives as long as it is held.
pub(super) async fn open(
    ferry: &mut Ferry,
    from: &PeerId,
    to: &PeerId,
) -> Result<Streaming<proto::ServerFrame>, Status> {
    let open = proto::Open { from: Some(from.into()), expect_incarnation: to.incarnation.get() };
    let first = proto::ClientFrame { seq: 0, frame: Some(Frame::Open(open)) };
    // Like a live session: the stream stays open after its first frame.
    let frames = tokio_stream::StreamExt::chain(tokio_stream::iter([first]), tokio_stream::pending());
    let mut stream = ferry.session(frames).await?.into_inner();
    stream.message().await?;
    Ok(stream)
}

fn denied(status: &Status, text: &str) {
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    assert!(status.message().contains(text), "{text}: {status}");
}

#[test]
fn a_session_with_a_stolen_incarnation_gets_nothing_of_the_victims_and_takes_nothing_from_it() {
    let rig = Rig::new(&config());
    let me = hello();
    let victim = me.peer.clone();
    let consumer = Consumer::with(rig.addr, config(), me, std::sync::Arc::new(NoLanes));
    let claim = consumer.claim(1, &rig.desk.me);
    assert_eq!(consumer.answer(), (claim, None));
    rig.opened();
    let thief = peer_id("decode-0");
    run(async {
        let mut ferry = ferry(from_elsewhere(rig.addr).await).await;
        // Without a Hello, and with a Hello as itself.
        denied(&open(&mut ferry, &victim, &rig.desk.me).await.err().unwrap(), "has not said Hello on this connection");
        say_hello(&mut ferry, &thief, &[7; 16]).await.unwrap();
        denied(&open(&mut ferry, &victim, &rig.desk.me).await.err().unwrap(), "has not said Hello on this connection");
        let lane = proto::LaneRequest {
            from: Some((&victim).into()),
            expect_incarnation: rig.desk.me.incarnation.get(),
            kind: proto::LaneKind::Tcp.into(),
            verbs: Vec::new(),
        };
        denied(&ferry.connect_lane(lane.clone()).await.err().unwrap(), "has not said Hello on this connection");
        let status = say_hello(&mut ferry, &victim, &[7; 15]).await.err().unwrap();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        denied(&ferry.connect_lane(lane).await.err().unwrap(), "has not said Hello on this connection");
        // With a Hello as the victim, and without the victim's secret: another consumer's session.
        say_hello(&mut ferry, &victim, &[7; 16]).await.unwrap();
        let mut stream = open(&mut ferry, &victim, &rig.desk.me).await.unwrap();
        let known = rig.opened();
        let (ids, next) = (rig.desk.consumers(), stream.message());
        assert_eq!(ids.len(), 2, "{known:?}: the desk knows two consumers: {ids:?}");
        assert!(tokio::time::timeout(Duration::from_millis(50), next).await.is_err(), "no frame of the victim's");
    });
    let next = consumer.claim(2, &rig.desk.me);
    assert_eq!(consumer.answer(), (next, None));
}

#[test]
fn a_thief_that_was_first_does_not_keep_the_victim_out() {
    let rig = Rig::new(&config());
    let me = hello();
    let victim = me.peer.clone();
    run(async {
        let mut thief = ferry(from_elsewhere(rig.addr).await).await;
        say_hello(&mut thief, &victim, &[7; 16]).await.unwrap();
        let _held = open(&mut thief, &victim, &rig.desk.me).await.unwrap();
        let consumer = Consumer::with(rig.addr, config(), me, std::sync::Arc::new(NoLanes));
        let claim = consumer.claim(1, &rig.desk.me);
        assert_eq!(consumer.answer(), (claim, None));
    });
}

#[test]
fn a_consumer_opens_a_second_connection_while_its_first_one_lingers() {
    let rig = Rig::new(&config());
    let (me, config) = (hello(), config());
    let dialer = Dialer::new(rig.addr.to_string().into(), &config, None);
    let runtime = Runtime::start("test-dials").unwrap();
    runtime.handle().block_on(async {
        let (first, _) = dialer.hello(&me).await.unwrap();
        let _first = open(&mut first.ferry(), &me.peer, &rig.desk.me).await.unwrap();
        // The first one is silent, not gone.
        let (second, _) = dialer.clone().hello(&me).await.unwrap();
        let _second = open(&mut second.ferry(), &me.peer, &rig.desk.me).await.unwrap();
        // A third one after both are gone, before the producer has forgotten them.
        drop((_first, first, _second, second));
        let (third, _) = dialer.hello(&me).await.unwrap();
        open(&mut third.ferry(), &me.peer, &rig.desk.me).await.unwrap();
        assert_eq!(rig.desk.consumers().len(), 1, "all three are one consumer's");
        // A dialer of the same process to another address of this producer has a session of its own.
        let other = Dialer::new(rig.addr.to_string().into(), &config, None);
        let (other, _) = other.hello(&me).await.unwrap();
        let _other = open(&mut other.ferry(), &me.peer, &rig.desk.me).await.unwrap();
        assert_eq!(rig.desk.consumers().len(), 2);
    });
}

#[test]
fn a_peer_that_opens_sessions_without_end_hears_the_limit_and_others_are_served() {
    let mut c = config();
    c.limits.sessions_per_peer = 8;
    let rig = Rig::new(&c);
    let runtime = Runtime::start("test-greedy").unwrap();
    // 4 incarnations on each of 5 connections, so that neither bounds the sessions.
    let greedy = runtime.handle().block_on(async {
        let (mut held, mut refused) = (Vec::new(), 0);
        for _ in 0..5 {
            let mut ferry = ferry(from_elsewhere(rig.addr).await).await;
            for _ in 0..4 {
                let me = peer_id("greedy");
                say_hello(&mut ferry, &me, &[1; 16]).await.unwrap();
                match open(&mut ferry, &me, &rig.desk.me).await {
                    Ok(stream) => held.push((stream, ferry.clone())),
                    Err(status) => {
                        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                        assert!(status.message().contains("limits.sessions_per_peer"), "{status}");
                        refused += 1;
                    }
                }
            }
        }
        assert_eq!((held.len(), refused), (8, 12));
        held
    });
    let consumer = Consumer::new(rig.addr, config());
    let claim = consumer.claim(1, &rig.desk.me);
    assert_eq!(consumer.answer(), (claim, None), "another peer is served");
    // The share is free again once its sessions are gone.
    drop((greedy, runtime));
    for _ in 0..8 {
        rig.closed();
    }
    run(async {
        let mut ferry = ferry(from_elsewhere(rig.addr).await).await;
        let me = peer_id("greedy");
        say_hello(&mut ferry, &me, &[1; 16]).await.unwrap();
        open(&mut ferry, &me, &rig.desk.me).await.unwrap();
    });
}

#[test]
fn a_claim_over_the_share_or_the_limit_of_sessions_ends_with_that_cause_at_once() {
    for (sessions, per_peer) in [(8192, 1), (1, 512)] {
        let mut c = config();
        (c.limits.sessions, c.limits.sessions_per_peer) = (sessions, per_peer);
        let rig = Rig::new(&c);
        // The total counts streams, of which a consumer may hold two for a moment.
        let first: Vec<_> = (0..if per_peer == 1 { 1 } else { 2 })
            .map(|_| {
                let consumer = Consumer::new(rig.addr, config());
                let claim = consumer.claim(1, &rig.desk.me);
                assert_eq!(consumer.answer(), (claim, None));
                consumer
            })
            .collect();
        let second = Consumer::new(rig.addr, config());
        let claim = second.claim(1, &rig.desk.me);
        assert_eq!(second.answer(), (claim, Some(Cause::Limit)));
        drop(first);
    }
}

#[test]
fn connections_over_a_peers_share_hear_the_limit_and_others_connect() {
    let mut c = config();
    c.limits.connections_per_peer = 3;
    let rig = Rig::new(&c);
    run(async {
        let mut held = Vec::new();
        for _ in 0..3 {
            let mut ferry = ferry(from_elsewhere(rig.addr).await).await;
            say_hello(&mut ferry, &peer_id("greedy"), &[1; 16]).await.unwrap();
            held.push(ferry);
        }
        let mut fourth = ferry(from_elsewhere(rig.addr).await).await;
        let status = say_hello(&mut fourth, &peer_id("greedy"), &[1; 16]).await.err().unwrap();
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
        assert!(status.message().contains("limits.connections_per_peer"), "{status}");
    });
    // A flood costs its own peer only.
    let runtime = Runtime::start("test-flood").unwrap();
    let flood = runtime.handle().block_on(async {
        let mut flood = Vec::new();
        for _ in 0..200 {
            flood.push(from_elsewhere(rig.addr).await);
        }
        flood
    });
    let hello_at = rig.addr.to_string();
    run(Caller::new(config()).hello(&hello_at, &hello())).unwrap();
    assert!(rig.server.connections() <= 3 + 16 + 1, "{}", rig.server.connections());
    drop(flood);
}

#[test]
fn a_host_that_is_not_listed_is_not_dialled() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let addr = listener.local_addr().unwrap();
    let only = |entry: &str| Config { dial: vec![entry.into()], ..config() };
    let error = run(Caller::new(only("10.0.0.0/8")).hello(&addr.to_string(), &hello())).expect_err("a host not listed");
    assert!(error.cause() == Cause::Refused && error.to_string().contains("`dial` does not list it"), "{error}");
    let consumer = Consumer::new(addr, only("192.0.2.1"));
    let claim = consumer.claim(1, &peer_id("prefill-0"));
    assert_eq!(consumer.answer(), (claim, Some(Cause::Refused)));
    let accepted = listener.accept().map(|_| ()).map_err(|e| e.kind());
    assert_eq!(accepted, Err(std::io::ErrorKind::WouldBlock), "no connection came");
    let rig = Rig::new(&config());
    let mut c = only("127.0.0.0/8");
    c.session.hello_timeout = Duration::from_secs(5);
    run(Caller::new(c).hello(&rig.addr.to_string(), &hello())).unwrap();
}
