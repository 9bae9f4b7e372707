//! Decides the outcome of a set of invalid blocks for each request: a pure function over block tables.
//!
//! It only decides, and changes nothing itself. It keeps the promise *frugal* for requests that share blocks, and never
//! lets a request count on a block that did not arrive, or on tokens that were computed on top of one. Reports may come
//! one block per step, repeatedly or late, and may name blocks that belong to another request by now, or to none. All
//! that is normal input. A report without news changes nothing.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    hash::Hash,
};

use kvferry_proto::{Block, Cause, puller::Ended};

use super::{
    sabotage::{self, Bug},
    table::{GroupSpec, Held, Layout, Request},
    turn::{Owners, Reach, Shared},
};

/// How requests that lose blocks are treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Policy {
    /// They keep the tokens before the first invalid block, and compute the rest.
    #[default]
    Recompute,
    /// They fail.
    Fail,
}

/// The blocks that did not arrive. It may repeat earlier reports.
#[derive(Debug, Clone)]
pub struct Report<R> {
    blocks: HashMap<Block, Cause>,
    requests: HashMap<R, Cause>,
}

impl<R> Default for Report<R> {
    fn default() -> Self {
        Self { blocks: HashMap::new(), requests: HashMap::new() }
    }
}

impl<R: Eq + Hash> Report<R> {
    /// An empty report.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a block that did not arrive.
    #[must_use]
    pub fn lost(mut self, block: Block, cause: Cause) -> Self {
        self.blocks.insert(block, cause);
        self
    }

    /// Adds the invalid blocks of a pull that has ended, each with its cause. Adds nothing if all were loaded.
    ///
    /// ```
    /// use kvferry::scheduler::invalid::{Policy, Report, resolve};
    /// use kvferry::scheduler::table::{GroupSpec, Held, Request};
    /// # use kvferry::{BlockId, Consumer, GroupId, LocalBlocks, Model, OfferGroup, OfferSpec, PoolLayout, Producer, Pull, Ready};
    /// # let model = Model { name: "m".into(), dtype: "uint8".into(), scales: "".into(), weights: "".into(), attention: "HND".into(), block_tokens: 16 };
    /// # let layout = PoolLayout::uniform(8, 1, 4096, 16);
    /// # let producer = Producer::builder("prefill".parse()?, model.clone(), layout.clone()).build()?;
    /// # let blocks = vec![Some(BlockId(0))];
    /// # let offered = OfferGroup { group: GroupId(0), first_position: 0, blocks };
    /// # let offer = producer.offer(OfferSpec::new(16, vec![offered]), Ready::Now)?;
    /// # let consumer = Consumer::builder("decode".parse()?, model, layout).build()?;
    ///
    /// // A request wants two blocks, and the offer has only the first.
    /// let table = vec![vec![Some(BlockId(4)), Some(BlockId(5))]];
    /// let wanted = LocalBlocks { group: GroupId(0), first_position: 0, blocks: table[0].clone() };
    /// consumer.pull(Pull::new(offer, vec![wanted]))?;
    /// let mut report = Report::new();
    /// // An engine polls once a step.
    /// while report.is_empty() {
    ///     while let Some(ended) = consumer.poll() {
    ///         report = report.ended(&ended);
    ///     }
    /// }
    /// let held = Held { cached: 0, loaded: 32, computed: 0 };
    /// let request = Request { id: "request-1", blocks: &table, held, loading: false, scheduled: 0 };
    /// let outcome = resolve(&[GroupSpec::full(GroupId(0), 16).unwrap()], &[request], &report, Policy::Recompute);
    /// assert_eq!(outcome.affected[0].held.loaded, 16);
    /// assert_eq!(outcome.affected[0].first.cause, kvferry::Cause::NotOffered);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn ended(mut self, ended: &Ended) -> Self {
        self.blocks.extend(ended.lost());
        self
    }

    /// Adds a request whose whole load failed.
    #[must_use]
    pub fn load_failed(mut self, request: R, cause: Cause) -> Self {
        self.requests.insert(request, cause);
        self
    }

    /// Whether the report is empty.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty() && self.requests.is_empty()
    }
}

impl<R: Eq + Hash> Extend<(Block, Cause)> for Report<R> {
    fn extend<T: IntoIterator<Item = (Block, Cause)>>(&mut self, blocks: T) {
        self.blocks.extend(blocks);
    }
}

/// A block that a request counted on, and that is invalid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lost {
    /// The block.
    pub block: Block,
    /// Its first token, counted from the request's start.
    pub token: u64,
    /// The reason why it did not arrive.
    pub cause: Cause,
}

