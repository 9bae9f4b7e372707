//! Matrix products and attention scores whose results do not depend on the other rows of a batch.
//!
//! Every output element is one chain of fused multiply-adds in a fixed order, for any number of rows. So a token's KV and
//! logits have the same bits in a batch of one or of sixty, in a whole prompt or in chunks, and on every engine. This makes
//! answers comparable token by token. Library matrix products select a kernel, and so the order of additions, by shape.
//!
//! Uses AVX2 and FMA if the processor has them; other processors are slower and give the same bits.

use std::sync::LazyLock;

use candle_core::quantized::{GgmlDType, QTensor};
use pulp::{Arch, NullaryFnOnce, Simd, WithSimd};
use rayon::prelude::*;

/// The instructions of this processor.
static ARCH: LazyLock<Arch> = LazyLock::new(Arch::new);

/// Columns that are computed together.
const WIDE: usize = 16;
/// Most rows that are computed together: 4 x 16 accumulators hide the latency of AVX2's multiply-add (44 GMAC/s here; two
/// per cycle at 3.2 GHz would be 51).
const ROWS: usize = 4;
/// Values that share a scale in the quantised formats.
const SHARED: usize = 32;

/// Weights of a linear layer, in panels of 16 columns: `y[i][n] = sum over k of x[i][k] * w[n][k]`.
pub struct Linear {
    /// Columns of the output.
    n: usize,
    /// Columns of the input.
    k: usize,
    weights: Weights,
}

enum Weights {
    /// `[panel][k][16]`
    Full(Vec<f32>),
    /// `w = q * d + m`, for Q4_0, Q4_1 and Q8_0. `q` as above, `d` and `m` `[panel][k / 32][16]`.
    Scaled { q: Vec<i8>, d: Vec<f32>, m: Vec<f32> },
}

impl Linear {
    /// From `[n][k]` values.
    pub fn new(values: &[f32], n: usize, k: usize) -> Self {
        let mut w = vec![0.0; n.div_ceil(WIDE) * WIDE * k];
        for (row, line) in values.chunks_exact(k).take(n).enumerate() {
            let panel = row / WIDE * WIDE * k;
            for (at, v) in line.iter().enumerate() {
                w[panel + at * WIDE + row % WIDE] = *v;
            }
        }
        Self { n, k, weights: Weights::Full(w) }
    }

    /// From a tensor of a GGUF file. The common 4-bit and 8-bit formats stay quantised; others are widened.
    pub fn from_gguf(t: &QTensor) -> candle_core::Result<Self> {
        let (n, k) = t.shape().dims2()?;
        let bytes = t.data()?;
        let half = |b: &[u8]| half::f16::from_le_bytes([b[0], b[1]]).to_f32();
        // A block has a scale, for some formats an offset, and 32 integers.
        type Block = fn(&[u8], &mut [i8; SHARED]);
        let (size, offset, read): (usize, bool, Block) = match t.dtype() {
            GgmlDType::Q4_0 => (18, false, |b, q| nibbles(&b[2..], 8, q)),
            GgmlDType::Q4_1 => (20, true, |b, q| nibbles(&b[4..], 0, q)),
            GgmlDType::Q8_0 => (34, false, |b, q| q.iter_mut().zip(&b[2..]).for_each(|(q, b)| *q = *b as i8)),
            _ => {
                let all = t.dequantize(&candle_core::Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
                return Ok(Self::new(&all, n, k));
            }
        };
        let (wide, shared) = (n.div_ceil(WIDE) * WIDE, k / SHARED);
        let (mut q, mut d, mut m) = (vec![0; wide * k], vec![0.0; wide * shared], vec![0.0; wide * shared]);
        let mut values = [0; SHARED];
        for (i, block) in bytes.chunks_exact(size).enumerate() {
            let (row, at) = (i / shared, i % shared);
            let (panel, column) = (row / WIDE * WIDE, row % WIDE);
            read(block, &mut values);
            d[panel * shared + at * WIDE + column] = half(block);
            m[panel * shared + at * WIDE + column] = if offset { half(&block[2..]) } else { 0.0 };
            for (j, v) in values.iter().enumerate() {
                q[panel * k + (at * SHARED + j) * WIDE + column] = *v;
            }
        }
        Ok(Self { n, k, weights: Weights::Scaled { q, d, m } })
    }

    /// Columns of the output.
    pub fn columns(&self) -> usize {
        self.n
    }

    /// `x` has whole rows of `k` values; the result has the same number of rows of `n` values.
    pub fn forward(&self, x: &[f32]) -> Vec<f32> {
        let rows = x.len() / self.k;
        let panels = self.n.div_ceil(WIDE);
        let mut wide = vec![0.0; panels * rows * WIDE];
        let each = |(panel, out): (usize, &mut [f32])| ARCH.dispatch(Panel { linear: self, panel, x, out });
        if rows > 0 {
            if rayon::current_num_threads() > 1 {
                wide.par_chunks_mut(rows * WIDE).enumerate().with_min_len(4).for_each(each);
            } else {
                wide.chunks_mut(rows * WIDE).enumerate().for_each(each);
            }
        }
        let mut y = vec![0.0; rows * self.n];
        for (i, line) in y.chunks_exact_mut(self.n).enumerate() {
            for (panel, to) in line.chunks_mut(WIDE).enumerate() {
                let from = &wide[(panel * rows + i) * WIDE..];
                to.copy_from_slice(&from[..to.len()]);
            }
        }
        y
    }
}

/// One panel of a product. A closure would not be compiled for the processor's instructions.
struct Panel<'a> {
    linear: &'a Linear,
    panel: usize,
    x: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for Panel<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (k, panel) = (self.linear.k, self.panel);
        match &self.linear.weights {
            Weights::Full(w) => {
                ARCH.dispatch(Full { x: self.x, k, w: &w[panel * WIDE * k..][..WIDE * k], out: self.out })
            }
            Weights::Scaled { q, d, m } => {
                let shared = k / SHARED * WIDE;
                let weights = Scaled {
                    q: &q[panel * WIDE * k..][..WIDE * k],
                    d: d[panel * shared..][..shared].as_chunks().0,
                    m: m[panel * shared..][..shared].as_chunks().0,
                };
                match WIDE / S::F32_LANES {
                    1 => scaled::<S, 1>(simd, self.x, k, weights, self.out),
                    2 => scaled::<S, 2>(simd, self.x, k, weights, self.out),
                    4 => scaled::<S, 4>(simd, self.x, k, weights, self.out),
                    _ => scaled::<S, WIDE>(simd, self.x, k, weights, self.out),
                }
            }
        }
    }
}

