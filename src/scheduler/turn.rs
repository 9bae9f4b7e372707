//! The turns after a failed load: which requests may run and up to which token, which tokens a request adopts from others,
//! and which request each of the others waits for.
//!
//! A pure function of the current block tables and lengths. It remembers nothing between calls, so no state can be stale:
//! when the owner of a block finishes, is aborted or is preempted, it is no longer among the requests, and the next
//! request that holds the block becomes its owner. Two requests never compute the same block, and at least one of the
//! requests that need a shared block may run.

use std::{collections::HashMap, hash::Hash};

use kvferry_proto::Block;

use super::{
    sabotage::{self, Bug},
    table::{GroupSpec, Keeps, Layout, Request},
};

/// The turn of a request in the next step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn<R> {
    /// The request.
    pub id: R,
    /// Its computed length. It is longer than the held tokens if other requests have filled the next blocks. In that case
    /// call [`Held::adopt`](super::table::Held::adopt) and [`Ledger::adopted`](super::ledger::Ledger::adopted).
    pub computed: u64,
    /// The first token that it must not compute in this step, because another request computes or already has its block.
    /// `None`: no limit.
    pub limit: Option<u64>,
    /// The request that computes or loads the block at the limit. `None` with a limit: the block is present and will be
    /// adopted in the next step, or the request's own load is running.
    pub waits_for: Option<R>,
}

impl<R> Turn<R> {
    /// Whether the request may compute tokens in this step.
    pub fn may_run(&self) -> bool {
        self.limit.is_none_or(|l| l > self.computed)
    }
}

/// The owner of a missing block that several requests share, and its heirs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shared<R> {
    /// The block.
    pub block: Block,
    /// The request that computes it again, or whose running load brings it.
    pub owner: R,
    /// The other requests that hold it and wait for it, in the order in which they inherit it.
    pub heirs: Vec<R>,
}

/// The turn of each request, in the given order. The order also decides the owner of a block: of the requests that hold
/// and need it, the one whose load brings it, else the one that has begun it, else the first one.
///
/// Call it before scheduling while a request lacks blocks that it shares: after a failed load, or while requests share a
/// running load. Pass every request that may hold such a block. Passing all requests is always correct, and costs one
/// lookup for each block after the shortest request's length.
pub fn turns<R: Clone + Hash>(groups: &[GroupSpec], requests: &[Request<'_, R>]) -> Vec<Turn<R>> {
    let reach = requests.iter().map(|r| Some(Reach::now(r))).collect();
    let owners = Owners::new(Layout::new(groups), requests, reach);
    (0..requests.len()).filter_map(|i| owners.turn(i)).collect()
}

/// The progress of a request.
#[derive(Clone, Copy)]
pub(super) struct Reach {
    /// Tokens whose KV is present.
    pub real: u64,
    /// Tokens whose KV will be present after its load; `real` without a load.
    pub promised: u64,
}

impl Reach {
    fn now<R>(r: &Request<'_, R>) -> Self {
        Self { real: r.real(), promised: if r.loading { r.held.loaded_end() } else { r.real() } }
    }
}

/// A request that holds a block, and the tokens of the block in it.
#[derive(Clone, Copy)]
struct Holder {
    request: usize,
    start: u64,
    end: u64,
}

/// The state of a block.
struct State {
    /// A request has its KV.
    present: bool,
    /// The request that computes or loads it.
    owner: Option<usize>,
    holders: Vec<Holder>,
}

/// The blocks that a request may lack, and their owners.
pub(super) struct Owners<'a, 'b, R> {
    layout: Layout<'a>,
    requests: &'a [Request<'b, R>],
    /// The progress of each request, with adopted tokens; `None` for a failed one.
    reach: Vec<Option<Reach>>,
    /// The blocks that end after the length of the shortest request. All others are present.
    blocks: HashMap<Block, State>,
}

