//! Fence words and heads of replies whose data is copied ahead: one connection, driven by hand.

use std::net::TcpListener;

use kvferry_proto::PoolLayout;
use rustix::{event::epoll::EventFlags, net::sockopt};

use super::{
    super::super::{
        connection::{Connection, Next, Shared},
        handshake::Keyed,
        readahead::ReadAhead,
    },
    *,
};

/// Two slices, and more than the small buffers of these sockets hold.
const REPLY: u64 = 512 * KIB;

struct Desk {
    rig: Rig,
    grant: Grant,
    ahead: ReadAhead,
    connection: Connection,
    client: TcpStream,
    scratch: Vec<u8>,
}

impl Desk {
    /// A connection that has proven its lane, and the first request.
    fn new(bytes: u64) -> Self {
        let rig = Rig::new(PoolLayout::uniform(1, 1, MIB, 16));
        let grant = rig.offer(1, &[Some(0)]).0;
        let listener = TcpListener::bind(ANY).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        client.set_read_timeout(Some(LIMIT)).unwrap();
        // Both requests of a test are there when the server looks.
        client.set_nodelay(true).unwrap();
        let server = listener.accept().unwrap().0;
        server.set_nonblocking(true).unwrap();
        sockopt::set_socket_send_buffer_size(&server, 32 << 10).unwrap();
        sockopt::set_socket_recv_buffer_size(&client, 32 << 10).unwrap();
        let challenge = Challenge { options: Options::default(), random: [9; 32] };
        let connection = Connection::new(server.into(), None, challenge);
        let ahead = ReadAhead::new(&rig.export).unwrap().unwrap();
        let mut desk = Self { rig, grant, ahead, connection, client, scratch: vec![0; 128 << 10] };
        let (random, options, incarnation) = ([1; 32], Options::default(), desk.rig.incarnation);
        let keyed = Keyed { key: &KEY, challenge: &challenge, options, random: &random, lane: LANE, incarnation };
        (&desk.client).write_all(&Proof { lane: LANE, options, random, mac: keyed.consumer() }.encode()).unwrap();
        desk.turn_until(|next| *next == Next::Wait(EventFlags::IN));
        desk.turn_until(|_| true);
        (&desk.client).read_exact(&mut [0; Challenge::LEN + Answer::LEN]).unwrap();
        ask(&desk.client, grant, bytes);
        desk
    }

    fn turn(&mut self) -> Next {
        let (key, is_full) = (|_| Some(KEY), |_| false);
        let mut shared = Shared {
            export: &self.rig.export,
            incarnation: self.rig.incarnation,
            key: &key,
            is_full: &is_full,
            scratch: &mut self.scratch,
            ahead: Some(&mut self.ahead),
            token: 5,
        };
        self.connection.turn(&mut shared, 2 << 20)
    }

    fn turn_until(&mut self, what: impl Fn(&Next) -> bool) {
        let end = Instant::now() + LIMIT;
        loop {
            let next = self.turn();
            if what(&next) && (self.connection.lane().is_some()) {
                return;
            }
            assert!(Instant::now() < end && !matches!(next, Next::Close(_)), "{next:?}");
            std::thread::yield_now();
        }
    }

    /// Waits for the end of all copies, as the server does.
    fn copies_end(&mut self) {
        let end = Instant::now() + LIMIT;
        let mut ready = Vec::new();
        while !self.ahead.slots().is_idle() {
            self.ahead.look(false, &mut ready);
            assert!(Instant::now() < end);
            std::thread::yield_now();
        }
        if ready.contains(&5) {
            self.connection.load_words(&self.ahead, &self.rig.export);
        }
    }

    /// Receives the reply, and returns its word.
    fn word(&mut self) -> u64 {
        let (client, grant) = (self.client.try_clone().unwrap(), self.grant);
        let reader = std::thread::spawn(move || reply(&client, grant, REPLY));
        while !reader.is_finished() {
            assert!(!matches!(self.turn(), Next::Close(_)));
            self.copies_end();
        }
        reader.join().unwrap()
    }

    /// The engine takes the blocks back, and fills them with other bytes.
    fn reuse(&self, control: Control) {
        self.rig.export.withdraw(1);
        control.write(self.rig.export.memory.base(0), &[0xee; MIB as usize]).unwrap();
    }
}

#[test]
fn an_offer_that_is_withdrawn_while_its_last_copy_runs_is_stale() {
    with_driver(an_offer_that_is_withdrawn_while_its_last_copy_runs_is_stale, "", |control| {
        from_gpu(small_ring(), || {
            let mut desk = Desk::new(REPLY);
            control.hang(true);
            desk.turn_until(|next| *next == Next::WaitForCopies);
            desk.reuse(control);
            control.hang(false);
            assert_eq!(desk.word(), 0);
        });
    });
}

#[test]
fn an_offer_that_is_withdrawn_after_its_last_copy_still_counts() {
    with_driver(an_offer_that_is_withdrawn_after_its_last_copy_still_counts, "", |control| {
        from_gpu(small_ring(), || {
            let mut desk = Desk::new(REPLY);
            desk.turn_until(|next| *next == Next::WaitForCopies);
            desk.copies_end();
            // The socket does not take all of it, and there are enough slots for others.
            desk.turn_until(|next| *next == Next::Wait(EventFlags::OUT));
            desk.reuse(control);
            assert_eq!(desk.word(), desk.grant.nonce.get());
        });
    });
}

#[test]
fn data_that_is_copied_again_is_checked_again() {
    with_driver(data_that_is_copied_again_is_checked_again, "", |control| {
        from_gpu(small_ring(), || {
            for withdrawn in [false, true] {
                let mut desk = Desk::new(REPLY);
                desk.turn_until(|next| *next == Next::WaitForCopies);
                desk.copies_end();
                desk.turn_until(|next| *next == Next::Wait(EventFlags::OUT));
                let begun = control.counts().device_to_host;
                // Another connection takes a slot: fewer than half are free.
                let other = desk.ahead.slots().first(6).unwrap();
                desk.turn_until(|next| *next == Next::Wait(EventFlags::OUT));
                desk.ahead.slots().give_back(other, 0);
                if withdrawn {
                    desk.reuse(control);
                }
                let word = desk.word();
                assert!(control.counts().device_to_host > begun, "it gave its slices back");
                assert_eq!(word, if withdrawn { 0 } else { desk.grant.nonce.get() });
            }
        });
    });
}

#[test]
fn a_trailer_leaves_while_the_copy_of_the_next_reply_hangs() {
    with_driver(a_trailer_leaves_while_the_copy_of_the_next_reply_hangs, "", |control| {
        from_gpu(small_ring(), || {
            let mut desk = Desk::new(KIB);
            // Others hold so much of the ring that the second reply is not copied ahead.
            let others = [6, 7].map(|token| desk.ahead.slots().first(token).unwrap());
            let before = control.counts().device_to_host;
            ask(&desk.client, desk.grant, REPLY);
            desk.turn_until(|next| *next == Next::WaitForCopies);
            desk.copies_end();
            assert_eq!(control.counts().device_to_host, before + 1);
            control.hang(true);
            desk.turn_until(|next| *next == Next::WaitForCopies);
            wait_for(control, |c| c.device_to_host == before + 2);
            assert_eq!(reply(&desk.client, desk.grant, KIB), desk.grant.nonce.get());
            control.hang(false);
            others.into_iter().for_each(|slot| desk.ahead.slots().give_back(slot, 0));
            assert_eq!(desk.word(), desk.grant.nonce.get());
        });
    });
}
