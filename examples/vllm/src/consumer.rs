//! A decode rank's consumer.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, PoisonError},
};

use kvferry::{
    BlockId, Consumer as Inner, Ended as InnerEnded, GroupId, Hold as InnerHold, HoldState, LocalBlocks, Pull, PullId,
    WaitError,
};
use pyo3::{exceptions::PyRuntimeError, prelude::*};

use crate::{
    handle::{Handle, seconds},
    pool::{Identity, Pool, offer, stream as cuda_stream, value_error},
    settings::Settings,
};

/// Pulls offered blocks into the engine's memory.
#[pyclass(frozen, module = "kvferry._native")]
pub struct Consumer {
    inner: Handle<Inner>,
    /// Ended pulls that `has_ended` has met.
    met: Mutex<VecDeque<InnerEnded>>,
}

/// `(group, first position, block ids by position)`. A position with `None` is not pulled, or not offered.
pub type PyBlocks = (u16, u32, Vec<Option<u32>>);

#[pymethods]
impl Consumer {
    /// Builds a consumer. It connects to a producer with the first pull from it.
    #[new]
    fn new(py: Python<'_>, identity: &Identity, pool: &Pool, settings: &Settings) -> PyResult<Self> {
        let builder = Inner::builder(identity.engine.clone(), identity.model.clone(), pool.layout.clone())
            .rank(identity.rank, identity.shard)
            .memory(pool.memory.clone())
            .config(settings.config.clone());
        let inner = py.detach(|| builder.build()).map_err(|e| PyRuntimeError::new_err(e.to_string()))?;
        Ok(Self { inner: Handle::new("consumer", inner), met: Mutex::default() })
    }

    /// Starts a pull of an offer (JSON) and returns its number. The pull owns the local blocks until `poll` returns it. With
    /// `stream`, nothing is written before the work is done that this CUDA stream holds now. With `awaited`, the offer may be
    /// opened later. `deadline`: seconds until the pull decides, in place of the setting.
    #[pyo3(signature = (json, blocks, stream = None, awaited = false, deadline = None))]
    fn pull(
        &self,
        py: Python<'_>,
        json: &str,
        blocks: Vec<PyBlocks>,
        stream: Option<usize>,
        awaited: bool,
        deadline: Option<f64>,
    ) -> PyResult<u64> {
        let inner = self.inner.get()?;
        let deadline = deadline.map(seconds).transpose()?;
        py.detach(|| {
            let offer = offer(json)?;
            let blocks = blocks.into_iter().map(|(group, first_position, ids)| LocalBlocks {
                group: GroupId(group),
                first_position,
                blocks: ids.into_iter().map(|b| b.map(BlockId)).collect(),
            });
            let mut pull = Pull::new(offer, blocks.collect());
            pull.after = stream.map(cuda_stream);
            pull.awaited = awaited;
            pull.deadline = deadline.or(pull.deadline);
            inner.pull(pull).map(|id| id.0).map_err(value_error)
        })
    }

    /// Cancels a pull. `poll` still returns it, once nothing writes its local blocks any more.
    fn cancel(&self, pull: u64) -> PyResult<()> {
        self.inner.get()?.cancel(PullId(pull));
        Ok(())
    }

    /// Claims an offer (JSON) whose pull starts later, until its pull or its release. With `awaited`, the offer may be opened
    /// later.
    #[pyo3(signature = (json, awaited = false))]
    fn hold(&self, py: Python<'_>, json: &str, awaited: bool) -> PyResult<Hold> {
        let inner = self.inner.get()?;
        py.detach(|| {
            let offer = offer(json)?;
            let hold = if awaited { inner.hold_awaited(&offer) } else { inner.hold(&offer) };
            hold.map(|inner| Hold { inner }).map_err(value_error)
        })
    }

    /// Releases an offer (JSON) without a pull.
    fn release(&self, py: Python<'_>, json: &str) -> PyResult<()> {
        let inner = self.inner.get()?;
        py.detach(|| inner.release(&offer(json)?).map_err(value_error))
    }

    /// Returns the pulls that have ended since the last call.
    fn poll(&self, py: Python<'_>) -> PyResult<Vec<Ended>> {
        let inner = self.inner.get()?;
        Ok(py.detach(|| {
            let met = std::mem::take(&mut *self.met.lock().unwrap_or_else(PoisonError::into_inner));
            met.into_iter().chain(std::iter::from_fn(|| inner.poll())).map(Ended::from).collect()
        }))
    }

