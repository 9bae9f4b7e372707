//! `kvferry._native`: kvferry's producer and consumer for Python.
//!
//! This module owns handles only. `kvferry.vllm` decides what the failure of a load means to the engine. Every call that
//! may block releases the interpreter's lock, so the engine's other threads never wait for a peer. Every failure is a
//! Python exception with the library's own message.

mod consumer;
mod handle;
mod pool;
mod producer;
mod settings;

use kvferry::Incarnation;
use pyo3::{exceptions::PyValueError, prelude::*};

/// Computes an engine's incarnation from the incarnations of all its ranks, in rank order. 16 hexadecimal digits.
#[pyfunction]
fn engine_incarnation(ranks: Vec<String>) -> PyResult<String> {
    let ranks = ranks.into_iter().map(Incarnation::try_from).collect::<Result<Vec<_>, _>>();
    let ranks = ranks.map_err(|e| PyValueError::new_err(e.to_string()))?;
    let engine =
        Incarnation::of_engine(&ranks).ok_or_else(|| PyValueError::new_err("an engine has at least one rank"))?;
    Ok(engine.to_string())
}

/// Makes a new offer id: 32 hexadecimal digits.
#[pyfunction]
fn new_offer_id() -> String {
    kvferry::OfferId::random().to_string()
}

/// Checks an offer (JSON) and all its bounds. The `ValueError` names the first problem.
#[pyfunction]
fn check_offer(offer: &str) -> PyResult<()> {
    pool::offer(offer).map(drop)
}

/// Sends the library's log of peers and lanes to standard error, next to the engine's own log. The level is `warn`, unless
/// `KVFERRY_LOG` sets another filter (`kvferry=debug`).
fn log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("KVFERRY_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("kvferry=warn"));
    // Fails if another module of this process has installed a subscriber; that one then receives the events.
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
