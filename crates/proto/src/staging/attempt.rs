//! The attempts and copy jobs of a staged lane.

use crate::{Attempt, Grant};

/// A job that is not finished.
pub(super) struct Job {
    pub(super) ticket: u64,
    pub(super) attempt: Attempt,
    pub(super) batch: usize,
    pub(super) reads: u32,
    pub(super) slots: Vec<u32>,
}

/// An attempt that is not quiet.
pub(super) struct AttemptState {
    pub(super) nonce: u64,
    /// Its `Failed` event is out.
    pub(super) failed: bool,
    /// Nothing more is posted or submitted for it.
    pub(super) closed: bool,
    /// The inner lane no longer writes its slots.
    pub(super) inner_quiet: bool,
    /// Jobs that are not finished.
    pub(super) jobs: u32,
    /// Slots of finished jobs, kept until the inner lane is quiet: the attempt failed or was stopped.
    pub(super) kept: Vec<u32>,
}

impl AttemptState {
    pub(super) fn new(grant: Grant) -> Self {
        let nonce = grant.nonce.get();
        Self { nonce, failed: false, closed: false, inner_quiet: false, jobs: 0, kept: Vec::new() }
    }
}