impl<'a, 'b, R: Clone + Hash> Owners<'a, 'b, R> {
    /// `reach` is the progress of each request; `None` for a failed one, which holds no blocks any more.
    pub(super) fn new(layout: Layout<'a>, requests: &'a [Request<'b, R>], reach: Vec<Option<Reach>>) -> Self {
        let mut it = Self { layout, requests, reach, blocks: HashMap::new() };
        let shortest = it.reach.iter().flatten().map(|s| s.real).min().unwrap_or(0);
        for (request, (r, reach)) in requests.iter().zip(&it.reach).enumerate() {
            let Some(reach) = *reach else { continue };
            for (g, start, b) in layout.blocks(r, shortest) {
                let end = start.saturating_add(layout.groups[g].tokens());
                let state = it.blocks.entry(b).or_insert(State { present: false, owner: None, holders: Vec::new() });
                state.present |= reach.real >= end;
                state.holders.push(Holder { request, start, end });
            }
        }
        let adopted: Vec<_> =
            it.reach.iter().zip(requests).map(|(reach, r)| Some(it.adopt(r, (*reach)?.real))).collect();
        for (reach, adopted) in it.reach.iter_mut().zip(adopted) {
            if let (Some(reach), Some(adopted)) = (reach, adopted) {
                reach.real = adopted;
            }
        }
        let owners: Vec<_> = it.blocks.iter().map(|(b, state)| (*b, it.owner(state))).collect();
        for (b, owner) in owners {
            if let Some(state) = it.blocks.get_mut(&b) {
                state.owner = owner;
            }
        }
        it
    }

    /// The progress of a request that holds the block and lacks its KV.
    fn lacking(&self, h: &Holder) -> Option<Reach> {
        self.reach[h.request].filter(|r| r.real < h.end)
    }

    fn owner(&self, state: &State) -> Option<usize> {
        let lacking = || state.holders.iter().filter_map(|h| Some((h, self.lacking(h)?)));
        let loader = lacking().find(|(h, r)| self.requests[h.request].loading && h.start < r.promised);
        // A request that has begun a unit continues with it. If each block were decided separately, two requests could
        // wait for each other's part, since groups have blocks of different sizes.
        let begun = lacking().find(|(h, r)| {
            let first = h.start - h.start % self.layout.unit;
            r.real > first && r.real < first.saturating_add(self.layout.unit)
        });
        let loader = loader.filter(|_| !sabotage::planted(Bug::LoaderOverruled));
        loader.or(begun).or_else(|| lacking().next()).map(|(h, _)| h.request)
    }

    fn present(&self, b: Block) -> bool {
        self.blocks.get(&b).is_none_or(|f| f.present)
    }

    /// Whether a request may compute a block; otherwise the error is its owner. A request that lacks another group's block
    /// at these tokens computes even a present block again, but two requests never do so at the same time.
    fn may_compute(&self, i: usize, b: Block) -> Result<(), usize> {
        let owner = self.blocks.get(&b).and_then(|f| f.owner).unwrap_or(i);
        let orphan = sabotage::disinherited(b, &self.requests[owner].id);
        if (owner == i && !orphan) || sabotage::planted(Bug::AllCompute) { Ok(()) } else { Err(owner) }
    }

    /// The turn of the request with this index; `None` for a failed one.
    pub(super) fn turn(&self, i: usize) -> Option<Turn<R>> {
        let (r, computed) = (self.requests.get(i)?, (*self.reach.get(i)?)?.real);
        let id = r.id.clone();
        if r.loading {
            return Some(Turn { id, computed, limit: Some(computed), waits_for: None });
        }
        let mut first: Option<(u64, Option<usize>)> = None;
        for (_, start, b) in self.layout.blocks(r, computed) {
            let stop = match self.may_compute(i, b) {
                Err(owner) => (start.max(computed), Some(owner)),
                // It may be able to adopt this block in the next step.
                Ok(()) if self.present(b) && start > computed && start.is_multiple_of(self.layout.unit) => {
                    (start, None)
                }
                Ok(()) => continue,
            };
            // At the same token, an owner to wait for takes precedence over a present block.
            if first.is_none_or(|(at, owner)| stop.0 < at || (stop.0 == at && owner.is_none())) {
                first = Some(stop);
            }
        }
        let waits_for = first.and_then(|(_, o)| Some(self.requests.get(o?)?.id.clone()));
        Some(Turn { id, computed, limit: first.map(|(at, _)| at), waits_for })
    }

    /// The length up to which other requests have filled the blocks after `real`.
    fn adopt(&self, r: &Request<'_, R>, real: u64) -> u64 {
        let mut bound = u64::MAX;
        for (spec, table) in self.layout.groups.iter().zip(r.blocks) {
            let skip = usize::try_from(real / spec.tokens()).unwrap_or(usize::MAX);
            // A missing block of any group ends it: a prefix cache assumes that all blocks before the length are filled.
            let stop = table.iter().enumerate().skip(skip).find(|(_, id)| match **id {
                Some(id) => !self.present(Block { group: spec.id, id }),
                None => spec.keeps == Keeps::All,
            });
            let stop = stop.map_or(table.len(), |(p, _)| p) as u64;
            bound = bound.min(stop.saturating_mul(spec.tokens()));
        }
        if r.loading || bound <= real || self.layout.groups.is_empty() {
            return real;
        }
        self.layout.resume(r.blocks, bound, |_, _, b| self.present(b)).max(real)
    }

    /// Missing blocks that more than one request needs, in a stable order.
    pub(super) fn shared(&self) -> Vec<Shared<R>> {
        let mut out: Vec<(u64, Shared<R>)> = Vec::new();
        for (&block, state) in self.blocks.iter().filter(|(_, f)| !f.present) {
            let Some(owner) = state.owner else { continue };
            let id = |i: usize| self.requests[i].id.clone();
            let heirs = state.holders.iter().filter(|h| h.request != owner && self.lacking(h).is_some());
            let heirs: Vec<R> = heirs.map(|h| id(h.request)).collect();
            if !heirs.is_empty() {
                out.push((state.holders[0].start, Shared { block, owner: id(owner), heirs }));
            }
        }
        out.sort_by_key(|(start, s)| (*start, s.block));
        out.into_iter().map(|(_, s)| s).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::table::Held;
    use kvferry_proto::{BlockId, GroupId};

    type Tables = Vec<Vec<Option<BlockId>>>;

    fn tables(ids: &[u32]) -> Tables {
        vec![ids.iter().map(|&b| Some(BlockId(b))).collect()]
    }

    fn groups() -> [GroupSpec; 1] {
        [GroupSpec::full(GroupId(0), 4).unwrap()]
    }

    fn at<'a>(id: &'a str, blocks: &'a Tables, tokens: u64) -> Request<'a, &'a str> {
        let held = Held { cached: tokens, loaded: 0, computed: 0 };
        Request { id, blocks, held, loading: false, scheduled: 0 }
    }

    fn turns_of<'a>(requests: &[Request<'a, &'a str>]) -> Vec<(&'a str, u64, Option<u64>, Option<&'a str>)> {
        turns(&groups(), requests).into_iter().map(|t| (t.id, t.computed, t.limit, t.waits_for)).collect()
    }

