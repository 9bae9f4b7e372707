//! A small, real engine around kvferry, to see what a bad day does to requests.
//!
//! It runs models of the Llama type on candle: a paged KV cache in kvferry's pool, a prefix cache, continuous batching,
//! chunked prefill, preemption, greedy sampling. Prefill engines offer the KV of prompts, decode engines pull it, and what
//! does not arrive is computed again, exactly that and nothing else. Answers are the same to the token whatever happens.
//!
//! | module | its noun |
//! | --- | --- |
//! | [`kernel`], [`llama`], [`weights`], [`text`] | the model: arithmetic, forward pass, where it comes from, its tokeniser |
//! | [`kv`], [`blocks`] | the cache: bytes in the pool; who holds which block, and what the prefix cache finds |
//! | [`request`], [`engine`], [`counts`] | requests, the thread that runs them, and what it counts by itself |
//! | [`api`], [`http`], [`serve`], [`router`] | the processes: bodies, engine front, engine process, router process |
//! | [`client`], [`process`], [`fleet`], [`prompts`] | the other side: clients, children, deployments, questions |
//! | [`demo`], [`soak`], [`ttft`] | what can be shown |

pub mod api;
pub mod blocks;
pub mod client;
pub mod counts;
pub mod demo;
pub mod engine;
pub mod fleet;
pub mod http;
pub mod kernel;
pub mod kv;
pub mod llama;
pub mod process;
pub mod prompts;
pub mod report;
pub mod request;
pub mod router;
pub mod serve;
pub mod soak;
pub mod text;
pub mod ttft;
pub mod weights;
