//! Setting up a lane to a peer: request a ticket from the producer and connect with it, kind by kind, until one works.

use std::{
    any::Any,
    collections::HashSet,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use kvferry_proto::{
    Cause, Incarnation, LaneKind,
    hello::{Hello, Welcome},
    puller::{Addr, LaneWish, Need},
    retry::Backoff,
};
use parking_lot::Mutex;
use tonic::Code;

use super::{
    dial::{Connection, random, said},
    events::Connected,
    proto,
};
use crate::lane::{LaneError, WakingLane, ticket::LaneTicket, verbs::VerbsRequest};

/// The connecting of a lane.
pub(crate) type Connecting<'a> = Pin<Box<dyn Future<Output = Result<Box<dyn WakingLane>, LaneError>> + Send + 'a>>;

/// The preparation for a lane, made before its ticket is requested.
#[derive(Default)]
pub(crate) struct Prepared {
    /// For a verbs lane: the ends to send with the request.
    pub verbs: Option<VerbsRequest>,
    /// The connector's own state.
    pub state: Option<Box<dyn Any + Send>>,
}

/// The preparing of a lane.
pub(crate) type Preparing<'a> = Pin<Box<dyn Future<Output = Result<Prepared, LaneError>> + Send + 'a>>;

/// Connects lanes.
pub(crate) trait LaneConnector: Send + Sync + 'static {
    /// Whether the lanes write GPU memory.
    fn on_gpu(&self) -> bool {
        false
    }

    /// Prepares a lane before its ticket is requested. Most kinds need no preparation.
    fn prepare(&self, kind: LaneKind, peer: SocketAddr) -> Preparing<'_> {
        let _ = (kind, peer);
        Box::pin(async { Ok(Prepared::default()) })
    }

    /// Connects the lane of a ticket. `peer` is the address that the control plane's connection reached.
    fn connect(
        &self,
        ticket: LaneTicket,
        prepared: Prepared,
        welcome: Arc<Welcome>,
        peer: SocketAddr,
    ) -> Connecting<'_>;
}

/// The kinds that were skipped, by incarnation: each is logged once.
#[derive(Clone, Default)]
pub(crate) struct Skipped(Arc<Mutex<HashSet<(Incarnation, LaneKind)>>>);

impl Skipped {
    fn first(&self, incarnation: Incarnation, kind: LaneKind) -> bool {
        let mut said = self.0.lock();
        said.retain(|(i, _)| *i == incarnation);
        said.insert((incarnation, kind))
    }
}

/// How long to wait for a lane that is not ready yet if another kind is possible. A small pool is registered by then; for a
/// large one the pull starts on the other kind, until the search for a better lane finds this one.
const PATIENCE: Duration = Duration::from_millis(250);
/// Shortest and longest wait between two requests for such a lane. Each request creates queue pairs at both ends.
const RETRY_WAIT: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(320));

/// A lane that was not connected.
struct Failure {
    why: String,
    cause: Cause,
    /// The peer expects it to be ready soon.
    not_yet: bool,
}

/// A request for one lane to a peer.
pub(crate) struct LaneCall {
    pub(crate) peer: Addr,
    pub(crate) me: Arc<Hello>,
    pub(crate) connection: Connection,
    pub(crate) welcome: Arc<Welcome>,
    pub(crate) connector: Arc<dyn LaneConnector>,
    /// For each kind.
    pub(crate) timeout: Duration,
    pub(crate) skipped: Skipped,
}

impl LaneCall {
    pub(crate) async fn run(self, wish: LaneWish) -> Connected {
        let LaneWish { kinds, need, .. } = wish;
        let incarnation = self.welcome.peer.incarnation;
        let mut cause = Cause::LaneFailed;
        let mut reasons = Vec::new();
        let last = kinds.iter().rev().find(|k| self.possible(**k).is_ok()).copied();
        for kind in kinds {
            let failed = match self.possible(kind) {
                Err(why) => Err((why.to_owned(), Cause::LaneFailed)),
                Ok(()) => self.connect_patiently(kind, last == Some(kind)).await,
            };
            match failed {
                Ok(lane) => return Connected { incarnation, need, lane: Ok(lane) },
                Err((why, c)) => {
                    if matches!(c, Cause::Unreachable | Cause::Limit) {
                        cause = c;
                    }
                    if self.skipped.first(incarnation, kind) {
                        tracing::info!(peer = %self.peer, %incarnation, lane = %kind, why, "lane skipped");
                        reasons.push(format!("{kind}: {why}"));
                    }
                }
            }
        }
        // Logged once per incarnation and kind: a pull tries until its deadline.
        if need == Need::Now && !reasons.is_empty() {
            tracing::warn!(peer = %self.peer, %incarnation, why = reasons.join("; "), "no lane to this peer");
        }
        Connected { incarnation, need, lane: Err(cause) }
    }

