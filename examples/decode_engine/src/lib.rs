//! A small but real engine around kvferry, to test the effect of failures on requests.
//!
//! It runs models of the Llama type on candle, with a paged KV cache in kvferry's pool, a prefix cache, continuous batching,
//! chunked prefill, preemption and greedy sampling. Prefill engines offer the KV of prompts, decode engines pull it and
//! compute exactly the missing part. Failures never change the tokens of an answer.
//!
//! | module | content |
//! | --- | --- |
//! | [`kernel`], [`llama`], [`weights`], [`text`] | the model: arithmetic, forward pass, weights, tokeniser |
//! | [`kv`], [`blocks`] | the cache: bytes in the pool; references to blocks, and the prefix cache |
//! | [`request`], [`engine`], [`counts`] | requests, the thread that runs them, and its independent counts |
//! | [`api`], [`http`], [`serve`], [`router`] | the processes: HTTP bodies, HTTP front, engine process, router process |
//! | [`client`], [`process`], [`fleet`], [`prompts`] | clients, child processes, deployments, prompts |
//! | [`demo`], [`soak`], [`ttft`], [`handover`] | the commands that measure and demonstrate |

pub mod api;
pub mod blocks;
pub mod client;
pub mod counts;
pub mod demo;
pub mod engine;
pub mod fleet;
pub mod handover;
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
