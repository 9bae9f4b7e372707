//! Getting a lane: ask the producer for a ticket, and have it connected, for one kind after the other until one works.

use std::{
    any::Any,
    collections::HashSet,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use kvferry_proto::{
    block::Incarnation,
    error::Cause,
    hello::{Hello, Welcome},
    lane::LaneKind,
    puller::{Addr, LaneWish, Need},
};
use parking_lot::Mutex;
use tonic::Code;

use super::{
    dial::{Line, said},
    events::Connected,
    proto,
};
use crate::lane::{LaneError, WakingLane, ticket::LaneTicket, verbs::VerbsRequest};

/// A lane that is being connected.
pub(crate) type Connecting<'a> = Pin<Box<dyn Future<Output = Result<Box<dyn WakingLane>, LaneError>> + Send + 'a>>;

/// What was made for a lane before its ticket was asked for.
#[derive(Default)]
pub(crate) struct Prepared {
    /// For a verbs lane: the ends to send along.
    pub verbs: Option<VerbsRequest>,
    /// The connector's own.
    pub state: Option<Box<dyn Any + Send>>,
}

/// A lane's ends that are being made.
pub(crate) type Preparing<'a> = Pin<Box<dyn Future<Output = Result<Prepared, LaneError>> + Send + 'a>>;

/// Connects the lane that a ticket is for.
pub(crate) trait LaneConnector: Send + Sync + 'static {
    /// Makes what must be there before a ticket is asked for. Most kinds need nothing.
    fn prepare(&self, kind: LaneKind, peer: SocketAddr) -> Preparing<'_> {
        let _ = (kind, peer);
        Box::pin(async { Ok(Prepared::default()) })
    }

    /// As `connect`, with what `prepare` made.
    fn connect_prepared(
        &self,
        ticket: LaneTicket,
        prepared: Prepared,
        welcome: Arc<Welcome>,
        peer: SocketAddr,
    ) -> Connecting<'_> {
        let _ = prepared;
        self.connect(ticket, welcome, peer)
    }

    /// `peer` is where the control plane's connection leads: the host that answered.
    fn connect(&self, ticket: LaneTicket, welcome: Arc<Welcome>, peer: SocketAddr) -> Connecting<'_>;
}

/// Which kinds were skipped at which incarnation: said once for each.
#[derive(Clone, Default)]
pub(crate) struct Skipped(Arc<Mutex<HashSet<(Incarnation, LaneKind)>>>);

impl Skipped {
    fn first(&self, incarnation: Incarnation, kind: LaneKind) -> bool {
        let mut said = self.0.lock();
        // What was said of earlier incarnations is of no more use.
        said.retain(|(i, _)| *i == incarnation);
        said.insert((incarnation, kind))
    }
}

/// How long a lane that is not ready yet is waited for where there is another kind: a small pool is registered by then, and
/// for a large one the other kind does until a better lane is looked for.
const PATIENCE: Duration = Duration::from_millis(250);
/// Before the first look whether it is; then twice as long, up to `LOOK_MAX`: each makes queue pairs at both ends.
const LOOK: Duration = Duration::from_millis(20);
const LOOK_MAX: Duration = Duration::from_millis(320);

/// Why a lane was not connected.
struct Failure {
    why: String,
    cause: Cause,
    /// It may be had soon.
    not_yet: bool,
}

/// One lane that is wanted of a peer.
pub(crate) struct LaneCall {
    pub(crate) peer: Addr,
    pub(crate) me: Arc<Hello>,
    pub(crate) line: Line,
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
                    if c == Cause::Unreachable {
                        cause = c;
                    }
                    if self.skipped.first(incarnation, kind) {
                        tracing::info!(peer = %self.peer, %incarnation, lane = %kind, why, "lane skipped");
                        reasons.push(format!("{kind}: {why}"));
                    }
                }
            }
        }
        // What was said before is not said again: a pull tries until its deadline.
        if need == Need::Now && !reasons.is_empty() {
            tracing::warn!(peer = %self.peer, %incarnation, why = reasons.join("; "), "no lane to this peer");
        }
        Connected { incarnation, need, lane: Err(cause) }
    }

    /// What is not ready yet is waited for: for a while if there is another kind, as long as it may take if there is none.
    async fn connect_patiently(&self, kind: LaneKind, last: bool) -> Result<Box<dyn WakingLane>, (String, Cause)> {
        let until = Instant::now() + if last { self.timeout } else { PATIENCE.min(self.timeout) };
        let mut look = LOOK;
        loop {
            match tokio::time::timeout(self.timeout, self.connect(kind)).await {
                Ok(Ok(lane)) => return Ok(lane),
                Ok(Err(Failure { not_yet: true, .. })) if Instant::now() < until => {
                    tokio::time::sleep(look).await;
                    look = (look * 2).min(LOOK_MAX);
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
        let mut prepared = self.connector.prepare(kind, self.line.to).await.map_err(failed)?;
        let ends = prepared.verbs.take().into_iter().flat_map(|r| r.rails);
        let request = proto::LaneRequest {
            from: Some((&self.me.peer).into()),
            expect_incarnation: self.welcome.peer.incarnation.get(),
            kind: proto::LaneKind::from(kind).into(),
            verbs: ends.map(Into::into).collect(),
        };
        let reply = self.line.ferry().connect_lane(request).await.map_err(|s| {
            let cause = match s.code() {
                // Not there any more, or another one by now: the session tells which.
                Code::Unavailable | Code::FailedPrecondition | Code::Cancelled | Code::Unknown => Cause::Unreachable,
                Code::Aborted => Cause::Unreachable,
                _ => Cause::LaneFailed,
            };
            Failure { why: said(&s), cause, not_yet: s.code() == Code::Aborted }
        })?;
        let ticket =
            LaneTicket::try_from(reply.into_inner()).map_err(|e| broken(format!("rubbish from the peer: {e}")))?;
        if ticket.kind() != kind {
            return Err(broken(format!("the peer answered with a {} lane", ticket.kind())));
        }
        self.connector.connect_prepared(ticket, prepared, self.welcome.clone(), self.line.to).await.map_err(failed)
    }
}
