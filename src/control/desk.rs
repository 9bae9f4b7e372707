//! The interface between the control server and its producer.

use kvferry_proto::{
    ClientFrame, Incarnation, LaneKind, Mismatch, OfferId, PeerId, Token,
    hello::{Hello, Welcome},
};

use super::{outbox::Outbox, peer::PeerKey, refusal::Refusal};
use crate::lane::{ticket::LaneTicket, verbs::VerbsRequest};

/// Number of a session, never reused in a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SessionId(pub u64);

/// The control server's requests to the producer. Called on tokio threads: no call blocks for long.
///
/// The server has checked that `from` speaks for its engine, and that its session and its lanes come from the connection that
/// said Hello for it. `by` is the peer behind the connection, for limits and counts.
pub(crate) trait Desk: Send + Sync + 'static {
    /// A consumer says Hello.
    fn hello(&self, hello: &Hello, by: &PeerKey) -> Result<Welcome, Mismatch>;
    /// A session opens; frames for it go into `outbox`. The server sends `Opened` before any frame of the outbox.
    fn open(&self, from: &PeerId, expect: Incarnation, outbox: Outbox, by: &PeerKey) -> Result<SessionId, Refusal>;
    /// A frame of an open session; never `Open`. The answers to it, a refusal too, go into the session's outbox; a refusal is
    /// also returned, for the log.
    fn frame(&self, session: SessionId, from: &PeerId, frame: ClientFrame, by: &PeerKey) -> Result<(), Refusal>;
    /// The session is over. Called once for each opened session, as its last call.
    fn closed(&self, session: SessionId, from: &PeerId);
    /// A consumer requests a lane.
    fn connect_lane(
        &self,
        from: &PeerId,
        expect: Incarnation,
        kind: LaneKind,
        by: &PeerKey,
    ) -> Result<LaneTicket, Refusal>;
    /// A consumer requests a verbs lane from these ends to the rails here that reach them. May block for milliseconds.
    fn connect_verbs(
        &self,
        from: &PeerId,
        expect: Incarnation,
        ends: &VerbsRequest,
        by: &PeerKey,
    ) -> Result<LaneTicket, Refusal> {
        let _ = (from, expect, ends, by);
        Err(Refusal::Unsupported { what: format!("lane {}", LaneKind::Verbs) })
    }
    /// An offer is released without a session, by `from` or by a router (`None`), which shows its token. `true`: this call
    /// freed it.
    fn release(
        &self,
        from: Option<PeerId>,
        offer: (OfferId, Token),
        expect: Option<Incarnation>,
        by: &PeerKey,
    ) -> Result<bool, Refusal>;
}
