//! A request as the scheduler sees it: its block tables, and the tokens held in them by source.
//!
//! Owns nothing: these are views of the engine's own tables for one call. Tokens are counted in disjoint, unsigned,
//! consecutive parts ([`Held`]), so a length always fits its parts.

use std::num::NonZeroU32;

use kvferry_proto::{Block, BlockId, GroupId};

/// The past tokens that the layers of a group need. They determine from which lengths a request can continue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Keeps {
    /// Full attention: all blocks from the start of the prompt.
    All,
    /// Sliding window attention: this many last tokens, with the current one. Blocks before them may be null.
    Window(u64),
    /// Recurrent state: a block holds the state at its end. A request can continue only from a kept state, or from 0.
    State,
}

/// A group of layers that share a block table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GroupSpec {
    /// The number of the group.
    pub id: GroupId,
    /// Tokens per block.
    pub block_tokens: NonZeroU32,
    /// The past tokens that it needs.
    pub keeps: Keeps,
}

impl GroupSpec {
    /// A group of full attention layers. `None` if a block holds no tokens.
    pub fn full(id: GroupId, block_tokens: u32) -> Option<Self> {
        Self::new(id, block_tokens, Keeps::All)
    }

    /// A group. `None` if a block holds no tokens.
    pub fn new(id: GroupId, block_tokens: u32, keeps: Keeps) -> Option<Self> {
        Some(Self { id, block_tokens: NonZeroU32::new(block_tokens)?, keeps })
    }

    pub(super) fn tokens(&self) -> u64 {
        u64::from(self.block_tokens.get())
    }
}

/// The tokens whose KV a request counts on, from its start, in three consecutive parts: first `cached`, then `loaded`,
/// then `computed`. Each is a number of tokens. A new request holds [`Held::default`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Held {
    /// Found in the local prefix cache, or adopted together with all tokens before them (see [`Held::adopt`]).
    pub cached: u64,
    /// Brought by a load, which has ended, runs in this step, or is asynchronous and still running.
    pub loaded: u64,
    /// Computed by the request itself.
    pub computed: u64,
}

impl Held {
    /// All held tokens: the computed length of the request.
    pub fn total(&self) -> u64 {
        self.loaded_end().saturating_add(self.computed)
    }

    /// The end of the loaded part, where the computed part begins.
    pub fn loaded_end(&self) -> u64 {
        self.cached.saturating_add(self.loaded)
    }

    /// Adopts the tokens up to `to`, which other requests have filled (see [`Turn::computed`](super::turn::Turn::computed)).
    /// All of them count as `cached` from then on, because it is unknown which of them the request computed itself.
    pub fn adopt(&mut self, to: u64) {
        if to > self.total() {
            *self = Held { cached: to, loaded: 0, computed: 0 };
        }
    }

    /// Keeps the first `to` tokens, and returns the tokens that were cut off by part.
    pub fn cut(&mut self, to: u64) -> Held {
        let before = *self;
        self.cached = before.cached.min(to);
        self.loaded = before.loaded.min(to - self.cached);
        self.computed = before.computed.min(to - self.cached - self.loaded);
        Held {
            cached: before.cached - self.cached,
            loaded: before.loaded - self.loaded,
            computed: before.computed - self.computed,
        }
    }
}

/// A request that holds blocks. Preempted requests hold none, and are left out.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a, R> {
    /// The engine's name for it.
    pub id: R,
    /// One block table for each group, in the order of the groups: block ids by position, `None` for a null block. A table
    /// may be longer than the held tokens.
    pub blocks: &'a [Vec<Option<BlockId>>],
    /// The tokens that it counts on, without those of the reported step.
    pub held: Held,
    /// Whether the load that brings `held.loaded` is still running (an asynchronous load). Until its end the request cannot
    /// run, and other requests cannot count on these tokens.
    pub loading: bool,
    /// Tokens that the step computed on top of `held`. [`turns`](super::turn::turns) ignores them.
    pub scheduled: u64,
}

impl<R> Request<'_, R> {
    /// Tokens whose KV is in the blocks, without those that a running load brings.
    pub(super) fn real(&self) -> u64 {
        if self.loading { self.held.cached } else { self.held.total() }
    }

    /// Tokens that were counted on or written by the end of the step.
    pub(super) fn ran_to(&self) -> u64 {
        if self.loading { self.held.loaded_end() } else { self.held.total().saturating_add(self.scheduled) }
    }
}

/// All groups together.
#[derive(Clone, Copy)]
pub(super) struct Layout<'a> {
    pub groups: &'a [GroupSpec],
    /// The smallest number of tokens that fills whole blocks of every group. A request is cut at a multiple of it.
    pub unit: u64,
}

impl<'a> Layout<'a> {
    pub(super) fn new(groups: &'a [GroupSpec]) -> Self {
        // With block sizes that have no common multiple below 2^64, a request can be cut only at 0.
        let unit = groups.iter().try_fold(1, |unit, g| lcm(unit, g.tokens())).unwrap_or(u64::MAX);
        Self { groups, unit }
    }

    /// Whether a load counts only as a whole.
    pub(super) fn whole_loads(&self) -> bool {
        self.groups.len() > 1 || self.groups.iter().any(|g| g.keeps == Keeps::State)
    }

