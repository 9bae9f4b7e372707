//! One direction of a wire, without a device and without a clock: the caller passes the time with each packet.
//!
//! A packet passes two stages. The first loses or duplicates it, and delays it; there packets stay in order, whatever
//! the jitter. The second holds some back until others have overtaken them.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use fastrand::Rng;

/// Most packets that overtake one that is held back. TCP takes three for a loss.
const MOST_OVERTAKING: u64 = 8;

/// Longest time that a packet is held back: no other packet may follow it.
const LONGEST_HOLD: Duration = Duration::from_millis(10);

/// Conditions of one direction. The default is a perfect wire.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Conditions {
    /// Probability that a packet is lost.
    pub loss: f64,
    /// Time in transit.
    pub delay: Duration,
    /// By how much the delay varies, up and down. Packets stay in order.
    pub jitter: Duration,
    /// Probability that one to eight later packets overtake a packet. If too few follow, it continues after 10 ms.
    pub reorder: f64,
    /// Probability that a packet arrives twice.
    pub duplicate: f64,
    /// Probability that two neighbouring 16-bit words in the payload of a full TCP packet change places. The checksum of TCP
    /// stays right.
    pub swap: f64,
}

/// Payload bytes of a packet that [`Conditions::swap`] may affect: packets of a stream that is busy, not single messages.
const FULL: usize = 1000;

/// Swaps the first two neighbouring 16-bit words that differ in the payload of a full TCP packet.
fn swap_words(packet: &mut [u8]) -> bool {
    let header = |at: usize| packet.get(at).copied().unwrap_or(0);
    if packet.first().is_none_or(|b| b >> 4 != 4) || header(9) != 6 {
        return false;
    }
    let ip = usize::from(packet[0] & 15) * 4;
    let payload = ip + usize::from(header(ip + 12) >> 4) * 4;
    let Some(bytes) = packet.get_mut(payload..).filter(|b| b.len() >= FULL) else { return false };
    let (words, _) = bytes.as_chunks_mut::<2>();
    // Not the first words: the frames of a protocol are likely there.
    let Some(i) = (FULL / 4..words.len() - 1).find(|i| words[*i] != words[i + 1]) else { return false };
    words.swap(i, i + 1);
    true
}

impl Conditions {
    pub(super) fn check(&self) {
        for (name, p) in
            [("loss", self.loss), ("reorder", self.reorder), ("duplicate", self.duplicate), ("swap", self.swap)]
        {
            assert!((0.0..=1.0).contains(&p), "{name} {p} is not a probability");
        }
    }
}

/// Packets of one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Sent into the wire.
    pub seen: u64,
    /// Lost by [`Conditions::loss`].
    pub lost: u64,
    /// Dropped by a cut.
    pub cut: u64,
    /// Sent on twice.
    pub duplicated: u64,
    /// Changed by [`Conditions::swap`].
    pub swapped: u64,
    /// Overtaken by at least one other.
    pub reordered: u64,
    /// Handed over at the other end, duplicates included.
    pub passed: u64,
}

#[derive(Debug)]
struct Late {
    due: Instant,
    packet: Box<[u8]>,
}

#[derive(Debug)]
struct Held {
    until: Instant,
    /// How many packets may still overtake it.
    room: u64,
    overtaken: bool,
    packet: Box<[u8]>,
}

#[derive(Debug)]
pub(super) struct Path {
    conditions: Conditions,
    cut: bool,
    rng: Rng,
    late: VecDeque<Late>,
    held: Vec<Held>,
    counts: Counts,
}

impl Path {
    pub(super) fn new(rng: Rng) -> Self {
        Self {
            conditions: Conditions::default(),
            cut: false,
            rng,
            late: VecDeque::new(),
            held: Vec::new(),
            counts: Counts::default(),
        }
    }

    pub(super) fn set(&mut self, conditions: Conditions) {
        self.conditions = conditions;
    }

    pub(super) fn cut(&mut self) {
        self.cut = true;
        self.counts.cut += (self.late.len() + self.held.len()) as u64;
        self.late.clear();
        self.held.clear();
    }

    pub(super) fn mend(&mut self) {
        self.cut = false;
    }

    pub(super) fn counts(&self) -> Counts {
        self.counts
    }

    /// When [`Path::advance`] has work next.
    pub(super) fn next(&self) -> Option<Instant> {
        let held = self.held.iter().map(|h| h.until);
        held.chain(self.late.front().map(|l| l.due)).min()
    }

