//! Input from strangers and broken peers: it costs them their own connection or session.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use kvferry_proto::{ClientBody, Incarnation, PeerId, ServerBody, ServerFrame, hello::Hello};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{
    Code, Status, Streaming,
    transport::{Channel, Endpoint},
};

use super::rig::{Consumer, LIMIT, Rig, Seen, config, hello, peer_id, run};
use crate::{
    control::{
        proto::{self, client_frame::Frame, ferry_client::FerryClient},
        wire::MAX_RENEW,
    },
    driver::runtime::Runtime,
};

/// A peer that can send any frame.
struct Raw {
    me: PeerId,
    frames: UnboundedSender<proto::ClientFrame>,
    replies: Streaming<proto::ServerFrame>,
    _client: FerryClient<Channel>,
}

impl Raw {
    async fn connect(rig: &Rig) -> Self {
        Self::with_window(rig, 1 << 16).await
    }

    /// `window`: bytes that the server may send on a stream before they are read.
    async fn with_window(rig: &Rig, window: u32) -> Self {
        let endpoint = Endpoint::from_shared(format!("http://{}", rig.addr)).unwrap();
        let mut client = FerryClient::new(endpoint.initial_stream_window_size(window).connect().await.unwrap());
        let me = peer_id("decode-7");
        client.hello(proto::HelloRequest::from(&Hello { peer: me.clone(), ..hello() })).await.unwrap();
        let (frames, rx) = unbounded_channel();
        let replies = client.session(UnboundedReceiverStream::new(rx)).await.unwrap().into_inner();
        Self { me, frames, replies, _client: client }
    }

    async fn open(rig: &Rig) -> Self {
        Self::connect(rig).await.opened(rig).await
    }

    async fn opened(self, rig: &Rig) -> Self {
        let mut raw = self;
        raw.send(0, raw.open_frame(rig.desk.me.incarnation));
        let opened = raw.replies.message().await.unwrap().unwrap();
        assert!(matches!(opened.frame, Some(proto::server_frame::Frame::Opened(_))), "{opened:?}");
        raw
    }

    fn send(&self, seq: u64, frame: Frame) {
        let _ = self.frames.send(proto::ClientFrame { seq, frame: Some(frame) });
    }

    fn open_frame(&self, expect: Incarnation) -> Frame {
        Frame::Open(proto::Open { from: Some((&self.me).into()), expect_incarnation: expect.get() })
    }

    async fn end(mut self) -> Status {
        loop {
            match self.replies.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the session ended without an error"),
                Err(status) => return status,
            }
        }
    }
}

/// The server still serves.
fn serves(rig: &Rig) {
    let consumer = Consumer::new(rig.addr, config());
    let claim = consumer.claim(1, &rig.desk.me);
    assert_eq!(consumer.answer(), (claim, None));
}

/// Waits until the other side closes the connection.
fn until_closed(mut io: TcpStream) {
    io.set_read_timeout(Some(LIMIT)).unwrap();
    let mut buf = [0; 4096];
    loop {
        match io.read(&mut buf) {
            Ok(0) => return,
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return,
            Err(e) => panic!("not closed in time: {e}"),
        }
    }
}

#[test]
fn random_bytes_and_half_open_connections_do_no_harm() {
    let mut c = config();
    c.session.hello_timeout = Duration::from_millis(300);
    let rig = Rig::new(&c);
    let mut noise = 1u64;
    let mut random = || {
        noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (noise >> 56) as u8
    };
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let mut connections = Vec::new();
    for i in 0..60 {
        let mut io = TcpStream::connect(rig.addr).unwrap();
        let bytes: Vec<u8> = match i % 4 {
            // Half open: no bytes, or a valid beginning.
            0 => Vec::new(),
            1 => preface.to_vec(),
            // Random bytes, at once or after a valid beginning.
            2 => (0..500).map(|_| random()).collect(),
            _ => preface.iter().copied().chain((0..500).map(|_| random())).collect(),
        };
        // Fails if the server has closed already.
        let _ = io.write_all(&bytes);
        connections.push(io);
    }
    serves(&rig);
    connections.into_iter().for_each(until_closed);
    serves(&rig);
}

