//! A TUN device. A read returns one packet that the kernel routed to the device; a written packet is received by the
//! kernel from the device.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt as _},
};

use rustix::{
    fs::OFlags,
    ioctl::{Opcode, Updater, ioctl, opcode},
};

use super::unavailable::Unavailable;

/// `TUNSETIFF` of linux/if_tun.h. It is declared with an `int`, although it takes a [`Request`].
const TUNSETIFF: Opcode = opcode::write::<i32>(b'T', 202);
/// IP packets, without an Ethernet header.
const IFF_TUN: u16 = 0x0001;
/// No header before the packet.
const IFF_NO_PI: u16 = 0x1000;

/// `struct ifreq` of linux/if.h, with the flags of its union.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}
const _: () = assert!(size_of::<Request>() == 40);

/// Makes a device in the calling thread's namespace, and returns it with its name. The kernel replaces `%d` with a free
/// number, and removes the device when the descriptor is closed.
pub(super) fn open(name: &str) -> Result<(OwnedFd, String), Unavailable> {
    let file = open_clone_device().map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => {
            Unavailable("/dev/net/tun is missing: load the module (modprobe tun), or give it to the container".into())
        }
        _ => Unavailable::new("opening /dev/net/tun", "root", e),
    })?;
    let mut request = Request { name: [0; 16], flags: IFF_TUN | IFF_NO_PI, rest: [0; 22] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: `TUNSETIFF` reads and writes a `struct ifreq`, which `Request` has the size and layout of.
    let update = unsafe { Updater::<TUNSETIFF, Request>::new(&mut request) };
    // SAFETY: the descriptor is one of /dev/net/tun, whose driver gives `TUNSETIFF` that meaning. It keeps no pointer.
    unsafe { ioctl(&file, update) }
        .map_err(|e| Unavailable::new("making a network device", "root (CAP_NET_ADMIN)", e.into()))?;
    let name = request.name.iter().take_while(|b| **b != 0).map(|b| char::from(*b)).collect();
    Ok((file.into(), name))
}

fn open_clone_device() -> io::Result<File> {
    let flags = OFlags::NONBLOCK.bits() as i32;
    OpenOptions::new().read(true).write(true).custom_flags(flags).open("/dev/net/tun")
}
