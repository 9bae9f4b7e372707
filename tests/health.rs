//! A wedged lane turns the health of the whole process bad. In a process of its own: nothing turns it good again.

use std::time::Duration;

use kvferry::{
    BlockId, Config, Consumer, GroupId, LaneKind, LocalBlocks, OfferGroup, OfferSpec, PoolLayout, Producer, Pull, Ready,
};
use kvferry_testkit::rig::{SOON, model};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

#[test]
fn a_wedged_lane_turns_the_health_service_of_its_process_to_not_serving() {
    let (model, layout) = (model("m", "uint8"), PoolLayout::uniform(8, 1, 64 << 10, 16));
    let producer =
        Producer::builder("prefill".parse().unwrap(), model.clone(), layout.clone()).build().expect("a producer");
    let mut config = Config::default();
    config.pull.faults = Some("silent@64K,wedge".parse().expect("faults"));
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

    let blocks: Vec<_> = (0..8).map(|b| Some(BlockId(b))).collect();
    let groups = vec![OfferGroup { group: GroupId(0), first_position: 0, blocks: blocks.clone() }];
    let offer = producer.offer(OfferSpec::new(128, groups), Ready::Now).unwrap();
    let wanted = LocalBlocks { group: GroupId(0), first_position: 0, blocks };
    let pull = Pull::new(offer, vec![wanted]).lanes(vec![LaneKind::Tcp]).deadline(Duration::from_millis(500));
    consumer.pull(pull).unwrap();
    assert_eq!(next(&mut watch), ServingStatus::NotServing);
    assert_eq!(consumer.wedged(), 1);
    let whole = runtime.block_on(client.check(HealthCheckRequest { service: String::new() })).unwrap().into_inner();
    assert_eq!(whole.status(), ServingStatus::NotServing, "and that of the server as a whole");
    // Its blocks are withheld: a clean end would wait for them in vain.
    std::mem::forget(consumer);
}
