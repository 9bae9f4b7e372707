//! Links and transports that fail. In each case the pull decides by its deadline, ends when nothing can write its blocks any
//! more, and its loaded blocks are exact; and the next pull works.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use kvferry::{Cause, Config, Consumer, LaneKind, VerbsConfig};
use kvferry_testkit::{
    rdma::{all_up, config, ends, ip, need_wires, objects, run, settled, spec, tc},
    rig::{SOON, Spec, assert_loaded_is_exact, ended, pull_all, wait_until_loaded},
};

use crate::mishap::{DEADLINE, Mishap, SLACK, When};

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn the_local_link_down_and_up_again() {
    need_wires(1);
    let (end, ..) = Mishap::over(1).run(|_| ip("link set a1 down"), |_| ip("link set a1 up"));
    assert!(end.outcome.invalid() > 0);
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn the_peers_link_down_and_up_again() {
    need_wires(1);
    let (end, ..) = Mishap::over(1).run(|_| ip("link set b1 down"), |_| ip("link set b1 up"));
    assert!(end.outcome.invalid() > 0);
}

/// Silently: a link that goes down causes an event, a switch that drops everything does not.
fn lose_all(of: Mishap) -> kvferry::Ended {
    let (end, ..) = of.run(|_| tc("qdisc add dev a1 root netem loss 100%"), |_| tc("qdisc del dev a1 root"));
    assert!(end.outcome.invalid() > 0);
    end
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn every_packet_lost() {
    need_wires(1);
    lose_all(Mishap::over(1));
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn every_packet_lost_so_late_that_the_deadline_decides() {
    need_wires(1);
    // It would stop at 2.84 s. Eight tries take longer than the rest, and the transport gives up after the deadline.
    let slow = Mishap::over(1).slowly().deadline(Duration::from_secs(4));
    let end = lose_all(slow.when(When::After(Duration::from_millis(1600))));
    assert_eq!(end.outcome.cause(), Some(Cause::Deadline));
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn a_transport_that_gives_up_after_the_deadline_decides_nothing() {
    need_wires(1);
    // It stops at half of its time.
    let mut slow = Mishap::over(1).slowly().deadline(Duration::from_secs(3));
    slow.when = When::After(Duration::from_millis(600));
    // 4.3 s, and no report of a lost packet before.
    (slow.config.verbs.timeout, slow.config.verbs.retry) = (20, 0);
    let times = lose_all(slow).outcome.times;
    assert!(times.decided.unwrap() >= times.deadline, "only the deadline can decide it: {times:?}");
    assert!(times.ended > times.decided, "READs were still in flight: {times:?}");
}

#[test]
fn a_transport_that_never_gives_up_is_refused() {
    let refused = |change: &dyn Fn(&mut VerbsConfig)| {
        let (spec, mut config) = (Spec::default(), Config::default());
        change(&mut config.verbs);
        let built = Consumer::builder("decode".parse().unwrap(), spec.kv_model(), spec.layout()).config(config).build();
        built.err().expect("it is refused").to_string()
    };
    let why = refused(&|verbs| verbs.timeout = 0);
    assert!(why.contains("timeout must be 1 to 20: 0 waits indefinitely"), "{why}");
    let why = refused(&|verbs| verbs.retry = 7);
    assert!(why.contains("retry must be 0 to 6: 7 has no limit on some devices"), "{why}");
}

#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn a_short_cut_that_loses_completions() {
    need_wires(1);
    let (end, ..) = Mishap::over(1).deadline(Duration::from_secs(15)).run(
        |_| {
            ip("link set b1 down");
            // Long enough that completions get lost on Linux 6.1.
            std::thread::sleep(Duration::from_millis(300));
            ip("link set b1 up");
        },
        |_| (),
    );
    assert!(end.outcome.complete(), "there was time to try again: {:?}", end.outcome.cause());
}

/// soft-RoCE removes a device only after its last user closed it, and does not tell the users. So the pull goes on, and the
/// removal ends once the consumer is dropped.
#[test]
#[ignore = "needs the virtual machine of tests/vm/run"]
fn the_local_device_removed_in_the_middle_of_a_pull_is_released() {
    need_wires(2);
    all_up();
    let before = objects();
    let spec = spec(1, 256, 1, 64 << 10);
    let (mut producer, consumer) = ends(1, &spec, Some("8M"));
    let offer = producer.offer_all();
    let pull = consumer.pull(pull_all(&offer, LaneKind::Verbs, DEADLINE)).unwrap();
    wait_until_loaded(&consumer, pull, 0.3);
    let mut removal = Command::new("rdma").args(["link", "del", "rxa1"]).spawn().unwrap();
    let end = consumer.wait(DEADLINE + SOON).expect("it ends");
    assert!(end.outcome.times.decided.unwrap() <= DEADLINE + SLACK);
    assert_eq!(assert_loaded_is_exact(&end, &consumer, &spec, producer.seed), end.outcome.loaded());
    drop(consumer);
    let until = Instant::now() + SOON;
    while removal.try_wait().unwrap().is_none() {
        assert!(Instant::now() < until, "the device is still held: {:?}", objects());
        std::thread::yield_now();
    }
    run("rdma", "link add rxa1 type rxe netdev a1");
    all_up();
    let consumer = kvferry_testkit::rig::consumer(&spec, config(1, None));
    let offer = producer.offer_all();
    consumer.pull(pull_all(&offer, LaneKind::Verbs, SOON)).unwrap();
    let next = ended(&consumer);
    assert!(next.outcome.complete(), "the next pull: {:?}", next.outcome.cause());
    assert_loaded_is_exact(&next, &consumer, &spec, producer.seed);
    drop(consumer);
    producer.kill();
    settled(before);
}
