//! An offer as an engine describes it.

use kvferry_proto::{Fingerprints, OfferGroup, OfferId};

use crate::memory::CudaStream;

/// The blocks to offer.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct OfferSpec {
    /// The offer's id, if a scheduler has already chosen one; `None`: a random one.
    pub id: Option<OfferId>,
    /// The engine's request id, for logs.
    pub request: String,
    /// Number of tokens in the blocks. The last block may be partial.
    pub tokens: u64,
    /// The blocks, by group, ascending.
    pub groups: Vec<OfferGroup>,
    /// What the KV was computed from.
    pub fingerprints: Fingerprints,
    /// The name's number, if a scheduler numbers its names; 0: none. See [`Offer::number`](crate::Offer::number).
    pub number: u64,
}

impl OfferSpec {
    /// An offer of these blocks, which hold `tokens` tokens.
    pub fn new(tokens: u64, groups: Vec<OfferGroup>) -> Self {
        Self { tokens, groups, ..Self::default() }
    }

    /// Sets the engine's request id, for logs.
    pub fn request(mut self, request: impl Into<String>) -> Self {
        self.request = request.into();
        self
    }

    /// Says what the KV was computed from; see [`Pull::expect`](crate::Pull::expect).
    pub fn fingerprints(mut self, fingerprints: Fingerprints) -> Self {
        self.fingerprints = fingerprints;
        self
    }

    /// Sets the name's number, if a scheduler numbers its names.
    pub fn number(mut self, number: u64) -> Self {
        self.number = number;
        self
    }

    /// Sets the offer's id, if a scheduler has chosen one.
    pub fn id(mut self, id: impl Into<Option<OfferId>>) -> Self {
        self.id = id.into();
        self
    }
}

/// When the blocks of an offer can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    /// Now.
    Now,
    /// When [`Producer::ready`](crate::Producer::ready) is called: the blocks are still being written.
    Later,
    /// When the work is done that this stream holds now. For a pool in GPU memory. If that work fails, the offer is revoked.
    After(CudaStream),
}
