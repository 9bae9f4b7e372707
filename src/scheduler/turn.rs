//! Whose turn it is after a load failed: who may run and up to where, who takes over what another computed, and who
//! waits for whom.
//!
//! A pure function of the block tables and lengths as they are now. Nothing is remembered between calls, so nothing can
//! be stale: when an owner finishes, is aborted or is preempted, it is not among the requests any more, and the next
//! one that holds the block is its owner. It never lets two requests compute one block, and among the requests that
//! wait there is always one that may run.

use std::{collections::HashMap, hash::Hash};

use kvferry_proto::block::Block;

use super::{
    sabotage::{self, Bug},
    table::{GroupSpec, Keeps, Layout, Request},
};

/// What a request may do in the next step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn<R> {
    /// The request.
    pub id: R,
    /// Its computed length: longer than what it held where sharers have filled the blocks that follow. Then tell it to
    /// [`Held::adopt`](super::table::Held::adopt) and [`Ledger::adopted`](super::ledger::Ledger::adopted).
    pub computed: u64,
    /// The first token that it must not compute in this step: from there on, another request computes the block or has
    /// it already. `None`: no limit.
    pub limit: Option<u64>,
    /// Who computes or loads the block at the limit. `None` with a limit: the block is there already and will be taken
    /// over in the next step, or the request's own load is under way.
    pub waits_for: Option<R>,
}

impl<R> Turn<R> {
    /// Whether it may compute anything in this step.
    pub fn may_run(&self) -> bool {
        self.limit.is_none_or(|l| l > self.computed)
    }
}

/// Who computes a block that several requests share, and who is next should that request go away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shared<R> {
    /// The block.
    pub block: Block,
    /// The request that computes it again (or whose load under way brings it).
    pub owner: R,
    /// The others that hold it and wait for it, in the order in which they inherit.
    pub heirs: Vec<R>,
}

/// Whose turn it is, for each request, in the order given. That order is also the one in which blocks find their owner:
/// of the requests that hold a block and need it, the one whose load brings it, else the one that has begun it, else the
/// first.
///
/// Call it before scheduling for as long as a request is short of blocks that it shares: after a load failed, or when
/// requests share a load under way. Pass every request that may hold such a block; passing all is always right, and costs
/// one look at each block past the shortest of them.
pub fn turns<R: Clone + Hash>(groups: &[GroupSpec], requests: &[Request<'_, R>]) -> Vec<Turn<R>> {
    let reach = requests.iter().map(|r| Some(Reach::now(r))).collect();
    let owners = Owners::new(Layout::new(groups), requests, reach);
    (0..requests.len()).filter_map(|i| owners.turn(i)).collect()
}

/// How far a request is.
#[derive(Clone, Copy)]
pub(super) struct Reach {
    /// Tokens whose KV is there.
    pub real: u64,
    /// Tokens that will be there when its load ends; `real` without one.
    pub promised: u64,
}

impl Reach {
    fn now<R>(r: &Request<'_, R>) -> Self {
        Self { real: r.real(), promised: if r.loading { r.held.loaded_end() } else { r.real() } }
    }
}

/// A block, as one of its holders sees it.
#[derive(Clone, Copy)]
struct Holder {
    request: usize,
    start: u64,
    end: u64,
}

/// What becomes of a block.
struct Fate {
    /// Somebody has it.
    there: bool,
    /// Who computes or loads it, of those that are not past it.
    owner: Option<usize>,
    holders: Vec<Holder>,
}

/// Who has or will have each block, as far as it matters.
pub(super) struct Owners<'a, 'b, R> {
    layout: Layout<'a>,
    requests: &'a [Request<'b, R>],
    /// How far each request is, with what it takes over; `None` for one that is out.
    reach: Vec<Option<Reach>>,
    /// The blocks that end behind the shortest request's length. All others are there.
    blocks: HashMap<Block, Fate>,
}

