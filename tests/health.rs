//! A wedged lane makes its whole process unhealthy. This test has a binary of its own, because that is permanent.

use std::time::Duration;

use kvferry::{Consumer, LaneKind, OfferGroup, OfferSpec, PoolLayout, Producer, Pull, Ready};
use kvferry_testkit::rig::{SOON, local, model, throttled};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

#[test]
fn a_wedged_lane_sets_the_health_of_its_process_to_not_serving() {
    let (model, layout) = (model("m", "uint8"), PoolLayout::uniform(8, 1, 64 << 10, 16));
    let producer =
        Producer::builder("prefill".parse().unwrap(), model.clone(), layout.clone()).build().expect("a producer");
    let config = throttled("silent@64K,wedge");
    let consumer = Consumer::builder("decode".parse().unwrap(), model, layout).config(config).build().expect("starts");

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (mut client, mut watch) = runtime.block_on(async {
        let at = tonic::transport::Endpoint::from_shared(format!("http://{}", producer.addr())).unwrap();
        let mut client = HealthClient::new(at.connect().await.unwrap());
        let service = "kvferry.v1.Ferry".to_owned();
        let watch = client.watch(HealthCheckRequest { service }).await.unwrap().into_inner();
        (client, watch)
    });
    let next = |watch: &mut tonic::Streaming<tonic_health::pb::HealthCheckResponse>| {
        let answer = runtime.block_on(async { tokio::time::timeout(SOON, watch.message()).await });
        answer.expect("it answers in time").unwrap().unwrap().status()
    };
    assert_eq!(next(&mut watch), ServingStatus::Serving);

    let wanted = local(0..8);
    let groups =
        wanted.iter().map(|w| OfferGroup { group: w.group, first_position: 0, blocks: w.blocks.clone() }).collect();
    let offer = producer.offer(OfferSpec::new(128, groups), Ready::Now).unwrap();
    let pull = Pull::new(offer, wanted).lanes(vec![LaneKind::Tcp]).deadline(Duration::from_millis(500));
    consumer.pull(pull).unwrap();
    assert_eq!(next(&mut watch), ServingStatus::NotServing);
    assert_eq!(consumer.wedged(), 1);
    let whole = runtime.block_on(client.check(HealthCheckRequest { service: String::new() })).unwrap().into_inner();
    assert_eq!(whole.status(), ServingStatus::NotServing, "the health of the whole server");
    // Its blocks are withheld, so a clean shutdown would wait for them indefinitely.
    std::mem::forget(consumer);
}
