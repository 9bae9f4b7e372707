//! The requests of unary calls. Each is read whole before its call begins, within a size and a time, so that unfinished calls
//! of strangers occupy a bounded amount of memory for a bounded time (promise 7).
//!
//! A session's stream has its own limits. Services that the producer's owner adds read their requests themselves.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use tonic::{Status, body::Body};
use tower_layer::Layer;
use tower_service::Service;

use super::guard::{ConnInfo, ConnState, Guard};

/// Largest request of a unary call. The largest legitimate one is a `LaneRequest` with 16 ends, of about 4 KiB. With
/// [`super::server::STREAMS`] it bounds the unfinished requests of a connection to 2 MiB.
pub(super) const REQUEST_BYTES: usize = 32 << 10;

/// Whether the calls at this path have one request of limited size, and which of the others finish with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// It is read here.
    Unary,
    /// It needs a Hello on its connection, so it keeps no connection open by itself.
    Session,
    /// Another service's.
    Other,
}

impl Kind {
    fn of(path: &str) -> Self {
        match path {
            "/kvferry.v1.Ferry/Session" => Self::Session,
            p if p.starts_with("/kvferry.v1.Ferry/") || p.starts_with("/grpc.health.v1.Health/") => Self::Unary,
            _ => Self::Other,
        }
    }
}

/// Reads the requests of unary calls within `time` each.
#[derive(Debug, Clone, Copy)]
pub(super) struct Requests {
    pub(super) time: Duration,
}

impl<S> Layer<S> for Requests {
    type Service = Reading<S>;

    fn layer(&self, inner: S) -> Reading<S> {
        Reading { inner, time: self.time }
    }
}

/// A service whose unary requests are complete.
#[derive(Debug, Clone)]
pub(super) struct Reading<S> {
    inner: S,
    time: Duration,
}

type Answer<E> = Pin<Box<dyn Future<Output = Result<Response<Body>, E>> + Send>>;

impl<S> Service<Request<Body>> for Reading<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Future: Send> + Clone + Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Answer<S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // The clone is not ready; `self.inner` is.
        let next = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, next);
        let time = self.time;
        Box::pin(async move {
            let request = match request.extensions().get::<ConnInfo>().cloned() {
                Some(ConnInfo { state, guard }) => match read(request, &state, &guard, time).await {
                    Ok(request) => request,
                    Err(status) => return Ok(status.into_http()),
                },
                None => request,
            };
            inner.call(request).await
        })
    }
}

/// Reads a unary request. Marks its connection as one that made a call.
async fn read(
    request: Request<Body>,
    conn: &ConnState,
    guard: &Guard,
    time: Duration,
) -> Result<Request<Body>, Status> {
    guard.may_call(conn).map_err(|r| r.status())?;
    let kind = Kind::of(request.uri().path());
    let request = match kind {
        Kind::Unary => {
            let (parts, body) = request.into_parts();
            let whole = match tokio::time::timeout(time, collect(body)).await {
                Ok(whole) => whole,
                Err(_) => Err(Status::deadline_exceeded(format!(
                    "the request did not arrive whole within {time:?} (session.hello_timeout)"
                ))),
            };
            let whole = whole.inspect_err(|status| {
                guard.log.refused(Instant::now(), &conn.peer(), "request", &status.message());
            })?;
            Request::from_parts(parts, Body::new(Full::new(whole)))
        }
        Kind::Session | Kind::Other => request,
    };
    if kind != Kind::Session {
        conn.called();
    }
    Ok(request)
}

async fn collect(mut body: Body) -> Result<Bytes, Status> {
    let mut whole = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        if whole.len() + data.len() > REQUEST_BYTES {
            return Err(Status::resource_exhausted(format!("a request of over {REQUEST_BYTES} bytes")));
        }
        whole.extend_from_slice(&data);
    }
    Ok(whole.freeze())
}