    /// Takes a packet. Packets that arrive now go to `out`.
    pub(super) fn send(&mut self, now: Instant, packet: &[u8], out: &mut impl FnMut(&[u8])) {
        self.advance(now, out);
        self.counts.seen += 1;
        if self.cut {
            self.counts.cut += 1;
            return;
        }
        if self.rng.f64() < self.conditions.loss {
            self.counts.lost += 1;
            return;
        }
        let mut changed = Vec::new();
        let packet = if self.conditions.swap > 0.0 && self.rng.f64() < self.conditions.swap {
            changed.extend_from_slice(packet);
            self.counts.swapped += u64::from(swap_words(&mut changed));
            &changed
        } else {
            packet
        };
        let twice = self.rng.f64() < self.conditions.duplicate;
        self.counts.duplicated += u64::from(twice);
        for _ in 0..1 + u32::from(twice) {
            let due = self.due(now);
            if due <= now && self.late.is_empty() {
                self.leave(now, packet, out);
            } else {
                self.late.push_back(Late { due, packet: packet.into() });
            }
        }
    }

    /// Passes on all packets that are due.
    pub(super) fn advance(&mut self, now: Instant, out: &mut impl FnMut(&[u8])) {
        while self.late.front().is_some_and(|l| l.due <= now) {
            let late = self.late.pop_front().expect("there is a first one");
            self.leave(now, &late.packet, out);
        }
        self.release(|h| h.until <= now, out);
    }

    fn due(&mut self, now: Instant) -> Instant {
        let Conditions { delay, jitter, .. } = self.conditions;
        let earliest = now + delay.saturating_sub(jitter);
        let latest = now + delay + jitter;
        let due = earliest + (latest - earliest).mul_f64(self.rng.f64());
        self.late.back().map_or(due, |last| due.max(last.due))
    }

    /// The second stage.
    fn leave(&mut self, now: Instant, packet: &[u8], out: &mut impl FnMut(&[u8])) {
        if self.rng.f64() < self.conditions.reorder {
            let room = self.rng.u64(1..=MOST_OVERTAKING);
            self.held.push(Held { until: now + LONGEST_HOLD, room, overtaken: false, packet: packet.into() });
            return;
        }
        out(packet);
        self.counts.passed += 1;
        for held in &mut self.held {
            held.room -= 1;
            self.counts.reordered += u64::from(!held.overtaken);
            held.overtaken = true;
        }
        self.release(|h| h.room == 0, out);
    }