/// 16 bytes of two 4-bit numbers each: first the low ones, then the high ones.
fn nibbles(b: &[u8], less: i8, q: &mut [i8; SHARED]) {
    for j in 0..SHARED / 2 {
        q[j] = (b[j] & 15) as i8 - less;
        q[j + SHARED / 2] = (b[j] >> 4) as i8 - less;
    }
}

/// One panel of 32-bit weights.
struct Full<'a> {
    x: &'a [f32],
    k: usize,
    w: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for Full<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match WIDE / S::F32_LANES {
            1 => self.run::<S, 1>(simd),
            2 => self.run::<S, 2>(simd),
            4 => self.run::<S, 4>(simd),
            _ => self.run::<S, WIDE>(simd),
        }
    }
}

impl Full<'_> {
    /// `V` vectors form a line of [`WIDE`] values.
    #[inline(always)]
    fn run<S: Simd, const V: usize>(self, simd: S) {
        let Self { x, k, w, out } = self;
        for (x, out) in x.chunks(ROWS * k).zip(out.chunks_mut(ROWS * WIDE)) {
            match x.len() / k {
                4 => tile::<S, 4, V>(simd, x, k, w, out),
                3 => tile::<S, 3, V>(simd, x, k, w, out),
                2 => tile::<S, 2, V>(simd, x, k, w, out),
                _ => tile::<S, 1, V>(simd, x, k, w, out),
            }
        }
    }
}

#[inline(always)]
fn tile<S: Simd, const R: usize, const V: usize>(simd: S, x: &[f32], k: usize, w: &[f32], out: &mut [f32]) {
    let mut acc = [[simd.splat_f32s(0.0); V]; R];
    let lines: [&[f32]; R] = std::array::from_fn(|i| &x[i * k..(i + 1) * k]);
    for (at, w) in lines_of::<S, V>(w).iter().enumerate().take(k) {
        for i in 0..R {
            step(simd, &mut acc[i], lines[i][at], w);
        }
    }
    store(out, &acc);
}

/// Explicit vectors: not every build vectorises loops over arrays, which are ten times slower without.
#[inline(always)]
fn step<S: Simd, const V: usize>(simd: S, acc: &mut [S::f32s; V], x: f32, w: &[S::f32s; V]) {
    let x = simd.splat_f32s(x);
    for c in 0..V {
        acc[c] = simd.mul_add_f32s(x, w[c], acc[c]);
    }
}

#[inline(always)]
fn lines_of<S: Simd, const V: usize>(values: &[f32]) -> &[[S::f32s; V]] {
    S::as_simd_f32s(values).0.as_chunks().0
}

