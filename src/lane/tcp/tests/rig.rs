//! A producer with a pool full of known bytes, and a way to drive a lane like its owner does.

use std::{
    cell::RefCell,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use kvferry_proto::{
    Attempt, BlockId, ChunkSize, Contents, Grant, GroupId, Incarnation, Lane, LaneEvent, Limits, LocalBlocks, Nonce,
    OfferGroup, Plan, PoolLayout, Read, Shard, Source,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{
    config::{GpuConfig, TcpConfig},
    lane::{
        LaneError, WakingLane,
        tcp::{Server, TcpLane},
    },
    memory::{Export, FenceWords, Memory, gpu::PinnedRing},
    tls::{TlsIdentity, tests::Authority},
};

thread_local!(static IDENTITY: RefCell<Option<Arc<TlsIdentity>>> = const { RefCell::new(None) });

/// Runs `work` with certificates for both ends.
pub(super) fn over_tls(work: impl FnOnce()) {
    let tls = TlsIdentity::new(&Authority::new().issue("any"), None).unwrap();
    IDENTITY.replace(Some(tls));
    work();
    IDENTITY.replace(None);
}

thread_local!(static GPU: RefCell<Option<GpuConfig>> = const { RefCell::new(None) });

/// Runs `work` with pools of producers in GPU memory.
pub(super) fn from_gpu(config: GpuConfig, work: impl FnOnce()) {
    GPU.replace(Some(config));
    work();
    GPU.replace(None);
}

/// The certificates of both ends, if there are any.
pub(super) fn identity() -> Option<Arc<TlsIdentity>> {
    IDENTITY.with_borrow(Clone::clone)
}

/// No test waits longer than this for anything.
pub(super) const LIMIT: Duration = Duration::from_secs(20);
pub(super) const KEY: [u8; 32] = [0x5a; 32];
pub(super) const LANE: u64 = 77;
pub(super) const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// A producer rank that serves, with its pool full of known bytes.
pub(super) struct Rig {
    pub(super) export: Arc<Export>,
    pub(super) server: Server,
    pub(super) incarnation: Incarnation,
}

/// The byte at this place of every rig's pool.
pub(super) fn pattern(segment: u16, offset: u64) -> u8 {
    let x = (offset + (u64::from(segment) << 40) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (x >> 56) as u8
}

pub(super) fn filled(layout: &PoolLayout) -> Memory {
    let memory = match GPU.with_borrow(Option::is_some) {
        true => Memory::alloc_gpu(0, &layout.segments).unwrap(),
        false => Memory::alloc(&layout.segments).unwrap(),
    };
    for (i, &len) in layout.segments.iter().enumerate() {
        let bytes: Vec<u8> = (0..len).map(|offset| pattern(i as u16, offset)).collect();
        memory.write_from(i as u16, 0, &bytes).unwrap();
    }
    memory
}

impl Rig {
    pub(super) fn new(layout: PoolLayout) -> Self {
        Self::with(layout, |export, incarnation| {
            Server::start(ANY, export, incarnation, &Limits::default(), &TcpConfig::default(), identity()).unwrap()
        })
    }

    pub(super) fn with(layout: PoolLayout, start: impl FnOnce(Arc<Export>, Incarnation) -> Server) -> Self {
        let memory = filled(&layout);
        let words = Arc::new(FenceWords::new(8).unwrap());
        let ring = GPU.with_borrow(Clone::clone).and_then(|config| PinnedRing::new(&memory, &config).unwrap());
        let export = Arc::new(Export::new(Arc::new(layout), memory, words).with_ring(ring));
        let incarnation = Incarnation::random();
        let server = start(export.clone(), incarnation);
        server.admit(LANE, KEY);
        Self { export, server, incarnation }
    }

    /// Publishes blocks of group 0, from position 0 on.
    pub(super) fn offer(&self, slot: u32, blocks: &[Option<u32>]) -> (Grant, Vec<OfferGroup>) {
        let nonce = Nonce::random();
        let groups = vec![OfferGroup {
            group: GroupId(0),
            first_position: 0,
            blocks: blocks.iter().map(|b| b.map(BlockId)).collect(),
        }];
        let contents = Contents { groups: groups.clone(), complete: true, ..Contents::default() };
        self.export.publish(slot, nonce, Arc::new(contents));
        (Grant { slot, nonce }, groups)
    }

    /// A lane into fresh memory of the same layout.
    pub(super) fn lane(&self, config: &TcpConfig) -> (TcpLane, Memory) {
        let memory = Memory::alloc(&self.export.layout.segments).unwrap();
        (connect(self.server.addr(), &KEY, self.incarnation, memory.clone(), config).unwrap(), memory)
    }

    /// Plans a pull of the offer's positions into these local blocks.
    pub(super) fn plan(&self, offer: &[OfferGroup], local: &[Option<u32>], chunk: u64) -> Plan {
        let shard = Shard::whole(1, 1);
        let here = Source { layout: &self.export.layout, shard: &shard };
        let blocks = local.iter().map(|b| b.map(BlockId)).collect();
        let local = [LocalBlocks { group: GroupId(0), first_position: 0, blocks }];
        let size = ChunkSize { per_pull: 1000, min_bytes: chunk, max_bytes: chunk };
        Plan::new(offer, &[here], here, &local, size, 1 << 20).unwrap()
    }
}

pub(super) fn connect(
    addr: SocketAddr,
    key: &[u8; 32],
    incarnation: Incarnation,
    memory: Memory,
    config: &TcpConfig,
) -> Result<TcpLane, LaneError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(TcpLane::connect(addr, LANE, key, incarnation, memory, config, identity().as_deref()))
}

pub(super) fn attempt() -> Attempt {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    Attempt(NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Polls the lane, and sleeps in between as its owner does, until `until` returns true for all events so far.
pub(super) fn drive(lane: &mut TcpLane, mut until: impl FnMut(&mut TcpLane, &[LaneEvent]) -> bool) -> Vec<LaneEvent> {
    let end = Instant::now() + LIMIT;
    let mut events = Vec::new();
    loop {
        lane.poll(&mut events);
        if until(lane, &events) {
            return events;
        }
        assert!(Instant::now() < end, "still waiting after {events:?}");
        match lane.arm() {
            Ok(Some(fd)) => {
                let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
                let second = Timespec { tv_sec: 1, tv_nsec: 0 };
                poll(&mut fds, Some(&second)).unwrap();
            }
            Ok(None) => panic!("nothing to wait for after {events:?}"),
            Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::WouldBlock),
        }
    }
}

/// Pulls all chunks under one attempt, as the tracker does, until each has its fence or the attempt fails.
pub(super) fn pull(lane: &mut TcpLane, a: Attempt, grant: Grant, plan: &Plan, max_read: u64) -> Vec<LaneEvent> {
    lane.begin(a, grant);
    let chunks = plan.chunks().len() as u32;
    let mut reads: Vec<Read> = Vec::new();
    let (mut chunk, mut at) = (0, 0);
    // Each event is looked at once: a measurement must not pay for the number of them squared.
    let (mut seen, mut fenced, mut over) = (0, 0, false);
    drive(lane, |lane, events| {
        while chunk < chunks {
            if at == 0 {
                reads.clear();
                plan.reads(chunk, 0, max_read, &mut reads);
            }
            at += lane.post(a, &reads[at..]);
            if at < reads.len() {
                break;
            }
            (chunk, at) = (chunk + 1, 0);
        }
        for e in &events[seen..] {
            match e {
                LaneEvent::Fence { attempt, .. } if *attempt == a => fenced += 1,
                // Another attempt's failure does not end this one.
                LaneEvent::Failed { attempt, .. } => over |= *attempt == a,
                LaneEvent::Down { .. } => over = true,
                _ => {}
            }
        }
        seen = events.len();
        over || (chunk == chunks && fenced == chunks)
    })
}

/// The attempt's fences, as `(chunk, word)`.
pub(super) fn fences(events: &[LaneEvent], a: Attempt) -> Vec<(u32, u64)> {
    let fence = |e: &LaneEvent| match *e {
        LaneEvent::Fence { attempt, chunk, word } if attempt == a => Some((chunk, word)),
        _ => None,
    };
    events.iter().filter_map(fence).collect()
}

/// Reads of the attempt's chunk that were reported done.
pub(super) fn done(events: &[LaneEvent], a: Attempt, c: u32) -> u32 {
    let done = |e: &LaneEvent| match *e {
        LaneEvent::Done { attempt, chunk, reads } if attempt == a && chunk == c => reads,
        _ => 0,
    };
    events.iter().map(done).sum()
}

/// Checks every byte of the local memory: wanted blocks hold the source's bytes, all others are unchanged.
pub(super) fn check(layout: &PoolLayout, memory: &Memory, pairs: &[(u32, u32)], before: u8) {
    let mut want: Vec<Vec<u8>> = layout.segments.iter().map(|&len| vec![before; len as usize]).collect();
    for r in &layout.groups[0].regions {
        for &(src, dst) in pairs {
            let (from, to) = (r.block_offset(src), r.block_offset(dst) as usize);
            for i in 0..r.block_bytes {
                want[usize::from(r.segment)][to + i as usize] = pattern(r.segment, from + i);
            }
        }
    }
    for (i, want) in want.iter().enumerate() {
        let mut got = vec![0; want.len()];
        memory.read_into(i as u16, 0, &mut got).unwrap();
        let differs = got.iter().zip(want).position(|(a, b)| a != b);
        assert_eq!(differs, None, "first byte that differs in segment {i}");
    }
}
