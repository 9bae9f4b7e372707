//! The same promises over a link that tests cut, delay and make lossy: a veth pair into a network namespace of their own.
//!
//! Needs root and `ip`; without them each test says so and passes, since there is nothing to be tried.

use std::{
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use kvferry::{Cause, Config, LaneKind};
use kvferry_testkit::rig::{
    Producer, SOON, Spec, assert_loaded_is_exact, consumer, ended, pull_all, throttled, wait_until_loaded,
};

/// A namespace at the other end of a link. Taken down when dropped.
struct Link {
    space: String,
    here: String,
    there: String,
    far: String,
}

static LINKS: AtomicU32 = AtomicU32::new(0);

fn run(program: &str, args: &[&str]) -> Result<(), String> {
    let out = Command::new(program).args(args).output().map_err(|e| format!("{program}: {e}"))?;
    if out.status.success() {
        return Ok(());
    }
    Err(format!("{program} {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim()))
}

impl Link {
    /// `None` where there can be none, with the reason on standard error.
    fn new() -> Option<Self> {
        let id = std::process::id() % 10_000;
        let n = LINKS.fetch_add(1, Ordering::Relaxed);
        let net = format!("10.213.{}", (id + n) % 250);
        let link = Self {
            space: format!("kvf{id}n{n}"),
            here: format!("kvfa{id}n{n}"),
            there: format!("kvfb{id}n{n}"),
            far: format!("{net}.2"),
        };
        let (near, far) = (format!("{net}.1/24"), format!("{net}.2/24"));
        let steps: &[&[&str]] = &[
            &["netns", "add", &link.space],
            &["link", "add", &link.here, "type", "veth", "peer", "name", &link.there, "netns", &link.space],
            &["addr", "add", &near, "dev", &link.here],
            &["link", "set", &link.here, "up"],
            &["-n", &link.space, "addr", "add", &far, "dev", &link.there],
            &["-n", &link.space, "link", "set", &link.there, "up"],
            &["-n", &link.space, "link", "set", "lo", "up"],
        ];
        for step in steps {
            if let Err(why) = run("ip", step) {
                eprintln!("skipped: no network namespace can be made here ({why})");
                return None;
            }
        }
        Some(link)
    }

    fn producer(&self, spec: &Spec) -> Producer {
        let listen = format!("{}:0", self.far);
        Producer::start_in(&["ip", "netns", "exec", &self.space], &Spec { listen, ..spec.clone() })
    }

    /// Packets get lost without a word: nothing is reset or refused.
    fn cut(&self) {
        run("ip", &["-n", &self.space, "link", "set", &self.there, "down"]).unwrap();
    }

    fn mend(&self) {
        run("ip", &["-n", &self.space, "link", "set", &self.there, "up"]).unwrap();
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let _ = run("ip", &["netns", "del", &self.space]);
        let _ = run("ip", &["link", "del", &self.here]);
    }
}

#[test]
fn a_link_that_is_cut_in_mid_pull_is_decided_by_the_deadline_and_heals_without_a_restart() {
    let Some(link) = Link::new() else { return };
    let spec = Spec { blocks: 512, ..Spec::default() };
    let mut producer = link.producer(&spec);
    let consumer = consumer(&spec, throttled("throttle=64M"));
    let offer = producer.offer_all();
    let deadline = Duration::from_secs(2);
    let pull = consumer.pull(pull_all(&offer, LaneKind::Tcp, deadline)).unwrap();
    wait_until_loaded(&consumer, pull, 0.4);
    link.cut();
    let end = ended(&consumer);
    assert!(end.outcome.times.decided.unwrap() <= deadline + Duration::from_millis(250), "{:?}", end.outcome.times);
    assert_eq!(end.outcome.cause(), Some(Cause::Deadline));
    assert!(end.outcome.loaded() >= 512 * 4 / 10 - 16, "what arrived is kept: {:?}", end.outcome);
    assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
    link.mend();
    // Same process on both sides: the session comes back, the release arrives, and the next pull is whole.
    assert_eq!(producer.freed(offer.id).0, "Released");
    let offer = producer.offer_all();
    consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    let end = ended(&consumer);
    assert!(end.outcome.complete(), "{:?}", end.outcome);
    assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
}

#[test]
fn a_peer_behind_a_cut_link_is_decided_by_the_deadline_before_its_handshake() {
    let Some(link) = Link::new() else { return };
    let spec = Spec::default();
    let mut producer = link.producer(&spec);
    let consumer = consumer(&spec, Config::default());
    let offer = producer.offer_all();
    link.cut();
    let deadline = Duration::from_millis(700);
    consumer.pull(pull_all(&offer, LaneKind::Tcp, deadline)).unwrap();
    let end = ended(&consumer);
    assert!(end.outcome.times.decided.unwrap() <= deadline + Duration::from_millis(250));
    assert_eq!(end.outcome.loaded(), 0);
}

#[test]
fn a_lossy_and_slow_link_is_byte_exact() {
    let Some(link) = Link::new() else { return };
    let netem = ["qdisc", "add", "dev", &link.here, "root", "netem", "delay", "2ms", "1ms", "loss", "1%"];
    if let Err(why) = run("tc", &netem) {
        eprintln!("skipped: no netem here ({why})");
        return;
    }
    let spec = Spec::default();
    let mut producer = link.producer(&spec);
    let consumer = consumer(&spec, Config::default());
    for _ in 0..3 {
        let offer = producer.offer_all();
        consumer.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
        let end = ended(&consumer);
        assert!(end.outcome.complete(), "{:?}", end.outcome);
        assert_loaded_is_exact(&end, &consumer, &spec, producer.seed);
        assert_eq!(producer.freed(offer.id).0, "Released");
    }
}
