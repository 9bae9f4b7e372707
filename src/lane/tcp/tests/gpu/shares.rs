//! Many connections, and few slots.

use std::time::Duration;

use kvferry_proto::PoolLayout;
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::Errno,
    net::{RecvFlags, SendFlags, sockopt},
    process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open},
};
use rustls::{ClientConnection, StreamOwned};

use super::{
    super::bad_peers::{connect_raw, prove, proven},
    *,
};
use crate::{config::TcpConfig, tls::Protocol};

/// More than the buffers of two sockets hold.
const LARGE: u64 = 24 * MIB;

fn large() -> (Rig, Grant) {
    let rig = Rig::new(PoolLayout::uniform(2, 1, LARGE, 16));
    let grant = rig.offer(1, &[Some(0), Some(1)]).0;
    (rig, grant)
}

/// Waits until there is something to receive.
fn receives(stream: &TcpStream) {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    assert_eq!(rustix::net::recv(stream, &mut [0; 1][..], RecvFlags::PEEK).unwrap().0, 1);
}

/// The slots of a small ring are all free: as many copies begin at once.
fn ring_is_whole(control: Control, rig: &Rig, grant: Grant) {
    // It has closed the connections that are gone.
    server_sleeps();
    control.hang(true);
    let before = control.counts().device_to_host;
    let streams: Vec<_> = (0..4).map(|_| proven(rig)).collect();
    streams.iter().for_each(|s| ask(s, grant, KIB));
    wait_for(control, |c| c.device_to_host == before + 4);
    control.hang(false);
    for s in &streams {
        assert_eq!(reply(s, grant, KIB), grant.nonce.get());
    }
}

#[test]
fn more_stalled_connections_than_slots_do_not_stop_an_active_one() {
    with_driver(more_stalled_connections_than_slots_do_not_stop_an_active_one, "", |control| {
        from_gpu(small_ring(), || {
            let (rig, grant) = large();
            let stalled: Vec<_> = (0..12).map(|_| proven(&rig)).collect();
            stalled.iter().for_each(|s| ask(s, grant, LARGE));
            stalled.iter().for_each(receives);
            for _ in 0..3 {
                let active = proven(&rig);
                ask(&active, grant, LARGE);
                assert_eq!(reply(&active, grant, LARGE), grant.nonce.get());
            }
            // They go on where they stopped.
            for s in &stalled[..6] {
                assert_eq!(reply(s, grant, LARGE), grant.nonce.get());
            }
            drop(stalled);
            ring_is_whole(control, &rig, grant);
        });
    });
}

/// A connection over TLS.
type Sealed = StreamOwned<ClientConnection, TcpStream>;

/// Proves itself on a fresh connection over TLS.
fn sealed(rig: &Rig) -> Sealed {
    let identity = identity().unwrap();
    let (config, name) = (identity.client(Protocol::Lane), identity.server_name().unwrap());
    let mut stream = StreamOwned::new(ClientConnection::new(config, name).unwrap(), connect_raw(rig));
    prove(&mut stream, rig);
    stream
}

/// The server's end of a connection.
fn server_end(client: &TcpStream) -> TcpStream {
    let this = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
    let numbers = std::fs::read_dir("/proc/self/fd").unwrap();
    let numbers = numbers.map(|n| n.unwrap().file_name().to_string_lossy().parse::<i32>().unwrap());
    let ends = numbers.filter_map(|n| Some(TcpStream::from(pidfd_getfd(&this, n, PidfdGetfdFlags::empty()).ok()?)));
    let peer = client.local_addr().unwrap();
    ends.into_iter().find(|end| end.peer_addr().is_ok_and(|addr| addr == peer)).unwrap()
}

/// Sends zeros until the sockets have no room, and get none for a second. Returns their number.
fn fill(client: &TcpStream) -> usize {
    let end = server_end(client);
    sockopt::set_socket_recv_buffer_size(client, 4 << 10).unwrap();
    sockopt::set_socket_send_buffer_size(&end, 4 << 10).unwrap();
    let (mut sent, mut looks) = (0, 0);
    while looks < 20 {
        match rustix::net::send(&end, &[0; 4096], SendFlags::NOSIGNAL) {
            Ok(n) => (sent, looks) = (sent + n, 0),
            Err(Errno::AGAIN) => {
                // Acknowledgements make room, and a receiver that packs its buffer does.
                let wait = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
                rustix::event::poll(&mut [PollFd::new(&end, PollFlags::OUT)], Some(&wait)).unwrap();
                looks += 1;
            }
            Err(e) => panic!("{e}"),
        }
    }
    sent
}

