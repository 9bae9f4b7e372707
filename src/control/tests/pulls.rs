//! Real pulls: over replaced certificates, and at a peer's share of claims and lanes.

use std::{
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::Instant,
};

use kvferry_proto::{BlockId, Cause, GroupId, LaneKind, LocalBlocks, Model, OfferGroup, PoolLayout, Token};

use tonic::Code;

use super::{
    peers::{ferry, from_elsewhere, open, say_hello},
    rig::{LIMIT, config, hello, run},
};
use crate::{
    Consumer, OfferSpec, Producer, Pull, Ready,
    config::{Config, TlsConfig},
    control::{call::Caller, proto},
    tls::tests::{Authority, Files},
};

fn model() -> Model {
    super::rig::model()
}

fn layout() -> PoolLayout {
    PoolLayout::uniform(8, 2, 4096, 16)
}

fn producer(config: Config) -> Producer {
    Producer::builder("prefill-0".parse().unwrap(), model(), layout()).config(config).build().unwrap()
}

fn consumer(config: Config) -> Consumer {
    Consumer::builder("decode-0".parse().unwrap(), model(), layout()).config(config).build().unwrap()
}

/// A pull of one block, offered for it, into the local block of that number.
fn pull(producer: &Producer, block: u32) -> Pull {
    let blocks = vec![Some(BlockId(block))];
    let groups = vec![OfferGroup { group: GroupId(0), first_position: 0, blocks: blocks.clone() }];
    let offer = producer.offer(OfferSpec::new(16, groups), Ready::Now).unwrap();
    let wanted = LocalBlocks { group: GroupId(0), first_position: 0, blocks };
    Pull::new(offer, vec![wanted]).deadline(LIMIT).lanes(vec![LaneKind::Tcp])
}

fn cause(consumer: &Consumer) -> Option<Cause> {
    consumer.wait(LIMIT * 2).expect("a pull ends soon after its deadline").outcome.cause()
}

/// Sets its flag when it is dropped, by a failed assertion too.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn no_pull_is_dropped_while_certificates_and_authorities_are_replaced() {
    let (old, new) = (Authority::new(), Authority::new());
    let bundle = [old.issue("x").ca, new.issue("x").ca].concat();
    let under = |authority: &Authority, engine, ca: &[u8]| TlsConfig { ca: ca.to_vec(), ..authority.issue(engine) };
    let old_ca = old.issue("x").ca;
    let files = ["prefill-0", "decode-0"].map(|e| Files::new(&format!("rotate-{e}"), &under(&old, e, &old_ca)));
    let with = |tls: TlsConfig| Config { tls: Some(tls), ..config() };
    let producer = producer(with(files[0].config()));
    let settled = consumer(with(files[1].config()));
    let stop = AtomicBool::new(false);
    let (done, complete) = mpsc::channel();
    std::thread::scope(|s| {
        // One consumer keeps its session; another one is new for every pull.
        let (producer, files, settled, stop) = (&producer, &files, &settled, &stop);
        s.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                settled.pull(pull(producer, 0)).unwrap();
                assert_eq!(cause(settled), None);
                let fresh = consumer(with(files[1].config()));
                fresh.pull(pull(producer, 1)).unwrap();
                assert_eq!(cause(&fresh), None);
                let _ = done.send(());
            }
        });
        let _stop = Stop(stop);
        // Waits until a client with this certificate is accepted or refused.
        let until = |tls: &TlsConfig, accepted: bool| {
            run(async {
                while Caller::new(with(tls.clone())).hello(producer.addr(), &hello()).await.is_ok() != accepted {}
            });
        };
        let of_new = under(&new, "decode-0", &bundle);
        until(&of_new, false);
        // First both sides trust both authorities, then they get new certificates, then they trust the new one only.
        for (i, engine) in ["prefill-0", "decode-0"].iter().enumerate() {
            files[i].replace(&under(&old, engine, &bundle));
        }
        until(&of_new, true);
        for (i, engine) in ["prefill-0", "decode-0"].iter().enumerate() {
            files[i].replace(&under(&new, engine, &bundle));
        }
        // This client trusts the new authority only.
        until(&under(&new, "decode-0", &new.issue("x").ca), true);
        for (i, engine) in ["prefill-0", "decode-0"].iter().enumerate() {
            files[i].replace(&under(&new, engine, &new.issue("x").ca));
        }
        until(&under(&old, "decode-0", &bundle), false);
        // Pulls that began after the last change are complete too.
        complete.try_iter().for_each(drop);
        for _ in 0..2 {
            complete.recv_timeout(LIMIT).expect("pulls go on");
        }
    });
}

