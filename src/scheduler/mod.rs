//! What a decode engine's scheduler needs when blocks do not arrive: who loses what, who computes what again, and token
//! accounting that cannot lie.
//!
//! Everything here is a pure function or a small state machine: no I/O, no clock, no unsafe. It keeps the promise
//! *frugal* on the engine's side (what did arrive is kept, what is shared is computed once) and makes the books balance:
//! no state can be written down in which a count is negative or a token is lost.
//!
//! | file | its noun |
//! | --- | --- |
//! | [`table`] | what a scheduler knows of a request: block tables, and the tokens held in them |
//! | [`invalid`] | a report of invalid blocks, and what follows from it for each request |
//! | [`turn`] | who may run, up to where, and who waits for whom |
//! | [`tokens`] | where the tokens of one prompt came from |
//! | [`ledger`] | the same for all requests, exported as Prometheus counters |
//!
//! # One step of an engine
//! 1. Before scheduling, if a load failed lately: [`turn::turns`]. Take over what others computed, skip who must wait,
//!    and let nobody run past his limit.
//! 2. Run the step.
//! 3. If blocks were reported: [`invalid::resolve`] first, over *all* requests that hold blocks, then drop
//!    [`Outcome::uncache`](invalid::Outcome::uncache) from the prefix cache, set the new lengths, fail who must fail, and
//!    tell the [`Ledger`](ledger::Ledger). Only then count what the others computed in the step.
//!
//! Four rules make what these functions see the whole truth:
//! - Between a step and the report of what its loads brought, nobody is aborted, preempted or given a first token: what
//!   was computed on top of a lost block would stay behind with nobody to name it.
//! - The blocks of an asynchronous load are not in the prefix cache before it has ended. A request may share them
//!   nevertheless, by having them in its table behind what it holds: it then waits for the load.
//! - A load that is tried again goes no further than the request's own [`limit`](turn::Turn::limit), and what has arrived
//!   counts as [`cached`](table::Held::cached) from then on.
//! - A load is stopped, and quiet, before a request that inherits its blocks runs.
//!
//! # The day that this is for
//! Two requests share the first two blocks of their prompts. `a` loads them in this step, and `b`, scheduled right
//! behind it, finds them in the prefix cache and loads one more block for itself. Then the prefill engine dies.
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
//! // Both keep the first block and nothing else: what they computed in this step stood on a block that never came.
//! for (affected, request) in outcome.affected.iter().zip(&mut requests) {
//!     assert_eq!(affected.held.total(), 16);
//!     request.held = affected.held;
//!     request.scheduled = 0;
//! }
//! // a computes block 2 again, and b waits for it; should a go away, b is its heir.
//! assert_eq!(outcome.affected[0].waits_for, None);
//! assert_eq!(outcome.affected[1].waits_for, Some("a"));
//! assert_eq!((outcome.shared[0].owner, &outcome.shared[0].heirs[..]), ("a", &["b"][..]));
//!
//! // a runs; then b takes block 2 over and computes the rest of its prompt.
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
pub mod sabotage;
pub mod table;
pub mod tokens;
pub mod turn;
