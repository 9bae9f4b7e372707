//! A pull that is disturbed while a full window of READs is in flight, and the promises that must hold whatever happens.

use std::time::{Duration, Instant};

use kvferry::{Config, Consumer, Ended, LaneKind};
use kvferry_testkit::{
    rdma::{Slow, all_up, config, objects, settled, spec},
    reasons::reasons,
    rig::{Producer, SOON, assert_loaded_is_exact, consumer, ended, pull_all, wait_until_loaded},
};

/// Emulated CPUs may look at the clock late.
pub(crate) const SLACK: Duration = Duration::from_secs(2);

/// The default deadline.
pub(crate) const DEADLINE: Duration = Duration::from_secs(8);

/// When the pull is disturbed.
pub(crate) enum When {
    /// Once this share of the pull is loaded.
    Loaded(f64),
    /// So long after its start, whatever is loaded.
    After(Duration),
}

/// A pull of some MiB over slow wires, in blocks of 64 KiB, to be disturbed.
pub(crate) struct Mishap {
    pub rails: usize,
    pub mib: u32,
    pub deadline: Duration,
    pub when: When,
    pub config: Config,
}

impl Mishap {
    /// A pull that takes two seconds, disturbed when a third is loaded.
    pub(crate) fn over(rails: usize) -> Self {
        let mut config = config(rails, None);
        // Twice as much on two slow wires overloads two emulated processors, and queue pairs would give up.
        config.verbs.window = 512 << 10;
        Self { rails, mib: 32 * rails as u32, deadline: DEADLINE, when: When::Loaded(0.3), config }
    }

    pub(crate) fn deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    pub(crate) fn when(self, when: When) -> Self {
        Self { when, ..self }
    }

    /// With a small window, so that the pull takes eight seconds.
    pub(crate) fn slowly(mut self) -> Self {
        (self.config.verbs.window, self.config.verbs.max_read) = (128 << 10, 32 << 10);
        self
    }

    pub(crate) fn blocks(&self) -> u32 {
        self.mib * 16
    }

    /// How long the lane may take to be quiet: twice the transport's time to give up plus a quarter, or twice the 580 ms of a
    /// teardown.
    pub(crate) fn quiet_bound(&self) -> Duration {
        let gives_up = self.config.verbs.gives_up_after();
        (gives_up + gives_up / 4).max(Duration::from_millis(580)) * 2
    }

    /// Pulls and disturbs. Returns the end, the time from the start until `hurt` was done, and the reasons of failed lanes.
    pub(crate) fn run(
        &self,
        hurt: impl FnOnce(&mut Producer),
        heal: impl FnOnce(&mut Producer),
    ) -> (Ended, Duration, Vec<String>) {
        all_up();
        reasons();
        let slow = Slow::on(self.rails);
        let before = objects();
        let spec = spec(self.rails, self.blocks(), 1, 64 << 10);
        let mut producer = Producer::start(&spec);
        let consumer = consumer(&spec, self.config.clone());
        // Makes the session and the lane, so that the whole deadline is for reading.
        let one = producer.offer(&[0]);
        consumer.pull(pull_all(&one, LaneKind::Verbs, SOON)).unwrap();
        assert!(ended(&consumer).outcome.complete(), "the first block");
        let offer = producer.offer_all();
        let started = Instant::now();
        let pull = consumer.pull(pull_all(&offer, LaneKind::Verbs, self.deadline)).unwrap();
        if let When::Loaded(share) = self.when {
            wait_until_loaded(&consumer, pull, share);
        }
        let in_flight = slow.in_flight();
        if let When::After(time) = self.when {
            // The test is about this time.
            std::thread::sleep(time.saturating_sub(started.elapsed()));
        }
        hurt(&mut producer);
        let at = started.elapsed();
        let end = consumer.wait(self.deadline + self.quiet_bound() + SOON).expect("it ends");
        let then = memory(&consumer);
        let (t, reasons) = (end.outcome.times, reasons());
        let (decided, quiet) = (t.decided.unwrap(), t.ended.unwrap());
        println!(
            "hurt at {at:?} with {in_flight:?} packets on the wires: decided {decided:?}, ended {quiet:?}, {} of {} loaded, \
             {} retries, {:?}; {reasons:?}",
            end.outcome.loaded(),
            self.blocks(),
            end.outcome.retries,
            end.outcome.cause(),
        );
        assert!(t.data.is_none_or(|data| data > at), "the pull was over before it was disturbed");
        assert!(decided <= self.deadline + SLACK);
        // It stops before the deadline by the lane's quiet bound, or at half of the time if that is later.
        let stops = self.deadline.saturating_sub(self.quiet_bound()).max(self.deadline / 2);
        assert!(
            quiet <= (stops + self.quiet_bound()).max(self.deadline) + SLACK,
            "it ends by the time at which the lane must be quiet"
        );
        assert!(quiet >= decided && quiet <= decided + self.quiet_bound() + SLACK);
        assert!(end.outcome.lanes.iter().all(|l| *l == LaneKind::Verbs), "{:?}", end.outcome.lanes);
        if let When::Loaded(share) = self.when {
            let had = f64::from(self.blocks()) * share * 0.8;
            assert!(end.outcome.loaded() as f64 >= had, "never: loaded blocks stay loaded");
        }
        assert_eq!(assert_loaded_is_exact(&end, &consumer, &spec, producer.seed), end.outcome.loaded());
        // Memory does not change after the end, whatever the transport still does.
        heal(&mut producer);
        all_up();
        // Packets on the wires arrive, and queue pairs that have not given up send again: the network needs the time.
        std::thread::sleep(Duration::from_millis(500));
        for (segment, (then, now)) in then.iter().zip(&memory(&consumer)).enumerate() {
            let at = then.iter().zip(now).position(|(a, b)| a != b);
            assert_eq!(at, None, "never: segment {segment} was written to after the pull had ended");
        }
        drop(slow);
        // The next pull, by the same consumer, from a healthy peer.
        let mut other = Producer::start(&spec);
        let offer = other.offer_all();
        consumer.pull(pull_all(&offer, LaneKind::Verbs, SOON)).unwrap();
        let next = ended(&consumer);
        assert!(next.outcome.complete(), "the next pull: {:?}", next.outcome.cause());
        assert_loaded_is_exact(&next, &consumer, &spec, other.seed);
        drop(consumer);
        producer.kill();
        other.kill();
        settled(before);
        (end, at, reasons)
    }
}

/// All of a consumer's memory.
fn memory(consumer: &Consumer) -> Vec<Vec<u8>> {
    let memory = consumer.memory();
    let segment = |(i, len): (usize, &u64)| {
        let mut bytes = vec![0; *len as usize];
        memory.read_into(i as u16, 0, &mut bytes).unwrap();
        bytes
    };
    memory.segments().iter().enumerate().map(segment).collect()
}
