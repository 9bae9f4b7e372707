//! A peer that returns at the same address is served again by both sides without a restart.

use std::time::Duration;

use kvferry::{Config, LaneKind};
use kvferry_testkit::rig::{
    Producer, SOON, Spec, assert_loaded_is_exact, consumer, ended, pull_all, throttled, wait_until_loaded,
};
use rustix::process::Signal;

use crate::proxy::Proxy;

#[test]
fn a_producer_that_restarts_at_the_same_address_is_pulled_from_again_by_the_same_consumer() {
    for (lane, new_engine) in
        [(LaneKind::Tcp, false), (LaneKind::Tcp, true), (LaneKind::Local, false), (LaneKind::Local, true)]
    {
        let spec = Spec::default();
        let mut producer = Producer::start(&spec);
        let consumer = consumer(&spec, Config::default());
        for life in 0..4 {
            let offer = producer.offer_all();
            consumer.pull(pull_all(&offer, lane, SOON)).unwrap();
            let end = ended(&consumer);
            assert!(end.outcome.complete(), "{lane}, life {life}: {:?}", end.outcome);
            assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
            let engine = if new_engine { format!("prefill-{life}") } else { spec.engine.clone() };
            let next = Spec { listen: producer.addr.clone(), engine, ..spec.clone() };
            producer.kill();
            producer = Producer::start(&next);
        }
    }
}

#[test]
fn a_restart_of_the_producer_in_mid_pull_ends_that_pull_and_the_next_one_is_served() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let consumer = consumer(&spec, throttled("throttle=32M"));
    for _ in 0..3 {
        let offer = producer.offer_all();
        let pull = consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
        wait_until_loaded(&consumer, pull, 0.2);
        let next = Spec { listen: producer.addr.clone(), ..spec.clone() };
        producer.signal(Signal::KILL);
        let seed = producer.seed;
        producer.kill();
        producer = Producer::start(&next);
        let end = ended(&consumer);
        assert!(end.outcome.invalid() > 0);
        assert_loaded_is_exact(&end, &consumer, &spec, seed);
    }
    let offer = producer.offer_all();
    consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    let end = ended(&consumer);
    assert!(end.outcome.complete(), "{:?}", end.outcome);
    assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
}

#[test]
fn a_consumer_that_restarts_is_served_again() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    for _ in 0..3 {
        let consumer = consumer(&spec, Config::default());
        let offer = producer.offer_all();
        consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
        assert!(ended(&consumer).outcome.complete());
        assert_eq!(producer.freed(offer.id).0, "Released");
    }
}

#[test]
fn a_control_connection_that_was_forgotten_while_idle_costs_the_next_pull_less_than_three_seconds() {
    for lane in [LaneKind::Tcp, LaneKind::Local] {
        let spec = Spec::default();
        let mut producer = Producer::start(&spec);
        let proxy = Proxy::new(&producer.addr);
        let consumer = consumer(&spec, Config::default());
        let mut pull = |deadline| {
            let mut offer = producer.offer_all();
            offer.ranks[0].addr = proxy.addr.clone();
            consumer.pull(pull_all(&offer, lane, deadline)).unwrap();
            let end = ended(&consumer);
            assert!(end.outcome.complete(), "{lane}: {:?}", end.outcome);
            assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
            assert_eq!(producer.freed(offer.id).0, "Released");
            end.outcome.times.ended.unwrap()
        };
        pull(SOON);
        assert_eq!(proxy.connections(), 1);
        for life in 1..3 {
            proxy.forget();
            let took = pull(Duration::from_secs(5));
            assert!(took < Duration::from_secs(3), "{lane}, life {life}: {took:?}");
            assert_eq!(proxy.connections(), 1 + life, "one more dial, and the session moved to it");
        }
    }
}