    fn release(&mut self, which: impl Fn(&Held) -> bool, out: &mut impl FnMut(&[u8])) {
        for held in self.held.extract_if(.., |h| which(h)) {
            out(&held.packet);
            self.counts.passed += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends packets 0 up to `n`, a microsecond apart, and waits for the last of them. Returns which arrived, and when.
    fn run(path: &mut Path, n: u32) -> Vec<(u32, Duration)> {
        let start = Instant::now();
        let mut arrived = Vec::new();
        let number = |packet: &[u8]| u32::from_ne_bytes(packet.try_into().expect("four bytes"));
        for i in 0..n {
            let at = Duration::from_micros(i.into());
            path.send(start + at, &i.to_ne_bytes(), &mut |p| arrived.push((number(p), at)));
        }
        while let Some(next) = path.next() {
            path.advance(next, &mut |p| arrived.push((number(p), next - start)));
        }
        arrived
    }

    fn path(seed: u64, conditions: Conditions) -> Path {
        let mut path = Path::new(Rng::with_seed(seed));
        path.set(conditions);
        path
    }

    fn numbers(arrived: &[(u32, Duration)]) -> Vec<u32> {
        arrived.iter().map(|(n, _)| *n).collect()
    }

    #[test]
    fn a_perfect_path_changes_nothing() {
        let mut path = path(1, Conditions::default());
        let arrived = run(&mut path, 1000);
        assert!(arrived.iter().enumerate().all(|(i, (n, at))| i as u32 == *n && at.as_micros() as u32 == *n));
        assert_eq!(arrived.len(), 1000);
        assert_eq!(path.counts(), Counts { seen: 1000, passed: 1000, ..Counts::default() });
    }

    #[test]
    fn each_packet_is_lost_with_the_probability_given() {
        for (loss, least, most) in [(0.0, 0, 0), (0.01, 50, 150), (0.3, 2_800, 3_200), (1.0, 10_000, 10_000)] {
            let mut path = path(2, Conditions { loss, ..Conditions::default() });
            let arrived = numbers(&run(&mut path, 10_000));
            let Counts { lost, passed, .. } = path.counts();
            assert!((least..=most).contains(&lost), "{lost} of 10000 at {loss}");
            assert_eq!((lost + passed, passed), (10_000, arrived.len() as u64));
            assert!(arrived.is_sorted());
        }
    }

    #[test]
    fn a_seed_always_affects_the_same_packets_and_another_seed_affects_others() {
        let all = Conditions { loss: 0.1, reorder: 0.1, duplicate: 0.1, ..Conditions::default() };
        assert_eq!(run(&mut path(3, all), 1000), run(&mut path(3, all), 1000));
        assert_ne!(run(&mut path(3, all), 1000), run(&mut path(4, all), 1000));
    }

    #[test]
    fn a_delayed_packet_is_as_late_as_asked_and_jitter_keeps_the_order() {
        let (delay, jitter) = (Duration::from_millis(2), Duration::from_micros(500));
        let mut path = path(5, Conditions { delay, jitter, ..Conditions::default() });
        let arrived = run(&mut path, 1000);
        assert_eq!(arrived.len(), 1000);
        assert!(numbers(&arrived).is_sorted());
        let late: Vec<_> = arrived.iter().map(|(n, at)| *at - Duration::from_micros((*n).into())).collect();
        assert!(late.iter().all(|l| (delay - jitter..=delay + jitter).contains(l)), "{late:?}");
        assert!(late.iter().max() > late.iter().min());
    }

    #[test]
    fn a_reordered_packet_is_overtaken_by_one_to_eight_later_ones() {
        let mut path = path(6, Conditions { reorder: 0.05, ..Conditions::default() });
        let arrived = numbers(&run(&mut path, 10_000));
        assert_eq!(arrived.len(), 10_000);
        // Later packets that arrived before it.
        let overtaken: Vec<_> = (0..arrived.len())
            .map(|i| arrived[i.saturating_sub(100)..i].iter().filter(|earlier| **earlier > arrived[i]).count())
            .filter(|n| *n > 0)
            .collect();
        assert!((400..=600).contains(&overtaken.len()), "{}", overtaken.len());
        assert!((1..=8).all(|n| overtaken.contains(&n)), "{overtaken:?}");
        // Beside the eight, later packets that were held too may be released before it.
        assert!(overtaken.iter().all(|n| *n <= 16), "{overtaken:?}");
        assert!(path.counts().reordered >= overtaken.len() as u64);
    }

    #[test]
    fn a_packet_that_none_overtakes_goes_on_after_a_while() {
        let mut path = path(7, Conditions { reorder: 1.0, ..Conditions::default() });
        assert_eq!(run(&mut path, 1), [(0, LONGEST_HOLD)]);
        assert_eq!(path.counts().reordered, 0);
    }

    #[test]
    fn a_duplicated_packet_arrives_twice() {
        let mut path = path(8, Conditions { duplicate: 0.1, ..Conditions::default() });
        let arrived = numbers(&run(&mut path, 1000));
        let twice = arrived.windows(2).filter(|w| w[0] == w[1]).count();
        assert!((50..=150).contains(&twice), "{twice}");
        assert_eq!(
            path.counts(),
            Counts { seen: 1000, duplicated: twice as u64, passed: 1000 + twice as u64, ..Counts::default() }
        );
    }

    #[test]
    fn a_swap_changes_places_of_two_words_of_a_full_tcp_packet_only() {
        // IPv4 and TCP headers of 20 bytes each, without options.
        let mut full: Vec<u8> = (0..1240).map(|i| (i / 7) as u8).collect();
        (full[0], full[9], full[32]) = (0x45, 6, 0x50);
        let sum = |b: &[u8]| b.as_chunks::<2>().0.iter().map(|w| u64::from(u16::from_be_bytes(*w))).sum::<u64>();
        let swap = |packet: &[u8]| {
            let mut changed = packet.to_vec();
            (swap_words(&mut changed), changed)
        };
        let (done, changed) = swap(&full);
        let differ: Vec<_> = (0..full.len()).filter(|i| full[*i] != changed[*i]).collect();
        assert!(done && (2..=4).contains(&differ.len()) && differ[0] > 40, "{differ:?}");
        assert_eq!(sum(&full), sum(&changed), "so TCP's checksum stays right");
        let udp = {
            let mut p = full.clone();
            p[9] = 17;
            p
        };
        for other in [&udp[..], &full[..900], &full[..30], &[]] {
            assert_eq!(swap(other), (false, other.to_vec()));
        }
    }

    #[test]
    fn a_cut_drops_all_packets_and_those_in_transit_too() {
        let mut path = path(9, Conditions { delay: Duration::from_secs(1), ..Conditions::default() });
        let now = Instant::now();
        let mut never = |_: &[u8]| panic!("a packet went through");
        path.send(now, b"late", &mut never);
        path.cut();
        path.send(now, b"cut", &mut never);
        path.advance(now + Duration::from_secs(2), &mut never);
        assert_eq!(path.next(), None);
        path.mend();
        path.advance(now + Duration::from_secs(2), &mut never);
        assert_eq!(path.counts(), Counts { seen: 2, cut: 2, ..Counts::default() });
        path.set(Conditions::default());
        assert_eq!(run(&mut path, 3).len(), 3);
    }
}