#[test]
fn connections_over_the_limit_are_closed_and_can_return_later() {
    let mut c = config();
    c.limits.sessions = 1;
    let rig = Rig::new(&c);
    let mut held: Vec<_> = (0..66).map(|_| TcpStream::connect(rig.addr).unwrap()).collect();
    until_closed(TcpStream::connect(rig.addr).unwrap());
    // The others are unharmed. Closing them makes room.
    drop(held.split_off(1));
    serves(&rig);
}

#[test]
fn a_session_for_another_incarnation_is_refused() {
    let rig = Rig::new(&config());
    let status = run(async {
        let raw = Raw::connect(&rig).await;
        raw.send(0, raw.open_frame(Incarnation::random()));
        raw.end().await
    });
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains(&rig.desk.me.incarnation.to_string()), "{status}");
}

#[test]
fn a_frame_that_breaks_a_bound_ends_its_session_by_name_and_no_other() {
    let rig = Rig::new(&config());
    let other = Consumer::new(rig.addr, config());
    let claim = other.claim(1, &rig.desk.me);
    assert_eq!(other.answer(), (claim, None));
    let id = Some(proto::OfferId { high: 1, low: 1 });
    let bad = [
        (
            "claim.reader",
            Some(Frame::Claim(proto::Claim {
                awaited: false,
                claim: 1,
                offer: id,
                reader: 2,
                readers: 2,
                token: vec![1; 16].into(),
                number: 0,
            })),
        ),
        ("renew.claims", Some(Frame::Renew(proto::Renew { claims: vec![1; 5000] }))),
        (
            "seq",
            Some(Frame::Release(proto::Unclaim {
                claim: 1,
                offer: id,
                reader: 0,
                readers: 1,
                all: false,
                token: vec![1; 16].into(),
            })),
        ),
        ("Open comes once", None),
    ];
    for (name, frame) in bad {
        let status = run(async {
            let raw = Raw::open(&rig).await;
            raw.send(0, frame.unwrap_or_else(|| raw.open_frame(rig.desk.me.incarnation)));
            raw.end().await
        });
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains(name), "{name}: {status}");
    }
    assert_eq!(rig.server.refusals([127, 0, 0, 1].into(), "frame"), Some(3), "the first one is in the log");
    let claim = other.claim(2, &rig.desk.me);
    assert_eq!(other.answer(), (claim, None));
}

#[test]
fn a_frame_over_the_limit_ends_its_session() {
    let rig = Rig::new(&config());
    let status = run(async {
        let raw = Raw::open(&rig).await;
        // The largest legitimate frame fits.
        raw.send(0, Frame::Renew(proto::Renew { claims: vec![u64::MAX; MAX_RENEW] }));
        raw.send(0, Frame::Renew(proto::Renew { claims: vec![u64::MAX; 15_000] }));
        raw.end().await
    });
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("a frame of over 131072 bytes"), "{status}");
    rig.seen(|s| matches!(s, Seen::Frame(_, f) if matches!(f.body, ClientBody::Renew(_))).then_some(()));
    serves(&rig);
}

/// A Hello whose stream never ends.
async fn unfinished(channel: Channel, first: Option<proto::HelloRequest>) -> Status {
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.unwrap();
    let frames = tokio_stream::StreamExt::chain(tokio_stream::iter(first), tokio_stream::pending());
    let codec = tonic_prost::ProstCodec::<_, proto::HelloReply>::default();
    let path = http::uri::PathAndQuery::from_static("/kvferry.v1.Ferry/Hello");
    grpc.client_streaming(tonic::Request::new(frames), path, codec).await.map(|_| ()).expect_err("an unfinished call")
}

async fn channel(rig: &Rig) -> Channel {
    Endpoint::from_shared(format!("http://{}", rig.addr)).unwrap().connect().await.unwrap()
}

