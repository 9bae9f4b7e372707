//! `kvferry._native`: kvferry's producer and consumer for Python.
//!
//! Owns nothing but handles, and decides nothing: what a load's failure means to an engine is decided in `kvferry.vllm`.
//! The interpreter's lock is released in every call that does more than read a number, so that an engine's other threads
//! never wait for a peer. Every failure is a Python exception with the library's own message.

mod consumer;
mod handle;
mod pool;
mod producer;
mod settings;

use kvferry::Incarnation;
use pyo3::{exceptions::PyValueError, prelude::*};

/// An engine's incarnation, as 16 hexadecimal digits, from those of all its ranks in rank order.
#[pyfunction]
fn engine_incarnation(ranks: Vec<String>) -> PyResult<String> {
    let ranks = ranks.into_iter().map(Incarnation::try_from).collect::<Result<Vec<_>, _>>();
    let ranks = ranks.map_err(|e| PyValueError::new_err(e.to_string()))?;
    let engine =
        Incarnation::of_engine(&ranks).ok_or_else(|| PyValueError::new_err("an engine has at least one rank"))?;
    Ok(engine.to_string())
}

/// A new offer id, as 32 hexadecimal digits.
#[pyfunction]
fn new_offer_id() -> String {
    kvferry::OfferId::random().to_string()
}

/// Checks the JSON of an offer, with all its bounds. `ValueError` says what is wrong with it.
#[pyfunction]
fn check_offer(offer: &str) -> PyResult<()> {
    pool::offer(offer).map(drop)
}

/// What the library has to say of peers and lanes goes to standard error, beside the engine's own log: from `warn` on, or
/// as `KVFERRY_LOG` says (`kvferry=debug`).
fn log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("KVFERRY_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("kvferry=warn"));
    // Another module of this process may have been first: then it listens.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).try_init();
}

#[pymodule]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(_module: &Bound<'_, PyModule>) -> PyResult<()> {
        super::log();
        Ok(())
    }

    #[pymodule_export]
    use super::{
        check_offer,
        consumer::{Consumer, Ended},
        engine_incarnation, new_offer_id,
        pool::{Identity, Pool},
        producer::Producer,
        settings::Settings,
    };
}
