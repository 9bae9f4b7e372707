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

use kvferry::{Fingerprints, Incarnation, Offer, OfferId, OfferRank, Rank, Token};
use pyo3::{exceptions::PyValueError, prelude::*};

use self::pool::value_error;

/// Computes an engine's incarnation from the incarnations of all its ranks, in rank order. 16 hexadecimal digits.
#[pyfunction]
fn engine_incarnation(ranks: Vec<String>) -> PyResult<String> {
    let ranks = ranks.into_iter().map(Incarnation::try_from).collect::<Result<Vec<_>, _>>();
    let ranks = ranks.map_err(|e| PyValueError::new_err(e.to_string()))?;
    let engine =
        Incarnation::of_engine(&ranks).ok_or_else(|| PyValueError::new_err("an engine has at least one rank"))?;
    Ok(engine.to_string())
}

/// Makes the name of a new offer, sealed with the first of `seal_keys`. `ranks` are `(rank, incarnation, HOST:PORT)`. `number`
/// ascends from one name to the next; 0: not numbered. With `transfer`, a router's id for the transfer, the name's id and token
/// are derived from it: both engines make the same name. Returns the offer's id and the name (JSON), which contains its secret
/// token.
#[pyfunction]
#[pyo3(signature = (*, engine, incarnation, ranks, tokens, request, fingerprints, seal_keys, number = 0, transfer = None))]
#[allow(clippy::too_many_arguments)]
fn name_offer(
    engine: &str,
    incarnation: String,
    ranks: Vec<(u32, String, String)>,
    tokens: u64,
    request: String,
    fingerprints: Fingerprints,
    seal_keys: Vec<Vec<u8>>,
    number: u64,
    transfer: Option<&str>,
) -> PyResult<(String, String)> {
    let rank = |(rank, incarnation, addr): (u32, String, String)| {
        let incarnation = Incarnation::try_from(incarnation).map_err(value_error)?;
        Ok(OfferRank { rank: Rank(rank), incarnation, addr })
    };
    let ranks = ranks.into_iter().map(rank).collect::<PyResult<_>>()?;
    let engine = engine.parse().map_err(value_error)?;
    let incarnation = Incarnation::try_from(incarnation).map_err(value_error)?;
    let id = transfer.map_or_else(OfferId::random, OfferId::of_transfer);
    let mut name = Offer::new(id, engine, incarnation, ranks, tokens);
    name = name.request(request).fingerprints(fingerprints);
    if let Some(transfer) = transfer {
        name.token = Token::of_transfer(transfer);
    }
    name.number = number;
    if let Some(key) = pool::seal_keys(seal_keys)?.first() {
        name = name.sealed(key);
    }
    name.check().map_err(value_error)?;
    Ok((name.id.to_string(), name.to_json()))
}

/// The id of the offer that a router calls by this transfer id.
#[pyfunction]
fn transfer_offer(transfer: &str) -> String {
    OfferId::of_transfer(transfer).to_string()
}

/// Checks the name of an offer (JSON): all its bounds, and its seal if there are keys. The `ValueError` names the first
/// problem.
#[pyfunction]
fn check_offer(offer: &str, seal_keys: Vec<Vec<u8>>) -> PyResult<()> {
    pool::offer(offer)?.check_seal(&pool::seal_keys(seal_keys)?).map_err(value_error)
}

/// The default filter. `kvferry.vllm` itself tells the end of loads and of offers, with the names of vLLM's requests.
const LOGGED: &str = "kvferry=warn,kvferry::consumer::pulls=error,kvferry::producer::core=error";

/// Sends the library's log of peers and lanes to standard error, next to the engine's own log: warnings and errors, unless
/// `KVFERRY_LOG` sets another filter (`kvferry=debug`).
fn log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("KVFERRY_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(LOGGED));
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
        consumer::{Consumer, Ended, Hold},
        engine_incarnation, name_offer,
        pool::{Identity, Pool},
        producer::Producer,
        settings::Settings,
        transfer_offer,
    };
}
