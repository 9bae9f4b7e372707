//! GPU memory of the stand-in for libcuda. No device reaches it: soft-RoCE refuses a dmabuf, and the kernel finds no pages at
//! its addresses, as without a peer-memory module.

use kvferry::{Consumer, LaneKind, Pull};
use kvferry_testkit::{
    gpu,
    rdma::{config, need_wires, spec},
    rig::{self, Producer, SOON, Spec, all_of, assert_loaded_is_exact, ended},
};

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn reads_into_gpu_memory_go_through_the_ring_and_each_way_says_why_it_failed() {
    need_wires(1);
    let spec = spec(1, 128, 4, 16 << 10);
    let memory = gpu::memory(&spec.layout());
    let ways = kvferry::verbs::gpu_reach(&config(1, None).verbs, &memory).expect("a rail");
    assert!(!ways.is_empty());
    for way in &ways {
        let (dmabuf, address) = (way.dmabuf.as_ref().unwrap_err(), way.address.as_ref().unwrap_err());
        println!("{}: as a dmabuf: {dmabuf}; by address: {address}", way.rail);
        assert!(dmabuf.contains("dmabuf") && address.contains("nvidia_peermem"), "{dmabuf}; {address}");
        assert!(!way.is_direct() && !way.is_served());
    }
    let mut producer = Producer::start(&spec);
    let consumer = Consumer::builder("decode".parse().unwrap(), spec.kv_model(), spec.layout())
        .config(config(1, None))
        .memory(memory)
        .build()
        .unwrap();
    for _ in 0..3 {
        let offer = producer.offer_all();
        consumer
            .pull(Pull::new(offer.clone(), all_of(&offer)).lanes(vec![LaneKind::Verbs]).deadline(5 * SOON))
            .unwrap();
        let end = consumer.wait(5 * SOON).expect("it ends");
        assert!(end.outcome.complete(), "{:?}", end.outcome);
        assert_eq!(end.outcome.lanes, [LaneKind::Verbs]);
        assert_eq!(assert_loaded_is_exact(&end, &consumer, &spec, producer.seed), 128);
    }
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn a_pool_that_no_device_reaches_is_served_over_tcp_instead() {
    need_wires(1);
    let spec = Spec { gpu: true, tcp: true, ..spec(1, 64, 4, 16 << 10) };
    let mut producer = Producer::start(&spec);
    let consumer = rig::consumer(&spec, config(1, None));
    let offer = producer.offer_all();
    let lanes = vec![LaneKind::Verbs, LaneKind::Tcp];
    consumer.pull(Pull::new(offer.clone(), all_of(&offer)).lanes(lanes).deadline(SOON)).unwrap();
    let end = ended(&consumer);
    assert!(end.outcome.complete(), "{:?}", end.outcome);
    assert_eq!(end.outcome.lanes, [LaneKind::Tcp]);
    assert_eq!(assert_loaded_is_exact(&end, &consumer, &spec, producer.seed), 64);
}