/// A request that continues with fewer tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Affected<R> {
    /// The request.
    pub id: R,
    /// The tokens that it holds now: whole blocks, all before the first lost one. During a load: the tokens that it will
    /// hold when the load ends, if no more blocks are lost.
    pub held: Held,
    /// The tokens that it does not hold any more, by part.
    pub lost: Held,
    /// Tokens that this step computed for it and that are discarded.
    pub discarded: u64,
    /// Its first lost block.
    pub first: Lost,
    /// The request that computes or loads the block that it needs next; `None` if it does that itself. Owners change:
    /// call [`turns`](super::turn::turns) at every step.
    pub waits_for: Option<R>,
}

/// A request to fail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed<R> {
    /// The request.
    pub id: R,
    /// The reason, for its client.
    pub reason: Reason,
    /// The tokens with which it could have continued.
    pub held: Held,
    /// Tokens that this step computed for it and that are discarded.
    pub discarded: u64,
}

/// The reason why a request fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// The policy is to fail.
    #[error(
        "the KV of the prompt did not arrive from token {} on ({}), and the policy of this engine is to fail: \
         try again, or set the policy to recompute", .0.token, .0.cause
    )]
    Policy(Lost),
}

/// The outcome of a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome<R> {
    /// The requests that continue with fewer tokens, in the given order. All others keep their tokens.
    pub affected: Vec<Affected<R>>,
    /// The requests to fail, in the given order. Requests that shared blocks with them are treated like all others.
    pub failed: Vec<Failed<R>>,
    /// The missing blocks that more than one request needs: the request that computes or loads each, and its heirs. This
    /// is a snapshot for logs; [`turns`](super::turn::turns) gives the current state at every step.
    pub shared: Vec<Shared<R>>,
    /// The blocks to drop from the prefix cache before the next lookup, ascending: the invalid ones, and all after them.
    pub uncache: Vec<Block>,
}

impl<R> Default for Outcome<R> {
    fn default() -> Self {
        Self { affected: Vec::new(), failed: Vec::new(), shared: Vec::new(), uncache: Vec::new() }
    }
}

/// Decides the outcome of a report for each request.
///
/// `requests` are all requests that hold blocks, as they were in the reported step: [`held`](Request::held) before it,
/// [`scheduled`](Request::scheduled) in it. Their order decides which one computes a shared block. Apply the outcome
/// before the tokens of the step are counted.
///
/// - A request keeps the tokens before its first lost block, cut to whole blocks of every group, to a length from which
///   its windows and states can continue, and to the tokens that it held before the step.
/// - With several groups, or with state, a load counts as a whole or not at all.
/// - Blocks that a request computed on top of an invalid block are invalid too, for all requests that share them.
/// - A reported block that a request computed itself is valid: the report is late, and the block has a new use.
pub fn resolve<R: Clone + Eq + Hash>(
    groups: &[GroupSpec],
    requests: &[Request<'_, R>],
    report: &Report<R>,
    policy: Policy,
) -> Outcome<R> {
    if report.is_empty() {
        return Outcome::default();
    }
    let layout = Layout::new(groups);
    let authored = authored(layout, requests);
    let mut bad = reported(layout, requests, report, &authored);
    let mut uncache: BTreeSet<Block> = bad.keys().copied().collect();
    let first = spread(layout, requests, &authored, &mut bad);

    let mut out = Outcome::default();
    let mut reach = Vec::with_capacity(requests.len());
    for (r, first) in requests.iter().zip(first) {
        let Some(first) = first else {
            let real = if r.loading { r.real() } else { r.ran_to() };
            reach.push(Some(Reach { real, promised: r.ran_to() }));
            continue;
        };
        let to = keeps(layout, r, first, &bad);
        uncache.extend(layout.blocks(r, to).map(|(.., b)| b).filter(|b| !dependent_kept(&bad, b)));
        let discarded = if r.loading { 0 } else { r.scheduled };
        let mut held = r.held;
        let lost = held.cut(to);
        if policy == Policy::Fail {
            out.failed.push(Failed { id: r.id.clone(), reason: Reason::Policy(first), held, discarded });
            reach.push(None);
            continue;
        }
        if sabotage::planted(Bug::ComputedKept) {
            held.computed += lost.computed + r.scheduled;
        }
        let real = if r.loading { held.cached } else { held.total() };
        reach.push(Some(Reach { real, promised: held.total() }));
        out.affected.push(Affected { id: r.id.clone(), held, lost, discarded, first, waits_for: None });
    }
    out.uncache = uncache.into_iter().collect();

    let owners = Owners::new(layout, requests, reach);
    out.shared = owners.shared();
    for s in &out.shared {
        sabotage::remember(s.block, &s.owner);
    }
    let mut affected = out.affected.iter_mut().peekable();
    for (i, r) in requests.iter().enumerate() {
        if let Some(a) = affected.next_if(|a| a.id == r.id) {
            a.waits_for = owners.turn(i).filter(|t| !t.may_run()).and_then(|t| t.waits_for);
        }
    }
    out
}

/// The blocks that a request computed itself, in the step or before.
fn authored<R>(layout: Layout<'_>, requests: &[Request<'_, R>]) -> HashSet<Block> {
    let own = |r: &Request<'_, R>| (r.held.loaded_end(), if r.loading { 0 } else { r.ran_to() });
    let blocks = requests.iter().flat_map(|r| {
        let (from, to) = own(r);
        layout.blocks(r, from).filter(move |(_, start, _)| (from..to).contains(start)).map(|(.., b)| b)
    });
    blocks.collect()
}

