//! The slots of the pinned ring: which are free, which a copy still writes, and which connections wait for one.
//!
//! No I/O. Each connection gets its first slot in the order of the requests. Further slots come from one half of the ring only:
//! the other half is for first slots (promise 7, Isolated). A slot that a copy writes is never free, even when its connection
//! is gone: a copy cannot be cancelled.

use std::collections::VecDeque;

/// Most slots that copies write at a time. The GPU's queue takes more jobs than this.
const MOST_IN_FLIGHT: usize = 128;

/// A slot that a copy writes.
struct InFlight {
    ticket: u64,
    slot: u32,
    /// The connection that holds the slot; `None`: it has given the slot back.
    owner: Option<u64>,
}

/// The slots of one ring. Connections are known by their tokens.
pub(super) struct Slots {
    total: usize,
    free: Vec<u32>,
    /// Ascending by ticket: the order in which the copies end.
    in_flight: VecDeque<InFlight>,
    /// Connections that hold no slot and need one, the oldest first.
    waiting: VecDeque<u64>,
    /// A connection that waited, and may take a slot ahead of those that still wait.
    admitted: Option<u64>,
}

impl Slots {
    pub(super) fn new(total: u32) -> Self {
        Self {
            total: total as usize,
            // The lowest first.
            free: (0..total).rev().collect(),
            in_flight: VecDeque::new(),
            waiting: VecDeque::new(),
            admitted: None,
        }
    }

    fn has_room(&self) -> bool {
        !self.free.is_empty() && self.in_flight.len() < MOST_IN_FLIGHT
    }

    /// The first slot of a connection that holds none. `None`: the connection is queued, and is admitted in its turn.
    pub(super) fn first(&mut self, token: u64) -> Option<u32> {
        if self.has_room() && (self.is_admitted(token) || self.waiting.is_empty()) {
            self.admitted = None;
            return self.free.pop();
        }
        self.waiting.push_back(token);
        None
    }

    /// One more slot for a connection that holds some: only if half of the ring stays free, and none waits for its first.
    pub(super) fn further(&mut self) -> Option<u32> {
        let spare = self.free.len() * 2 >= self.total + 2;
        if spare && self.has_room() && self.waiting.is_empty() { self.free.pop() } else { None }
    }

    /// The next connection that waited, if there is a slot for it. It may then call [`Slots::first`] again.
    pub(super) fn admit(&mut self) -> Option<u64> {
        self.admitted = if self.has_room() { self.waiting.pop_front() } else { None };
        self.admitted
    }

    /// Whether the connection is the one that was admitted last, and has taken no slot yet.
    pub(super) fn is_admitted(&self, token: u64) -> bool {
        self.admitted == Some(token)
    }

    /// The connection no longer waits.
    pub(super) fn forget(&mut self, token: u64) {
        self.waiting.retain(|&t| t != token);
    }

    /// A copy into a taken slot has begun. Tickets ascend.
    pub(super) fn submitted(&mut self, slot: u32, ticket: u64, owner: u64) {
        self.in_flight.push_back(InFlight { ticket, slot, owner: Some(owner) });
    }

    /// A connection no longer needs its slot. It becomes free when no copy writes it.
    pub(super) fn give_back(&mut self, slot: u32, ticket: u64) {
        let at = self.in_flight.partition_point(|f| f.ticket < ticket);
        match self.in_flight.get_mut(at).filter(|f| f.ticket == ticket) {
            Some(flight) => flight.owner = None,
            None => self.free.push(slot),
        }
    }

    /// The copies up to this ticket have ended. Adds the connections that hold their slots to `ready`.
    pub(super) fn finished(&mut self, up_to: u64, ready: &mut Vec<u64>) {
        let ended = self.in_flight.partition_point(|f| f.ticket <= up_to);
        for flight in self.in_flight.drain(..ended) {
            match flight.owner {
                Some(owner) if ready.last() == Some(&owner) => {}
                Some(owner) => ready.push(owner),
                None => self.free.push(flight.slot),
            }
        }
    }

