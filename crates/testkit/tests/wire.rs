//! The wire from the outside: datagrams from one end to the other. No test sets an upper limit for a time but `SOON`.

use std::{
    cell::RefCell,
    collections::{HashSet, VecDeque},
    fs::File,
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use kvferry_testkit::wire::{Conditions, Counts, Direction, Wire};

/// Longest that a test waits for something that should happen soon.
const SOON: Duration = Duration::from_secs(30);

/// A wire with a socket at each end. The far socket is in the far namespace.
struct Ends {
    near: UdpSocket,
    far: UdpSocket,
    /// Packets that the far socket received while others were sent.
    early: RefCell<VecDeque<u32>>,
    wire: Wire,
}

fn ends(seed: u64) -> Ends {
    let wire = Wire::new(seed).expect("a wire");
    let socket = |address: Ipv4Addr| {
        let socket = UdpSocket::bind((address, 0)).unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        socket
    };
    let near = socket(wire.near());
    let far = wire.at_far(|| socket(wire.far()));
    near.connect(far.local_addr().unwrap()).unwrap();
    far.connect(near.local_addr().unwrap()).unwrap();
    Ends { near, far, early: RefCell::default(), wire }
}

impl Ends {
    fn to_far(&self) -> Counts {
        self.wire.counts(Direction::ToFar)
    }

    /// Sends numbered packets to the far end, and waits until the wire has seen them all.
    fn send(&self, numbers: std::ops::Range<u32>) {
        let mut seen = self.to_far().seen;
        let numbers: Vec<_> = numbers.collect();
        // A socket has room for some 300 small packets.
        for some in numbers.chunks(100) {
            for n in some {
                self.near.send(&n.to_ne_bytes()).unwrap();
            }
            seen += some.len() as u64;
            wait_until("the wire has seen the packets", || self.to_far().seen >= seen);
            self.early.borrow_mut().extend(std::iter::from_fn(|| receive_now(&self.far)));
        }
    }

    /// The next packet at the far end.
    fn receive(&self) -> u32 {
        let early = self.early.borrow_mut().pop_front();
        early.unwrap_or_else(|| receive(&self.far))
    }

    /// Packets at the far end, up to and without number `last`.
    fn received_before(&self, last: u32) -> Vec<u32> {
        std::iter::repeat_with(|| self.receive()).take_while(|n| *n != last).collect()
    }

    fn nothing_arrives(&self) {
        assert_eq!(self.early.borrow().front(), None);
        assert_eq!(receive_now(&self.far), None);
        assert_eq!(receive_now(&self.near), None);
    }
}

fn receive(socket: &UdpSocket) -> u32 {
    let mut packet = [0; 4];
    loop {
        match socket.recv(&mut packet) {
            Ok(length) => assert_eq!(length, 4),
            // The kernel does not restart a receive that has a timeout after the process was stopped.
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(e) => panic!("no packet arrives: {e}"),
        }
        return u32::from_ne_bytes(packet);
    }
}

fn receive_now(socket: &UdpSocket) -> Option<u32> {
    let mut packet = [0; 4];
    socket.set_nonblocking(true).unwrap();
    let received = socket.recv(&mut packet);
    socket.set_nonblocking(false).unwrap();
    match received {
        Ok(length) => assert_eq!(length, 4),
        Err(e) if e.kind() == ErrorKind::WouldBlock => return None,
        Err(e) => panic!("{e}"),
    }
    Some(u32::from_ne_bytes(packet))
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < until, "waited {SOON:?} until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn a_new_wire_carries_every_packet_in_order_both_ways() {
    let e = ends(1);
    e.send(0..5001);
    assert_eq!(e.received_before(5000), (0..5000).collect::<Vec<_>>());
    for n in 0..100u32 {
        e.far.send(&n.to_ne_bytes()).unwrap();
    }
    assert_eq!((0..100).map(|_| receive(&e.near)).collect::<Vec<_>>(), (0..100).collect::<Vec<_>>());
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn about_the_share_of_packets_that_was_asked_for_is_lost() {
    let e = ends(2);
    e.wire.set_one(Direction::ToFar, Conditions { loss: 0.1, ..Conditions::default() });
    e.send(0..5000);
    e.wire.set(Conditions::default());
    e.send(5000..5001);
    let lost = 5000 - e.received_before(5000).len() as u64;
    // 500 are expected, with a standard deviation of 21.
    assert!((350..=650).contains(&lost), "{lost} of 5000");
    assert_eq!(e.to_far().lost, lost, "nothing else lost a packet");
    assert_eq!(e.wire.counts(Direction::ToNear).lost, 0, "the other direction was left alone");
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn after_a_cut_nothing_arrives_and_after_mending_the_next_packet_does() {
    let e = ends(3);
    // The cut drops packets in transit too.
    e.wire.set(Conditions { delay: Duration::from_secs(600), ..Conditions::default() });
    e.send(0..10);
    e.wire.cut();
    e.wire.set(Conditions::default());
    e.send(10..20);
    e.far.send(&[0; 4]).unwrap();
    wait_until("the cut took them", || e.to_far().cut >= 20 && e.wire.counts(Direction::ToNear).cut >= 1);
    e.nothing_arrives();
    e.wire.mend();
    e.send(20..21);
    assert_eq!(e.receive(), 20);
    e.far.send(&21u32.to_ne_bytes()).unwrap();
    assert_eq!(receive(&e.near), 21);
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn one_direction_can_be_cut_alone() {
    let e = ends(4);
    e.wire.cut_one(Direction::ToNear);
    e.send(0..1);
    assert_eq!(e.receive(), 0);
    e.far.send(&[0; 4]).unwrap();
    wait_until("the cut took it", || e.wire.counts(Direction::ToNear).cut >= 1);
    e.nothing_arrives();
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn no_packet_is_earlier_than_the_delay_less_the_jitter_and_order_is_kept() {
    let e = ends(5);
    let (delay, jitter) = (Duration::from_millis(30), Duration::from_millis(10));
    e.wire.set(Conditions { delay, jitter, ..Conditions::default() });
    for n in 0..10u32 {
        let sent = Instant::now();
        e.send(n..n + 1);
        assert_eq!(e.receive(), n);
        assert!(sent.elapsed() >= delay - jitter, "{:?}", sent.elapsed());
        e.far.send(&n.to_ne_bytes()).unwrap();
        assert_eq!(receive(&e.near), n);
        assert!(sent.elapsed() >= 2 * (delay - jitter), "{:?}", sent.elapsed());
    }
    e.send(0..201);
    assert_eq!(e.received_before(200), (0..200).collect::<Vec<_>>());
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn reordered_packets_all_arrive_and_later_ones_are_before_them() {
    let e = ends(6);
    e.wire.set(Conditions { reorder: 0.05, ..Conditions::default() });
    e.send(0..5000);
    let arrived: Vec<_> = (0..5000).map(|_| e.receive()).collect();
    assert_eq!(arrived.iter().copied().collect::<HashSet<_>>(), (0..5000).collect());
    let descents = arrived.windows(2).filter(|w| w[0] > w[1]).count();
    // 250 are expected. If the machine stops for 10 ms, a held packet may be released before another one overtakes it.
    assert!(descents >= 50, "{descents}");
    assert!(e.to_far().reordered >= 50, "{:?}", e.to_far());
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn duplicated_packets_arrive_twice() {
    let e = ends(7);
    e.wire.set(Conditions { duplicate: 0.1, ..Conditions::default() });
    e.send(0..1000);
    e.wire.set(Conditions::default());
    e.send(1000..1001);
    let arrived = e.received_before(1000);
    assert!((1050..=1150).contains(&arrived.len()), "{}", arrived.len());
    assert_eq!(arrived.into_iter().collect::<HashSet<_>>(), (0..1000).collect());
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn tcp_is_exact_under_all_conditions_at_once() {
    let wire = Wire::new(8).expect("a wire");
    wire.set(Conditions {
        loss: 0.01,
        delay: Duration::from_millis(1),
        jitter: Duration::from_micros(500),
        reorder: 0.02,
        duplicate: 0.01,
        swap: 0.0,
    });
    let listener = wire.at_far(|| TcpListener::bind((wire.far(), 0)).unwrap());
    let mut out = TcpStream::connect_timeout(&listener.local_addr().unwrap(), SOON).unwrap();
    let (mut far, _) = listener.accept().unwrap();
    let sent: Vec<u8> = (0..4u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut received = Vec::new();
    std::thread::scope(|s| {
        s.spawn(|| {
            out.write_all(&sent).unwrap();
            out.shutdown(std::net::Shutdown::Write).unwrap();
        });
        far.read_to_end(&mut received).unwrap();
    });
    assert!(sent == received);
    let Counts { lost, duplicated, reordered, .. } = wire.counts(Direction::ToFar);
    assert!(lost > 0 && duplicated > 0 && reordered > 0, "{:?}", wire.counts(Direction::ToFar));
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn many_wires_at_once_have_addresses_of_their_own() {
    let wires: Vec<_> = (0..8).map(ends).collect();
    let addresses: HashSet<_> = wires.iter().flat_map(|e| [e.wire.near(), e.wire.far()]).collect();
    assert_eq!(addresses.len(), 16);
    for (n, e) in (0..).zip(&wires) {
        e.send(n..n + 1);
    }
    for (n, e) in (0..).zip(&wires) {
        assert_eq!(e.receive(), n);
    }
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn processes_that_are_started_at_the_far_end_are_in_its_namespace() {
    let wire = Wire::new(9).expect("a wire");
    let link = || {
        let out = Command::new("readlink").arg("/proc/self/ns/net").output().unwrap();
        String::from_utf8(out.stdout).unwrap()
    };
    assert_ne!(link(), wire.at_far(link));
    assert_eq!(link(), std::fs::read_link("/proc/self/ns/net").unwrap().to_str().unwrap().to_owned() + "\n");
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
#[should_panic(expected = "of the work")]
fn a_panic_at_the_far_end_is_one_of_the_test() {
    Wire::new(10).expect("a wire").at_far(|| panic!("of the work"));
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn a_dropped_wire_leaves_no_device_and_no_namespace() {
    let wire = Wire::new(11).expect("a wire");
    // Other tests make wires at the same time, and the kernel gives names to other devices, but not indices.
    let name = wire.device().to_owned();
    let index = || rustix::net::netdevice::name_to_index(UdpSocket::bind("127.0.0.1:0").unwrap(), &name).ok();
    let this = index();
    assert!(this.is_some());
    // While this is open, no other namespace gets the same number.
    let _open = wire.at_far(|| File::open("/proc/thread-self/ns/net").unwrap());
    let namespace = wire.at_far(|| std::fs::read_link("/proc/thread-self/ns/net").unwrap());
    assert!(holders(&namespace) > 1);
    drop(wire);
    assert_ne!(index(), this);
    // A thread leaves it a little after it was joined.
    wait_until("this test alone holds the namespace", || holders(&namespace) == 1);
}

/// Descriptors and threads of this process that keep a namespace alive.
fn holders(namespace: &Path) -> usize {
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().flatten().map(|e| e.path());
    let threads = std::fs::read_dir("/proc/self/task").unwrap().flatten().map(|e| e.path().join("ns/net"));
    descriptors.chain(threads).filter(|link| std::fs::read_link(link).is_ok_and(|to| to == namespace)).count()
}
