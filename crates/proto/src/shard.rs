//! The part of a model that a rank holds. [`crate::plan`] handles differences between two ranks.

use serde::{Deserialize, Serialize};

/// One rank's part of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// Tensor-parallel rank, below `tp_size`.
    pub tp_rank: u32,
    /// Tensor-parallel ranks.
    pub tp_size: u32,
    /// Pipeline-parallel rank, below `pp_size`.
    pub pp_rank: u32,
    /// Pipeline-parallel ranks.
    pub pp_size: u32,
    /// First KV head that this rank holds.
    pub first_head: u32,
    /// KV heads that this rank holds.
    pub heads: u32,
    /// First layer that this rank holds.
    pub first_layer: u32,
    /// Layers that this rank holds.
    pub layers: u32,
}

impl Shard {
    /// The whole model on one rank.
    pub fn whole(heads: u32, layers: u32) -> Self {
        Self { tp_rank: 0, tp_size: 1, pp_rank: 0, pp_size: 1, first_head: 0, heads, first_layer: 0, layers }
    }

    /// The KV heads that both ranks hold, as `(first, count)`; `None` if they share none.
    pub fn common_heads(&self, other: &Shard) -> Option<(u32, u32)> {
        let first = self.first_head.max(other.first_head);
        let end = self.first_head.saturating_add(self.heads).min(other.first_head.saturating_add(other.heads));
        (first < end).then(|| (first, end - first))
    }

    /// Checks that the numbers are consistent.
    ///
    /// # Errors
    /// The first inconsistency, as text.
    pub fn check(&self) -> Result<(), &'static str> {
        if self.tp_size == 0 || self.pp_size == 0 || self.tp_rank >= self.tp_size || self.pp_rank >= self.pp_size {
            return Err("shard: a rank must be below its size, and sizes at least 1");
        }
        if self.heads == 0 || self.layers == 0 {
            return Err("shard: heads and layers must be at least 1");
        }
        if self.first_head.checked_add(self.heads).is_none() || self.first_layer.checked_add(self.layers).is_none() {
            return Err("shard: head or layer range overflows");
        }
        Ok(())
    }
}
