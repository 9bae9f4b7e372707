//! A rank's identity, and the memory that holds its KV.

use std::{ptr::NonNull, sync::Arc};

use kvferry::{
    CudaStream, EngineId, Group, GroupId, GroupKind, Memory, Model, Offer, OfferId, Place, PoolLayout, Rank, Region,
    SealKey, Shard,
};
use pyo3::{
    exceptions::{PyRuntimeError, PyValueError},
    prelude::*,
};

/// Wraps an error of the library in a `ValueError`.
pub fn value_error(e: impl std::fmt::Display) -> PyErr {
    PyValueError::new_err(e.to_string())
}

/// Parses the name of an offer and checks its bounds. The input is untrusted.
pub fn offer(json: &str) -> PyResult<Offer> {
    let offer = Offer::from_json(json).map_err(value_error)?;
    offer.check().map_err(value_error)?;
    Ok(offer)
}

/// Seal keys from the contents of their files.
pub fn seal_keys(contents: Vec<Vec<u8>>) -> PyResult<Vec<SealKey>> {
    contents.iter().map(|c| SealKey::new(c).map_err(value_error)).collect()
}

/// A stream from the integer that PyTorch calls `cuda_stream`; 0 is the default stream.
pub fn stream(raw: usize) -> CudaStream {
    // SAFETY: the caller passes its thread's current PyTorch stream on the device of its pool, which exists as long as it is
    // current. PyTorch uses primary contexts only.
    unsafe { CudaStream::from_raw(std::ptr::without_provenance_mut(raw)) }
}

pub fn offer_id(id: String) -> PyResult<OfferId> {
    OfferId::try_from(id).map_err(value_error)
}

/// A rank of an engine, its shard of the model, and the meaning of a block's bytes.
#[pyclass(frozen, module = "kvferry._native")]
pub struct Identity {
    pub engine: EngineId,
    pub rank: Rank,
    pub shard: Shard,
    pub model: Model,
}

#[pymethods]
impl Identity {
    #[new]
    #[pyo3(signature = (*, engine, rank, tp, pp, heads, layers, model, dtype, scales, weights, attention, block_tokens))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        engine: &str,
        rank: u32,
        tp: (u32, u32),
        pp: (u32, u32),
        heads: (u32, u32),
        layers: (u32, u32),
        model: String,
        dtype: String,
        scales: String,
        weights: String,
        attention: String,
        block_tokens: u32,
    ) -> PyResult<Self> {
        let (tp_rank, tp_size) = tp;
        let (pp_rank, pp_size) = pp;
        let (first_head, heads) = heads;
        let (first_layer, layers) = layers;
        Ok(Self {
            engine: engine.parse().map_err(value_error)?,
            rank: Rank(rank),
            shard: Shard { tp_rank, tp_size, pp_rank, pp_size, first_head, heads, first_layer, layers },
            model: Model { name: model, dtype, scales, weights, attention, block_tokens },
        })
    }
}

/// `(name, segment, offset, block_bytes, stride)` of one layer's blocks.
type PyRegion = (String, u16, u64, u64, u64);
/// `(id, kind, block_tokens, blocks, regions)` of the layers that share a block table.
type PyGroup = (u16, String, u32, u32, Vec<PyRegion>);

/// The engine's own KV memory and its layout. `segments` are `(address, bytes)`, all in host memory or, with `gpu`, all on one
/// GPU. `keep` is held as long as the library may touch them.
#[pyclass(frozen, module = "kvferry._native")]
pub struct Pool {
    pub layout: PoolLayout,
    pub memory: Memory,
}

#[pymethods]
impl Pool {
    #[new]
    #[pyo3(signature = (segments, groups, keep, gpu = false))]
    fn new(
        py: Python<'_>,
        segments: Vec<(usize, u64)>,
        groups: Vec<PyGroup>,
        keep: Py<PyAny>,
        gpu: bool,
    ) -> PyResult<Self> {
        let layout = PoolLayout {
            segments: segments.iter().map(|s| s.1).collect(),
            groups: groups.into_iter().map(group).collect::<PyResult<_>>()?,
        };
        layout.check().map_err(value_error)?;
        if gpu {
            let segments: Vec<_> = segments.iter().map(|&(at, len)| (at as u64, len)).collect();
            // SAFETY: as below. The engine unmaps GPU memory only in sleep mode, and before that it closes the producer and the
            // consumer, which hold all clones.
            let memory = py.detach(|| unsafe { Memory::from_gpu(&segments, Some(Arc::new(keep))) });
            let memory = memory.map_err(|e| PyRuntimeError::new_err(e.to_string()))?;
            return Ok(Self { layout, memory });
        }
        let raw = segments.iter().map(|&(at, len)| {
            let base = NonNull::new(std::ptr::with_exposed_provenance_mut::<u8>(at));
            base.map(|base| (base, len)).ok_or_else(|| PyValueError::new_err("a segment has the address 0"))
        });
        let raw = raw.collect::<PyResult<Vec<_>>>()?;
        // SAFETY: the caller passes the addresses and lengths of tensor storages, and the tensors themselves in `keep`. They
        // stay allocated until the last clone of this memory is dropped, and every lane holds a clone. No Rust reference to
        // them exists. The contract of `from_raw` allows the engine's kernels to use the same bytes.
        let memory = unsafe { Memory::from_raw(&raw, Some(Arc::new(keep))) };
        Ok(Self { layout, memory })
    }

    /// Where the memory is, for logs: `host memory`, or `GPU 0`.
    #[getter]
    fn place(&self) -> String {
        match self.memory.place() {
            Place::Gpu { ordinal, .. } => format!("GPU {ordinal}"),
            _ => "host memory".into(),
        }
    }
}

fn group((id, kind, block_tokens, blocks, regions): PyGroup) -> PyResult<Group> {
    let kind = match kind.as_str() {
        "full" => GroupKind::Full,
        "sliding_window" => GroupKind::SlidingWindow,
        "state" => GroupKind::State,
        other => {
            return Err(PyValueError::new_err(format!(
                "unknown group kind {other:?}: use full, sliding_window or state"
            )));
        }
    };
    let region = |(name, segment, offset, block_bytes, stride): PyRegion| Region {
        name: name.into(),
        segment,
        offset,
        block_bytes,
        stride,
    };
    Ok(Group { id: GroupId(id), kind, block_tokens, blocks, regions: regions.into_iter().map(region).collect() })
}