#[test]
fn a_large_request_is_refused_before_it_is_in_memory() {
    // The time limit cannot be the reason.
    let mut c = config();
    c.session.hello_timeout = LIMIT * 2;
    let rig = Rig::new(&c);
    let large = proto::HelloRequest { secret: vec![1; 15 << 20].into(), ..(&hello()).into() };
    let status = run(async { unfinished(channel(&rig).await, Some(large)).await });
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert!(status.message().contains("a request of over 32768 bytes"), "{status}");
    assert_eq!(rig.server.refusals([127, 0, 0, 1].into(), "request"), Some(0), "logged");
    serves(&rig);
}

#[test]
fn a_request_that_is_never_whole_ends_in_time() {
    let mut c = config();
    c.session.hello_timeout = Duration::from_millis(200);
    let rig = Rig::new(&c);
    run(async {
        // The connection made a call, so that it stays.
        let channel = channel(&rig).await;
        FerryClient::new(channel.clone()).hello(proto::HelloRequest::from(&hello())).await.unwrap();
        for first in [None, Some((&hello()).into())] {
            let status = unfinished(channel.clone(), first).await;
            assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
            assert!(status.message().contains("session.hello_timeout"), "{status}");
        }
        FerryClient::new(channel).hello(proto::HelloRequest::from(&hello())).await.unwrap();
    });
}

#[test]
fn a_connection_with_unfinished_calls_only_is_closed() {
    let mut c = config();
    c.session.hello_timeout = Duration::from_millis(300);
    // Unanswered pings must not be the reason.
    c.session.idle_heartbeat = LIMIT * 2;
    let rig = Rig::new(&c);
    for path in ["Hello", "Session"] {
        let mut io = TcpStream::connect(rig.addr).unwrap();
        let field = |name: &[u8], value: &str| [name, &[value.len() as u8], value.as_bytes()].concat();
        let headers = [
            // POST, http, :path, :authority, content-type
            vec![0x83, 0x86],
            field(&[0x04], &format!("/kvferry.v1.Ferry/{path}")),
            field(&[0x01], "x"),
            field(&[0x0f, 0x10], "application/grpc"),
        ]
        .concat();
        // END_HEADERS without END_STREAM, on stream 1.
        let head = [0, 0, headers.len() as u8, 1, 4, 0, 0, 0, 1];
        io.write_all(&[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".as_slice(), &head, &headers].concat())
            .unwrap();
        until_closed(io);
    }
    serves(&rig);
}

#[test]
fn a_session_begins_with_open_and_soon() {
    let mut c = config();
    c.session.hello_timeout = Duration::from_millis(200);
    let rig = Rig::new(&c);
    let status = run(async {
        let raw = Raw::connect(&rig).await;
        raw.send(0, Frame::Ping(proto::Ping { number: 1 }));
        raw.end().await
    });
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    let status = run(async { Raw::connect(&rig).await.end().await });
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
}

#[test]
fn a_silent_session_is_ended() {
    let mut c = config();
    c.session.silence = Duration::from_millis(200);
    let rig = Rig::new(&c);
    let status = run(async { Raw::open(&rig).await.end().await });
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    assert!(status.message().contains("silent"), "{status}");
    rig.closed();
}

#[test]
fn a_consumer_that_does_not_read_is_closed_and_no_other() {
    let rig = Rig::new(&config());
    let other = Consumer::new(rig.addr, config());
    let claim = other.claim(1, &rig.desk.me);
    assert_eq!(other.answer(), (claim, None));
    rig.opened();
    // Its connection lives and answers HTTP/2 pings, but it reads only the first few frames of its stream: the server's
    // side is stuck.
    let runtime = Runtime::start("test-raw").unwrap();
    let raw = runtime.handle().block_on(async { Raw::with_window(&rig, 64).await.opened(&rig).await });
    let id = rig.opened();
    let outbox = rig.desk.outbox(id);
    let frame = ServerFrame { ack: 0, body: Some(ServerBody::Draining) };
    // Not in one burst, so that the server is stuck in the middle before the queue overflows.
    while (0..256).all(|_| outbox.send(frame.clone())) {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(rig.closed(), id);
    drop((raw, runtime));
    let claim = other.claim(2, &rig.desk.me);
    assert_eq!(other.answer(), (claim, None));
}
