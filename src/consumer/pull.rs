//! A pull as an engine describes it, and the checks on it that need no peer.

use std::{sync::Arc, time::Duration};

use crate::memory::CudaStream;

use kvferry_proto::{Fingerprints, LaneKind, LocalBlocks, Marks, Offer, PlanError, PoolLayout, PullError};

/// A pull to start. Only the offer and the blocks are required.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Pull {
    /// The name of the offer to read.
    pub offer: Arc<Offer>,
    /// Which positions are wanted, and the local blocks that they go into.
    pub blocks: Vec<LocalBlocks>,
    /// From now to the decision; `None`: [`PullConfig::deadline`](crate::PullConfig::deadline).
    pub deadline: Option<Duration>,
    /// Which lanes may be used, best first; `None`: [`PullConfig::lanes`](crate::PullConfig::lanes).
    pub lanes: Option<Vec<LaneKind>>,
    /// Whether earlier work on the local blocks is done. If not, nothing is read before
    /// [`Consumer::local_ready`](crate::Consumer::local_ready) is called.
    pub local_ready: bool,
    /// In place of `local_ready`: nothing is read before the work is done that this stream holds when the pull is started. For
    /// a pool in GPU memory. If that work fails, the pull is cancelled.
    pub after: Option<CudaStream>,
    /// Whether the offer may be opened later: its request waits in the prefill engine's queue. The claim then waits for it, for
    /// [`PullConfig::queued`](crate::PullConfig::queued) and the producer's [`LeaseConfig::awaited`](crate::LeaseConfig::awaited)
    /// at most.
    pub awaited: bool,
    /// What the KV must have been computed from: the offer must have each of these fingerprints, with the same value.
    pub expect: Fingerprints,
}

impl Pull {
    /// A pull of these blocks, with the defaults.
    pub fn new(offer: impl Into<Arc<Offer>>, blocks: Vec<LocalBlocks>) -> Self {
        Self {
            offer: offer.into(),
            blocks,
            deadline: None,
            lanes: None,
            local_ready: true,
            after: None,
            awaited: false,
            expect: Fingerprints::new(),
        }
    }

    /// Sets the time from now to the decision.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Uses these lanes only, best first.
    pub fn lanes(mut self, lanes: Vec<LaneKind>) -> Self {
        self.lanes = Some(lanes);
        self
    }

    /// Reads nothing before the work is done that this stream holds when the pull is started.
    pub fn after(mut self, stream: CudaStream) -> Self {
        self.after = Some(stream);
        self
    }

    /// Waits for an offer that may be opened later.
    pub fn awaited(mut self) -> Self {
        self.awaited = true;
        self
    }

    /// Requires the offer to have these fingerprints.
    pub fn expect(mut self, fingerprints: Fingerprints) -> Self {
        self.expect = fingerprints;
        self
    }

    /// Checks the name, and the wanted blocks against this rank's layout. `limit` bounds their number.
    pub(super) fn check(&self, layout: &PoolLayout, limit: usize) -> Result<(), PullError> {
        self.offer.check()?;
        self.offer.expect(&self.expect)?;
        let blocks = self.blocks.iter().map(|l| l.blocks.len()).sum();
        if blocks > limit {
            return Err(PlanError::TooManyBlocks { blocks, limit }.into());
        }
        for (i, l) in self.blocks.iter().enumerate() {
            let group = layout
                .group(l.group)
                .filter(|_| self.blocks[..i].iter().all(|o| o.group != l.group))
                .ok_or(PlanError::LocalGroup(l.group.0))?;
            let mut seen = Marks::new(group.blocks);
            for (_, id) in l.wants() {
                if id.0 >= group.blocks {
                    return Err(PlanError::LocalBlock { group: l.group.0, block: id.0, blocks: group.blocks }.into());
                }
                if !seen.insert(id) {
                    return Err(PlanError::LocalBlockTwice { group: l.group.0, block: id.0 }.into());
                }
            }
        }
        Ok(())
    }
}
