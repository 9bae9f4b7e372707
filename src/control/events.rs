//! The events of a peer's task, for the consumer.

use std::sync::Arc;

use kvferry_proto::{
    Cause, ClaimId, Contents, Grant, Growth, Incarnation,
    hello::Welcome,
    puller::{Addr, Need},
};

use crate::lane::WakingLane;

/// Receives the events of all peers. Called on tokio threads; no call blocks.
pub(crate) trait Events: Send + Sync + 'static {
    /// A peer answered Hello. State of its other incarnations is void.
    fn welcomed(&self, peer: &Addr, welcome: Arc<Welcome>);
    /// A claim was granted: its fence word, and what it may read.
    fn granted(&self, claim: ClaimId, grant: Grant, contents: Arc<Contents>);
    /// The offer of a granted claim has grown.
    fn grown(&self, claim: ClaimId, growth: Growth);
    /// A claim was lost.
    fn lost(&self, claim: ClaimId, cause: Cause);
    /// The answer to a request for a lane.
    fn connected(&self, peer: &Addr, connected: Connected);
    /// The peer owes an answer and gives none (`true`), or answers again.
    fn silent(&self, peer: &Addr, silent: bool);
    /// This peer was unused for a long time: the owner may drop its handle.
    fn dropped(&self, peer: &Addr);
}

/// The answer to a request for a lane.
pub(crate) struct Connected {
    /// The peer's incarnation.
    pub(crate) incarnation: Incarnation,
    /// The request's urgency.
    pub(crate) need: Need,
    /// The lane, or why there is none.
    pub(crate) lane: Result<Box<dyn WakingLane>, Cause>,
}
