//! A prefill rank's producer.

use kvferry::{BlockId, GroupId, OfferGroup, Producer as Inner, Ready};
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
            let me = inner.me();
            if let Some(rank) = name.ranks.iter().find(|r| r.rank == me.rank)
                && rank.incarnation != me.incarnation
            {
                return Err(PyValueError::new_err(format!(
                    "the offer names incarnation {} of this rank, which is {} since a restart; no consumer could read it",
                    rank.incarnation, me.incarnation
                )));
            }
            let groups = blocks.into_iter().map(|(group, first_position, ids)| OfferGroup {
                group: GroupId(group),
                first_position,
                blocks: ids.into_iter().map(|b| b.map(BlockId)).collect(),
            });
            let ready = stream.map_or(Ready::Now, |s| Ready::After(cuda_stream(s)));
            inner.enter(&name, groups.collect(), ready).map_err(value_error)
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
