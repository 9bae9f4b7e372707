//! A model of the Llama type: its weights, and one forward pass over a batch of pieces of prompts.
//!
//! Embedding, norms, activations and residuals are candle's. Matrix products and attention are our own operations on its
//! tensors, for the reason that [`kernel`] gives. This module never samples and never schedules.

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp1, CustomOp3, Device, Layout, Result, Shape, Tensor, quantized::QTensor};
use candle_nn::ops::{rms_norm, silu};
use kvferry::BlockId;
use rayon::prelude::*;

use crate::{
    kernel::{self, Linear},
    kv::Kv,
};

/// A model's dimensions.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The name, with a hash of the weights. Both sides of a transfer must have the same one.
    pub name: String,
    /// Layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Values per head; a multiple of 8.
    pub head: usize,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Longest sequence.
    pub context: usize,
    /// Of the norms.
    pub eps: f32,
    /// Of the rotation; see [`Rope`].
    pub rope_base: f32,
    /// Generation ends with this token.
    pub eos: Option<u32>,
}

/// Weights of one layer.
pub struct Layer {
    pub attention_norm: Tensor,
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub o: Linear,
    pub ffn_norm: Tensor,
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
}

/// Token embeddings.
pub enum Embedding {
    /// Quantised as in the file.
    Quantised(QTensor),
    /// In 32-bit floats.
    Full(Tensor),
}

/// A model.
pub struct Llama {
    pub config: Config,
    pub embedding: Embedding,
    pub layers: Vec<Layer>,
    pub norm: Tensor,
    pub head: Linear,
    pub rope: Rope,
}

/// Sines and cosines `[position][pair]`, to rotate neighbouring pairs by an angle that grows with the position.
pub struct Rope {
    cos: Vec<f32>,
    sin: Vec<f32>,
    pairs: usize,
}

impl Rope {
    /// Tables for this many positions. `factors` stretches the wavelength of each pair, if the model has them.
    pub fn new(base: f32, head: usize, positions: usize, factors: Option<&[f32]>) -> Self {
        let pairs = head / 2;
        let angles = (0..positions).flat_map(|p| {
            (0..pairs).map(move |i| {
                let factor = factors.and_then(|f| f.get(i)).copied().unwrap_or(1.0);
                p as f32 / (base.powf(2.0 * i as f32 / head as f32) * factor)
            })
        });
        let (cos, sin) = angles.map(|a| (a.cos(), a.sin())).unzip();
        Self { cos, sin, pairs }
    }

    fn turn(&self, position: usize, heads: &mut [f32]) {
        let at = position * self.pairs..(position + 1) * self.pairs;
        let (cos, sin) = (&self.cos[at.clone()], &self.sin[at]);
        for head in heads.chunks_exact_mut(2 * self.pairs) {
            for ((pair, cos), sin) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
                (pair[0], pair[1]) = (pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos);
            }
        }
    }
}

/// A piece of one sequence in a batch.
#[derive(Debug, Clone)]
pub struct Span {
    /// Its rows in the batch.
    pub rows: Range<usize>,
    /// Position of its first row in the sequence.
    pub first: usize,
    /// The sequence's blocks by position, up to those of the last row.
    pub table: Vec<BlockId>,
    /// Whether the logits of its last row are needed.
    pub logits: bool,
}

/// The rows of one step.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// The tokens of all rows.
    pub tokens: Vec<u32>,
    /// The sequences of the rows.
    pub spans: Vec<Span>,
}

impl Llama {
    /// An empty cache for this model.
    pub fn cache(&self, blocks: u32) -> std::result::Result<Kv, kvferry::StartError> {
        Kv::new(blocks, self.config.layers, self.config.kv_heads, self.config.head)
    }

