//! A prefill rank's producer.

use kvferry::{BlockId, GroupId, Offer, OfferError, OfferGroup, PeerId, Producer as Inner, Ready};
use pyo3::{
    exceptions::{PyRuntimeError, PyValueError},
    prelude::*,
};

use crate::{
    consumer::PyBlocks,
    handle::{Handle, seconds},
    pool::{Identity, Pool, offer, offer_id, stream as cuda_stream, value_error},
    settings::Settings,
};

/// Offers blocks of the engine's memory.
#[pyclass(frozen, module = "kvferry._native")]
pub struct Producer {
    inner: Handle<Inner>,
    incarnation: String,
    addr: String,
}

#[pymethods]
impl Producer {
    /// Starts a producer. `listen` and `advertise` are `HOST:PORT`.
    #[new]
    #[pyo3(signature = (identity, pool, settings, listen, advertise = None))]
    fn new(
        py: Python<'_>,
        identity: &Identity,
        pool: &Pool,
        settings: &Settings,
        listen: String,
        advertise: Option<String>,
    ) -> PyResult<Self> {
        let mut builder = Inner::builder(identity.engine.clone(), identity.model.clone(), pool.layout.clone())
            .rank(identity.rank, identity.shard)
            .memory(pool.memory.clone())
            .listen(listen)
            .lanes(settings.lanes.clone())
            .config(settings.config.clone());
        if let Some(addr) = advertise {
            builder = builder.advertise(addr);
        }
        let inner = py.detach(|| builder.build()).map_err(|e| PyRuntimeError::new_err(e.to_string()))?;
        let incarnation = inner.me().incarnation.to_string();
        let addr = inner.addr().to_owned();
        Ok(Self { inner: Handle::new("producer", inner), incarnation, addr })
    }

    /// The rank's incarnation: 16 hexadecimal digits.
    #[getter]
    fn incarnation(&self) -> &str {
        &self.incarnation
    }

    /// `HOST:PORT` at which consumers reach this producer.
    #[getter]
    fn addr(&self) -> &str {
        &self.addr
    }

    /// Enters an offer of these blocks under a name (JSON) that the scheduler side made. From now on the blocks are held.
    /// They can be pulled at once or, with `stream`, when the work is done that this CUDA stream holds now.
    #[pyo3(signature = (json, blocks, stream = None))]
    fn enter(&self, py: Python<'_>, json: &str, blocks: Vec<PyBlocks>, stream: Option<usize>) -> PyResult<()> {
        let inner = self.inner.get()?;
        py.detach(|| {
            let name = offer(json)?;
            is_here(&name, inner.me())?;
            let ready = stream.map_or(Ready::Now, |s| Ready::After(cuda_stream(s)));
            inner.enter(&name, groups(blocks), ready).map_err(value_error)
        })
    }

    /// Opens an offer under a name (JSON), before any of its blocks is computed.
    fn enter_open(&self, py: Python<'_>, json: &str) -> PyResult<()> {
        let inner = self.inner.get()?;
        py.detach(|| {
            let name = offer(json)?;
            is_here(&name, inner.me())?;
            inner.enter_open(&name).map_err(value_error)
        })
    }

    /// Appends blocks to an open offer and moves its mark to `tokens`, the tokens that are computed from the prompt's start: now
    /// or, with `stream`, when the work is done that this CUDA stream holds now. `last`: nothing follows. Returns `False` if
    /// the offer has ended.
    #[pyo3(signature = (id, blocks, tokens, last = false, stream = None))]
    fn grow(
        &self,
        py: Python<'_>,
        id: String,
        blocks: Vec<PyBlocks>,
        tokens: u64,
        last: bool,
        stream: Option<usize>,
    ) -> PyResult<bool> {
        let (inner, id) = (self.inner.get()?, offer_id(id)?);
        py.detach(|| {
            let ready = stream.map_or(Ready::Now, |s| Ready::After(cuda_stream(s)));
            let grown = inner.grow(id, groups(blocks), tokens, ready);
            match if last { grown.and_then(|()| inner.finish(id, tokens)) } else { grown } {
                Ok(()) => Ok(true),
                Err(OfferError::Ended { .. }) => Ok(false),
                Err(e) => Err(value_error(e)),
            }
        })
    }

    /// Revokes an offer. `poll_freed` returns it once its blocks are free.
    fn revoke(&self, py: Python<'_>, id: String) -> PyResult<()> {
        let (inner, id) = (self.inner.get()?, offer_id(id)?);
        py.detach(|| inner.revoke(id));
        Ok(())
    }

    /// Makes no new offers.
    fn drain(&self, py: Python<'_>) -> PyResult<()> {
        let inner = self.inner.get()?;
        py.detach(|| inner.drain());
        Ok(())
    }

    /// Revokes every offer that nobody has claimed.
    fn revoke_unclaimed(&self, py: Python<'_>) -> PyResult<()> {
        let inner = self.inner.get()?;
        py.detach(|| inner.revoke_unclaimed());
        Ok(())
    }

    /// Returns the offers whose blocks became free since the last call, as `(id, why)`. `why` is `released`, `expired`,
    /// `revoked`, `hard_cap`, …
    fn poll_freed(&self, py: Python<'_>) -> PyResult<Vec<(String, &'static str)>> {
        let inner = self.inner.get()?;
        Ok(py.detach(|| {
            std::iter::from_fn(|| inner.poll_freed()).map(|f| (f.offer.to_string(), f.why.as_str())).collect()
        }))
    }

    /// Whether `poll_freed` would return an offer. Waits for that, for `limit` seconds at most.
    fn has_freed(&self, py: Python<'_>, limit: f64) -> PyResult<bool> {
        let (inner, limit) = (self.inner.get()?, seconds(limit)?);
        Ok(py.detach(|| inner.has_freed(limit)))
    }

    /// Numbers of live offers, of claims on them, and of open consumer sessions.
    fn live(&self, py: Python<'_>) -> PyResult<(usize, usize, usize)> {
        let inner = self.inner.get()?;
        Ok(py.detach(|| {
            let (offers, claims) = inner.live();
            (offers, claims, inner.sessions())
        }))
    }

    /// Shuts the producer down; all offers end. Returns within `limit` seconds; `True` if the shutdown is complete.
    fn close(&self, py: Python<'_>, limit: f64) -> PyResult<bool> {
        Ok(self.inner.close(py, seconds(limit)?, drop))
    }
}

fn groups(blocks: Vec<PyBlocks>) -> Vec<OfferGroup> {
    let group = |(group, first_position, ids): PyBlocks| OfferGroup {
        group: GroupId(group),
        first_position,
        blocks: ids.into_iter().map(|b| b.map(BlockId)).collect(),
    };
    blocks.into_iter().map(group).collect()
}

/// Checks that a name is of this life of the rank.
fn is_here(name: &Offer, me: &PeerId) -> PyResult<()> {
    match name.ranks.iter().find(|r| r.rank == me.rank) {
        Some(rank) if rank.incarnation != me.incarnation => Err(PyValueError::new_err(format!(
            "the offer names incarnation {} of this rank, which is {} since a restart; no consumer could read it",
            rank.incarnation, me.incarnation
        ))),
        _ => Ok(()),
    }
}