    /// Every block of a request from the one with token `from` on: group index, first token, block.
    pub(super) fn blocks<'b, R>(
        self,
        r: &Request<'b, R>,
        from: u64,
    ) -> impl Iterator<Item = (usize, u64, Block)> + use<'a, 'b, R> {
        let blocks = r.blocks;
        self.groups.iter().zip(blocks).enumerate().flat_map(move |(g, (spec, table))| {
            let skip = usize::try_from(from / spec.tokens()).unwrap_or(usize::MAX);
            table.iter().enumerate().skip(skip).filter_map(move |(p, b)| {
                Some((g, (p as u64).saturating_mul(spec.tokens()), Block { group: spec.id, id: (*b)? }))
            })
        })
    }

    /// The longest length up to `bound` from which a request can continue: whole blocks in every group, with the past
    /// tokens that each group needs. `good` tells whether a block (of this group, with this first token) is valid.
    pub(super) fn resume(
        &self,
        tables: &[Vec<Option<BlockId>>],
        bound: u64,
        good: impl Fn(usize, u64, Block) -> bool,
    ) -> u64 {
        let at = |g: usize, p: u64| {
            let spec = &self.groups[g];
            let id = usize::try_from(p).ok().and_then(|p| tables.get(g)?.get(p).copied().flatten());
            id.is_some_and(|id| good(g, p.saturating_mul(spec.tokens()), Block { group: spec.id, id }))
        };
        let mut bound = bound;
        for (g, spec) in self.groups.iter().enumerate().filter(|(_, s)| !matches!(s.keeps, Keeps::Window(0 | 1))) {
            // Tokens without a block cannot be resumed from. Without this bound the search below could take 2^64 steps.
            let present = tables.get(g).map_or(0, |t| t.len() as u64);
            bound = bound.min(present.saturating_mul(spec.tokens()));
        }
        for (g, spec) in self.groups.iter().enumerate().filter(|(_, s)| s.keeps == Keeps::All) {
            let blocks = bound / spec.tokens();
            if let Some(p) = (0..blocks).find(|&p| !at(g, p)) {
                bound = p * spec.tokens();
            }
        }
        let mut to = bound - bound % self.unit;
        let fits = |to: u64| {
            self.groups.iter().enumerate().all(|(g, spec)| match spec.keeps {
                Keeps::All => true,
                Keeps::Window(w) => {
                    let first = to.saturating_sub(w.saturating_sub(1)) / spec.tokens();
                    (first..to / spec.tokens()).all(|p| at(g, p))
                }
                Keeps::State => at(g, to / spec.tokens() - 1),
            })
        };
        while to > 0 && !fits(to) {
            to -= self.unit;
        }
        to
    }
}

fn lcm(a: u64, b: u64) -> Option<u64> {
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    (a / x).checked_mul(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(v: &[i64]) -> Vec<Option<BlockId>> {
        v.iter().map(|&b| u32::try_from(b).ok().map(BlockId)).collect()
    }

    #[test]
    fn kept_and_cut_tokens_add_up() {
        let before = Held { cached: 5, loaded: 7, computed: 3 };
        for to in 0..20 {
            let mut kept = before;
            let cut = kept.cut(to);
            assert_eq!(kept.total(), to.min(15));
            assert_eq!(
                [cut.cached + kept.cached, cut.loaded + kept.loaded, cut.computed + kept.computed],
                [5, 7, 3],
                "cut at {to}"
            );
            assert!(kept.loaded == 0 || kept.cached == 5, "the parts stay consecutive");
            assert_eq!(kept.cut(to), Held::default(), "cutting twice cuts nothing");
        }
    }

    #[test]
    fn a_window_continues_only_from_its_blocks() {
        let spec = |id, tokens, keeps| GroupSpec::new(GroupId(id), tokens, keeps).unwrap();
        let groups = [spec(0, 4, Keeps::All), spec(1, 4, Keeps::Window(6))];
        let layout = Layout::new(&groups);
        // The window has no blocks for tokens 0..8. Length 16 needs tokens 11..16, length 12 needs tokens 7..12.
        let tables = [table(&[1, 2, 3, 4]), table(&[-1, -1, 7, 8])];
        assert_eq!(layout.resume(&tables, 16, |_, _, _| true), 16);
        assert_eq!(layout.resume(&tables, 15, |_, _, _| true), 0);
    }

    #[test]
    fn a_state_continues_only_from_a_kept_one() {
        let groups = [GroupSpec::new(GroupId(0), 4, Keeps::State).unwrap()];
        let layout = Layout::new(&groups);
        let tables = [table(&[-1, 5, -1, 6])];
        assert_eq!(layout.resume(&tables, 16, |_, _, _| true), 16);
        assert_eq!(layout.resume(&tables, 15, |_, _, _| true), 8);
        assert_eq!(layout.resume(&tables, 7, |_, _, _| true), 0);
    }

    #[test]
    fn requests_are_cut_at_whole_blocks_of_all_groups() {
        let spec = |id, tokens| GroupSpec::full(GroupId(id), tokens).unwrap();
        let groups = [spec(0, 4), spec(1, 6)];
        let layout = Layout::new(&groups);
        assert_eq!(layout.unit, 12);
        let tables = [table(&[1, 2, 3, 4, 5, 6]), table(&[1, 2, 3, 4])];
        assert_eq!(layout.resume(&tables, 23, |_, _, _| true), 12);
        let huge = [u32::MAX, u32::MAX - 1, u32::MAX - 2, u32::MAX - 4].map(|n| spec(0, n));
        assert_eq!(Layout::new(&huge).unit, u64::MAX);
    }
}