#[test]
fn a_claim_over_the_peers_share_ends_with_limit_and_the_held_one_goes_on() {
    let mut c = config();
    c.limits.claims_per_peer = 1;
    let producer = producer(c);
    let consumer = consumer(config());
    let mut first = pull(&producer, 0);
    first.local_ready = false;
    let held = consumer.pull(first).unwrap();
    let until = Instant::now() + LIMIT;
    while producer.live().1 == 0 {
        assert!(Instant::now() < until, "no claim in time");
        std::thread::yield_now();
    }
    consumer.pull(pull(&producer, 1)).unwrap();
    assert_eq!(cause(&consumer), Some(Cause::Limit));
    consumer.local_ready(held);
    assert_eq!(cause(&consumer), None);
}

#[test]
fn a_lane_over_the_peers_share_ends_its_pull_with_limit() {
    let mut c = config();
    c.limits.lanes_per_peer = 1;
    let producer = producer(c);
    let (first, second) = (consumer(config()), consumer(config()));
    first.pull(pull(&producer, 0)).unwrap();
    assert_eq!(cause(&first), None);
    second.pull(pull(&producer, 1)).unwrap();
    assert_eq!(cause(&second), Some(Cause::Limit));
    first.pull(pull(&producer, 2)).unwrap();
    assert_eq!(cause(&first), None);
}

#[test]
fn wrong_tokens_are_refused_and_counted_for_their_peer() {
    let producer = producer(config());
    let consumer = consumer(config());
    let right = pull(&producer, 0);
    for _ in 0..3 {
        let mut forged = right.clone();
        let mut name = (*forged.offer).clone();
        name.token = Token::random();
        forged.offer = name.into();
        consumer.pull(forged).unwrap();
        assert!(cause(&consumer).is_some());
    }
    // The first one is in the log already. The release that follows a refused claim shows the wrong token too.
    let counted = producer.refused([127, 0, 0, 1].into(), "token");
    assert!(counted.is_some_and(|n| n >= 2), "{counted:?}");
    assert!(producer.metrics().wrong_tokens.get() >= 3);
    consumer.pull(right).unwrap();
    assert_eq!(cause(&consumer), None);
}

/// Over these lanes a consumer can read the whole pool, so a stranger without the name of any offer gets none.
#[test]
fn a_stranger_without_a_granted_claim_gets_no_local_or_verbs_lane() {
    let producer = producer(config());
    let me = hello().peer;
    let lane = |kind: proto::LaneKind| proto::LaneRequest {
        from: Some((&me).into()),
        expect_incarnation: producer.me().incarnation.get(),
        kind: kind.into(),
        verbs: Vec::new(),
    };
    run(async {
        let mut ferry = ferry(from_elsewhere(producer.addr().parse().unwrap()).await).await;
        say_hello(&mut ferry, &me, &[7; 16]).await.unwrap();
        let _session = open(&mut ferry, &me, producer.me()).await.unwrap();
        let status = ferry.connect_lane(lane(proto::LaneKind::Local)).await.expect_err("refused");
        assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
        assert!(status.message().contains("needs a claim first"), "{status}");
        // A tcp lane reads granted offers only.
        ferry.connect_lane(lane(proto::LaneKind::Tcp)).await.unwrap();
    });
    let consumer = consumer(config());
    consumer.pull(pull(&producer, 0).lanes(vec![LaneKind::Local])).unwrap();
    assert_eq!(cause(&consumer), None, "one with a claim gets it");
}