    #[test]
    fn a_shared_block_is_computed_by_the_first_request_and_adopted_by_the_others() {
        let (a, b) = (tables(&[1, 2, 3]), tables(&[1, 2, 4]));
        assert_eq!(turns_of(&[at("a", &a, 4), at("b", &b, 4)]), [("a", 4, None, None), ("b", 4, Some(4), Some("a"))]);
        // A partly filled block does not count.
        assert_eq!(turns_of(&[at("a", &a, 7), at("b", &b, 4)])[1], ("b", 4, Some(4), Some("a")));
        assert_eq!(turns_of(&[at("a", &a, 9), at("b", &b, 4)])[1], ("b", 8, None, None));
    }

    #[test]
    fn a_request_that_has_begun_a_block_continues_with_it_in_any_order() {
        let (a, b) = (tables(&[1, 2]), tables(&[1, 2]));
        assert_eq!(turns_of(&[at("b", &b, 4), at("a", &a, 6)]), [("b", 4, Some(4), Some("a")), ("a", 6, None, None)]);
    }

    #[test]
    fn the_next_request_inherits_a_block_when_its_owner_is_removed() {
        let (a, b, c) = (tables(&[1, 2, 3]), tables(&[1, 2, 4]), tables(&[1, 2, 5]));
        let requests = [at("a", &a, 4), at("b", &b, 4), at("c", &c, 4)];
        assert_eq!(turns_of(&requests)[1..], [("b", 4, Some(4), Some("a")), ("c", 4, Some(4), Some("a"))]);
        // a is aborted.
        assert_eq!(turns_of(&requests[1..]), [("b", 4, None, None), ("c", 4, Some(4), Some("b"))]);
        assert_eq!(turns_of(&requests[2..]), [("c", 4, None, None)]);
    }

    #[test]
    fn no_request_computes_a_block_that_a_load_is_writing() {
        let (a, b) = (tables(&[1, 2, 3]), tables(&[1, 2, 4]));
        let held = Held { cached: 0, loaded: 8, computed: 0 };
        let load = Request { id: "a", blocks: &a, held, loading: true, scheduled: 0 };
        assert_eq!(turns_of(&[at("b", &b, 0), load]), [("b", 0, Some(0), Some("a")), ("a", 0, Some(0), None)]);
        assert_eq!(turns_of(&[at("b", &b, 0), Request { loading: false, ..load }])[0], ("b", 8, None, None));
    }

    #[test]
    fn a_present_block_is_not_computed_again() {
        // b's first block is its own. Its second block is shared with a, which has it.
        let (a, b) = (tables(&[1, 2, 3]), tables(&[7, 2, 4]));
        assert_eq!(turns_of(&[at("a", &a, 12), at("b", &b, 0)])[1], ("b", 0, Some(4), None));
        assert_eq!(turns_of(&[at("a", &a, 12), at("b", &b, 4)])[1], ("b", 8, None, None));
    }
}