#[inline(always)]
fn store<F: Copy + bytemuck::NoUninit, const V: usize>(out: &mut [f32], acc: &[[F; V]]) {
    for (out, acc) in out.chunks_exact_mut(WIDE).zip(acc) {
        out.copy_from_slice(bytemuck::cast_slice(acc));
    }
}

/// The numbers and scales of one panel.
#[derive(Clone, Copy)]
struct Scaled<'a> {
    q: &'a [i8],
    d: &'a [[f32; WIDE]],
    m: &'a [[f32; WIDE]],
}

impl<'a> Scaled<'a> {
    /// Numbers, scale and offset of each 32 x 16 weights.
    fn blocks(self) -> impl Iterator<Item = (&'a [i8], &'a [f32; WIDE], &'a [f32; WIDE])> {
        self.q.chunks_exact(SHARED * WIDE).zip(self.d.iter().zip(self.m)).map(|(q, (d, m))| (q, d, m))
    }
}

/// One panel of scaled weights. For few rows, each weight is widened on use; for more, the panel is widened first. Both
/// give the same weights.
#[inline(always)]
fn scaled<S: Simd, const V: usize>(simd: S, x: &[f32], k: usize, weights: Scaled<'_>, out: &mut [f32]) {
    match x.len() / k {
        1 => narrow::<S, 1, V>(simd, x, k, weights, out),
        2 => narrow::<S, 2, V>(simd, x, k, weights, out),
        _ => {
            let mut w = vec![0f32; weights.q.len()];
            for ((q, d, m), w) in weights.blocks().zip(w.chunks_exact_mut(SHARED * WIDE)) {
                widen::<S, V>(simd, q, d, m, w);
            }
            ARCH.dispatch(Full { x, k, w: &w, out });
        }
    }
}

/// Widens 32 x 16 weights.
#[inline(always)]
fn widen<S: Simd, const V: usize>(simd: S, q: &[i8], d: &[f32; WIDE], m: &[f32; WIDE], w: &mut [f32]) {
    for (w, q) in w.iter_mut().zip(q) {
        *w = f32::from(*q);
    }
    let (d, m) = (&lines_of::<S, V>(d)[0], &lines_of::<S, V>(m)[0]);
    for w in S::as_mut_simd_f32s(w).0.as_chunks_mut::<V>().0 {
        for c in 0..V {
            w[c] = simd.mul_add_f32s(w[c], d[c], m[c]);
        }
    }
}

#[inline(always)]
fn narrow<S: Simd, const R: usize, const V: usize>(simd: S, x: &[f32], k: usize, weights: Scaled<'_>, out: &mut [f32]) {
    let mut acc = [[simd.splat_f32s(0.0); V]; R];
    let mut w = [0f32; SHARED * WIDE];
    for (block, (q, d, m)) in weights.blocks().enumerate() {
        widen::<S, V>(simd, q, d, m, &mut w);
        let lines: [&[f32; SHARED]; R] =
            std::array::from_fn(|i| x[i * k + block * SHARED..].first_chunk().unwrap_or(&[0.0; SHARED]));
        for (j, w) in lines_of::<S, V>(&w).iter().enumerate() {
            for i in 0..R {
                step(simd, &mut acc[i], lines[i][j], w);
            }
        }
    }
    store(out, &acc);
}

/// Attention of one token's query heads to the first `tokens` keys and values of one KV head.
///
/// `q` and `out` hold whole heads of `head` values (a multiple of 8), `k` and `v` are `[token][head]`.
pub fn attend(q: &[f32], k: &[f32], v: &[f32], tokens: usize, head: usize, scores: &mut Vec<f32>, out: &mut [f32]) {
    ARCH.dispatch(Attend { q, k, v, tokens, head, scores, out });
}

struct Attend<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    tokens: usize,
    head: usize,
    scores: &'a mut Vec<f32>,
    out: &'a mut [f32],
}