    /// Whether a copy writes a slot.
    pub(super) fn is_idle(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// Whether fewer than half of the slots are free: connections that cannot send must give theirs back.
    pub(super) fn is_scarce(&self) -> bool {
        self.free.len() * 2 < self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    #[test]
    fn one_connection_gets_half_of_the_ring_at_most_beyond_its_first_slot() {
        let mut slots = Slots::new(4);
        assert_eq!(slots.first(1), Some(0));
        assert_eq!((slots.further(), slots.further()), (Some(1), None));
        assert_eq!((slots.first(2), slots.first(3)), (Some(2), Some(3)));
        assert!(slots.is_scarce());
    }

    #[test]
    fn connections_that_wait_are_admitted_in_order_and_none_overtakes_them() {
        let mut slots = Slots::new(2);
        let taken = [slots.first(1), slots.first(2)].map(Option::unwrap);
        assert_eq!([3, 4, 5].map(|token| slots.first(token)), [None; 3]);
        assert_eq!(slots.admit(), None, "no slot is free");
        slots.give_back(taken[0], 1);
        slots.give_back(taken[1], 2);
        assert_eq!(slots.first(6), None, "it waits behind the others");
        assert_eq!(slots.further(), None);
        slots.forget(4);
        for token in [3, 5] {
            assert_eq!(slots.admit(), Some(token));
            assert!(slots.first(token).is_some());
        }
        assert_eq!(slots.admit(), None);
    }

    #[test]
    fn a_slot_that_was_given_back_is_free_only_when_its_copy_has_ended() {
        let mut slots = Slots::new(1);
        let slot = slots.first(1).unwrap();
        slots.submitted(slot, 7, 1);
        slots.give_back(slot, 7);
        assert_eq!((slots.first(2), slots.admit()), (None, None));
        let mut ready = Vec::new();
        slots.finished(6, &mut ready);
        assert_eq!(slots.admit(), None);
        slots.finished(7, &mut ready);
        assert_eq!((ready, slots.admit(), slots.first(2)), (vec![], Some(2), Some(slot)));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Take(u64),
        Finish(u64),
        /// The connection's socket is full.
        Stall(u64),
        Close(u64),
        Admit,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0u64..6).prop_map(Step::Take),
            (0u64..4).prop_map(Step::Finish),
            (0u64..6).prop_map(Step::Stall),
            (0u64..6).prop_map(Step::Close),
            Just(Step::Admit),
        ];
        proptest::collection::vec(step, 1..200)
    }

    proptest! {
        #[test]
        fn no_slot_is_lost_or_held_twice_and_stalled_connections_hold_half_at_most(total in 1u32..9, steps in steps()) {
            let mut slots = Slots::new(total);
            let mut held: HashMap<u64, Vec<(u32, u64)>> = HashMap::new();
            let (mut waiting, mut stalled) = (Vec::new(), Vec::new());
            let (mut ticket, mut finished) = (0, 0);
            for step in steps {
                let mut take = None;
                match step {
                    Step::Take(c) if !waiting.contains(&c) => take = Some(c),
                    Step::Admit => take = slots.admit(),
                    Step::Finish(n) => {
                        finished = ticket.min(finished + n);
                        slots.finished(finished, &mut Vec::new());
                    }
                    Step::Stall(c) => {
                        if slots.is_scarce() {
                            held.remove(&c).into_iter().flatten().for_each(|(s, t)| slots.give_back(s, t));
                        } else if held.contains_key(&c) && !stalled.contains(&c) {
                            stalled.push(c);
                        }
                    }
                    Step::Close(c) => {
                        held.remove(&c).into_iter().flatten().for_each(|(s, t)| slots.give_back(s, t));
                        slots.forget(c);
                        waiting.retain(|w| *w != c);
                        stalled.retain(|s| *s != c);
                    }
                    Step::Take(_) => {}
                }
                if let Some(c) = take {
                    waiting.retain(|w| *w != c);
                    stalled.retain(|s| *s != c);
                    let has = held.get(&c).is_some_and(|h| !h.is_empty());
                    let slot = if has { slots.further() } else { slots.first(c) };
                    match slot {
                        Some(slot) => {
                            ticket += 1;
                            slots.submitted(slot, ticket, c);
                            held.entry(c).or_default().push((slot, ticket));
                        }
                        None if has => {}
                        None => waiting.push(c),
                    }
                }
                let all: Vec<u32> = held.values().flatten().map(|h| h.0).collect();
                let mut seen = all.clone();
                seen.extend(&slots.free);
                seen.extend(slots.in_flight.iter().filter(|f| f.owner.is_none()).map(|f| f.slot));
                seen.sort_unstable();
                prop_assert_eq!(seen, (0..total).collect::<Vec<_>>(), "each slot is in one place");
                let stuck: usize = stalled.iter().filter_map(|c| held.get(c)).map(Vec::len).sum();
                prop_assert!(stuck * 2 <= total as usize, "{} of {}", stuck, total);
            }
        }
    }
}
