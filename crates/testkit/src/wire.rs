//! A network link in user space that tests cut, delay and make lossy.
//!
//! Two TUN devices are its ends: the near one in the network namespace of the thread that makes the wire, the far one
//! in a new namespace. A thread of this process, the forwarder, reads packets from each and writes them to the other.
//! On the way it loses, delays, duplicates, reorders and changes packets, as a seeded generator decides. This needs no kernel
//! module but `tun` (`netem` is missing from many kernels), and [`Wire::counts`] tells a test how many packets were
//! affected.
//!
//! The wire needs root, `/dev/net/tun` and `ip`. [`Wire::new`] says which is missing. Tests that make a wire are marked
//! `#[ignore = "needs root and /dev/net/tun"]`, so that a machine without them counts them as ignored and not as
//! passed.
//!
//! A dropped wire leaves nothing behind, and neither does a killed process: the kernel removes a device when its
//! descriptor closes, and the far namespace, which has no name, when its last process ends. Wires of one near namespace
//! never share an address, even if several processes make them. Only IPv4 is carried. A firewall of the near namespace
//! applies to the near end.

mod forwarder;
mod namespace;
mod path;
mod tun;
mod unavailable;

use std::{
    io,
    net::Ipv4Addr,
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixDatagram},
    },
};

use forwarder::Forwarder;
use namespace::{Namespace, ip};
pub use path::{Conditions, Counts};
pub use unavailable::Unavailable;

/// One of the two directions of a wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Packets sent at the near end.
    ToFar,
    /// Packets sent at the far end.
    ToNear,
}

/// A link between this network namespace and another one. See the [module](self).
#[derive(Debug)]
pub struct Wire {
    near: Ipv4Addr,
    far: Ipv4Addr,
    device: String,
    namespace: Namespace,
    forwarder: Forwarder,
    /// Holds the addresses.
    _claim: UnixDatagram,
}

impl Wire {
    /// Largest packet that it carries, as on an Ethernet. On two cores the wire carries 280 MB/s of TCP in such packets
    /// (`cargo run --release -p kvferry-testkit --example speed`).
    pub const MTU: u32 = 1500;

    /// Makes a wire that carries every packet without delay. The seed decides which packets the conditions affect.
    pub fn new(seed: u64) -> Result<Self, Unavailable> {
        let (claim, near, far) = claim()?;
        let (near_end, device) = tun::open("kvfwire%d")?;
        let namespace = Namespace::new()?;
        let far_end = namespace.inside(|| -> Result<_, Unavailable> {
            let (end, device) = tun::open("wire")?;
            ip(&["link", "set", "dev", "lo", "up"])?;
            bring_up(&device, far, near)?;
            Ok(end)
        })?;
        bring_up(&device, near, far)?;
        let forwarder = Forwarder::start([near_end, far_end], seed)
            .map_err(|e| Unavailable::new("starting the forwarder of a wire", "a thread", e))?;
        Ok(Self { near, far, device, namespace, forwarder, _claim: claim })
    }

    /// The address of the near end.
    pub fn near(&self) -> Ipv4Addr {
        self.near
    }

    /// The address of the far end.
    pub fn far(&self) -> Ipv4Addr {
        self.far
    }

    /// The name of the near end's device.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Runs `work` on a thread in the far namespace. Its sockets, and the processes and threads that it starts, stay
    /// there.
    pub fn at_far<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.namespace.inside(work)
    }

    /// Changes the conditions of both directions. They apply to packets that are sent from now on.
    pub fn set(&self, conditions: Conditions) {
        self.set_one(Direction::ToFar, conditions);
        self.set_one(Direction::ToNear, conditions);
    }

    /// Changes the conditions of one direction.
    pub fn set_one(&self, direction: Direction, conditions: Conditions) {
        conditions.check();
        self.forwarder.tell(move |paths| paths[direction as usize].set(conditions));
    }

    /// Drops every packet silently in both directions, those in transit too: nothing is reset or refused. No packet
    /// arrives after this returns.
    pub fn cut(&self) {
        self.cut_one(Direction::ToFar);
        self.cut_one(Direction::ToNear);
    }

    /// Cuts one direction only.
    pub fn cut_one(&self, direction: Direction) {
        self.forwarder.tell(move |paths| paths[direction as usize].cut());
    }

    /// Carries packets again, in both directions, under the conditions from before the cut. Dropped packets stay lost.
    pub fn mend(&self) {
        self.forwarder.tell(|paths| paths.iter_mut().for_each(path::Path::mend));
    }

    /// Packets of one direction up to now.
    pub fn counts(&self, direction: Direction) -> Counts {
        self.forwarder.tell(move |paths| paths[direction as usize].counts())
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        // Closing the descriptor removes the device, but a process that another thread is starting has a copy of it
        // until it runs its program. The next wire could get the addresses while this device still has them.
        let ends = self.forwarder.stop();
        let _ = ip(&["link", "del", "dev", &self.device]);
        drop(ends);
    }
}

fn bring_up(device: &str, address: Ipv4Addr, peer: Ipv4Addr) -> Result<(), Unavailable> {
    // A device drops packets when its queue is full. The default of 500 is less than a burst of a test, and only the
    // forwarder should lose packets.
    let mtu = Wire::MTU.to_string();
    ip(&["link", "set", "dev", device, "mtu", &mtu, "txqueuelen", "10000"])?;
    ip(&["addr", "add", &address.to_string(), "peer", &peer.to_string(), "dev", device])?;
    ip(&["link", "set", "dev", device, "up"])
}

/// Reserves two addresses in this namespace, until the socket is closed. An abstract socket name belongs to the network
/// namespace, as addresses do, and the kernel releases it when its process dies.
fn claim() -> Result<(UnixDatagram, Ipv4Addr, Ipv4Addr), Unavailable> {
    // Processes start at different numbers: a device of a process that was just killed may still have its addresses.
    let first = std::process::id() as u8;
    for n in (0..=u8::MAX).map(|n| first.wrapping_add(n)) {
        let name = SocketAddr::from_abstract_name(format!("kvferry-wire-{n}"))
            .map_err(|e| Unavailable::new("naming a wire", "a unix socket", e))?;
        match UnixDatagram::bind_addr(&name) {
            // 198.18.0.0/15 is for tests of networks (RFC 2544), so no real host has such an address.
            Ok(claim) => return Ok((claim, Ipv4Addr::new(198, 18, n, 1), Ipv4Addr::new(198, 18, n, 2))),
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => {}
            Err(e) => return Err(Unavailable::new("naming a wire", "a unix socket", e)),
        }
    }
    Err(Unavailable("256 wires are in use in this network namespace".into()))
}