    /// Whether `poll` would return a pull, or a lane has wedged since the last call. Waits for that, for `limit` seconds at most.
    fn has_ended(&self, py: Python<'_>, limit: f64) -> PyResult<bool> {
        let (inner, limit) = (self.inner.get()?, seconds(limit)?);
        Ok(py.detach(|| {
            let met = || self.met.lock().unwrap_or_else(PoisonError::into_inner);
            if !met().is_empty() {
                return true;
            }
            match inner.wait(limit) {
                Ok(ended) => {
                    met().push_back(ended);
                    true
                }
                Err(WaitError::Wedged { .. }) => true,
                Err(WaitError::NotYet { .. }) => false,
                // Nothing ends any more.
                Err(_) => {
                    std::thread::sleep(limit);
                    false
                }
            }
        }))
    }

    /// Number of running pulls.
    fn pulls(&self) -> PyResult<usize> {
        Ok(self.inner.get()?.pulls())
    }

    /// Number of pulls whose blocks are withheld until this process restarts.
    fn wedged(&self) -> PyResult<usize> {
        Ok(self.inner.get()?.wedged())
    }

    /// The numbers of those pulls.
    fn wedged_pulls(&self) -> PyResult<Vec<u64>> {
        Ok(self.inner.get()?.wedged_pulls().into_iter().map(|id| id.0).collect())
    }

    /// Whether it accepts pulls: not after the death of its data thread.
    fn is_alive(&self) -> PyResult<bool> {
        Ok(self.inner.get()?.is_alive())
    }

    /// Number of peers with an open session.
    fn peers(&self) -> PyResult<usize> {
        Ok(self.inner.get()?.peers())
    }

    /// A pull's progress as `(loaded chunks, all chunks)`; `None` after its end.
    fn progress(&self, pull: u64) -> PyResult<Option<(usize, usize)>> {
        Ok(self.inner.get()?.progress(PullId(pull)))
    }

    /// Tokens from the prompt's start whose blocks are all loaded by a pull; `None` after its end.
    fn loaded_prefix(&self, pull: u64) -> PyResult<Option<u64>> {
        Ok(self.inner.get()?.loaded_prefix(PullId(pull)))
    }

    /// Cancels every pull and shuts the consumer down. Returns within `limit` seconds; `True` if the shutdown is complete.
    fn close(&self, py: Python<'_>, limit: f64) -> PyResult<bool> {
        Ok(self.inner.close(py, seconds(limit)?, |inner| {
            inner.shutdown();
            drop(inner);
        }))
    }
}

/// A claim of an offer whose pull starts later.
#[pyclass(frozen, module = "kvferry._native")]
pub struct Hold {
    inner: InnerHold,
}

#[pymethods]
impl Hold {
    /// Whether the claim waits: the offer is not open yet. `False`: it was granted, or has ended.
    fn waits(&self) -> bool {
        self.inner.state() == HoldState::Waiting
    }

    /// Whether the claim is granted: the offer is open.
    fn is_granted(&self) -> bool {
        self.inner.state() == HoldState::Granted
    }
}

/// A pull after its end: nothing writes its local blocks any more.
#[pyclass(frozen, get_all, module = "kvferry._native")]
pub struct Ended {
    /// The number that `pull` returned.
    pull: u64,
    /// The engine that made the offer.
    peer: String,
    /// Positions that did not arrive, with the local blocks meant for them: `(group, position, block)`.
    invalid: Vec<(u16, u32, u32)>,
    /// Number of blocks that arrived.
    loaded: u64,
    /// Bytes of the blocks that arrived.
    bytes: u64,
    /// Number of blocks that did not arrive, by cause.
    causes: BTreeMap<&'static str, u64>,
    /// Cause of the earliest block that did not arrive.
    cause: Option<&'static str>,
    /// The lane of the last attempt; `None` if no lane was used.
    lane: Option<&'static str>,
    /// Attempts after the first.
    retries: u32,
    /// Seconds from the call to the grant of the claim; `None` without a grant.
    claimed: Option<f64>,
    /// Seconds from the call to the end.
    ended: Option<f64>,
}

impl From<InnerEnded> for Ended {
    fn from(e: InnerEnded) -> Self {
        let o = &e.outcome;
        let mut causes = BTreeMap::new();
        for (cause, set) in o.groups.iter().flat_map(|g| &g.causes) {
            *causes.entry(cause.as_str()).or_default() += set.len();
        }
        // Both lists are sorted by group, then by position.
        let positions = o.groups.iter().flat_map(|g| g.invalid.iter());
        let invalid = e.blocks.invalid.iter().zip(positions).map(|(b, p)| (b.group.0, p, b.id.0)).collect();
        Self {
            pull: e.pull.0,
            peer: e.offer.engine.to_string(),
            invalid,
            loaded: o.loaded(),
            bytes: o.bytes,
            causes,
            cause: o.cause().map(|c| c.as_str()),
            lane: o.lanes.last().map(|l| l.as_str()),
            retries: o.retries,
            claimed: o.times.claim.map(|t| t.as_secs_f64()),
            ended: o.times.ended.map(|t| t.as_secs_f64()),
        }
    }
}
