//! Queued frames to one session. Bounded: a consumer that does not read its stream loses its session and the queued frames,
//! so that a slow peer never makes memory grow (promises 6 and 7).

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Waker},
    time::{Duration, Instant},
};

use kvferry_proto::ServerFrame;
use parking_lot::Mutex;
use tonic::Status;

use super::guard::ConnState;

/// Most queued frames of a session. A consumer that does not read gets no new answers, so only unsolicited frames (lost
/// claims, revoked offers, growths) pile up; 16,384 of them take less than a megabyte, and those of growth some more: each
/// block is in one of them.
pub(crate) const MAX_QUEUED: usize = 1 << 14;

/// Sends frames to one session, in order. Cheap to clone; does not keep the session open.
#[derive(Clone)]
pub(crate) struct Outbox(Arc<FrameQueue>);

impl Outbox {
    pub(crate) fn new(queue: Arc<FrameQueue>) -> Self {
        Self(queue)
    }

    /// Queues a frame; never blocks. `false`: the session is over, or was ended just now because its queue is full.
    pub(crate) fn send(&self, frame: ServerFrame) -> bool {
        self.0.send(frame)
    }

    /// Ends the session after the queued frames.
    #[cfg(test)]
    pub(crate) fn end(&self, why: &super::refusal::Refusal) {
        self.0.end(why.status());
    }

    /// Whether the session is over.
    #[cfg(test)]
    pub(crate) fn is_over(&self) -> bool {
        let q = self.0.state.lock();
        q.closed || q.end.is_some() || q.ended.is_some()
    }
}

#[derive(Default)]
struct QueueState {
    frames: VecDeque<ServerFrame>,
    /// The status that ends the stream, after the frames.
    end: Option<Status>,
    /// When the end was requested.
    ended: Option<Instant>,
    /// The stream is gone.
    closed: bool,
    waker: Option<Waker>,
}

/// Shared by a session's stream, its outboxes, and the server's sweep.
pub(crate) struct FrameQueue {
    state: Mutex<QueueState>,
    conn: Arc<ConnState>,
    started: Instant,
    /// When the consumer's last frame came, in milliseconds after `started`.
    heard: AtomicU64,
    opened: AtomicBool,
}

/// The stream's next item.
pub(crate) enum Next {
    Frame(ServerFrame),
    End(Status),
    Nothing,
}

impl FrameQueue {
    pub(crate) fn new(conn: Arc<ConnState>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            conn,
            started: Instant::now(),
            heard: AtomicU64::new(0),
            opened: AtomicBool::new(false),
        })
    }

    fn send(&self, frame: ServerFrame) -> bool {
        let mut q = self.state.lock();
        if q.closed || q.ended.is_some() {
            return false;
        }
        let fits = q.frames.len() < MAX_QUEUED;
        if fits {
            q.frames.push_back(frame);
        } else {
            q.frames = VecDeque::new();
            q.ended = Some(Instant::now());
            q.end = Some(Status::resource_exhausted(format!(
                "this session's stream is not being read: {MAX_QUEUED} frames are queued"
            )));
            tracing::warn!(from = %self.conn.from(), "a consumer does not read its session: closed it");
        }
        let waker = q.waker.take();
        drop(q);
        if let Some(w) = waker {
            w.wake();
        }
        fits
    }

    /// Queues a frame before all others.
    pub(crate) fn send_first(&self, frame: ServerFrame) {
        self.state.lock().frames.push_front(frame);
    }

    /// Ends the stream after the queued frames. The first end counts.
    pub(crate) fn end(&self, status: Status) {
        let mut q = self.state.lock();
        if q.closed || q.ended.is_some() {
            return;
        }
        q.ended = Some(Instant::now());
        q.end = Some(status);
        let waker = q.waker.take();
        drop(q);
        if let Some(w) = waker {
            w.wake();
        }
    }

    /// The stream is gone.
    pub(crate) fn close(&self) {
        let mut q = self.state.lock();
        q.closed = true;
        q.frames = VecDeque::new();
        q.waker = None;
    }

    pub(crate) fn next(&self) -> Next {
        let mut q = self.state.lock();
        if let Some(frame) = q.frames.pop_front() {
            // Free the memory of a burst: sessions are idle most of the time.
            if q.frames.is_empty() && q.frames.capacity() > 64 {
                q.frames = VecDeque::new();
            }
            return Next::Frame(frame);
        }
        q.end.take().map_or(Next::Nothing, Next::End)
    }

    /// Registers the stream to be woken by the next item. `false`: an item is already queued.
    pub(crate) fn park(&self, cx: &Context<'_>) -> bool {
        let mut q = self.state.lock();
        if !q.frames.is_empty() || q.end.is_some() {
            return false;
        }
        q.waker = Some(cx.waker().clone());
        true
    }

    pub(crate) fn heard(&self) {
        self.heard.store(self.age(Instant::now()), Ordering::Relaxed);
    }

    pub(crate) fn opened(&self) {
        self.opened.store(true, Ordering::Relaxed);
    }

    fn age(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.started).as_millis()).unwrap_or(u64::MAX)
    }

    /// Ends a session that is silent or was never opened; closes the connection of one that was ended and did not go.
    pub(crate) fn sweep(&self, now: Instant, open_within: Duration, silence: Duration, linger: Duration) {
        let ended = self.state.lock().ended;
        if let Some(ended) = ended {
            if now.saturating_duration_since(ended) >= linger {
                self.conn.kill();
            }
            return;
        }
        let silent = Duration::from_millis(self.age(now).saturating_sub(self.heard.load(Ordering::Relaxed)));
        if !self.opened.load(Ordering::Relaxed) {
            if silent >= open_within {
                self.end(Status::deadline_exceeded("a session begins with Open, and none came in time"));
            }
        } else if silent >= silence {
            tracing::info!(from = %self.conn.from(), ?silent, "a consumer fell silent: closed its session");
            self.end(Status::deadline_exceeded(format!("this session was silent for {silent:?}")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvferry_proto::ServerBody;

    fn pong(n: u64) -> ServerFrame {
        ServerFrame { ack: 0, body: Some(ServerBody::Pong(n)) }
    }

    #[test]
    fn a_session_that_is_not_read_is_ended_and_its_frames_are_dropped() {
        let outbox = Outbox::new(FrameQueue::new(ConnState::for_test()));
        assert!((0..MAX_QUEUED as u64).all(|n| outbox.send(pong(n))));
        assert!(!outbox.is_over());
        assert!(!outbox.send(pong(0)));
        assert!(outbox.is_over());
        assert!(!outbox.send(pong(0)), "and it stays ended");
        let Next::End(status) = outbox.0.next() else { panic!("frames were kept") };
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
    }

    #[test]
    fn queued_frames_are_sent_before_the_end() {
        let outbox = Outbox::new(FrameQueue::new(ConnState::for_test()));
        outbox.send(pong(7));
        outbox.end(&crate::control::refusal::Refusal::Stopping);
        outbox.end(&crate::control::refusal::Refusal::Unsupported { what: "a second end".into() });
        assert!(!outbox.send(pong(8)));
        assert!(matches!(outbox.0.next(), Next::Frame(f) if f == pong(7)));
        assert!(matches!(outbox.0.next(), Next::End(s) if s.code() == tonic::Code::Unavailable));
        assert!(matches!(outbox.0.next(), Next::Nothing));
    }
}
