//! Whose turn it is after a load failed: who may run and up to where, who takes over what another computed, and who
//! waits for whom.
//!
//! A pure function of the block tables and lengths as they are now. Nothing is remembered between calls, so nothing can
//! be stale: when an owner finishes, is aborted or is preempted, it is not among the requests any more, and the next
//! one that holds the block is its owner. It never lets two requests compute one block, and among the requests that
//! wait there is always one that may run.

use std::{collections::HashMap, hash::Hash};

use super::{
    sabotage::{self, Bug},
    table::{GroupSpec, Keeps, Layout, Request},
};
use crate::block::Block;

/// What a request may do in the next step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn<R> {
    /// The request.
    pub id: R,
    /// Its computed length: longer than what it held where sharers have filled the blocks that follow. The difference is
    /// to be added to [`Held::computed`](super::table::Held::computed), and to be told to
    /// [`Ledger::adopted`](super::ledger::Ledger::adopted).
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
    let spans: Vec<Option<Reach>> = requests.iter().map(|r| Some(Reach::now(r))).collect();
    let owners = Owners::new(Layout::new(groups), requests, &spans);
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

/// Who has a block, or will.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Somebody has it.
    There,
    /// This request computes or loads it.
    Owned(usize),
    /// Nobody has it nor will: only a planted bug brings it about.
    #[cfg_attr(not(feature = "sabotage"), allow(dead_code))]
    Orphan(usize),
}

/// A block, as one of its holders sees it.
#[derive(Clone, Copy)]
struct Holder {
    request: usize,
    reach: Reach,
    start: u64,
    end: u64,
}

impl Holder {
    fn past(&self) -> bool {
        self.reach.real >= self.end
    }
}

fn fate<R: Hash>(unit: u64, block: Block, requests: &[Request<'_, R>], holders: &[Holder]) -> Fate {
    if holders.iter().any(Holder::past) {
        return Fate::There;
    }
    let loads = |h: &&Holder| requests[h.request].loading && h.start < h.reach.promised;
    // Whoever has begun a unit goes on with it: were it judged block by block, two requests could each wait for the
    // other's half where groups have blocks of different sizes.
    let begun = |h: &&Holder| {
        let first = h.start - h.start % unit;
        h.reach.real > first && h.reach.real < first.saturating_add(unit)
    };
    let loader = if sabotage::planted(Bug::LoaderOverruled) { None } else { holders.iter().find(loads) };
    match loader.or_else(|| holders.iter().find(begun)).or(holders.first()) {
        None => Fate::There,
        Some(h) if sabotage::disinherited(block, &requests[h.request].id) => Fate::Orphan(h.request),
        Some(h) => Fate::Owned(h.request),
    }
}

/// Who has or will have each block, as far as it matters.
pub(super) struct Owners<'a, 'b, R> {
    layout: Layout<'a>,
    requests: &'a [Request<'b, R>],
    reach: &'a [Option<Reach>],
    /// The blocks that end behind the shortest request's length (all others are there), and who holds them.
    blocks: HashMap<Block, (Fate, Vec<Holder>)>,
}

impl<'a, 'b, R: Clone + Hash> Owners<'a, 'b, R> {
    /// `reach` says how far each request is; `None` for one that is about to be failed, and holds nothing any more.
    pub fn new(layout: Layout<'a>, requests: &'a [Request<'b, R>], reach: &'a [Option<Reach>]) -> Self {
        let shortest = reach.iter().flatten().map(|s| s.real).min().unwrap_or(0);
        let mut holders: HashMap<Block, Vec<Holder>> = HashMap::new();
        for (request, (r, reach)) in requests.iter().zip(reach).enumerate() {
            let Some(reach) = *reach else { continue };
            for (g, start, b) in layout.blocks(r, shortest) {
                let end = start.saturating_add(layout.groups[g].tokens());
                holders.entry(b).or_default().push(Holder { request, reach, start, end });
            }
        }
        let blocks = holders.into_iter().map(|(b, h)| (b, (fate(layout.unit, b, requests, &h), h))).collect();
        Self { layout, requests, reach, blocks }
    }

    fn fate(&self, b: Block) -> Fate {
        self.blocks.get(&b).map_or(Fate::There, |(fate, _)| *fate)
    }

    /// The turn of a request by its index; `None` for one that is out.
    pub fn turn(&self, i: usize) -> Option<Turn<R>> {
        let (r, reach) = (self.requests.get(i)?, (*self.reach.get(i)?)?);
        let id = r.id.clone();
        if r.loading {
            return Some(Turn { id, computed: reach.real, limit: Some(reach.real), waits_for: None });
        }
        let computed = self.adopt(r, reach.real);
        let mut first: Option<(u64, Option<usize>)> = None;
        for (_, start, b) in self.layout.blocks(r, computed) {
            let stop = match self.fate(b) {
                Fate::Owned(o) if o == i || sabotage::planted(Bug::EveryoneComputes) => continue,
                Fate::Owned(o) | Fate::Orphan(o) => (start.max(computed), Some(o)),
                // Where it could take over: not where a part of the past is missing, for then nobody ever could.
                Fate::There if start > computed && start.is_multiple_of(self.layout.unit) => (start, None),
                Fate::There => continue,
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
                Some(id) => self.fate(Block { group: spec.id, id }) != Fate::There,
                None => spec.keeps == Keeps::All,
            });
            let stop = stop.map_or(table.len(), |(p, _)| p) as u64;
            bound = bound.min(stop.saturating_mul(spec.tokens()));
        }
        if bound <= real || self.layout.groups.is_empty() {
            return real;
        }
        self.layout.resume(r.blocks, bound, |_, _, b| self.fate(b) == Fate::There).max(real)
    }

    /// Blocks that more than one request needs and nobody has, in a stable order.
    pub fn shared(&self) -> Vec<Shared<R>> {
        let mut out: Vec<(u64, Shared<R>)> = Vec::new();
        for (&block, (fate, holders)) in &self.blocks {
            let (Fate::Owned(o) | Fate::Orphan(o)) = *fate else { continue };
            let id = |i: usize| self.requests[i].id.clone();
            let heirs: Vec<R> = holders.iter().filter(|h| h.request != o).map(|h| id(h.request)).collect();
            if !heirs.is_empty() {
                out.push((holders[0].start, Shared { block, owner: id(o), heirs }));
            }
        }
        out.sort_by_key(|(start, s)| (*start, s.block));
        out.into_iter().map(|(_, s)| s).collect()
    }
}
