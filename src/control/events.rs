//! What a peer's task tells the consumer that it works for.

use std::sync::Arc;

use kvferry_proto::{
    block::Incarnation,
    error::Cause,
    frame::ClaimId,
    hello::Welcome,
    lane::Grant,
    puller::{Addr, Need},
};

use crate::lane::WakingLane;

/// Receives the events of all peers. Called on tokio threads; no call blocks.
pub(crate) trait Events: Send + Sync + 'static {
    /// A peer answered Hello; anything of another incarnation of it is void.
    fn welcomed(&self, peer: &Addr, welcome: Arc<Welcome>);
    /// A claim was granted.
    fn granted(&self, claim: ClaimId, grant: Grant);
    /// A claim is gone.
    fn lost(&self, claim: ClaimId, cause: Cause);
    /// The answer to a request for a lane.
    fn connected(&self, peer: &Addr, connected: Connected);
    /// Nothing was wanted of this peer for a long time: its owner may drop the handle.
    fn dropped(&self, peer: &Addr);
}

/// A lane that was asked for, or the reason why there is none.
pub(crate) struct Connected {
    /// The peer's incarnation that it was connected to.
    pub(crate) incarnation: Incarnation,
    /// What it was asked for.
    pub(crate) need: Need,
    /// The lane.
    pub(crate) lane: Result<Box<dyn WakingLane>, Cause>,
}
