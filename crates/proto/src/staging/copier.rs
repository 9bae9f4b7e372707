//! The copies out of the ring, and who carries them out.

/// A copy from the ring to local memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StagedCopy {
    /// Offset in the ring, in bytes.
    pub ring_offset: u64,
    /// Index into the local segments.
    pub segment: u16,
    /// Offset in the local segment, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// The state of a copier's jobs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Finished {
    /// Every job up to this ticket is finished: its bytes are in place, and nothing of it is written any more. 0: none.
    pub up_to: u64,
    /// The device is unusable. Jobs after `up_to` are abandoned: they write nothing any more, and their bytes are not in
    /// place. A copier that cannot prove this leaves `failed` unset; its lane wedges.
    pub failed: bool,
}

/// Carries out copies. No call blocks.
pub trait Copier: Send {
    /// Submits copies as one job, and copies the list. Returns the job's ticket: tickets start above 0 and ascend, and jobs
    /// finish in the order of their tickets. `None`: no room; the lane submits again in a later poll.
    fn submit(&mut self, copies: &[StagedCopy]) -> Option<u64>;

    /// The state of the jobs. Once `failed` is set, `up_to` does not change.
    fn finished(&mut self) -> Finished;
}
