//! A producer whose pool is GPU memory, on the stand-in for libcuda. Each test runs in a process of its own, since a process
//! has one driver, whose settings and counts are its own.

mod bytes;
mod failures;
mod shares;
mod words;

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Instant,
};

use kvferry_cuda_standin::{Control, Counts};
use kvferry_proto::Grant;

use super::{super::frames::*, rig::*};
use crate::{
    config::{CopyMethod, GpuConfig},
    memory::gpu::testing::with_driver,
};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// A ring of four slots of 256 KiB, and one copy for each range, so that the copies are counted one by one.
fn small_ring() -> GpuConfig {
    GpuConfig { ring: MIB, copy: CopyMethod::Copies, ..GpuConfig::default() }
}

/// What the requests of these tests ask for: the first bytes of an offer's first block.
fn request(grant: Grant, bytes: u64) -> Vec<u8> {
    let entry = Entry { group: 0, region: 0, position: 0, blocks: 1, within: 0, piece: bytes };
    let request = Request { count: 1, tag: 9, nonce: grant.nonce.get(), slot: grant.slot };
    let mut bytes = [&request.encode()[..], &entry.encode()].concat();
    seal_request(&mut bytes, 0);
    bytes
}

/// Receives the reply to [`request`], checks its data, and returns its word.
fn reply(mut stream: impl Read, grant: Grant, bytes: u64) -> u64 {
    let sum = check_request(&request(grant, bytes)).unwrap();
    let mut head = [0; Reply::LEN];
    stream.read_exact(&mut head).unwrap();
    assert_eq!(Reply::decode(&head, sum), Ok(Reply { status: Status::Ok, tag: 9, total: bytes }));
    let mut data = vec![0; bytes as usize];
    stream.read_exact(&mut data).unwrap();
    let mut trailer = [0; Trailer::LEN];
    stream.read_exact(&mut trailer).unwrap();
    let word = Trailer::decode(&trailer, sum).unwrap().word;
    if word != 0 {
        let wrong = data.iter().enumerate().position(|(i, b)| *b != pattern(0, i as u64));
        assert_eq!(wrong, None, "first wrong byte of a reply that counts");
    }
    word
}

fn ask(mut stream: impl Write, grant: Grant, bytes: u64) {
    stream.write_all(&request(grant, bytes)).unwrap();
}

/// Waits until the driver has done something.
fn wait_for(control: Control, what: impl Fn(&Counts) -> bool) {
    let end = Instant::now() + LIMIT;
    while !what(&control.counts()) {
        assert!(Instant::now() < end, "{:?}", control.counts());
        std::thread::yield_now();
    }
}

/// Waits until the server's thread sleeps, and goes on sleeping: a thread that spins is running or ready whenever one looks.
fn server_sleeps() {
    let name = |task: &std::path::Path| std::fs::read_to_string(task.join("comm")).unwrap_or_default();
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|t| t.unwrap().path());
    let task = tasks.into_iter().find(|t| name(t) == "kvferry-tcp\n").unwrap();
    let (end, mut asleep) = (Instant::now() + LIMIT, 0);
    while asleep < 2000 {
        assert!(Instant::now() < end, "it does not sleep");
        let stat = std::fs::read_to_string(task.join("stat")).unwrap();
        asleep = if stat.contains(") S ") { asleep + 1 } else { 0 };
    }
}