impl NullaryFnOnce for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { q, k, v, tokens, head, scores, out } = self;
        let scale = 1.0 / (head as f32).sqrt();
        scores.resize(tokens, 0.0);
        for (q, out) in q.chunks_exact(head).zip(out.chunks_exact_mut(head)) {
            let mut most = f32::NEG_INFINITY;
            for (s, k) in scores.iter_mut().zip(k.chunks_exact(head)) {
                *s = dot(q, k) * scale;
                most = most.max(*s);
            }
            let mut sum = 0.0;
            for s in scores.iter_mut() {
                *s = (*s - most).exp();
                sum += *s;
            }
            out.fill(0.0);
            for (p, v) in scores.iter().zip(v.chunks_exact(head)) {
                for (o, v) in out.iter_mut().zip(v) {
                    *o = p.mul_add(*v, *o);
                }
            }
            out.iter_mut().for_each(|o| *o /= sum);
        }
    }
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut l = [0f32; 8];
    for (a, b) in a.as_chunks::<8>().0.iter().zip(b.as_chunks::<8>().0) {
        for i in 0..8 {
            l[i] = a[i].mul_add(b[i], l[i]);
        }
    }
    ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};

    fn noise(n: usize, seed: u64) -> Vec<f32> {
        let mut s = seed;
        let mut next = || {
            s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((s >> 40) as f32 / (1u64 << 24) as f32) - 0.5
        };
        (0..n).map(|_| next()).collect()
    }

    #[test]
    fn a_row_has_the_same_bits_in_every_batch() -> candle_core::Result<()> {
        let (n, k, rows) = (40, 64, 23);
        let (w, x) = (noise(n * k, 1), noise(rows * k, 2));
        let t = Tensor::from_slice(&w, (n, k), &Device::Cpu)?;
        let kinds = [GgmlDType::F32, GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q8_0, GgmlDType::Q5_0];
        for kind in kinds {
            let l = Linear::from_gguf(&QTensor::quantize(&t, kind)?)?;
            let all = l.forward(&x);
            for size in 1..rows {
                let parts: Vec<f32> = x.chunks(size * k).flat_map(|x| l.forward(x)).collect();
                assert!(
                    all.iter().zip(&parts).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{kind:?} in batches of {size}"
                );
            }
        }
        Ok(())
    }

    #[test]
    fn products_follow_the_quantised_formats() -> candle_core::Result<()> {
        let (n, k, rows) = (40, 64, 7);
        let (w, x) = (noise(n * k, 3), noise(rows * k, 4));
        let t = Tensor::from_slice(&w, (n, k), &Device::Cpu)?;
        for kind in [GgmlDType::F32, GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q8_0, GgmlDType::Q5_1] {
            let q = QTensor::quantize(&t, kind)?;
            let (wide, y) = (q.dequantize(&Device::Cpu)?, Linear::from_gguf(&q)?.forward(&x));
            let slow =
                Tensor::from_slice(&x, (rows, k), &Device::Cpu)?.matmul(&wide.t()?)?.flatten_all()?.to_vec1::<f32>()?;
            assert!(slow.iter().zip(&y).all(|(a, b)| (a - b).abs() < 1e-4), "{kind:?}");
        }
        Ok(())
    }

    #[test]
    fn attention_weighs_values_by_their_keys() {
        let (q, k, v) = (noise(16, 5), noise(8 * 5, 6), noise(8 * 5, 7));
        let mut out = vec![0.0; 16];
        attend(&q, &k, &v, 4, 8, &mut Vec::new(), &mut out);
        for h in 0..2 {
            let dots: Vec<f64> = (0..4)
                .map(|t| (0..8).map(|d| f64::from(q[h * 8 + d] * k[t * 8 + d])).sum::<f64>() / 8f64.sqrt())
                .collect();
            let sum: f64 = dots.iter().map(|d| d.exp()).sum();
            for d in 0..8 {
                let slow: f64 = (0..4).map(|t| dots[t].exp() / sum * f64::from(v[t * 8 + d])).sum();
                assert!((slow - f64::from(out[h * 8 + d])).abs() < 1e-5);
            }
        }
    }

    /// Not a test: prints the speed. `cargo test --release -p decode-engine kernel -- --ignored --nocapture`
    #[test]
    #[ignore = "prints figures"]
    fn speed() -> anyhow::Result<()> {
        // One thread does all the work, and its time is measured.
        rayon::ThreadPoolBuilder::new().num_threads(1).build()?.install(figures)
    }

    fn figures() -> anyhow::Result<()> {
        let (n, k) = (1536, 576);
        let t = Tensor::from_vec(noise(n * k, 1), (n, k), &Device::Cpu)?;
        for kind in [GgmlDType::F32, GgmlDType::Q4_1] {
            let l = Linear::from_gguf(&QTensor::quantize(&t, kind)?)?;
            for rows in [1, 2, 4, 8, 64, 256] {
                // Other threads may use the processor too.
                let now = || rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
                let (x, started, times) = (noise(rows * k, 2), now(), 2000 / rows + 1);
                (0..times).for_each(|_| drop(std::hint::black_box(l.forward(&x))));
                let (a, b) = (started, now());
                let each = ((b.tv_sec - a.tv_sec) as f64 + (b.tv_nsec - a.tv_nsec) as f64 / 1e9) / times as f64;
                println!("{kind:?} {rows} rows: {:.1} GMAC/s", (n * k * rows) as f64 / each / 1e9);
            }
        }
        Ok(())
    }
}
