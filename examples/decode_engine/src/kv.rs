//! The paged KV cache: writes a token's keys and values to kvferry's pool, and reads them back.
//!
//! Owns the memory that prefill engines offer and decode engines pull into; knows nothing of requests. A block holds 16
//! tokens of every layer. In a layer it is `[KV head][K, V][token][head]` in 16-bit floats, so that a head is one run of
//! bytes. Attention always reads from the pool, even the tokens of the current step: a token sees the same bits whether its
//! past was computed here or pulled.

use std::io;

use half::{f16, slice::HalfFloatSliceExt as _};
use kvferry::{BlockId, Memory, PoolLayout, StartError};

/// Tokens in a block.
pub const BLOCK: usize = 16;

/// The cache of one engine.
#[derive(Debug, Clone)]
pub struct Kv {
    memory: Memory,
    layout: PoolLayout,
    heads: usize,
    head: usize,
}

impl Kv {
    /// A cache of `blocks` blocks for a model of `layers` layers with `heads` KV heads of `head` values each.
    pub fn new(blocks: u32, layers: usize, heads: usize, head: usize) -> Result<Self, StartError> {
        let bytes = heads * 2 * BLOCK * head * size_of::<f16>();
        let layout = PoolLayout::uniform(blocks, layers as u32, bytes as u64, BLOCK as u32);
        let memory = Memory::alloc(&layout.segments)?;
        memory.touch()?;
        Ok(Self { memory, layout, heads, head })
    }

    /// The pool, for a producer or a consumer.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The layout of the pool.
    pub fn layout(&self) -> &PoolLayout {
        &self.layout
    }

    /// The number of blocks.
    pub fn blocks(&self) -> u32 {
        self.layout.groups[0].blocks
    }

    /// Bytes per token over all layers.
    pub fn token_bytes(&self) -> u64 {
        self.layout.groups[0].block_bytes() / BLOCK as u64
    }

    fn offset(&self, layer: usize, block: BlockId) -> u64 {
        self.layout.groups[0].regions[layer].block_offset(block.0)
    }

    /// Stores one token's keys and values (`heads * head` values each) of one layer.
    pub fn write(&self, layer: usize, table: &[BlockId], position: usize, k: &[f32], v: &[f32]) -> io::Result<()> {
        let at = self.offset(layer, block_of(table, position)?);
        let run = self.head * size_of::<f16>();
        let mut short = vec![f16::ZERO; self.head];
        for (h, (k, v)) in k.chunks_exact(self.head).zip(v.chunks_exact(self.head)).enumerate() {
            for (part, values) in [k, v].into_iter().enumerate() {
                short.convert_from_f32_slice(values);
                let to = ((h * 2 + part) * BLOCK + position % BLOCK) * run;
                self.memory.write_from(0, at + to as u64, bytemuck::cast_slice(&short))?;
            }
        }
        Ok(())
    }

    /// Collects the keys and values of the first `tokens` tokens in one layer, each as `[KV head][token][head]`.
    pub fn gather(
        &self,
        layer: usize,
        table: &[BlockId],
        tokens: usize,
        k: &mut Vec<f32>,
        v: &mut Vec<f32>,
    ) -> io::Result<()> {
        let plane = tokens * self.head;
        k.resize(self.heads * plane, 0.0);
        v.resize(self.heads * plane, 0.0);
        let mut block = vec![f16::ZERO; self.heads * 2 * BLOCK * self.head];
        for first in (0..tokens).step_by(BLOCK) {
            let at = self.offset(layer, block_of(table, first)?);
            self.memory.read_into(0, at, bytemuck::cast_slice_mut(&mut block))?;
            let values = (tokens - first).min(BLOCK) * self.head;
            for (h, both) in block.chunks_exact(2 * BLOCK * self.head).enumerate() {
                let to = h * plane + first * self.head..h * plane + first * self.head + values;
                both[..values].convert_to_f32_slice(&mut k[to.clone()]);
                both[BLOCK * self.head..][..values].convert_to_f32_slice(&mut v[to]);
            }
        }
        Ok(())
    }
}

fn block_of(table: &[BlockId], position: usize) -> io::Result<BlockId> {
    let none = || io::Error::other(format!("token {position} has no block in a table of {}", table.len()));
    table.get(position / BLOCK).copied().ok_or_else(none)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_written_by_token_are_gathered_by_head() -> Result<(), Box<dyn std::error::Error>> {
        let kv = Kv::new(4, 2, 2, 8)?;
        let table = [BlockId(3), BlockId(1)];
        let value = |t: usize, h: usize, d: usize, part: usize| (t * 100 + h * 40 + d * 2 + part) as f32;
        for t in 0..20 {
            let row = |part| (0..16).map(|i| value(t, i / 8, i % 8, part)).collect::<Vec<_>>();
            kv.write(1, &table, t, &row(0), &row(1))?;
        }
        let (mut k, mut v) = (Vec::new(), Vec::new());
        kv.gather(1, &table, 20, &mut k, &mut v)?;
        for (t, h, d) in (0..20).flat_map(|t| (0..2).flat_map(move |h| (0..8).map(move |d| (t, h, d)))) {
            let at = (h * 20 + t) * 8 + d;
            assert_eq!((k[at], v[at]), (value(t, h, d, 0), value(t, h, d, 1)));
        }
        assert!(kv.gather(1, &table, 33, &mut k, &mut v).is_err(), "beyond the table");
        assert_eq!(kv.token_bytes(), 2 * 2 * 16 * 2);
        Ok(())
    }
}
