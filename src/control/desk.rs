//! What the control server asks of the producer that it serves.

use kvferry_proto::{
    block::{Incarnation, OfferId},
    frame::{ClientFrame, PeerId},
    hello::{Hello, Welcome},
    lane::LaneKind,
    model::Mismatch,
};

use super::{outbox::Outbox, refusal::Refusal};
use crate::lane::{ticket::LaneTicket, verbs::VerbsRequest};

/// A session, as the desk numbers them: never used twice in a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SessionId(pub u64);

/// What the control server asks of a producer. Called on tokio threads: never blocks for long.
pub(crate) trait Desk: Send + Sync + 'static {
    /// Somebody says Hello.
    fn hello(&self, hello: &Hello) -> Result<Welcome, Mismatch>;
    /// A session opens; frames for it go into `outbox`. `Opened` is sent by the server, before anything in the outbox.
    fn open(&self, from: &PeerId, expect: Incarnation, outbox: Outbox) -> Result<SessionId, Refusal>;
    /// A frame of an open session; never `Open`.
    fn frame(&self, session: SessionId, from: &PeerId, frame: ClientFrame);
    /// The session is over. Comes once for each that was opened; nothing of it comes after.
    fn closed(&self, session: SessionId, from: &PeerId);
    /// A lane is wanted.
    fn connect_lane(&self, from: &PeerId, expect: Incarnation, kind: LaneKind) -> Result<LaneTicket, Refusal>;
    /// A verbs lane is wanted, between these ends of the consumer and what reaches them here. May block for milliseconds.
    fn connect_verbs(&self, from: &PeerId, expect: Incarnation, ends: &VerbsRequest) -> Result<LaneTicket, Refusal> {
        let _ = (from, expect, ends);
        Err(Refusal::Unsupported { what: format!("lane {}", LaneKind::Verbs) })
    }
    /// An offer is let go without a session; `from` `None`: by whoever it may concern. `true`: it was freed by this.
    fn release(&self, from: Option<PeerId>, offer: OfferId, expect: Option<Incarnation>) -> Result<bool, Refusal>;
}