impl<'a, 'b, R: Clone + Hash> Owners<'a, 'b, R> {
    /// `reach` says how far each request is; `None` for one that is about to be failed, and holds nothing any more.
    pub(super) fn new(layout: Layout<'a>, requests: &'a [Request<'b, R>], reach: Vec<Option<Reach>>) -> Self {
        let mut it = Self { layout, requests, reach, blocks: HashMap::new() };
        let shortest = it.reach.iter().flatten().map(|s| s.real).min().unwrap_or(0);
        for (request, (r, reach)) in requests.iter().zip(&it.reach).enumerate() {
            let Some(reach) = *reach else { continue };
            for (g, start, b) in layout.blocks(r, shortest) {
                let end = start.saturating_add(layout.groups[g].tokens());
                let fate = it.blocks.entry(b).or_insert(Fate { there: false, owner: None, holders: Vec::new() });
                fate.there |= reach.real >= end;
                fate.holders.push(Holder { request, start, end });
            }
        }
        let adopted: Vec<_> =
            it.reach.iter().zip(requests).map(|(reach, r)| Some(it.adopt(r, (*reach)?.real))).collect();
        for (reach, adopted) in it.reach.iter_mut().zip(adopted) {
            if let (Some(reach), Some(adopted)) = (reach, adopted) {
                reach.real = adopted;
            }
        }
        let owners: Vec<_> = it.blocks.iter().map(|(b, fate)| (*b, it.owner(fate))).collect();
        for (b, owner) in owners {
            if let Some(fate) = it.blocks.get_mut(&b) {
                fate.owner = owner;
            }
        }
        it
    }

    /// How far a request is that holds the block and is not past it.
    fn short(&self, h: &Holder) -> Option<Reach> {
        self.reach[h.request].filter(|r| r.real < h.end)
    }

    fn owner(&self, fate: &Fate) -> Option<usize> {
        let short = || fate.holders.iter().filter_map(|h| Some((h, self.short(h)?)));
        let loader = short().find(|(h, r)| self.requests[h.request].loading && h.start < r.promised);
        // Whoever has begun a unit goes on with it: were it judged block by block, two requests could each wait for the
        // other's half where groups have blocks of different sizes.
        let begun = short().find(|(h, r)| {
            let first = h.start - h.start % self.layout.unit;
            r.real > first && r.real < first.saturating_add(self.layout.unit)
        });
        let loader = loader.filter(|_| !sabotage::planted(Bug::LoaderOverruled));
        loader.or(begun).or_else(|| short().next()).map(|(h, _)| h.request)
    }

    fn there(&self, b: Block) -> bool {
        self.blocks.get(&b).is_none_or(|f| f.there)
    }

    /// Whether a request may compute a block; else who does. A block that is there is computed once more all the same by
    /// a request that lacks another group's block at these tokens: by one after the other, not by two at a time.
    fn mine(&self, i: usize, b: Block) -> Result<(), usize> {
        let owner = self.blocks.get(&b).and_then(|f| f.owner).unwrap_or(i);
        let orphan = sabotage::disinherited(b, &self.requests[owner].id);
        if (owner == i && !orphan) || sabotage::planted(Bug::EveryoneComputes) { Ok(()) } else { Err(owner) }
    }

    /// The turn of a request by its index; `None` for one that is out.
    pub(super) fn turn(&self, i: usize) -> Option<Turn<R>> {
        let (r, computed) = (self.requests.get(i)?, (*self.reach.get(i)?)?.real);
        let id = r.id.clone();
        if r.loading {
            return Some(Turn { id, computed, limit: Some(computed), waits_for: None });
        }
        let mut first: Option<(u64, Option<usize>)> = None;
        for (_, start, b) in self.layout.blocks(r, computed) {
            let stop = match self.mine(i, b) {
                Err(owner) => (start.max(computed), Some(owner)),
                // It may be able to take over from here in the next step.
                Ok(()) if self.there(b) && start > computed && start.is_multiple_of(self.layout.unit) => (start, None),
                Ok(()) => continue,
            };
            // At one token, somebody to wait for comes before a block that is there.
            if first.is_none_or(|(at, who)| stop.0 < at || (stop.0 == at && who.is_none())) {
                first = Some(stop);
            }
        }
        let waits_for = first.and_then(|(_, o)| Some(self.requests.get(o?)?.id.clone()));
        Some(Turn { id, computed, limit: first.map(|(at, _)| at), waits_for })
    }

    /// How far the blocks that follow `real` are filled by others.
    fn adopt(&self, r: &Request<'_, R>, real: u64) -> u64 {
        let mut bound = u64::MAX;
        for (spec, table) in self.layout.groups.iter().zip(r.blocks) {
            let skip = usize::try_from(real / spec.tokens()).unwrap_or(usize::MAX);
            // A block that is not there ends it, in every group: a prefix cache takes all before the length for filled.
            let stop = table.iter().enumerate().skip(skip).find(|(_, id)| match **id {
                Some(id) => !self.there(Block { group: spec.id, id }),
                None => spec.keeps == Keeps::All,
            });
            let stop = stop.map_or(table.len(), |(p, _)| p) as u64;
            bound = bound.min(stop.saturating_mul(spec.tokens()));
        }
        if r.loading || bound <= real || self.layout.groups.is_empty() {
            return real;
        }
        self.layout.resume(r.blocks, bound, |_, _, b| self.there(b)).max(real)
    }

    /// Blocks that more than one request needs and nobody has, in a stable order.
    pub(super) fn shared(&self) -> Vec<Shared<R>> {
        let mut out: Vec<(u64, Shared<R>)> = Vec::new();
        for (&block, fate) in self.blocks.iter().filter(|(_, f)| !f.there) {
            let Some(owner) = fate.owner else { continue };
            let id = |i: usize| self.requests[i].id.clone();
            let heirs = fate.holders.iter().filter(|h| h.request != owner && self.short(h).is_some());
            let heirs: Vec<R> = heirs.map(|h| id(h.request)).collect();
            if !heirs.is_empty() {
                out.push((fate.holders[0].start, Shared { block, owner: id(owner), heirs }));
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
    use kvferry_proto::block::{BlockId, GroupId};

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

    fn ask<'a>(requests: &[Request<'a, &'a str>]) -> Vec<(&'a str, u64, Option<u64>, Option<&'a str>)> {
        turns(&groups(), requests).into_iter().map(|t| (t.id, t.computed, t.limit, t.waits_for)).collect()
    }

    #[test]
    fn a_shared_block_is_computed_by_the_first_and_taken_over_by_the_others() {
        let (a, b) = (tables(&[1, 2, 3]), tables(&[1, 2, 4]));
        assert_eq!(ask(&[at("a", &a, 4), at("b", &b, 4)]), [("a", 4, None, None), ("b", 4, Some(4), Some("a"))]);
        // Half a block is none.
        assert_eq!(ask(&[at("a", &a, 7), at("b", &b, 4)])[1], ("b", 4, Some(4), Some("a")));
        assert_eq!(ask(&[at("a", &a, 9), at("b", &b, 4)])[1], ("b", 8, None, None));
    }

    #[test]
    fn whoever_has_begun_a_block_goes_on_with_it_whatever_the_order() {
        let (a, b) = (tables(&[1, 2]), tables(&[1, 2]));
        assert_eq!(ask(&[at("b", &b, 4), at("a", &a, 6)]), [("b", 4, Some(4), Some("a")), ("a", 6, None, None)]);
    }

    #[test]
    fn when_the_owner_goes_away_the_next_one_inherits() {
        let (a, b, c) = (tables(&[1, 2, 3]), tables(&[1, 2, 4]), tables(&[1, 2, 5]));
        let requests = [at("a", &a, 4), at("b", &b, 4), at("c", &c, 4)];
        assert_eq!(ask(&requests)[1..], [("b", 4, Some(4), Some("a")), ("c", 4, Some(4), Some("a"))]);
        // a is aborted.
        assert_eq!(ask(&requests[1..]), [("b", 4, None, None), ("c", 4, Some(4), Some("b"))]);
        assert_eq!(ask(&requests[2..]), [("c", 4, None, None)]);
    }

    #[test]
    fn nobody_computes_what_a_load_is_writing() {
        let (a, b) = (tables(&[1, 2, 3]), tables(&[1, 2, 4]));
        let held = Held { cached: 0, loaded: 8, computed: 0 };
        let load = Request { id: "a", blocks: &a, held, loading: true, scheduled: 0 };
        assert_eq!(ask(&[at("b", &b, 0), load]), [("b", 0, Some(0), Some("a")), ("a", 0, Some(0), None)]);
        assert_eq!(ask(&[at("b", &b, 0), Request { loading: false, ..load }])[0], ("b", 8, None, None));
    }

    #[test]
    fn a_block_that_somebody_has_is_not_computed_again() {
        // b's first block is its own; its second one is a's, who has it.
        let (a, b) = (tables(&[1, 2, 3]), tables(&[7, 2, 4]));
        assert_eq!(ask(&[at("a", &a, 12), at("b", &b, 0)])[1], ("b", 0, Some(4), None));
        assert_eq!(ask(&[at("a", &a, 12), at("b", &b, 4)])[1], ("b", 8, None, None));
    }
}
