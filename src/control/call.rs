//! Calls that need no session: a Hello, to learn the peer's identity, and a release by a scheduler or router. Each makes a
//! connection of its own and closes it afterwards.

use std::time::Duration;

use kvferry_proto::{
    EngineId, HelloError, Incarnation, Model, OfferId, PeerId, Rank, Shard, Token,
    hello::{Hello, VERSIONS, Welcome, features},
};

use super::{
    dial::{Dialer, said},
    host, proto,
    wire::ReleaseWanted,
};
use crate::{config::Config, error::StartError, tls::TlsIdentity};

/// A call that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// The producer cannot be reached.
    #[error(transparent)]
    Dial(#[from] HelloError),
    /// The producer answered, and refused.
    #[error("{addr} refused: {why}")]
    Refused {
        /// The address.
        addr: String,
        /// The peer's reason.
        why: String,
    },
    /// The producer did not answer in time.
    #[error("{addr} did not answer within {after:?}; is its process stopped?")]
    Silent {
        /// The address.
        addr: String,
        /// The time limit.
        after: Duration,
    },
    /// The answer breaks the protocol's bounds.
    #[error("{addr} sent a malformed message: {what}; is it a kvferry of this version?")]
    Protocol {
        /// The address.
        addr: String,
        /// What was wrong.
        what: String,
    },
}

impl From<CallError> for String {
    fn from(e: CallError) -> Self {
        e.to_string()
    }
}

/// Makes calls with the certificates, limits and times of a [`Config`].
#[derive(Debug, Clone, Default)]
pub struct Caller {
    config: Config,
}

impl Caller {
    /// A caller; a call takes at most `config.session.hello_timeout`.
    pub fn new(config: Config) -> Self {
        Self { config }
    }

    /// Says Hello as rank 0 of `engine`, to learn the identity and the memory layout of the rank at `addr`.
    pub async fn probe(&self, addr: &str, engine: &EngineId, model: &Model) -> Result<Welcome, HelloError> {
        let me = Hello {
            versions: VERSIONS,
            features: features::ALL,
            peer: PeerId { engine: engine.clone(), rank: Rank(0), incarnation: Incarnation::random() },
            model: model.clone(),
            shard: Shard::whole(1, 1),
            host: host::identity().to_owned(),
        };
        self.hello(addr, &me).await
    }

    /// Says Hello, as `me`.
    pub async fn hello(&self, addr: &str, me: &Hello) -> Result<Welcome, HelloError> {
        Ok(self.dialer(addr)?.hello(me).await?.1)
    }

    fn dialer(&self, addr: &str) -> Result<Dialer, HelloError> {
        let unusable = |e: StartError| HelloError::Refused { addr: addr.into(), why: e.to_string() };
        let tls = self.config.tls.as_ref().map(|t| TlsIdentity::new(t, None)).transpose().map_err(unusable)?;
        Ok(Dialer::new(addr.into(), &self.config, tls))
    }

    /// Releases an offer at the rank that serves `addr`, on behalf of `from`; `token` is the one in the offer's name. `expect`:
    /// the incarnation that offered, if it is known. `true`: this call freed the offer; `false`: it was gone already, or other
    /// readers hold it.
    pub async fn release(
        &self,
        addr: &str,
        from: Option<PeerId>,
        (offer, token): (OfferId, Token),
        expect: Option<Incarnation>,
    ) -> Result<bool, CallError> {
        let request = proto::ReleaseRequest::from(&ReleaseWanted { from, offer, token, expect });
        let reply = self
            .call(addr, async {
                let connection = self.dialer(addr)?.connect().await?;
                connection.ferry().release(request).await.map_err(|s| refused(addr, &s))
            })
            .await?;
        Ok(reply.into_inner().freed)
    }

    async fn call<T>(&self, addr: &str, work: impl Future<Output = Result<T, CallError>>) -> Result<T, CallError> {
        let after = self.config.session.hello_timeout;
        let silent = || Err(CallError::Silent { addr: addr.into(), after });
        tokio::time::timeout(after, work).await.unwrap_or_else(|_| silent())
    }
}

fn refused(addr: &str, status: &tonic::Status) -> CallError {
    CallError::Refused { addr: addr.into(), why: said(status) }
}

fn within(limit: Duration) -> Caller {
    let mut config = Config::default();
    config.session.hello_timeout = limit;
    Caller::new(config)
}

/// Says Hello in plain text. See [`Caller::probe`].
pub async fn probe(addr: &str, engine: &EngineId, model: &Model, limit: Duration) -> Result<Welcome, HelloError> {
    within(limit).probe(addr, engine, model).await
}

/// Releases an offer without a session, in plain text: for a scheduler that refuses a request at admission, or a router.
/// See [`Caller::release`].
pub async fn release(
    addr: &str,
    from: Option<PeerId>,
    offer: (OfferId, Token),
    expect: Option<Incarnation>,
    limit: Duration,
) -> Result<bool, CallError> {
    within(limit).release(addr, from, offer, expect).await
}
