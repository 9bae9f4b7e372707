//! The local blocks that a pull may still write. A block stays here from the pull's start until its end, and indefinitely if
//! a lane wedged. No other pull gets it meanwhile, so a late write cannot hit a good block (promise 4).

use crate::{Block, GroupId, PoolLayout, PullError};

/// The local blocks that pulls hold.
#[derive(Debug, Default)]
pub struct Quarantine {
    /// By group, ascending: for each block the pull that holds it, or 0. Pull ids start at 1.
    held: Vec<(GroupId, Vec<u64>)>,
    count: usize,
}

impl Quarantine {
    /// An empty quarantine for this pool.
    pub fn new(layout: &PoolLayout) -> Self {
        let held = layout.groups.iter().map(|g| (g.id, vec![0; g.blocks as usize])).collect();
        Self { held, count: 0 }
    }

    /// The holder of a block; `None` for a block outside the pool.
    fn holder(&mut self, b: Block) -> Option<&mut u64> {
        let i = self.held.binary_search_by_key(&b.group, |(g, _)| *g).ok()?;
        self.held[i].1.get_mut(b.id.0 as usize)
    }

    /// Takes all of `blocks` for a pull, or none of them. Ignores a block outside the pool; the plan refuses it.
    ///
    /// # Errors
    /// Another pull holds a block.
    pub fn take(&mut self, pull: u64, blocks: impl Iterator<Item = Block> + Clone) -> Result<(), PullError> {
        for b in blocks.clone() {
            if let Some(&mut holder) = self.holder(b)
                && holder != 0
            {
                return Err(PullError::BlockBusy { group: b.group.0, block: b.id.0, pull: holder });
            }
        }
        for b in blocks {
            if let Some(h) = self.holder(b) {
                let fresh = *h == 0;
                *h = pull;
                self.count += usize::from(fresh);
            }
        }
        Ok(())
    }

    /// Gives back those of `blocks` that a pull holds.
    pub fn give_back(&mut self, pull: u64, blocks: impl Iterator<Item = Block>) {
        for b in blocks {
            if let Some(h) = self.holder(b)
                && *h == pull
            {
                *h = 0;
                self.count -= 1;
            }
        }
    }

    /// Number of held blocks.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether no block is held.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BlockId;

    #[test]
    fn a_block_belongs_to_one_pull_at_a_time_and_a_refusal_takes_none() {
        let mut q = Quarantine::new(&PoolLayout::uniform(8, 1, 64, 16));
        let b = |id| Block { group: GroupId(0), id: BlockId(id) };
        assert!(q.take(1, [b(0), b(1)].into_iter()).is_ok());
        assert!(matches!(q.take(2, [b(2), b(1)].into_iter()), Err(PullError::BlockBusy { block: 1, pull: 1, .. })));
        assert_eq!(q.len(), 2, "block 2 was not taken");
        q.give_back(2, [b(0)].into_iter());
        assert_eq!(q.len(), 2, "only the holder gives back");
        q.give_back(1, [b(0), b(1)].into_iter());
        assert!(q.is_empty());
    }
}
