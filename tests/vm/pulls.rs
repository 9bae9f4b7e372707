//! Pulls that go well.

use kvferry::lane::LaneKind;
use std::time::Duration;

use crate::{
    rig::{Producer, assert_loaded_is_exact, consumer, ended, pull_all},
    wires::{config, ends, objects, settled, spec, tc, wires},
};

/// Emulated CPUs are slow; no test here is about speed.
const LONG: Duration = Duration::from_secs(100);

fn exact(rails: usize, blocks: u32, regions: u32, block_size: u64) {
    let before = objects();
    let spec = spec(rails, blocks, regions, block_size);
    let (mut producer, consumer) = ends(rails, &spec, None);
    let offer = producer.offer_all();
    consumer.pull(pull_all(&offer, LaneKind::Verbs, LONG)).unwrap();
    let end = consumer.wait(LONG).expect("it ends");
    assert!(end.outcome.complete(), "{:?} {:?}", end.outcome.cause(), end.outcome.times);
    assert_eq!(end.outcome.lanes, [LaneKind::Verbs]);
    assert_eq!(assert_loaded_is_exact(&end, &consumer, &spec, producer.seed), u64::from(blocks));
    let took = end.outcome.times.data.unwrap();
    let bytes = u64::from(blocks) * spec.block_bytes();
    println!(
        "{rails} rails, {block_size} byte blocks: {} MiB in {took:?}, {:.1} MB/s",
        bytes >> 20,
        bytes as f64 / took.as_secs_f64() / 1e6
    );
    drop(consumer);
    producer.kill();
    settled(before);
}

#[test]
fn scattered_blocks_of_every_size_arrive_exact_over_one_and_two_rails() {
    if !wires(2) {
        return;
    }
    for rails in [1, 2] {
        for size in [4 << 10, 64 << 10, 1 << 20] {
            exact(rails, ((32u64 << 20) / size) as u32, 1, size);
        }
    }
}

#[test]
fn a_quarter_of_a_gigabyte_arrives_exact() {
    if wires(2) {
        exact(1, 1024, 4, 64 << 10);
        exact(2, 1024, 4, 64 << 10);
    }
}

#[test]
fn one_lost_packet_in_a_hundred_costs_time_and_no_block() {
    if !wires(1) {
        return;
    }
    for end in ["a1", "b1"] {
        tc(&format!("qdisc add dev {end} root netem loss 1% limit 10000"));
    }
    exact(1, 128, 1, 64 << 10);
    for end in ["a1", "b1"] {
        tc(&format!("qdisc del dev {end} root"));
    }
}

#[test]
fn a_peer_that_starts_again_is_pulled_from_again_and_nothing_piles_up() {
    if !wires(1) {
        return;
    }
    let spec = spec(1, 64, 1, 16 << 10);
    let before = objects();
    let consumer = consumer(&spec, config(1, None));
    let mut with_consumer = None;
    let mut addr = None;
    for round in 0..20 {
        let listen = addr.clone().unwrap_or_else(|| spec.listen.clone());
        let spec = crate::rig::Spec { listen, ..spec.clone() };
        let mut producer = Producer::start(&spec);
        addr = Some(producer.addr.clone());
        let offer = producer.offer_all();
        consumer.pull(pull_all(&offer, LaneKind::Verbs, LONG)).unwrap();
        let end = consumer.wait(LONG).expect("it ends");
        assert!(end.outcome.complete(), "round {round}: {:?}", end.outcome.cause());
        assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
        // Killed in the middle of another one.
        let offer = producer.offer_all();
        consumer.pull(pull_all(&offer, LaneKind::Verbs, Duration::from_secs(4))).unwrap();
        producer.kill();
        let end = ended(&consumer);
        assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
        let now = objects();
        match with_consumer {
            None => with_consumer = Some(now),
            Some(first) => {
                assert!(now.qp <= first.qp + 2 && now.mr <= first.mr + 1, "round {round}: {now:?}, {first:?}")
            }
        }
    }
    drop(consumer);
    settled(before);
}

#[test]
fn hunt() {
    if !wires(2) {
        return;
    }
    let rounds: u32 = std::env::var("KVFERRY_HUNT").ok().and_then(|s| s.parse().ok()).unwrap_or(10);
    let rails: usize = std::env::var("KVFERRY_HUNT_RAILS").ok().and_then(|s| s.parse().ok()).unwrap_or(2);
    let spec = spec(rails, 32, 1, 1 << 20);
    let (mut producer, consumer) = ends(rails, &spec, None);
    let zero = vec![0u8; 1 << 20];
    for round in 0..rounds {
        let layout = spec.layout();
        for b in 0..32 {
            consumer.memory().write_from(0, layout.groups[0].regions[0].block_offset(b), &zero).unwrap();
        }
        let offer = producer.offer_all();
        consumer.pull(pull_all(&offer, LaneKind::Verbs, LONG)).unwrap();
        let end = consumer.wait(LONG).expect("it ends");
        println!("round {round}: {} {:?} {:?} retries {:?}", end.outcome.complete(), end.outcome.cause(), end.outcome.times.data, counters());
        // Which page of which block each 512 bytes are.
        let mut known = std::collections::HashMap::new();
        let mut page = vec![0u8; 512];
        for p in 0..32u64 * 2048 {
            crate::pattern::fill(producer.seed, 0, p, &mut page);
            known.insert(page.clone(), p);
        }
        for position in end.outcome.groups[0].loaded.iter() {
            let src = end.offer.groups[0].blocks[position as usize].unwrap().0;
            let mut found = vec![0u8; 1 << 20];
            consumer.memory().read_into(0, layout.groups[0].regions[0].block_offset(position), &mut found).unwrap();
            let mut runs: Vec<(i64, u32)> = Vec::new();
            for (i, p) in found.chunks(512).enumerate() {
                let want = u64::from(src) * 2048 + i as u64;
                let shift = match known.get(p) {
                    Some(&k) => k as i64 - want as i64,
                    None if p.iter().all(|b| *b == 0) => i64::MAX,
                    None => i64::MIN,
                };
                match runs.last_mut() {
                    Some((s, n)) if *s == shift => *n += 1,
                    _ => runs.push((shift, 1)),
                }
            }
            if runs != [(0, 2048)] {
                println!("{}", crate::wires::run("dmesg", "").lines().rev().take(60).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n"));
                println!("  WRONG position {position} block {src}: runs of 512 bytes, (shift, number): {runs:?}");
            }
        }
    }
}

fn counters() -> String {
    let mut all = String::new();
    for dev in ["rxa1", "rxa2", "rxb1", "rxb2"] {
        for c in ["duplicate_request", "out_of_seq_request", "retry_rnr_exceeded_err", "rcvd_rnr_err", "retry_exceeded_err", "completer_retry_err", "ack_deferred", "rdma_sends", "rcvd_pkts", "sent_pkts"] {
            if let Ok(v) = std::fs::read_to_string(format!("/sys/class/infiniband/{dev}/ports/1/hw_counters/{c}")) {
                if v.trim() != "0" {
                    all += &format!(" {dev}.{c}={}", v.trim());
                }
            }
        }
    }
    all
}