    /// Connects a lane of this kind. If it is not ready yet, waits: up to `PATIENCE`, or up to the timeout if no other kind
    /// is left.
    async fn connect_patiently(&self, kind: LaneKind, last: bool) -> Result<Box<dyn WakingLane>, (String, Cause)> {
        let until = Instant::now() + if last { self.timeout } else { PATIENCE.min(self.timeout) };
        let mut backoff = Backoff::new(RETRY_WAIT.0, RETRY_WAIT.1);
        loop {
            match tokio::time::timeout(self.timeout, self.connect(kind)).await {
                Ok(Ok(lane)) => return Ok(lane),
                Ok(Err(Failure { not_yet: true, .. })) if Instant::now() < until => {
                    tokio::time::sleep(backoff.wait_jittered(random())).await;
                }
                Ok(Err(f)) => return Err((f.why, f.cause)),
                Err(_) => return Err((format!("not connected within {:?}", self.timeout), Cause::Unreachable)),
            }
        }
    }

    fn possible(&self, kind: LaneKind) -> Result<(), &'static str> {
        if !self.welcome.lanes.contains(&kind) {
            return Err("the peer does not serve it");
        }
        let same_host = !self.me.host.is_empty() && self.me.host == self.welcome.host;
        if kind == LaneKind::Local && !same_host {
            return Err("the peer is on another host, or in other namespaces");
        }
        if kind == LaneKind::Local && self.welcome.gpu_uuid.is_some() && !self.connector.on_gpu() {
            return Err("the peer's pool is GPU memory, this pool is host memory: the tcp lane copies between them");
        }
        Ok(())
    }

    async fn connect(&self, kind: LaneKind) -> Result<Box<dyn WakingLane>, Failure> {
        let failed = |e: LaneError| {
            let cause = match e.cause() {
                Cause::Unreachable | Cause::PeerDown | Cause::PeerRestarted => Cause::Unreachable,
                _ => Cause::LaneFailed,
            };
            Failure { why: e.to_string(), cause, not_yet: matches!(e, LaneError::NotYet { .. }) }
        };
        let broken = |why| Failure { why, cause: Cause::LaneFailed, not_yet: false };
        let mut prepared = self.connector.prepare(kind, self.connection.to).await.map_err(failed)?;
        let ends = prepared.verbs.take().into_iter().flat_map(|r| r.rails);
        let request = proto::LaneRequest {
            from: Some((&self.me.peer).into()),
            expect_incarnation: self.welcome.peer.incarnation.get(),
            kind: proto::LaneKind::from(kind).into(),
            verbs: ends.map(Into::into).collect(),
        };
        let reply = self.connection.ferry().connect_lane(request).await.map_err(|s| {
            let cause = match s.code() {
                // The peer is gone or has restarted; the session finds out which.
                Code::Unavailable | Code::FailedPrecondition | Code::Cancelled | Code::Unknown => Cause::Unreachable,
                Code::Aborted => Cause::Unreachable,
                Code::ResourceExhausted => Cause::Limit,
                _ => Cause::LaneFailed,
            };
            Failure { why: said(&s), cause, not_yet: s.code() == Code::Aborted }
        })?;
        let ticket = LaneTicket::try_from(reply.into_inner())
            .map_err(|e| broken(format!("malformed message from the peer: {e}")))?;
        if ticket.kind() != kind {
            return Err(broken(format!("the peer answered with a {} lane", ticket.kind())));
        }
        self.connector.connect(ticket, prepared, self.welcome.clone(), self.connection.to).await.map_err(failed)
    }
}