    /// Runs a batch, and writes its KV. In each layer, the keys and values of all rows are stored before attention reads
    /// them, so a piece may use blocks that another piece of the same batch fills. Returns the logits: a row for each span
    /// that needs them.
    pub fn forward(&self, batch: &Batch, kv: &Kv) -> Result<Vec<Vec<f32>>> {
        let ids = Tensor::from_slice(&batch.tokens, batch.tokens.len(), &Device::Cpu)?;
        let mut x = match &self.embedding {
            Embedding::Quantised(q) => q.embedding(&ids)?,
            Embedding::Full(t) => t.index_select(&ids, 0)?,
        };
        for (i, l) in self.layers.iter().enumerate() {
            let h = rms_norm(&x, &l.attention_norm, self.config.eps)?;
            let [q, k, v] = [&l.q, &l.k, &l.v].map(|w| h.apply_op1_no_bwd(w));
            let attention = Attention { model: self, layer: i, spans: &batch.spans, kv };
            let a = q?.apply_op3_no_bwd(&k?, &v?, &attention)?;
            x = (x + a.apply_op1_no_bwd(&l.o)?)?;
            let h = rms_norm(&x, &l.ffn_norm, self.config.eps)?;
            let h = (silu(&h.apply_op1_no_bwd(&l.gate)?)? * h.apply_op1_no_bwd(&l.up)?)?;
            x = (x + h.apply_op1_no_bwd(&l.down)?)?;
        }
        let last: Vec<u32> = batch.spans.iter().filter(|s| s.logits).map(|s| s.rows.end as u32 - 1).collect();
        if last.is_empty() {
            return Ok(Vec::new());
        }
        let x = x.index_select(&Tensor::new(last, &Device::Cpu)?, 0)?;
        rms_norm(&x, &self.norm, self.config.eps)?.apply_op1_no_bwd(&self.head)?.to_vec2()
    }
}

/// The most likely token; of several, the first.
pub fn greedy(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().fold((0, f32::NEG_INFINITY), |b, (i, l)| if *l > b.1 { (i, *l) } else { b });
    best.0 as u32
}

fn rows<'a>(s: &'a CpuStorage, l: &Layout) -> Result<&'a [f32]> {
    match l.contiguous_offsets() {
        Some((from, to)) => Ok(&s.as_slice::<f32>()?[from..to]),
        None => candle_core::bail!("rows must be contiguous"),
    }
}

impl CustomOp1 for Linear {
    fn name(&self) -> &'static str {
        "linear-by-row"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let n = l.shape().dims2()?.0;
        Ok((CpuStorage::F32(self.forward(rows(s, l)?)), (n, self.columns()).into()))
    }
}

/// Rotates queries and keys, stores keys and values in the cache, and attends to the cached tokens.
struct Attention<'a> {
    model: &'a Llama,
    layer: usize,
    spans: &'a [Span],
    kv: &'a Kv,
}

impl CustomOp3 for Attention<'_> {
    fn name(&self) -> &'static str {
        "paged-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        k: &CpuStorage,
        kl: &Layout,
        v: &CpuStorage,
        vl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let c = &self.model.config;
        let (q_row, kv_row) = (c.heads * c.head, c.kv_heads * c.head);
        let (mut q, mut k, v) = (rows(q, ql)?.to_vec(), rows(k, kl)?.to_vec(), rows(v, vl)?);
        for s in self.spans {
            for (position, row) in (s.first..).zip(s.rows.clone()) {
                self.model.rope.turn(position, &mut q[row * q_row..(row + 1) * q_row]);
                let at = row * kv_row..(row + 1) * kv_row;
                self.model.rope.turn(position, &mut k[at.clone()]);
                self.kv.write(self.layer, &s.table, position, &k[at.clone()], &v[at])?;
            }
        }
        let mut out = vec![0.0; q.len()];
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for s in self.spans {
            let tokens = s.first + s.rows.len();
            self.kv.gather(self.layer, &s.table, tokens, &mut keys, &mut values)?;
            let part = s.rows.start * q_row..s.rows.end * q_row;
            let group = q_row / c.kv_heads;
            let each = |scores: &mut Vec<f32>, (i, (q, out)): (usize, (&[f32], &mut [f32]))| {
                let heads = q.chunks_exact(group).zip(out.chunks_exact_mut(group));
                let planes = keys.chunks_exact(tokens * c.head).zip(values.chunks_exact(tokens * c.head));
                for ((q, out), (k, v)) in heads.zip(planes) {
                    kernel::attend(q, k, v, s.first + i + 1, c.head, scores, out);
                }
            };
            let (q, out) = (&q[part.clone()], &mut out[part]);
            if rayon::current_num_threads() > 1 && s.rows.len() > 1 {
                let rows = q.par_chunks_exact(q_row).zip(out.par_chunks_exact_mut(q_row));
                rows.enumerate().for_each_init(Vec::new, each);
            } else {
                let mut scores = Vec::new();
                q.chunks_exact(q_row).zip(out.chunks_exact_mut(q_row)).enumerate().for_each(|r| each(&mut scores, r));
            }
        }
        Ok((CpuStorage::F32(out), ql.shape().clone()))
    }
}
