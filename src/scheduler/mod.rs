//! Support for a decode engine's scheduler when blocks do not arrive: which requests lose which tokens, which request
//! computes a shared block again, and exact token accounting.
//!
//! Everything here is a pure function or a small state machine: no I/O, no clock, no unsafe. It keeps the promise
//! *frugal* on the engine's side: loaded blocks are kept, and a shared block is computed once. Token accounting always
//! adds up, since no state can represent a negative count or a lost token.
//!
//! | module | content |
//! | --- | --- |
//! | [`table`] | a request as the scheduler sees it: block tables, and the tokens held in them |
//! | [`invalid`] | a report of invalid blocks, and its outcome for each request |
//! | [`turn`] | which requests may run, up to which token, and which request each of the others waits for |
//! | [`tokens`] | the source of each token of one prompt |
//! | [`ledger`] | the same for all requests, exported as Prometheus counters |
//!
//! # One step of an engine
//! 1. Before scheduling, if a load failed recently: call [`turn::turns`]. Adopt the blocks that other requests computed,
//!    skip requests that must wait, and let no request run beyond its limit.
//! 2. Run the step.
//! 3. If pulls ended: collect them with [`Report::ended`](invalid::Report::ended). Unless the report is empty, call
//!    [`invalid::resolve`] first, with *all* requests that hold blocks. Then drop
//!    [`Outcome::uncache`](invalid::Outcome::uncache) from the prefix cache, set the new lengths, fail the failed requests,
//!    and update the [`Ledger`](ledger::Ledger). Count the tokens that the other requests computed only after that.
//!
//! The functions rely on four rules:
//! - Between a step and the report of its loads, no request is aborted, preempted or given a first token. Otherwise blocks
//!   that were computed on top of a lost block would remain, and no request could name them.
//! - The blocks of an asynchronous load enter the prefix cache only after its end. A request may still share them earlier:
//!   it has them in its table after the tokens that it holds, and waits for the load.
//! - A repeated load goes no further than the request's own [`limit`](turn::Turn::limit), and the tokens that had arrived
//!   before count as [`cached`](table::Held::cached) from then on.
//! - A load is stopped and quiet before a request that inherits its blocks runs.
//!
//! # Example
//! Two requests share the first two blocks of their prompts. `a` loads them in this step. `b`, scheduled right after it,
//! finds them in the prefix cache and loads one more block for itself. Then the prefill engine dies.
//! ```
//! use kvferry::{Block, BlockId, Cause, GroupId};
//! use kvferry::scheduler::invalid::{Policy, Report, resolve};
//! use kvferry::scheduler::ledger::Ledger;
//! use kvferry::scheduler::table::{GroupSpec, Held, Request};
//! use kvferry::scheduler::turn::turns;
//!
//! let groups = [GroupSpec::full(GroupId(0), 16).unwrap()];
//! let ids = |v: &[u32]| vec![v.iter().map(|&b| Some(BlockId(b))).collect::<Vec<_>>()];
//! let (table_a, table_b) = (ids(&[1, 2, 3]), ids(&[1, 2, 4, 5]));
//!
//! let mut ledger = Ledger::new();
//! ledger.admit("a", 40);
//! ledger.lookup(&"a", 0, 32); // nothing in the prefix cache, two blocks from the prefill engine
//! ledger.admit("b", 50);
//! ledger.lookup(&"b", 32, 16); // the two blocks of a, and one from the prefill engine
//!
//! let held_a = Held { cached: 0, loaded: 32, computed: 0 };
//! let held_b = Held { cached: 32, loaded: 16, computed: 0 };
//! let mut requests = [
//!     Request { id: "a", blocks: &table_a, held: held_a, loading: false, scheduled: 8 },
//!     Request { id: "b", blocks: &table_b, held: held_b, loading: false, scheduled: 2 },
//! ];
//!
//! // The step ends; block 2 did not arrive.
//! let block = Block { group: GroupId(0), id: BlockId(2) };
//! let report = Report::new().lost(block, Cause::PeerDown);
//! let outcome = resolve(&groups, &requests, &report, Policy::Recompute);
//! ledger.apply(&outcome);
//!
//! // Both keep only the first block: the tokens that they computed in this step depend on the lost block.
//! for (affected, request) in outcome.affected.iter().zip(&mut requests) {
//!     assert_eq!(affected.held.total(), 16);
//!     request.held = affected.held;
//!     request.scheduled = 0;
//! }
//! // a computes block 2 again, and b waits for it. If a is removed, b inherits the block.
//! assert_eq!(outcome.affected[0].waits_for, None);
//! assert_eq!(outcome.affected[1].waits_for, Some("a"));
//! assert_eq!((outcome.shared[0].owner, &outcome.shared[0].heirs[..]), ("a", &["b"][..]));
//!
//! // a runs. Then b adopts block 2 and computes the rest of its prompt.
//! requests[0].held.computed += 24;
//! ledger.computed(&"a", 40);
//! ledger.first_token(&"a");
//! let turn = turns(&groups, &requests).remove(1);
//! assert_eq!((turn.computed, turn.limit), (32, None));
//! requests[1].held.adopt(turn.computed);
//! ledger.adopted(&"b", turn.computed);
//! ledger.computed(&"b", 50);
//! ledger.first_token(&"b");
//!
//! let total = ledger.totals();
//! assert_eq!(total.local_cache + total.external + total.computed(), 90);
//! assert_eq!(total.own.total(), 16 + 16); // a: block 2; b: its own third block
//! assert_eq!(total.other.total(), 16); // b's second block, which a computed
//! ```

pub mod invalid;
pub mod ledger;
#[doc(hidden)]
pub mod sabotage;
pub mod table;
pub mod tokens;
pub mod turn;