/// The reported blocks, without those that a request computed itself.
fn reported<R: Eq + Hash>(
    layout: Layout<'_>,
    requests: &[Request<'_, R>],
    report: &Report<R>,
    authored: &HashSet<Block>,
) -> HashMap<Block, Cause> {
    let mut bad = report.blocks.clone();
    for r in requests {
        if let Some(&cause) = report.requests.get(&r.id) {
            let loaded = layout.blocks(r, r.held.cached).filter(|(_, start, _)| *start < r.held.loaded_end());
            bad.extend(loaded.map(|(.., b)| (b, cause)));
        }
    }
    if !sabotage::planted(Bug::LateReportBelieved) {
        bad.retain(|b, _| !authored.contains(b));
    }
    bad
}

/// Adds the blocks that were computed on top of bad ones, until nothing changes. Returns the first lost block of each
/// request.
fn spread<R>(
    layout: Layout<'_>,
    requests: &[Request<'_, R>],
    authored: &HashSet<Block>,
    bad: &mut HashMap<Block, Cause>,
) -> Vec<Option<Lost>> {
    let mut first: Vec<Option<Lost>> = vec![None; requests.len()];
    let mut marked = HashSet::new();
    loop {
        let before = bad.len();
        for (r, first) in requests.iter().zip(&mut first) {
            let counted = layout.blocks(r, 0).filter(|(_, start, _)| *start < r.ran_to());
            let lost = counted
                .filter_map(|(_, token, block)| Some(Lost { block, token, cause: *bad.get(&block)? }))
                .filter(|l| !sabotage::planted(Bug::CountedOnAtOnce) || !marked.contains(&l.block))
                .min_by_key(|l| l.token);
            let Some(lost) = lost else { continue };
            if first.is_none_or(|f| lost.token < f.token) {
                *first = Some(lost);
            }
            if sabotage::planted(Bug::CountedOnAtOnce) {
                marked.extend(layout.blocks(r, lost.token).map(|(.., b)| b));
            }
            if r.loading || sabotage::planted(Bug::TaintIgnored) {
                continue;
            }
            // Tokens that it computed after the lost one, even in a block that a load had begun.
            let written = lost.token.max(r.held.loaded_end())..r.ran_to();
            for (g, start, b) in layout.blocks(r, lost.token) {
                let end = start.saturating_add(layout.groups[g].tokens());
                let computed = !written.is_empty() && start < written.end && end > written.start;
                // A loaded block is valid unless reported. An adopted block may come from any request, unless the request
                // that computed it is among these, and is checked itself.
                let adopted = (lost.token..r.held.cached).contains(&start) && !authored.contains(&b);
                if computed || adopted {
                    bad.entry(b).or_insert(lost.cause);
                }
            }
        }
        if bad.len() == before {
            return first;
        }
    }
}

/// The number of tokens that a request keeps.
fn keeps<R>(layout: Layout<'_>, r: &Request<'_, R>, first: Lost, bad: &HashMap<Block, Cause>) -> u64 {
    let mut bound = first.token.min(r.held.total());
    if sabotage::planted(Bug::GroupsApart) {
        return bound - bound % layout.unit;
    }
    if layout.whole_loads() && first.token < r.held.loaded_end() {
        bound = bound.min(r.held.cached);
    }
    layout.resume(r.blocks, bound, |_, _, b| !bad.contains_key(&b))
}

fn dependent_kept(bad: &HashMap<Block, Cause>, b: &Block) -> bool {
    sabotage::planted(Bug::DependentsStayCached) && !bad.contains_key(b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::table::Keeps;
    use kvferry_proto::{BlockId, GroupId};
    use proptest::prelude::*;

    type Tables = Vec<Vec<Option<BlockId>>>;

    fn tables(groups: &[&[u32]]) -> Tables {
        groups.iter().map(|t| t.iter().map(|&b| Some(BlockId(b))).collect()).collect()
    }

    fn block(id: u32) -> Block {
        Block { group: GroupId(0), id: BlockId(id) }
    }

    fn full(tokens: u32) -> [GroupSpec; 1] {
        [GroupSpec::full(GroupId(0), tokens).unwrap()]
    }

    fn request<'a>(id: &'a str, blocks: &'a Tables, cached: u64, loaded: u64, scheduled: u64) -> Request<'a, &'a str> {
        Request { id, blocks, held: Held { cached, loaded, computed: 0 }, loading: false, scheduled }
    }

    fn lost(blocks: &[u32]) -> Report<&'static str> {
        blocks.iter().fold(Report::new(), |r, b| r.lost(block(*b), Cause::PeerDown))
    }

    #[test]
    fn a_request_whose_lost_blocks_are_all_shared_is_cut_like_the_request_that_loaded_them() {
        let (a, b) = (tables(&[&[1, 2, 3]]), tables(&[&[1, 2, 4, 5]]));
        // a loads blocks 1 and 2; b found them in the cache in the same step, and loads 4 for itself.
        let requests = [request("a", &a, 0, 8, 2), request("b", &b, 8, 4, 3)];
        let out = resolve(&full(4), &requests, &lost(&[2]), Policy::Recompute);
        let held: Vec<_> = out.affected.iter().map(|a| (a.id, a.held, a.lost, a.discarded, a.waits_for)).collect();
        let held_of = |cached, loaded| Held { cached, loaded, computed: 0 };
        assert_eq!(
            held,
            [("a", held_of(0, 4), held_of(0, 4), 2, None), ("b", held_of(4, 0), held_of(4, 4), 3, Some("a")),]
        );
        assert_eq!(out.shared, [Shared { block: block(2), owner: "a", heirs: vec!["b"] }]);
        assert_eq!(out.uncache, [2, 3, 4, 5].map(block));
        assert!(out.failed.is_empty());
    }

    #[test]
    fn reports_may_come_one_block_per_step_and_repeatedly() {
        let a = tables(&[&[1, 2, 3, 4]]);
        let mut r = Request { loading: true, ..request("a", &a, 0, 16, 0) };
        for (report, left) in [(4, 12), (2, 4), (4, 4), (2, 4), (3, 4), (1, 0), (1, 0)] {
            let out = resolve(&full(4), &[r], &lost(&[report]), Policy::Recompute);
            let before = r.held.total();
            if let Some(a) = out.affected.first() {
                r.held = a.held;
            }
            assert_eq!(r.held.total(), left, "after block {report}");
            assert_eq!(out.affected.len(), usize::from(before > left), "a report without news changes nothing");
        }
    }

    #[test]
    fn a_reported_block_without_a_request_only_leaves_the_cache() {
        let a = tables(&[&[1, 2]]);
        let out = resolve(&full(4), &[request("a", &a, 0, 8, 1)], &lost(&[9]), Policy::Fail);
        assert_eq!(out, Outcome { uncache: vec![block(9)], ..Outcome::default() });
    }

    #[test]
    fn a_late_report_does_not_affect_a_request_that_has_computed_the_block_since() {
        let (a, b) = (tables(&[&[1, 2]]), tables(&[&[1, 3]]));
        let mut computed = request("a", &a, 0, 0, 3);
        computed.held.computed = 4;
        let requests = [request("b", &b, 4, 0, 2), computed];
        assert_eq!(resolve(&full(4), &requests, &lost(&[1, 2]), Policy::Recompute), Outcome::default());
    }

    #[test]
    fn blocks_computed_on_top_of_a_lost_block_are_lost_for_all_requests() {
        // c has its own copy of the first block, and found a block that a computes in this step on top of a failed load.
        let (a, c) = (tables(&[&[1, 2, 3]]), tables(&[&[7, 2, 8]]));
        let requests = [request("a", &a, 0, 4, 8), request("c", &c, 8, 0, 1)];
        let out = resolve(&full(4), &requests, &lost(&[1]), Policy::Recompute);
        let held: Vec<_> = out.affected.iter().map(|a| (a.id, a.held.total(), a.waits_for)).collect();
        assert_eq!(held, [("a", 0, None), ("c", 4, Some("a"))]);
    }

    #[test]
    fn under_the_policy_fail_exactly_the_affected_requests_fail_with_a_reason() {
        let (a, b, c) = (tables(&[&[1, 2]]), tables(&[&[1, 3]]), tables(&[&[4, 5]]));
        let requests = [request("a", &a, 0, 8, 1), request("b", &b, 4, 4, 1), request("c", &c, 0, 8, 1)];
        let out = resolve(&full(4), &requests, &lost(&[1]), Policy::Fail);
        assert_eq!(out.failed.iter().map(|f| f.id).collect::<Vec<_>>(), ["a", "b"]);
        assert!(out.affected.is_empty() && out.shared.is_empty());
        let reason = out.failed[1].reason.to_string();
        assert!(reason.contains("from token 0 on") && reason.contains("peer_down"), "{reason}");
    }

    #[test]
    fn a_load_of_several_groups_or_of_state_counts_as_a_whole_or_not_at_all() {
        let spec = |id, keeps| GroupSpec::new(GroupId(id), 4, keeps).unwrap();
        let two = tables(&[&[1, 2, 3], &[1, 2, 3]]);
        let groups = [spec(0, Keeps::All), spec(1, Keeps::All)];
        let out = resolve(&groups, &[request("a", &two, 4, 8, 1)], &lost(&[3]), Policy::Recompute);
        assert_eq!(out.affected[0].held, Held { cached: 4, loaded: 0, computed: 0 });
        // Only the last state was kept, so the request starts again from 0.
        let state: Tables = vec![vec![None, None, Some(BlockId(3))]];
        let groups = [spec(0, Keeps::State)];
        let out = resolve(&groups, &[request("a", &state, 4, 8, 1)], &lost(&[3]), Policy::Recompute);
        assert_eq!(out.affected[0].held, Held::default());
    }

    #[test]
    fn a_load_that_fails_without_naming_blocks_is_lost_as_a_whole() {
        let (a, b) = (tables(&[&[1, 2, 3]]), tables(&[&[1, 2, 4]]));
        let loading = Request { loading: true, ..request("a", &a, 4, 8, 0) };
        let report = Report::new().load_failed("a", Cause::Refused).load_failed("gone", Cause::Refused);
        let out = resolve(&full(4), &[loading, request("b", &b, 4, 0, 0)], &report, Policy::Recompute);
        assert_eq!(out.affected.len(), 1);
        assert_eq!(out.affected[0].held, Held { cached: 4, loaded: 0, computed: 0 });
    }

    proptest! {
        #[test]
        fn no_input_causes_a_panic_or_adds_tokens(
            ids in prop::collection::vec(prop::collection::vec(prop::collection::vec(prop::option::of(0u32..6), 0..5), 0..4), 0..5),
            held in prop::collection::vec(prop_oneof![0u64..20, Just(u64::MAX)], 20),
            keeps in prop::collection::vec(prop_oneof![Just(Keeps::All), (0u64..9).prop_map(Keeps::Window), Just(Keeps::State)], 0..4),
            sizes in prop::collection::vec(prop_oneof![1u32..5, Just(u32::MAX)], 4),
            report in prop::collection::vec((0u16..4, 0u32..8), 0..6),
        ) {
            let groups: Vec<_> =
                keeps.iter().zip(&sizes).enumerate().map(|(i, (k, n))| GroupSpec::new(GroupId(i as u16), *n, *k).unwrap()).collect();
            let tables: Vec<Tables> =
                ids.iter().map(|r| r.iter().map(|t| t.iter().map(|b| b.map(BlockId)).collect()).collect()).collect();
            let requests: Vec<_> = tables.iter().enumerate().map(|(i, blocks)| Request {
                id: i % 3,
                blocks,
                held: Held { cached: held[i * 4], loaded: held[i * 4 + 1], computed: held[i * 4 + 2] },
                loading: i % 2 == 1,
                scheduled: held[i * 4 + 3],
            }).collect();
            let mut all = Report::new().load_failed(1, Cause::Limit);
            all.extend(report.iter().map(|(g, b)| (Block { group: GroupId(*g), id: BlockId(*b) }, Cause::Stale)));
            let out = resolve(&groups, &requests, &all, Policy::Recompute);
            for a in &out.affected {
                prop_assert!(requests.iter().any(|r| r.id == a.id && a.held.total() <= r.held.total()));
            }
            crate::scheduler::turn::turns(&groups, &requests);
        }
    }
}
