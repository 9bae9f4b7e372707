//! Counters of GPU memory in this whole process, for the metrics. Counted for each job or poll, never for each block.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use super::Direction;

/// How bytes came into GPU memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Landing {
    /// A NIC wrote GPU memory.
    Direct,
    /// Through the pinned ring in host memory.
    Ring,
    /// From the GPU memory of another process of this host.
    Ipc,
}

impl Landing {
    const ALL: [(Self, &'static str); 3] = [(Self::Direct, "direct"), (Self::Ring, "ring"), (Self::Ipc, "ipc")];
}

/// The copy jobs of one direction.
#[derive(Debug)]
struct Jobs {
    ended: AtomicU64,
    failed: AtomicU64,
    queue_nanos: AtomicU64,
    copy_nanos: AtomicU64,
}

impl Jobs {
    const fn new() -> Self {
        Self {
            ended: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            queue_nanos: AtomicU64::new(0),
            copy_nanos: AtomicU64::new(0),
        }
    }
}

/// What the jobs of one direction did.
#[derive(Debug, Clone, Copy)]
pub(crate) struct JobCounts {
    /// `to_gpu`, `to_host` or `between`.
    pub direction: &'static str,
    /// Jobs that have ended, failed ones included.
    pub ended: u64,
    /// Jobs that failed.
    pub failed: u64,
    /// Time from the submission of a job to its first copy, summed over jobs.
    pub queue: Duration,
    /// Time from a job's first copy to its end, summed over jobs.
    pub copy: Duration,
}

/// The counters.
#[derive(Debug)]
pub(crate) struct Counters {
    landed: [AtomicU64; Landing::ALL.len()],
    jobs: [Jobs; DIRECTIONS.len()],
    /// One bit for each GPU, by its number.
    unusable: AtomicU64,
}

/// The directions of copies, and their labels.
const DIRECTIONS: [(Direction, &str); 3] =
    [(Direction::ToGpu, "to_gpu"), (Direction::ToHost, "to_host"), (Direction::Between, "between")];

/// This process's counters.
pub(crate) static COUNTERS: Counters = Counters {
    landed: [const { AtomicU64::new(0) }; Landing::ALL.len()],
    jobs: [const { Jobs::new() }; DIRECTIONS.len()],
    unusable: AtomicU64::new(0),
};

/// Counts bytes that are in place in GPU memory. They need not count as loaded yet.
pub(crate) fn landed(how: Landing, bytes: u64) {
    COUNTERS.landed[how as usize].fetch_add(bytes, Ordering::Relaxed);
}

fn add(sum: &AtomicU64, time: Duration) {
    sum.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
}

/// Counts the time that a job waited for its first copy.
pub(super) fn waited(direction: Direction, time: Duration) {
    add(&COUNTERS.jobs[direction as usize].queue_nanos, time);
}

/// Counts a job that ended after it had copied for `time`.
pub(super) fn ended(direction: Direction, time: Duration, failed: bool) {
    let jobs = &COUNTERS.jobs[direction as usize];
    jobs.ended.fetch_add(1, Ordering::Relaxed);
    jobs.failed.fetch_add(failed.into(), Ordering::Relaxed);
    add(&jobs.copy_nanos, time);
}

/// Counts a GPU whose context is unusable.
pub(super) fn unusable(ordinal: u32) {
    COUNTERS.unusable.fetch_or(1u64.checked_shl(ordinal).unwrap_or(1 << 63), Ordering::Relaxed);
}

impl Counters {
    /// Bytes that are in place in GPU memory, by label.
    pub(crate) fn landed(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Landing::ALL.iter().map(|(how, label)| (*label, self.landed[*how as usize].load(Ordering::Relaxed)))
    }

    /// The jobs of each direction.
    pub(crate) fn jobs(&self) -> impl Iterator<Item = JobCounts> {
        DIRECTIONS.iter().map(|(direction, label)| {
            let jobs = &self.jobs[*direction as usize];
            let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
            JobCounts {
                direction: label,
                ended: get(&jobs.ended),
                failed: get(&jobs.failed),
                queue: Duration::from_nanos(get(&jobs.queue_nanos)),
                copy: Duration::from_nanos(get(&jobs.copy_nanos)),
            }
        })
    }

    /// GPUs whose context is unusable.
    pub(crate) fn unusable(&self) -> u32 {
        self.unusable.load(Ordering::Relaxed).count_ones()
    }
}