#[test]
fn a_connection_over_tls_that_waits_for_a_slot_with_a_full_socket_goes_on_when_there_is_room() {
    let test = a_connection_over_tls_that_waits_for_a_slot_with_a_full_socket_goes_on_when_there_is_room;
    let body = |control: Control| {
        let rig = Rig::new(PoolLayout::uniform(1, 1, MIB, 16));
        let grant = rig.offer(1, &[Some(0)]).0;
        let (mut others, mut late) = ([(); 4].map(|()| sealed(&rig)), sealed(&rig));
        let mut waits = sealed(&rig);
        let zeros = fill(&waits.sock);
        control.hang(true);
        let before = control.counts().device_to_host;
        others.iter_mut().for_each(|s| ask(s, grant, KIB));
        wait_for(control, |c| c.device_to_host == before + 4);
        ask(&mut waits, grant, KIB);
        // The server has read that request by the time it has answered one that came after it.
        ask(&mut late, Grant { slot: 7, ..grant }, KIB);
        late.read_exact(&mut [0; Reply::LEN]).unwrap();
        server_sleeps();
        // It gets its turn for a slot, and can only send.
        control.hang(false);
        for s in &mut others {
            assert_eq!(reply(s, grant, KIB), grant.nonce.get());
        }
        server_sleeps();
        waits.sock.read_exact(&mut vec![0; zeros]).unwrap();
        assert_eq!(reply(&mut waits, grant, KIB), grant.nonce.get());
    };
    with_driver(test, "", |control| from_gpu(small_ring(), || over_tls(|| body(control))));
}

#[test]
fn slots_of_a_closed_connection_are_free_only_once_their_copies_have_ended() {
    with_driver(slots_of_a_closed_connection_are_free_only_once_their_copies_have_ended, "", |control| {
        from_gpu(small_ring(), || {
            let (rig, grant) = large();
            control.hang(true);
            let before = control.counts().device_to_host;
            let gone: Vec<_> = (0..4).map(|_| proven(&rig)).collect();
            gone.iter().for_each(|s| ask(s, grant, MIB));
            wait_for(control, |c| c.device_to_host == before + 4);
            for s in gone {
                // With a reset, so that the server sees the end at once.
                sockopt::set_socket_linger(&s, Some(Duration::ZERO)).unwrap();
            }
            let (late, last) = (proven(&rig), proven(&rig));
            ask(&late, grant, MIB);
            // The server has read the request of `late` by the time it has answered one that came after it.
            let stale = Grant { slot: 7, ..grant };
            ask(&last, stale, KIB);
            (&last).read_exact(&mut [0; Reply::LEN]).unwrap();
            assert_eq!(control.counts().device_to_host, before + 4, "no slot is free");
            control.hang(false);
            assert_eq!(reply(&late, grant, MIB), grant.nonce.get());
            ring_is_whole(control, &rig, grant);
        });
    });
}

#[test]
fn connections_that_come_and_go_in_the_middle_of_copies_lose_no_slot() {
    with_driver(connections_that_come_and_go_in_the_middle_of_copies_lose_no_slot, "delay=30us", |control| {
        from_gpu(small_ring(), || {
            let (rig, grant) = large();
            let (mut lane, memory) = rig.lane(&TcpConfig { connections: 3, ..TcpConfig::default() });
            for round in 0..100u64 {
                let streams: Vec<_> = (0..3).map(|_| proven(&rig)).collect();
                for (i, s) in streams.iter().enumerate() {
                    let requests = request(grant, 1 + (round * 37_001 + i as u64 * 500_009) % LARGE).repeat(3);
                    (&mut &*s).write_all(&requests).unwrap();
                }
                if round % 2 == 0 {
                    receives(&streams[0]);
                }
            }
            let blocks = [Some(0), Some(1)];
            let (grant, offer) = rig.offer(2, &blocks);
            let plan = rig.plan(&offer, &blocks, LARGE);
            let a = attempt();
            assert_eq!(fences(&pull(&mut lane, a, grant, &plan, MIB), a).len(), plan.chunks().len());
            check(&rig.export.layout, &memory, &[(0, 0), (1, 1)], 0);
            ring_is_whole(control, &rig, grant);
        });
    });
}
