//! Answers to wrong tokens in releases: one at a time for each peer, after a pause.
//!
//! It slows a peer that waits for its answers. It cannot bound guesses: whether a token is right is known only after the table
//! was asked, and a right one must be neither delayed nor refused, since a router passes on the names of many clients.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;

use super::peer::PeerKey;

/// Most answers of a peer that wait. Half of a connection's streams: the others stay free for its right tokens.
pub(super) const WAITING: usize = super::server::STREAMS as usize / 2;

/// The waiting answers of all peers.
#[derive(Debug, Default)]
pub(super) struct Pauses(Mutex<HashMap<PeerKey, Waiting>>);

#[derive(Debug, Default)]
struct Waiting {
    turn: Arc<tokio::sync::Mutex<()>>,
    answers: usize,
}

impl Pauses {
    /// Queues an answer of a peer; `None`: too many wait.
    pub(super) fn queue(&self, peer: &PeerKey) -> Option<Queued<'_>> {
        let mut peers = self.0.lock();
        let waiting = peers.entry(peer.clone()).or_default();
        if waiting.answers >= WAITING {
            return None;
        }
        waiting.answers += 1;
        Some(Queued { pauses: self, peer: peer.clone(), turn: waiting.turn.clone() })
    }
}

/// An answer that waits. Dropping it gives its place back, also when the caller has gone away.
#[derive(Debug)]
pub(super) struct Queued<'a> {
    pauses: &'a Pauses,
    peer: PeerKey,
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl Queued<'_> {
    /// Waits for the peer's earlier answers, then for the pause.
    pub(super) async fn wait(self, pause: Duration) {
        let _turn = self.turn.lock().await;
        tokio::time::sleep(pause).await;
    }
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        let mut peers = self.pauses.0.lock();
        if let Some(waiting) = peers.get_mut(&self.peer) {
            waiting.answers -= 1;
            if waiting.answers == 0 {
                peers.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bounded_number_of_a_peers_answers_waits_and_other_peers_have_their_own() {
        let (pauses, one, two) = (Pauses::default(), [10, 0, 0, 1], [10, 0, 0, 2]);
        let [one, two] = [one, two].map(|ip| PeerKey::new(ip.into(), None));
        let mut held: Vec<_> = (0..WAITING).map(|_| pauses.queue(&one).unwrap()).collect();
        assert!(pauses.queue(&one).is_none());
        drop(pauses.queue(&two).unwrap());
        held.pop();
        held.push(pauses.queue(&one).unwrap());
        drop(held);
        assert!(pauses.0.lock().is_empty(), "nothing is left");
    }
}
