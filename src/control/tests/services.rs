//! The services beside the session: reflection, additional services, probes, and the release without a session.

use std::time::{Duration, Instant};

use kvferry_proto::{Incarnation, OfferId, Token};
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};
use tonic_reflection::pb::{
    v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    },
    v1alpha,
};

use super::rig::{LIMIT, Rig, config, model, run};
use crate::control::{
    call::{CallError, Caller, probe, release},
    pauses::WAITING,
    proto::{self, ferry_client::FerryClient},
    service::GUESS_PAUSE,
    wire::ReleaseWanted,
};

async fn channel(rig: &Rig) -> Channel {
    Endpoint::from_shared(format!("http://{}", rig.addr)).unwrap().connect().await.unwrap()
}

#[test]
fn reflection_lists_the_services_and_knows_their_messages() {
    let rig = Rig::new(&config());
    run(async {
        let mut client = ServerReflectionClient::new(channel(&rig).await);
        let ask = |m| ServerReflectionRequest { host: String::new(), message_request: Some(m) };
        let asked = tokio_stream::iter([
            ask(MessageRequest::ListServices(String::new())),
            ask(MessageRequest::FileContainingSymbol("kvferry.v1.ClientFrame".into())),
        ]);
        let mut replies = client.server_reflection_info(asked).await.unwrap().into_inner();
        let list = replies.message().await.unwrap().unwrap().message_response;
        let Some(MessageResponse::ListServicesResponse(list)) = list else { panic!("{list:?}") };
        let names: Vec<_> = list.service.iter().map(|s| s.name.as_str()).collect();
        for name in ["kvferry.v1.Ferry", "test.Extra", "grpc.health.v1.Health"] {
            assert!(names.contains(&name), "{names:?}");
        }
        let file = replies.message().await.unwrap().unwrap().message_response;
        assert!(matches!(file, Some(MessageResponse::FileDescriptorResponse(_))), "{file:?}");

        // Older tools use the older service.
        let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(channel(&rig).await);
        let list = v1alpha::server_reflection_request::MessageRequest::ListServices(String::new());
        let asked = v1alpha::ServerReflectionRequest { host: String::new(), message_request: Some(list) };
        let mut replies = client.server_reflection_info(tokio_stream::iter([asked])).await.unwrap().into_inner();
        assert!(replies.message().await.unwrap().unwrap().message_response.is_some());
    });
}

#[test]
fn an_offer_is_released_without_a_session() {
    let rig = Rig::new(&config());
    let addr = rig.addr.to_string();
    let me = rig.desk.me.incarnation;
    assert_eq!(run(release(&addr, None, (OfferId::random(), Token::random()), Some(me), LIMIT)), Ok(true));
    let other = run(Caller::new(config()).release(
        &addr,
        None,
        (OfferId::random(), Token::random()),
        Some(Incarnation::random()),
    ));
    let Err(CallError::Refused { why, .. }) = other else { panic!("{other:?}") };
    assert!(why.contains("restarted"), "{why}");
}

#[test]
fn wrong_releases_of_a_peer_are_answered_one_after_the_other_and_right_ones_at_once() {
    let rig = Rig::new(&config());
    let right = Token::random();
    *rig.desk.right.lock().unwrap() = Some(right);
    run(async {
        let ferry = FerryClient::new(channel(&rig).await);
        let release = |token: Token| {
            let (mut ferry, wanted) =
                (ferry.clone(), ReleaseWanted { from: None, offer: OfferId::random(), token, expect: None });
            async move { ferry.release(proto::ReleaseRequest::from(&wanted)).await.map_err(|s| s.code()) }
        };
        let began = Instant::now();
        let mut wrong = std::pin::pin!(async {
            let wrong = || release(Token::random());
            let (a, b, c) = tokio::join!(wrong(), wrong(), wrong());
            [a, b, c].map(|r| r.unwrap_err())
        });
        tokio::select! {
            biased;
            _ = &mut wrong => panic!("the right one waited for the wrong ones"),
            freed = async { release(right).await.unwrap(); release(right).await } => assert!(freed.unwrap().into_inner().freed),
        }
        assert_eq!(wrong.await, [Code::PermissionDenied; 3]);
        assert!(began.elapsed() >= 3 * GUESS_PAUSE, "{:?}", began.elapsed());
        // With as many in the queue as fit, further ones are not queued.
        let mut queue = tokio::task::JoinSet::new();
        for _ in 0..WAITING + 1 {
            queue.spawn(release(Token::random()));
        }
        let first = queue.join_next().await.unwrap().unwrap();
        assert_eq!(first.unwrap_err(), Code::ResourceExhausted);
        release(right).await.unwrap();
    });
}

#[test]
fn a_probe_returns_the_identity_of_the_server() {
    let rig = Rig::new(&config());
    let welcome = run(probe(&rig.addr.to_string(), &"probe".parse().unwrap(), &model(), LIMIT)).unwrap();
    assert_eq!(welcome.peer, rig.desk.me);
}

#[test]
fn a_call_to_a_silent_or_closed_port_fails_in_time() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let short = Duration::from_millis(200);
    let silent = run(release(&addr, None, (OfferId::random(), Token::random()), None, short)).unwrap_err();
    assert!(matches!(silent, CallError::Silent { .. } | CallError::Dial(_)), "{silent}");
    drop(listener);
    let gone = run(release(&addr, None, (OfferId::random(), Token::random()), None, LIMIT)).unwrap_err();
    assert!(gone.to_string().contains("check that the producer runs there"), "{gone}");
}
